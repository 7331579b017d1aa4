"""Old names of settings: in records they are translated, on the command line they are refused with the new name."""

import functools

import pytest
from omegaconf import OmegaConf

from experiments.config import renamed_keys
from experiments.config.data_schema import ShapesData
from experiments.config.renamed_keys import current_name, migrate
from experiments.config.schema import Config, ScratchModel
from experiments.errors import INPUT_ERRORS, one_line
from experiments.sweeps.hydra_api import compose_job, compose_sweep
from experiments.sweeps.plan import select_row

OLD_KEYS = sorted({*renamed_keys._SETTINGS, *renamed_keys._GROUPS, "model.tower.steps", "model.describe.epochs"})


@pytest.fixture(scope="module")
def compose_cached(open_hydra_module):
    """A function that composes one job as the command line does, and selects its row."""
    sweep = compose_sweep(open_hydra_module, ["model=scratch"])
    composed = {}

    def compose(*overrides: str):
        job = ["model=scratch", *overrides]
        return select_row(compose_job(open_hydra_module, sweep, job, composed), job)

    return compose


@pytest.mark.parametrize("old", OLD_KEYS)
def test_current_name_of_renamed_key_is_a_setting(old):
    new = current_name(old)
    assert new != old
    assert current_name(new) == new
    schema = OmegaConf.structured(Config(model=ScratchModel(), data=ShapesData()))
    parent, _, name = new.rpartition(".")
    assert name in OmegaConf.select(schema, parent)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.steps", "train.max_steps"),
        ("model.tower", "model.vision_pretraining"),
        ("model.tower.batch_size", "model.vision_pretraining.batch_size"),
        ("model.tower.steps", "model.vision_pretraining.max_steps"),
        ("model.describe.optimizer", "model.caption_pretraining.optim"),
        ("reduction.of", "reduction.reference_depth"),
        ("train.max_steps", "train.max_steps"),
        ("train", "train"),
        ("data.train_samples", "data.train_samples"),
        ("model.towering", "model.towering"),
        ("steps", "steps"),
        ("no.such.key", "no.such.key"),
    ],
)
def test_current_name_renames_old_keys_only(key, expected):
    assert current_name(key) == expected


@pytest.fixture
def one_added_setting(monkeypatch):
    """The table of added settings as it was first, so that later additions do not change these tests."""
    monkeypatch.setattr(renamed_keys, "_ADDED", {"train.prefusion_learning_rate": None})


@pytest.mark.usefixtures("one_added_setting")
def test_migrate_nested_config_renames_keys_and_keeps_values():
    old = {
        "seed": 0,
        "data": {"name": "shapes", "train": 8, "test": 4},
        "train": {"steps": 60, "schedule": "linear", "micro_batch": 2, "projector_learning_rate": None},
        "model": {"tower": {"steps": 600, "batch_size": 64}, "describe": {"epochs": 3}},
        "prefusion": {"place": "inside", "layers": 2},
        "reduction": {"of": 32, "layers": [2]},
        "budget": {"text": 14},
        "probe": {"block": 2},
    }
    assert migrate(old) == {
        "seed": 0,
        "data": {"name": "shapes", "train_samples": 8, "test_samples": 4},
        "train": {
            "max_steps": 60,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 2,
            "projector_learning_rate": None,
            "prefusion_learning_rate": None,
        },
        "model": {
            "vision_pretraining": {"max_steps": 600, "batch_size": 64},
            "caption_pretraining": {"num_train_epochs": 3},
        },
        "prefusion": {"location": "inside", "layers": 2},
        "reduction": {"reference_depth": 32, "layers": [2]},
        "budget": {"text_tokens": 14},
        "probe": {"removal_block_size": 2},
    }
    assert old["train"]["steps"] == 60  # the argument is unchanged


@pytest.mark.usefixtures("one_added_setting")
def test_migrate_current_config_changes_nothing():
    current = {"train": {"max_steps": 60, "prefusion_learning_rate": 1e-4}, "data": {"max_length": 99}}
    assert migrate(current) == current
    assert migrate(migrate({"train": {"steps": 3}})) == migrate({"train": {"steps": 3}})


@pytest.mark.parametrize("key", renamed_keys._ADDED)
def test_migrate_adds_younger_setting_and_keeps_a_given_one(key):
    *groups, name = key.split(".")

    def nested(settings):
        return functools.reduce(lambda inner, group: {group: inner}, reversed(groups), settings)

    def inside(config):
        return functools.reduce(dict.__getitem__, groups, config)

    assert inside(migrate(nested({})))[name] == renamed_keys._ADDED[key]
    assert inside(migrate(nested({name: 5})))[name] == 5


@pytest.mark.parametrize("train", [None, "none"])
def test_migrate_config_without_train_group_adds_no_setting(train):
    assert migrate({"train": train}) == {"train": train}
    assert migrate({"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("old", OLD_KEYS)
def test_override_of_renamed_key_is_refused_with_both_names(compose_cached, old, prefix):
    with pytest.raises(INPUT_ERRORS) as error:
        compose_cached(f"{prefix}{old}=1")
    named = one_line(error.value)
    # `+model.tower.steps=1` creates the group model.tower, so the group is the unknown setting.
    unknown = old if f"{old}:" in named else old.rpartition(".")[0]
    assert named == f"{unknown}: renamed; use {current_name(unknown)}"
    assert current_name(unknown) != unknown


@pytest.mark.parametrize(
    ("override", "unknown"),
    [
        ("train={steps: 5}", "train.steps"),
        ("+train={steps: 5}", "train.steps"),
        ("model.tower={steps: 5}", "model.tower"),
        ("budget={text: 5}", "budget.text"),
    ],
)
def test_override_by_mapping_with_renamed_key_is_refused_with_both_names(compose_cached, override, unknown):
    with pytest.raises(INPUT_ERRORS) as error:
        compose_cached(override)
    assert one_line(error.value) == f"{unknown}: renamed; use {current_name(unknown)}"


@pytest.mark.parametrize(
    ("override", "unknown"),
    [
        ("seeed=1", "seeed"),
        ("+seeed=1", "seeed"),
        ("++seeed=1", "seeed"),
        ("train.foo=1", "train.foo"),
        ("+train.foo=1", "train.foo"),
        ("++train.foo=1", "train.foo"),
        ("+compressor.a.b=1", "compressor.a"),
        ("++model.vision_pretraining.foo=1", "model.vision_pretraining.foo"),
        ("+group.foo=1", "group"),
    ],
)
def test_override_of_unknown_setting_is_refused(compose_cached, override, unknown):
    with pytest.raises(INPUT_ERRORS) as error:
        compose_cached(override)
    assert one_line(error.value).startswith(f"{unknown}: no such setting")


@pytest.mark.parametrize("override", ["++seed=3", "++train.max_steps=3", "+data.rounds={place: 2}"])
def test_override_of_known_setting_with_plus_is_accepted(compose_cached, override):
    compose_cached(override)
