"""LAMB and LARS that stay correct when ZeRO cuts the parameters into flat partitions.

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
- Which tensors decay is up to the groups' λ. What well-known implementations do otherwise stands in variants.py.

Under ZeRO the optimizer is handed flat fp32 partitions instead of the parameters; tensors begin, end and straddle ranks
anywhere in them. A norm over such a partition is not the norm of anything (deepspeedai/DeepSpeed#490). `bind` reads
from DeepSpeed which piece of which tensor lies where (partitions.py); norms are then taken per piece and completed over
the ranks, with one all-reduce per step (layerwise.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from maskvr_ds.optim.layerwise import LayerwiseAdaptive
from maskvr_ds.optim.partitions import layout_of
from maskvr_ds.optim.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Lamb", "Lars", "Variant", "bind", "parameter_groups"]


class Lamb(LayerwiseAdaptive):
    """LAMB (arXiv:1904.00962, Algorithm 2); see the head of this file for the equations.

    Works by itself like any torch optimizer. With DeepSpeed, construct it over the model's parameters, give
    it to `deepspeed.initialize` with `"zero_allow_untested_optimizer": true` (and, where the optimizer is offloaded,
    `"zero_force_ds_cpu_optimizer": false`), then call `bind(engine)` once.

    State per parameter (under ZeRO: per flat partition): `exp_avg` and `exp_avg_sq`, like the parameter in
    shape and dtype; `step`, a Python int. DeepSpeed's ZeRO and universal checkpoints know these names, and an
    int never makes the host wait for the device. `step()` runs no host-device synchronisation (but where the
    partitions are offloaded) and keeps one extra buffer of the size of the parameters (the update u) while it runs, and
    on a GPU one of the size of small ones (their ratios); gradients are left as they were.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, gradients dense.
        lr: η. betas: β₁, β₂. eps: ε. weight_decay: λ.
        variant: a name in VARIANTS, or a Variant. With `max_grad_norm` > 0 the step itself scales the gradients, except
            after `bind`: there DeepSpeed's `gradient_clipping` does the same, and `bind` insists on it.

    Raises:
        ValueError: a hyperparameter is out of range, or the variant is unknown.
        RuntimeError: from `step()`, if ZeRO replaced the parameters and `bind` was not called.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        variant: str | Variant = "paper",
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas = {betas}: each must be in [0, 1)")
        if eps < 0.0:
            raise ValueError(f"eps = {eps}: must be at least 0")
        if isinstance(variant, str):
            if variant not in VARIANTS:
                raise ValueError(f"variant = {variant!r}: known are {', '.join(VARIANTS)}")
            variant = VARIANTS[variant]
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, variant)

    def _new_state(self, partition: Tensor) -> dict[str, Any]:
        return {
            "step": 0,
            "exp_avg": torch.zeros_like(partition, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(partition, memory_format=torch.preserve_format),
        }

    def _advance(self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in partitions]
        torch._foreach_lerp_([self.state[p]["exp_avg"] for p in partitions], gradients, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)

    def _updates(self, group: dict[str, Any], partitions: list[Tensor], step: int) -> list[Tensor]:
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        first, second = 1 - beta1**step, 1 - beta2**step
        if self.variant.bias_correction != "moments":
            first = second = 1.0
        # In one buffer: (1 − β₁ᵗ)(√v̂ + ε), then its reciprocal times m, then + λw.
        updates = list(torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in partitions]))
        torch._foreach_mul_(updates, first / second**0.5)
        torch._foreach_add_(updates, first * group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, [self.state[p]["exp_avg"] for p in partitions])
        if weight_decay != 0:
            torch._foreach_add_(updates, partitions, alpha=weight_decay)
        return updates

    def _rate(self, group: dict[str, Any], step: int) -> float:
        if self.variant.bias_correction != "rate":
            return group["lr"]
        beta1, beta2 = group["betas"]
        return group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)


class Lars(LayerwiseAdaptive):
    """LARS as arXiv:1904.00962, Algorithm 1 has it; see the head of this file for the equations. Used like `Lamb`.

    Differences from arXiv:1708.03888: the ratio is that of the momentum, not of the gradient; no trust coefficient.
    State: `exp_avg`, like the parameter in shape and dtype; `step`, a Python int. No extra buffer. DeepSpeed converts
    only optimizers with two moments to universal checkpoints, so not this one.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, gradients dense.
        lr: η. momentum: β₁. weight_decay: λ.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: from `step()`, if ZeRO replaced the parameters and `bind` was not called.
    """

    def __init__(self, params: Any, lr: float = 1e-1, momentum: float = 0.9, weight_decay: float = 0.01) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum = {momentum}: must be in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, Variant())

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
    """Tell the engine's `Lamb` or `Lars` where the tensors are after DeepSpeed rearranged them.

    Call it once, right after `deepspeed.initialize`, before or after `engine.load_checkpoint`; harmless where
    nothing was rearranged. Not a collective.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` that was given one of them as `optimizer`.

    Raises:
        ValueError: the engine's optimizer is neither; the variant scales gradients and the engine does not clip them
            likewise; the engine uses something in which the norms would be wrong or that is not tested (docs/lamb.md
            lists it).
        RuntimeError: on the ranks concerned, where a piece is not what the model's weights have there.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, LayerwiseAdaptive):
        raise ValueError(
            f"bind needs an engine whose optimizer is maskvr_ds.lamb.Lamb or Lars, this one's is "
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
    # ZeRO links all optimizer state to the parameters when the first group has stepped. That of the other
    # groups must exist by then, or `safe_get_full_optimizer_state` never finds it.
    for partition in layout.partitions:
        optimizer._state_of(partition)
    optimizer._layout, optimizer._bound = layout, True


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The two parameter groups of BERT training: weight decay on matrices, none on biases and LayerNorms.

    Decay goes to every trainable parameter of two or more dimensions whose name does not end in "bias". Tied
    parameters appear once. An empty group is left out. Names are kept, as torch does, under "param_names".

    Returns: `[{"params": [(name, tensor), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`.
    """
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            # zero.Init leaves an empty tensor of one dimension and the shape in ds_shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            decays = dimensions >= 2 and not name.endswith("bias")
            (decaying if decays else others).append((name, parameter))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
