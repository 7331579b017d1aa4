"""Tests of reading experiment specs from conf/experiment/."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.experiment_specs import SPEC_FOLDER, ExperimentSpec, join_labels, load_specs


def test_load_specs_finds_every_experiment_with_rows_in_natural_order() -> None:
    names = [spec.name for spec in load_specs()]
    assert set(names) == {path.stem for path in SPEC_FOLDER.glob("*.yaml") if "\nrows:" in path.read_text()}
    order = ("prefusion_init", "table6_prefusion", "table8_compression", "table10_compressors", "zero_tokens")
    assert [name for name in names if name in order] == list(order)
    assert {"table6_prefusion", "zero_tokens"} <= set(names)
    assert not {"attention", "ablation"} & set(names)


@pytest.mark.parametrize("spec", load_specs(), ids=lambda spec: spec.name)
def test_load_specs_title_is_a_sentence(spec: ExperimentSpec) -> None:
    assert spec.title[0].isupper()
    assert spec.title[-1] in ".?!"
    assert len(spec.title) < 250


@pytest.mark.parametrize("spec", load_specs(), ids=lambda spec: spec.name)
def test_resolve_rows_needs_only_the_grid_of_the_model(spec: ExperimentSpec) -> None:
    settings = spec.resolve_rows({"model.grid": 24})
    assert [setting.label for setting in settings] == [row.label for row in spec.rows]
    assert not any("$" in str(value) for setting in settings for value in setting.values.values())


def test_load_specs_title_is_first_sentence_of_comment(spec: ExperimentSpec) -> None:
    assert spec.title == "Table 60: what 100% of {tokens} & layers are worth, a_b?"


def test_load_specs_file_without_comment_uses_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# @package _global_\nname: mine\nrows:\n  - {label: a, seed: 1e-3}\n")
    (found,) = load_specs(tmp_path)
    assert found.title == "mine"
    assert found.rows[0].settings == {"seed": 0.001}  # a number as in Hydra; plain YAML would read text


def test_load_specs_malformed_rows_raise(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nrows:\n  - {seed: 1}\n")
    with pytest.raises(ValueError, match="experiment mine: rows must be a list"):
        load_specs(tmp_path)


def test_resolve_rows_missing_key_raises(spec: ExperimentSpec) -> None:
    with pytest.raises(ValueError, match=r"experiment table60_mixed: .*model"):
        spec.resolve_rows({"seed": 0})


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
def test_join_labels_writes_common_ending_once(labels: list[str], label: str) -> None:
    assert join_labels(labels) == label


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3)
)
def test_join_labels_keeps_every_word(labels: list[str]) -> None:
    parts = join_labels(labels).split(" / ")
    assert len(parts) == len(labels)
    last = parts[-1].split()
    shared = len(labels[-1].split()) - len(labels[0].split()) + len(parts[0].split()) if len(labels) > 1 else 0
    for label, part in zip(labels[:-1], parts, strict=False):
        assert label.split()[: len(part.split())] == part.split()
    assert last == labels[-1].split()
    assert shared >= 0
