"""Sketches of per-sequence gradients: a seeded random projection (count sketch) with one vector per layer.

B sequences, T positions processed by a module (L, or K in the head), G layers, s the sketch size.

Each layer has a vector of s numbers into which its tensors are folded (a count sketch: Charikar, Chen & Farach-Colton
2002): element (r, c) of a tensor [rows, columns] is multiplied by σ_r τ_c and added to bucket
(offset + r · columns + c) mod s, where σ and τ are random signs. Inner products are unbiased over the seed,
E⟨Sg, Sg'⟩ = ⟨g, g'⟩, and the standard deviation of ‖Sg‖² is about √(2/s) ‖g‖² if the energy lies in one layer, less if
it is spread over several.

- Products of row and column signs are as good as independent signs of all elements: two products of two signs are
  dependent only if they lie on the corners of a rectangle, and two opposite corners share a bucket only if
  2 (r − r') columns ≡ 0 mod s. s is therefore an odd prime, which also spreads a column over many buckets.
- The signs are applied to the factors of a tensor's gradient, and the fold is a sum of slices of consecutive elements.

A tensor's gradient is formed for a few sequences at a time, dYᵀX for a linear map, and folded immediately: the memory
beyond the model and its activations is that of the sketches and of _ELEMENTS numbers (or one tensor of one sequence, if
larger). No collectives.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from maskvr_ds import hashing
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.bert import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss

# 16 million fp32 numbers: 64 MiB.
_ELEMENTS = 1 << 24
_LAYER = re.compile(r"\bencoder\.layer\.(\d+)\.")


def largest_prime(limit: int) -> int:
    """The largest odd prime ≤ `limit`. Raises ValueError if limit < 3."""
    if limit < 3:
        raise ValueError(f"sketch size {limit}: must be at least 3")
    return next(n for n in range(limit, 2, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def layer_of(name: str) -> str:
    """Layer of a parameter of BertForMaskedLM: "embeddings", "layer 0" …, or "head"."""
    if match := _LAYER.search(name):
        return f"layer {match[1]}"
    return "embeddings" if ".embeddings." in name else "head"


@dataclass(frozen=True)
class _Tensor:
    """Folding of a parameter. layer: its number. offset: its first bucket. rows, columns: signs, float32."""

    layer: int
    offset: int
    rows: torch.Tensor
    columns: torch.Tensor


class Sketcher:
    """Computes sketches of a model's gradients. Puts the model in eval mode and freezes its parameters.

    Args:
        model: BERT; all parameters must belong to nn.Linear, nn.Embedding or nn.LayerNorm.
        size: numbers per layer, reduced to the largest odd prime.
        seed: of signs and offsets.

    layers: names of the G layers, in order. size: s.

    Raises ValueError if a parameter belongs to any other kind of module.
    """

    def __init__(self, model: MaskedLanguageModel, *, size: int, seed: int) -> None:
        self.size = largest_prime(size)
        self._model = model.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        self.layers = list(dict.fromkeys(layer_of(name) for name in parameters))
        # The head is last whatever the order of the modules.
        self.layers.sort(key=lambda layer: layer == "head")
        self._tensors: dict[torch.Tensor, _Tensor] = {}
        for number, (name, p) in enumerate(parameters.items()):
            columns = p.shape[-1]
            draws = torch.arange(p.numel() // columns + columns + 1)
            bits = hashing.stream(hashing.fold(seed, number), draws)
            signs = ((bits >> 40 & 1) * 2 - 1).float().to(p.device)
            self._tensors[p] = _Tensor(
                layer=self.layers.index(layer_of(name)),
                offset=int(bits[-1] & 0x7FFF_FFFF) % self.size,
                rows=signs[columns:-1] if p.dim() > 1 else torch.ones(1, device=p.device),
                columns=signs[:columns],
            )
        self._sketches: torch.Tensor | None = None
        covered: set[torch.Tensor] = set()
        for module in model.modules():
            if (hook := self._HOOKS.get(type(module))) is not None:
                module.register_forward_hook(getattr(self, hook))
                covered |= set(module.parameters(recurse=False))
        if missing := [name for name, p in parameters.items() if p not in covered]:
            kinds = ", ".join(sorted(kind.__name__ for kind in self._HOOKS))
            raise ValueError(f"gradients of {', '.join(missing[:3])} cannot be sketched: only those of {kinds} can")
        # By default BERT looks up positions once per batch, which would sum their gradients over the batch.
        model.mlm.bert.register_forward_pre_hook(_own_positions, with_kwargs=True)

    _HOOKS: ClassVar = {nn.Linear: "_linear", nn.Embedding: "_embedding", nn.LayerNorm: "_layer_norm"}

    def __call__(self, masked: MaskedBatch) -> torch.Tensor:
        """Sketches of the gradient of Σ_i w_i ℓ_i of each row: float32 [B, G, s]. One forward and one backward pass."""
        batch = len(masked.input_ids)
        self._sketches = torch.zeros((batch, len(self.layers), self.size), device=masked.input_ids.device)
        with torch.enable_grad():
            weighted_loss(self._model, masked).backward()
        sketches, self._sketches = self._sketches, None
        return sketches

    def project(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Given gradients [B, *shape] of a parameter → their contribution to the layer's sketch, [B, s]."""
        p = self._model.get_parameter(name)
        t = self._tensors[p]
        flat = gradient.reshape(len(gradient), -1, p.shape[-1]) * t.rows[:, None] * t.columns
        return self._fold(flat.flatten(1), t.offset)

    def _fold(self, signed: torch.Tensor, offset: int) -> torch.Tensor:
        """Signed elements [B, E] → [B, s]."""
        stop = signed.shape[1] // self.size * self.size
        folded = signed[:, :stop].view(len(signed), -1, self.size).sum(1)
        rest = signed[:, stop:]
        folded[:, : rest.shape[1]] += rest
        return folded.roll(offset, 1)

    def _add(self, p: torch.Tensor, first: int, signed: torch.Tensor) -> None:
        """Add signed elements [b, E] of the batch's rows first … first + b − 1."""
        assert self._sketches is not None
        t = self._tensors[p]
        self._sketches[first : first + len(signed), t.layer] += self._fold(signed, t.offset)

    def _linear(self, module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if self._sketches is None:
            return
        x = args[0].detach()

        def read(gradient: torch.Tensor) -> None:
            t = self._tensors[module.weight]
            at_once = max(1, _ELEMENTS // module.weight.numel())
            for first in range(0, len(x), at_once):
                here = slice(first, first + at_once)
                dy = gradient[here].float() * t.rows
                product = torch.bmm(dy.transpose(1, 2), x[here].float() * t.columns)
                self._add(module.weight, first, product.flatten(1))
            if module.bias is not None:
                self._add(module.bias, 0, gradient.float().sum(1) * self._tensors[module.bias].columns)

        output.register_hook(read)

    def _layer_norm(self, module: nn.LayerNorm, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if self._sketches is None:
            return
        x = args[0].detach()

        def read(gradient: torch.Tensor) -> None:
            normal = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
            for p, of_tokens in ((module.weight, gradient * normal), (module.bias, gradient)):
                self._add(p, 0, of_tokens.float().sum(1) * self._tensors[p].columns)

        output.register_hook(read)

    def _embedding(self, module: nn.Embedding, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        if self._sketches is None:
            return None
        ids, t = args[0], self._tensors[module.weight]
        # All parameters are frozen: the backward pass ends here.
        output = output.detach().requires_grad_()

        def read(gradient: torch.Tensor) -> None:
            assert self._sketches is not None
            signed = gradient.float() * t.rows[ids][..., None] * t.columns
            if module.padding_idx is not None:
                signed = signed * (ids != module.padding_idx)[..., None]
            # Few rows have gradients: scatter them into their buckets.
            places = torch.arange(len(t.columns), device=ids.device)
            buckets = (t.offset + ids[..., None] * len(t.columns) + places) % self.size
            self._sketches[:, t.layer].scatter_add_(1, buckets.flatten(1), signed.flatten(1))

        output.register_hook(read)
        return output


def _own_positions(
    _: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]
) -> tuple[tuple[()], dict[str, torch.Tensor]]:
    ids = kwargs["input_ids"]
    return args, kwargs | {
        "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
