"""Two ssh hosts with two ranks each, through pdsh: a run that suffers every fault, against an uninterrupted one."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from cluster.hosts.node import MARK
from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.status import EXIT_STOPPED
from tests.cluster import ssh_hosts
from tests.cluster.ssh_hosts import SshHosts, send, wait_until
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, environment
from tests.support.corpora import make_corpus

EVERY, TIMEOUT, GRACE = 10, 10, 5
# The speed of steps must not matter: a run ends soon after its last fault, and the uninterrupted one at the same step.
FAR = 100_000
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
# Seconds of tolerance for a loaded machine (four times slower than idle).
LATE = 60
SLEEP = "import time; time.sleep(3000)"


@dataclass
class Life:
    """How a launch ended. seconds: from the fault to its end; left: remaining processes per host."""

    status: int
    seconds: float
    out: str
    err: str
    left: list[list[str]] = field(default_factory=list)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = SshHosts(folder / "hosts", 2)
        # Looks like a foreign job to DeepSpeed's launchers; their pkill would end it.
        words = ["ssh", "h1", f"{sys.executable} -c '{SLEEP}' python -u -m deepspeed.launcher.launch foreign"]
        self.foreign = self.hosts.start(words)
        self.corpus = make_corpus(folder / "corpus", rows=200, words=20)
        self.hostfile = folder / "hosts.txt"
        self.hostfile.write_text("h1 slots=2\nh2 slots=2\n")
        self.steps = FAR

    def config(self, name: str) -> Path:
        values = configuration(
            self.folder / name,
            self.corpus,
            steps=self.steps,
            training={"schedule_steps": FAR},
            batch={"global_size": 16, "micro_size": 2},
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": EVERY},
            deepspeed="zero2_fp32",
            hangs={"timeout": TIMEOUT},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def words(self, name: str, *options: Any, command: str = "launch", hostfile: Path | None = None) -> list[Any]:
        where = ["--hostfile", hostfile or self.hostfile, "--config", self.config(name), "--minimum-free", 0.01]
        return [sys.executable, "-m", "cluster", command, *where, *options]

    def refused(self, name: str, *options: Any, **more: Any) -> str:
        """A launch that must be refused; returns its error."""
        answer = self.hosts.run(self.words(name, *options, **more), env=environment())
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr.count("error: ") == 1
        assert "Traceback" not in answer.stderr
        assert not (self.folder / name).exists()
        return answer.stderr

    def live(self, run: str, act: Callable[["subprocess.Popen[bytes]"], None] | None, *options: Any) -> Life:
        """Launch or resume; call `act` once a new checkpoint is written; wait for the end."""
        before = len(self._checkpoints(run))
        words = self.words(run, "--resume", "auto", "--grace", GRACE, "--force", *options)
        process = self.hosts.start(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if act is not None:
            newest = self.newest(run)
            try:
                wait_until(lambda: process.poll() is not None or self.newest(run) > newest, 400)
            except AssertionError:
                send(process, signal.SIGKILL)
                raise AssertionError(f"no checkpoint: {process.communicate()}") from None
            assert process.poll() is None, f"ended before the fault ({before} checkpoints): {process.communicate()}"
            act(process)
        started = time.monotonic()
        try:
            out, err = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            send(process, signal.SIGKILL)
            raise AssertionError(f"not over: {process.communicate()}") from None
        life = Life(process.returncode, time.monotonic() - started, out.decode(), err.decode())
        return life

    def leftovers(self, *numbers: int) -> list[list[str]]:
        """Remaining processes of a launch by host: Python and MPI helpers. Shells of ssh may still be exiting."""
        names = []
        for number in numbers:
            lines = [" ".join(words) for _, words in self.hosts.processes(number)]
            names.append([x for x in lines if ("python" in x or "hydra" in x) and "foreign" not in x])
        return names

    def _checkpoints(self, run: str) -> list[Path]:
        return complete_checkpoints(self.folder / run)

    def newest(self, run: str) -> int:
        found = self._checkpoints(run)
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def rank(self, number: int) -> psutil.Process:
        """The training process of a rank, on h2."""
        for process, words in self.hosts.processes(2):
            if "maskvr_ds.train" in words and process.environ().get("RANK") == str(number):
                return process
        raise AssertionError(f"no rank {number}")

    def plant(self, run: str) -> None:
        """Start on h1 what a killed launch of this run would leave behind."""
        key = hashlib.sha256(os.fsencode((self.folder / run).resolve())).hexdigest()[:12]
        self.hosts.start(["ssh", "h1", f"{MARK}={key}-earlier {sys.executable} -c '{SLEEP}' deepspeed.launcher.launch"])
        wait_until(lambda: self.leftovers(1) != [[]])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    ssh_hosts.require()
    scene = Scene(tmp_path_factory.mktemp("launch"))
    yield scene
    scene.hosts.close()


@pytest.fixture(scope="module")
def lives(scene: Scene) -> dict[str, Life]:
    """A single run, resumed after each fault until it completes."""
    found: dict[str, Life] = {}
    hosts = scene.hosts
    acts: dict[str, Callable[[subprocess.Popen[bytes]], Any] | None] = {
        "killed": lambda process: scene.rank(3).kill(),
        "stopped": lambda process: scene.rank(3).suspend(),
        "cut": lambda process: hosts.link(2, "down"),
        "crashed": lambda process: hosts.crash(2),
        "asked": lambda process: send(process, signal.SIGTERM),
        "done": None,
    }
    for name, act in acts.items():
        if name == "done":
            scene.steps = scene.newest("run") + EVERY
            scene.plant("run")
        options = ("--launcher", "mpich") if name == "done" else ()
        found[name] = scene.live("run", act, *options)
        if name == "cut":
            # The ranks learn of the end through the shared file system, although ssh cannot reach them.
            wait_until(lambda: scene.leftovers(2) == [[]], 30)
            hosts.link(2, "up")
        if name == "crashed":
            hosts.boot(2)
        found[name].left = scene.leftovers(1, 2)
    return found


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"\n  rank 3 on h2 \(last step \d+, \w+\): killed by SIGKILL"),
        ("stopped", r"\n  rank 3 on h2 \(last step \d+, \w+\): was stopped \(SIGSTOP\)"),
        ("cut", r"\n  h2: not reachable by ssh: .*; rank 2 on h2 \(last step \d+, \w+\), rank 3 on h2 \("),
        ("crashed", r"\n  h2: not reachable by ssh: .*; rank 2 on h2 \(last step \d+, \w+\), rank 3 on h2 \("),
    ],
)
def test_a_fault_ends_the_launch_in_time_and_is_named(lives: dict[str, Life], fault: str, message: str) -> None:
    life = lives[fault]
    assert life.status == 1
    assert re.search(message, life.err), life.err
    stated = re.search(r"lost rank or host ends the job within (\d+) s", life.out)
    assert stated is not None
    assert life.seconds < int(stated[1]) + LATE
    assert life.left == [[], []]


def test_sigterm_ends_the_launch_with_a_checkpoint(lives: dict[str, Life]) -> None:
    life = lives["asked"]
    assert life.status == EXIT_STOPPED
    assert re.search(r"stopped at step \d+ with a checkpoint", life.err)
    assert life.left == [[], []]


def test_leftovers_of_an_earlier_launch_are_killed_but_no_foreign_job(scene: Scene, lives: dict[str, Life]) -> None:
    assert "warning: h1: ranks of an earlier launch of this run are still running" in lives["done"].err
    assert lives["done"].left == [[], []]
    assert "h1: another DeepSpeed job is running" in lives["done"].err
    assert scene.foreign.poll() is None


def test_resumed_after_all_faults_equals_an_uninterrupted_run(scene: Scene, lives: dict[str, Life]) -> None:
    """The last part runs under MPICH's launcher, the uninterrupted run under the `deepspeed` command."""
    assert lives["done"].status == 0, lives["done"].err
    uninterrupted = scene.folder / "uninterrupted"
    words = ["-m", "deepspeed.launcher.runner", "--hostfile", scene.hostfile, "--module", "maskvr_ds.train"]
    variables = scene.folder / "variables"
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    answer = scene.hosts.run(
        [sys.executable, *words, "--config", scene.config("uninterrupted")],
        timeout=400,
        env={**environment(), "DS_ENV_FILE": str(variables)},
    )
    assert (uninterrupted / "completed.json").is_file(), answer.stdout + answer.stderr
    assert column(scene.folder / "run", *FIGURES) == column(uninterrupted, *FIGURES)
    ours, theirs = (read_weights(complete_checkpoints(r)[-1]) for r in (scene.folder / "run", uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_missing_hostfile(scene: Scene) -> None:
    said = scene.refused("never", hostfile=scene.folder / "nowhere")
    assert "nowhere: no such file; DeepSpeed would train on this machine only" in said


def test_an_empty_hostfile(scene: Scene) -> None:
    empty = scene.folder / "empty.txt"
    empty.write_text("# to be filled\n")
    assert "names no host" in scene.refused("never", hostfile=empty)


def test_an_unreachable_second_host_and_a_wrong_number_of_slots(scene: Scene) -> None:
    """Both are reported together, sooner than the rendezvous would time out."""
    hostfile = scene.folder / "wrong.txt"
    hostfile.write_text("h1 slots=1000\nabsent slots=1000\n")
    started = time.monotonic()
    # Divisible by the ranks: otherwise that error would come first.
    sizes = ["--set", "batch.global_size=2000", "--set", "batch.micro_size=1"]
    said = scene.refused("never", "--force", *sizes, hostfile=hostfile)
    assert "absent: not reachable by ssh: " in said
    assert f"h1: slots=1000, but it has {len(os.sched_getaffinity(0))} CPU cores; correct the hostfile" in said
    assert time.monotonic() - started < 20 + LATE


def test_another_job_on_the_hosts(scene: Scene) -> None:
    assert re.search(r"h1: another DeepSpeed job is running \(pid \d+, user 0\)", scene.refused("never"))


def test_hosts_that_see_different_manifests(scene: Scene) -> None:
    other = make_corpus(scene.folder / "other", rows=200, words=20, seed=1)
    scene.hosts.on(2, "mount", "--bind", other, scene.corpus)
    try:
        said = scene.refused("never", "--force")
    finally:
        scene.hosts.on(2, "umount", scene.corpus)
    assert re.search(rf"h2: {scene.corpus}/manifest.json is sha256 \w+, on h1 it is sha256", said)


def _opens(corpora: list[str]) -> str | None:
    """On a rank: open its own corpus and compare."""
    from data_pipeline.shards import Corpus
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training.corpora import check_same_corpora

    distributed.initialize()
    try:
        check_same_corpora((Corpus(Path(corpora[distributed.rank()])), None))
    except (ValueError, distributed.RemoteError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_ranks_that_see_different_manifests(tmp_path: Path) -> None:
    """Without the checks of `launch`: the trainer itself refuses."""
    first, other = (str(make_corpus(tmp_path / f"{seed}", rows=50, words=20, seed=seed)) for seed in (0, 1))
    assert run_ranks(_opens, 2, [first, first]) == [None, None]
    said = run_ranks(_opens, 2, [first, other])
    assert said[0].startswith("RemoteError: rank 1: ")
    assert said[1].startswith("ConfigError: ")
    assert "rank 1 on" in said[1]
    assert "sees another manifest" in said[1]
