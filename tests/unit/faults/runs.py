"""Faults of runs, checkpoints and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from maskvr_ds.run_folder import checkpoints
from tests.unit.faults.case import Fault, cuts, flips, removes, writes

VERIFY = "maskvr checkpoint verify run"
TRAIN = "maskvr train --config run.yaml --num-gpus 1"
LAST = "run/checkpoints/step-00000004"


def copied_step(folder: Path) -> None:
    shutil.copytree(folder / "run/checkpoints/step-00000002", folder / "run/checkpoints/step-00000099")


def deep(folder: Path) -> None:
    (folder / LAST / "checkpoint.json").write_text("[" * 100_000, encoding="utf-8")


def loop(folder: Path) -> None:
    path = folder / LAST / "weights.safetensors"
    path.unlink()
    path.symlink_to(path.name)


def foreign_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("keep me", encoding="utf-8")


def not_finite(folder: Path) -> None:
    """A checkpoint as a diverged run of another program would write it: intact, and with a NaN."""
    from safetensors.numpy import load_file, save_file

    checkpoint = folder / LAST
    tensors = load_file(checkpoint / "weights.safetensors")
    min(tensors.items())[1].flat[0] = float("nan")
    save_file(tensors, checkpoint / "weights.safetensors")
    content = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    del content["sha256"], content["files"]
    (checkpoint / "checkpoint.json").unlink()
    checkpoints.write_manifest(checkpoint, content)


# A start that is refused has been the owner of the run for a moment.
OWNER = ("run/owner.json", "run/heartbeats/")

FAULTS = [
    Fault(
        "a flipped bit in the weights",
        VERIFY,
        "run/checkpoints/step-00000004/weights.safetensors: the SHA-256 differs from checkpoint.json; use"
        " an earlier checkpoint",
        prepare=flips(f"{LAST}/weights.safetensors"),
    ),
    Fault(
        "weights that are cut",
        VERIFY,
        "run/checkpoints/step-00000004/weights.safetensors: 9224 bytes expected, 9223 found; use an earlier checkpoint",
        prepare=cuts(f"{LAST}/weights.safetensors"),
    ),
    Fault(
        "weights that are gone",
        VERIFY,
        "run/checkpoints/step-00000004/weights.safetensors: missing; use an earlier checkpoint",
        prepare=removes(f"{LAST}/weights.safetensors"),
    ),
    Fault(
        "a link that leads to itself",
        VERIFY,
        "run/checkpoints/step-00000004/weights.safetensors: cannot be read (Symlink loop from "
        "'…run/checkpoints/step-00000004/weights.safetensors'); use an earlier checkpoint",
        prepare=loop,
    ),
    Fault(
        "an empty checkpoint.json",
        VERIFY,
        "run/checkpoints/step-00000004/checkpoint.json: damaged (not valid JSON); use an earlier checkpoint",
        prepare=writes(f"{LAST}/checkpoint.json", ""),
    ),
    Fault(
        "a list in checkpoint.json",
        VERIFY,
        "run/checkpoints/step-00000004/checkpoint.json: damaged (not a JSON object); use an earlier checkpoint",
        prepare=writes(f"{LAST}/checkpoint.json", "[]"),
    ),
    Fault(
        "deep JSON in checkpoint.json",
        VERIFY,
        "run/checkpoints/step-00000004/checkpoint.json: damaged (not valid JSON); use an earlier checkpoint",
        prepare=deep,
    ),
    Fault(
        "a checkpoint under another step's name",
        VERIFY,
        "run/checkpoints/step-00000099: holds step 2, another than its name says; remove or rename it",
        prepare=copied_step,
    ),
    Fault(
        "no run there", "maskvr checkpoint verify texts", "texts: contains no checkpoint (nor does its checkpoints/)"
    ),
    Fault(
        "no checkpoint of that step",
        "maskvr checkpoint inspect run/checkpoints/step-00000003",
        "run/checkpoints/step-00000003: no such folder; expected a run folder or a checkpoint folder",
    ),
    Fault(
        "a folder that is not a run's",
        f"{TRAIN} --set output_dir=mine",
        "output_dir mine: not empty and not a run's folder (neither owner.json nor checkpoints/ of a run "
        "is there), so its files are not overwritten; choose a new folder",
        prepare=foreign_folder,
    ),
    Fault(
        "a run that exists, without --resume",
        TRAIN,
        "output_dir run is not empty; add --resume auto to continue, or choose another folder",
    ),
    Fault(
        "resume of nothing",
        f"{TRAIN} --set output_dir=new --resume nowhere",
        "nowhere: no such folder",
        own_process=True,
    ),
    Fault(
        "resume with other masks",
        f"{TRAIN} --resume auto --set training.steps=6 --set masking.rate=0.3",
        "run/checkpoints/step-00000004: belongs to another run: masking.rate was 0.15, is 0.3. Restore "
        "these settings to resume, or start a new run in another output_dir, …",
        may_change=OWNER,
        own_process=True,
    ),
    Fault(
        "resume with another corpus",
        f"{TRAIN} --resume auto --set training.steps=6 --set data.path=other",
        "run/checkpoints/step-00000004: belongs to another run: the corpus has other shards "
        "(data.path, data.mixture). Restore these settings to resume, or start a new run in another output_dir, "
        "without --resume; from these weights if you export them (`maskvr export`, model.initialize_from)",
        may_change=OWNER,
        own_process=True,
    ),
    Fault(
        "a damaged shard that is found while training runs",
        f"{TRAIN} --set output_dir=new --set data.verify=background",
        "corpus/shard-00000.arrow: sha256 … expected, … found: the file was modified or damaged. Copy it again or "
        "build the corpus again. Found at step …, in the background (data.verify: background): no checkpoint was saved "
        "since this job started. …",
        "the run ends before its first checkpoint",
        may_change=("new/",),
        own_process=True,
        prepare=flips("corpus/shard-00000.arrow", 6000),
    ),
    Fault(
        "resume of a finished run",
        f"{TRAIN} --resume auto",
        "run: trained to step 4 already, the configuration has 4 steps; nothing to do. To train further, "
        "set training.steps higher",
        "nothing is trained",
        0,
        may_change=(*OWNER, "run/completed.json"),
        own_process=True,
    ),
    Fault(
        "more ranks than the machine bears",
        "maskvr train --config run.yaml --num-gpus 2000 --set output_dir=new",
        "argument --num-gpus: '2000': expected an integer from 1 to 1,024",
        status=2,
    ),
    Fault(
        "export to an existing folder",
        "maskvr export --checkpoint run --output texts",
        "texts exists and is not an empty folder; choose another --output",
    ),
    Fault(
        "export to the current folder",
        "maskvr export --checkpoint run --output .",
        ". exists and is not an empty folder; choose another --output",
    ),
    Fault(
        "export to a folder below a file",
        "maskvr export --checkpoint run --output run.yaml/out",
        "run.yaml/out: …/run.yaml is a file, a folder expected; choose another --output",
    ),
    Fault(
        "an evaluation whose figures would replace a folder",
        "maskvr evaluate run --tasks mlm --data corpus --output texts",
        "--output texts: is a folder, a file expected; choose another",
    ),
    Fault(
        "a plan's picture in a folder that does not exist",
        "maskvr plan --config run.yaml --nodes 1 --gpus-per-node 1 --gpu h100 --plot none/plan.png",
        "--plot none/plan.png: none is no folder; create it, or choose another",
    ),
    Fault(
        "export of damaged weights",
        f"maskvr export --checkpoint {LAST} --output out",
        "run/checkpoints/step-00000004/weights.safetensors: the SHA-256 differs from checkpoint.json; use"
        " an earlier checkpoint",
        prepare=flips(f"{LAST}/weights.safetensors"),
    ),
    Fault(
        "export of no checkpoint",
        "maskvr export --checkpoint texts --output out",
        "texts: contains no complete checkpoint (nor does its checkpoints/)",
    ),
    Fault("a plot of no run", "maskvr plot texts", "texts: contains no metrics.jsonl; expected a run folder"),
    Fault("the health of no run", "maskvr health texts", "texts: contains no metrics.jsonl; expected a run folder"),
    Fault(
        "the health of a run that has not started",
        "maskvr health run",
        "run/metrics.jsonl: has no step yet; judge the run after its first steps",
        prepare=writes("run/metrics.jsonl", ""),
    ),
    Fault(
        "the health of three runs",
        "maskvr health run run run",
        "3 runs given: expected one, or two to compare",
    ),
    Fault(
        "the health of a checkpoint that is not there",
        "maskvr health run --at 3",
        "run: no complete checkpoint of step 3; there are those of 2, 4",
        own_process=True,
    ),
    Fault(
        "the health of a damaged checkpoint",
        "maskvr health run --at newest",
        "run/checkpoints/step-00000004/weights.safetensors: the SHA-256 differs from checkpoint.json; use"
        " an earlier checkpoint",
        prepare=flips(f"{LAST}/weights.safetensors"),
        own_process=True,
    ),
    Fault(
        "the health of weights that are not finite",
        "maskvr health run --at newest",
        "run/checkpoints/step-00000004/weights.safetensors: 1 tensor holds NaN or infinity (…); use an earlier"
        " checkpoint",
        prepare=not_finite,
        own_process=True,
    ),
    Fault(
        "the health of a checkpoint on no corpus",
        "maskvr health run --at newest --data texts",
        "texts/manifest.json: not found. This is not a corpus, or its build has not finished: rerun the build command",
        own_process=True,
    ),
    Fault(
        "rows for the health of records",
        "maskvr health run --rows 4",
        "--rows is an option of --at and --at-init, and records need no rows",
    ),
    Fault(
        "a run and --at-init",
        "maskvr health run --at-init run.yaml",
        "--at-init judges a configuration, not a run: give no RUN, --at or --plot with it",
    ),
    Fault(
        "heads of no model",
        "maskvr attention texts --data corpus",
        "texts: has no config.json; save the model to it with save_pretrained",
        own_process=True,
    ),
    Fault(
        "heads on a corpus of no kind",
        "maskvr attention run --data texts",
        "texts/manifest.json: not found. This is not a corpus, or its build has not finished: rerun the build command",
        own_process=True,
    ),
    Fault(
        "heads of weights that are not finite",
        "maskvr attention run --data corpus",
        "run/checkpoints/step-00000004/weights.safetensors: 1 tensor holds NaN or infinity (…); use an earlier"
        " checkpoint",
        prepare=not_finite,
        own_process=True,
    ),
    Fault(
        "a pruned model with no head pruned",
        "maskvr attention run --data corpus --export-pruned pruned",
        "--export-pruned saves the model without the heads of --prune: give --prune N",
    ),
    Fault(
        "a picture of the health of two runs",
        "maskvr health run run --plot health.png",
        "--plot draws one run; give one RUN",
    ),
    Fault(
        "a line of metrics.jsonl that is damaged",
        "maskvr plot run",
        "run/metrics.jsonl: 1 damaged lines are skipped, the first is line 1",
        "the plot is made without the line",
        0,
        may_change=("run/loss.png",),
        own_process=True,
        prepare=writes("run/metrics.jsonl", '{"step": 1, "loss": \n'),
    ),
]
