"""Reference LAMB, its variants and LARS, straight from the formulas: float64, one process, tensor by tensor.

Each class writes out its own formula; only the bookkeeping is shared.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def clip(gradients: list[Tensor], maximum: float) -> float:
    """Scale the gradients in place to a global norm of at most `maximum`; returns the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    if maximum > 0 and norm > maximum:
        for gradient in gradients:
            gradient.mul_(maximum / norm)
    return norm


def norm_of(tensor: Tensor) -> float:
    return float(torch.linalg.norm(tensor))


class ReferenceOptimizer(ABC):
    """Keeps float64 copies of `weights`; `decay` is λ per tensor, `lr` η per tensor or for all."""

    def __init__(
        self,
        weights: list[Tensor],
        decay: list[float],
        lr: float | list[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        self.weights = [w.detach().double().clone() for w in weights]
        self.decay, self.betas, self.eps = decay, betas, eps
        self.lr = lr if isinstance(lr, list) else [lr] * len(weights)
        self.first = [torch.zeros_like(w) for w in self.weights]
        self.second = [torch.zeros_like(w) for w in self.weights]
        self.ratios = [1.0] * len(self.weights)
        self.t = 0

    def step(self, gradients: list[Tensor]) -> None:
        self.t += 1
        for i, gradient in enumerate(self.prepare([g.double() for g in gradients])):
            self.update(i, gradient)

    def prepare(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients

    def moments(self, i: int, g: Tensor) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        self.first[i] = beta1 * self.first[i] + (1 - beta1) * g
        self.second[i] = beta2 * self.second[i] + (1 - beta2) * g * g
        return self.first[i], self.second[i]

    @abstractmethod
    def update(self, i: int, g: Tensor) -> None: ...


class ReferenceLamb(ReferenceOptimizer):
    """arXiv:1904.00962, Algorithm 2, with φ(z) = z."""

    def update(self, i: int, g: Tensor) -> None:
        m, v = self.moments(i, g)
        m_hat = m / (1 - self.betas[0] ** self.t)
        v_hat = v / (1 - self.betas[1] ** self.t)
        r = m_hat / (torch.sqrt(v_hat) + self.eps)
        u = r + self.decay[i] * self.weights[i]
        w_norm, u_norm = norm_of(self.weights[i]), norm_of(u)
        self.ratios[i] = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        self.weights[i] = self.weights[i] - self.lr[i] * self.ratios[i] * u


class ReferenceNvidiaLamb(ReferenceOptimizer):
    """multi_tensor_lamb.cu: the global gradient norm is first limited to 1; undecayed tensors step as in Adam."""

    def prepare(self, gradients: list[Tensor]) -> list[Tensor]:
        global_norm = math.sqrt(sum(norm_of(g) ** 2 for g in gradients))
        divisor = global_norm / 1.0 if global_norm > 1.0 else 1.0
        return [g / divisor for g in gradients]

    def update(self, i: int, g: Tensor) -> None:
        m, v = self.moments(i, g)
        unbiased_m, unbiased_v = m / (1 - self.betas[0] ** self.t), v / (1 - self.betas[1] ** self.t)
        update = unbiased_m / (unbiased_v.sqrt() + self.eps) + self.decay[i] * self.weights[i]
        rate = self.lr[i]
        self.ratios[i] = 1.0
        if self.decay[i] != 0:
            w_norm, update_norm = norm_of(self.weights[i]), norm_of(update)
            if w_norm != 0 and update_norm != 0:
                self.ratios[i] = w_norm / update_norm
                rate = self.lr[i] * (w_norm / update_norm)
        self.weights[i] = self.weights[i] - rate * update


class ReferenceDeepSpeedLamb(ReferenceOptimizer):
    """fused_lamb_cuda_kernel.cu: uncorrected moments in the update, the correction in the step size, clamped ratio."""

    bias_correction, min_coeff, max_coeff = True, 0.01, 10.0

    def update(self, i: int, g: Tensor) -> None:
        m, v = self.moments(i, g)
        update = m / (v.sqrt() + self.eps) + self.decay[i] * self.weights[i]
        step_size = self.lr[i]
        if self.bias_correction:
            step_size = self.lr[i] * math.sqrt(1 - self.betas[1] ** self.t) / (1 - self.betas[0] ** self.t)
        w_norm, u_norm = norm_of(self.weights[i]), norm_of(update)
        coeff = 1.0
        if w_norm != 0 and u_norm != 0:
            coeff = max(self.min_coeff, min(self.max_coeff, w_norm / u_norm))
        self.ratios[i] = coeff
        self.weights[i] = self.weights[i] - step_size * coeff * update


class ReferenceBingBertLamb(ReferenceDeepSpeedLamb):
    """With the settings of bing_bert: no bias correction, max_coeff 0.3."""

    bias_correction, max_coeff = False, 0.3


class ReferenceLars(ReferenceOptimizer):
    """arXiv:1904.00962, Algorithm 1, with φ(z) = z; `betas[0]` is the momentum."""

    def update(self, i: int, g: Tensor) -> None:
        beta = self.betas[0]
        m = beta * self.first[i] + (1 - beta) * (g + self.decay[i] * self.weights[i])
        self.first[i] = m
        w_norm, m_norm = norm_of(self.weights[i]), norm_of(m)
        self.ratios[i] = w_norm / m_norm if w_norm > 0 and m_norm > 0 else 1.0
        self.weights[i] = self.weights[i] - self.lr[i] * self.ratios[i] * m
