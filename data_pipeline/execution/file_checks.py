"""Comparison of the files of earlier tasks with their SHA-256, in parallel, before another task reads them.

Files of a stage stay on disk for hours, or for days if a build is killed and resumed, and what is read from them ends
in a corpus whose own hashes are right.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.execution.tasks import Report, Task
from data_pipeline.execution.workers import Pool
from data_pipeline.files import CorpusError, sha256_file

Hashes = Mapping[str, str]
"""Path → SHA-256 as the file was written."""


def check_files(groups: Sequence[Hashes], work: Path, pool: Pool, report: Report, remedy: str) -> None:
    """Hash files, one task per group. Raises one CorpusError with one line per file that differs, each with `remedy`.

    work: folder for the results of the tasks, which are not kept: a resumed build checks again.
    """
    folder = work / "checks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tasks = [
        Task(f"check-{i:05}", f"check of {next(iter(group))}", find_damage, (dict(group), remedy))
        for i, group in enumerate(groups)
        if group
    ]
    try:
        faults = [fault for found in pool.run(tasks, folder, report) for fault in found]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if faults:
        raise CorpusError("\n".join(faults))


def find_damage(hashes: Hashes, remedy: str, progress: Report) -> list[str]:
    """One sentence per file that is missing or differs from its SHA-256."""
    faults = []
    for path, expected in hashes.items():
        try:
            found = sha256_file(Path(path), lambda size: progress(size, 0))
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}). {remedy}")
            continue
        if found != expected:
            faults.append(
                f"{path}: sha256 {expected} expected, {found} found: it was modified or damaged after it was written. "
                f"{remedy}"
            )
    return faults
