"""TODO"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from experiments.config import rows
from experiments.config.schema import (
    DATA,
    MODELS,
    CompressorConfig,
    Config,
    PrefusionConfig,
    ProbeConfig,
    ReductionConfig,
    TrainConfig,
)


def register() -> None:
    """Make the classes and the resolver known to Hydra, under the names that conf/ refers to."""
    rows.register()
    store = ConfigStore.instance()
    store.store("schema", Config)
    groups: dict[str, dict[str, type]] = {
        "model": MODELS,
        "data": DATA,
        "compressor": {"": CompressorConfig},
        "prefusion": {"": PrefusionConfig},
        "reduction": {"": ReductionConfig},
        "train": {"": TrainConfig},
        "probe": {"": ProbeConfig},
    }
    for group, nodes in groups.items():
        for name, node in nodes.items():
            store.store(f"schema_{name}" if name else "schema", node, group=group)
