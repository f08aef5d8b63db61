"""Signals in small models of all architectures, against hooks and functions written for the test."""

from typing import Any

import pytest
import torch

from maskvr_ds.analysis.health.initialisation import measure_initialisations, scale_by_depth, table
from maskvr_ds.analysis.health.probe import copy_for_analysis, layers_of, mean_loss, measure_signals
from maskvr_ds.config import ModelConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel, build
from tests.support.architectures import INSTALLED, section

B, L, K, V = 3, 16, 2, 96


def masked(seed: int = 0, padded: bool = False) -> MaskedBatch:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, V, (B, L), generator=random)
    mask = None
    if padded:
        ids[0, L // 2 :] = 0
        mask = ids != 0
    positions = torch.tensor([[1, 3], [2, 5], [4, 6]])
    return MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones(B, K), mask)


def model_of(architecture: str, **settings: Any) -> MaskedLanguageModel:
    torch.manual_seed(0)
    model = ModelConfig.model_validate(section(architecture, **settings))
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 4}
    return copy_for_analysis(build(transformers_config(model, vocab_size=V, pad_id=0, token_ids=special)))


@pytest.mark.parametrize("architecture", INSTALLED)
def test_every_architecture_has_its_signals(architecture: str) -> None:
    model = model_of(architecture)
    found = measure_signals(model, masked())
    for by_layer in (found.activation, found.gradient, found.jacobians, found.logit, found.entropy, found.dead):
        assert len(by_layer) == 3
    assert all(value > 0 for value in (*found.activation, *found.gradient, *found.logit))
    assert all(0 < entropy <= 1.0001 for heads in found.entropy for entropy in heads)
    assert all(len(heads) == 4 for heads in found.entropy)
    # Analysis leaves no hooks.
    assert not any(layer._forward_hooks for layer in layers_of(model.mlm))


def test_activations_and_gradients_are_those_of_hidden_states() -> None:
    model, batch = model_of("bert"), masked(padded=True)
    found = measure_signals(model, batch)
    with torch.enable_grad():
        output = model.mlm(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, labels=None
        )
        logits = output.logits.gather(1, batch.positions[..., None].expand(-1, -1, V))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        states = output.hidden_states[1:]
        gradients = torch.autograd.grad(loss, states)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.activation == pytest.approx([s.square().mean().sqrt().item() for s in states], rel=1e-5)
    assert found.gradient == pytest.approx([g.square().mean().sqrt().item() for g in gradients], rel=1e-4)


def test_attention_figures_are_those_of_the_weights() -> None:
    model, batch = model_of("bert"), masked(padded=True)
    found = measure_signals(model, batch, jacobians=False)
    output = model.mlm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True)
    assert batch.attention_mask is not None
    keys = batch.attention_mask.sum(1)
    for layer, weights in enumerate(output.attentions):
        entropy = torch.special.entr(weights).sum(-1).mean(-1)  # [B, H]
        expected = (entropy / keys.log()[:, None]).mean(0)
        assert found.entropy[layer] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_layer_that_multiplies_has_that_jacobian() -> None:
    model = model_of("bert")
    plain = measure_signals(model, masked()).jacobians
    for layer in layers_of(model.mlm):
        layer.register_forward_hook(lambda _, args, output: output * 3 if torch.is_tensor(output) else None)
    tripled = measure_signals(model, masked()).jacobians
    # The first layer has the same input.
    assert tripled[0].rms == pytest.approx(3 * plain[0].rms, rel=0.2)


def test_dead_units_are_counted() -> None:
    model = model_of("bert")
    dense = layers_of(model.mlm)[1].intermediate.dense  # type: ignore[union-attr]
    dense.weight.data[:12], dense.bias.data[:12] = 0.0, -20.0  # type: ignore[union-attr,index]
    found = measure_signals(model, masked(), jacobians=False)
    assert found.dead == pytest.approx([0, 12 / 48, 0])


def test_large_queries_collapse_the_entropy() -> None:
    model = model_of("bert")
    attention = layers_of(model.mlm)[2].attention.self  # type: ignore[union-attr]
    attention.query.weight.data.mul_(300)  # type: ignore[union-attr]
    attention.key.weight.data.mul_(300)  # type: ignore[union-attr]
    found = measure_signals(model, masked(), jacobians=False)
    assert found.logit[2] > 100 > max(found.logit[:2])
    assert max(found.entropy[2]) < 0.3 < min(found.entropy[0])


def test_initialisations_of_bert() -> None:
    torch.manual_seed(3)
    rows = measure_initialisations(model_of("bert").mlm.config, masked(), seed=1)
    names = [row.name for row in rows]
    assert "as configured" in names
    assert any(name.startswith("pre-LayerNorm") for name in names)
    by_name = {row.name: row.figures() for row in rows}
    # Larger weights, larger logits and losses further from uniform.
    assert by_name["initializer_range 0.1"]["logit"] > 5 * by_name["as configured"]["logit"]
    assert by_name["initializer_range 0.1"]["loss"] > by_name["as configured"]["loss"]
    assert table(rows, V).count("\n") == len(rows)
    assert {"RMSNorm", "batch normalisation"} < set(names)


def test_initialisations_take_the_normalisation_of_the_run() -> None:
    config, batch = model_of("bert").mlm.config, masked()
    plain, batched = (
        {row.name: row.figures() for row in measure_initialisations(config, batch, seed=1, normalization=kind)}
        for kind in ("layer", "batch")
    )
    assert batched["as configured"] == plain["batch normalisation"]
    assert batched["LayerNorm"] == plain["as configured"]
    assert batched["as configured"]["loss"] != plain["as configured"]["loss"]


def test_depth_scaling_divides_two_maps_of_each_layer() -> None:
    model = model_of("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale_by_depth(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 6
    assert all(name.endswith(("attention.output.dense.weight", "output.dense.weight")) for name in changed)
    name = min(changed)
    torch.testing.assert_close(before[name] / 6**0.5, model.get_parameter(name).detach())


def test_the_mean_loss_is_per_prediction() -> None:
    model, batch = model_of("bert"), masked()
    losses = model(batch.input_ids, batch.positions, labels=batch.labels)
    assert mean_loss(model, batch).item() == pytest.approx(losses.mean().item())
