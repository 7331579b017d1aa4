"""Fixtures of the configuration tests."""

import pytest

from experiments.config.registry import register_configs
from experiments.sweeps.hydra_api import open_hydra


@pytest.fixture(scope="module")
def open_hydra_module():
    """Hydra with the files in conf/, opened once for all tests of a module."""
    register_configs()
    with open_hydra() as hydra:
        yield hydra
