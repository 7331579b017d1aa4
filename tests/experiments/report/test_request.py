"""Tests of report requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.experiment_specs import ExperimentSpec
from experiments.report.request import parse_request, split_results

RecordList = list[dict[str, Any]]


def test_parse_request_splits_experiments_and_settings() -> None:
    request = parse_request(
        ["experiment=a,b", "train.max_steps=60", "train.learning_rate=1e-3", "model=tiny", "experiment=b,c"]
    )
    assert request.experiments == ("a", "b", "c")
    assert request.settings == {"train.max_steps": 60, "train.learning_rate": 0.001, "model": "tiny"}
    assert parse_request([]).experiments == ()


@pytest.mark.parametrize("word", ["table6_prefusion", "=3", "train.max_steps=", "a=[1"])
def test_parse_request_malformed_word_raises(word: str) -> None:
    with pytest.raises(ValueError, match=f"'{re.escape(word)}' is not a setting") as error:
        parse_request([word])
    assert "\n" not in str(error.value)


def test_select_specs_keeps_the_requested_order(spec: ExperimentSpec) -> None:
    other = ExperimentSpec("other", "", spec.rows)
    assert parse_request(["experiment=other,table60_mixed"]).select_specs([spec, other]) == (other, spec)
    assert parse_request([]).select_specs([spec, other]) == (spec, other)
    with pytest.raises(ValueError, match=r"experiment: .*'table6'.* table60_mixed, other"):
        parse_request(["experiment=table6"]).select_specs([spec, other])


def test_select_records_filters_by_settings(table_records: RecordList) -> None:
    table_records[0]["config"]["train"]["max_steps"] = 60
    records = Records(tuple(table_records[:9]), tuple(table_records[10:]), (), ())

    def ids(*words: str) -> list[str]:
        found = parse_request(words).select_records(records)
        return [record["id"] for record in (*found.finished, *found.failed)]

    assert ids("train.max_steps=60") == [table_records[0]["id"]]
    assert ids("train.steps=60") == [table_records[0]["id"]]  # the old name of the setting
    assert len(ids("model=tiny")) == len(ids("model.name=tiny")) == len(ids()) == 13
    assert ids("seed=2", "compressor=query") == [table_records[5]["id"], table_records[8]["id"]]
    with pytest.raises(ValueError, match=r"train\.max_steps=61: no record has this setting.* 200, 60"):
        ids("train.max_steps=61")
    with pytest.raises(ValueError, match=r"train\.stepz=60: no record has this setting$"):
        ids("train.stepz=60")


@pytest.mark.parametrize(
    ("words", "option", "folder"),
    [
        ([], None, "results"),
        ([], "mine", "mine"),
        (["results=mine"], None, "mine"),
        (["results=mine"], "mine", "mine"),
        (["results=first", "results=last"], None, "last"),
        (["results='with space'"], None, "with space"),
        (['results="with space"'], None, "with space"),
        (["results=with space"], None, "with space"),
        (["results=${oc.env:MY_RESULTS}/a"], None, "from the environment/a"),
        (["results=a=b"], None, "a=b"),
        (["results=on"], None, "on"),
        (["results=1e3"], None, "1e3"),
        (["results=~/a#b: c"], None, "~/a#b: c"),
    ],
)
def test_split_results_returns_the_folder_as_written(
    words: list[str], option: str | None, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_RESULTS", "from the environment")
    others = ["experiment=a", "seed=0"]
    assert split_results([others[0], *words, others[1]], option and Path(option)) == (Path(folder), others)


@pytest.mark.parametrize(
    ("words", "option"),
    [(["results="], None), (["results=null"], None), (["results=${oc.env:NO_SUCH}"], None), (["results=a"], "b")],
)
def test_split_results_without_one_folder_raises(words: list[str], option: str | None) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(words[0])}") as error:
        split_results(words, option and Path(option))
    assert "\n" not in str(error.value)
