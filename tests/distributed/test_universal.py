"""DeepSpeed's universal checkpoints hold the full state of `Lamb` and `StableAdamW`: a run continues on other ranks."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskvr_ds.runtime import distributed
from tests.distributed import trajectories
from tests.distributed.ranks import run_ranks
from tests.distributed.trajectories import CLIP, LOUDER, Run

SAVED_AT, STEPS = 5, 10
CASES = [(stage, name) for stage in (1, 2, 3) for name in ("paper", "stable_adamw")]


Case = tuple[int, str]


def place(folder: Path, case: Case) -> Path:
    return folder / f"{case[1]}-{case[0]}"


def first_half(folder: Path) -> dict[Case, dict[str, np.ndarray]]:
    """(stage, optimizer) → fp32 weights after STEPS steps; a checkpoint of SAVED_AT steps under its own folder."""
    distributed.initialize()
    results = {}
    for case in CASES:
        engine = trajectories.make_engine(Run(case[0], "fp32", CLIP, 2, optimizer=case[1]))
        for step, (input_ids, labels) in enumerate(zip(*trajectories.batches(STEPS), strict=True)):
            if step == SAVED_AT:
                engine.save_checkpoint(str(place(folder, case)), tag="saved")
            trajectories.train(engine, input_ids, labels, LOUDER)
        results[case] = trajectories.masters_of(engine)
        engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def second_half(folder: Path) -> dict[Case, dict[str, np.ndarray]]:
    distributed.initialize()
    results = {}
    for case in CASES:
        engine = trajectories.make_engine(
            Run(case[0], "fp32", CLIP, 2, optimizer=case[1], more={"checkpoint": {"load_universal": True}})
        )
        for p in engine.basic_optimizer.state:
            p.data.add_(1.0)  # anything not restored would show
        engine.load_checkpoint(str(place(folder, case)), tag="universal")
        steps = {state["step"] for state in engine.basic_optimizer.state.values()}
        assert steps == {SAVED_AT}, f"{case}: step counters {steps}"
        for input_ids, labels in list(zip(*trajectories.batches(STEPS), strict=True))[SAVED_AT:]:
            trajectories.train(engine, input_ids, labels, LOUDER)
        results[case] = trajectories.masters_of(engine)
        engine.destroy()
    torch.distributed.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Case, dict[str, np.ndarray]]]:
    """Folder of converted checkpoints, and the weights of the uninterrupted runs on 2 ranks."""
    from deepspeed.checkpoint.ds_to_universal import main as convert

    folder = tmp_path_factory.mktemp("universal")
    weights = run_ranks(first_half, 2, folder)[0]
    for case in CASES:
        arguments: dict[str, Any] = {"input_folder": place(folder, case) / "saved", "num_extract_workers": 1}
        arguments |= {"output_folder": place(folder, case) / "universal", "num_merge_workers": 1}
        arguments |= {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        convert(Namespace(**{k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}))
    return folder, weights


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_world_size_continues(world_size: int, uninterrupted: tuple[Path, Any]) -> None:
    folder, expected = uninterrupted
    for weights in run_ranks(second_half, world_size, folder):
        for case in CASES:
            largest = max(float(np.abs(weights[case][n] - w).max()) for n, w in expected[case].items())
            print(f"{case}, 2 -> {world_size} ranks: {largest:.1e}")
            assert largest <= 1e-5
