"""A strategy with its settings in one word, for commands that compare several. Loads no torch.

    uniform    fully_explored:placement=same_batch,segments_per_sequence=3    mapnet:floor=0.1    span:optimizer.lr=0.02

Behind the colon stand settings, values in YAML: of the section `masking`; of the section `mapnet`, where the strategy
is mapnet or an oracle; of `auto` and `mapnet`, where it is auto; or of any section by its full name.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from maskvr_ds.config.base import ConfigError, describe
from maskvr_ds.config.loading import assign
from maskvr_ds.config.masking import AutoConfig, MapNetConfig, MaskingConfig

# Strategies that no run can have, for they look at what they are to predict: see oracles.py.
HEAD_ORACLE = "oracle_head"
TOKEN_ORACLES = ("oracle_gradient", HEAD_ORACLE)
MASK_ORACLE = "oracle_mask"
# Strategy → section of its own → fields.
_OWN_SECTIONS = {
    "mapnet": {"mapnet": MapNetConfig.model_fields},
    "auto": {"auto": AutoConfig.model_fields, "mapnet": MapNetConfig.model_fields},
}
ORACLES = (*TOKEN_ORACLES, MASK_ORACLE)


@dataclass(frozen=True)
class StrategySpec:
    """text: as it was given, what the strategy is called in tables. assignments: section.field=value, the strategy
    first."""

    text: str
    strategy: str
    assignments: tuple[str, ...]

    @property
    def folder(self) -> str:
        """A name for files."""
        return re.sub(r"[^\w.=-]+", "_", self.text)

    def sections(self) -> dict[str, Any]:
        """Section → field → value."""
        values: dict[str, Any] = {}
        for assignment in self.assignments:
            assign(values, assignment)
        return values

    def masking(self, common: dict[str, Any]) -> MaskingConfig:
        """The section, over fields `common` to all strategies; oracles draw as mapnet does.

        Raises ConfigError for what the section does not know, or settings of other sections than masking and mapnet.
        """
        sections = self.sections()
        if others := sections.keys() - {"masking", "mapnet"}:
            raise ConfigError(
                f"{self.text}: {', '.join(sorted(others))} cannot be changed here, masking and mapnet can"
            )
        values = {**common, **sections["masking"]}
        if self.strategy == "auto":
            raise ConfigError(f"{self.text}: auto goes from one strategy to another; name those")
        if self.strategy in ORACLES:
            values["strategy"] = "mapnet"
        return _validated(self.text, MaskingConfig, values)

    def floor(self, default: float) -> float:
        """λ of mapnet and of the oracles. Raises ConfigError for any other setting of the section mapnet."""
        section = {"floor": default, **self.sections().get("mapnet", {})}
        if others := section.keys() - {"floor"}:
            raise ConfigError(f"{self.text}: {', '.join(sorted(others))} belongs to training; only floor counts here")
        return _validated(self.text, MapNetConfig, section).floor


def _validated(text: str, section: Any, values: dict[str, Any]) -> Any:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(describe(fault, section) for fault in error.errors(include_url=False))
        raise ConfigError(f"{text}: {faults}") from None


def parse_strategy(text: str) -> StrategySpec:
    """Raises ConfigError where it is not of the form; which names there are is checked by the section."""
    strategy, colon, settings = text.partition(":")
    assignments = [f"masking.strategy={strategy}"]
    sections: dict[str, Any] = _OWN_SECTIONS.get("mapnet" if strategy in ORACLES else strategy, {})
    for setting in settings.split(",") if colon else []:
        key, equals, value = setting.partition("=")
        if not (strategy and key and equals and value):
            raise ConfigError(f"{text!r}: strategy, or strategy:setting=value,setting=value expected")
        if "." not in key:
            section = next((name for name, fields in sections.items() if key in fields), "masking")
            key = f"{section}.{key}"
        assignments.append(f"{key}={value}")
    return StrategySpec(text, strategy, tuple(assignments))


def parse_strategies(texts: Sequence[str], first: str | None = None) -> list[StrategySpec]:
    """All of them, in order, `first` in front. Raises ConfigError, also where two are the same."""
    if first is not None:
        texts = [first, *(text for text in texts if text != first)]
    _distinct(texts)
    return [parse_strategy(text) for text in texts]


def _distinct(texts: Collection[str]) -> None:
    if repeated := sorted({text for text in texts if list(texts).count(text) > 1}):
        raise ConfigError(f"{', '.join(repeated)}: named twice")
