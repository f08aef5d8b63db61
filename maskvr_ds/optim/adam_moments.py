"""Adam's moments and update, which LAMB and StableAdamW scale per tensor."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maskvr_ds.optim.checks import check_betas, check_number
from maskvr_ds.optim.layerwise import LayerwiseAdaptive

# Elements that a CPU updates at a time: five tensors of 512 KiB stay in a thread's cache between operations, and
# starting these takes little of their time.
PIECE = 1 << 17
# Of several threads each has so many pieces at a time, since they wait for each other at every operation: long, if
# other programs take a core.
_PER_THREAD = 8


class AdamMoments(LayerwiseAdaptive):
    """u = m̂ / (√v̂ + ε) + λ w, with the moments of Adam (arXiv:1412.6980).

    State per parameter (under ZeRO: per flat partition): `exp_avg` (m) and `exp_avg_sq` (v) with the parameter's shape
    and dtype; `step`, a Python int. DeepSpeed's ZeRO and universal checkpoints know these names, and an int never makes
    the host wait for the device.

    Raises ValueError if a hyperparameter is out of range.
    """

    def _check_settings(self, settings: dict[str, Any]) -> None:
        super()._check_settings(settings)
        check_betas(settings["betas"])
        check_number("eps", settings["eps"])

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
        weight_decay = group["weight_decay"]
        first, second = self._corrections(group, step)
        # In one buffer: (1 − β₁ᵗ)(√v̂ + ε), then its reciprocal times m, then + λw.
        updates = list(torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in partitions]))
        torch._foreach_mul_(updates, first / second**0.5)
        torch._foreach_add_(updates, first * group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, [self.state[p]["exp_avg"] for p in partitions])
        if weight_decay != 0:
            torch._foreach_add_(updates, partitions, alpha=weight_decay)
        return updates

    def _update_pieces(
        self,
        group: dict[str, Any],
        partitions: list[Tensor],
        gradients: list[Tensor],
        updates: list[Tensor],
        step: int,
    ) -> None:
        """`_advance` and `_updates` by pieces of the partitions; writes u to `updates`, which may be the gradients.

        The same operations on every element as there.
        """
        beta1, beta2 = group["betas"]
        first, second = self._corrections(group, step)
        for partition, gradient, update in zip(partitions, gradients, updates, strict=True):
            state = self.state[partition]
            for w, g, u, m, v in _pieces([partition, gradient, update, state["exp_avg"], state["exp_avg_sq"]]):
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                torch.sqrt(v, out=u).mul_(first / second**0.5).add_(first * group["eps"]).reciprocal_().mul_(m)
                if group["weight_decay"] != 0:
                    u.add_(w, alpha=group["weight_decay"])

    def _corrections(self, group: dict[str, Any], step: int) -> tuple[float, float]:
        """1 − β₁ᵗ and 1 − β₂ᵗ: m̂ and v̂ are m and v divided by them."""
        beta1, beta2 = group["betas"]
        return 1 - beta1**step, 1 - beta2**step


def _pieces(tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut into views of PIECE elements, of several threads 8 times as many for each; uncut if one
    of them is not contiguous."""
    threads = torch.get_num_threads()
    size = PIECE if threads == 1 else _PER_THREAD * PIECE * threads
    if tensors[0].numel() <= size or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tuple(tensors)])
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
