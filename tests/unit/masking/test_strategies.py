"""Strategies against definitions that loop over positions, enumeration and invariants."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskvr_ds import hashing
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.batch import MaskedBatch, TokenBatch
from maskvr_ds.data.loader import row_digests
from maskvr_ds.masking import strategies
from maskvr_ds.masking.estimators import ESTIMATORS
from maskvr_ds.masking.masker import Corruption, Masker, mask_digest
from maskvr_ds.masking.strategies import STRATEGIES, Parameters, prediction_counts, span_thresholds

VOCABULARY, MASK, SPECIAL = 200, 4, (0, 1, 2, 3, 4)
STARTS = torch.arange(VOCABULARY) % 5 < 3
SCORES = (torch.arange(VOCABULARY) + 1.0).double() ** -0.5
PARAMETERS = Parameters(token_scores=SCORES, floor=0.3, word_starts=STARTS, span_thresholds=span_thresholds(0.2, 10))
# mapnet needs a network: test_proposer.py.
ALONE = [name for name in STRATEGIES if name != "mapnet"]
WEIGHTLESS = sorted(set(ALONE) - {"frequency"})
# Samplers and estimators other than the defaults: strategy, sampler, estimator.
EXACT = [f"frequency conditional_poisson {name}" for name in ESTIMATORS]
DRAWN = [*ALONE, *EXACT, "frequency pareto hajek"]


def tokens(rows: int, length: int = 32, seed: int = 0) -> TokenBatch:
    """Rows with one to many special tokens, some short and padded, of several epochs."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, VOCABULARY, (rows, length)).astype(np.uint16)
    ids[random.random((rows, length)) < random.choice([0.0, 0.1], (rows, 1))] = 3
    ids[:, 0], ids[:, -1] = 2, 3
    for row in range(0, rows, 5):
        ids[row, random.integers(1, length) :] = 0
    epochs, samples = random.integers(0, 40, rows), random.permutation(10_000)[:rows].astype(np.int64)
    columns = {"input_ids": ids, "sample_ids": samples, "epochs": epochs}
    columns["row_digests"] = row_digests(ids, samples, epochs, 0)
    return TokenBatch(**{name: torch.from_numpy(column) for name, column in columns.items()})


def masker(strategy: str, length: int = 32, *, rate: float = 0.15, seed: int = 5, **options: object) -> Masker:
    """strategy: its name, optionally followed by those of sampler and estimator."""
    strategy, *how = strategy.split()
    return Masker(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=SPECIAL,
        sequence_length=length,
        seed=seed,
        strategy=strategy,
        parameters=replace(PARAMETERS, **dict(zip(("sampler", "estimator"), how, strict=bool(how)))),
        rate=rate,
        **options,  # type: ignore[arg-type]
    )


def rows_of(batch: TokenBatch, index: torch.Tensor) -> TokenBatch:
    return batch.map(lambda column: column[index])


def chosen(masked: MaskedBatch) -> list[set[int]]:
    return [set(p[w != 0].tolist()) for p, w in zip(masked.positions, masked.weights, strict=True)]


def maskable(batch: TokenBatch) -> list[list[int]]:
    return [[i for i, t in enumerate(row) if t not in SPECIAL] for row in batch.input_ids.tolist()]


def assert_equal(one: MaskedBatch, other: MaskedBatch) -> None:
    for name, column in vars(one).items():
        if column is not None:
            assert torch.equal(column, getattr(other, name)), name


@pytest.mark.parametrize("strategy", DRAWN)
def test_layout_does_not_matter(strategy: str) -> None:
    batch = tokens(97, 64)
    draw = masker(strategy, 64)
    full = draw(batch)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    for size in (1, 7, 50, 97):
        parts = [draw(piece) for piece in rows_of(batch, order).split(size)]
        for name in ("input_ids", "positions", "labels", "weights"):
            found, expected = torch.cat([getattr(p, name) for p in parts]), getattr(full, name)[order]
            if name == "weights" and strategy.endswith("whole_mask"):
                # Logarithms are rounded by layout, in float64; the masks are not.
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            else:
                assert torch.equal(found, expected)
    for world_size in (2, 3):
        ranks = [rows_of(batch, torch.arange(rank, 97, world_size)) for rank in range(world_size)]
        digests = [mask_digest(rank, masker(strategy, 64)(rank)) for rank in ranks]
        assert torch.stack(digests).sum() == mask_digest(batch, full)


@pytest.mark.parametrize("strategy", DRAWN)
@pytest.mark.parametrize("rate", [0.15, 0.4, 0.99])
def test_counts_special_tokens_and_labels(strategy: str, rate: float) -> None:
    batch = tokens(300)
    batch.input_ids[7] = 3
    draw = masker(strategy, rate=rate)
    masked = draw(batch)
    ids, used = batch.input_ids.long(), masked.weights != 0
    assert torch.equal(masked.labels, ids.gather(1, masked.positions))
    assert not torch.isin(masked.labels[used], torch.tensor(SPECIAL)).any()
    assert torch.isfinite(masked.weights).all()
    asked = prediction_counts(torch.tensor([len(m) for m in maskable(batch)]), rate)
    found = torch.tensor([len(c) for c in chosen(masked)])
    assert torch.equal(found, used.sum(1)), "all different"
    assert (found <= asked).all()
    assert asked.max() <= draw.maximum_predictions
    assert found[7] == 0
    if strategy.split()[0] in ("uniform", "frequency"):
        assert torch.equal(found, asked)
    if strategy == "fully_explored":
        assert (found[asked > 0] > 0).all()
    elif strategy == "span" and rate < 0.5:
        assert found.sum() > 0.97 * asked.sum()
    if strategy in WEIGHTLESS:
        assert torch.allclose(masked.weights[used], torch.ones(()))
    changed = masked.input_ids != ids
    allowed = torch.zeros_like(changed)
    for row, positions in enumerate(chosen(masked)):
        allowed[row, list(positions)] = True
    assert not (changed & ~allowed).any(), "only positions to predict are corrupted"


@pytest.mark.parametrize("strategy", ALONE)
def test_all_show_mask(strategy: str) -> None:
    batch = tokens(100)
    masked = masker(strategy, corruption=Corruption(1.0, 0.0))(batch)
    used = masked.weights != 0
    assert (masked.input_ids.gather(1, masked.positions)[used] == MASK).all()


@pytest.mark.parametrize("strategy", ALONE)
def test_rows_without_special_tokens_at_the_ends(strategy: str) -> None:
    """Every position maskable: unused slots must not overwrite used ones."""
    batch = tokens(200, 12)
    batch.input_ids.copy_(torch.randint(5, VOCABULARY, (200, 12), generator=torch.Generator().manual_seed(0)))
    masked = masker(strategy, 12, rate=0.7, corruption=Corruption(1.0, 0.0))(batch)
    for row, positions in enumerate(chosen(masked)):
        assert set(torch.nonzero(masked.input_ids[row] == MASK).flatten().tolist()) == positions


def test_rows_without_special_tokens_have_the_room_of_the_others() -> None:
    """Chunks of a joined text in transformers' Trainer: 10 of 64 positions would be predicted, and a row with [CLS] and
    [SEP] has room for 9. Rounds stay complete, words whole, and the weights are those of 9 predictions."""
    batch = tokens(300, 64)
    batch.input_ids.copy_(torch.randint(5, VOCABULARY, (300, 64), generator=torch.Generator().manual_seed(0)))
    seen = torch.zeros(300, 64, dtype=torch.int64)
    for epoch in range(-(-64 // 9)):
        masked = masker("fully_explored", 64)(replace(batch, epochs=torch.full((300,), epoch)))
        for row, positions in enumerate(chosen(masked)):
            seen[row, list(positions)] += 1
    assert (seen == 1).all()
    for row, positions in enumerate(chosen(masker("whole_word", 64)(batch))):
        words = plain_words(batch.input_ids[row].tolist())
        assert all(positions.isdisjoint(word) or positions.issuperset(word) for word in words)
    for strategy in ("frequency", *EXACT):
        draw = masker(strategy, 64)
        masked = draw(batch)
        assert ((masked.weights != 0).sum(1) == 9).all()
        if not strategy.endswith(("hajek", "whole_mask")):
            assert float(masked.weights.sum(1).mean()) == pytest.approx(9, rel=0.01)
        # A wider shape, as in a schedule of the rate, changes nothing.
        wider = masker(strategy, 64, final_rate=0.5)(batch)
        assert torch.equal(wider.weights.sort(dim=1).values[:, -9:], masked.weights.sort(dim=1).values)


def test_tables_of_conditional_poisson_sampling_are_for_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, whatever the number of rows; masks are the same, weights up to the last bits of logarithms."""
    batch, sizes = tokens(50), []

    class Recording(strategies.ConditionalPoisson):
        def __init__(self, odds: torch.Tensor, *others: object) -> None:
            sizes.append(len(odds))
            super().__init__(odds, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(strategies, "ConditionalPoisson", Recording)
    for strategy in EXACT:
        draw = masker(strategy)
        numbers = 33 * (draw.maximum_predictions + 2)
        found = []
        for most in (1 << 25, 7 * numbers, numbers - 1):
            monkeypatch.setattr(strategies, "_TABLE_NUMBERS", most)
            found.append(draw(batch))
        assert sizes == [50, *[7] * 7, 1, *[1] * 50]
        sizes.clear()
        for other in found[1:]:
            assert torch.equal(other.positions, found[0].positions)
            torch.testing.assert_close(other.weights, found[0].weights, rtol=1e-6, atol=0)
            assert int(mask_digest(batch, other)) == int(mask_digest(batch, found[0]))


# --- whole_word and span


def plain_words(ids: list[int]) -> list[list[int]]:
    words: list[list[int]] = []
    for i, token in enumerate(ids):
        if token in SPECIAL:
            continue
        if i == 0 or ids[i - 1] in SPECIAL or STARTS[token]:
            words.append([])
        words[-1].append(i)
    return words


def draws_of(batch: TokenBatch, row: int, counters: list[int], seed: int) -> list[int]:
    key = hashing.stream(hashing.fold(seed), (batch.epochs[row : row + 1] << 40) + batch.sample_ids[row : row + 1])
    return hashing.stream(key, torch.tensor(counters, dtype=torch.int64)).tolist()


def plain_choice(units: list[list[list[int]]], order: list[int], k: int, passes: int = 4) -> set[int]:
    """Words of the units in order, skipping those that do not fit. A word that fitted at the start of a pass and does
    not any longer starts the next pass; nothing is tried after the last pass."""
    taken: set[int] = set()
    at_start = k
    for word in (word for unit in order for word in units[unit]):
        room = k - len(taken)
        if len(word) <= room:
            taken.update(word)
        elif len(word) <= at_start:
            at_start, passes = room, passes - 1
            if passes == 0:
                break
    return taken


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.02, 0.9), st.integers(0, 200))
def test_whole_words_are_those_of_the_definition(seed: int, rate: float, data_seed: int) -> None:
    batch = tokens(8, 40, seed=data_seed)
    found = chosen(masker("whole_word", 40, rate=rate, seed=seed)(batch))
    for row, positions in enumerate(found):
        words = plain_words(batch.input_ids[row].tolist())
        k = int(prediction_counts(torch.tensor([sum(map(len, words))]), rate))
        bits = draws_of(batch, row, [w[0] for w in words], seed)
        order = sorted(range(len(words)), key=lambda w: (bits[w] >> 24, words[w][0]))
        assert positions == plain_choice([[w] for w in words], order, k)


def test_whole_word_meets_the_budget_nearly_always() -> None:
    batch = tokens(4000, 128)
    draw = masker("whole_word", 128)
    found = torch.tensor([len(c) for c in chosen(draw(batch))])
    asked = prediction_counts(torch.tensor([len(m) for m in maskable(batch)]), 0.15)
    assert ((asked - found)[asked >= 10] == 0).double().mean() > 0.99


def plain_spans(batch: TokenBatch, row: int, seed: int) -> list[list[list[int]]]:
    words = plain_words(batch.input_ids[row].tolist())
    bits = draws_of(batch, row, [(3 << 32) + w for w in range(len(words))], seed)
    total = 1 - 0.8**10
    spans: list[list[list[int]]] = []
    next_ = 0
    for w, word in enumerate(words):
        u = ((bits[w] >> 40) & 0xFF_FFFF) / 2**24
        begins = w == next_
        if begins:
            next_ = w + next(g for g in range(1, 11) if u < (1 - 0.8**g) / total or g == 10)
        if begins or words[w - 1][-1] != word[0] - 1:
            spans.append([])
        spans[-1].append(word)
    return spans


def test_spans_are_those_of_the_definition() -> None:
    batch = tokens(150, 60)
    found = chosen(masker("span", 60, rate=0.3, seed=9)(batch))
    lengths = []
    for row, positions in enumerate(found):
        spans = plain_spans(batch, row, 9)
        k = int(prediction_counts(torch.tensor([sum(len(w) for s in spans for w in s)]), 0.3))
        bits = draws_of(batch, row, [s[0][0] for s in spans], 9)
        order = sorted(range(len(spans)), key=lambda s: (bits[s] >> 24, spans[s][0][0]))
        assert positions == plain_choice(spans, order, k)
        lengths += [len(s) for s in spans]
    assert 3 < np.mean(lengths) < 3.8, "SpanBERT's mean is 3.8; ends of rows and documents cut some"


def test_span_lengths_have_the_given_distribution() -> None:
    thresholds = torch.cat([torch.tensor([0]), span_thresholds(0.2, 10), torch.tensor([2**24])])
    found = thresholds.diff().double() / 2**24
    expected = torch.tensor([0.2 * 0.8 ** (g - 1) for g in range(1, 11)], dtype=torch.float64)
    assert torch.allclose(found, expected / expected.sum(), atol=1e-7)
    assert abs((found * torch.arange(1, 11)).sum().item() - 3.8) < 0.01


def test_n_grams_of_albert_have_the_given_distribution() -> None:
    """6/11, 3/11 and 2/11 for up to three words (arXiv 1909.11942, section 4.1)."""
    thresholds = torch.cat([torch.tensor([0]), span_thresholds(None, 3), torch.tensor([2**24])])
    expected = torch.tensor([6, 3, 2], dtype=torch.float64) / 11
    assert torch.allclose(thresholds.diff().double() / 2**24, expected, atol=1e-7)
    section = MaskingConfig.model_validate({"strategy": "span", "span": {"lengths": "inverse", "max_length": 3}})
    assert section.identity()["span"]["lengths"] == "inverse"
    assert "lengths" not in MaskingConfig(strategy="span").identity()["span"], "as in checkpoints of earlier versions"
    with pytest.raises(ValueError, match=r"geometric_p 0\.5 belongs to lengths geometric; lengths is inverse"):
        MaskingConfig.model_validate({"strategy": "span", "span": {"lengths": "inverse", "geometric_p": 0.5}})


@pytest.mark.parametrize("strategy", ALONE)
def test_rows_of_8192_tokens(strategy: str) -> None:
    """Positions of a key need another bit: distinct ordinary positions from all of the row."""
    batch = tokens(4, 8192, seed=2)
    masked = masker(strategy, 8192)(batch)
    for positions, weights, places in zip(masked.positions, masked.weights, maskable(batch), strict=True):
        found = positions[weights != 0].tolist()
        assert len(set(found)) == len(found)
        assert set(found) <= set(places)
        assert 0.14 * len(places) - 1 < len(found) <= 0.15 * len(places) + 1
        beyond = sum(place >= 4096 for place in places) / len(places)
        assert sum(place >= 4096 for place in found) / len(found) == pytest.approx(beyond, abs=0.1)
    with pytest.raises(ValueError, match="sequence length 8193 exceeds 8192"):
        masker(strategy, 8193)


# --- frequency


@pytest.mark.parametrize("how", ["frequency", *EXACT, "frequency pareto hajek"])
def test_weights_are_those_of_the_estimator(how: str) -> None:
    """Over 40,000 epochs of one row the mean of Σ w ℓ / k equals the estimand within 5 standard errors.

    ℓ_i(M) = a_i for Horvitz–Thompson, with the mean of a; a_i (1 + [i + 1 ∈ M]) for whole_mask, with the mean under
    uniform masks. Weights ≤ 1/λ; for Hájek, Σ w = k.
    """
    batch = tokens(2, 40, seed=3)
    draws = 40_000
    many = TokenBatch(batch.input_ids[1:].expand(draws, 40), batch.sample_ids[1:].expand(draws), torch.arange(draws))
    masked = masker(how, 40)(many)
    used = masked.weights != 0
    loss = torch.rand(41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (places,) = maskable(rows_of(batch, torch.tensor([1])))
    n, k = len(places), int(used[0].sum())
    expected, losses = loss[places].mean(), loss[masked.positions]
    assert masked.sampling_weights is not None
    assert masked.sampling_weights.max() <= 1.1 / 0.3, "1/λ, and little more where π is not the one asked for"
    if how.endswith("whole_mask"):
        member = torch.zeros(draws, 41).scatter_(1, torch.where(used, masked.positions, 40), 1.0)
        member[:, 40] = 0
        losses = losses * (1 + member.gather(1, masked.positions + 1))
        expected = torch.stack([loss[i] * (1 + (i + 1 in places) * (k - 1) / (n - 1)) for i in places]).mean()
        assert (masked.weights == masked.weights[:, :1])[used].all()
    else:
        assert masked.weights.max() <= 1.1 / 0.3
    estimates = (masked.weights * losses).sum(1) / k
    error, standard_error = abs(estimates.mean() - expected), estimates.std() / draws**0.5
    if how.endswith("hajek"):
        torch.testing.assert_close(masked.weights.sum(1), torch.full((draws,), float(k)))
        ratios = (masked.sampling_weights * losses).sum(1) / masked.sampling_weights.sum(1)
        torch.testing.assert_close(estimates, ratios, rtol=1e-6, atol=0)
    else:
        assert error < 5 * standard_error, how
    counts = torch.bincount(masked.positions[masked.weights != 0], minlength=40).double() / draws
    ids = batch.input_ids[1].long()
    rare, common = max(places, key=lambda i: ids[i]), min(places, key=lambda i: ids[i])
    assert counts[common] > 1.2 * counts[rare], "scores fall with the id here"


# --- rate


def test_a_lower_rate_predicts_fewer_of_the_same_positions() -> None:
    batch = tokens(50, 64)
    draw = masker("uniform", 64, rate=0.3, final_rate=0.15)
    before = draw(batch)
    draw.set_rate(0.15)
    after = draw(batch)
    assert (before.positions.shape, after.positions.shape) == ((50, 19), (50, 9))
    assert all(a <= b for a, b in zip(chosen(after), chosen(before), strict=True)), "the same ranking, fewer of it"
    for row, positions in enumerate(chosen(after)):
        assert len(positions) == prediction_counts(torch.tensor([len(maskable(batch)[row])]), 0.15)
