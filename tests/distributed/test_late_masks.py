"""Training with late mask tokens: stages and ranks, a kill, exports, evaluation, refusals. More architectures and
settings with --whole-matrix."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Life, column, configuration, free_ports, live, metrics, train_all
from tests.support.architectures import INSTALLED, section
from tests.support.corpora import PAD_IS_1, make_corpus

STEPS = 8
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
MASKS = {"rate": 0.3, "mask_probability": 1, "random_probability": 0, "late_layer": 2}
LARGE = ("camembert", "distilbert", "electra", "ernie", "eurobert", "gte", "mpnet", "nomic_bert", "roberta")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", chosen(metafunc.config))


def chosen(config: pytest.Config) -> tuple[str, ...]:
    more = tuple(name for name in LARGE if name in INSTALLED) if config.getoption("--whole-matrix") else ()
    return ("bert", "modernbert", *more)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20, special=PAD_IS_1, padded_last_row=True)
    make_corpus(folder / "held_out", rows=40, words=20, seed=1, special=PAD_IS_1)
    return folder


def values(output: Path, corpus: Path, model: str, **sections: Any) -> dict[str, Any]:
    found = configuration(output, corpus, **{"steps": STEPS, "masking": MASKS, **sections})
    # Rows within documents where windows are tested, too.
    data = {"path": str(corpus), "attention": "documents" if model == "modernbert" else "rows"}
    return {**found, "model": section(model), "data": data}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """NAME/ARCHITECTURE: `one` on 1 rank, `plain` with [MASK] in all layers, `killed` like one, `zeroN` on 2 ranks."""
    folder, every = tmp_path_factory.mktemp("runs"), request.config.getoption("--whole-matrix")
    names, lives, jobs = chosen(request.config), [], []
    for name in names:
        one = values(folder / "one" / name, corpus, name, deepspeed="zero1_fp32")
        plain = {**one, "output_dir": str(folder / "plain" / name), "masking": {**MASKS, "late_layer": 0}}
        killed = {**one, "output_dir": str(folder / "killed" / name), "checkpoint": {"every_steps": 3}}
        lives += [Life([(one, None), (plain, None)])]
        lives += [Life([(killed, None)], kill=("step", 5)), Life([(killed, "auto")])]
        for stage in ("zero0", "zero2", "zero3") if every or name == "bert" else ("zero3",):
            jobs.append((values(folder / stage / name, corpus, name, deepspeed=f"{stage}_fp32"), None))
    answers = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=1800)[0]
    assert answers == [[None, None], "killed", [None]] * len(names)
    assert run_ranks(train_all, 2, jobs, timeout=1800) == [[None] * len(jobs)] * 2
    return folder


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_losses_do_not_depend_on_stage_and_ranks(runs: Path, architecture: str, stage: str) -> None:
    if not (runs / stage / architecture).exists():
        pytest.skip("--whole-matrix")
    one, other = (metrics(runs / run / architecture) for run in ("one", stage))
    assert len(one) == len(other) == STEPS
    for here, there in zip(one, other, strict=True):
        for name in ("loss", "held_out_loss", "held_out_loss_mask"):
            assert there.get(name) == pytest.approx(here.get(name), abs=1e-5)
    assert "held_out_loss" in one[-1]


def test_masks_are_those_of_ordinary_training_and_flops_fewer(runs: Path, architecture: str) -> None:
    late, plain = (metrics(runs / run / architecture) for run in ("one", "plain"))
    for key in ("data_digest", "mask_digest", "predictions"):
        assert [line[key] for line in late] == [line[key] for line in plain]
    assert all(a["loss"] != b["loss"] for a, b in zip(late, plain, strict=True))
    flops = [lines[-1]["model_tflops_per_rank"] / lines[-1]["tokens_per_second"] for lines in (late, plain)]
    assert flops[0] < 0.95 * flops[1]


def test_a_killed_run_resumes_exactly(runs: Path, architecture: str) -> None:
    assert column(runs / "killed" / architecture, *FIGURES) == column(runs / "one" / architecture, *FIGURES)
    ends = [load.read_weights(complete_checkpoints(runs / run / architecture)[-1]) for run in ("killed", "one")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@torch.no_grad()
def test_the_export_is_an_ordinary_model(runs: Path, architecture: str, tmp_path: Path) -> None:
    result = export(runs / "zero3" / architecture, tmp_path / "model")
    assert result.difference < 1e-5
    names = {"config": "config.json", "card": "README.md"}
    texts = {key: (tmp_path / "model" / name).read_text(encoding="utf-8") for key, name in names.items()}
    assert "late" not in texts["config"]
    assert "| `masking.late_layer` | 2 |" in texts["card"]
    if architecture == "bert":
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
        probe = load.read_probe(complete_checkpoints(runs / "zero3" / architecture)[-1])
        logits = model(input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask")).logits
        index = probe["positions"][..., None].expand(-1, -1, logits.shape[2])
        torch.testing.assert_close(logits.gather(1, index), probe["logits"], rtol=1e-5, atol=1e-5)


def test_another_layer_is_refused_on_resume(runs: Path, corpus: Path) -> None:
    other = values(runs / "one" / "bert", corpus, "bert", deepspeed="zero1_fp32")
    other = {**other, "training": {"steps": 2 * STEPS}, "masking": {**MASKS, "late_layer": 1}}
    ((refused,),) = run_ranks(train_all, 1, [(other, "auto")])
    assert "late_layer" in refused
    assert "belongs to another run" in refused


def measure_all(folder: str, corpus: str, output: str) -> tuple[float, list[float]]:
    """On a rank: held-out loss of the checkpoint of bert; mask variance of modernbert, late and plain."""
    from data_pipeline.shards import Corpus
    from maskvr_ds.analysis.gradient_variance import measure
    from maskvr_ds.downstream.mlm import evaluate
    from maskvr_ds.runtime import distributed

    distributed.initialize()
    (figures,) = evaluate([f"{folder}/one/bert"], Corpus(Path(corpus) / "held_out"), rows=50, micro_size=4).values()
    found = []
    for run in ("one", "plain"):
        options = ["--checkpoint", f"{folder}/{run}/modernbert", "--corpus", corpus, "--sequences", "8", "--masks", "2"]
        parser = argparse.ArgumentParser()
        measure.add_variance_options(parser)
        report = measure.run(parser.parse_args([*options, "--sketch-size", "300", "--output", f"{output}/{run}"]))
        found.append(report["strategies"]["uniform"]["layers"]["whole"]["mask"][0])
    return figures["held_out_loss"], found


def test_checkpoints_are_measured_with_late_mask_tokens(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Held-out loss as in the run; variance as without them is another."""
    ((loss, variances),) = run_ranks(measure_all, 1, str(runs), str(corpus), str(tmp_path), timeout=300)
    assert loss == pytest.approx(metrics(runs / "one" / "bert")[-1]["held_out_loss"], abs=1e-5)
    assert variances[0] > 0
    assert variances[0] != variances[1]


def test_schedules_networks_precisions_and_compiled_layers(
    corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rates that fall, MAPNet, activation checkpointing; with --whole-matrix bf16 and compiled layers."""
    several = {"falling": {"final_rate": 0.15}, "mapnet": {"strategy": "mapnet"}, "auto": {"strategy": "auto"}}
    several["auto"]["auto"] = {"every_steps": 4, "max_share": None, "rows": 8, "draws": 2}
    several["explored"] = {"strategy": "fully_explored"}
    jobs = []
    for name, masking in several.items():
        job = values(tmp_path / name, corpus, "bert", masking={**MASKS, **masking}, deepspeed="zero1_fp32")
        jobs.append(job)
    again = values(tmp_path / "again", corpus, "bert", deepspeed="zero1_fp32")
    jobs.append({**again, "model": {**again["model"], "activation_checkpointing": True}})
    if request.config.getoption("--whole-matrix"):
        jobs.append(values(tmp_path / "bf16", corpus, "bert", deepspeed="zero1_bf16"))
        compiled = values(tmp_path / "compiled", corpus, "modernbert", deepspeed="zero1_fp32")
        jobs.append({**compiled, "training": {**compiled["training"], "compile": "layers"}})
    assert run_ranks(train_all, 1, [(job, None) for job in jobs], timeout=900) == [[None] * len(jobs)]
