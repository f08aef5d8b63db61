"""LAMB straight from the formula (arXiv:1904.00962, Algorithm 2): float64, one process, tensor by tensor."""

import math

import torch
from torch import Tensor


def clip(gradients: list[Tensor], maximum: float) -> float:
    """Scale the gradients in place to a joint norm of at most `maximum`; returns the norm before."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    if maximum > 0 and norm > maximum:
        for gradient in gradients:
            gradient.mul_(maximum / norm)
    return norm


class ReferenceLamb:
    """Holds its own float64 weights, in the order of `weights`; `decay` is λ for each of them."""

    def __init__(
        self, weights: list[Tensor], decay: list[float], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        self.weights = [w.detach().double().clone() for w in weights]
        self.decay, self.lr, self.betas, self.eps = decay, lr, betas, eps
        self.first = [torch.zeros_like(w) for w in self.weights]
        self.second = [torch.zeros_like(w) for w in self.weights]
        self.ratios = [1.0] * len(self.weights)
        self.t = 0

    def step(self, gradients: list[Tensor]) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            g = gradient.double()
            self.first[i] = beta1 * self.first[i] + (1 - beta1) * g
            self.second[i] = beta2 * self.second[i] + (1 - beta2) * g * g
            m_hat = self.first[i] / (1 - beta1**self.t)
            v_hat = self.second[i] / (1 - beta2**self.t)
            u = m_hat / (torch.sqrt(v_hat) + self.eps) + self.decay[i] * self.weights[i]
            w_norm, u_norm = float(torch.linalg.norm(self.weights[i])), float(torch.linalg.norm(u))
            self.ratios[i] = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            self.weights[i] = self.weights[i] - self.lr * self.ratios[i] * u
