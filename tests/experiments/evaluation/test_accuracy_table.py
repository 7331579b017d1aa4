"""The printed table of accuracies."""

from experiments.evaluation.accuracy import accuracy_by_question_type


def test_accuracy_by_question_type_of_known_outcomes():
    record = {
        "accuracy": {"image": "1101", "blank": "0001"},
        "data": {"kinds": ["place", "place", "count", "count"], "guess": "0000"},
    }
    rows = {line.split()[0]: line.split()[1:] for line in accuracy_by_question_type(record).splitlines()[1:]}
    assert rows["place"] == ["2", "100.0", "0.0", "0.0"]
    assert rows["count"] == ["2", "50.0", "50.0", "0.0"]
    assert rows["all"] == ["4", "75.0", "25.0", "0.0"]


def test_accuracy_by_question_type_keeps_a_type_that_is_named_all():
    record = {"accuracy": {"image": "110"}, "data": {"kinds": ["all", "all", "count"]}}
    rows = [line.split() for line in accuracy_by_question_type(record).splitlines()]
    assert [row for row in rows if row[0] == "all"] == [["all", "2", "100.0"], ["all", "3", "66.7"]]


def test_accuracy_by_question_type_with_generated_answers_has_a_column_of_their_scores():
    record = {
        "accuracy": {"image": "11"},
        "data": {"kinds": ["place", "count"]},
        "generated": {"metric": "vqa", "references": 10, "image": {"scores": [0.3, 1.0]}},
    }
    header, *lines = accuracy_by_question_type(record).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert "VQA accuracy (generated)" in header
    assert (rows["place"], rows["count"], rows["all"]) == (
        ["1", "100.0", "30.0"],
        ["1", "100.0", "100.0"],
        ["2", "100.0", "65.0"],
    )
