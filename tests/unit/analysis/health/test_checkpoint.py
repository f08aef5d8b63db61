"""Findings at a checkpoint written by an earlier run, and by models that are damaged on purpose."""

from pathlib import Path

import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.health import checkpoint
from maskvr_ds.analysis.health.checkpoint import (
    Measurements,
    find_checkpoint,
    judge_checkpoint,
    measure_checkpoint,
    measure_model,
    sharpness,
)
from maskvr_ds.analysis.health.probe import copy_for_analysis, mean_loss
from maskvr_ds.analysis.health.spectra import Largest
from maskvr_ds.checkpoint.export import load_model
from maskvr_ds.cli.main import main
from maskvr_ds.models.encoder import MaskedLanguageModel, build
from maskvr_ds.run_folder.checkpoints import CheckpointError
from tests.support.corpora import make_corpus
from tests.support.documents import ROOT
from tests.unit.analysis.health.test_probe import masked, model_of

RUN, CORPUS = ROOT / "tests/data/acf4fb5/run_zero2", ROOT / "tests/data/acf4fb5/corpus"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", rows=64, length=16, words=91)


def findings(found: Measurements) -> set[str]:
    return {f.check for f in judge_checkpoint(found) if f.status == "finding"}


def measured(model: MaskedLanguageModel, corpus: Path) -> Measurements:
    return measure_model(model, Corpus(corpus), rows=6)


def test_lamb_updates_tensors_by_the_learning_rate() -> None:
    """Of a checkpoint of ZeRO 2 on two ranks: without bounds, ‖Δw‖ / ‖w‖ is the learning rate by LAMB's definition."""
    found = measure_checkpoint(find_checkpoint(RUN, "6"), CORPUS, rows=4, lr=0.02)
    assert found.updates is not None
    assert len(found.updates) > 20
    assert list(found.updates.values()) == pytest.approx([0.02] * len(found.updates), rel=1e-4)
    assert findings(found) == set()
    assert found.noise is not None
    assert found.noise.scale > 0


def test_a_step_without_a_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 5; there are those of 6"):
        find_checkpoint(RUN, "5")


def test_a_checkpoint_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(folder: Path) -> object:
        model = load_model(folder)
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(checkpoint, "load_model", damaged)
    with pytest.raises(
        CheckpointError, match=r"1 tensors have values that are not finite \(bert.encoder.layer.0.output"
    ):
        measure_checkpoint(find_checkpoint(RUN, "6"), CORPUS, rows=4, lr=0.02)


def test_an_eigenvalue_that_has_not_converged_is_a_bound(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "sharpness", lambda *_: Largest(3.0, 40, converged=False))
    texts = {f.check: f.text for f in judge_checkpoint(measured(model_of("bert"), corpus))}
    assert texts["sharpness"].startswith("λ_max ≥ 3")


def test_a_random_model_is_healthy(corpus: Path) -> None:
    assert findings(measured(model_of("bert"), corpus)) == set()


def test_sharpness_is_that_of_the_full_hessian(corpus: Path) -> None:
    """λ_max of a masked language model against torch.linalg on the Hessian formed column by column."""
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4, "num_hidden_layers": 1}
    config = model_of("bert", **sizes, max_position_embeddings=16).mlm.config
    torch.manual_seed(0)
    model = copy_for_analysis(build(config))
    for p in model.parameters():
        p.data.mul_(5)
    batch, parameters = masked(), [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(mean_loss(model, batch), parameters, create_graph=True, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    flat = torch.cat([g.flatten() for _, g in used])
    rows = []
    for element in flat:
        row = torch.autograd.grad(element, [p for p, _ in used], retain_graph=True, allow_unused=True)
        pairs = zip(row, used, strict=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if r is None else r.flatten() for r, (p, _) in pairs]))
    expected = torch.linalg.eigvalsh(torch.stack(rows).double())[-1].item()
    assert sharpness(model, batch).value == pytest.approx(expected, rel=1e-3)


def test_dead_rows_are_named(corpus: Path) -> None:
    model = model_of("bert")
    model.mlm.get_input_embeddings().weight.data[[7, 8, 30]] = 0.0
    found = measured(model, corpus)
    assert findings(found) == {"embedding rows"}
    assert sorted(found.silent) == [7, 8, 30]


def test_damaged_parts_are_named(corpus: Path) -> None:
    def layer(model: MaskedLanguageModel, number: int) -> torch.nn.Module:
        return model.mlm.get_submodule(f"bert.encoder.layer.{number}")

    model = model_of("bert")
    layer(model, 1).get_parameter("output.LayerNorm.weight").data[3] = 40.0
    assert "normalisation gains" in findings(measured(model, corpus))
    model = model_of("bert")
    matrix = layer(model, 0).get_parameter("intermediate.dense.weight")
    matrix.data += 50 * torch.outer(torch.ones(len(matrix)), torch.randn(matrix.shape[1]))
    assert "stable rank" in findings(measured(model, corpus))
    model = model_of("bert")
    for name in ("query", "key"):
        layer(model, 2).get_parameter(f"attention.self.{name}.weight").data.mul_(300)
    assert {"attention logits"} <= findings(measured(model, corpus))
    model = model_of("bert")
    for number in range(3):
        layer(model, number).get_parameter("output.LayerNorm.weight").data.mul_(1e-3 if number == 0 else 1.0)
    assert "activations over depth" in findings(measured(model, corpus))


def test_a_single_layer_and_few_rows_are_not_judged(corpus: Path) -> None:
    found = measure_model(model_of("bert", num_hidden_layers=1), Corpus(corpus), rows=2)
    status = {f.check: f.status for f in judge_checkpoint(found)}
    assert status["activations over depth"] == status["gradient noise"] == "not judged"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", str(RUN), "--at", "newest", "--data", str(CORPUS), "--rows", "4"]) == 0
    out = capsys.readouterr().out
    assert "step 6, on 4 rows" in out
    assert "critical batch about" in out
    assert out.count("no findings") == 2
