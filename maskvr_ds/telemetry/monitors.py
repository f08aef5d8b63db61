"""DeepSpeed's monitors (TensorBoard, CSV, Weights & Biases) with support for resume and rollback, which they lack."""

import csv
import importlib.util
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file
from maskvr_ds.config import ConfigError, MonitorConfig
from maskvr_ds.run_folder.layout import CSV, TENSORBOARD, WANDB_ID
from maskvr_ds.runtime.files import atomic_write
from maskvr_ds.telemetry.metrics_file import HEALTH, TRUST_RATIO_FIGURES, UPDATE_RMS_FIGURES

_HELD_OUT = "held_out_"


def curve_name(key: str) -> str:
    """Name of a curve from its key in metrics.jsonl: held_out/loss, lamb/trust_ratio_min, train/loss."""
    if key.startswith(_HELD_OUT):
        return "held_out/" + key.removeprefix(_HELD_OUT)
    if key.startswith(HEALTH):
        return "health/" + key.removeprefix(HEALTH)
    if key in TRUST_RATIO_FIGURES:
        return f"lamb/{key}"
    return f"stable_adamw/{key}" if key in UPDATE_RMS_FIGURES else f"train/{key}"


def check_monitors(monitor: MonitorConfig) -> None:
    """Raise ConfigError if a monitor's package is not installed here. Loads none of them."""
    if monitor.wandb is not None and not _is_installed("wandb"):
        raise ConfigError(
            f"monitor.wandb is set (project {monitor.wandb.project}), but the package wandb is not installed; "
            'run pip install "maskvr_ds[wandb]" and wandb login, or remove monitor.wandb'
        )


def _is_installed(package: str) -> bool:
    """A folder of the same name in the working folder, as Weights & Biases makes it, is none: it has no __init__.py."""
    spec = importlib.util.find_spec(package)
    return spec is not None and (spec.origin is not None or spec.submodule_search_locations is None)


def open_monitors(folder: Path, monitor: MonitorConfig, step: int) -> Any:
    """Open a MonitorMaster for the run folder; call on rank 0. The x axis of every curve is the optimizer step.

    step: reached so far; later values are dropped, at 0 all (except by Weights & Biases, which cannot roll back).
    Raises ConfigError if a monitor's package is not installed.
    """
    check_monitors(monitor)
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    # If configured in the engine, they would also log its per-rank loss, and wait for the device at every step.
    wandb = monitor.wandb.model_dump(exclude_none=True) if monitor.wandb else {}
    sections = {
        "tensorboard": {"enabled": monitor.tensorboard, "output_path": str(folder), "job_name": TENSORBOARD},
        "csv_monitor": {"enabled": monitor.csv, "output_path": str(folder), "job_name": CSV},
        "wandb": {"enabled": monitor.wandb is not None, **wandb},
    }
    earlier = (folder / TENSORBOARD).is_dir()
    with _wandb_run(folder, wanted=monitor.wandb is not None):
        master = MonitorMaster(get_monitor_config(sections))
    if master.tb_monitor is not None and earlier:
        _purge(master.tb_monitor, step)
    if master.csv_monitor is not None:
        _truncate(master.csv_monitor, folder / CSV, step)
    return master


def _purge(monitor: Any, step: int) -> None:
    """Make TensorBoard hide later steps in existing event files; at step 0 everything, which is measured again."""
    from torch.utils.tensorboard import SummaryWriter

    folder = monitor.summary_writer.log_dir
    monitor.summary_writer.close()
    monitor.summary_writer = SummaryWriter(log_dir=folder, purge_step=step + 1 if step else 0)


def _truncate(monitor: Any, folder: Path, step: int) -> None:
    """Drop rows of later steps, and rows truncated by a kill or damaged; the monitor writes a header only to files new
    to it."""
    for path in sorted(folder.glob("*.csv")):
        # Not by csv.reader, which raises on what a power failure leaves.
        text = path.read_text(encoding="utf-8", errors="replace")
        header, *rows = [line.split(",") for line in text.splitlines()] or [[]]
        kept = [row for row in rows if step and _is_value(row) and int(row[0]) <= step]
        if not kept:
            path.unlink()
            continue
        written = io.StringIO(newline="")
        csv.writer(written).writerows([header, *kept])
        with atomic_file(path) as file:
            file.write(written.getvalue().encode())
        monitor.filenames.append(path.stem)


def _is_value(row: list[str]) -> bool:
    """Whether it is a step and a number."""
    try:
        step, value = row
        float(value)
        return int(step) >= 0
    except ValueError:
        return False


@contextmanager
def _wandb_run(folder: Path, *, wanted: bool) -> Iterator[None]:
    """Make wandb.init resume the id stored in the run folder, unless the environment names one."""
    if not wanted or "WANDB_RUN_ID" in os.environ:
        yield
        return
    path = folder / WANDB_ID
    # Empty: left by a full disk.
    if not path.exists() or not path.read_text(encoding="utf-8", errors="replace").strip():
        atomic_write(path, secrets.token_hex(8) + "\n")
    before = dict(os.environ)
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    try:
        yield
    finally:
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            if name not in before:
                del os.environ[name]
