"""Conditional Poisson sampling against enumeration, exact rational arithmetic and counting."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds import hashing
from maskvr_ds.masking.conditional_poisson import ConditionalPoisson, odds_for_inclusion, odds_of
from maskvr_ds.masking.masker import pareto_sample
from tests.support.sets import Row, capped, rows


def repeated(row: Row, times: int, width: int = 5) -> ConditionalPoisson:
    odds = torch.tensor(row.odds, dtype=torch.float64).expand(times, -1)
    return ConditionalPoisson(odds, torch.full((times,), row.k), width)


def random_bits(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return hashing.stream(torch.arange(rows)[:, None] + (seed << 32), torch.arange(length))


def members(positions: torch.Tensor, used: torch.Tensor, length: int) -> torch.Tensor:
    """bool [B, L]; fails if a position is drawn twice."""
    found = torch.zeros(len(positions), length, dtype=torch.int64).scatter_add_(1, positions, used.long())
    assert found.max() <= 1
    return found.bool()


def mixed_rows(rows: int = 60, length: int = 40, width: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Odds over 24 decades, rows with different n and k, among them n = 0, k = n and k = 1; and bits."""
    random = np.random.default_rng(3)
    odds = torch.from_numpy(10.0 ** random.uniform(-12, 12, (rows, length)))
    odds[torch.from_numpy(random.random((rows, length)) < random.random((rows, 1)))] = 0
    odds[0] = 0
    odds[1, 5:] = 0
    n = (odds > 0).sum(1)
    counts = torch.from_numpy(random.integers(1, width + 1, rows)).minimum(n)
    counts[1], counts[2] = n[1], 1
    return odds, counts, random_bits(rows, length)


@settings(max_examples=150, deadline=None)
@given(rows())
def test_probabilities_of_all_sets(row: Row) -> None:
    sets = torch.tensor(row.sets())
    design = repeated(row, len(sets))
    positions = torch.nn.functional.pad(sets, (0, 5 - row.k))
    used = (torch.arange(5) < row.k).expand(len(sets), 5)
    log_q = design.log_probability(positions, used)
    torch.testing.assert_close(log_q, row.probabilities().log(), rtol=1e-13, atol=1e-12)
    assert abs(log_q.exp().sum() - 1) < 1e-12
    assert design.log_normaliser()[0].item() == pytest.approx(math.log(row.normaliser()), rel=1e-13, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(rows())
def test_inclusion_probabilities(row: Row) -> None:
    found = repeated(row, 1).inclusion()[0]
    expected = row.probabilities() @ row.members()
    # Small π too are right to 11 digits: nothing is ever subtracted.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


@settings(max_examples=50, deadline=None)
@given(rows(), st.integers(-60, 60))
def test_only_ratios_of_odds_count(row: Row, power: int) -> None:
    scaled = Row([o * 2.0**power for o in row.odds], row.k)
    bits = random_bits(20, len(row.odds))
    first, second = repeated(row, 20), repeated(scaled, 20)
    assert torch.equal(first.sample(bits)[0], second.sample(bits)[0])
    assert torch.equal(first.inclusion(), second.inclusion())
    difference = second.log_normaliser() - first.log_normaliser()
    torch.testing.assert_close(difference, torch.full_like(difference, row.k * power * math.log(2)))


def plain_mask(row: Row, bits: list[int]) -> set[int]:
    """The sequential procedure in exact arithmetic: e-polynomials of the odds as fractions, one position at a time."""
    odds = [Fraction(o) for o in row.odds]
    polynomials = [[Fraction(1)] + [Fraction(0)] * row.k]
    for o in reversed(odds):
        e = polynomials[-1]
        polynomials.append([e[0]] + [e[j] + o * e[j - 1] for j in range(1, row.k + 1)])
    polynomials.reverse()
    chosen: set[int] = set()
    for i, o in enumerate(odds):
        left = row.k - len(chosen)
        u = Fraction(2 * (((bits[i] >> 12) + (1 << 51)) % (1 << 52)) + 1, 1 << 53)
        if left and u < o * polynomials[i + 1][left - 1] / polynomials[i][left]:
            chosen.add(i)
    return chosen


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 2**20))
def test_sampler_is_the_sequential_procedure(row: Row, seed: int) -> None:
    bits = random_bits(20, len(row.odds), seed)
    positions, used = repeated(row, 20).sample(bits)
    for chosen, row_bits in zip(members(positions, used, len(row.odds)), bits.tolist(), strict=True):
        assert set(torch.nonzero(chosen).flatten().tolist()) == plain_mask(row, row_bits)


@pytest.mark.parametrize(
    ("odds", "blocks"),
    [([3.0, 0.2, 0.0, 1.0, 0.7, 12.0, 0.05, 1.4, 0.0, 0.4], 100), ([1e-3, 1e3, 1.0, 0.0, 1.0, 2.0, 5e-2], 10)],
)
def test_a_million_draws(odds: list[float], blocks: int) -> None:
    """Sets by chi-square and inclusion within 5 standard errors; 10^6 draws, and 10^5 with odds far apart."""
    row, per_block = Row(odds, 3), 10_000
    sets = row.sets()
    code = (row.members() @ (2.0 ** torch.arange(len(odds))).double()).long()
    design = repeated(row, per_block, 4)
    tally = torch.zeros(1 << len(odds))
    for block in range(blocks):
        positions, used = design.sample(random_bits(per_block, len(odds), seed=block + 1))
        assert used.sum(1).eq(3).all()
        chosen = members(positions, used, len(odds))
        assert chosen.sum(1).eq(3).all(), "k different positions"
        tally += torch.bincount((chosen.long() << torch.arange(len(odds))).sum(1), minlength=len(tally))
    draws = blocks * per_block
    assert tally[code].sum() == draws, "only maskable positions"
    q = row.probabilities()
    frequent = q * draws >= 5
    expected = torch.cat([q[frequent], q[~frequent].sum()[None]]) * draws
    observed = torch.cat([tally[code][frequent], tally[code][~frequent].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    freedom = len(expected) - 1
    chi_squared = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom), f"{len(sets)} sets"
    pi = q @ row.members()
    error = (tally[code].double() @ row.members() / draws - pi).abs()
    assert (error <= 5 * (pi * (1 - pi) / draws).sqrt() + 1e-15).all()


def test_inclusion_of_long_rows() -> None:
    n, k, blocks, per_block = 126, 19, 50, 2_000
    scores = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = capped(scores, k)
    odds = odds_for_inclusion(wanted, wanted > 0, torch.tensor([k]), k)
    design = ConditionalPoisson(odds.expand(per_block, n), torch.full((per_block,), k), k)
    hits = torch.zeros(n)
    for block in range(blocks):
        chosen = members(*design.sample(random_bits(per_block, n, seed=block)), n)
        assert chosen.sum(1).eq(k).all()
        hits += chosen.sum(0)
    draws = blocks * per_block
    standard_error = (wanted[0] * (1 - wanted[0]) / draws).sqrt()
    assert ((hits / draws - wanted[0]).abs() <= 5 * standard_error).all()


def test_layout_does_not_matter() -> None:
    """Bit for bit: rows in another order, in pieces, in a wider table, among more positions."""
    odds, counts, bits = mixed_rows()
    maskable = odds > 0

    def everything(odds, counts, bits, maskable, width=7):
        design = ConditionalPoisson(odds, counts, width)
        inclusion = design.inclusion()
        return (
            members(*design.sample(bits), bits.shape[1]),
            inclusion,
            odds_for_inclusion(inclusion, maskable, counts, width),
        )

    full = everything(odds, counts, bits, maskable)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = everything(odds[order], counts[order], bits[order], maskable[order])
    pieces = [everything(*parts) for parts in zip(*(t.split(7) for t in (odds, counts, bits, maskable)), strict=True)]
    single = [everything(*parts) for parts in zip(*(t.split(1) for t in (odds, counts, bits, maskable)), strict=True)]
    wider = everything(odds, counts, bits, maskable, width=9)
    longer = everything(*(torch.nn.functional.pad(t, (0, 5)) for t in (odds,)), counts,
                        torch.nn.functional.pad(bits, (0, 5)), torch.nn.functional.pad(maskable, (0, 5)))  # fmt: skip
    for part, expected in enumerate(full):
        assert torch.equal(shuffled[part], expected[order])
        assert torch.equal(torch.cat([p[part] for p in pieces]), expected)
        assert torch.equal(torch.cat([p[part] for p in single]), expected)
        assert torch.equal(wider[part], expected)
        assert torch.equal(longer[part][:, :40], expected)


def test_rows_of_every_kind_in_one_batch() -> None:
    odds, counts, bits = mixed_rows()
    design = ConditionalPoisson(odds, counts, 7)
    positions, used = design.sample(bits)
    assert (positions.sort(1).values.diff(dim=1) > 0).all(), "unused slots repeat no position"
    chosen = members(positions, used, 40)
    assert torch.equal(chosen.sum(1), counts)
    assert not (chosen & (odds == 0)).any()
    assert torch.equal(chosen[1], odds[1] > 0), "k = n takes all"
    assert torch.isfinite(design.log_probability(positions, used)).all()
    assert design.log_probability(positions, used)[[0, 1]].abs().max() < 1e-12, "n = 0, k = n: a certain set"
    inclusion = design.inclusion()
    torch.testing.assert_close(inclusion.sum(1), counts.double(), rtol=1e-13, atol=0)
    assert ((inclusion > 0) == (odds > 0)).all()
    assert (inclusion <= 1).all()


@pytest.mark.parametrize("bit", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_bits_still_draw_k(bit: int) -> None:
    odds, counts, bits = mixed_rows()
    positions, used = ConditionalPoisson(odds, counts, 7).sample(torch.full_like(bits, bit))
    chosen = members(positions, used, 40)
    assert torch.equal(chosen.sum(1), counts)
    assert not (chosen & (odds == 0)).any()


@pytest.mark.parametrize(("n", "k"), [(512, 77), (512, 80), (512, 1), (80, 80), (512, 256)])
def test_longest_rows_against_integers(n: int, k: int) -> None:
    """Odds 1: e_k is a binomial coefficient; two kinds of odds: a sum of products of two."""
    half, odd = n // 2, 1e-9
    odds = torch.ones(2, n, dtype=torch.float64)
    odds[1, :half] = odd
    design = ConditionalPoisson(odds, torch.full((2,), k), k)
    two_kinds = sum(Fraction(odd) ** j * math.comb(half, j) * math.comb(n - half, k - j) for j in range(k + 1))
    expected = [math.log(math.comb(n, k)), math.log(two_kinds.numerator) - math.log(two_kinds.denominator)]
    torch.testing.assert_close(
        design.log_normaliser(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-11
    )
    torch.testing.assert_close(design.inclusion()[0], torch.full((n,), k / n, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "k"), [(4096, 614), (4096, 1), (3000, 1500), (513, 513)])
def test_rows_in_which_a_probability_would_underflow(n: int, k: int) -> None:
    """Equal odds: 614 of 4,096 tosses of a coin that is fair are heads with probability below 2^−1500. A row with few
    candidates beside it changes nothing, and masks are spread over the row."""
    odds = torch.ones(2, n, dtype=torch.float64)
    odds[1, k:] = 1e-12
    design = ConditionalPoisson(odds, torch.full((2,), k), k)
    inclusion = design.inclusion()
    torch.testing.assert_close(inclusion[0], torch.full((n,), k / n, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(inclusion.sum(1), torch.full((2,), float(k), dtype=torch.float64))
    log_sets = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    assert float(design.log_normaliser()[0]) == pytest.approx(log_sets, rel=1e-9, abs=1e-9)
    bits = torch.randint(-(2**63), 2**63 - 1, (2, n), generator=torch.Generator().manual_seed(0))
    positions, used = design.sample(bits)
    assert used.all()
    assert float(design.log_probability(positions, used)[0]) == pytest.approx(-log_sets, rel=1e-9, abs=1e-9)
    assert abs(float(positions[0].double().mean()) / n - 0.5) < 5 * (1 / (12 * k)) ** 0.5
    assert positions[1].tolist() == list(range(k))
    alone = ConditionalPoisson(odds[:1], torch.tensor([k]), k)
    assert torch.equal(alone.inclusion()[0], inclusion[0])


@pytest.mark.parametrize(
    ("n", "k", "spread", "tolerance"),
    [(2, 1, 1.0, 1e-15), (6, 5, 2.0, 2e-6), (10, 3, 3.0, 2e-6), (126, 19, 1.0, 1e-12), (126, 19, 5.0, 3e-8)],
)
def test_odds_for_wanted_inclusion(n: int, k: int, spread: float, tolerance: float) -> None:
    scores = spread * torch.randn(32, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    wanted = torch.nn.functional.pad(capped(scores, k), (1, 1))
    maskable, counts = wanted > 0, torch.full((32,), k)
    found = ConditionalPoisson(odds_for_inclusion(wanted, maskable, counts, k), counts, k).inclusion()
    assert (found - wanted).abs().max() < tolerance
    first_guess = ConditionalPoisson(odds_of(wanted, maskable), counts, k).inclusion()
    assert (first_guess - wanted).abs().max() > tolerance, "the iteration is needed"


@settings(max_examples=60, deadline=None)
@given(rows(-2, 2))
def test_odds_are_recovered_up_to_their_scale(row: Row) -> None:
    if row.k == len(row.maskable):
        return  # any odds do
    inclusion = repeated(row, 1).inclusion()
    odds = odds_for_inclusion(inclusion, inclusion > 0, torch.tensor([row.k]), 5, iterations=60)[0, row.maskable]
    expected = torch.tensor(row.odds, dtype=torch.float64)[row.maskable]
    torch.testing.assert_close(odds / odds[0], expected / expected[0], rtol=1e-4, atol=0)


def test_certain_and_impossible_positions() -> None:
    wanted = torch.tensor([[1.0, 0.5, 0.5, 0.0, 1.0]], dtype=torch.float64)
    counts = torch.tensor([3])
    odds = odds_for_inclusion(wanted, torch.ones(1, 5, dtype=torch.bool), counts, 3)
    torch.testing.assert_close(ConditionalPoisson(odds, counts, 3).inclusion(), wanted, rtol=0, atol=1e-12)
    assert torch.isfinite(odds).all()


def pareto_inclusion(wanted: np.ndarray, k: int, nodes: int = 200) -> np.ndarray:
    """Exact π of Pareto sampling: i is kept if at most k − 1 others have a smaller key (Aires 1999); by quadrature.

    With o = π/(1 − π), key ≤ t has probability o t/(1 + o t); s is that of position i itself.
    """
    x, quadrature_weights = np.polynomial.legendre.leggauss(nodes)
    s = (x + 1) / 2
    odds = wanted / (1 - wanted)
    found = np.empty_like(wanted)
    for i, own in enumerate(odds):
        t = s / (1 - s) / own
        smaller = np.zeros((k, nodes))  # probabilities of 0, …, k − 1 smaller keys
        smaller[0] = 1
        for o in np.delete(odds, i):
            p = o * t / (1 + o * t)
            shifted = np.vstack([np.zeros(nodes), smaller[:-1]])
            smaller = smaller * (1 - p) + shifted * p
        found[i] = (smaller.sum(0) * quadrature_weights).sum() / 2
    return found


@pytest.mark.parametrize(("n", "k", "bound"), [(6, 2, 0.03), (10, 3, 0.02), (64, 10, 2e-3), (126, 19, 1e-3)])
def test_error_of_pareto_sampling(n: int, k: int, bound: float) -> None:
    """Error of its inclusion probabilities against the requested ones; conditional Poisson sampling is exact."""
    scores = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    wanted = capped(scores, k).clamp(max=0.99)
    wanted *= k / wanted.sum()
    exact = torch.from_numpy(pareto_inclusion(wanted[0].numpy(), k))
    assert abs(exact.sum() - k) < 1e-6, "quadrature"
    error = (exact - wanted[0]).abs()
    print(f"n={n} k={k}: Pareto error {error.max():.1e} absolute, {(error / wanted[0]).max():.1e} relative")
    assert error.max() < bound
    blocks, per_block = 10, 20_000 if n <= 10 else 2_000
    hits = torch.zeros(n)
    everywhere, counts = torch.ones(per_block, n, dtype=torch.bool), torch.full((per_block,), k)
    for block in range(blocks):
        bits = random_bits(per_block, n, seed=block)
        hits += members(*pareto_sample(wanted.expand(per_block, n), bits, everywhere, counts, k), n).sum(0)
    draws = blocks * per_block
    assert ((hits / draws - exact).abs() <= 5 * (exact * (1 - exact) / draws).sqrt()).all()
