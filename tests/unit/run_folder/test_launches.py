"""launches.jsonl: which versions trained a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder import launches
from maskvr_ds.run_folder.layout import LAUNCHES

CONTENT: dict[str, Any] = {"ranks": 1, "ranks_per_host": 1, "device": "CPU", "corpora": []}


def test_versions_of_the_last_launch_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches.append_launch(tmp_path, **CONTENT)
    assert launches.changed_versions(tmp_path) == ""
    installed = json.loads((tmp_path / LAUNCHES).read_text(encoding="utf-8"))["versions"]
    assert {"torch", "deepspeed", "transformers"} <= installed.keys()
    monkeypatch.setattr(launches, "_versions", lambda: {**installed, "torch": "1.0"})
    assert launches.changed_versions(tmp_path) == f"torch was {installed['torch']}, is 1.0"
    launches.append_launch(tmp_path, **CONTENT)
    assert launches.changed_versions(tmp_path) == ""


def test_a_line_that_a_full_disk_has_torn_costs_no_other(tmp_path: Path) -> None:
    launches.append_launch(tmp_path, **CONTENT)
    with (tmp_path / LAUNCHES).open("ab") as file:
        file.write(b'{"time": "2026')
    launches.append_launch(tmp_path, **{**CONTENT, "ranks": 2})
    assert [line["ranks"] for line in launches.read_launches(tmp_path)] == [1, 2]


def test_a_run_of_an_earlier_version_has_no_record(tmp_path: Path) -> None:
    assert launches.changed_versions(tmp_path) == "those that trained it are not known"
