from __future__ import annotations

from typing import Any

import pytest

from experiments.records.files import Records
from experiments.report.experiment_specs import Definition
from experiments.report.request import parse

Made = list[dict[str, Any]]


def test_words_become_experiments_and_settings() -> None:
    asked = parse(["experiment=a,b", "train.steps=60", "train.learning_rate=1e-3", "model=tiny", "experiment=b,c"])
    assert asked.experiments == ("a", "b", "c")
    assert asked.settings == {"train.steps": 60, "train.learning_rate": 0.001, "model": "tiny"}
    assert parse([]).experiments == ()


@pytest.mark.parametrize("word", ["table6_prefusion", "=3", "train.steps=", "a=[1"])
def test_a_word_that_is_no_setting(word: str) -> None:
    with pytest.raises(ValueError, match="is no setting") as error:
        parse([word])
    assert "\n" not in str(error.value)


def test_experiments_come_in_the_order_asked(definition: Definition) -> None:
    other = Definition("other", "", definition.rows)
    assert parse(["experiment=other,table60_mixed"]).definitions([definition, other]) == (other, definition)
    assert parse([]).definitions([definition, other]) == (definition, other)
    with pytest.raises(ValueError, match="experiment: no table 'table6'; there are table60_mixed, other"):
        parse(["experiment=table6"]).definitions([definition, other])


def test_settings_choose_records(table_records: Made) -> None:
    table_records[0]["config"]["train"]["steps"] = 60
    records = Records(tuple(table_records[:9]), tuple(table_records[10:]), (), ())

    def ids(*words: str) -> list[str]:
        found = parse(words).records(records)
        return [record["id"] for record in (*found.finished, *found.failed)]

    assert ids("train.steps=60") == [table_records[0]["id"]]
    assert len(ids("model=tiny")) == len(ids("model.name=tiny")) == len(ids()) == 13
    assert ids("seed=2", "compressor=query") == [table_records[5]["id"], table_records[8]["id"]]
    with pytest.raises(ValueError, match=r"train\.steps=61: no record has it; found 200, 60"):
        ids("train.steps=61")
    with pytest.raises(ValueError, match=r"train\.stepz=60: no record has it$"):
        ids("train.stepz=60")
