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
