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
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from maskvr_ds import hashing
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.encoder import MaskedLanguageModel, names_of_parameters
from maskvr_ds.models.losses import weighted_loss

# 16 million fp32 numbers: 64 MiB.
_ELEMENTS = 1 << 24
_LAYER = re.compile(r"\.(?:layers?|albert_layers)\.(\d+)\.")
# Largest relative difference of a row's sketch from that of its gradient by autograd.
_AGREEMENT = 0.01


def largest_prime(limit: int) -> int:
    """The largest odd prime ≤ `limit`. Raises ValueError if limit < 3."""
    if limit < 3:
        raise ValueError(f"sketch size {limit}: must be at least 3")
    return next(n for n in range(limit, 2, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def layer_of(name: str) -> str:
    """Layer of a parameter of a masked language model: "embeddings", "layer 0" …, or "head" (with a norm before it)."""
    if match := _LAYER.search(name):
        return f"layer {match[1]}"
    return "embeddings" if "embed" in name else "head"


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
        model: all parameters must belong to nn.Linear, nn.Embedding, nn.LayerNorm or an RMSNorm, and be used in their
            forward pass only. Of architectures other than BERT, the first row's sketch is compared with autograd's.
        size: numbers per layer, reduced to the largest odd prime.
        seed: of signs and offsets.

    layers: names of the G layers, in order. size: s.

    Raises ValueError if a parameter belongs to any other kind of module, or that comparison shows that one is used
    elsewhere (DeBERTa's relative positions).
    """

    def __init__(self, model: MaskedLanguageModel, *, size: int, seed: int) -> None:
        self.size = largest_prime(size)
        self._model = model.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        prefix, names = f"mlm.{model.mlm.base_model_prefix}.", names_of_parameters(model)
        # A tied output layer belongs to the embeddings, whichever name is first.
        layers = [layer_of(next((n for n in names[p] if n.startswith(prefix)), name)) for name, p in parameters.items()]
        self.layers = list(dict.fromkeys(layers))
        # The head is last whatever the order of the modules.
        self.layers.sort(key=lambda layer: (layer != "embeddings", layer == "head"))
        self._tensors: dict[torch.Tensor, _Tensor] = {}
        for number, p in enumerate(parameters.values()):
            columns = p.shape[-1]
            draws = torch.arange(p.numel() // columns + columns + 1)
            bits = hashing.stream(hashing.fold(seed, number), draws)
            signs = ((bits >> 40 & 1) * 2 - 1).float().to(p.device)
            self._tensors[p] = _Tensor(
                layer=self.layers.index(layers[number]),
                offset=int(bits[-1] & 0x7FFF_FFFF) % self.size,
                rows=signs[columns:-1] if p.dim() > 1 else torch.ones(1, device=p.device),
                columns=signs[:columns],
            )
        self._sketches: torch.Tensor | None = None
        covered: set[torch.Tensor] = set()
        for module in model.modules():
            if (hook := self._hook_of(module)) is not None:
                module.register_forward_hook(getattr(self, hook))
                covered |= set(module.parameters(recurse=False))
        if missing := [name for name, p in parameters.items() if p not in covered]:
            kinds = ", ".join(sorted(kind.__name__ for kind in self._HOOKS))
            raise ValueError(f"gradients of {', '.join(missing[:3])} cannot be sketched: only those of {kinds} can")
        self._to_compare = model.mlm.config.model_type != "bert"

    _HOOKS: ClassVar = {nn.Linear: "_linear", nn.Embedding: "_embedding", nn.LayerNorm: "_layer_norm"}

    def _hook_of(self, module: nn.Module) -> str | None:
        # Each architecture of transformers has a class of its own.
        return "_rms_norm" if type(module).__name__.endswith("RMSNorm") else self._HOOKS.get(type(module))

    def __call__(self, masked: MaskedBatch) -> torch.Tensor:
        """Sketches of the gradient of Σ_i w_i ℓ_i of each row: float32 [B, G, s]. One forward and one backward pass."""
        batch = len(masked.input_ids)
        self._sketches = torch.zeros((batch, len(self.layers), self.size), device=masked.input_ids.device)
        with torch.enable_grad():
            weighted_loss(self._model, masked).backward()
        sketches, self._sketches = self._sketches, None
        if self._to_compare:
            self._to_compare = False
            self._compare(masked, sketches[0])
        return sketches

    def _compare(self, masked: MaskedBatch, found: torch.Tensor) -> None:
        """Raise ValueError if the first row's sketch [G, s] is not that of its gradient, formed by autograd."""
        row = masked.map(lambda column: column[:1])
        names, parameters = zip(*self._model.named_parameters(), strict=True)
        self._model.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(weighted_loss(self._model, row), parameters, allow_unused=True)
        self._model.requires_grad_(False)
        expected = torch.zeros_like(found)
        for name, p, gradient in zip(names, parameters, gradients, strict=True):
            if gradient is not None:
                expected[self._tensors[p].layer] += self.project(name, gradient.float()[None])[0]
        difference = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        if wrong := [name for name, far in zip(self.layers, difference.tolist(), strict=True) if far > _AGREEMENT]:
            raise self._cannot(f"in {', '.join(wrong)}, parameters are used outside of their module")

    def _cannot(self, why: str) -> ValueError:
        return ValueError(f"gradients of {self._model.mlm.config.model_type} cannot be sketched: {why}")

    def _watch(self, output: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        if not output.requires_grad:
            raise self._cannot("a module's input does not depend on the row (a table of relative positions)")
        output.register_hook(read)

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

        self._watch(output, read)

    def _layer_norm(self, module: nn.LayerNorm, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if self._sketches is None:
            return
        x = args[0].detach()

        def read(gradient: torch.Tensor) -> None:
            normal = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
            for p, of_tokens in ((module.weight, gradient * normal), (module.bias, gradient)):
                if p is not None:
                    self._add(p, 0, of_tokens.float().sum(1) * self._tensors[p].columns)

        self._watch(output, read)

    def _rms_norm(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if self._sketches is None:
            return
        x, weight = args[0].detach().float(), module.get_parameter("weight")

        def read(gradient: torch.Tensor) -> None:
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0
            normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            self._add(weight, 0, (gradient.float() * normal).sum(1) * self._tensors[weight].columns)

        self._watch(output, read)

    def _embedding(self, module: nn.Embedding, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        if self._sketches is None:
            return None
        ids, t = args[0], self._tensors[module.weight]
        rows = len(self._sketches)
        if ids.dim() == 2 and len(ids) == 1 < rows:
            # Position ids are looked up once per batch, which would sum their gradients over the batch.
            ids, output = ids.expand(rows, -1), output.expand(rows, -1, -1)
        elif len(ids) != rows:
            raise self._cannot("a table is looked up once per batch (relative positions)")
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

        self._watch(output, read)
        return output


def check_sketchable(model: MaskedLanguageModel) -> None:
    """Raise ValueError if the gradients of the architecture cannot be sketched; freezes the model."""
    token = 0 if model.mlm.config.pad_token_id else 1
    ids, positions = torch.full((2, 8), token), torch.tensor([[1, 2], [3, 4]])
    Sketcher(model, size=101, seed=0)(MaskedBatch(ids, positions, ids[:, :2], torch.ones(2, 2), None))
