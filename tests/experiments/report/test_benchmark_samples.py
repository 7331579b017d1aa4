"""The frame of scores and depths by document, from hand-made records and files of answers."""

import hashlib
import json
import math

import pandas as pd
import pytest

from experiments.report import load
from experiments.report.results import Report

LAYERS = 2
TEXT_ALONE = ("pope", 9)
# By document: its answer is needed up to layer 2, up to layer 1, always right, always wrong.
DOCUMENTS = [("gqa", 4), ("gqa", 0), ("gqa", 2), ("pope", 0)]
REMOVAL = ["0010", "0110", "1110"]  # hidden from layer 0, 1, 2 on
ONSET = ["1110", "0110", "0010"]  # hidden in the first 0, 1, 2 layers
KNOCKOUT = ["1110", "1010", "0110"]  # intact, blocked in layer 0, in layer 1
MASS = [[0.6, 0.9, None], [0.4, 0.05, None]]  # of the first three documents


def runs(layers, outcomes):
    return [{"layers": list(each), "correct": digits} for each, digits in zip(layers, outcomes, strict=True)]


def probes():
    pair = [["instruction", "vision"]]
    part = {"pairs": pair, "samples": 3, "mass": [MASS], "entropy": [MASS]}
    names = [f"right {i}" for i in range(len(DOCUMENTS))]
    documents = [{"task": t, "doc_id": i, "answer": text} for (t, i), text in zip(DOCUMENTS, names, strict=True)]
    return {
        "documents": documents,
        "without_image": [{"task": "pope", "doc_id": 9, "answer": "text"}],
        "attention": part,
        "removal": {"block": 1, "inside": runs([[0], [1]], REMOVAL[:2]), "onward": runs([[0, 1], [1], []], REMOVAL)},
        "onset": {"block": 1, "upto": runs([[], [0], [0, 1]], ONSET)},
        "knockout": {"width": 1, "windows": runs([[], [0], [1]], KNOCKOUT)},
    }


def answers(*keys):
    """Lines of a file of answers. The scores of POPE are mappings, as the task logs them."""
    scores = {"gqa": lambda i: {"exact_match": i / 4}, "pope": lambda i: {"pope_f1_score": {"score": 1.0, "image": 7}}}
    return [
        {"task": t, "doc_id": i, "prompt": "?", "answer": f"{t} {i}", "target": "yes", "scores": scores[t](i)}
        for t, i in keys
    ]


@pytest.fixture
def write(tmp_path):
    """A function that writes one record and its file of answers, and returns the results folder."""

    def call(lines, analysed):
        body = "{}\n" + "".join(json.dumps(line) + "\n" for line in lines)
        for folder in ("answers", "records"):
            (tmp_path / folder).mkdir()
        (tmp_path / "answers" / "both.jsonl").write_text(body)
        cost = {"flops": 1e9, "cache_bytes": 10, "visual_tokens": 36, "visual_tokens_mean": 36.0}
        task = {
            "scores": {"gqa": {"exact_match": {"value": 0.5}}, "pope": {"pope_f1_score": {"value": 1.0}}},
            "documents": 4,
            "documents_hash": "d0",
            "prompt": "?",
            "versions": {"gqa": "0.0"},
            "settings_hash": "s0",
            "cost": cost,
            "probes": analysed,
            "file": "answers/both.jsonl",
            "sha256": hashlib.sha256(body.encode()).hexdigest(),
        }
        record = {
            "schema": 1, "id": "0" * 16, "experiment": "single", "name": "tiny, seed 3", "status": "finished",
            "error": None, "config": {"seed": 3, "data": {"name": "lmms", "tasks": ["both"]}}, "cost": cost,
            "data": {"name": "lmms", "fingerprint": "f0", "examples": 4},
            "benchmarks": {"lmms_eval": "0.7.3", "weights": "w0", "judge": None, "tasks": {"both": task}},
            "model": {
                "label": "LLaVA", "layers": LAYERS, "visual_tokens": 36, "prefusion_layers": 0, "compressor": "none",
                "parameters": 1000,
            },
            "provenance": {"started": "2026-11-29T10:00:00"},
        }  # fmt: skip
        (tmp_path / "records" / "0.json").write_text(json.dumps(record))
        return tmp_path

    return call


def test_frame_joins_scores_and_depths_of_documents_in_another_order(write):
    keys = sorted([*DOCUMENTS, TEXT_ALONE])
    frame = load(write(answers(*keys), probes())).frame()
    assert list(zip(frame.task, frame.doc_id, strict=True)) == keys
    assert set(frame.benchmark) == {"both"}
    assert frame.seed.tolist() == [3] * 5
    rows = {(row["task"], row["doc_id"]): row for row in frame.to_dict("records")}
    deep, shallow, blind, wrong = (rows[key] for key in DOCUMENTS)
    text = rows[TEXT_ALONE]
    assert (text["analysed_answer"], text["score_pope_f1_score"]) == ("text", 1.0)
    assert all(pd.isna(text[name]) for name in ("image", "no_image", "removal_depth", "onset", "attention"))
    assert [row["analysed_answer"] for row in (deep, shallow, blind, wrong)] == [f"right {i}" for i in range(4)]
    assert [row["removal_depth"] for row in (deep, shallow)] == [2, 1]
    assert [row["onset"] for row in (deep, shallow)] == [1, 2]
    assert [row["knockout_depth"] for row in (deep, shallow)] == [2, 1]
    for row in (blind, wrong):
        assert all(pd.isna(row[name]) for name in ("removal_depth", "onset", "knockout_depth"))
    assert [row["image"] for row in (deep, shallow, blind, wrong)] == [1, 1, 1, 0]
    assert [row["no_image"] for row in (deep, shallow, blind, wrong)] == [0, 0, 1, 0]
    assert [row["attention_depth"] for row in (deep, shallow)] == [2, 1]  # 0.6 of 1.0; 0.9 of 0.95
    assert deep["attention"] == (0.6, 0.4)
    assert blind["attention"] == (None, None)
    assert math.isnan(wrong["attention"])  # attention was recorded on three documents
    assert [row["score_exact_match"] for row in (deep, shallow, blind)] == [1.0, 0.0, 0.5]
    assert math.isnan(wrong["score_exact_match"])
    assert wrong["score_pope_f1_score"] == 1.0


def test_frame_of_a_cell_without_analyses_has_scores_alone(write):
    frame = load(write(answers(*DOCUMENTS), None)).frame()
    assert frame.score_exact_match.tolist()[:3] == [1.0, 0.0, 0.5]
    assert frame[["image", "no_image", "removal_depth", "onset", "knockout_depth", "attention_depth"]].isna().all(None)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([*DOCUMENTS[1:], TEXT_ALONE], "task gqa: document 4 .*no score"),
        ([*DOCUMENTS, TEXT_ALONE, ("pope", 3)], "task pope: document 3 .*no analysis"),
        ([*DOCUMENTS, TEXT_ALONE, DOCUMENTS[2]], "task gqa: document 2 .*twice"),
    ],
)
def test_frame_of_documents_that_do_not_match_raises_value_error_with_the_task(write, keys, words):
    report = load(write(answers(*keys), probes()))
    with pytest.raises(ValueError, match=words):
        report.frame()


def test_frame_of_a_document_that_was_analysed_twice_raises_value_error_with_the_task(write):
    analysed = probes()
    analysed["documents"][2] = analysed["documents"][1]
    report = load(write(answers(*DOCUMENTS), analysed))
    with pytest.raises(ValueError, match=r"task gqa: document 0 .*twice"):
        report.frame()


def test_frame_of_benchmarks_without_the_results_folder_raises_value_error(write):
    report = Report(load(write(answers(*DOCUMENTS), None)).records)
    with pytest.raises(ValueError, match="folder: None"):
        report.frame()


def test_record_whose_outcomes_do_not_fit_its_documents_is_refused_with_the_task(write):
    analysed = probes()
    del analysed["documents"][3]
    with pytest.raises(ValueError, match=r"benchmarks\.tasks\.both\.probes\.removal\.inside\[0\].*4 outcomes for 3"):
        load(write(answers(*DOCUMENTS), analysed))
