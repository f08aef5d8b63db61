"""Heads of an encoder: their maps on a few rows, the loss without them, importance by gradient, pruning.

Maps come from transformers' eager attention. A head is switched off by a hook on the input of the attention's output
projection, whose slice for the head is set to zero, or by uniform attention in its place. One process, no collectives.

B rows, L positions, N layers as they are applied (ALBERT applies one several times), H heads, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from maskvr_ds.analysis.health.probe import layers_of, mean_loss
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.encoder import MaskedLanguageModel, token_types

How = Literal["zero", "uniform"]
_MASKED = -1e30
# Ends of the names that transformers gives to the map behind the heads.
_OUTPUTS = ("attention.output.dense", "out_lin", "attention.dense", "attn.o", "attn.Wo", "o_proj", "out_proj")


@torch.no_grad()
def attention_maps(model: MaskedLanguageModel, masked: MaskedBatch) -> torch.Tensor:
    """Weights of all heads: float32 [N, B, H, L, L] on the CPU. Raises ValueError if the architecture returns none."""
    inputs: dict[str, Any] = {"input_ids": masked.input_ids, "attention_mask": masked.attention_mask}
    if masked.segment_starts is not None:
        inputs["token_type_ids"] = token_types(masked.input_ids, masked.attention_mask, masked.segment_starts)
    return maps_of(model.mlm, inputs)


@torch.no_grad()
def maps_of(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """As `attention_maps`, for the arguments of a forward pass, `input_ids` int64 [B, L] among them."""
    weights = getattr(model.base_model(**inputs, output_attentions=True), "attentions", None)
    kind, length = model.config.model_type, inputs["input_ids"].shape[1]
    if not weights or any(w is None or tuple(w.shape[-2:]) != (length, length) for w in weights):
        raise ValueError(f"{kind} of transformers returns no attention weights [heads, positions, positions]")
    return torch.stack([w.float().cpu() for w in weights])


def output_projections(model: PreTrainedModel) -> list[nn.Linear]:
    """The map behind the heads of each distinct layer. Raises ValueError if it is not found."""
    found = []
    for layer in layers_of(model):
        inside = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear) and n.endswith(_OUTPUTS)]
        if not inside:
            raise ValueError(
                f"{model.config.model_type}: the output projection of its attention is not found (looked for "
                f"{', '.join(_OUTPUTS)}), so that no head can be switched off"
            )
        found.append(inside[0][1])
    return found


class Switches:
    """Switches for the heads of a model of transformers with eager attention, whatever its task.

    Args:
        model: the model. shape: N applications of a layer, H heads.

    Raises ValueError if the output projection of the attention is not found.
    """

    def __init__(self, model: PreTrainedModel, shape: tuple[int, int]) -> None:
        self.model, self.shape = model, shape
        self._outputs = output_projections(model)

    @contextmanager
    def gated(self, gates: torch.Tensor) -> Iterator[None]:
        """Within: the output of head h in the n-th application of a layer is multiplied by gates[n, h] float [N, H]."""
        place = iter(range(10**9))

        def restart(*_: Any) -> None:
            nonlocal place
            place = iter(range(10**9))

        def scale(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            context = args[0]
            gate = gates[next(place)].to(context)
            split = context.unflatten(-1, (len(gate), -1)) * gate[:, None]
            return (split.flatten(-2), *args[1:])

        handles = [self.model.base_model.register_forward_pre_hook(restart)]
        handles += [output.register_forward_pre_hook(scale) for output in self._outputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _uniform(self, off: torch.Tensor) -> Iterator[None]:
        with _Uniform(off) as mode:
            handle = self.model.base_model.register_forward_pre_hook(lambda *_: mode.restart())
            try:
                yield
            finally:
                handle.remove()

    def switched_off(self, off: torch.Tensor, how: How) -> AbstractContextManager[None]:
        """Within: the heads that are true in bool [N, H] give nothing, or attend uniformly."""
        return self._uniform(off) if how == "uniform" else self.gated((~off).float())

    @torch.no_grad()
    def zero_columns(self, pruned: list[tuple[int, int]]) -> None:
        """Set to zero the columns of the output projections that read the heads: an ordinary model that computes the
        same as with these heads off. Raises ValueError if layers share their weights."""
        if len(self._outputs) != self.shape[0]:
            raise ValueError(
                f"{self.model.config.model_type}: its layers share their weights, so that a head cannot be zeroed in "
                "one of them alone"
            )
        for n, h in pruned:
            weight = self._outputs[n].weight
            size = weight.shape[1] // self.shape[1]
            weight[:, h * size : (h + 1) * size] = 0.0


def without_each(loss: Callable[[torch.Tensor], float], base: float, off: torch.Tensor) -> torch.Tensor:
    """loss(heads off) − base with each head off in addition to `off` bool [N, H]: float64 [N, H]; NaN for these."""
    found = torch.full(off.shape, float("nan"), dtype=torch.float64)
    for n, h in (~off).nonzero().tolist():
        changed = off.clone()
        changed[n, h] = True
        found[n, h] = loss(changed) - base
    return found


def prune(loss: Callable[[torch.Tensor], float], shape: tuple[int, int], count: int) -> list[tuple[int, int, float]]:
    """Switch heads off one after the other, each time that without which the loss is lowest: layer, head, loss."""
    off = torch.zeros(shape, dtype=torch.bool)
    curve = []
    for _ in range(min(count, off.numel())):
        losses = without_each(loss, 0.0, off)
        n, h = divmod(int(losses.nan_to_num(float("inf")).argmin()), shape[1])
        off[n, h] = True
        curve.append((n, h, float(losses[n, h])))
    return curve


class Heads:
    """The heads of a model from `copy_for_analysis`, judged by its loss on masked tokens.

    Args:
        model: the model. masked: rows on which the loss is measured.

    Raises ValueError if the architecture has no attention weights, or the output projection is not found.
    """

    def __init__(self, model: MaskedLanguageModel, masked: MaskedBatch) -> None:
        self.model, self.masked = model, masked
        maps = attention_maps(model, masked.map(lambda column: column[:1]))
        self.shape = (maps.shape[0], maps.shape[2])
        self.switches = Switches(model.mlm, self.shape)

    @torch.no_grad()
    def loss(self, off: torch.Tensor | None = None, how: How = "zero") -> float:
        """Nats per prediction with the heads off that are true in bool [N, H]; None: with all heads."""
        if off is None:
            return mean_loss(self.model, self.masked).item()
        with self.switches.switched_off(off, how):
            return mean_loss(self.model, self.masked).item()

    def increases(self, how: How = "zero") -> torch.Tensor:
        """Increase of the loss without each head: float64 [N, H]."""
        return without_each(lambda off: self.loss(off, how), self.loss(), torch.zeros(self.shape, dtype=torch.bool))

    def layer_increases(self, how: How = "zero") -> list[float]:
        """Increase of the loss with all heads of a layer off, one layer at a time: N values."""
        plain, found = self.loss(), []
        for n in range(self.shape[0]):
            off = torch.zeros(self.shape, dtype=torch.bool)
            off[n] = True
            found.append(self.loss(off, how) - plain)
        return found

    def importance(self) -> torch.Tensor:
        """Mean over rows of |∂ℓ/∂ξ| at ξ = 1, ξ the head's gate (Michel et al. 2019, arXiv:1905.10650, equation 2):
        float64 [N, H]. One forward and backward pass per row."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        for row in self.masked.split(1):
            gates = torch.ones(self.shape, requires_grad=True)
            with self.switches.gated(gates), torch.enable_grad():
                (gradient,) = torch.autograd.grad(mean_loss(self.model, row), gates)
            found += gradient.abs().double()
        return found / len(self.masked.input_ids)

    def prune(self, count: int, how: How = "zero") -> list[tuple[int, int, float]]:
        """See `prune`."""
        return prune(lambda off: self.loss(off, how), self.shape, count)


class _Uniform(TorchFunctionMode):
    """Replaces the weights of heads that are off, bool [N, H], by uniform ones over the positions that are not masked.
    Call `restart` before each forward pass."""

    def __init__(self, off: torch.Tensor) -> None:
        super().__init__()
        self._layers = off
        self.restart()

    def restart(self) -> None:
        self._off = iter(self._layers)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (F.softmax, torch.softmax, torch.Tensor.softmax) and args and args[0].dim() == 4:
            used = (args[0] > _MASKED).to(result.dtype)
            uniform = used / used.sum(-1, keepdim=True).clamp(min=1)
            off = next(self._off).to(result.device)
            return torch.where(off[:, None, None], uniform.expand_as(result), result)
        return result


def listed_heads(heads: int) -> int:
    """How many of them are named as missed least, and as missed most: three, or half of fewer than six."""
    return max(1, min(3, heads // 2))


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Spearman's correlation of two tensors of one shape, ties at their mean rank; None if it is undefined: fewer than
    three values, or all of one tensor equal."""
    if a.numel() < 3 or any(bool((x == x.flatten()[0]).all()) for x in (a, b)):
        return None
    return float(torch.corrcoef(torch.stack([_ranks(x.flatten()) for x in (a, b)]))[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """float64 [n]."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
