"""Section `objectives`: what is trained next to masked tokens on corpora of sentence pairs. Loads no torch."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from maskvr_ds.config.base import PositiveRatio, Section, shown
from maskvr_ds.config.model import ModelConfig

# Objective, which is the packing of its corpora -> label 1 of a pair.
PAIR_OBJECTIVES = {"nsp": "the second segment is a random one", "sop": "the segments are swapped"}
# Model type -> class of transformers with its pooler and binary head, in addition to the masked-LM head.
PAIR_CLASSES = {"albert": "AlbertForPreTraining", "bert": "BertForPreTraining", "ernie": "ErnieForPreTraining"}


class Objectives(Section):
    """Weights of the objectives in the loss, each of which is a mean over its own predictions in the global batch; or a
    list of their names, for weights of 1. A corpus of pairs needs nsp or sop, whichever it was packed with, or
    [mlm] to train masked tokens only."""

    mlm: PositiveRatio = 1.0
    """Masked tokens, which are always trained."""
    nsp: PositiveRatio | None = None
    """Next-sentence prediction (Devlin et al. 2018) on corpora packed with nsp; null: not trained."""
    sop: PositiveRatio | None = None
    """Sentence-order prediction (Lan et al. 2019) on corpora packed with sop; null: not trained."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)):
            if unknown := [name for name in values if name not in cls.model_fields]:
                raise ValueError(f"{shown(unknown[0])}: unknown objective; there are {', '.join(cls.model_fields)}")
            if "mlm" not in values:
                raise ValueError(f"{shown(list(values))}: masked tokens are always trained; add mlm")
            return dict.fromkeys(values, 1.0)
        if not isinstance(values, (Mapping, cls)):
            raise ValueError(
                f"{shown(values)}: a list of objectives or a mapping to their weights expected, for example [mlm, nsp] "
                "or {mlm: 1.0, nsp: 1.0}"
            )
        return values

    @model_validator(mode="after")
    def _one_of_pairs(self) -> Self:
        if self.nsp is not None and self.sop is not None:
            raise ValueError("nsp and sop are both set, and a corpus has the pairs of one of them; set one to null")
        return self

    @property
    def pair(self) -> str | None:
        """nsp, sop, or None."""
        return next((name for name in PAIR_OBJECTIVES if getattr(self, name) is not None), None)

    @property
    def pair_weight(self) -> float:
        """Weight of the pair objective; 0 without one."""
        return self.nsp or self.sop or 0.0


def check_pair_model(model: ModelConfig, objective: str) -> None:
    """Raise ValueError if the architecture has no head for pairs or no second token type."""
    kind = model.architecture
    if kind not in PAIR_CLASSES:
        raise ValueError(
            f"objectives.{objective}: transformers has no {kind} with a binary head for pairs next to that for "
            f"masked tokens; choose one of the architectures {', '.join(PAIR_CLASSES)}, or set objectives to [mlm]"
        )
    types = model.type_vocab_size if kind == "bert" else model.merged.get("type_vocab_size", 2)
    if types == 1:
        where = "model.type_vocab_size" if kind == "bert" else "model.settings.type_vocab_size"
        raise ValueError(
            f"objectives.{objective}: {where} is 1, and the two segments of a pair need a token type each; set it to 2"
        )
