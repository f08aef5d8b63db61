"""Other normalisations in the place of an encoder's LayerNorms (`model.normalization`), to study what they do.

rms: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467). batch: batch normalisation over all positions of the global
batch that are not padding (Ioffe & Szegedy 2015, arXiv:1502.03167; synchronised). population: the first part of what
Luo et al. 2019 (arXiv:1809.00846) split batch normalisation into: positions are normalised with the population's
statistics, through which no gradient flows; the other part, gamma decay, adds ζ γ² to the loss.

Differences from the paper: the population's statistics are running ones, and ζ is one constant (`model.gamma_decay`);
in the paper it follows from the batch size, the kurtosis and the Fisher information of each unit (`gamma_decay` below,
which docs/experiments/batch_norm_decomposition.py checks).

Shapes: B rows, L positions, D hidden. Collectives: in training, batch and population all-reduce float64 [2 D + 1] per
layer in the forward pass; batch does so again in the backward pass. World group.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maskvr_ds.config import ConfigError
from maskvr_ds.config.model import Normalization
from maskvr_ds.runtime import distributed

# Share of a new batch in the running statistics, once so many batches were seen.
MOMENTUM = 0.1
# As in torch's BatchNorm; BERT's own 1e-12 is meant for LayerNorm, whose variance is never that of one dead feature.
_EPSILON = 1e-5
_STATISTICS = ("running_mean", "running_var", "batches")


def replace_layer_norms(model: PreTrainedModel, normalization: Normalization, decay: float = 0.0) -> None:
    """Replace the LayerNorms of the encoder in place; the prediction head keeps its own.

    normalization, decay: `model.normalization`, `model.gamma_decay`. Parameters keep their names and values. Raises
    ConfigError if there is no LayerNorm.
    """
    if normalization == "layer":
        return
    encoder = model.base_model
    found = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.LayerNorm)]
    if not found:
        raise ConfigError(
            f"model.normalization {normalization}: the encoder of {model.config.model_type} has no LayerNorm to "
            "replace; set it to layer"
        )
    places = Places()
    for name, norm in found:
        parent = encoder.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _replacement(norm, normalization, decay, places))
    if normalization != "rms":
        encoder.register_forward_pre_hook(places.read, with_kwargs=True)


def _replacement(norm: nn.LayerNorm, normalization: Normalization, decay: float, places: "Places") -> nn.Module:
    if normalization == "rms":
        rms = nn.RMSNorm(norm.normalized_shape, eps=norm.eps)
        rms.weight = norm.weight
        return rms
    return BatchNorm(norm, places, population=normalization == "population", decay=decay)


class Places:
    """The positions of the present forward pass that are not padding: bool [B, L], None for all."""

    used: torch.Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the encoder."""
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        self.used = None if mask is None else mask.bool()


class _Sum(torch.autograd.Function):
    """Sum over ranks; so is the gradient, as each rank's loss depends on every rank's contribution."""

    @staticmethod
    def forward(_: Any, local: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce_sum(local.clone())

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce_sum(gradients[0].clone())


class _Decayed(torch.autograd.Function):
    """γ, with the gradient of ζ γ² added. DeepSpeed averages over ranks: the sum is that of one penalty."""

    @staticmethod
    def forward(context: Any, gain: torch.Tensor, decay: float) -> torch.Tensor:
        context.save_for_backward(gain)
        context.decay = decay
        return gain.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] + 2 * context.decay * context.saved_tensors[0], None


class BatchNorm(nn.Module):
    """γ (x − μ) / σ + β for x [B, L, D], statistics by feature over the positions that are not padding.

    Args:
        norm: the LayerNorm in whose place it is. places: positions of the forward pass.
        population: use the running statistics in training, too, this batch's among them; else the batch's.
        decay: ζ of gamma decay, with `population` only.

    running_mean, running_var float32 [D], batches float32 []: used in eval mode. Identical on all ranks.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    batches: torch.Tensor

    def __init__(self, norm: nn.LayerNorm, places: Places, *, population: bool, decay: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.population, self.decay, self.eps = population, decay, max(norm.eps, _EPSILON)
        self._places = places
        size = norm.weight.shape
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(size, dtype=torch.float32))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.weight
        if self.training:
            mean, variance = self._batch_statistics(x)
            if self.population:
                # A copy: the next batch changes the running statistics in place.
                mean, variance = self.running_mean.clone(), self.running_var.clone()
                gain = _Decayed.apply(gain, self.decay) if self.decay else gain
        else:
            mean, variance = self.running_mean, self.running_var
        normalised = (x - mean) * (variance + self.eps).rsqrt() * gain
        return normalised if self.bias is None else normalised + self.bias

    def _batch_statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance [D] over the global batch, and into the running statistics. Collective."""
        used = self._places.used
        rows = (x if used is None else x[used]).flatten(0, -2).double()
        rows = rows.detach() if self.population else rows
        count = torch.full((1,), float(len(rows)), dtype=torch.float64, device=x.device)
        total = _Sum.apply(torch.cat([rows.sum(0), rows.square().sum(0), count]))
        first, second, count = total.split([rows.shape[1], rows.shape[1], 1])
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.batches += 1
            share = (1 / self.batches).clamp(min=MOMENTUM)
            self.running_mean.lerp_(mean.float(), share)
            self.running_var.lerp_(variance.float(), share)
        return mean.float(), variance.float()


def statistics(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> running statistics of a model's batch normalisations, the tensors themselves; empty if it has none."""
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        for key in _STATISTICS
    }


def gamma_decay(kurtosis: float, batch: int, information: float, curvature: float) -> float:
    """ζ of Luo et al. 2019, equation 3: (ρ + 2) / 8M · I(γ) + 1 / 2M · E[A''].

    kurtosis: ρ, the excess kurtosis of the unit's input. batch: M. information: I(γ), the Fisher information of γ,
    E[A'' z²] for the normalised input z. curvature: E[A''], second derivative of the loss in the unit's output: 1 for a
    linear unit; for a ReLU the share of positive outputs (the paper has the sigmoid of softplus in its place).
    """
    return (kurtosis + 2) / (8 * batch) * information + curvature / (2 * batch)
