"""MAPNet in one process: learning a known target, its masks, its state."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from maskvr_ds.config import ConfigError, MapNetConfig, MaskingConfig, load_config
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.masking import proposer as module
from maskvr_ds.masking.gradient_norms import GradientNorms
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer, bits_hash
from maskvr_ds.masking.strategies import Parameters, Proposal

V, L, B, RATE = 40, 24, 32, 0.3
SPECIAL = (0, 1, 2, 3, 4)


def proposer(**section: object) -> Proposer:
    config = MapNetConfig.model_validate({"hidden": 32, "layers": 1, **section})
    return Proposer(config, vocab_size=V, max_length=L, seed=1, device=torch.device("cpu"))


def masker(proposal: Proposal) -> Masker:
    return Masker(
        vocab_size=V,
        mask_id=4,
        special_ids=SPECIAL,
        sequence_length=L,
        seed=2,
        strategy="mapnet",
        rate=RATE,
        parameters=Parameters(proposal=proposal),
    )


def tokens(seed: int) -> TokenBatch:
    random = np.random.default_rng(seed)
    # Frequencies as in texts: 1/rank.
    share = 1 / np.arange(1, V - 4)
    ids = random.choice(np.arange(5, V), size=(B, L), p=share / share.sum()).astype(np.uint16)
    ids[:, 0], ids[:, -1] = 2, 3
    rows = torch.arange(B) + 1000 * seed
    return TokenBatch(torch.from_numpy(ids), rows, torch.zeros(B, dtype=torch.int64))


def root_mean_square(batch: TokenBatch) -> torch.Tensor:
    """The target: a function of the token and of its left neighbour's parity."""
    ids = batch.input_ids.long()
    left = ids.roll(1, dims=1) % 2
    return torch.exp(0.5 * torch.sin(ids * 1.7) + 0.9 * left)


def give(norms: GradientNorms, s: torch.Tensor, weights: torch.Tensor) -> None:
    """Have `norms` read s [B, K] in a backward pass whose factors are arbitrary."""
    hidden = torch.zeros(*s.shape, 3, requires_grad=True)
    inner = hidden * 1
    losses = (inner * s[..., None] * torch.tensor([0.6, 0.0, 0.8])).sum(-1)
    norms.watch(inner, losses)
    (losses * weights * 0.013).sum().backward()


def train(of: Proposer, steps: int, first: int = 0) -> list[dict[str, float]]:
    draw, lines = masker(of.propose), []
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        batch = tokens(step)
        masked = draw(batch)
        noise = torch.exp(0.5 * torch.randn(masked.positions.shape, generator=random))
        give(of.norms, root_mean_square(batch).gather(1, masked.positions) * noise, masked.weights)
        of.observe(batch, draw.maskable(batch), masked)
        lines.append(of.step().values())
    return lines


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = [x.argsort(stable=True).argsort(stable=True).double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize(("objective", "least"), [("variance", 0.5), ("regression", 0.85)])
def test_it_learns_a_target_that_frequency_cannot_represent(objective: str, least: float) -> None:
    of = proposer(objective=objective, lr=3e-3, floor=0.1)
    lines = train(of, 600)
    batch = tokens(10_000)
    inside = masker(of.propose).maskable(batch)
    with torch.no_grad():
        scores = of.net(batch.input_ids.long())[inside]
    target = root_mean_square(batch)[inside]
    frequency = -batch.input_ids.long()[inside].double()
    learnt, known = rank_correlation(scores, target), abs(rank_correlation(frequency, target))
    assert learnt > least > known + 0.3, (learnt, known)
    ratios = [line["variance_ratio"] for line in lines]
    assert ratios[0] == pytest.approx(1.0)
    assert np.mean(ratios[-50:]) < 0.95
    assert np.mean([line["mapnet_loss"] for line in lines[-50:]]) < np.mean([x["mapnet_loss"] for x in lines[:20]])


def test_ratio_does_not_depend_on_who_draws() -> None:
    """With the gate open and closed, the same network's second moment relative to uniform is estimated."""
    taught = proposer(lr=5e-3)
    train(taught, 300)
    means = []
    for gate in ("always", "never"):
        of = proposer(lr=1e-12, gate=gate)
        of.load(taught.state())
        means.append(np.mean([line["variance_ratio"] for line in train(of, 60, first=500)]))
    assert means[0] == pytest.approx(means[1], abs=0.02)
    assert means[0] < 0.95


@settings(max_examples=25)
@example(0.95, 0.04, 1.0, 0.6)  # 1.009: the mask part alone would be 0.988
@given(st.floats(0.5, 1.5), st.floats(0, 0.5), st.floats(0.1, 10), st.floats(0, 1))
def test_gate_opens_if_the_variance_with_the_cost_is_below_one(
    ratio: float, cost: float, scale: float, share: float
) -> None:
    """(V_d + r V_m) (1 + c) < V_d + V_m: at equal time the batch is smaller by 1 + c, and all variance larger."""
    data, mask = 1 - share, share
    assume(abs((data + ratio * mask) * (1 + cost) - 1) > 1e-9)
    of = proposer(gate="auto", cost=cost, floor=0.2, mask_share=share)
    # Moving averages of Σ w u s², Σ w s², the seconds of MAPNet and of all.
    averages = torch.tensor([ratio * scale, scale, cost, 1 + cost], dtype=torch.float64)
    of.load({**of.state(), "averages": averages})
    batch = tokens(0)
    inside = masker(of.propose).maskable(batch)
    share = torch.full((B, 1), 7 / (L - 2), dtype=torch.float64)
    is_open = (data + ratio * mask) * (1 + cost) < data + mask
    inclusion = of.propose(batch, inside, share)
    is_uniform = torch.equal(inclusion, share.expand_as(inclusion))
    assert is_uniform != is_open
    [line] = train(of, 1)
    assert line["proposal_used"] == is_open


def test_resume_from_state_is_bit_identical() -> None:
    full, first = proposer(), proposer()
    expected = train(full, 10)
    train(first, 6)
    second = proposer()
    second.load(first.state())
    assert train(second, 4, first=6) == expected[6:]
    assert bits_hash(second.parameters.detach()) == bits_hash(full.parameters.detach())
    with pytest.raises(ValueError, match=r"mapnet.safetensors does not match the network .*expected"):
        proposer(layers=2, hidden=64).load(first.state())


@pytest.mark.parametrize("gate", ["always", "auto", "never"])
def test_scores_are_computed_once(monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    """Those of `propose` serve `observe`, for as many micro-batches as are kept: all figures equal to the bit."""
    lines, passes, hashes = [], [], []
    for kept in (0, B * L, 10**6):
        monkeypatch.setattr(module, "_KEPT_POSITIONS", kept)
        of, calls = proposer(gate=gate, cost=0.01), [0]
        forward = of.net.forward

        def counted(*args: object, calls: list[int] = calls, forward: object = forward) -> torch.Tensor:
            calls[0] += 1
            return forward(*args)  # type: ignore[operator]

        monkeypatch.setattr(of.net, "forward", counted)
        draw, found = masker(of.propose), []
        for step in range(4):
            batches = [tokens(2 * step), tokens(2 * step + 1)]
            masks = [draw(batch) for batch in batches]
            for batch, masked in zip(batches, masks, strict=True):
                give(of.norms, root_mean_square(batch).gather(1, masked.positions), masked.weights)
                of.observe(batch, draw.maskable(batch), masked)
            found.append(of.step().values())
        lines.append(found)
        passes.append(calls[0])
        hashes.append(int(bits_hash(of.parameters.detach())))
    assert lines[0] == lines[1] == lines[2]
    assert len(set(hashes)) == 1
    assert passes == ([8, 8, 8] if gate == "never" else [16, 12, 8])


def test_a_part_of_several_micro_batches_is_learnt_as_each_of_them() -> None:
    """Figures and gradients of one step, whatever the number of passes over the rows of a part."""
    found = []
    for size in (B, B // 4):
        of = proposer(lr=3e-3)
        train(of, 3)
        batch = tokens(9)
        masked = masker(of.propose)(batch)
        s = root_mean_square(batch).gather(1, masked.positions)
        for part, weights in zip(s.split(size), masked.weights.split(size), strict=True):
            give(of.norms, part, weights)
        of.observe(batch, masker(of.propose).maskable(batch), masked)
        gradients = of._buffer.clone()
        found.append((gradients, torch.tensor(list(of.step().values().values()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gate", ["always", "never"])
def test_it_learns_at_every_nth_step_of_the_run(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between, parameters stay, nothing is reduced, and with gate never the network does not run; a resume between
    changes nothing."""
    calls: list[str] = []
    reduce = module.distributed.all_reduce_sum

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("reduce")
        return reduce(tensor)

    monkeypatch.setattr(module.distributed, "all_reduce_sum", counted)

    def steps(of: Proposer, first: int, last: int) -> list[int]:
        draw, hashes = masker(of.propose), []
        of.net.register_forward_hook(lambda *_: calls.append("forward"))
        for step in range(first, last):
            batch = tokens(step)
            calls.clear()
            masked, learns = draw(batch), of.learns
            watched = torch.zeros(*masked.positions.shape, 3, requires_grad=True)
            inner = watched * 1
            losses = (inner * root_mean_square(batch).gather(1, masked.positions)[..., None]).sum(-1)
            of._watch(inner, losses)
            (losses * masked.weights).sum().backward()
            of.observe(batch, draw.maskable(batch), masked)
            figures = of.step()
            assert learns == ((step + 1) % 3 == 0) == (figures is not None)
            assert calls.count("reduce") == learns
            assert calls.count("forward") == (1 if learns or gate == "always" else 0)
            hashes.append(int(bits_hash(of.parameters.detach())))
        return hashes

    full, first, second = (proposer(learn_every=3, gate=gate) for _ in range(3))
    expected = steps(full, 0, 9)
    assert expected[2] == expected[3] == expected[4] != expected[5]
    assert expected[1] != expected[2]
    steps(first, 0, 4)
    second.load(first.state())
    second.run_step = 4
    assert steps(second, 4, 9) == expected[4:]


def test_learning_at_every_step_is_no_new_setting_of_a_run() -> None:
    """Checkpoints of earlier versions lack it."""
    sections = [{"strategy": "mapnet", "mapnet": {"learn_every": n}} for n in (1, 2)]
    one, two = (MaskingConfig.model_validate(section).identity()["mapnet"] for section in sections)
    assert "learn_every" not in one
    assert two == {**one, "learn_every": 2}


@pytest.mark.parametrize("objective", ["variance", "regression"])
def test_figures_are_those_of_their_definitions(objective: str) -> None:
    """Of one step, by loops; rows differ in their number of predictions, and the losses have other weights (Hájek) than
    the sums that are unbiased for all positions (Horvitz–Thompson)."""
    of = proposer(lr=5e-3, objective=objective)
    train(of, 30)
    batch = tokens(77)
    batch.input_ids[::3, 10:] = 3
    draw = masker(of.propose)
    draw.parameters = Parameters(estimator="hajek", proposal=of.propose)
    masked, inside = draw(batch), draw.maskable(batch)
    assert masked.sampling_weights is not None
    share = ((masked.weights != 0).sum(1) / inside.sum(1)).double()[:, None]
    before, pi = of.state()["mean"], of.propose(batch, inside, share)
    scores = of.net(batch.input_ids.long()).double().detach()
    s = torch.rand(masked.positions.shape, generator=torch.Generator().manual_seed(4)) + 0.5
    give(of.norms, s, masked.weights)
    of.observe(batch, inside, masked)
    found = of.step().values()
    number = ws = wus2 = ws2 = loss = v1 = v2 = entropy = 0.0
    for row, places in enumerate(masked.positions.tolist()):
        for slot, place in enumerate(places):
            if v := float(masked.weights[row, slot]):
                w, norm = float(masked.sampling_weights[row, slot]), float(s[row, slot])
                u = float(share[row, 0] / pi[row, place])
                number, ws, ws2, wus2 = number + 1, ws + w * norm, ws2 + w * norm**2, wus2 + w * u * norm**2
                loss += w * (float(scores[row, place]) - np.log(norm / float(before))) ** 2
                v1, v2 = v1 + v, v2 + v * v
        p = pi[row][inside[row]] / (masked.weights[row] != 0).sum()
        entropy -= float((p * p.log()).sum()) / np.log(len(p)) / B
    mean = ws / number
    expected = {
        "gradient_norm_mean": mean,
        "mapnet_loss": wus2 / number / mean**2 if objective == "variance" else loss / number,
        "variance_ratio": wus2 / ws2,
        "effective_sample_size": v1**2 / v2 / number,
        "weight_max": float(masked.weights.max()),
        "proposal_entropy": entropy,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert float(of.state()["mean"]) == pytest.approx(mean, rel=1e-6)
    assert masked.weights.max() != masked.sampling_weights.max()


def test_overflowed_norms_are_skipped() -> None:
    of, draw = proposer(), None
    draw, batch = masker(of.propose), tokens(0)
    masked = draw(batch)
    s = torch.ones(masked.positions.shape)
    s[3] = torch.inf
    give(of.norms, s, masked.weights)
    of.observe(batch, draw.maskable(batch), masked)
    line = of.step().values()
    assert (line["gradient_norm_mean"], line["variance_ratio"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert bool(of.parameters.isfinite().all())


def test_weights_are_those_of_the_proposal_and_bounded() -> None:
    of = proposer(lr=0.05, floor=0.5)
    train(of, 30)
    draw, batch = masker(of.propose), tokens(77)
    masked, again = draw(batch), draw(batch)
    assert torch.equal(masked.positions, again.positions)
    assert torch.equal(masked.weights, again.weights), "to propose changes nothing"
    used = masked.weights[masked.weights != 0]
    assert used.std() > 0.1
    assert used.max() <= 2
    inside = draw.maskable(batch)
    share = torch.full((B, 1), 7 / (L - 2), dtype=torch.float64)
    assert torch.allclose((of.propose(batch, inside, share) * inside).sum(1), torch.tensor(7.0, dtype=torch.float64))


def test_same_inclusion_gives_the_same_mask_whatever_the_layout() -> None:
    batch = tokens(5)
    random = np.random.default_rng(0)
    of_row = torch.from_numpy(random.dirichlet(np.ones(L - 2), B).clip(1e-3))

    def strategy(part: TokenBatch, inside: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        pi = torch.ones(inside.shape, dtype=torch.float64)
        pi[:, 1:-1] = (of_row[part.sample_ids % 1000] * 3).clamp(max=1)
        return pi

    draw = masker(strategy)
    full = draw(batch)
    parts = [draw(part) for part in batch.split(5)]
    assert torch.equal(full.positions, torch.cat([part.positions for part in parts]))


def test_hash_depends_on_every_bit_and_the_order() -> None:
    values = torch.randn(1000)
    changed = values.clone()
    changed.view(torch.int32)[500] ^= 1
    swapped = values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    assert len({int(bits_hash(x)) for x in (values, changed, swapped)}) == 3


@pytest.mark.parametrize("floor", ["0", "-0.1", "1.5", ".nan"])
def test_a_floor_outside_its_range_is_refused(floor: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"mapnet\.floor"):
        load_config(
            "demo_cpu",
            [
                "masking.strategy=mapnet",
                f"masking.mapnet.floor={floor}",
                f"data.path={tmp_path}",
                f"output_dir={tmp_path}",
            ],
        )
