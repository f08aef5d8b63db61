"""Other architectures than BERT, trained: stages and ranks, kills, exports. Four; all with --whole-matrix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.config.architectures import longest_row
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Life, column, configuration, free_ports, live, metrics, train_all
from tests.support.architectures import FOUR, INSTALLED, section
from tests.support.corpora import PAD_IS_1, make_corpus

STEPS = 20
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", chosen(metafunc.config))


def chosen(config: pytest.Config) -> tuple[str, ...]:
    return INSTALLED if config.getoption("--whole-matrix") else FOUR


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20, special=PAD_IS_1, padded_last_row=True)
    make_corpus(folder / "held_out", rows=40, words=20, seed=1, special=PAD_IS_1)
    return folder


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """NAME/ARCHITECTURE: `one` on 1 rank with ZeRO 1, `two` on 2 ranks with ZeRO 3, `killed` like one, but killed."""
    folder = tmp_path_factory.mktemp("runs")
    names = chosen(request.config)

    def values(run: str, architecture: str, **sections: Any) -> dict[str, Any]:
        found = configuration(folder / run / architecture, corpus, steps=STEPS, **sections)
        return {**found, "model": section(architecture)}

    lives = [Life([(values("one", name, deepspeed="zero1_fp32"), None) for name in names])]
    for name in names:
        killed = values("killed", name, deepspeed="zero1_fp32", checkpoint={"every_steps": 8})
        lives += [Life([(killed, None)], kill=("step", 12)), Life([(killed, "auto")])]
    answers = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=900)[0]
    assert answers == [[None] * len(names), *(["killed", [None]] * len(names))]
    jobs = [(values("two", name, deepspeed="zero3_fp32"), None) for name in names]
    assert run_ranks(train_all, 2, jobs, timeout=900) == [[None] * len(names)] * 2
    return folder


def test_losses_do_not_depend_on_stage_and_ranks(runs: Path, architecture: str) -> None:
    one, two = (metrics(runs / run / architecture) for run in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [*range(1, STEPS + 1)]
    for here, there in zip(one, two, strict=True):
        for name in ("loss", "held_out_loss"):
            assert there.get(name) == pytest.approx(here.get(name), abs=1e-5)
    assert "held_out_loss" in one[-1]


def test_a_killed_run_resumes_exactly(runs: Path, architecture: str) -> None:
    assert column(runs / "killed" / architecture, *FIGURES) == column(runs / "one" / architecture, *FIGURES)
    ends = [load.read_weights(complete_checkpoints(runs / run / architecture)[-1]) for run in ("killed", "one")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@torch.no_grad()
def test_the_export_is_the_trained_model(runs: Path, architecture: str, tmp_path: Path) -> None:
    """Logits of the folder, loaded by transformers alone, at the probe's positions."""
    exported = export(runs / "two" / architecture, tmp_path / "model")
    assert exported.difference < 1e-5
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.model_type == architecture
    probe = load.read_probe(complete_checkpoints(runs / "two" / architecture)[-1])
    logits = model.eval()(input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask")).logits
    places = probe["positions"][..., None].expand(-1, -1, logits.shape[-1])
    torch.testing.assert_close(logits.gather(1, places), probe["logits"], rtol=1e-5, atol=1e-5)
    # All positions that the model has for tokens, and no more.
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")("w1 " * 100, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, longest_row(architecture, 64, pad=1))
    assert model(**batch).logits.isfinite().all()


def test_learns(runs: Path, architecture: str) -> None:
    losses = [loss for _, loss in column(runs / "one" / architecture, "step", "loss")]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_parameters_without_gradient_are_frozen(corpus: Path, tmp_path: Path) -> None:
    """SqueezeBERT builds a pooler that masked tokens never reach: it stays as it is, at every stage and on resume."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings |= {"max_position_embeddings": 64, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = {"architecture": "squeezebert", "untested": True, "settings": settings}

    def values(name: str, steps: int, stage: str) -> dict[str, Any]:
        found = configuration(tmp_path / name, corpus, steps=steps, deepspeed=stage, checkpoint={"every_steps": 3})
        return {**found, "model": model, "training": {"steps": steps, "schedule_steps": 9}}

    stages = ["zero1_bf16", "zero3_fp32"]
    jobs = [(values(stage, steps, stage), "auto") for steps in (3, 6) for stage in stages]
    assert run_ranks(train_all, 2, jobs, timeout=600) == [[None] * len(jobs)] * 2
    for stage in stages:
        start, end = (load.read_weights(folder) for folder in complete_checkpoints(tmp_path / stage))
        _check_frozen(start, end)
    moved = values("zero3_fp32", 9, "zero1_fp32")
    assert run_ranks(train_all, 1, [(moved, "auto")]) == [[None]]
    _check_frozen(start, load.read_weights(complete_checkpoints(tmp_path / "zero3_fp32")[-1]))


def _check_frozen(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> None:
    assert {name for name in start if torch.equal(start[name], end[name])} == {
        "transformer.pooler.dense.weight",
        "transformer.pooler.dense.bias",
    }
