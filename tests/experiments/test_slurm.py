"""A sweep through a real SLURM: run by `make test-slurm`."""

import pytest

from tests.experiments import slurm_cluster
from tests.experiments.sweeps import finished, refused, sweep

absent = slurm_cluster.missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(absent), reason=f"no {', '.join(absent)} here: as root, make test-slurm installs them"),
]


def test_slurm_gives_the_records_of_a_local_sweep(tmp_path):
    seeds = "seed=0,1"
    local = sweep(tmp_path / "local", seeds)
    refused(local)
    with slurm_cluster.cluster() as environment:
        ended = sweep(tmp_path / "slurm", seeds, "hydra/launcher=submitit_slurm", **environment)
    refused(ended)
    assert len(finished(tmp_path / "slurm")) == 4
    assert finished(tmp_path / "slurm") == finished(tmp_path / "local")
