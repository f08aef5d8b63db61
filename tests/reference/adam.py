"""Reference AdamW and StableAdamW, as the papers write them: float64, one process, tensor by tensor."""

import torch
from torch import Tensor

from tests.reference.lamb import ReferenceOptimizer


class ReferenceAdamW(ReferenceOptimizer):
    """arXiv:1711.05101, Algorithm 2, with decay η λ as in torch."""

    def update(self, i: int, g: Tensor) -> None:
        m, v = self.moments(i, g)
        m_hat = m / (1 - self.betas[0] ** self.t)
        v_hat = v / (1 - self.betas[1] ** self.t)
        decayed = self.weights[i] - self.lr[i] * self.decay[i] * self.weights[i]
        self.weights[i] = decayed - self.lr[i] * m_hat / (v_hat.sqrt() + self.eps)


class ReferenceStableAdamW(ReferenceOptimizer):
    """arXiv:2304.13013, Algorithm 2: the moments are debiased by β̂₁ and β̂₂, which change from step to step."""

    def update(self, i: int, g: Tensor) -> None:
        beta1, beta2 = self.betas
        beta1_hat = beta1 * (1 - beta1 ** (self.t - 1)) / (1 - beta1**self.t)
        beta2_hat = beta2 * (1 - beta2 ** (self.t - 1)) / (1 - beta2**self.t)
        v = beta1_hat * self.first[i] + (1 - beta1_hat) * g
        u = beta2_hat * self.second[i] + (1 - beta2_hat) * g**2
        self.first[i], self.second[i] = v, u
        rms = float(torch.mean(g**2 / torch.maximum(u, torch.tensor(self.eps**2, dtype=u.dtype))).sqrt())
        self.ratios[i] = rms
        eta = self.lr[i] / max(1.0, rms)
        theta = self.weights[i]
        self.weights[i] = theta - eta * self.decay[i] * theta - eta * v / (u.sqrt() + self.eps)
