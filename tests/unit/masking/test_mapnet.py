"""MAPNet's proposal against a plain loop, its objective against enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskvr_ds.masking import mapnet
from maskvr_ds.masking.mapnet import OBJECTIVES, MapNet, Neighbours, flops_per_sequence, inclusion_from_scores
from maskvr_ds.masking.pareto import proposal_to_inclusion
from maskvr_ds.masking.strategies import prediction_counts


def capped(scores: list[float], k: int) -> list[float]:
    """Second implementation: cap the largest, share out the rest, until none exceeds 1."""
    e = [math.exp(s - max(scores)) for s in scores]
    one: set[int] = set()
    while True:
        rest = sum(x for i, x in enumerate(e) if i not in one)
        p = [1.0 if i in one else (k - len(one)) * x / rest for i, x in enumerate(e)]
        over = {i for i, x in enumerate(p) if x > 1 and i not in one}
        if not over:
            return p
        one |= over


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 20.0])
@pytest.mark.parametrize("floor", [0.1, 1.0])
def test_inclusion_is_that_of_a_plain_loop(spread: float, floor: float) -> None:
    random = np.random.default_rng(0)
    B, L = 64, 24
    scores = torch.from_numpy(random.normal(size=(B, L)) * spread).requires_grad_()
    maskable = torch.from_numpy(random.random((B, L)) < 0.8)
    maskable[0], maskable[1] = False, True
    n = maskable.sum(1)
    counts = torch.minimum(torch.from_numpy(random.integers(1, L // 2, B)), n)
    counts[1] = L
    pi = inclusion_from_scores(scores, maskable, counts, floor)
    assert pi.dtype == torch.float64
    assert bool(((pi > 0) & (pi <= 1)).all())
    for b in range(1, B):
        expected = capped(scores[b][maskable[b]].tolist(), int(counts[b]))
        share = int(counts[b]) / int(n[b])
        expected = [(1 - floor) * p + floor * share for p in expected]
        assert pi[b][maskable[b]].tolist() == pytest.approx(expected, abs=1e-12)
        assert pi[b][maskable[b]].sum().item() == pytest.approx(int(counts[b]), abs=1e-9)
    pi.square().sum().backward()
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_inclusion_is_that_of_fixed_scores(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = spread * torch.randn(60, 40, generator=generator, dtype=torch.float64)
    maskable = torch.rand(60, 40, generator=generator) < torch.rand(60, 1, generator=generator)
    counts = prediction_counts(maskable.sum(1), 0.3)
    fixed = proposal_to_inclusion(scores.exp(), maskable, counts, 12, 0.2)
    learnt = inclusion_from_scores(scores, maskable, counts, 0.2)
    torch.testing.assert_close(torch.where(maskable, learnt, 0.0), fixed, rtol=1e-6, atol=1e-9)


def test_inclusion_has_the_gradient_of_its_differences() -> None:
    scores = torch.tensor([[4.0, 0.3, -0.2, 0.5, -1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    maskable = torch.tensor([[True, True, True, True, True, False]])
    assert torch.autograd.gradcheck(lambda s: inclusion_from_scores(s, maskable, torch.tensor([2]), 0.2), scores)


def test_scores_far_apart_do_not_overflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0, 5e3, -5e3, 1.0]])
    pi = inclusion_from_scores(scores, torch.ones(1, 6, dtype=torch.bool), torch.tensor([3]), 0.3)
    assert pi[0].tolist() == pytest.approx(
        [0.85, 0.15, 0.15 + 0.7 / (1 + math.e), 0.85, 0.15, 0.15 + 0.7 * math.e / (1 + math.e)]
    )


def test_variance_is_the_second_moment_whichever_proposal_drew() -> None:
    """Enumeration over single draws (k = 1): E w u s² = Σ (k/n)² s²/π(φ), and its minimum is at π ∝ s."""
    n, floor = 5, 1e-9
    s = torch.tensor([0.2, 1.0, 3.0, 0.7, 1.5], dtype=torch.float64)
    ones = torch.ones(1, n, dtype=torch.bool)

    def network(scores: torch.Tensor) -> torch.Tensor:
        return inclusion_from_scores(scores[None], ones, torch.tensor([1]), floor)[0]

    scores = torch.tensor([0.1, -0.5, 0.3, 1.0, 0.0], dtype=torch.float64)
    expected = (s.square() / n**2 / network(scores)).sum()
    for drawn in (torch.full((n,), 1 / n, dtype=torch.float64), network(scores)):
        w, u = 1 / n / drawn, 1 / n / network(scores)
        mean = sum(
            drawn[i] * OBJECTIVES["variance"].loss(scores[i], w[i], u[i], s[i], torch.tensor(1.0)) for i in range(n)
        )
        assert mean.item() == pytest.approx(expected.item(), rel=1e-12)
    least = (s.square() / n**2 / network(s.log())).sum()
    assert least < expected
    for i, change in itertools.product(range(n), (-0.1, 0.1)):
        moved = s.log()
        moved[i] += change
        assert least < (s.square() / n**2 / network(moved)).sum()


def test_variance_is_homogeneous() -> None:
    """This property allows dividing by s̄ after the gradient reduction."""
    w, u, s = torch.rand(3, 20, dtype=torch.float64)
    s_mean = torch.tensor(2.5, dtype=torch.float64)
    objective = OBJECTIVES["variance"]
    inside = objective.loss(w, w, u, s / s_mean, s_mean)
    assert inside.item() == pytest.approx((objective.loss(w, w, u, s, s_mean) / s_mean**objective.degree).item())


def test_network_starts_uniform_and_sees_both_sides() -> None:
    torch.manual_seed(0)
    net = MapNet(vocab_size=50, max_length=16, layers=2, hidden=64, reach=3)
    ids = torch.randint(0, 50, (2, 16))
    assert bool((net(ids) == 0).all())
    torch.nn.init.normal_(net.score.weight)
    before = net(ids)
    ids[0, 8] = (ids[0, 8] + 1) % 50
    changed = net(ids) != before
    assert bool(changed[0].all())
    assert not bool(changed[1].any())
    padded = torch.ones(2, 16, dtype=torch.bool)
    padded[:, 12:] = False
    before = net(ids, padded)[:, :12]
    ids[:, 13] = 1
    assert torch.equal(net(ids, padded)[:, :12], before)
    torch.testing.assert_close(net(ids[:, :12]), before)


@pytest.mark.parametrize("reach", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_neighbours_are_a_linear_map_of_the_windows(reach: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients by indexing each window, on either path."""
    torch.manual_seed(0)
    B, L, D = 2, 7, 4
    layer = Neighbours(D, reach).double()
    e = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([layer.bias.expand(D) for _ in range(B * L)]).view(B, L, D).clone()
    weight = layer.weight.view(D, D, 2 * reach)
    for place in range(L):
        for number, offset in enumerate([*range(-reach, 0), *range(1, reach + 1)]):
            if 0 <= place + offset < L:
                expected[:, place] = expected[:, place] + e[:, place + offset] @ weight[..., number].T
    if device == "gpu":
        monkeypatch.setattr(mapnet.F, "conv1d", None)
        monkeypatch.setattr(torch.Tensor, "device", torch.device("meta"))
    found = layer(e)
    monkeypatch.undo()
    torch.testing.assert_close(found, expected)
    inputs = (e, layer.weight, layer.bias)
    ours, theirs = (torch.autograd.grad(each.sin().sum(), inputs) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_expected_does_not_see_the_token() -> None:
    """`expected` sees the neighbours in order, and not the token: with it, the network would only learn to repeat."""
    torch.manual_seed(0)
    net = MapNet(vocab_size=50, max_length=16, layers=1, hidden=32, reach=2)
    seen: list[torch.Tensor] = []
    net.expected.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    ids = torch.randint(0, 50, (1, 16))
    for place in range(-1, 16):
        changed = ids.clone()
        if place >= 0:
            changed[0, place] = (changed[0, place] + 1) % 50
        net(changed)
    for place, output in enumerate(seen[1:]):
        differs = (output != seen[0]).any(-1)[0].nonzero().flatten().tolist()
        assert differs == [i for i in range(max(0, place - 2), min(16, place + 3)) if i != place]


def test_flops_are_those_that_torch_counts() -> None:
    sizes = {"layers": 2, "hidden": 64, "reach": 3}
    net = MapNet(vocab_size=50, max_length=16, **sizes)
    # On a CPU the counter supports only the math kernel of attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randint(0, 50, (3, 16)))
    # Without the score, and without the zeros in the centre of the windows.
    counted = counter.get_total_flops() - 3 * 16 * 2 * 64 - 3 * 16 * 2 * 64**2
    assert 4 * counted / 3 == flops_per_sequence(**sizes, sequence_length=16)
