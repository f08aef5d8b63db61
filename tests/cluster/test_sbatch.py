"""Job scripts as the real sbatch reads them."""

from pathlib import Path

import pytest

from cluster.sbatch_script import SlurmError, directive, log_pattern
from tests.cluster.slurm_cluster import Cluster
from tests.support.scripts import VARIANTS, job_scripts


def test_every_variant_is_accepted(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scripts = job_scripts(tmp_path)
    assert set(scripts) == set(VARIANTS)
    for paths in scripts.values():
        for path in paths:
            said = slurm.run("sbatch", "--test-only", path).stderr
            assert " to start at " in said, said
    refused = slurm.run("sbatch", "--test-only", "--partition=none", scripts["cpu"][0], check=False)
    assert refused.returncode != 0, "it can be refused"


def test_directives_are_read_as_they_were_meant(slurm: Cluster, tmp_path: Path) -> None:
    """Names and paths with everything that is not refused: the controller has them to the letter."""
    values = ['it\'s "a" $(id) `id` $HOME', "# no comment %j %% ü,;|&<>*?~!"]
    for number, value in enumerate(values):
        folder = tmp_path / f"{number} {value}"
        folder.mkdir()
        script = tmp_path / "script"
        lines = [directive("job-name", value), directive("output", log_pattern(folder, "%j"))]
        script.write_text("\n".join(["#!/bin/bash", *lines, 'printf "%s" "$SLURM_JOB_NAME"\n']))
        job = slurm.run("sbatch", "--parsable", "--wait", script).stdout.strip()
        assert (folder / job).read_text() == value
    with pytest.raises(SlurmError):
        directive("comment", "a\n#SBATCH --uid=0")
