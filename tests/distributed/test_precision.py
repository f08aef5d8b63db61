"""ZeRO stage × precision × CPU offload × ranks compute the same run; growth, overflow and resume of fp16's loss scale.

fp16 runs on any CPU here (`allow_fp16`). All runs of one world size share one launch.
"""

import json
import os
import shutil
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_configs
from maskvr_ds.checkpoint import export, load
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

STEPS, SAVED = 6, 3
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_SIZES = {1: 4, 2: 3, 3: 2}  # 12 sequences per step: accumulation 3, 2, 2
# Bounds of the differences to fp32 on one rank at stage 0: of the loss (about 3.2), relative of the gradient norm.
# Logits stay below 1, where one rounding is 2^-9 in bf16 (2e-3) and 2^-12 in fp16 (2.4e-4); the bounds allow two and a
# half. Measured: bf16 3.6e-3 (ZeRO 0, which sums gradients in bf16; 4e-4 at other stages), fp16 4e-5. A gradient
# accumulates the roundings of a full backward pass: 1.3e-2 (2e-3 at other stages), fp16 6e-4.
BOUNDS = {"fp32": (1e-4, 1e-4), "bf16": (5e-3, 2e-2), "fp16": (6e-4, 3e-3)}
# Name → (stage, precision, offload). fp16 at stage 0 is refused: see test_refused.py.
CASES = {
    f"zero{stage}-{precision}{'-offload' if offload else ''}": (stage, precision, offload)
    for stage, precision, offload in product(STAGES, PRECISIONS, (False, True))
    if stage > 0 or (precision != "fp16" and not offload)
}
# A loss scale that overflows in the first five of the six steps.
OVERFLOW = {"initial_scale_power": 22, "loss_scale_window": 1000}

# Runs that must stop: at the minimum loss scale, at a fixed one, and after the weights have diverged.
# Name → (fp16 section, other sections, start of the error).
STOPPING: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]], str]] = {
    "lowest": (
        {"initial_scale_power": 24, "min_loss_scale": 2.0**23},
        {},
        "gradients overflow at loss scale 8.38861e+06, the minimum",
    ),
    "fixed": ({"loss_scale": 2.0**24}, {}, "gradients overflow at loss scale 1.67772e+07, the minimum"),
    "diverged": (
        {},
        {"optimizer": {"lr": 1e3}, "divergence": {"enabled": False}},
        f"step {SAVED}: loss is nan; not saved",
    ),
    # With the divergence guard: the diverged weights are not saved either.
    "rolled back": (
        {},
        {"optimizer": {"lr": 1e3}, "divergence": {"max_rollbacks": 1}},
        "step 4: loss is nan, after 1 rollback to step 0",
    ),
}


def deepspeed_json(folder: Path, name: str, **fp16: Any) -> str:
    """Write a harder variant of a shipped configuration; returns the path of the JSON.

    Stage 3: no parameter stays gathered, not even between two passes, as in a model of billions; several sub-groups
    per group. fp16: the loss scale doubles in every other step.
    """
    stage, precision, offload = CASES[name]
    config = json.loads((Path(ds_configs.__file__).parent / f"zero{stage}_{precision}.json").read_text())
    zero = config["zero_optimization"]
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2, **fp16}
    path = folder / f"{name}-{'-'.join(map(str, fp16.values()))}.json"
    path.write_text(json.dumps(config))
    return str(path)


def interrupted(run: Path) -> Path:
    """A copy of a run as a kill after step SAVED + 1 would leave it."""
    copy = run.with_name(run.name + "-resumed")
    shutil.copytree(run, copy)
    for folder in complete_checkpoints(copy):
        if not folder.name.endswith(f"{SAVED:08d}"):
            shutil.rmtree(folder)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: SAVED + 1]))
    return copy


def train_and_resume(
    jobs: list[dict[str, Any]], resume: bool, more: list[tuple[dict[str, Any], str | None]]
) -> list[str | None]:
    """On a rank: train each job and, with `resume`, an `interrupted` copy of it; then `more`. Returns as `train_all`.

    A copy runs right after its original, and stage 3 last: it replaces torch's `linear` for the rest of the process by
    one that rounds differently in bf16 and fp16.
    """
    from maskvr_ds.runtime import distributed

    outcomes = []
    for values in jobs:
        outcomes += train_all([(values, None)], fp16=True)
        if resume:
            copy = distributed.run_on_rank0(lambda run=values["output_dir"]: interrupted(Path(run)))
            outcomes += train_all([({**values, "output_dir": str(copy)}, "auto")], fp16=True)
    return outcomes + train_all(more, fp16=True)


def train_and_die(values: dict[str, Any]) -> None:
    """On a rank: train; SIGKILL itself in the step after the first checkpoint."""
    from maskvr_ds import train

    run_step = train.run_step

    def deadly(*args: Any, **options: Any) -> Any:
        if complete_checkpoints(Path(values["output_dir"])):
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(*args, **options)

    train.run_step = deadly
    train_all([(values, None)], fp16=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(folder, rows=200, words=20, padded_last_row=True)
    # An odd number of rows: on two ranks one has more forward passes than the other.
    make_corpus(folder / "held_out", rows=21, words=20, seed=1)
    return folder


class Runs:
    """Folders of the runs by case and number of ranks; all runs are made once."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        for world_size in (1, 2, 3):
            jobs = []
            for name, (stage, precision, offload) in CASES.items():
                if world_size == 1 and not offload:
                    jobs.append(self.values(corpus, name, 1, f"zero{stage}_{precision}"))
                elif world_size == 2 or (world_size == 3 and stage == 3 and not offload):
                    jobs.append(self.values(corpus, name, world_size, deepspeed_json(folder, name)))
                if world_size == 2 and precision == "fp16" and not offload:
                    path = deepspeed_json(folder, name, **OVERFLOW)
                    jobs.append(self.values(corpus, f"{name}-overflow", 2, path))
            more = self.prepare_killed_and_stopping(corpus) if world_size == 2 else []
            outcomes = run_ranks(train_and_resume, world_size, jobs, world_size == 2, more, timeout=400)
            done = len(jobs) * (2 if world_size == 2 else 1)
            assert [of_rank[:done] for of_rank in outcomes] == [[None] * done] * world_size
            if world_size == 2:
                # Outcomes of `more` by rank.
                self.later = [of_rank[done:] for of_rank in outcomes]

    def prepare_killed_and_stopping(self, corpus: Path) -> list[tuple[dict[str, Any], str | None]]:
        """Start a run that kills itself; returns its resume, a resume that repartitions, and the runs of STOPPING."""
        path = deepspeed_json(self.folder, "zero3-fp16", **OVERFLOW)
        values = self.values(corpus, "zero3-fp16-killed", 2, path)
        with pytest.raises(RuntimeError, match=r"ended without an answer, exit codes .*-9"):
            run_ranks(train_and_die, 2, values)
        assert [p.name for p in complete_checkpoints(self("zero3-fp16-killed"))] == [f"step-{SAVED:08d}"]
        other_cut = {**values, "deepspeed": "zero3_fp16", "training": {"steps": STEPS + 1}}
        more: list[tuple[dict[str, Any], str | None]] = [(values, "auto"), (other_cut, "auto")]
        for name, (fp16, sections, _) in STOPPING.items():
            values = self.values(corpus, name, 2, deepspeed_json(self.folder, "zero2-fp16", **fp16))
            for section, settings in sections.items():
                values[section] = {**values.get(section, {}), **settings}
            more.append(({**values, "schedule": {"warmup_steps": 0}}, None))
        return more

    def values(self, corpus: Path, name: str, world_size: int, deepspeed: str) -> dict[str, Any]:
        return configuration(
            self(name, world_size),
            corpus,
            steps=STEPS,
            model=NO_DROPOUT,
            optimizer={"name": "lamb", "lr": 0.01},
            batch={"micro_size": MICRO_SIZES[world_size]},
            evaluation={"every_steps": STEPS, "rows": 21},
            checkpoint={"every_steps": SAVED},
            deepspeed=deepspeed,
        )

    def __call__(self, name: str, world_size: int = 2) -> Path:
        return self.folder / f"{name}-{world_size}"


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), corpus)


@pytest.mark.parametrize("name", CASES)
def test_all_combinations_compute_the_same_run(runs: Runs, name: str) -> None:
    reference = runs("zero0-fp32", 1)
    same = ("step", "samples", "predictions", "lr", "data_digest", "mask_digest", "skipped_updates")
    loss_bound, norm_bound = BOUNDS[CASES[name][1]]
    for world_size in (1, 2, 3):
        run = runs(name, world_size)
        if not run.exists():
            continue
        assert column(run, *same) == column(reference, *same)
        for expected, found in zip(metrics(reference), metrics(run), strict=True):
            where = (name, world_size, found["step"])
            assert found["loss"] == pytest.approx(expected["loss"], abs=loss_bound), where
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm_bound), where
            if "held_out_loss" in expected:
                assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=loss_bound), where


EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest", "skipped_updates")


OVERFLOWING = [f"zero{stage}-fp16-overflow" for stage in (1, 2, 3)]


@pytest.mark.parametrize("name", [*CASES, *OVERFLOWING])
def test_resume_is_exact(runs: Runs, name: str) -> None:
    uninterrupted = runs(name, 2)
    resumed = uninterrupted.with_name(uninterrupted.name + "-resumed")
    figures = (*EXACT, "loss_scale") if "fp16" in name else EXACT
    assert column(resumed, *figures) == column(uninterrupted, *figures)
    assert metrics(resumed)[-1]["held_out_loss"] == metrics(uninterrupted)[-1]["held_out_loss"]
    weights = [load.read_weights(complete_checkpoints(run)[-1]) for run in (uninterrupted, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", [name for name in CASES if "fp16" in name])
def test_gradients_are_unscaled_when_the_loss_scale_grows(runs: Runs, name: str) -> None:
    """`test_all_combinations_compute_the_same_run` compares the norms of these steps, which DeepSpeed would halve."""
    scales = [line["loss_scale"] for line in metrics(runs(name, 2))]
    assert scales == [256.0, 256.0, 256.0, 512.0, 512.0, 1024.0]


@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflow_halves_the_loss_scale_and_training_continues(runs: Runs, name: str) -> None:
    """SAVED is a step that overflowed, so `test_resume_is_exact` resumes right after one."""
    found = column(runs(name, 2), "loss_scale", "skipped_updates")
    skipped = found[-1][1]
    assert SAVED <= skipped < STEPS
    assert found == [(2.0 ** (22 - i), min(i + 1, skipped)) for i in range(STEPS)]
    norms = [line["grad_norm"] for line in metrics(runs(name, 2))]
    assert norms[:skipped] == [None] * skipped, "infinite"
    assert all(0.5 < norm < 5 for norm in norms[skipped:])
    before = runs(name, 2).with_name(f"{name}-2-resumed")
    at_start, at_end = (load.read_weights(folder) for folder in complete_checkpoints(before))
    assert not all(torch.equal(at_start[name], at_end[name]) for name in at_start), "the last step did train"


@pytest.mark.parametrize(
    "name", ["zero3-fp32", "zero3-bf16", "zero3-fp16", "zero1-fp16", "zero2-bf16-offload", "zero3-fp16-offload"]
)
def test_checkpoints_hold_masters_and_exports_compute_the_same(runs: Runs, name: str, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = complete_checkpoints(runs(name))[-1]
    weights = load.read_weights(folder)
    # DeepSpeed's own conversion of the partitions' files to full weights.
    masters = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    for parameter, weight in weights.items():
        assert torch.equal(weight, masters[f"mlm.{parameter}"]), parameter
        if "fp32" not in name:
            assert not torch.equal(weight, weight.to(DTYPES[CASES[name][1]]).float()), (
                f"{parameter}: only rounded values"
            )
    export.export(folder, tmp_path / "model")


@pytest.mark.parametrize("missing", ["zero_pp_rank_1_mp_rank_00_model_states.pt", "optim_states.pt"])
def test_a_checkpoint_without_a_rank_is_refused(runs: Runs, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "step-00000006"
    shutil.copytree(complete_checkpoints(runs("zero3-bf16"))[-1], folder)
    next(folder.glob(f"*{missing}")).unlink()
    with pytest.raises(checkpoints.CheckpointError, match=f"{missing}: missing; use an earlier checkpoint"):
        checkpoints.verify(folder)


def test_sigkill_at_stage_3_in_fp16_loses_nothing(runs: Runs) -> None:
    """Both ranks were killed in the step after a checkpoint that followed an overflow."""
    assert [of_rank[0] for of_rank in runs.later] == [None, None]
    uninterrupted, killed = runs("zero3-fp16-overflow"), runs("zero3-fp16-killed")
    assert column(killed, *EXACT, "loss_scale")[:STEPS] == column(uninterrupted, *EXACT, "loss_scale")


def test_other_partition_borders_are_converted(runs: Runs) -> None:
    """Stage 3 with another sub_group_size, in fp16: the loss scale continues too."""
    assert [of_rank[1] for of_rank in runs.later] == [None, None]
    line = metrics(runs("zero3-fp16-killed"))[STEPS]
    assert (line["step"], line["loss_scale"], line["skipped_updates"]) == (STEPS + 1, 2.0**17, 5)


@pytest.mark.parametrize(("number", "name"), enumerate(STOPPING, 2))
def test_fp16_that_cannot_continue_stops(runs: Runs, number: int, name: str) -> None:
    """All ranks stop, and nothing is saved."""
    for of_rank in runs.later:
        assert str(of_rank[number]).startswith(f"FloatingPointError: {STOPPING[name][2]}")
    assert not complete_checkpoints(runs(name))
