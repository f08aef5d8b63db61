"""Training with attention within documents: stages and ranks, kills, exports, variance. Four architectures; all that
can, and more settings, with --whole-matrix."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from data_pipeline.shards import Corpus
from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.data.documents import document_lengths
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Life, column, configuration, free_ports, live, metrics, run_command, train_all
from tests.support.architectures import INSTALLED, section
from tests.support.corpora import PAD_IS_1, make_corpus

STEPS = 12
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
FOUR = ("albert", "bert", "modernbert", "roberta")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", chosen(metafunc.config))


def chosen(config: pytest.Config) -> tuple[str, ...]:
    can = tuple(name for name in INSTALLED if name not in ("deberta-v2", "mpnet"))
    return can if config.getoption("--whole-matrix") else FOUR


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20, special=PAD_IS_1, padded_last_row=True)
    make_corpus(folder / "held_out", rows=40, words=20, seed=1, special=PAD_IS_1)
    return folder


def values(output: Path, corpus: Path, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    data = {"path": str(corpus), "attention": "documents"}
    found = configuration(output, corpus, **{"steps": STEPS, "data": data, **sections})
    return {**found, "model": model}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """NAME/ARCHITECTURE: `one` on 1 rank with ZeRO 1, `rows` like it with attention over rows, `zeroN` on 2 ranks,
    `killed` like one, but killed."""
    folder = tmp_path_factory.mktemp("runs")
    names = chosen(request.config)
    lives = []
    for name in names:
        one = values(folder / "one" / name, corpus, section(name), deepspeed="zero1_fp32")
        rows = {**one, "output_dir": str(folder / "rows" / name), "data": {"path": str(corpus)}}
        killed = {**one, "output_dir": str(folder / "killed" / name), "checkpoint": {"every_steps": 5}}
        lives += [Life([(one, None), (rows, None)])]
        lives += [Life([(killed, None)], kill=("step", 8)), Life([(killed, "auto")])]
    answers = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=1800)[0]
    assert answers == [[None, None], "killed", [None]] * len(names)
    jobs = [
        (values(folder / stage / name, corpus, section(name), deepspeed=f"{stage}_fp32"), None)
        for name in names
        for stage in ("zero0", "zero2", "zero3")
    ]
    assert run_ranks(train_all, 2, jobs, timeout=1800) == [[None] * len(jobs)] * 2
    return folder


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_losses_do_not_depend_on_stage_and_ranks(runs: Path, architecture: str, stage: str) -> None:
    one, other = (metrics(runs / run / architecture) for run in ("one", stage))
    assert [line["step"] for line in one] == [line["step"] for line in other] == [*range(1, STEPS + 1)]
    for here, there in zip(one, other, strict=True):
        for name in ("loss", "held_out_loss"):
            assert there.get(name) == pytest.approx(here.get(name), abs=1e-5)
    assert "held_out_loss" in one[-1]


def test_masks_and_data_are_those_of_attention_over_rows(runs: Path, architecture: str) -> None:
    documents, rows = (metrics(runs / run / architecture) for run in ("one", "rows"))
    for key in ("data_digest", "mask_digest", "samples"):
        assert [line[key] for line in documents] == [line[key] for line in rows]
    assert all(a["loss"] != b["loss"] for a, b in zip(documents, rows, strict=True))
    # Fewer pairs of positions are counted.
    assert documents[-1]["model_tflops_per_rank"] / documents[-1]["tokens_per_second"] < (
        rows[-1]["model_tflops_per_rank"] / rows[-1]["tokens_per_second"]
    )


def test_a_killed_run_resumes_exactly(runs: Path, architecture: str) -> None:
    assert column(runs / "killed" / architecture, *FIGURES) == column(runs / "one" / architecture, *FIGURES)
    ends = [load.read_weights(complete_checkpoints(runs / run / architecture)[-1]) for run in ("killed", "one")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@torch.no_grad()
def test_the_export_is_the_trained_model(runs: Path, architecture: str, tmp_path: Path) -> None:
    """Loaded by transformers alone, fed each document of the probe alone: at the positions, logits of the engine."""
    assert export(runs / "zero3" / architecture, tmp_path / "model").difference < 1e-5
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert "maskvr" not in json.dumps(config)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    probe = load.read_probe(complete_checkpoints(runs / "zero3" / architecture)[-1])
    separator = PAD_IS_1.index("[SEP]")
    compared = 0
    for row, positions, logits in zip(probe["input_ids"], probe["positions"], probe["logits"], strict=True):
        start = 0
        for stop in [i + 1 for i, token in enumerate(row.tolist()) if token == separator]:
            found = model(input_ids=row[None, start:stop]).logits[0]
            for slot, position in enumerate(positions.tolist()):
                if start <= position < stop:
                    torch.testing.assert_close(found[position - start], logits[slot], rtol=1e-5, atol=1e-5)
                    compared += 1
            start = stop
    assert compared >= len(probe["positions"])


def test_the_card_says_with_which_attention(runs: Path, tmp_path: Path) -> None:
    for run, setting in (("one", "documents"), ("rows", "rows")):
        export(runs / run / "roberta", tmp_path / run)
        card = (tmp_path / run / "README.md").read_text(encoding="utf-8")
        assert f"(`data.attention: {setting}`)" in card
        assert "closed by `[SEP]`" in card
        assert ("Pass one text per row" in card) == (setting == "documents")


def test_another_attention_is_refused_on_resume(runs: Path, corpus: Path) -> None:
    rows = configuration(runs / "one" / "bert", corpus, steps=2 * STEPS, deepspeed="zero1_fp32")
    ((refused,),) = run_ranks(train_all, 1, [({**rows, "model": section("bert")}, "auto")])
    assert "belongs to another run: data.attention was 'documents', is 'rows'" in refused


def test_masks_of_a_network_bf16_and_compiled_layers(corpus: Path, tmp_path: Path) -> None:
    """MAPNet reads the complete row; the same losses at another number of ranks in the precision's bounds."""
    settings = {"masking": {"strategy": "mapnet", "mapnet": {"gate": "always"}}, "optimizer": {"lr": 2e-3}}
    model = section("modernbert")
    one = values(tmp_path / "one", corpus, model, deepspeed="zero1_fp32", **settings)
    compiled = values(
        tmp_path / "compiled",
        corpus,
        model,
        deepspeed="zero1_fp32",
        training={"steps": STEPS, "compile": "layers"},
        **settings,
    )
    bf16 = values(tmp_path / "bf16", corpus, model, deepspeed="zero1_bf16", **settings)
    assert run_ranks(train_all, 1, [(one, None), (compiled, None), (bf16, None)], timeout=900) == [[None] * 3]
    losses = {name: [line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "compiled", "bf16")}
    assert losses["compiled"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["one"], rel=3e-2)


def test_auto_measures_within_documents(corpus: Path, tmp_path: Path) -> None:
    auto = {"strategy": "auto", "auto": {"every_steps": 4, "max_share": None, "rows": 16, "proposal": False}}
    run = values(tmp_path / "run", corpus, section("roberta"), deepspeed="zero1_fp32", masking=auto)
    assert run_ranks(train_all, 1, [(run, None)], timeout=600) == [[None]]


def test_variance_is_that_within_documents(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Sketches are compared with autograd's gradients of the same model; the figures differ from those over rows."""
    totals = []
    for run in ("one", "rows"):
        options: list[Any] = ["--checkpoint", runs / run / "roberta", "--corpus", corpus, "--sequences", 16]
        options += ["--masks", 4, "--sketch-size", 500, "--strategies", "uniform", "--output", tmp_path / run]
        result = run_command("variance", *options, timeout=600)
        assert result.returncode == 0, result.stderr
        report = json.loads((tmp_path / run / "variance.json").read_text(encoding="utf-8"))
        totals.append(report["strategies"]["uniform"]["layers"]["whole"]["mask"][0])
    assert totals[0] > 0
    assert totals[0] != totals[1]


def test_evaluation_of_a_checkpoint_is_that_of_its_run(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Within documents, as it was trained; the rows have several."""
    lengths, number = document_lengths(Corpus(corpus))
    assert len(lengths) > 1.2 * number
    result = run_command(
        "evaluate",
        runs / "one" / "bert",
        "--tasks",
        "mlm",
        "--data",
        corpus,
        "--rows",
        40,
        "--output",
        tmp_path / "f.json",
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["mlm"]
    (found,) = figures.values()
    assert found["held_out_loss"] == pytest.approx(metrics(runs / "one" / "bert")[-1]["held_out_loss"], abs=1e-5)
