"""Corpora of finished phases are not asked for: they may have been deleted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.hosts import checks
from cluster.phases import phases_ahead
from cluster.slurm.corpora import check_corpora
from maskvr_ds.config import ConfigError, RunConfig, load_config
from maskvr_ds.run_folder import checkpoints
from tests.support.corpora import make_corpus
from tests.unit.checkpoint.test_checkpoint import STATE

STEPS = 5


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of three phases on the corpora p0, which is gone, p1 and p2."""
    start = {"moments": "keep", "step_counter": "keep", "schedule": "restart"}
    phases = [
        {"name": f"p{i}", "data": {"path": str(tmp_path / f"p{i}")}, "training": {"steps": STEPS}}
        | ({"start": start} if i else {})
        for i in range(3)
    ]
    for name in ("p1", "p2"):
        make_corpus(tmp_path / name, rows=10, words=10)
    values = {"output_dir": str(tmp_path / "run"), "phases": phases, "evaluation": {"every_steps": 0}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(tmp_path / "run.yaml")


def trained(run: Path, *steps: int) -> None:
    """A checkpoint after so many steps of each phase."""
    history: list[dict[str, Any]] = [{"name": f"p{i}", "steps": n} for i, n in enumerate(steps)]
    folder = run / "checkpoints" / f"step-{sum(steps):08d}"
    folder.mkdir(parents=True)
    checkpoints.write_manifest(folder, vars(replace(STATE, step=sum(steps), phases=history)))


@pytest.mark.parametrize(
    ("steps", "first"), [((), 0), ((3,), 0), ((5,), 1), ((5, 2), 1), ((5, 5), 2), ((5, 5, 5), 2), ((5, 5, 4), 2)]
)
def test_phases_ahead(config: RunConfig, steps: tuple[int, ...], first: int) -> None:
    if steps:
        trained(config.output_dir, *steps)
    assert [where for where, _ in phases_ahead(config)] == [f"phase 'p{i}': " for i in range(first, 3)]


def test_what_a_launch_and_a_job_ask_for(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^phase 'p0': .*p0: no corpus there"):
        check_corpora(config)
    trained(tmp_path / "run", 5, 2)
    check_corpora(config)
    assert checks.corpora(config) == [str(tmp_path / "p1"), str(tmp_path / "p2")]
    # One run of an array has not started.
    with pytest.raises(ConfigError, match="p0: no corpus there"):
        check_corpora(config, runs=[tmp_path / "run", tmp_path / "other"])
