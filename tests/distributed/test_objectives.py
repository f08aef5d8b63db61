"""Sentence pairs trained next to masked tokens: ranks and stages, kills, held-out accuracy, exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from maskvr_ds.checkpoint import load
from maskvr_ds.checkpoint.export import export
from maskvr_ds.config.objectives import PAIR_CLASSES
from maskvr_ds.downstream.mlm import evaluate, evaluation_corpus
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.runtime import distributed
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Life, column, configuration, free_ports, live, metrics, run_command, train_all
from tests.support.architectures import section
from tests.support.pairs import make_pairs

STEPS = 100
# Steps on which two layouts are compared.
SHORT = 20
# The objective of each architecture's paper.
OBJECTIVE = {"bert": "nsp", "albert": "sop"}
# Its weight and the learning rate: small models with shared layers learn the order late.
WEIGHT, RATE = {"bert": 0.5, "albert": 4.0}, {"bert": 0.003, "albert": 0.006}
# Without dropout, which depends on the rank.
SETTINGS: dict[str, dict[str, Any]] = {"bert": {}, "albert": {"classifier_dropout_prob": 0.0}}
FIGURES = ("step", "samples", "loss", "pair_loss", "grad_norm", "data_digest", "mask_digest")
ARCHITECTURES = pytest.mark.parametrize("architecture", OBJECTIVE)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for packing in OBJECTIVE.values():
        make_pairs(folder / packing, packing, rows=1000)
        # Ranks have an unequal number of held-out rows.
        make_pairs(folder / packing / "held_out", packing, rows=101, seed=1)
    return folder


@pytest.fixture(scope="module")
def runs(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/ARCHITECTURE: `one` on 1 rank with ZeRO 1, `two` on 2 ranks with ZeRO 2 and other micro-batches, `killed`
    like one, but killed."""
    folder = tmp_path_factory.mktemp("runs")

    def values(run: str, architecture: str, **sections: Any) -> dict[str, Any]:
        objective = OBJECTIVE[architecture]
        options: dict[str, Any] = {
            "evaluation": {"every_steps": 20, "rows": 101},
            "optimizer": {"name": "adam", "lr": RATE[architecture]},
        }
        options |= {"deepspeed": "zero1_fp32", "batch": {"global_size": 32, "micro_size": 16}}
        found = configuration(folder / run / architecture, corpora / objective, steps=STEPS, **{**options, **sections})
        model = section(architecture, type_vocab_size=2, **SETTINGS[architecture])
        return {**found, "model": model, "objectives": {"mlm": 1.0, objective: WEIGHT[architecture]}}

    lives = [Life([(values("one", name), None) for name in OBJECTIVE])]
    for name in OBJECTIVE:
        killed = values("killed", name, checkpoint={"every_steps": 40})
        lives += [Life([(killed, None)], kill=("step", 60)), Life([(killed, "auto")])]
    answers = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=900)[0]
    assert answers == [[None] * len(OBJECTIVE), *(["killed", [None]] * len(OBJECTIVE))]
    other: dict[str, Any] = {"deepspeed": "zero2_fp32", "batch": {"global_size": 32, "micro_size": 4}}
    other["training"] = {"steps": SHORT, "schedule_steps": STEPS}
    jobs = [(values("two", name, **other), None) for name in OBJECTIVE]
    assert run_ranks(train_all, 2, jobs, timeout=900) == [[None] * len(OBJECTIVE)] * 2
    return folder


@ARCHITECTURES
def test_losses_do_not_depend_on_the_layout(runs: Path, architecture: str) -> None:
    one, two = (metrics(runs / run / architecture) for run in ("one", "two"))
    names = ("loss", "pair_loss", "held_out_loss", "held_out_pair_loss", "held_out_pair_accuracy")
    assert (len(one), len(two)) == (STEPS, SHORT)
    for here, there in zip(one, two, strict=False):
        ours, theirs = ({name: line[name] for name in names if name in line} for line in (here, there))
        assert theirs == pytest.approx(ours, abs=1e-5)
        assert "pair_loss" in ours
        assert [here[name] for name in ("data_digest", "mask_digest")] == [
            there[name] for name in ("data_digest", "mask_digest")
        ]
    assert "held_out_pair_accuracy" in two[-1]


@ARCHITECTURES
def test_a_killed_run_resumes_exactly(runs: Path, architecture: str) -> None:
    assert column(runs / "killed" / architecture, *FIGURES) == column(runs / "one" / architecture, *FIGURES)
    ends = [load.read_weights(complete_checkpoints(runs / run / architecture)[-1]) for run in ("killed", "one")]
    assert any("pooler" in name for name in ends[0])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@ARCHITECTURES
def test_pairs_are_learnt(runs: Path, architecture: str) -> None:
    """Half of the labels are 1: three standard deviations of 101 guesses are 0.15."""
    line = metrics(runs / "one" / architecture)[-1]
    assert line["held_out_pair_accuracy"] > 0.9
    assert line["held_out_pair_loss"] < 0.4
    losses = [loss for (loss,) in column(runs / "one" / architecture, "loss")]
    assert sum(losses[-5:]) < sum(losses[:5])


@ARCHITECTURES
@torch.no_grad()
def test_the_export_keeps_both_heads(runs: Path, corpora: Path, architecture: str, tmp_path: Path) -> None:
    run = runs / "one" / architecture
    exported = export(run, tmp_path / "model")
    assert exported.architecture == PAIR_CLASSES[architecture]
    assert exported.difference < 1e-5
    cls = getattr(transformers, PAIR_CLASSES[architecture])
    model, info = cls.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    probe = load.read_probe(complete_checkpoints(run)[-1])
    places = torch.arange(probe["input_ids"].shape[1])
    types = (places >= probe["segment_starts"][:, None]) & (probe["input_ids"] != 0)
    logits, pair_logits = model.eval()(
        input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask"), token_type_ids=types.long()
    )[:2]
    rows = probe["positions"][..., None].expand(-1, -1, logits.shape[-1])
    torch.testing.assert_close(logits.gather(1, rows), probe["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair_logits, probe["pair_logits"], rtol=1e-5, atol=1e-5)
    # As a masked language model too, without the head for pairs.
    masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    again = masked_lm(
        input_ids=probe["input_ids"], attention_mask=probe.get("attention_mask"), token_type_ids=types.long()
    ).logits
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)


def _evaluate(models: list[Path], corpus: Path) -> list[dict[str, float]]:
    """On a rank."""
    distributed.initialize()
    return list(evaluate(models, evaluation_corpus(corpus), rows=101, micro_size=8).values())


@ARCHITECTURES
def test_run_and_export_have_the_same_figures(runs: Path, corpora: Path, architecture: str, tmp_path: Path) -> None:
    run = runs / "one" / architecture
    export(run, tmp_path / "model")
    corpus = evaluation_corpus(corpora / OBJECTIVE[architecture])
    last = metrics(run)[-1]
    for figures in run_ranks(_evaluate, 1, [run, tmp_path / "model"], corpus.folder)[0]:
        for name in ("held_out_loss", "held_out_pair_loss", "held_out_pair_accuracy"):
            assert figures[name] == pytest.approx(last[name], abs=1e-5)


def test_a_changed_objective_does_not_resume(runs: Path) -> None:
    values = yaml.safe_load((runs / "one" / "bert" / "config.yaml").read_text(encoding="utf-8"))
    del values["schema"]
    values["training"]["steps"] = STEPS + 2
    jobs = [({**values, "objectives": objectives}, "auto") for objectives in ({"nsp": 1.0}, ["mlm"])]
    weight, removed = run_ranks(train_all, 1, jobs)[0]
    assert "objectives.nsp was 0.5, is 1.0" in str(weight)
    assert "objectives.nsp was 0.5, is None" in str(removed)


def test_a_corpus_of_pairs_without_objective_is_refused(corpora: Path, tmp_path: Path) -> None:
    words = ["--set", f"output_dir={tmp_path / 'run'}", "--set", f"data.path={corpora / 'sop'}"]
    words += ["--set", "training.steps=2", "--set", "schedule.warmup_steps=0"]
    for command in ("config", "train"):
        failed = run_command(command, "--config", "demo_cpu", *words)
        assert failed.returncode == 1
        assert failed.stderr.count("has labels of sentence pairs (packing sop), and no objective is set") == 1
        assert "set objectives to [mlm, sop] to train on them, or to [mlm]" in failed.stderr
    assert not (tmp_path / "run").exists()
    assert run_command("config", "--config", "demo_cpu", *words, "--set", "objectives=[mlm]").returncode == 0
