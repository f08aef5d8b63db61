"""A strategy with its settings in one word, for commands that compare several. Loads no torch.

    uniform    fully_explored:placement=same_batch,segments_per_sequence=3    mapnet:floor=0.1    span:optimizer.lr=0.02

After the colon: settings with values in YAML, of the strategy's subsection of `masking` (auto: `auto` and `mapnet`;
oracles: `mapnet`), of `masking` itself, or of any section by their full name.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from maskvr_ds.config.base import ConfigError, faults_of
from maskvr_ds.config.loading import assign
from maskvr_ds.config.masking import SUBSECTIONS, MapNetConfig, MaskingConfig
from maskvr_ds.run_folder.migration import renamed

# Strategies that only `maskvr variance` measures: they look at what is to be predicted, see oracles.py.
HEAD_ORACLE = "oracle_head"
TOKEN_ORACLES = ("oracle_gradient", HEAD_ORACLE)
MASK_ORACLE = "oracle_mask"
ORACLES = (*TOKEN_ORACLES, MASK_ORACLE)
# Settings of MAPNet that matter when masks are drawn by a network that was trained already.
_DRAWING = {"floor", "sampler", "estimator"}


@dataclass(frozen=True)
class StrategySpec:
    """text: as given, the strategy's name in tables. assignments: section.field=value, masking.strategy first."""

    text: str
    strategy: str
    assignments: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The text as a file name."""
        return re.sub(r"[^\w.=-]+", "_", self.text)

    def sections(self) -> dict[str, Any]:
        """Section -> field -> value. Raises ConfigError for renamed settings."""
        values: dict[str, Any] = {}
        for assignment in self.assignments:
            assign(values, assignment)
        if old := renamed(values):
            raise ConfigError(f"{self.text}: {'; '.join(old)}")
        return values

    def masking(self, common: dict[str, Any], network: MapNetConfig | None = None) -> MaskingConfig:
        """The section `masking` for measuring, over fields `common` to all strategies; oracles draw as mapnet does.

        network: of the run, for defaults: of floor, and for mapnet itself also of sampler and estimator. Raises
        ConfigError for unknown settings, other sections than masking, and settings of MAPNet's training.
        """
        sections = self.sections()
        if others := sections.keys() - {"masking"}:
            raise ConfigError(f"{self.text}: {', '.join(sorted(others))} cannot be changed here, only masking can")
        if self.strategy == "auto":
            raise ConfigError(f"{self.text}: auto changes strategies during training; name the strategies themselves")
        values = {**common, **sections["masking"]}
        if "late_layer" in values:
            raise ConfigError(
                f"{self.text}: late_layer is that of the checkpoint, which was trained with it; remove it"
            )
        if self.strategy in (*ORACLES, "mapnet"):
            values["strategy"] = "mapnet"
            section = values.get("mapnet", {})
            if others := section.keys() - _DRAWING:
                raise ConfigError(
                    f"{self.text}: {', '.join(sorted(others))} belongs to training; only "
                    f"{', '.join(sorted(_DRAWING))} apply here"
                )
            own = _DRAWING if self.strategy == "mapnet" else {"floor"}
            values["mapnet"] = {**({} if network is None else network.model_dump(include=own)), **section}
        try:
            return MaskingConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{self.text}: {'; '.join(faults_of(error, MaskingConfig))}") from None


def parse_strategy(text: str) -> StrategySpec:
    """Raises ConfigError if the text has another form; names of strategies are checked by `MaskingConfig`."""
    strategy, colon, settings = text.partition(":")
    assignments = [f"masking.strategy={strategy}"]
    own = ("mapnet",) if strategy in ORACLES else SUBSECTIONS.get(strategy, ())
    for setting in settings.split(",") if colon else []:
        key, equals, value = setting.partition("=")
        if not (strategy and key and equals and value):
            raise ConfigError(f"{text!r}: strategy, or strategy:setting=value,setting=value expected")
        if "." not in key:
            section = next((name for name in own if key in _fields(name)), None)
            key = f"masking.{section}.{key}" if section else f"masking.{key}"
        assignments.append(f"{key}={value}")
    return StrategySpec(text, strategy, tuple(assignments))


def _fields(subsection: str) -> Collection[str]:
    section: Any = MaskingConfig.model_fields[subsection].annotation
    return section.model_fields


def parse_strategies(texts: Sequence[str], first: str | None = None) -> list[StrategySpec]:
    """All of them in order, with `first` in front. Raises ConfigError, also if two are equal."""
    if first is not None:
        texts = [first, *(text for text in texts if text != first)]
    if repeated := sorted({text for text in texts if list(texts).count(text) > 1}):
        raise ConfigError(f"{', '.join(repeated)}: named twice")
    return [parse_strategy(text) for text in texts]
