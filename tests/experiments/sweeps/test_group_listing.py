"""The list of option groups that --help prints, with and without copies of Hydra's sources."""

from __future__ import annotations

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository

from experiments.config.registry import register_configs
from experiments.sweeps.hydra_api import list_groups_without_copies, open_hydra


def test_list_groups_without_copies_equals_hydras_list(monkeypatch: pytest.MonkeyPatch) -> None:
    register_configs()
    original = ConfigLoaderImpl.get_group_options
    copies: list[object] = []
    initialise = CachingConfigRepository.__init__
    monkeypatch.setattr(
        CachingConfigRepository,
        "__init__",
        lambda self, delegate: (copies.append(delegate), initialise(self, delegate))[1],
    )
    with open_hydra() as hydra:
        copies.clear()
        expected = hydra.format_config_groups(lambda group: group in ("model", "data"))
        assert copies
        copies.clear()
        with list_groups_without_copies():
            assert hydra.format_config_groups(lambda group: group in ("model", "data")) == expected
        assert not copies
    assert ConfigLoaderImpl.get_group_options is original
