"""Jobs with injected faults (signals, kills, NaN losses, damage, full disks), on ranks forked after the imports."""

import functools
import json
import os
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskvr_ds.runtime import files


@dataclass
class Act:
    """One job on all ranks, and the fault injected into it.

    signal: (rank, update, number): signal for that rank just before that update (0-based).
    nan_row: a corpus row whose loss is always NaN; nan_step: the update at which a loss on rank 1 is NaN, nan_once: for
    the first time only.
    kill: (rank, place, n): SIGKILL of a rank (None: all): "step": before update n; "update": before the n-th update of
    this job; "save": in the n-th write of a DeepSpeed file; "write": halfway through the n-th file of an asynchronous
    checkpoint; "convert": once a conversion is written, before it is renamed.
    poison: (update, what, rank): after that update (1-based), for the first time in this job, a value of that rank
    becomes infinite: "masters", a moment's name, or "rounded", which only the model's own weights hold.
    unchecked: checkpoints are saved as versions did that had no check for finite values.
    misread: a checkpoint's name, of which rank 1 reads back another content than it has written.
    flip: (update, rank): after that update (1-based) a bit of a weight that all ranks hold flips on that rank.
    damage: (update, file): the file is truncated to nothing just before that update.
    slow: extra seconds that every file takes to write.
    verify_at: the background verification of shards starts after that update (1-based), which waits for its end, or
    once a checkpoint waits for it.
    fill: a file that fills its file system up once the check of free space has passed. empty: such a file, removed
    before the job starts.
    note: a file that gets one line before the job starts: steps logged, step of the newest checkpoint.
    output, error: take what rank 0 prints. ranks: the first `ranks` of the processes take part.
    """

    values: dict[str, Any]
    resume: str | None = None
    signal: tuple[int, int, int] | None = None
    nan_row: int | None = None
    nan_step: int | None = None
    nan_once: bool = False
    kill: tuple[int | None, str, int] | None = None
    poison: tuple[int, str, int] | None = None
    unchecked: bool = False
    misread: str = ""
    flip: tuple[int, int] | None = None
    damage: tuple[int, Path] | None = None
    fill: Path | None = None
    empty: Path | None = None
    note: Path | None = None
    slow: float = 0.0
    verify_at: int | None = None
    output: Path | None = None
    error: Path | None = None
    ranks: int = 2


def play(acts: list[Act], ports: list[int]) -> list[str]:
    """On a rank: the acts in turn; returns for each "done", "stopped: …", "killed", "absent", or the error's text."""
    import maskvr_ds.train  # noqa: F401

    answers = []
    for act, port in zip(acts, ports, strict=True):
        if int(os.environ["RANK"]) >= act.ranks:
            answers.append("absent")
            continue
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            os.environ.update(MASTER_PORT=str(port), WORLD_SIZE=str(act.ranks))
            try:
                answer = _live(act)
            except BaseException:
                answer = traceback.format_exc()
            os.write(write, json.dumps(answer[-4000:]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        answers.append(json.loads(text) if not os.WIFSIGNALED(status) else "killed")
    return answers


def _live(act: Act) -> str:
    import logging

    from maskvr_ds.config import RunConfig
    from maskvr_ds.reliability.signals import StoppedError, StopRequest
    from maskvr_ds.run_folder.checkpoints import complete_checkpoints, step_of
    from maskvr_ds.run_folder.layout import METRICS
    from maskvr_ds.runtime import distributed, logs
    from maskvr_ds.telemetry.metrics_file import read_lines
    from maskvr_ds.train import train

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logs.configure(rank=int(os.environ["RANK"]))
    if act.empty is not None and os.environ["RANK"] == "0":
        act.empty.unlink(missing_ok=True)
    if act.note is not None and os.environ["RANK"] == "0":
        run = Path(act.values["output_dir"])
        saved = [step_of(folder) for folder in complete_checkpoints(run)]
        with act.note.open("a") as file:
            file.write(f"{len(read_lines(run / METRICS))} {max(saved, default=0)}\n")
    if act.output is not None and os.environ["RANK"] == "0":
        os.dup2(os.open(act.output, os.O_WRONLY | os.O_CREAT, 0o644), 1)
    if act.error is not None and os.environ["RANK"] == "0":
        os.dup2(os.open(act.error, os.O_WRONLY | os.O_CREAT, 0o644), 2)
    distributed.initialize()
    distributed.barrier()
    prepare(act)
    try:
        train(RunConfig.model_validate(act.values), act.resume, StopRequest())
    except StoppedError as stopped:
        return f"stopped: {stopped}"
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if act.kill is not None:
            return "lost a peer"
        return f"{type(error).__name__}: {error}"
    return "done"


def prepare(act: Act) -> None:
    """Patch this process so that the act's faults happen."""
    from maskvr_ds import train
    from maskvr_ds.checkpoint import save
    from maskvr_ds.masking.masker import Masker
    from maskvr_ds.run_folder import checkpoints
    from maskvr_ds.training.phases import RunPhase

    rank = int(os.environ["RANK"])
    learning_rate, mask, check_space = RunPhase.learning_rate, Masker.__call__, checkpoints.check_space
    now, made = [0], [0]

    def at_step(phase: Any, step: int) -> float:
        now[0] = step
        made[0] += 1
        if act.kill is not None and act.kill[0] in (None, rank) and act.kill[1:] == ("update", made[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        if act.damage is not None and act.damage[0] == step and rank == 0:
            act.damage[1].write_bytes(b"")
        if act.signal is not None and act.signal[:2] == (rank, step):
            os.kill(os.getpid(), act.signal[2])
        if act.kill is not None and act.kill[0] in (None, rank) and act.kill[1:] == ("step", step):
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(phase, step)

    def masked(masker: Any, batch: Any) -> Any:
        result = mask(masker, batch)
        if act.nan_row is not None:
            result.weights[batch.sample_ids == act.nan_row] *= float("nan")
        if act.nan_step == now[0] and rank == 1 and not (act.nan_once and made[0] > now[0] + 1):
            result.weights[0] *= float("nan")
        return result

    def full(folder: Path, needed: int, what: str) -> None:
        check_space(folder, needed, what)
        assert act.fill is not None
        if any(checkpoints.complete_checkpoints(folder.parents[2])):
            fill(act.fill, leave=20_000)

    if act.verify_at is not None:
        _hold_verification(act.verify_at)
    train.plot_loss = lambda *_: None  # takes a second each
    RunPhase.learning_rate, Masker.__call__ = at_step, masked
    if act.poison is not None:
        _poison(*act.poison)
    if act.flip is not None:
        _flip(*act.flip)
    if act.misread and rank == 1:
        read_back = files._read_back
        files._read_back = lambda path: "another" if act.misread in str(path) else read_back(path)
    if act.unchecked:
        save.nonfinite = lambda *_: []
    if act.fill is not None:
        checkpoints.check_space = full
    if act.kill is not None and act.kill[0] in (None, rank) and act.kill[1] == "save":
        _kill_in_save(act.kill[2])
    here = act.kill is not None and act.kill[0] in (None, rank) and act.kill[1] == "write"
    _write_slowly(act.slow, act.kill[2] if act.kill is not None and here else 0)
    if act.kill is not None and act.kill[1] == "convert":
        _kill_in_conversion()


def _poison(update: int, what: str, rank: int) -> None:
    from maskvr_ds import train

    run_step, left = train.run_step, [int(os.environ["RANK"]) == rank]

    def poisoned(engine: Any, *args: Any, **options: Any) -> Any:
        result = run_step(engine, *args, **options)
        if left[0] and engine.global_steps == update:
            left[0] = False
            first = next(iter(engine.basic_optimizer.state))
            value = next(engine.module.parameters()) if what == "rounded" else first
            value = value if what in ("masters", "rounded") else engine.basic_optimizer.state[first][what]
            value.detach().view(-1)[3] = float("inf")
        return result

    train.run_step = poisoned


def _flip(update: int, rank: int) -> None:
    from maskvr_ds import train

    run_step = train.run_step

    def flipped(engine: Any, *args: Any, **options: Any) -> Any:
        result = run_step(engine, *args, **options)
        if int(os.environ["RANK"]) == rank and engine.global_steps == update:
            weight = next(p for p in engine.module.parameters() if p.numel() == getattr(p, "ds_numel", p.numel()))
            weight.data.view(-1).view(torch.int32 if weight.element_size() == 4 else torch.int16)[-5] ^= 1 << 5
        return result

    train.run_step = flipped


def _hold_verification(update: int) -> None:
    import threading

    from maskvr_ds import train
    from maskvr_ds.training.verification import BackgroundVerification

    compare, wait, run_step = BackgroundVerification._compare, BackgroundVerification.wait, train.run_step
    released = threading.Event()

    def held(verification: Any) -> None:
        released.wait(60)  # so that a run without `wait` ends
        compare(verification)

    def waiting(verification: Any, step: int) -> None:
        released.set()
        wait(verification, step)

    def stepped(engine: Any, *args: Any, **options: Any) -> Any:
        result = run_step(engine, *args, **options)
        if engine.global_steps == update:
            released.set()
            for thread in threading.enumerate():
                if thread.name == "verification":
                    thread.join()
        return result

    BackgroundVerification._compare, BackgroundVerification.wait = held, waiting
    train.run_step = stepped


def _kill_in_save(number: int) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    save, calls = TorchCheckpointEngine.save, [0]

    @functools.wraps(save)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)

    TorchCheckpointEngine.save = deadly


def _write_slowly(seconds: float, kill_at: int) -> None:
    """kill_at: the call in which this process is killed; 0: none."""
    import time

    from maskvr_ds.run_folder import checkpoints

    write_hashed, calls = files.write_hashed, [0]

    def slow(path: Path, content: memoryview | None = None) -> tuple[int, str]:
        time.sleep(seconds)
        calls[0] += 1
        if calls[0] == kill_at:
            assert content is not None
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_hashed(path, content)

    files.write_hashed = checkpoints.write_hashed = slow


def _kill_in_conversion() -> None:
    from maskvr_ds.checkpoint import reshard

    write = reshard.save_file

    def deadly(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    reshard.save_file = deadly


def fill(path: Path, *, leave: int) -> None:
    """Write a file that leaves only `leave` bytes of its file system free."""
    import shutil

    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as file:
        file.write(b"x" * max(0, free - leave))
