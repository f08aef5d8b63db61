"""Late mask tokens: [MASK] enters at a middle layer, and the layers below it see the other positions only.

After "Mask More and Mask Later" (Liao et al. 2022, arXiv 2211.04898): the lower layers, which read the text, do not pay
for placeholders. What enters at layer N is what the embedding layer makes of [MASK] there: the embeddings of [MASK], of
the position and of the token type, through its LayerNorm and dropout. All positions keep their original numbers:
learned and rotary positions, documents and sliding windows are those of the complete row. Unlike in the paper, the
upper layers are part of the model that is exported, and masked positions always show [MASK].

The model's own forward pass runs: while it does, its list of layers yields stand-ins that call the layers. Those of
the first N get hidden states and arguments (attention masks, rotary embeddings, position ids) reduced to W kept
positions, the one of layer N gets the complete row. This is outside of the layers: compiled or recomputed layers do not
notice.

In training W = L − `hidden` for every row: static shapes, no host-device synchronisation. A row with fewer [MASK] (it
has more special tokens, or whole words did not fit) first gives up padding, then tokens chosen by a hash of the row:
they enter at layer N too, with their own embeddings. A row with more of them keeps the surplus as places that nothing
attends to. In evaluation W = L, exactly the [MASK] are hidden, and nothing is saved.

B rows, L positions, W kept positions, D hidden, H heads, d head size. No collectives.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maskvr_ds import hashing
from maskvr_ds.config import ConfigError

# Settings that name the layer.
FIXED, CANDIDATES = "masking.late_layer", "masking.auto.late_layers"


@dataclass(frozen=True)
class LateMasks:
    """layer: N ≥ 1, layers that see no [MASK]. mask_id: of [MASK]. hidden: positions that each row has less of in these
    layers in training. setting: for error messages, FIXED or CANDIDATES."""

    layer: int
    mask_id: int
    hidden: int
    setting: str = FIXED

    @property
    def remedy(self) -> str:
        return f"set {self.setting} to {0 if self.setting == FIXED else []}, or choose another architecture"


class StagedLayers(nn.ModuleList):
    """A model's list of layers, which yields stand-ins for them while `passage` is set."""

    passage: "Passage | None" = None

    def __iter__(self) -> Iterator[nn.Module]:
        layers = self._modules.values()
        if self.passage is None:
            return iter(layers)
        return (self.passage.stage(layer, number) for number, layer in enumerate(layers))

    def __getitem__(self, index: Any) -> Any:
        # A slice of transformers' loops, of which a ModuleList would make another list of modules.
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


def staged_layers(encoder: PreTrainedModel, late: LateMasks) -> StagedLayers:
    """Turn the encoder's list of layers into StagedLayers, in place; parameters keep their names.

    Raises ConfigError if it has no list with one entry per layer, or no layer N.
    """
    kind, count = encoder.config.model_type, getattr(encoder.config, "num_hidden_layers", 0)
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise ConfigError(
            f"{late.setting} {late.layer}: {kind} of transformers has no list of its {count} layers, which are "
            f"called one by one; {late.remedy}"
        )
    if not 1 <= late.layer < count:
        raise ConfigError(
            f"{late.setting} {late.layer}: [MASK] must enter before the last layer, and {kind} has {count} layers; "
            f"set it to at most {count - 1}"
        )
    lists[0].__class__ = StagedLayers
    found = lists[0]
    assert isinstance(found, StagedLayers)
    return found


@contextmanager
def passing(layers: StagedLayers, passage: "Passage") -> Iterator[None]:
    """Within: a forward pass of the model is `passage`."""
    layers.passage = passage
    try:
        yield
    finally:
        layers.passage = None


class Passage:
    """One forward pass in two parts.

    Args:
        late: the setting.
        input_ids: int64 [B, L]. attention_mask: bool [B, L], False on padding; None: no row is padded.
        predictions: K, slots per row.
        trimmed: W = L − hidden; else W = L.
        eager: whether the model adds its attention masks to the logits, in floating point.
        document_numbers: int64 [B, L], equal within a document; None: attention within rows.
    """

    def __init__(
        self,
        late: LateMasks,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        predictions: int,
        trimmed: bool,
        eager: bool,
        document_numbers: torch.Tensor | None,
    ) -> None:
        B, self._length = input_ids.shape
        self._late, self._eager = late, eager
        visible = input_ids != late.mask_id
        if attention_mask is not None:
            visible = visible & attention_mask
        # Ascending, int64 [B, W].
        if trimmed:
            self._kept = _kept(input_ids, visible, self._length - late.hidden)
        else:
            self._kept = torch.arange(self._length, device=input_ids.device).expand(B, -1)
        surplus = not trimmed or attention_mask is not None or predictions > late.hidden
        # bool [B, W]: what is attended to; None: all.
        self._live = visible.gather(1, self._kept) if surplus else None
        self._documents = None if document_numbers is None else document_numbers.gather(1, self._kept)
        self._same: torch.Tensor | None = None
        self._embedded: torch.Tensor | None = None
        # Masks by address of the complete ones, which are held: layers of a kind share theirs.
        self._reduced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def stage(self, layer: nn.Module, number: int) -> Any:
        """The stand-in for layer `number`, from 0."""
        return layer if number > self._late.layer else _Stage(self, layer, number)

    def enter(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states with which a layer is called, for those that the model passes: [B, W or L, D]."""
        if number == 0:
            self._embedded = hidden
            return self._take(hidden)
        if number < self._late.layer:
            return hidden
        assert self._embedded is not None
        index = self._kept[..., None].expand_as(hidden)
        if self._live is not None:
            hidden = torch.where(self._live[..., None], hidden, self._embedded.gather(1, index))
        return self._embedded.scatter(1, index, hidden)

    def arguments(
        self, args: list[Any], kwargs: dict[str, Any], dtype: torch.dtype
    ) -> tuple[list[Any], dict[str, Any]]:
        """Those of a lower layer, without its hidden states, for the kept positions. Raises ValueError if one of them
        is a tensor whose meaning is unknown, or there is none for the attention mask."""
        args = [self._reduce(str(place), value) for place, value in enumerate(args)]
        kwargs = {name: self._reduce(name, value) for name, value in kwargs.items() if not name.startswith("document_")}
        if self._documents is not None:
            if self._same is None:
                same = self._documents[:, :, None] == self._documents[:, None, :]
                self._same = self._seen(same[:, None])
            kwargs["document_mask"] = self._same
            kwargs["document_positions"] = self._kept
        elif self._live is not None:
            seen = self._live[:, None, None]
            mask = _added(seen, dtype) if self._eager else seen
            if "attention_mask" in kwargs:
                kwargs["attention_mask"] = mask if (own := kwargs["attention_mask"]) is None else own
            elif args:
                args[0] = mask if args[0] is None else args[0]
            else:
                raise ValueError("a layer has no argument for the attention mask")
        return args, kwargs

    def _take(self, states: torch.Tensor) -> torch.Tensor:
        """[1 or B, L, ·] or [1 or B, L] → [B, W, ·] or [B, W]."""
        states = states.expand(len(self._kept), *states.shape[1:])
        if states.dim() == 2:
            return states.gather(1, self._kept)
        return states.gather(1, self._kept[..., None].expand(-1, -1, states.shape[2]))

    def _reduce(self, name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._reduce(name, each) for each in value)
        if not isinstance(value, torch.Tensor):
            return value
        B, L = len(self._kept), self._length
        if value.dim() == 4 and value.shape[2] in (1, L) and value.shape[3] == L:
            if (known := self._reduced.get(id(value))) is None:
                known = self._reduced[id(value)] = value, self._seen(self._pairs(value))
            return known[1]
        if value.dim() in (2, 3) and value.shape[0] in (1, B) and value.shape[1] == L:
            return self._take(value)
        raise ValueError(f"a layer's argument {name} of shape {tuple(value.shape)} is not one for each position")

    def _pairs(self, mask: torch.Tensor) -> torch.Tensor:
        """Attention masks or biases [1 or B, 1 or H, 1 or L, L] → [B, 1 or H, 1 or W, W]."""
        B, W = self._kept.shape
        mask = mask.expand(B, -1, -1, -1)
        if mask.shape[2] != 1:
            mask = mask.gather(2, self._kept[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask.gather(3, self._kept[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], W))

    def _seen(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask [B, ·, 1 or W, W], restricted to keys that are attended to. Every place sees itself: without any key,
        it would be NaN."""
        if self._live is None:
            return mask
        seen = self._live[:, None, None, :]
        if mask.shape[2] != 1:
            itself = torch.eye(mask.shape[3], dtype=torch.bool, device=mask.device)
            if mask.dtype == torch.bool:
                return (mask & seen) | itself
            seen = seen | itself
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


class _Stage:
    """Stand-in for a layer in the model's loop."""

    def __init__(self, passage: Passage, layer: nn.Module, number: int) -> None:
        self._passage, self._layer, self._number = passage, layer, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passage = self._passage
        first, *others = args if args else (kwargs.pop("hidden_states"),)
        if self._number < passage._late.layer:
            others, kwargs = passage.arguments(others, kwargs, first.dtype)
        return self._layer(passage.enter(self._number, first), *others, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask in floating point, as it is added to logits."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _kept(input_ids: torch.Tensor, visible: torch.Tensor, width: int) -> torch.Tensor:
    """Positions that a row keeps, ascending, int64 [B, width]: the visible ones; if they are more, those of the largest
    hash; if they are fewer, others too."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    keys = (input_ids * hashing.mix(places + 1)).sum(1, keepdim=True)
    # 32 random bits below the bit of `visible`.
    priority = (hashing.stream(keys, places) & 0xFFFF_FFFF) + (visible.long() << 32)
    return priority.topk(width, dim=1).indices.sort(dim=1).values
