"""Two phases on two gloo ranks: exact resume after kills, start policies against a reference, early errors.

All runs happen in one launch, one after the other (`training.live`); the tests read what they wrote.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shards import Corpus
from maskvr_ds import hashing
from maskvr_ds.checkpoint import load
from maskvr_ds.config import RunConfig
from maskvr_ds.data.loader import Loader
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.losses import weighted_loss
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.plots import plot_loss
from tests.distributed.ranks import run_ranks
from tests.distributed.training import (
    NO_DROPOUT,
    Life,
    column,
    configuration,
    free_ports,
    live,
    metrics,
    run_command,
)
from tests.reference.lamb import ReferenceLamb, clip
from tests.support.corpora import make_corpus

SHORT, LONG = 8, 6  # steps
POLICIES = list(itertools.product(("keep", "zero"), repeat=2))
KEEP = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}


def two_phases(
    output: Path, short: Path, long: Path, *, steps: tuple[int, int] = (SHORT, LONG), **sections: Any
) -> dict[str, Any]:
    values = configuration(output, short, steps=1, checkpoint={"every_steps": 4}, **sections)
    del values["data"], values["training"]
    values["phases"] = [
        {"name": "short", "data": {"path": str(short)}, "training": {"steps": steps[0]}},
        {
            "name": "long",
            "start": {"moments": "keep", "step_counter": "zero", "schedule": "restart"},
            "data": {"path": str(long)},
            "batch": {"global_size": 8},
            "optimizer": {"lr": 0.02},
            "schedule": {"warmup_share": 0.5},
            "masking": {"rate": 0.2},
            "training": {"steps": steps[1]},
        },
    ]
    return values


def changed(values: dict[str, Any], phase: int, **sections: Any) -> dict[str, Any]:
    """The configuration with `sections` merged into one phase."""
    phases = list(values["phases"])
    phases[phase] = {**phases[phase], **{k: {**phases[phase].get(k, {}), **v} for k, v in sections.items()}}
    return {**values, "phases": phases}


class Runs:
    """All runs of this module: answers of the ranks by name, and the folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.short, self.long = folder / "short", folder / "long"
        for path, length in ((self.short, 32), (self.long, 64)):
            make_corpus(path, rows=90, words=20, length=length)
            make_corpus(path / "held_out", rows=30, words=20, length=length, seed=1)
        self.passing = make_corpus(folder / "passing", rows=90, words=20)
        other = make_corpus(folder / "other", rows=90, words=30, length=64)

        proposing = {
            "masking": {"strategy": "mapnet", "mapnet": {"hidden": 32, "layers": 1}},
            "deepspeed": "zero2_fp32",
        }
        # The first phase of these runs reads a mixture.
        second = make_corpus(folder / "second", rows=40, words=20, seed=2)
        make_corpus(second / "held_out", rows=30, words=20, seed=3)
        self.uninterrupted, killed = (
            changed(
                two_phases(folder / name, path, self.long, **proposing),
                0,
                data={"path": None, "mixture": [{"path": str(path), "weight": 0.4}, {"path": str(second)}]},
            )
            for name, path in (("uninterrupted", self.short), ("killed", self.passing))
        )
        killed["data"] = {"verify": "size"}
        # The corpus of phase one is deleted with its held-out part: after the boundary it must not matter.
        make_corpus(self.passing / "held_out", rows=30, words=20, seed=1)
        brief: dict[str, Any] = {"model": NO_DROPOUT, "schedule": {"warmup_steps": 0}, "evaluation": {"every_steps": 0}}
        # Each policy at another stage; then optimizer states of other shapes, tested only for crossing the boundary.
        stages = dict(zip(POLICIES, ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32"), strict=True))
        self.policies = {
            policy: two_phases(folder / "-".join(policy), self.short, self.long, steps=(3, 3), **brief, deepspeed=stage)
            for policy, stage in stages.items()
        }
        for (moments, step_counter), values in self.policies.items():
            values["phases"][1]["start"] = {**KEEP, "moments": moments, "step_counter": step_counter}
        adam = {"name": "adam", "lr": 0.003}
        self.others = [
            two_phases(folder / name, self.short, self.long, steps=(2, 2), deepspeed=name, **brief, optimizer=optimizer)
            for name, optimizer in (("zero0_bf16", {}), ("zero1_fp32", adam))
        ]
        # Only the second phase has a mask proposal.
        self.others[1] = changed(self.others[1], 1, masking={"strategy": "mapnet"})
        new = two_phases(folder / "new", self.short, self.long)
        finished = {
            "changed steps": changed(self.uninterrupted, 0, training={"steps": 7}),
            "changed batch": changed(self.uninterrupted, 0, batch={"global_size": 24}),
            "changed policy": changed(self.uninterrupted, 1, start={"moments": "zero"}),
            "changed order": {
                **self.uninterrupted,
                "phases": [{**self.uninterrupted["phases"][0], "name": "brief"}, self.uninterrupted["phases"][1]],
            },
        }
        fresh = {
            "other tokenizer": changed(new, 1, data={"path": str(other)}, evaluation={"every_steps": 0}),
            "long sequences": {**new, "model": {**new["model"], "max_position_embeddings": 48}},
            "no corpus": changed(new, 1, data={"path": str(folder / "nothing")}),
            "no held-out": changed(new, 1, data={"path": str(other)}),
            "does not divide": changed(new, 1, batch={"global_size": 6}),
        }
        lives = {
            "uninterrupted": Life([(self.uninterrupted, None)]),
            "killed in phase one": Life([(killed, None)], kill=("step", 6)),
            "killed at the boundary": Life([(killed, "auto")], kill=("saved", SHORT)),
            "refused at the boundary": Life([({**killed, "seed": 1}, "auto")]),
            "killed before phase two saved": Life([(killed, "auto")], kill=("step", 10), delete=self.passing),
            "killed in phase two": Life([(killed, "auto")], kill=("step", 13)),
            "to the end": Life([(killed, "auto")]),
            "others": Life([(values, None) for values in (*self.policies.values(), *self.others)]),
            "faults": Life([(v, None) for v in fresh.values()] + [(v, "auto") for v in finished.values()]),
        }
        ranks = run_ranks(live, 2, list(lives.values()), free_ports(len(lives)), timeout=400)
        self.answers: dict[str, list[Any]] = {name: [rank[i] for rank in ranks] for i, name in enumerate(lives)}
        self.faults = {n: [rank[i] for rank in self.answers["faults"]] for i, n in enumerate([*fresh, *finished])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("phases"))


def test_resume_is_exact_wherever_killed(runs: Runs) -> None:
    """SIGKILL in phase one, at the boundary, before phase two has saved and after: all metrics are bit-identical.

    After the boundary the first phase's corpus is deleted.
    """
    assert runs.answers["uninterrupted"] == [[None], [None]]
    for name in ("in phase one", "at the boundary", "before phase two saved", "in phase two"):
        assert runs.answers[f"killed {name}"] == ["killed", "killed"]
    assert not runs.passing.exists()
    assert runs.answers["to the end"] == [[None], [None]]
    uninterrupted, killed = runs.folder / "uninterrupted", runs.folder / "killed"
    figures = (
        "step",
        "phase",
        "samples",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "data_digest",
        "mask_digest",
        "mapnet_loss",
    )
    assert column(killed, *figures) == column(uninterrupted, *figures)
    held_out = [[line.get("held_out_loss") for line in metrics(run)] for run in (killed, uninterrupted)]
    assert held_out[0] == held_out[1]
    weights = [load.read_weights(complete_checkpoints(run)[-1]) for run in (killed, uninterrupted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_mapnet_continues_over_the_boundary(runs: Runs) -> None:
    steps = {}
    for run in (runs.folder / "uninterrupted", runs.folder / "zero1_fp32"):
        for saved in complete_checkpoints(run):
            tensors = load.read_extra(saved, "mapnet.safetensors")
            steps[run.name, checkpoints.read_state(saved).step] = tensors and tensors["step"].item()
    assert steps == {
        ("uninterrupted", SHORT): SHORT,
        ("uninterrupted", SHORT + 4): SHORT + 4,
        ("uninterrupted", SHORT + LONG): SHORT + LONG,
        ("zero1_fp32", 2): None,
        ("zero1_fp32", 4): 2,
    }


def test_counters_continue_over_the_boundary(runs: Runs) -> None:
    lines = metrics(runs.folder / "uninterrupted")
    assert [line["step"] for line in lines] == list(range(1, SHORT + LONG + 1))
    assert [line["phase"] for line in lines] == ["short"] * SHORT + ["long"] * LONG
    assert [line["samples"] for line in lines] == [12 * (s + 1) for s in range(SHORT)] + [
        12 * SHORT + 8 * (s + 1) for s in range(LONG)
    ]
    tokens = 12 * 32 * SHORT
    assert (lines[SHORT - 1]["tokens"], lines[-1]["tokens"]) == (tokens, tokens + 8 * 64 * LONG)
    assert lines[SHORT]["tokens_per_second"] == pytest.approx(8 * 64 / lines[SHORT]["step_seconds"])
    assert [line["step"] for line in lines if "held_out_loss" in line] == [8, 10, 14], "also after each phase"
    saved = [p.name for p in complete_checkpoints(runs.folder / "uninterrupted")]
    assert saved == ["step-00000008", "step-00000012", "step-00000014"]


def test_plot_and_export(runs: Runs, tmp_path: Path) -> None:
    plot_loss(runs.folder / "uninterrupted" / METRICS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
    result = run_command("export", "--checkpoint", runs.folder / "killed", "--output", tmp_path / "model")
    assert result.returncode == 0, result.stderr


def reference(values: dict[str, Any], corpora: tuple[Path, Path], policy: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The two phases written out: one process, float64, LAMB from its formula."""
    config = RunConfig.model_validate(values)
    manifest = Corpus(corpora[0]).manifest
    bert = transformers_config(config.model, vocab_size=manifest.vocab_size, pad_id=manifest.special_tokens.pad)
    torch.manual_seed(hashing.fold(hashing.fold(config.seed, 0)) >> 1)
    model = MaskedLanguageModel(bert).double().train()
    names, weights = zip(*model.named_parameters(), strict=True)
    decay = [0.01 if w.ndim >= 2 and not n.endswith("bias") else 0.0 for n, w in zip(names, weights, strict=True)]
    lamb = ReferenceLamb(list(weights), decay, lr=0.0, betas=(0.9, 0.999), eps=1e-6)
    rates = [line["lr"] for line in metrics(config.output_dir)]
    for index, path in enumerate(corpora):
        phase, corpus = config.phase(index), Corpus(path)
        if index:
            moments, step_counter = policy
            if moments == "zero":
                lamb.first, lamb.second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
            if step_counter == "zero":
                lamb.t = 0
        salt = [1] if index else []
        batches = Loader(
            corpus, seed=hashing.fold(config.seed, 1, *salt), global_size=phase.batch.global_size
        ).batches()
        masker = Masker.for_corpus(
            corpus.manifest, seed=hashing.fold(config.seed, 2, *salt), rate=phase.masking.rate, device="cpu"
        )
        for _ in range(phase.training.steps):
            masked = masker(next(batches))
            with torch.no_grad():
                for weight, exact in zip(weights, lamb.weights, strict=True):
                    weight.copy_(exact)
            gradients = torch.autograd.grad(weighted_loss(model, masked) / (masked.weights != 0).sum(), weights)
            gradients = [g.clone() for g in gradients]
            clip(gradients, 1.0)
            lamb.lr = [rates.pop(0)] * len(lamb.weights)
            lamb.step(gradients)
    return dict(zip(names, lamb.weights, strict=True))


def test_each_policy_is_its_reference(runs: Runs) -> None:
    assert runs.answers["others"] == [[None] * (len(POLICIES) + len(runs.others))] * 2
    results, errors = {}, {}
    for policy, values in runs.policies.items():
        expected = reference(values, (runs.short, runs.long), policy)
        found = load.read_weights(complete_checkpoints(Path(values["output_dir"]))[-1])
        results[policy] = torch.cat([found[n.removeprefix("mlm.")].flatten() for n in expected])
        exact = torch.cat([w.flatten() for w in expected.values()])
        errors[policy] = (results[policy] - exact).norm() / exact.norm()
    assert max(errors.values()) < 1e-5, errors
    for one, other in itertools.combinations(POLICIES, 2):
        distance = (results[one] - results[other]).norm() / results[one].norm()
        # LAMB's trust ratio cancels most of the bias correction, so two of the policies lie close together.
        assert distance > 10 * max(errors.values()), (one, other, "the policies must be distinguishable")


def test_a_phase_starts_under_other_stages_and_optimizers(runs: Runs) -> None:
    for values in runs.others:
        assert column(Path(values["output_dir"]), "step", "phase")[2:] == [(3, "long"), (4, "long")]


EXPECTED = {
    "other tokenizer": "ConfigError: phase 'long': .*tokenizer .* differs from .*build the corpora of all phases",
    "long sequences": "ConfigError: phase 'long': .*sequences of 64 tokens exceed model.max_position_embeddings 48",
    "no corpus": "CorpusError: phase 'long': .*nothing: no such folder",
    "no held-out": "ConfigError: phase 'long': .*no held-out corpus",
    "does not divide": "ConfigError: phase 'long': batch.global_size 6 is not a multiple of batch.micro_size 2 ×",
    "changed steps": "CheckpointError: phase 'short' is finished: 8 steps of 12 sequences were trained, .* has 7 of 12",
    "changed batch": "CheckpointError: phase 'short' is finished: .* has 8 of 24",
    "changed policy": "CheckpointError: .*start.moments was 'keep', is 'zero'",
    "changed order": "CheckpointError: step 14 was reached in phases short, long, the configuration has brief, long",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_one_error_before_training_starts(runs: Runs, name: str) -> None:
    said = runs.faults[name]
    assert all(said), f"a rank continued: {said}"
    assert sum(not str(text).startswith("RemoteError: rank ") for text in said) == 1, said
    assert any(re.search(EXPECTED[name], str(text), re.DOTALL) for text in said), said
    assert not (runs.folder / "new").exists()


def test_at_the_boundary_settings_of_the_run_are_checked(runs: Runs) -> None:
    said = [answer[0] for answer in runs.answers["refused at the boundary"]]
    assert any(re.search("CheckpointError: .*belongs to another run: seed was 0, is 1", str(text)) for text in said)
