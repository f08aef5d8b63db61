"""Singular values and eigenvalues against torch.linalg, Jacobians and Hessians against autograd's full matrices."""

import pytest
import torch
from torch import nn

from maskvr_ds.analysis.health.spectra import (
    hessian_product,
    jacobian,
    largest_eigenvalue,
    largest_singular_value,
    stable_rank,
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (64, 64), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_singular_value(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    values = torch.linalg.svdvals(matrix)
    sigma = largest_singular_value(matrix)
    assert sigma == pytest.approx(values[0].item(), rel=1e-4)
    assert stable_rank(matrix, sigma) == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-3)


def test_known_ranks() -> None:
    assert stable_rank(torch.eye(9), largest_singular_value(torch.eye(9))) == pytest.approx(9)
    one = torch.ones(5, 3)
    assert stable_rank(one, largest_singular_value(one)) == pytest.approx(1)
    zeros = torch.zeros(5, 3)
    assert stable_rank(zeros, largest_singular_value(zeros)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_lanczos_against_linalg(seed: int) -> None:
    matrix = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The most negative eigenvalue is the largest in absolute value: power iteration would find that one.
    matrix = matrix + matrix.T - 30 * torch.outer(matrix[0], matrix[0]) / matrix[0].norm() ** 2
    values = torch.linalg.eigvalsh(matrix)
    assert -values[0] > values[-1]
    found = largest_eigenvalue(lambda v: [matrix @ v[0]], [torch.zeros(80, dtype=torch.float64)], tolerance=1e-9)
    assert found.value == pytest.approx(values[-1].item(), rel=1e-3)


def test_lanczos_stops_in_an_invariant_subspace() -> None:
    found = largest_eigenvalue(lambda v: [3.0 * v[0]], [torch.zeros(10)])
    assert found.value == pytest.approx(3.0)
    assert found.converged
    assert found.iterations <= 3


def test_lambda_max_against_the_full_hessian() -> None:
    """Of a small network with a nonlinear loss, in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 5))
    x, y = torch.randn(40, 6), torch.randint(5, (40,))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def of_flat(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in parameters])
        values = {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of_flat, flat))[-1].item()
    product = hessian_product(lambda: nn.functional.cross_entropy(model(x), y), parameters)
    found = largest_eigenvalue(product, [p.detach() for p in parameters])
    assert found.value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_jacobian_against_autograd(scale: float) -> None:
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    for parameter in layer.parameters():
        parameter.data.mul_(scale)
    source = torch.randn(3, 24, requires_grad=True)

    def residual(x: torch.Tensor) -> torch.Tensor:
        return x + layer(x)

    full = torch.autograd.functional.jacobian(residual, source).reshape(72, 72)
    squares = torch.linalg.svdvals(full).double().square()
    found = jacobian(source, residual(source), vectors=400, iterations=200)
    assert found.rms**2 == pytest.approx(squares.mean().item(), rel=0.03)
    assert found.spread == pytest.approx((squares.square().mean() / squares.mean() ** 2).item(), rel=0.06)
    assert found.largest == pytest.approx(squares.max().sqrt().item(), rel=1e-3)


def test_an_isometry() -> None:
    matrix = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(2)))[0]
    source = torch.randn(4, 30, requires_grad=True)
    found = jacobian(source, source @ matrix, vectors=1)
    assert found.spread == pytest.approx(1, rel=0.3)
    assert found.largest == pytest.approx(1, rel=1e-4)
