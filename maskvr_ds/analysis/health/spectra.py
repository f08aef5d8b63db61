"""Spectra without matrices' decompositions: power iteration, Lanczos, Jacobians by random vectors. No collectives.

Products and norms are formed in the dtype of the tensors, coefficients of Lanczos in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from maskvr_ds import hashing

_POWER_TOLERANCE = 1e-7
Product = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(hashing.fold(seed, 0) & (1 << 63) - 1)


def largest_singular_value(matrix: torch.Tensor, *, seed: int = 0, iterations: int = 500) -> float:
    """σ_max of a matrix [m, n] by power iteration on MᵀM; a lower bound if the iterations do not suffice.

    They end once σ changes by less than 1e-7 of its value.
    """
    vector = torch.randn(
        matrix.shape[1], generator=generator(seed, matrix.device), device=matrix.device, dtype=matrix.dtype
    )
    sigma = 0.0
    for _ in range(iterations):
        image = matrix @ (vector / vector.norm().clamp(min=torch.finfo(matrix.dtype).tiny))
        vector = matrix.T @ image
        before, sigma = sigma, image.norm().item()
        if abs(sigma - before) <= _POWER_TOLERANCE * sigma:
            break
    return sigma


def stable_rank(matrix: torch.Tensor, sigma: float) -> float:
    """‖M‖_F² / σ_max²: the number of directions that carry the matrix; 0 of a matrix of zeros."""
    return 0.0 if sigma == 0 else (matrix.norm().item() / sigma) ** 2


@dataclass(frozen=True)
class Largest:
    """An eigenvalue by Lanczos. iterations: Hessian–vector products. converged: whether it changed by less than the
    tolerance in the last iteration."""

    value: float
    iterations: int
    converged: bool


def largest_eigenvalue(
    product: Product, like: Sequence[torch.Tensor], *, seed: int = 0, iterations: int = 60, tolerance: float = 1e-5
) -> Largest:
    """The algebraically largest eigenvalue of a symmetric operator by Lanczos iteration.

    product: the operator on a list of tensors shaped as `like`. Vectors are not orthogonalised again, which takes
    memory for three of them only; it makes copies of eigenvalues, and no wrong extremes (Paige 1980).
    """
    random = generator(seed, like[0].device)
    now = [torch.randn(t.shape, generator=random, device=t.device, dtype=t.dtype) for t in like]
    now = _scaled(now, 1 / _norm(now))
    before: list[torch.Tensor] | None = None
    diagonal: list[float] = []
    beside: list[float] = []
    value, beta = math.nan, 0.0
    for number in range(1, iterations + 1):
        image = product(now)
        alpha = _dot(image, now)
        image = [y - alpha * x for y, x in zip(image, now, strict=True)]
        if before is not None:
            image = [y - beta * x for y, x in zip(image, before, strict=True)]
        diagonal.append(alpha)
        last, value = value, _largest_of_tridiagonal(diagonal, beside)
        if number > 2 and abs(value - last) <= tolerance * abs(value):
            return Largest(value, number, True)
        beta = _norm(image)
        if beta <= 1e-12 * max(1.0, abs(value)):
            return Largest(value, number, True)  # the vectors span an invariant subspace
        beside.append(beta)
        before, now = now, _scaled(image, 1 / beta)
    return Largest(value, iterations, False)


def _largest_of_tridiagonal(diagonal: list[float], beside: list[float]) -> float:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigvalsh(matrix)[-1].item()


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _norm(a: Sequence[torch.Tensor]) -> float:
    return math.sqrt(_dot(a, a))


def _scaled(tensors: Sequence[torch.Tensor], factor: float) -> list[torch.Tensor]:
    return [factor * tensor for tensor in tensors]


def hessian_product(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> Product:
    """The product of the loss' Hessian with a vector shaped as `parameters`, by two backward passes.

    loss: computes the scalar anew in every call. Parameters that it does not depend on have zeros.
    """

    def product(vector: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True) if g is not None)
            assert isinstance(slope, torch.Tensor)
            found = torch.autograd.grad(slope, parameters, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for h, p in zip(found, parameters, strict=True)]

    return product


@dataclass(frozen=True)
class Jacobian:
    """Singular values σ of a map's Jacobian, by random vectors. rms: root of the mean σ² over inputs' directions, 1
    where the map is an isometry on average. spread: mean σ⁴ / (mean σ²)², 1 where all σ are equal. largest: σ_max."""

    rms: float
    spread: float
    largest: float


def jacobian(
    source: torch.Tensor, target: torch.Tensor, *, vectors: int = 4, iterations: int = 8, seed: int = 0
) -> Jacobian:
    """Of the map from `source` to `target`, tensors of one graph, which is kept.

    mean σ² is the mean of ‖Jᵀv‖² / n, mean σ⁴ that of ‖J Jᵀv‖² / n over random v of n standard normal numbers
    (Hutchinson 1990). σ_max by power iteration from the last v: a lower bound.
    """
    random = generator(seed, target.device)
    n = target.numel()
    squares, fourths, largest = [], [], 0.0
    vector = torch.zeros_like(target)
    for _ in range(vectors):
        vector = torch.randn(target.shape, generator=random, device=target.device, dtype=target.dtype)
        back = _transposed(source, target, vector)
        forth = _forward(source, target, back)
        squares.append(back.double().square().sum().item() / n)
        fourths.append(forth.double().square().sum().item() / n)
    for _ in range(iterations):
        vector = _forward(source, target, _transposed(source, target, vector))
        largest = vector.norm().item() ** 0.5
        vector = vector / max(vector.norm().item(), 1e-30)
    mean = sum(squares) / vectors
    return Jacobian(math.sqrt(mean), sum(fourths) / vectors / mean**2 if mean else math.nan, largest)


def _transposed(source: torch.Tensor, target: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Jᵀv."""
    return torch.autograd.grad(target, source, vector, retain_graph=True)[0]


def _forward(source: torch.Tensor, target: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """J v, as the derivative of u ↦ ⟨Jᵀu, v⟩, which is linear in u."""
    dummy = torch.zeros_like(target, requires_grad=True)
    back = torch.autograd.grad(target, source, dummy, retain_graph=True, create_graph=True)[0]
    return torch.autograd.grad(back, dummy, vector, retain_graph=True)[0]
