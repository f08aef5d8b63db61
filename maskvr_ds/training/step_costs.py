"""Seconds of a training step per candidate of masking.strategy auto, as they are stored. Loads no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from maskvr_ds.training.auto_choice import MaskingPlan


@dataclass(frozen=True)
class StepCosts:
    """uniform: rate -> seconds of a step with uniform masks. added: strategy -> seconds that it adds. machine: what the
    seconds depend on, by name. late: layer at which [MASK] enters -> as `uniform`; of masking.auto.late_layers.
    per_pass: seconds of a measurement of progress per forward and backward pass of a row, of which the ranks share
    all; None in costs of earlier versions."""

    uniform: dict[float, float]
    added: dict[str, float]
    machine: dict[str, Any]
    late: dict[int, dict[float, float]] = field(default_factory=dict)
    per_pass: float | None = None

    def seconds(self, plan: MaskingPlan) -> float:
        """Seconds of a step."""
        of_rates = self.late[plan.late] if plan.late else self.uniform
        return of_rates[plan.rate] + self.added.get(plan.strategy, 0.0)

    @property
    def shortest(self) -> float:
        """Seconds of the shortest step: strategies only add to those of uniform masks."""
        return min(seconds for of_rates in (self.uniform, *self.late.values()) for seconds in of_rates.values())

    def stored(self) -> dict[str, Any]:
        """In JSON types."""
        late = [[layer, list(map(list, of_rates.items()))] for layer, of_rates in self.late.items()]
        found = {**asdict(self), "uniform": [[rate, seconds] for rate, seconds in self.uniform.items()], "late": late}
        if not late:
            del found["late"]
        if self.per_pass is None:
            del found["per_pass"]
        return found

    @classmethod
    def read(cls, stored: Any) -> Self:
        """Raises ValueError if the content has another form."""
        try:
            uniform = {float(rate): float(seconds) for rate, seconds in stored["uniform"]}
            added = {str(name): float(seconds) for name, seconds in stored["added"].items()}
            machine = dict(stored["machine"])
            late = {int(n): {float(r): float(s) for r, s in of_rates} for n, of_rates in stored.get("late", [])}
            per_pass = None if (found := stored.get("per_pass")) is None else float(found)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not the seconds of masking strategies ({type(error).__name__}: {error})") from None
        for of_rates in (uniform, *late.values()):
            if not of_rates or not all(0 < x < float("inf") for x in of_rates.values()):
                raise ValueError(f"seconds of uniform masks must be positive, found {list(of_rates.values())}")
        if not all(0 <= x < float("inf") for x in added.values()):
            raise ValueError(f"seconds that a strategy adds must not be negative, found {added}")
        if per_pass is not None and not 0 < per_pass < float("inf"):
            raise ValueError(f"seconds of a pass in a measurement must be positive, found {per_pass}")
        return cls(uniform, added, machine, late, per_pass)

    def lacks(self, needed: "Needed") -> str | None:
        """A candidate whose costs are missing, in words; None if all are known."""
        for rate in needed.rates:
            if rate not in self.uniform:
                return f"uniform masks at rate {rate:g}"
            for layer in needed.late_layers:
                if rate not in self.late.get(layer, {}):
                    return f"[MASK] from layer {layer} at rate {rate:g}"
        missing = [strategy for strategy in needed.strategies if strategy not in self.added]
        return missing[0] if missing else None

    def __str__(self) -> str:
        rates = ", ".join(f"{seconds:.4g} s at rate {rate:.4g}" for rate, seconds in self.uniform.items())
        added = "".join(f"; {name} adds {seconds:.2g} s" for name, seconds in self.added.items())
        for layer, of_rates in self.late.items():
            listed = ", ".join(f"{seconds:.4g} s at rate {rate:.4g}" for rate, seconds in of_rates.items())
            added += f"; with [MASK] from layer {layer} {listed}"
        if self.per_pass is not None:
            added += f"; a measurement {self.per_pass:.2g} s per pass of a row"
        return f"uniform masks {rates}{added}"


@dataclass(frozen=True)
class Needed:
    """Candidates whose costs a run needs. strategies: besides uniform. late_layers: besides the first."""

    rates: tuple[float, ...]
    strategies: tuple[str, ...]
    late_layers: tuple[int, ...] = ()
