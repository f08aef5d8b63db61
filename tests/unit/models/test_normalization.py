"""Normalisations in place of LayerNorm: against torch's own modules, with padding; the split of batch normalisation."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.models.normalization import MOMENTUM, BatchNorm, Places, replace_layer_norms, statistics
from tests.support.experiments import load_experiment

B, L, D = 4, 6, 8


def norm_of(places: Places, **more: object) -> BatchNorm:
    norm = nn.LayerNorm(D)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return BatchNorm(norm, places, **{"population": False, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("padded", [False, True])
def test_batch_normalisation_is_that_of_torch_on_the_positions_that_are_not_padding(padded: bool) -> None:
    torch.manual_seed(0)
    places = Places()
    places.used = torch.rand(B, L) < 0.6 if padded else None
    ours, theirs = norm_of(places), nn.BatchNorm1d(D, momentum=MOMENTUM)
    theirs.load_state_dict({"weight": ours.weight.detach(), "bias": ours.bias.detach()}, strict=False)
    used = torch.ones(B, L, dtype=torch.bool) if places.used is None else places.used
    gradients = []
    for module in (ours, theirs):
        x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = module(x)[used] if module is ours else module(x[used])
        (y * torch.linspace(-1, 2, D)).pow(2).sum().backward()
        gradients.append((y.detach(), x.grad, module.weight.grad, module.bias.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # The first batch is all that is known of the population.
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))[used]
    torch.testing.assert_close(ours.running_mean, x.mean(0))
    torch.testing.assert_close(ours.running_var, x.var(0, correction=0))


def test_running_statistics_are_means_and_then_exponential_ones() -> None:
    torch.manual_seed(0)
    norm = norm_of(Places())
    batches = [torch.randn(B, L, D) for _ in range(30)]
    expected = torch.zeros(D)
    for number, x in enumerate(batches, 1):
        norm(x)
        share = max(1 / number, MOMENTUM)
        expected = (1 - share) * expected + share * x.mean((0, 1))
    torch.testing.assert_close(norm.running_mean, expected)
    norm.eval()
    before = norm.running_mean.clone()
    y = norm(batches[0])
    assert torch.equal(before, norm.running_mean)
    plain = (batches[0] - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(y, plain)


def test_population_statistics_have_no_gradient_and_decay_has_that_of_its_penalty() -> None:
    torch.manual_seed(0)
    norm = norm_of(Places(), population=True, decay=0.03)
    x = torch.randn(B, L, D, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    gain = norm.weight.detach()
    constant = (norm.running_var + norm.eps).rsqrt()
    torch.testing.assert_close(x.grad, (gain * constant).expand_as(x))
    penalty = 2 * 0.03 * gain
    torch.testing.assert_close(norm.weight.grad, ((x - norm.running_mean) * constant).sum((0, 1)).detach() + penalty)


@pytest.mark.parametrize("kind", ["rms", "batch", "population"])
def test_the_encoder_is_changed_and_the_head_is_not(kind: str) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config)
    names = {name for name, _ in model.named_parameters()}
    replace_layer_norms(model, kind)  # type: ignore[arg-type]
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("LayerNorm") and n.startswith("bert.")}
    assert kinds == {nn.RMSNorm if kind == "rms" else BatchNorm}
    assert isinstance(model.cls.predictions.transform.LayerNorm, nn.LayerNorm)
    after = {name for name, _ in model.named_parameters()}
    assert after == (
        names - {n for n in names if n.endswith("LayerNorm.bias") and "cls" not in n} if kind == "rms" else names
    )
    assert len(statistics(model)) == (0 if kind == "rms" else 5 * 3)


def test_padding_does_not_reach_the_other_positions() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config).train()
    replace_layer_norms(model, "batch")
    ids, mask = torch.randint(5, 30, (3, 8)), torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = mask[2, 2:] = False
    other = ids.masked_fill(~mask, 7)
    a, b = (model(input_ids=i, attention_mask=mask).logits[mask] for i in (ids, other))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_encoder_without_layer_norm() -> None:
    model = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    replace_layer_norms(model, "rms")
    with pytest.raises(ConfigError, match="the encoder of bert has no LayerNorm to replace"):
        replace_layer_norms(model, "batch")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"normalization": "batch", "activation_checkpointing": True}, "would compute the statistics of a batch twice"),
        ({"normalization": "batch", "gamma_decay": 0.1}, "belongs to normalization population, and it is batch"),
        ({"normalization": "group"}, "Input should be"),
    ],
)
def test_settings_that_contradict(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig.model_validate(values)


def test_identity_of_runs_with_layer_norm_is_that_of_earlier_versions() -> None:
    assert "normalization" not in ModelConfig().identity()
    assert ModelConfig(normalization="rms").identity()["normalization"] == "rms"


@pytest.mark.parametrize("unit", ["linear", "relu"])
def test_what_remains_of_batch_normalisation_falls_with_the_batch(unit: str) -> None:
    """Luo et al. 2019, equation 3: without gamma decay, the difference from batch normalisation is of order 1/M; with
    it, of the next order."""
    script = load_experiment("batch_norm_decomposition")
    sizes = np.array([8, 16, 32, 64, 128, 256, 512])
    alone, remaining = script.differences(unit, sizes)
    assert script.slope(sizes, alone) == pytest.approx(-1, abs=0.05)
    assert script.slope(sizes, remaining) < -1.8
    assert (abs(remaining) < 0.25 * abs(alone)).all()


@pytest.mark.parametrize("unit", ["linear", "relu"])
def test_the_quadrature_is_the_mean_over_batches_of_the_module(unit: str) -> None:
    script = load_experiment("batch_norm_decomposition")
    exact, _ = script.differences(unit, np.array([8]))
    mean, error = script.sampled(unit, 8, batches=20_000)
    assert abs(mean - exact[0]) < 4 * error
    assert error < 0.05 * exact[0]
