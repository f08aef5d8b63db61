"""LAMB and LARS that stay correct when ZeRO shards the parameters into flat partitions.

LAMB: You, Li, Reddi et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
arXiv:1904.00962, Algorithm 2. For every parameter tensor w with gradient g, at step t:

    m ← β₁ m + (1 − β₁) g                m̂ = m / (1 − β₁ᵗ)
    v ← β₂ v + (1 − β₂) g²               v̂ = v / (1 − β₂ᵗ)
    u = m̂ / (√v̂ + ε) + λ w
    w ← w − η · φ(‖w‖) / ‖u‖ · u

LARS: ibid., Algorithm 1 (first: You, Gitman, Ginsburg, arXiv:1708.03888):

    m ← β₁ m + (1 − β₁)(g + λ w)
    w ← w − η · φ(‖w‖) / ‖m‖ · m

Differences from the paper:
- φ is the identity. The ratio is 1 where ‖w‖ or ‖u‖ is 0 (the paper leaves it undefined), so that zero-initialised
  biases move. Norms are summed as squares in fp32: one below 1e-23 counts as 0.
- λ is set per parameter group. variants.py lists how well-known implementations differ.

Under ZeRO the optimizer gets flat fp32 partitions instead of the parameters; tensors start, end and straddle ranks
anywhere in them, so the norm of a partition is meaningless (deepspeedai/DeepSpeed#490). `bind` reads from DeepSpeed
which fragment of which tensor lies where (partitions.py); squared norms are then taken per fragment and summed over the
ranks, with one all-reduce per step (layerwise.py).
"""

import importlib.util
from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from maskvr_ds.optim.adam_moments import PIECE, AdamMoments
from maskvr_ds.optim.checks import check_number
from maskvr_ds.optim.layerwise import LayerwiseAdaptive, Update, squared_norms
from maskvr_ds.optim.partitions import Partition, layout_of
from maskvr_ds.optim.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from maskvr_ds.optim.fused import FusedUpdate

__all__ = ["VARIANTS", "Lamb", "Lars", "Variant", "bind", "parameter_groups"]


class TrustRatioScaled(LayerwiseAdaptive):
    """Scales each tensor's u by its trust ratio ‖w‖ / ‖u‖. Sums: Σw² and Σu², S = 2."""

    @property
    def trust_ratios(self) -> Tensor | None:
        """Trust ratios of the last step: fp32 [T] on the device of the optimizer's state, equal on all ranks, in the
        order of `tensor_names`; 1 for tensors without a gradient. None before the first step.

        DeepSpeed fills missing gradients with zeros: such a tensor decays with ratio 1/λ, by a factor 1 − η per step.
        """
        return self._last_scales

    def _adapts(self, group: dict[str, Any]) -> bool:
        return self.variant.adapt_undecayed or group["weight_decay"] != 0

    def _sums(self, pending: list[Update], weights: list[list[Tensor]], updates: list[list[Tensor]]) -> Tensor:
        summed = [n for n, entry in enumerate(pending) if entry.fused is None]
        lists = [list(chain.from_iterable(views[n] for n in summed)) for views in (weights, updates)]
        indices = [fragment.tensor for n in summed for fragment in pending[n].fragments]
        squares = squared_norms(lists, indices, len(self._layout.tensors), pending[0].partitions[0].device)
        for entry in pending:
            if entry.fused is not None:
                entry.fused.add_squares(squares)
        return squares

    def _scales(self, sums: Tensor, pending: list[Update]) -> Tensor:
        weight_squares, update_squares = sums
        ratios = (weight_squares.sqrt() / update_squares.sqrt()).clamp(self.variant.min_ratio, self.variant.max_ratio)
        ratios = torch.where((weight_squares == 0) | (update_squares == 0), 1.0, ratios)
        for entry in pending:
            if not entry.adapted:
                for partition in entry.layouts:
                    # By slices: an index tensor would have to be copied to the device.
                    for first, last in _ranges(partition.members):
                        ratios[first:last] = 1.0
        return ratios


class Lamb(TrustRatioScaled, AdamMoments):
    """LAMB (arXiv:1904.00962, Algorithm 2); the module docstring has the equations.

    Works without DeepSpeed like any torch optimizer. With DeepSpeed, construct it from the model's parameters, pass
    it to `deepspeed.initialize` with `"zero_allow_untested_optimizer": true` (and, if the optimizer is offloaded,
    `"zero_force_ds_cpu_optimizer": false`), then call `bind(engine)` once.

    State per parameter (under ZeRO: per flat partition): `exp_avg` and `exp_avg_sq` with the parameter's shape and
    dtype; `step`, a Python int. DeepSpeed's ZeRO and universal checkpoints know these names, and an int never makes the
    host wait for the device. `step()` does not synchronise host and device (unless the partitions are offloaded). While
    it runs it needs one extra buffer of the size of the parameters (the update u) and, on GPUs, one of the size of the
    small parameters (their ratios). Gradients are not modified, unless an engine allows it (`overwrites_gradients`): on
    CPUs they then are the buffer of large tensors.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, with dense gradients.
        lr: η. betas: β₁, β₂. eps: ε. weight_decay: λ.
        variant: a name in VARIANTS, or a Variant. With `max_grad_norm` > 0 `step()` scales the gradients; after `bind`
            DeepSpeed's `gradient_clipping` does so instead, and `bind` checks that it is set to the same norm.
        fused: update by two Triton kernels (fused.py): fp32 tensors on GPUs, less memory traffic, no extra buffer;
            equal up to rounding.

    Raises:
        ValueError: if a hyperparameter is out of range, the variant is unknown, or `fused` is set without Triton.
        RuntimeError: from `step()`, if ZeRO has replaced the parameters and `bind` was not called, or `fused` is set
            and tensors are not fp32 on a GPU.
    """

    # Partition → tensor of the model in bf16 that the fused kernels write too (engine/streamline.py).
    copies: Mapping[Tensor, Tensor] = MappingProxyType({})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        variant: str | Variant = "paper",
        fused: bool = False,
    ) -> None:
        if isinstance(variant, str):
            if variant not in VARIANTS:
                raise ValueError(f"variant = {variant!r}: must be one of {', '.join(VARIANTS)}")
            variant = VARIANTS[variant]
        if not isinstance(variant, Variant):
            raise ValueError(f"variant = {variant!r}: must be a Variant, or one of {', '.join(VARIANTS)}")
        if fused and importlib.util.find_spec("triton") is None:
            raise ValueError("fused = True: Triton is not installed; install triton, or set fused to False")
        self.fused = fused
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, variant)

    def _piecewise(
        self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor], step: int
    ) -> list[Tensor] | None:
        if partitions[0].device.type != "cpu" or max(p.numel() for p in partitions) <= PIECE:
            return None
        # Gradients that were scaled are copies.
        own = self.overwrites_gradients or gradients[0] is not partitions[0].grad
        updates = gradients if own else [torch.empty_like(p) for p in partitions]
        self._update_pieces(group, partitions, gradients, updates, step)
        return updates

    def _corrections(self, group: dict[str, Any], step: int) -> tuple[float, float]:
        """As in AdamMoments; 1 if the variant does not correct the moments."""
        return super()._corrections(group, step) if self.variant.bias_correction == "moments" else (1.0, 1.0)

    def _fuse(
        self, group: dict[str, Any], partitions: list[Tensor], layouts: list[Partition], step: int, scale: Tensor | None
    ) -> "FusedUpdate | None":
        if not self.fused:
            return None
        from maskvr_ds.optim.fused import Coefficients, FusedUpdate

        first, second = self._corrections(group, step)
        beta1, beta2 = group["betas"]
        coefficients = Coefficients(beta1, beta2, first / second**0.5, first * group["eps"], group["weight_decay"])
        states = [self.state[p] for p in partitions]
        return FusedUpdate(
            partitions,
            [cast(Tensor, p.grad) for p in partitions],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            layouts,
            coefficients,
            scale,
            [self.copies[p] for p in partitions] if self.copies else (),
        )

    def _rate(self, group: dict[str, Any], step: int) -> float:
        if self.variant.bias_correction != "rate":
            return group["lr"]
        beta1, beta2 = group["betas"]
        return group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)


class Lars(TrustRatioScaled):
    """LARS (arXiv:1904.00962, Algorithm 1); the module docstring has the equations. Used like `Lamb`.

    Differences from arXiv:1708.03888: the ratio is that of the momentum, not of the gradient; no trust coefficient.
    State: `exp_avg` with the parameter's shape and dtype; `step`, a Python int. No extra buffer. DeepSpeed converts
    only optimizers with two moments to universal checkpoints, hence not this one.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, with dense gradients.
        lr: η. momentum: β₁. weight_decay: λ.

    Raises:
        ValueError: if a hyperparameter is out of range.
        RuntimeError: from `step()`, if ZeRO has replaced the parameters and `bind` was not called.
    """

    def __init__(self, params: Any, lr: float = 1e-1, momentum: float = 0.9, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, Variant())

    def _check_settings(self, settings: dict[str, Any]) -> None:
        super()._check_settings(settings)
        check_number("momentum", settings["momentum"], "must be in [0, 1)", below=1.0)

    def _new_state(self, partition: Tensor) -> dict[str, Any]:
        return {"step": 0, "exp_avg": torch.zeros_like(partition, memory_format=torch.preserve_format)}

    def _advance(self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor]) -> None:
        exp_avgs, beta = [self.state[p]["exp_avg"] for p in partitions], group["momentum"]
        torch._foreach_lerp_(exp_avgs, gradients, 1 - beta)
        if group["weight_decay"] != 0:
            torch._foreach_add_(exp_avgs, partitions, alpha=(1 - beta) * group["weight_decay"])

    def _updates(self, group: dict[str, Any], partitions: list[Tensor], step: int) -> list[Tensor]:
        return [self.state[p]["exp_avg"] for p in partitions]


def bind(engine: Any) -> None:
    """Give the engine's `Lamb`, `Lars` or `StableAdamW` the layout of DeepSpeed's partitions of the tensors.

    Call it once, right after `deepspeed.initialize`, before or after `engine.load_checkpoint`; harmless if DeepSpeed
    has not partitioned anything. Not a collective.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` that was created with one of the three as `optimizer`.

    Raises:
        ValueError: if the engine's optimizer is none of them, if the variant scales gradients and `gradient_clipping`
            differs from its norm, or if the engine uses a feature that would give wrong norms or is untested
            (docs/explanation/lamb-under-zero.md lists them).
        RuntimeError: on the ranks concerned, if a fragment differs from the model's weights at its place.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, LayerwiseAdaptive):
        raise ValueError(
            f"bind needs an engine whose optimizer is maskvr_ds.lamb.Lamb, Lars or StableAdamW, found "
            f"{type(optimizer).__name__}; pass deepspeed.initialize(optimizer=Lamb(parameter_groups(model)))"
        )
    if optimizer.variant.max_grad_norm not in (0, clipping := engine.gradient_clipping()):
        raise ValueError(
            f"gradient_clipping = {clipping}: this variant scales gradients to a norm of at most "
            f"{optimizer.variant.max_grad_norm}, which DeepSpeed must do under ZeRO; set gradient_clipping to that"
        )
    layout = layout_of(engine, optimizer._layout.tensors, optimizer.param_groups)
    kept = {group["group_index"] for group in optimizer.param_groups}  # DeepSpeed drops empty groups
    optimizer._given = [given for given in optimizer._given if given["group_index"] in kept]
    # ZeRO links optimizer state to the parameters after the first group has stepped. The state of the other groups must
    # exist by then, or `safe_get_full_optimizer_state` never finds it.
    for partition in layout.partitions:
        optimizer._state_of(partition)
    optimizer._layout, optimizer._bound = layout, True


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The two parameter groups of BERT training: weight decay on matrices, none on biases and LayerNorms.

    Trainable parameters with at least two dimensions and a name that does not end in "bias" decay. Tied parameters
    appear once, empty groups are omitted. Names are kept under "param_names", as torch does.

    Returns: `[{"params": [(name, tensor), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`.
    """
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            # zero.Init leaves an empty one-dimensional tensor, and the shape in ds_shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            decays = dimensions >= 2 and not name.endswith("bias")
            (decaying if decays else others).append((name, parameter))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _ranges(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as ranges [first, last)."""
    ranges: list[tuple[int, int]] = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges
