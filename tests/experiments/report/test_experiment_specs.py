from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.experiment_specs import FOLDER, Definition, definitions, joined


def test_experiments_with_rows_are_found_by_name() -> None:
    found = definitions()
    names = [definition.name for definition in found]
    assert set(names) == {path.stem for path in FOLDER.glob("*.yaml") if "\nrows:" in path.read_text()}
    order = ("prefusion_init", "table6_prefusion", "table8_compression", "table10_compressors", "zero_tokens")
    assert [name for name in names if name in order] == list(order)
    assert {"table6_prefusion", "zero_tokens"} <= set(names)
    assert not {"attention", "ablation"} & set(names)


@pytest.mark.parametrize("definition", definitions(), ids=lambda definition: definition.name)
def test_every_table_has_a_sentence_as_its_title(definition: Definition) -> None:
    assert definition.title[0].isupper()
    assert definition.title[-1] in ".?!"
    assert len(definition.title) < 250


@pytest.mark.parametrize("definition", definitions(), ids=lambda definition: definition.name)
def test_every_tables_rows_are_known_from_the_models_grid_alone(definition: Definition) -> None:
    settings = definition.settings({"model.grid": 24})
    assert [setting.label for setting in settings] == [row.label for row in definition.rows]
    assert not any("$" in str(value) for setting in settings for value in setting.values.values())


def test_the_title_is_the_first_sentence_of_the_comment(definition: Definition) -> None:
    assert definition.title == "Table 60: what 100% of {tokens} & layers are worth, a_b?"


def test_a_file_without_a_comment_goes_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# @package _global_\nname: mine\nrows:\n  - {label: a, seed: 1e-3}\n")
    (found,) = definitions(tmp_path)
    assert found.title == "mine"
    assert found.rows[0].settings == {"seed": 0.001}  # as Hydra reads it; plain YAML would make it text


def test_rows_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nrows:\n  - {seed: 1}\n")
    with pytest.raises(ValueError, match="experiment mine: rows must be a list"):
        definitions(tmp_path)


def test_what_a_row_cannot_find_is_named(definition: Definition) -> None:
    with pytest.raises(ValueError, match=r"experiment table60_mixed: .*model"):
        definition.settings({"seed": 0})


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        (["1 token", "4 tokens"], "1 token / 4 tokens"),
        (["16 tokens", "64 tokens"], "16 / 64 tokens"),
        (["16 visual tokens", "64 visual tokens"], "16 / 64 visual tokens"),
        (["tokens", "tokens"], "tokens / tokens"),
        (["LLaVA"], "LLaVA"),
        (["two words"], "two words"),
    ],
)
def test_joined_labels(labels: list[str], label: str) -> None:
    assert joined(labels) == label


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3)
)
def test_joined_labels_lose_no_word(labels: list[str]) -> None:
    parts = joined(labels).split(" / ")
    assert len(parts) == len(labels)
    last = parts[-1].split()
    shared = len(labels[-1].split()) - len(labels[0].split()) + len(parts[0].split()) if len(labels) > 1 else 0
    for label, part in zip(labels[:-1], parts, strict=False):
        assert label.split()[: len(part.split())] == part.split()
    assert last == labels[-1].split()
    assert shared >= 0
