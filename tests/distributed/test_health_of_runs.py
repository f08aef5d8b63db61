"""Runs broken on purpose and a healthy one, trained and judged (--whole-matrix). Made-up records: tests/unit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT

# Run -> one of the findings that it must have; the others are free.
EXPECTED = {
    "base": None,
    "lr x 30": "relative step size",
    "initializer x 10": "layer Jacobians",
    "dead embedding rows": "embedding rows",
    "spike in the data": "loss spikes",
}


def test_broken_runs_are_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--whole-matrix"):
        pytest.skip("five trainings of 600 steps: --whole-matrix")
    script = ROOT / "docs/experiments/health_of_broken_runs.py"
    subprocess.run(
        [sys.executable, script, "--output", tmp_path / "runs", "--only", *EXPECTED],
        check=True,
        timeout=1800,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    found = json.loads((tmp_path / "runs/findings.json").read_text(encoding="utf-8"))
    for name, check in EXPECTED.items():
        assert check in found[name]["findings"] if check else not found[name]["findings"], name
