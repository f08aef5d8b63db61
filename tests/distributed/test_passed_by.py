"""A newest checkpoint that is intact by its hashes and cannot be loaded: `--resume auto` takes the one before it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import LAUNCHES, PROBE, ROLLBACKS, WEIGHTS
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.test_mixed_checkpoints import relist, take, take_all_but_the_probe
from tests.distributed.training import column, configuration, free_ports
from tests.support.corpora import make_corpus

EVERY, STEPS = 4, 11
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
NEWEST = "checkpoints/step-00000008"
# Case → (what the newest checkpoint has of another run, why it is refused).
PASSED_BY: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "other weights in DeepSpeed's files": (take("*.pt"), r"\(\*\.pt\) hold other weights than weights\.safetensors"),
    "other weights": (take(WEIGHTS), r"\(\*\.pt\) hold other weights than weights\.safetensors"),
    "all of another run but the probe": (take_all_but_the_probe, r"its weights are of another checkpoint"),
    "another probe": (take(PROBE), r"its weights are of another checkpoint"),
}


def values(folder: Path, name: str, steps: int, **more: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": EVERY}}
    sections |= {"divergence": {"max_skipped": 0}, "schedule": {"warmup_steps": 1, "decay": "constant"}}
    return configuration(folder / name, folder / "corpus", steps=steps, deepspeed="zero2_fp32", **sections, **more)


def other_version(run: Path) -> None:
    """The run was trained with another version of transformers."""
    lines = [json.loads(line) for line in (run / LAUNCHES).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["versions"]["transformers"] = "4.99.0"
    (run / LAUNCHES).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the runs; what the two ranks of each act said."""
    folder = tmp_path_factory.mktemp("passed")
    make_corpus(folder / "corpus", rows=200, words=20)
    first = [
        Act(values(folder, "run", 8)),
        Act(values(folder, "other", 8, seed=1)),
        Act(values(folder, "whole", STEPS)),
    ]
    assert run_ranks(play, 2, first, free_ports(3), timeout=600) == [["done"] * 3] * 2
    acts: dict[str, Act] = {}

    def copy(name: str, mix: Callable[[Path, Path], object], resume: str = "auto", **more: Any) -> None:
        shutil.copytree(folder / "run", folder / name)
        mix(folder / name / NEWEST, folder / "other" / NEWEST)
        relist(folder / name / NEWEST)
        fault = {key: more.pop(key) for key in list(more) if key in ("nan_step", "nan_once")}
        acts[name] = Act(values(folder, name, STEPS, **more), resume, error=folder / f"{name}.log", **fault)

    for name, (mix, _) in PASSED_BY.items():
        copy(name, mix)
    copy("named", take("*.pt"), resume=str(folder / "named"))
    copy("other settings", take("*.pt"), seed=2)
    copy("other versions", take_all_but_the_probe)
    other_version(folder / "other versions")
    copy("all of them", take("*.pt"))
    take("*.pt")(folder / "all of them/checkpoints/step-00000004", folder / "other/checkpoints/step-00000004")
    relist(folder / "all of them/checkpoints/step-00000004")
    copy("rolled back", take("*.pt"), nan_step=5, nan_once=True)
    said = run_ranks(play, 2, list(acts.values()), free_ports(len(acts)), timeout=900)
    return folder, {name: [of_rank[number] for of_rank in said] for number, name in enumerate(acts)}


@pytest.mark.parametrize("name", PASSED_BY)
def test_the_one_before_is_taken_with_a_warning(played: Any, name: str) -> None:
    folder, said = played
    assert said[name] == ["done", "done"]
    log = (folder / f"{name}.log").read_text(encoding="utf-8")
    run = re.escape(str(folder / name))
    why = PASSED_BY[name][1]
    (line,) = (line for line in log.splitlines() if "passed by" in line)
    assert re.search(f"{run}/{NEWEST}: .*{why}.*It is passed by: resuming from {run}/checkpoints/step-00000004$", line)
    assert "Traceback" not in log
    assert column(folder / name, *FIGURES) == column(folder / "whole", *FIGURES)
    # The step of the refused one was trained again, and saved again.
    assert [path.name for path in complete_checkpoints(folder / name)] == [
        path.name for path in complete_checkpoints(folder / "whole")
    ]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("named", r"step-00000008: .*Remove this folder to resume from the previous checkpoint"),
        ("other settings", r"step-00000008: belongs to another run: seed was 0, is 2"),
        ("other versions", r"step-00000008: .*\(transformers was 4\.99\.0, is .*\)\. Restore the installation, or"),
        ("all of them", r"none of step-00000004, step-00000008 is intact \(.*step-00000008: .*hold other weights"),
    ],
)
def test_otherwise_it_is_an_error(played: Any, name: str, pattern: str) -> None:
    folder, said = played
    own = [text for text in said[name] if not text.startswith("RemoteError: rank 0: ")]
    assert len(own) == 1, said[name]
    assert re.search(pattern, own[0]), own[0]
    assert len(column(folder / name, "step")) == 8
    assert [path.name for path in complete_checkpoints(folder / name)] == ["step-00000004", "step-00000008"]


def test_a_rollback_does_not_take_it_either(played: Any) -> None:
    folder, said = played
    assert said["rolled back"] == ["done", "done"]
    entries = json.loads((folder / "rolled back" / ROLLBACKS).read_text(encoding="utf-8"))
    assert entries[0]["step"] == 6
    assert {entry["to_step"] for entry in entries} == {4}
