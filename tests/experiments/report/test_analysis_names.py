"""Tests of analyses of one model on several kinds of picture: their names, tables and figures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.report import html, load
from experiments.report.build import write_report

PARTS = (["2x2"], ["3x3", "one"])
NAMES = ["tiny LLaVA, seed 0, data.parts=[2x2]", "tiny LLaVA, seed 0, data.parts=[3x3,one]"]


@pytest.fixture
def analyses(records: list[dict[str, Any]], write_records: Callable[..., Path]) -> Path:
    (probed,) = (record for record in records if record["experiment"] == "attention")
    copies = [copy.deepcopy(probed) for _ in PARTS]
    for number, (record, parts) in enumerate(zip(copies, PARTS, strict=True)):
        record["id"], record["name"] = "ab"[number] * 16, "tiny LLaVA, seed 0"
        record["config"]["data"]["parts"] = parts
        record["data"]["fingerprint"] = "ab"[number] * 16
    return write_records([*(record for record in records if record is not probed), *copies])


@pytest.mark.parametrize("table", ["fusion_depth", "sight", "removal_by_kind"])
def test_tables_tell_analyses_of_one_model_apart(analyses: Path, table: str) -> None:
    assert list(load(analyses).table(table).text["Model"].unique()) == NAMES


def test_question_type_table_names_each_analysis_once_and_no_setting_of_probes(analyses: Path) -> None:
    table = load(analyses).table("accuracy_by_kind").text
    rows = table[table["Input"] == "image"]["Model"]
    assert [name for name in rows if name.startswith("tiny")] == NAMES
    assert not [name for name in rows if "probe." in name]
    assert rows.is_unique


def test_names_of_other_records_are_as_they_were(analyses: Path, records: list[dict[str, Any]]) -> None:
    names = {record["id"]: record["name"] for record in records if record["experiment"] != "attention"}
    loaded = load(analyses).records
    assert {r["id"]: r["name"] for r in (*loaded.finished, *loaded.failed) if r["id"] in names} == names


def test_each_analysis_has_its_own_figures(analyses: Path) -> None:
    entries = {entry.stem: entry for entry in load(analyses).figures}
    other = "removal_by_block_of_tiny_LLaVA_data.parts_3x3_one"
    assert "data.parts=[2x2]" in entries["removal_by_block"].caption
    assert "data.parts=[3x3,one]" in entries[other].caption
    assert entries[other].title.endswith(": tiny LLaVA, data.parts=[3x3,one]")


def test_figures_of_one_probe_share_a_section_of_the_page(analyses: Path) -> None:
    report = load(analyses)
    sections = [section for part in html.split_sections(report, {}) for section in part]
    labels = [section.label for section in sections]
    assert len(set(labels)) == len(labels)
    (removal,) = (section for section in sections if section.anchor == "removal_by_block")
    assert len(removal.figures) == len(PARTS)
    assert sum(len(section.figures) for section in sections) == len(report.figures)


def test_claims_figure_names_the_analysis_of_each_row_and_the_claim_once(analyses: Path) -> None:
    labels = [text.get_text() for axis in load(analyses).figure("claims").axes for text in axis.get_yticklabels()]
    claim = "The image can leave after half of the layers"
    assert labels[labels.index(f"{claim}\n(tiny, data.parts=[2x2])") + 1] == "(tiny, data.parts=[3x3,one])"


def test_seeds_of_one_analysis_share_a_figure(
    records: list[dict[str, Any]], write_records: Callable[..., Path]
) -> None:
    (probed,) = (record for record in records if record["experiment"] == "attention")
    other_seed = copy.deepcopy(probed) | {"id": "a" * 16}
    other_seed["config"]["seed"] = probed["config"]["seed"] + 1
    stems = [entry.stem for entry in load(write_records([*records, other_seed])).figures]
    assert stems.count("removal_by_block") == 1
    assert not [stem for stem in stems if "_of_" in stem]


def test_figures_of_an_analysis_that_is_gone_are_removed(analyses: Path) -> None:
    write_report(load(analyses), analyses / "report")
    stale = sorted((analyses / "report" / "figures").glob("removal_by_block_of_*"))
    assert [path.suffix for path in stale] == [".pdf", ".png"]
    (analyses / "records" / f"{'b' * 16}.json").unlink()
    write_report(load(analyses), analyses / "report")
    assert not any(path.exists() for path in stale)
    assert (analyses / "report" / "figures" / "removal_by_block.png").exists()
