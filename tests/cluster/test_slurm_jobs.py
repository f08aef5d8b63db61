"""Trainings as Slurm jobs on a real cluster: time limit, preemption, cancelling, lost nodes, partitioned ranks.

Compared with an uninterrupted run: `srun` of the trainer, without a script.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints, read_state
from tests.cluster.slurm_cluster import NODES, Cluster, dump
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics
from tests.support.corpora import make_corpus

STEPS, EVERY = 120, 10
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
DIGESTS = ("step", "samples", "data_digest", "mask_digest")


def config(folder: Path, name: str) -> Path:
    sections = {
        # Dropout is drawn per rank; without it losses hardly depend on the number of ranks.
        "model": NO_DROPOUT,
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": EVERY, "keep_last": 2},
    }
    return dump(folder / f"{name}.yaml", configuration(folder / name, folder / "corpus", steps=STEPS, **sections))


def submit(slurm: Cluster, file: Path, nodes: str, *more: object) -> str:
    text = slurm.tool(
        *("slurm", "--config", file, "--nodes", nodes, "--gpus-per-node", 0, "--tasks-per-node", 1, "--submit"), *more
    ).stdout
    return text.split("job.sbatch: job ")[1].split(";")[0]


@pytest.fixture(scope="module")
def folder(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a run that is never stopped, "uninterrupted"."""
    folder = tmp_path_factory.mktemp("jobs")
    make_corpus(folder / "corpus", rows=200, words=20)
    train = (sys.executable, "-m", "maskvr_ds.train", "--config", config(folder, "uninterrupted"))
    slurm.run("srun", "--nodes=2", "--ntasks=2", *train, timeout=300)
    state = read_state(complete_checkpoints(folder / "uninterrupted")[-1])
    assert (state.step, state.world_size) == (STEPS, 2), "tasks of an srun are ranks of one world"
    return folder


def test_node_names_that_do_not_resolve(slurm: Cluster, folder: Path) -> None:
    """Slurm knows the nodes' addresses."""
    file = config(folder, "nameless")
    hosts = slurm.folder / "hosts"
    known = hosts.read_text(encoding="utf-8")
    hosts.write_text(known.replace(" n1 n2", ""), encoding="utf-8")
    try:
        assert slurm.run("getent", "ahosts", "n1", check=False).returncode != 0
        job = submit(slurm, file, "2")
        slurm.wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "ended")
    finally:
        hosts.write_text(known, encoding="utf-8")
    run = folder / "nameless"
    assert slurm.state(job) == "COMPLETED", log(run, job)
    assert "on n1 n2, master 127.0.0.1:" in log(run, job)
    assert column(run, *FIGURES) == column(folder / "uninterrupted", *FIGURES)


def log(run: Path, job: str) -> str:
    path = run / "slurm" / f"{job}.log"
    return path.read_text() if path.is_file() else ""


def wait_for(slurm: Cluster, job: str, run: Path, start: int, *, more: int) -> None:
    """Wait until this start of the job runs and `more` steps are logged."""

    def there() -> bool:
        text = log(run, job)
        assert not re.search(r"start \d+: error", text), text
        return f"job {job}, start {start}: on " in text and len(metrics(run)) >= more

    slurm.wait_until(there, f"start {start} of job {job} at step {more}", every=0.1)


def wait_state(slurm: Cluster, job: str, run: Path, state: str) -> None:
    try:
        slurm.wait_until(lambda: slurm.state(job) == state, f"job {job} {state}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log(run, job)}") from None


@contextmanager
def frozen(processes: list[int]) -> Iterator[None]:
    """SIGSTOP the processes inside the block and SIGCONT them after it, as in a network failure."""
    assert processes
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def ranks(slurm: Cluster, *nodes: str) -> list[int]:
    """Process ids of the ranks on these nodes (default: on both)."""
    found = [pid for node in nodes or NODES for pid in slurm.processes(node, "-m maskvr_ds.train")]
    return [pid for pid in found if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() != "srun"]


def test_limit_preemption_and_scancel(slurm: Cluster, folder: Path) -> None:
    """SIGUSR1 as before the time limit; preempted; cancelled and resubmitted: bit-identical."""
    file, run = config(folder, "interrupted"), folder / "interrupted"
    job = submit(slurm, file, "2")
    wait_for(slurm, job, run, 0, more=15)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until(lambda: "requeuing" in log(run, job), "requeued by its own script")
    saved = json.loads((run / "stopped.json").read_text())["step"]
    assert complete_checkpoints(run)[-1].name == f"step-{saved:08d}", "nothing is lost"

    wait_for(slurm, job, run, 1, more=saved + EVERY + 1)
    # The run must not end before.
    with frozen(ranks(slurm)):
        status = json.loads(slurm.tool("status", run, "--json").stdout)[0]
        assert (status["state"], status["job"], status["restarts"], status["ranks"]) == ("running", job, 1, 2)
        assert status["nodes"] == "n[1-2]"
        urgent = slurm.sbatch("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
        wait_state(slurm, urgent, run, "COMPLETED")

    at = len(metrics(run))
    wait_for(slurm, job, run, 2, more=at + 1)
    with frozen(ranks(slurm)):
        slurm.run("scancel", job)
        wait_state(slurm, job, run, "CANCELLED")
    slurm.wait_idle()
    assert (slurm.state(job), slurm.job(job)["Restarts"]) == ("CANCELLED", "2")
    assert "requeuing" in log(run, job).split("start 1: on ")[0]
    assert "requeuing" not in log(run, job).split("start 1: on ")[1], "only Slurm may start it again"
    assert len(metrics(run)) < STEPS

    again = slurm.sbatch(run / "slurm" / "job.sbatch")
    wait_state(slurm, again, run, "COMPLETED")
    assert "completed" in log(run, again)
    assert column(run, *FIGURES) == column(folder / "uninterrupted", *FIGURES)
    ours, theirs = (read_weights(complete_checkpoints(r)[-1]) for r in (run, folder / "uninterrupted"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_lost_nodes_and_a_partitioned_rank(slurm: Cluster, folder: Path) -> None:
    """Of two nodes one crashes: continues on the other. That one is lost while its rank lives: continues elsewhere."""
    file, run = config(folder, "bereft"), folder / "bereft"
    job = submit(slurm, file, "1-2")
    wait_for(slurm, job, run, 0, more=EVERY + 2)
    slurm.crash("n2")

    wait_for(slurm, job, run, 1, more=len(metrics(run)) + EVERY)
    (rank,) = ranks(slurm, "n1")
    # The script and srun too: a node without a network would not hear of the job's end.
    others = [pid for pid in slurm.processes("n1", "") if pid != rank]
    with frozen(others):
        with frozen([rank]):
            assert slurm.job(job)["NodeList"] == "n1"
            slurm.revive("n2")
            slurm.wait_until(lambda: slurm.node_states()["n2"] == "idle", "n2 is back")
            slurm.kill_daemon("n1")
            # The second or third start: an old srun may still cancel the new start's step, which has the same number.
            slurm.wait_until(lambda: json.loads((run / "owner.json").read_text())["restarts"] >= 2, "another owner")
            assert slurm.job(job)["NodeList"] == "n2"
        # The old rank trains up to its next checkpoint.
        slurm.wait_until(lambda: not Path(f"/proc/{rank}").exists(), "the old rank's end", timeout=120)
    wait_state(slurm, job, run, "COMPLETED")
    assert "this job no longer owns the run and stops writing to it" in log(run, job)
    assert [read_state(folder).world_size for folder in complete_checkpoints(run)] == [1, 1]
    assert column(run, *DIGESTS) == column(folder / "uninterrupted", *DIGESTS)
    ours, theirs = (torch.tensor(column(r, "loss")) for r in (run, folder / "uninterrupted"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    slurm.revive("n1")
    slurm.wait_idle()


def test_a_node_on_which_the_ranks_fail_twice_is_excluded(slurm: Cluster, folder: Path) -> None:
    """Its rank is killed at two checkpoints; the third start does without the node."""
    file, run = config(folder, "unlucky"), folder / "unlucky"
    job = submit(slurm, file, "1-2")
    for start in (0, 1):
        wait_for(slurm, job, run, start, more=len(metrics(run)) + EVERY + 1)
        assert slurm.job(job)["NodeList"] == "n[1-2]"
        for pid in ranks(slurm, "n2"):
            os.kill(pid, signal.SIGKILL)
        slurm.wait_until(lambda n=start + 1: log(run, job).count("the ranks failed on n2, checkpoint: ") == n, "named")
    slurm.wait_until(lambda: "n2 is excluded from now on: the ranks failed there twice" in log(run, job), "excluded")
    slurm.wait_until(lambda: f"job {job}, start 2: on " in log(run, job), "started without it")
    assert f"job {job}, start 2: on n1, master" in log(run, job)
    assert slurm.job(job)["ExcNodeList"] == "n2"
    wait_state(slurm, job, run, "COMPLETED")
    assert column(run, *DIGESTS) == column(folder / "uninterrupted", *DIGESTS)
    slurm.wait_idle()
