"""VQA accuracy and GQA's exact match, against marks worked out by hand from their published rules."""

from itertools import combinations

import pytest

from experiments.evaluation.vqa_score import gqa_match, normalise_answer, vqa_accuracy

NORMALISED = {  # by the processing that https://visualqa.org/evaluation.html describes
    "Two.": "2",
    "two": "2",
    "None": "0",
    "Zero zebras": "0 zebras",
    "ten": "10",
    "eleven": "eleven",
    "twenty one": "twenty 1",
    "a cat": "cat",
    "The Cat": "cat",
    "an": "",
    "the a an": "",
    "another": "another",
    "dont": "don't",
    "Dont know": "don't know",
    "don't": "don't",
    "couldnt've": "couldn't've",
    "its": "its",
    "1,000": "1000",
    "100,978 km": "100978 km",
    "red, blue": "red blue",
    "red,blue": "red blue",
    "3.5": "3.5",
    "3.": "3",
    ".5": ".5",
    "U.S.": "us",
    "red/blue": "red blue",
    "red / blue": "red blue",
    "T-shirt": "t shirt",
    "t -shirt": "t shirt",
    "girl's": "girl's",
    "2:50 pm": "2:50 pm",
    "yes!": "yes",
    "what?no": "what no",
    "(left)": "left",
    "1,000-2,000": "10002000",  # a comma inside a number removes all punctuation without a space
    "  two\n\tdogs ": "2 dogs",
    "": "",
}


@pytest.mark.parametrize(("text", "normalised"), NORMALISED.items())
def test_normalise_answer_of_known_texts(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("matches", "score"),
    # One of ten: the nine sets that hold it give 1/3, one gives 0. Three: three sets of two matches give 2/3, seven give 1.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_number_of_matching_annotators(matches: int, score: float) -> None:
    references = ["A dog."] * matches + ["cat"] * (10 - matches)
    assert vqa_accuracy("dog", references) == score
    sets_of_nine = [list(chosen).count("A dog.") for chosen in combinations(references, 9)]
    assert score == pytest.approx(sum(min(1, count / 3) for count in sets_of_nine) / 10)


def test_vqa_accuracy_with_one_reference_is_exact_match_of_normalised_answers() -> None:
    assert vqa_accuracy("Two cats.", ["2 cats"]) == 1
    assert vqa_accuracy("two dogs", ["2 cats"]) == 0


@pytest.mark.parametrize("count", [0, 2, 9, 11])
def test_vqa_accuracy_with_another_number_of_references_names_it(count: int) -> None:
    with pytest.raises(ValueError, match=rf"references: .*found {count}"):
        vqa_accuracy("cat", ["cat"] * count)


@pytest.mark.parametrize(
    ("answer", "reference", "match"),
    [
        ("Yes.", "yes", 1),
        (" yes\n", "yes", 1),
        ("t-shirt", "tshirt", 1),  # punctuation goes without a space
        ("a cat", "cat", 0),  # articles stay
        ("two", "2", 0),  # number words stay
        ("yes, it is", "yes", 0),
    ],
)
def test_gqa_match_ignores_case_and_punctuation_alone(answer: str, reference: str, match: int) -> None:
    assert gqa_match(answer, [reference]) == match
