"""Files of answers: what they keep, and when a result is not taken from them. They need no lmms-eval."""

import json

import pytest

from experiments.lmms_eval_model.answer_files import answer_file, digest, document_line, read_result, write_answers
from experiments.lmms_eval_model.cell_benchmarks import standard_error, task_scores

KEY = {"task": "gqa", "weights": "90ab", "settings": {"seed": 0}}
RESULT = {"scores": {"gqa": {"exact_match": {"value": 0.5}}}}
LINES = [{"doc_id": 0, "answer": "yes"}, {"doc_id": 1, "answer": "nein \u2013 ja"}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / answer_file("gqa", KEY)
    write_answers(path, KEY, RESULT, LINES)
    return path


def test_read_result_returns_what_was_written_with_one_line_a_document(file):
    assert read_result(file, KEY) == RESULT
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == LINES


@pytest.mark.parametrize("name", ["task", "weights", "settings"])
def test_read_result_of_another_key_returns_none(file, name):
    other = {**KEY, name: "other"}
    assert read_result(file, other) is None
    assert answer_file("gqa", other) != answer_file("gqa", KEY)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:-3]),
        lambda path: path.write_text(path.read_text().replace('"yes"', '"no"')),
        lambda path: path.write_text(path.read_text().partition("\n")[2]),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
)
def test_read_result_of_a_damaged_file_returns_none(file, damage):
    damage(file)
    assert read_result(file, KEY) is None


def test_digest_does_not_depend_on_addresses_of_functions():
    texts = [f"<function visuals at 0x{address}>" for address in ("7fe86632f240", "7f0012ab0000")]
    assert digest({"doc_to_visual": texts[0]}) == digest({"doc_to_visual": texts[1]})
    assert digest({"doc_to_visual": texts[0]}) != digest({"doc_to_visual": "<function other at 0x1>"})


def test_document_line_of_scored_options_keeps_all_answers_and_the_task_s_metrics_alone():
    entry = {"doc_id": 1, "arguments": ["a?", 3], "target": 0, "filtered_resps": [(0.5, True), (0.7, False)], "acc": 1}
    line = document_line("choice", {**entry, "doc_hash": "x"}, ["acc"])
    assert line["answer"] == [(0.5, True), (0.7, False)]
    assert line["scores"] == {"acc": 1}
    assert line["prompt"] == "a?"


def test_task_scores_skips_what_is_no_number_and_names_other_filters():
    results = {" ": " ", "alias": "t", "acc,none": 0.5, "acc,strict": 0.25, "acc_stderr,none": 0.1, "loss,none": []}
    run = {"results": {"t": results}, "higher_is_better": {"t": {"acc": True}}}
    assert {name: found["value"] for name, found in task_scores(run, "t").items()} == {"acc": 0.5, "acc,strict": 0.25}
    assert task_scores(run, "t")["acc"]["higher_is_better"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_task_scores_of_a_score_that_is_not_finite_raises_value_error(value):
    with pytest.raises(ValueError, match=f"task t.*acc.*{value}"):
        task_scores({"results": {"t": {"acc,none": value}}}, "t")


def test_standard_error_of_mappings_is_that_of_their_scores():
    documents = [{"score": 1, "category": "a"}, {"score": 0, "category": "a"}]
    assert standard_error(0.5, documents) == pytest.approx(0.5)  # variance 1/2 over 2 documents
    assert standard_error(0.5, [{"category": "a"}, {"category": "b"}]) is None
    assert standard_error(1.0, [1.0]) is None
