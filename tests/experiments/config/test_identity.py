"""The identity of a cell: what changes it, and what leaves it as it is."""

from dataclasses import asdict

import pytest

from experiments.config.identity import IGNORED_SETTINGS, cell_identity
from experiments.config.schema import Config


def settings(**changes):
    """Return the default settings as plain containers, with some changed."""
    return asdict(Config(model=None, data=None, **changes))


@pytest.mark.parametrize(
    "change",
    [{"results": "elsewhere"}, {"device": "cuda"}, {"batch_size": 1}, {"name": "other"}, {"threads": 2}, {"save": "a"}],
    ids=lambda change: next(iter(change)),
)
def test_cell_identity_with_changed_ignored_setting_is_equal(change):
    assert cell_identity(settings(**change), "data", "code") == cell_identity(settings(), "data", "code")
    assert set(change) <= set(IGNORED_SETTINGS)


def test_cell_identity_with_changed_setting_data_or_code_differs():
    identities = [
        cell_identity(settings(), "data", "code"),
        cell_identity(settings(seed=1), "data", "code"),
        cell_identity(settings(tiles=2), "data", "code"),
        cell_identity(settings(), "other data", "code"),
        cell_identity(settings(), "data", "other code"),
    ]
    assert len(set(identities)) == len(identities)
    assert all(len(identity) == 16 for identity in identities)
