"""Helpers of the training tests: configurations, trainings on ranks, jobs killed at chosen points, the command line."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskvr_ds.engine import master_weights
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_lines

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "model": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64},
    "batch": {"global_size": 12, "micro_size": 2},
    "optimizer": {"lr": 0.03},
    "schedule": {"warmup_steps": 5},
    "evaluation": {"every_steps": 10, "rows": 50},
    "checkpoint": {"every_steps": 0},
    "monitor": {"tensorboard": False},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def configuration(output: Path, corpus: Path, *, steps: int, **sections: Any) -> dict[str, Any]:
    """A small run as nested mappings; `sections` are merged over SMALL, one level deep."""
    values: dict[str, Any] = json.loads(json.dumps(SMALL))
    values.update(output_dir=str(output), data={"path": str(corpus)}, training={"steps": steps})
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def allow_fp16() -> None:
    """On a rank: let DeepSpeed train in fp16 on this CPU, with torch's own (slow) kernels.

    DeepSpeed asks whether oneDNN has fp16 matrix products, which few CPUs do; loss scaling does not depend on them.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def train_all(runs: list[tuple[dict[str, Any], str | None]], fp16: bool = False) -> list[str | None]:
    """On a rank: train each (configuration, resume) in turn; returns per job the error's text, None if it trained.

    fp16: call `allow_fp16` first.
    """
    import logging

    from maskvr_ds import train
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed

    train.plot_loss = lambda *_: None  # takes a second each
    logging.disable(logging.WARNING)
    distributed.initialize()
    if fp16:
        allow_fp16()
    outcomes: list[str | None] = []
    for values, resume in runs:
        try:
            train.train(RunConfig.model_validate(values), resume)
            outcomes.append(None)
        except (ValueError, FloatingPointError, distributed.RemoteError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


@dataclass
class Life:
    """One process per rank that runs `jobs` (see `train_all`) and exits, or is killed.

    kill: ("step", n): SIGKILL just before update n (0-based); ("saved", n): once the checkpoint of step n is written;
    ("converted", 0): once a converted checkpoint is written, before it is renamed.
    delete: a folder removed before the jobs start. ranks: the first `ranks` of the processes take part; None: all.
    fp16: call `allow_fp16`. check_crossing: call `check_crossing` and `record_masks`.
    """

    jobs: list[tuple[dict[str, Any], str | None]]
    kill: tuple[str, int] | None = None
    delete: Path | None = None
    ranks: int | None = None
    fp16: bool = False
    check_crossing: bool = False


def free_ports(count: int) -> list[int]:
    """Free ports below the system's ephemeral range, so that no other process is handed them before they are used."""
    free: list[int] = []
    while len(free) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in free:
            free.append(port)
    return free


def live(lives: list[Life], ports: list[int]) -> list[list[str | None] | str]:
    """On a rank: the lives in turn; returns for each what `train_all` returned, "killed", or "absent".

    Each is a fork of this process, which has imported everything and computed nothing: seconds cheaper than a launch.
    """
    import maskvr_ds.train  # noqa: F401

    answers: list[list[str | None] | str] = []
    for life, port in zip(lives, ports, strict=True):
        if life.ranks is not None and int(os.environ["RANK"]) >= life.ranks:
            answers.append("absent")
            continue
        if life.delete is not None:
            shutil.rmtree(life.delete, ignore_errors=True)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.environ["MASTER_PORT"] = str(port)
            if life.ranks is not None:
                os.environ["WORLD_SIZE"] = str(life.ranks)
            try:
                _prepare_to_die(life.kill)
                if life.check_crossing:
                    check_crossing()
                    record_masks()
                answer: Any = train_all(life.jobs, life.fp16)
            except BaseException:
                answer = [traceback.format_exc()[-3000:]]
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        answers.append("killed" if killed else json.loads(text))
    return answers


def record_masks() -> None:
    """On a rank: patch training to log masks to RUN.masks/, one JSON line per row and step:
    [step, epoch, sample id], predicted positions."""
    from maskvr_ds import train
    from maskvr_ds.checkpoint import save as checkpoint

    pending: list[str] = []

    class Recording:
        def __init__(self, masker: Any, step: int) -> None:
            self.masker, self.step = masker, step

        def __call__(self, batch: Any) -> Any:
            masked = self.masker(batch)
            for b in range(len(batch.sample_ids)):
                key = [self.step, int(batch.epochs[b]), int(batch.sample_ids[b])]
                predicted = sorted(masked.positions[b][masked.weights[b] != 0].tolist())
                pending.append(json.dumps([key, predicted]) + "\n")
            return masked

        def __getattr__(self, name: str) -> Any:
            return getattr(self.masker, name)

    run_step, save = train.run_step, checkpoint.save

    def recorded(engine: Any, masker: Any, *args: Any, **options: Any) -> Any:
        return run_step(engine, Recording(masker, engine.global_steps), *args, **options)

    def saved(run: Path, *args: Any, **options: Any) -> Any:
        folder = Path(f"{run}.masks")
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{os.environ['RANK']}").open("a") as file:
            file.writelines(pending)
        pending.clear()
        return save(run, *args, **options)

    train.run_step, checkpoint.save = recorded, saved


def read_masks(run: Path) -> dict[tuple[int, ...], list[int]]:
    """(step, epoch, sample id) → predicted positions, over all ranks."""
    lines = [json.loads(line) for file in Path(f"{run}.masks").iterdir() for line in file.read_text().splitlines()]
    return {tuple(key): positions for key, positions in lines}


def check_crossing() -> None:
    """On a rank: after every load of a converted checkpoint, compare the engine's state with the file bit for bit.

    Read through DeepSpeed's accessors: master weights, moments, and the model's weights as rounded masters.
    """
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state
    from safetensors.torch import load_file

    from maskvr_ds.checkpoint import reshard

    load = reshard.load

    def checked(universal: Path, of_run: Any) -> None:
        load(universal, of_run)
        tensors = load_file(universal / reshard.TENSORS)
        masters = master_weights.full_fp32_weights(of_run)
        assert master_weights.not_rounded(of_run, masters) == []
        for name, master in masters.items():
            assert torch.equal(master, tensors[f"fp32/mlm.{name}"]), name
        held = iter([p for group in of_run.basic_optimizer.param_groups for p in group["params"]])
        unpartitioned = of_run.zero_optimization_stage() == 0
        if hasattr(of_run.optimizer, "_lazy_init_hp_params_optimizer_state"):
            of_run.optimizer._lazy_init_hp_params_optimizer_state()  # else at the first step
        for name, parameter in of_run.module.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                if not unpartitioned:
                    moment = safe_get_full_optimizer_state(parameter, kind)
                    assert torch.equal(moment, tensors[f"{kind}/{name}"]), (kind, name)
        if unpartitioned:
            names = [n for group in of_run.basic_optimizer.param_groups for n in group["param_names"]]
            for name, parameter in zip(names, held, strict=True):
                for kind in ("exp_avg", "exp_avg_sq"):
                    moment = of_run.basic_optimizer.state[parameter][kind]
                    assert torch.equal(moment, tensors[f"{kind}/{name}"]), (kind, name)

    reshard.load = checked


def _prepare_to_die(kill: tuple[str, int] | None) -> None:
    from maskvr_ds.checkpoint import reshard
    from maskvr_ds.checkpoint import save as checkpoint
    from maskvr_ds.training.phases import RunPhase

    if kill is None:
        return
    place, at = kill
    if place == "converted":
        write = reshard.save_file

        def deadly(*args: Any) -> None:
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        reshard.save_file = deadly
        return
    owner, name = (RunPhase, "learning_rate") if place == "step" else (checkpoint, "save")
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if (args[1] if place == "step" else args[2].step) == at:
            # Staggered: no rank may notice another's death before its own.
            time.sleep(0.3 * int(os.environ["RANK"]))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / METRICS)


def column(run: Path, *names: str) -> list[Any]:
    return [tuple(line[name] for name in names) for line in metrics(run)]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "maskvr_ds.cli", *map(str, words)]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_command(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return _run(command(*words), timeout)


def run_deepspeed(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_gpus 2 --module maskvr_ds.train …`, as a user types it."""
    port = free_ports(1)[0]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    return _run([*launcher, "--module", "maskvr_ds.train", *map(str, words)], timeout)


def _run(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def run_and_kill(*words: object, when: Any, timeout: float = 240) -> None:
    """Start a job and SIGKILL launcher and ranks together as soon as `when()` holds."""
    import psutil

    process = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + timeout
    while not when():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(
                f"ended or hung before it could be killed: {process.communicate()[1].decode()[-3000:]}"
            )
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGSTOP)
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=30)
