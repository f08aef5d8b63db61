"""One Slurm cluster per test process."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster import slurm_cluster
from tests.cluster.slurm_cluster import Cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, one CPU each. Skipped if Slurm is not available; in CI, which installs it, a failure."""
    if why := slurm_cluster.missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no Slurm cluster: {why}")
        pytest.skip(f"no Slurm cluster: {why}")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
