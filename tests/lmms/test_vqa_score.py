"""The scores of generated answers against those of lmms-eval's tasks `vqav2_val` and `gqa`."""

from __future__ import annotations

import copy
import random

import pytest

from experiments.data.annotators import ANNOTATORS
from experiments.evaluation.vqa_score import gqa_match, normalise_answer, vqa_accuracy

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

# Not "somebody'd": lmms-eval turns it into "somebodyd", against the published rule.
WORDS = (
    *(
        "two",
        "Ten",
        "none",
        "a",
        "The",
        "an",
        "cat",
        "cats",
        "T-shirt",
        "girl's",
        "dont",
        "couldnt've",
        "Ive",
        "yall'd've",
    ),
    *(
        "1,000",
        "3.5",
        "3.",
        ".5",
        "U.S.",
        "2:50",
        "red/blue",
        "(left)",
        "yes!",
        "1,000-2,000",
        "...",
        "-",
        "a/an",
        "its",
    ),
)


def draw_text(rng: random.Random) -> str:
    """Draw one to four known words, or short sequences of letters, digits and punctuation, with several separators."""
    characters = "abT019.,;:/'\"?!-_ \n"
    parts = [
        rng.choice(WORDS) if rng.random() < 0.7 else "".join(rng.choices(characters, k=rng.randint(1, 6)))
        for _ in range(rng.randint(1, 4))
    ]
    return rng.choice((" ", "  ", ", ", "", "\n")).join(parts)


def test_normalise_answer_of_500_texts_equals_lmms_eval() -> None:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs, rng = EvalAIAnswerProcessor(), random.Random(0)
    for text in [*WORDS, *(draw_text(rng) for _ in range(500))]:
        one_line = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalise_answer(text) == theirs.process_digit_article(theirs.process_punctuation(one_line)), repr(text)


def test_vqa_accuracy_of_300_questions_equals_the_task_of_lmms_eval() -> None:
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    rng, scores = random.Random(1), []
    for number in range(300):
        texts = [draw_text(rng) for _ in range(rng.randint(1, 4))]
        references = [rng.choice(texts) for _ in range(ANNOTATORS)]
        answers = [{"answer": text, "answer_id": i} for i, text in enumerate(references)]
        document = {"question_id": number, "answers": copy.deepcopy(answers)}
        answer = rng.choice(texts)
        scores.append(vqa_accuracy(answer, references))
        assert scores[-1] == pytest.approx(vqav2_process_results_val(document, [answer])["exact_match"])
    assert set(scores) == {0.0, 0.3, 0.6, 0.9, 1.0}


def test_gqa_match_of_300_answers_equals_the_metric_of_lmms_eval() -> None:
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    rng = random.Random(2)
    for _ in range(300):
        reference = draw_text(rng).strip()
        answer = rng.choice((reference, reference.upper(), f"{reference}.", draw_text(rng))).strip()
        theirs = exact_match_hf_evaluate([answer], [reference], ignore_case=True, ignore_punctuation=True)
        assert gqa_match(answer, [reference]) == theirs["exact_match"], (answer, reference)
