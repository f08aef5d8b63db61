"""Reference Muon with AdamW for what is no hidden matrix: float64, one process, tensor by tensor.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon: momentum
with Nesterov's look-ahead, orthogonalised by five quintic Newton-Schulz iterations, scaled by √max(1, rows / columns).
"""

import math

from torch import Tensor

from tests.reference.adam import ReferenceAdamW

MOMENTUM = 0.95


def orthogonalised(matrix: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class ReferenceMuon(ReferenceAdamW):
    """`hidden`: whether each tensor is a hidden matrix; the others are AdamW's."""

    hidden: list[bool]

    def update(self, i: int, g: Tensor) -> None:
        if not self.hidden[i]:
            super().update(i, g)
            return
        self.first[i] = MOMENTUM * self.first[i] + (1 - MOMENTUM) * g
        ahead = (1 - MOMENTUM) * g + MOMENTUM * self.first[i]
        step = orthogonalised(ahead) * math.sqrt(max(1.0, g.size(0) / g.size(1)))
        decayed = self.weights[i] - self.lr[i] * self.decay[i] * self.weights[i]
        self.weights[i] = decayed - self.lr[i] * step
