"""Signals in a model on a few masked rows: activations, gradients, attention, units, Jacobians, by layer.

The model is an fp32 copy in eval mode with eager attention (fused attention has no second derivative and hides its
logits). Layers are found by structure, not by name of an architecture. One process, no collectives.

B rows, L positions, H heads, N layers as they are applied (ALBERT applies one several times).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from maskvr_ds.analysis.health.spectra import Jacobian, jacobian
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss

# A unit counts as dead if its RMS over all positions is below this share of the median unit's.
_DEAD = 1e-3
# Logits below are masked positions.
_MASKED = -1e30
_NORMS = ("LayerNorm", "RMSNorm")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The distinct layer modules of the encoder: children of the longest innermost nn.ModuleList.

    Raises ValueError if there is none.
    """
    inner: list[list[nn.Module]] = []
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList):
            children = list(module)
            if not any(isinstance(m, nn.ModuleList) for child in children for m in child.modules()):
                inner.append(children)
    if not inner:
        raise ValueError(f"{model.config.model_type}: its layers are in no list, so that none can be read")
    return max(inner, key=len)


class _Softmaxes(TorchFunctionMode):
    """Records logits and weights of every softmax over [B, H, L, L], as eager attention computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []
        self.entropies: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (F.softmax, torch.softmax, torch.Tensor.softmax) and args and args[0].dim() == 4:
            logits, weights = args[0].detach(), result.detach().float()
            used = logits > _MASKED
            self.largest.append(logits.masked_fill(~used, 0.0).abs().max().item())
            self.entropies.append(_relative_entropy(weights, used))
        return result


def _relative_entropy(weights: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Entropy of weights [B, H, L, L] over that of uniform weights on the positions used, mean over rows: [H]."""
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    most = used.sum(-1).clamp(min=2).log()
    return (entropy / most).mean((0, 2))


@dataclass
class Signals:
    """Figures by layer, in the order of application.

    loss: nats per prediction. activation: RMS of the outputs. gradient: RMS of the loss' gradient there, per
    prediction. jacobians: of each layer; empty if not asked for. logit: largest absolute attention logit. entropy: mean
    relative entropy of each head's attention (1: uniform). dead: share of dead units of the feed-forward parts.
    """

    loss: float
    activation: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    jacobians: list[Jacobian] = field(default_factory=list)
    logit: list[float] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)


def use_eager_attention(model: PreTrainedModel) -> None:
    """Raises ValueError if the architecture has none."""
    try:
        model.set_attn_implementation("eager")
    except Exception as error:  # whatever an architecture without it raises
        raise ValueError(
            f"{model.config.model_type} of transformers has no eager attention ({' '.join(str(error).split())}), which "
            "the analysis needs"
        ) from None


def copy_for_analysis(mlm: Any) -> MaskedLanguageModel:
    """The model in fp32 and eval mode with eager attention; changed in place. Raises ValueError without one."""
    use_eager_attention(mlm)
    return MaskedLanguageModel(mlm.float()).eval()


def mean_loss(model: MaskedLanguageModel, masked: MaskedBatch) -> torch.Tensor:
    """Σ w ℓ / number of predictions, in nats."""
    return weighted_loss(model, masked) / (masked.weights != 0).sum().clamp(min=1)


@contextmanager
def _recorded(model: MaskedLanguageModel) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], list[float]]]:
    """Within: inputs and outputs of each application of a layer, in order; shares of dead units by application."""
    sources: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    dead: list[float] = []
    handles = []

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sources.append(args[0] if args else kwargs["hidden_states"])
        targets.append(output[0] if isinstance(output, tuple) else output)

    def read_units(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        size = args[0].detach().flatten(0, -2).square().mean(0).sqrt()
        dead.append((size <= _DEAD * size.median()).float().mean().item())

    for layer in layers_of(model.mlm):
        handles.append(layer.register_forward_hook(read, with_kwargs=True))
        if (inner := _second_linear(layer)) is not None:
            handles.append(inner.register_forward_pre_hook(read_units))
    try:
        yield sources, targets, dead
    finally:
        for handle in handles:
            handle.remove()


def _second_linear(layer: nn.Module) -> nn.Linear | None:
    """The map from the feed-forward part's units back to the hidden size: the last linear map of the layer."""
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    narrowing = [m for m in linear if m.in_features > m.out_features]
    found = narrowing or linear
    return found[-1] if found else None


def measure_signals(model: MaskedLanguageModel, masked: MaskedBatch, *, jacobians: bool = True) -> Signals:
    """One forward and one backward pass, and for the Jacobians a few more backward passes through each layer."""
    with _recorded(model) as (sources, targets, dead), _Softmaxes() as softmaxes, torch.enable_grad():
        loss = mean_loss(model, masked)
    signals = Signals(loss=loss.item(), dead=dead, logit=softmaxes.largest)
    signals.entropy = [entropy.tolist() for entropy in softmaxes.entropies]
    signals.activation = [_rms(target) for target in targets]
    gradients = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
    signals.gradient = [0.0 if g is None else _rms(g) for g in gradients]
    if jacobians:
        signals.jacobians = [jacobian(s, t, seed=n) for n, (s, t) in enumerate(zip(sources, targets, strict=True))]
    return signals


@torch.no_grad()
def forward_signals(model: MaskedLanguageModel, masked: MaskedBatch) -> Signals:
    """The figures of `measure_signals` that need no backward pass."""
    with _recorded(model) as (_, targets, dead), _Softmaxes() as softmaxes:
        loss = mean_loss(model, masked)
    return Signals(
        loss=loss.item(),
        activation=[_rms(target) for target in targets],
        logit=softmaxes.largest,
        entropy=[entropy.tolist() for entropy in softmaxes.entropies],
        dead=dead,
    )


def _rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def norm_gains(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Largest absolute gain and RMS gain of each LayerNorm and RMSNorm, by the name of its weight."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith(_NORMS) and isinstance(weight, torch.Tensor):
            gain = weight.detach().float()
            found[f"{name}.weight"] = (gain.abs().max().item(), gain.square().mean().sqrt().item())
    return found
