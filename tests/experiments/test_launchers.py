"""One sweep, one set of records, whoever launches the cells; a cell that fails stops no other."""

import pytest

from tests.experiments.sweeps import finished, refused, sweep

LAUNCHERS = ["basic", "joblib", "submitit_local"]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """What each launcher said, and the folder that it left."""
    found = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher)
        found[launcher] = sweep(folder, f"hydra/launcher={launcher}"), folder
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cell_that_fails_is_named_and_the_others_finish(sweeps, launcher):
    ended, folder = sweeps[launcher]
    assert len(finished(folder)) == 2
    refused(ended)


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_every_launcher_gives_the_same_records(sweeps, launcher):
    expected = finished(sweeps["basic"][1])
    assert all(record["train"]["log"] for record in expected.values())
    assert finished(sweeps[launcher][1]) == expected
