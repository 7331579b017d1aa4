"""The right answer that analyses by layer read, on log entries with the columns of the public benchmarks."""

import pytest

from experiments.lmms_eval_model.target_answers import analysed_answer


def entry(target, own="?", **document):
    return {"doc_id": 7, "doc": document, "target": target, "filtered_resps": [own]}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("Yes", "Yes"),
        (" yes. ", "yes."),
        ("YES", "YES"),
        ("yes, it is", "yes"),
        ("no", "yes"),
        ("", "yes"),
        ("...", "yes"),
    ],
)
def test_analysed_answer_is_the_models_own_where_it_differs_in_case_and_outer_punctuation_alone(own, expected):
    assert analysed_answer("gqa", entry("yes", own)) == expected


def test_analysed_answer_of_annotators_is_the_most_frequent_and_the_first_of_equals():
    texts = [{"answer": text, "answer_id": i} for i, text in enumerate(["dog", "cat", "cat", "hen"])]
    assert analysed_answer("vqav2_val", entry("answer", answers=texts)) == "cat"
    assert analysed_answer("textvqa_val", entry("answer", answers=["stop", "go", "go", "stop"])) == "stop"
    assert analysed_answer("own", entry(["b", "a", "a"])) == "a"


def test_analysed_answer_of_options_is_the_letter_that_the_prompt_asks_for():
    assert analysed_answer("mvbench_action_count", entry("3", candidates=["2", "3"])) == "B"
    assert analysed_answer("egoschema_subset", entry("4", "e", option=["A. cat"])) == "e"
    assert analysed_answer("mlvu_dev", entry("C", candidates=["cat", "C"])) == "C"


def test_analysed_answer_of_scored_options_is_the_text_of_the_right_one():
    scored = entry(1, own=(0.5, True))
    assert analysed_answer("choice", scored, [" cat", " dog"]) == "dog"
    assert analysed_answer("choice", scored | {"target": "1"}, [" cat", " dog"]) == "dog"
    assert analysed_answer("choice", scored | {"target": "cat"}, [" cat", " dog"]) == "cat"
    assert analysed_answer("choice", scored | {"target": "1"}, [" 1", " 2"]) == "1"
    assert analysed_answer("count", entry(2, "2")) == "2"


@pytest.mark.parametrize("target", [None, "", [], 0.5, [None]])
def test_analysed_answer_without_a_text_raises_value_error_with_task_and_document(target):
    with pytest.raises(ValueError, match=r"task own, document 7: .*probes"):
        analysed_answer("own", entry(target))
