"""One real Slurm for all of these tests."""

import os
import shutil
import subprocess

import pytest

from tests.slurm.site import ROOT, Site


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs slurmctld (Debian: apt-get install slurm-wlm munge) and root to start it")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([ROOT / "scripts/local_slurm.sh", "up", folder, "4", "16"], check=True, capture_output=True)
    yield os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "RLALIGN_MASTER_ADDR": "127.0.0.1",
        "RLALIGN_SERVER_HOST": "127.0.0.1",
    }
    subprocess.run([ROOT / "scripts/local_slurm.sh", "down", folder], check=True, capture_output=True)


@pytest.fixture
def site(cluster, tmp_path) -> Site:
    return Site(tmp_path, cluster)
