"""Sketched gradients against gradients formed one sequence at a time by autograd."""

import pytest
import torch
from torch import nn

from maskvr_ds.analysis.gradient_variance.sketch import Sketcher, largest_prime, layer_of
from maskvr_ds.config import ModelConfig
from maskvr_ds.data.batch import MaskedBatch
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss
from tests.support.architectures import INSTALLED, section

SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "max_position_embeddings": 20}


# Architectures whose tables of relative positions serve all rows of a batch at once.
RELATIVE = {"deberta-v2": "a module's input does not depend on the row", "mpnet": "a table is looked up once per batch"}


def make_model(vocab_size: int = 70) -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = transformers_config(ModelConfig.model_validate(SMALL), vocab_size=vocab_size, pad_id=0)
    model = MaskedLanguageModel(config).eval()
    for p in model.parameters():  # biases and LayerNorms start at 0 and 1, which would hide errors
        p.data += 0.1 * torch.randn_like(p)
    return model


def make_batch(rows: int = 5, vocab_size: int = 70, length: int = 16) -> MaskedBatch:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (rows, length), generator=random)
    ids[-1, length // 2 :] = 0
    positions = torch.stack([torch.randperm(length // 2, generator=random)[:3] for _ in range(rows)])
    labels = torch.randint(1, vocab_size, (rows, 3), generator=random)
    weights = torch.rand((rows, 3), generator=random) + 0.5
    weights[0, 2] = 0
    return MaskedBatch(ids, positions, labels, weights, ids != 0)


def gradients(masked: MaskedBatch) -> dict[str, torch.Tensor]:
    """Name → [B, *shape], from one backward pass per row."""
    model = make_model()
    rows = []
    for row in masked.split(1):
        model.zero_grad()
        weighted_loss(model, row).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def layer_number(sketcher: Sketcher, name: str) -> int:
    """The parameter's layer in the sketcher."""
    return sketcher._tensors[sketcher._model.get_parameter(name)].layer


def test_every_parameter_of_every_row_is_in_its_layers_sketch() -> None:
    masked, sketcher = make_batch(), Sketcher(make_model(), size=1000, seed=3)
    expected = torch.zeros((5, len(sketcher.layers), sketcher.size))
    for name, gradient in gradients(masked).items():
        expected[:, layer_number(sketcher, name)] += sketcher.project(name, gradient)
    assert sketcher.layers == ["embeddings", "layer 0", "layer 1", "head"]
    assert sketcher.size == 997
    found = sketcher(masked)
    assert (found.square().sum(2) > 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", [name for name in INSTALLED if name not in RELATIVE])
def test_other_architectures(architecture: str) -> None:
    """Shared layers, RMSNorm, rotation, positions of the model's own: every parameter's gradient is in its layer."""
    section_of = ModelConfig.model_validate(section(architecture))
    torch.manual_seed(0)
    config = transformers_config(section_of, vocab_size=70, pad_id=0)
    model = MaskedLanguageModel(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    masked, rows = make_batch(), []
    for row in masked.split(1):
        model.zero_grad()
        weighted_loss(model, row).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    sketcher = Sketcher(model, size=1000, seed=3)
    expected = torch.zeros((5, len(sketcher.layers), sketcher.size))
    for name in rows[0]:
        gradient = torch.stack([row[name] for row in rows])
        expected[:, layer_number(sketcher, name)] += sketcher.project(name, gradient)
    shared = ["layer 0"] if architecture == "albert" else ["layer 0", "layer 1", "layer 2"]
    assert sketcher.layers == ["embeddings", *shared, "head"]
    torch.testing.assert_close(sketcher(masked), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("architecture", "why"), RELATIVE.items())
def test_tables_of_relative_positions_are_refused(architecture: str, why: str) -> None:
    config = transformers_config(ModelConfig.model_validate(section(architecture)), vocab_size=70, pad_id=1)
    with pytest.raises(ValueError, match=f"gradients of {architecture} cannot be sketched: {why}"):
        Sketcher(MaskedLanguageModel(config), size=1000, seed=3)(make_batch())


def test_parameters_used_outside_of_their_module_are_noticed() -> None:
    config = transformers_config(ModelConfig.model_validate(section("roberta")), vocab_size=70, pad_id=0)
    model = MaskedLanguageModel(config)
    table = model.mlm.get_input_embeddings()
    model.mlm.lm_head.register_forward_hook(lambda module, args, output: output * table.weight[1, 0])
    with pytest.raises(ValueError, match="gradients of roberta cannot be sketched: in embeddings, parameters are used"):
        Sketcher(model, size=1000, seed=3)(make_batch())


def test_large_tensors_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, sketcher = make_batch(), Sketcher(make_model(), size=1000, seed=3)
    full = sketcher(masked)
    monkeypatch.setattr("maskvr_ds.analysis.gradient_variance.sketch._ELEMENTS", 2 * 70 * 48)
    torch.testing.assert_close(sketcher(masked), full, rtol=1e-4, atol=1e-7)


def test_second_moments_within_five_per_cent() -> None:
    """Of single gradients and of their inner products, at the command's default size, for every layer."""
    masked = make_batch(rows=8)
    exact = gradients(masked)
    for seed in range(5):
        sketcher = Sketcher(make_model(), size=4096, seed=seed)
        grams = torch.zeros((len(sketcher.layers), 8, 8))
        for name, gradient in exact.items():
            flat = gradient.flatten(1)
            grams[layer_number(sketcher, name)] += flat @ flat.T
        sketches = sketcher(masked).transpose(0, 1)
        found = sketches @ sketches.transpose(1, 2)
        ratio = found.sum(0).diagonal().mean() / grams.sum(0).diagonal().mean()
        assert abs(ratio - 1) < 0.05
        of_layers = found.diagonal(dim1=1, dim2=2).mean(1) / grams.diagonal(dim1=1, dim2=2).mean(1)
        assert ((of_layers - 1).abs() < 0.05).all(), of_layers
        norms = grams.sum(0).diagonal().sqrt()
        assert ((found.sum(0) - grams.sum(0)).abs() < 0.08 * norms[:, None] * norms).all()


def test_unbiased_over_seeds_and_spread_as_stated() -> None:
    """The hardest cases: a gradient of rank 1 with one dominant column, and a sketch that is far too small."""
    model = make_model()
    name = "mlm.bert.encoder.layer.0.intermediate.dense.weight"
    shape = model.get_parameter(name).shape
    random = torch.Generator().manual_seed(0)
    rank_one = torch.randn(shape[0], 1, generator=random) * torch.randn(1, shape[1], generator=random)
    column = 0.01 * torch.randn(shape, generator=random)
    column[:, 7] += 1
    for gradient in (rank_one, column):
        gradient = gradient / gradient.norm()
        norms = torch.stack(
            [Sketcher(model, size=101, seed=s).project(name, gradient[None]).square().sum() for s in range(200)]
        )
        deviation = (2 / 101) ** 0.5
        assert abs(norms.mean() - 1) < 4 * deviation / 200**0.5
        assert norms.std() < 1.3 * deviation


def test_sketch_is_a_function_of_the_seed() -> None:
    masked = make_batch()
    first, again, other = (Sketcher(make_model(), size=500, seed=s)(masked) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_layers_by_name() -> None:
    names = ("mlm.bert.embeddings.LayerNorm.bias", "mlm.bert.encoder.layer.11.output.dense.weight")
    assert [layer_of(name) for name in names] == ["embeddings", "layer 11"]
    assert layer_of("mlm.cls.predictions.transform.dense.weight") == "head"


def test_another_kind_of_module_is_refused() -> None:
    model = make_model()
    model.gate = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"gradients of gate cannot be sketched: only those of Embedding"):
        Sketcher(model, size=100, seed=0)


@pytest.mark.parametrize(("limit", "prime"), [(3, 3), (4096, 4093), (100, 97)])
def test_largest_prime(limit: int, prime: int) -> None:
    assert largest_prime(limit) == prime


def test_no_prime() -> None:
    with pytest.raises(ValueError, match="sketch size 2: must be at least 3"):
        largest_prime(2)
