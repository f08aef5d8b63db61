"""StableAdamW: AdamW whose updates are clipped per tensor, also where ZeRO shards the parameters into flat partitions.

Wortsman, Dettmers, Zettlemoyer et al., "Stable and low-precision training for large-scale vision-language models",
arXiv:2304.13013, Algorithm 2. For every parameter tensor w of n elements with gradient g, at step t:

    m ← β₁ m + (1 − β₁) g                m̂ = m / (1 − β₁ᵗ)
    v ← β₂ v + (1 − β₂) g²               v̂ = v / (1 − β₂ᵗ)
    RMS = √( Σ g² / max(v̂, ε²) / n )
    η′ = η / max(1, RMS)
    w ← w − η′ · (m̂ / (√v̂ + ε) + λ w)

The paper corrects the moments by changing β₁ and β₂ from step to step; its moments are equal to m̂ and v̂ above. m and
v, which are stored, are those of AdamW and LAMB.

RMS is a property of a tensor: under ZeRO the sum is taken per fragment and completed over the ranks (layerwise.py).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from maskvr_ds.optim.adam_moments import AdamMoments
from maskvr_ds.optim.layerwise import Update
from maskvr_ds.optim.variants import Variant


class StableAdamW(AdamMoments):
    """StableAdamW (arXiv:2304.13013, Algorithm 2); the module docstring has the equations. Used like `Lamb`.

    Works without DeepSpeed like any torch optimizer. With DeepSpeed, construct it from the model's parameters, pass
    it to `deepspeed.initialize` with `"zero_allow_untested_optimizer": true` (and, if the optimizer is offloaded,
    `"zero_force_ds_cpu_optimizer": false`), then call `maskvr_ds.lamb.bind(engine)` once.

    State: that of `AdamMoments`. While `step()` runs it needs one extra buffer of the size of the parameters; it does
    not synchronise host and device (unless the partitions are offloaded). Gradients are not modified.

    Args:
        params: tensors, `(name, tensor)` pairs, or groups of them; all on one device, with dense gradients.
        lr: η. betas: β₁, β₂ (the paper recommends β₂ from 0.95 to 0.99). eps: ε. weight_decay: λ.

    Raises:
        ValueError: if a hyperparameter is out of range.
        RuntimeError: from `step()`, if ZeRO has replaced the parameters and `bind` was not called.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        self._update_rms: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, Variant())

    @property
    def update_rms(self) -> Tensor | None:
        """RMS of the last step: fp32 [T] on the device of the optimizer's state, equal on all ranks, in the order of
        `tensor_names`; 0 for tensors without a gradient. None before the first step. The paper finds that values far
        above 1 precede spikes of the loss."""
        return self._update_rms

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_update_rms", None)

    def _measure(
        self, group: dict[str, Any], partitions: list[Tensor], gradients: list[Tensor], step: int
    ) -> list[Tensor]:
        """g / max(√v̂, ε)."""
        _, second = self._corrections(group, step)
        quotients = list(torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in partitions]))
        torch._foreach_mul_(quotients, second**-0.5)
        torch._foreach_clamp_min_(quotients, group["eps"])
        torch._foreach_reciprocal_(quotients)
        torch._foreach_mul_(quotients, gradients)
        return quotients

    def _sums(self, pending: list[Update], weights: list[list[Tensor]], updates: list[list[Tensor]]) -> Tensor:
        sums = [entry.sums for entry in pending if entry.sums is not None]
        return torch.stack(sums).sum(0, keepdim=True)

    def _scales(self, sums: Tensor, pending: list[Update]) -> Tensor:
        self._update_rms = (sums[0] / _sizes(tuple(self._layout.sizes), sums.device)).sqrt()
        return 1 / self._update_rms.clamp(min=1)


@lru_cache(maxsize=16)
def _sizes(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Elements of each tensor, at least 1, as fp32 [T] on the device, copied only once."""
    return torch.tensor(sizes, dtype=torch.float32).clamp(min=1).to(device)
