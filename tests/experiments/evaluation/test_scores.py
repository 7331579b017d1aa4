from experiments.evaluation.accuracy import by_kind


def test_percentages_by_hand():
    record = {
        "accuracy": {"image": "1101", "blank": "0001"},
        "data": {"kinds": ["place", "place", "count", "count"], "guess": "0000"},
    }
    rows = {line.split()[0]: line.split()[1:] for line in by_kind(record).splitlines()[1:]}
    assert rows["place"] == ["2", "100.0", "0.0", "0.0"]
    assert rows["count"] == ["2", "50.0", "50.0", "0.0"]
    assert rows["all"] == ["4", "75.0", "25.0", "0.0"]
