"""One run on changing numbers of ranks, ZeRO stages and accumulation: the same data and masks, the same losses."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskvr_ds import elastic
from maskvr_ds.checkpoint import complete_checkpoints, read_weights
from tests.distributed.ranks import run_ranks
from tests.distributed.training import (
    NO_DROPOUT,
    Life,
    column,
    configuration,
    free_ports,
    live,
    metrics,
    train_all,
)
from tests.support.corpora import make_corpus

EVERY, STEPS = 3, 12
ADAM = {"name": "adam", "lr": 3e-3}
# Run → (stage on 2 ranks, then on 1, 3 and 2 again; precision; sections).
RUNS: dict[str, tuple[tuple[int, int, int, int], str, dict[str, Any]]] = {"lamb": ((2, 1, 3, 2), "fp32", {})}
ALL = {
    **RUNS,
    "stage 1": ((1, 3, 1, 1), "fp32", {}),
    "stage 3": ((3, 3, 2, 3), "fp32", {}),
    "adam": ((2, 1, 3, 2), "fp32", {"optimizer": ADAM}),
    "bf16": ((1, 2, 3, 1), "bf16", {}),
    "mapnet": ((2, 1, 3, 2), "fp32", {"masking": {"strategy": "mapnet"}, "mapnet": {"hidden": 32, "layers": 1}}),
}


class Crossed:
    def __init__(self, folder: Path, runs: dict[str, Any]) -> None:
        self.folder, self.runs = folder, runs
        self.corpus = make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
        fp16 = "fp16" in runs
        whole = [(self.values(name, 0, STEPS, "whole"), None) for name in runs]
        begin = [(self.values(name, 0, EVERY), None) for name in runs]
        assert run_ranks(train_all, 2, whole + begin, fp16, timeout=900) == [[None] * 2 * len(runs)] * 2
        # Killed when the conversion is all but renamed, then done anew.
        ones = [(self.values(name, 1, 2 * EVERY), "auto") for name in runs]
        lives = [Life(ones[:1], kill=("converted", 0)), *(Life([one]) for one in ones)]
        if fp16:
            lives = lives[:1]
        (answers,) = run_ranks(live, 1, lives, free_ports(len(lives)), timeout=900)
        self.killed = answers[0]
        if fp16:
            assert run_ranks(train_all, 1, ones, True, timeout=900) == [[None] * len(runs)]
        else:
            assert answers[1:] == [[None]] * len(runs)
        for phase, world_size in ((2, 3), (3, 2)):
            jobs = [(self.values(name, phase, (phase + 1) * EVERY), "auto") for name in runs]
            assert run_ranks(train_all, world_size, jobs, fp16, timeout=900) == [[None] * len(runs)] * world_size

    def values(self, name: str, part: int, steps: int, where: str = "crossed") -> dict[str, Any]:
        stages, precision, sections = self.runs[name]
        return configuration(
            self(name, where),
            self.corpus,
            steps=steps,
            model=NO_DROPOUT,
            deepspeed=f"zero{stages[part]}_{precision}",
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": EVERY, "keep_last": 9},
            # Accumulation 3, 4, 1, 6.
            batch={"global_size": 12, "micro_size": (2, 3, 4, 1)[part]},
            training={"steps": steps, "schedule_steps": STEPS},
            **sections,
        )

    def __call__(self, name: str, where: str = "crossed") -> Path:
        return self.folder / f"{name}-{where}"


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Crossed:
    return Crossed(tmp_path_factory.mktemp("elastic"), ALL if request.config.getoption("--whole-survival") else RUNS)


def test_data_and_masks_are_those_of_the_undisturbed_run(crossed: Crossed) -> None:
    for name in crossed.runs:
        figures = ("step", "samples", "data_digest") if name == "mapnet" else ("step", "samples", "mask_digest")
        found = column(crossed(name), *figures, "lr")
        assert len(found) == STEPS
        assert found == column(crossed(name, "whole"), *figures, "lr"), name


def test_losses_and_norms_are_those_of_the_undisturbed_run(crossed: Crossed) -> None:
    for name, (_, precision, _) in crossed.runs.items():
        # In half precision gradients are summed and rounded in another order.
        tolerance = 1e-4 if precision == "fp32" else 5e-3
        pairs = list(zip(metrics(crossed(name)), metrics(crossed(name, "whole")), strict=True))
        differences = {key: max(abs(one[key] - other[key]) for one, other in pairs) for key in ("loss", "grad_norm")}
        print(name, differences)
        assert max(differences.values()) <= tolerance, (name, differences)


def test_weights_are_those_of_the_undisturbed_run(crossed: Crossed) -> None:
    for name, (_, precision, sections) in crossed.runs.items():
        if precision != "fp32" or sections:
            continue
        ours, theirs = (read_weights(complete_checkpoints(crossed(name, where))[-1]) for where in ("crossed", "whole"))
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5, name


def test_a_killed_conversion_has_never_begun(crossed: Crossed) -> None:
    assert crossed.killed == "killed"
    left = {p.name for p in (crossed(next(iter(crossed.runs))) / "checkpoints").iterdir() if p.name.startswith(".")}
    assert not left, "the next save removes what conversions leave"


def test_a_conversion_holds_what_the_ranks_held(crossed: Crossed, tmp_path: Path) -> None:
    """Against the export's weights, which are gathered in another way; and it is made once."""
    for name, (stages, precision, _) in crossed.runs.items():
        if stages[0] == 0 or precision != "fp32":
            continue
        folder = complete_checkpoints(crossed(name))[0]
        state = elastic.manifest.read_state(folder)
        run = tmp_path / name
        universal = elastic.convert(run, folder, state, state)
        tensors = load_file(universal / elastic.TENSORS)
        for key, weight in read_weights(folder).items():
            assert torch.equal(tensors[f"fp32/mlm.{key}"], weight), key
            assert tensors[f"exp_avg/mlm.{key}"].shape == tensors[f"exp_avg_sq/mlm.{key}"].shape == weight.shape
        content = elastic.manifest.read_manifest(universal)
        assert (content["step"], content["counters"]["global_steps"]) == (EVERY, EVERY)
        before = (universal / elastic.TENSORS).stat().st_mtime_ns
        assert elastic.convert(run, folder, state, state) == universal
        assert (universal / elastic.TENSORS).stat().st_mtime_ns == before, "found, not made again"
        (universal / elastic.TENSORS).write_bytes(b"half")
        elastic.convert(run, folder, state, state)
        assert not elastic.manifest.faults(universal), "made again where it was damaged"
        shutil.rmtree(run)


def test_what_is_not_proven_is_refused(tmp_path: Path) -> None:
    state = elastic.CheckpointState(
        step=1, samples=1, world_size=2, zero_stage=2, dtype="float32", partitions=[4], identity={}
    )
    one = replace(state, world_size=1)
    for was, now, offloaded, words in (
        (state, replace(one, zero_stage=0), False, "from ZeRO stage 2 to 0"),
        (replace(state, zero_stage=0), one, False, "from ZeRO stage 0 to 2"),
        (replace(state, dtype="float16"), replace(one, dtype="float16"), False, "in fp16"),
        (state, one, True, "with the optimizer on the CPU"),
    ):
        with pytest.raises(elastic.CheckpointError, match=words):
            elastic.convert(tmp_path, tmp_path, was, now, offloaded=offloaded)
    assert list(tmp_path.iterdir()) == []
