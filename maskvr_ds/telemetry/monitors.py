"""DeepSpeed's monitors, so that a run that goes on, or back, goes on in them too: none of them knows of a resume."""

import csv
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskvr_ds.config import MonitorConfig
from maskvr_ds.run_folder.layout import CSV, TENSORBOARD, WANDB_ID


def open_monitors(folder: Path, monitor: MonitorConfig, samples: int) -> Any:
    """A MonitorMaster for the run's folder, on rank 0. samples: done so far, what monitors count steps in; what they
    show of later ones is dropped (by Weights & Biases: kept, it cannot go back)."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    # Given to the engine, they would log its per-rank loss too, and wait for the device at every step.
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
        _purge(master.tb_monitor, samples)
    if master.csv_monitor is not None:
        _cut(master.csv_monitor, folder / CSV, samples)
    return master


def _purge(monitor: Any, samples: int) -> None:
    """Have TensorBoard hide what earlier event files have of later steps."""
    from torch.utils.tensorboard import SummaryWriter

    folder = monitor.summary_writer.log_dir
    monitor.summary_writer.close()
    monitor.summary_writer = SummaryWriter(log_dir=folder, purge_step=samples + 1)


def _cut(monitor: Any, folder: Path, samples: int) -> None:
    """Drop the rows of later steps, and what a kill has cut off; the monitor writes a header only into new files."""
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        kept = [row for row in rows if len(row) == 2 and row[0].isdigit() and int(row[0]) <= samples]
        if not kept:
            path.unlink()
            continue
        temporary = path.with_name(f".{path.name}.partial")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *kept])
        temporary.replace(path)
        monitor.filenames.append(path.stem)


@contextmanager
def _wandb_run(folder: Path, *, wanted: bool) -> Iterator[None]:
    """Have wandb.init go on with the run's own run, unless the environment names one."""
    if not wanted or "WANDB_RUN_ID" in os.environ:
        yield
        return
    path = folder / WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    before = dict(os.environ)
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    try:
        yield
    finally:
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            if name not in before:
                del os.environ[name]
