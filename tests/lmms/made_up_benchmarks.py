"""Made-up items in the columns of the 18 public benchmarks, with prescribed answers and marks worked out by hand.

An item holds the columns that the task's code reads. `ANSWERS` has what the model is made to answer, by task and document.
`MARKS` has the score that this gives, by task and metric; the comments show the arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from PIL import Image

RED = Image.new("RGB", (48, 48), "red")
MVBENCH_FOLDERS = {
    "action_sequence": "star/Charades_segment",
    "moving_count": "clevrer/video_validation",
    "action_prediction": "star/Charades_segment",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "scene_transition": "scene_qa/video",
    "object_shuffle": "perception/videos",
    "object_existence": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "unexpected_action": "FunQA_test/test",
    "moving_direction": "clevrer/video_validation",
    "state_change": "perception/videos",
    "object_interaction": "star/Charades_segment",
    "character_order": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "counterfactual_inference": "clevrer/video_validation",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "moving_attribute": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
}
MLVU_TYPES = ["anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"]
MLVU_TEST_TYPES = [
    "anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning", "tutorialQA",
]  # fmt: skip


def _people(*answers: tuple[str, int]) -> list[str]:
    return [answer for answer, count in answers for _ in range(count)]


def _vqa_answers(*answers: tuple[str, int]) -> list[dict[str, Any]]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(_people(*answers))
    ]


def _mmbench(index: int, answer: str) -> dict[str, Any]:
    return {
        "index": index, "question": "what is it?", "hint": "nan", "answer": answer, "A": "a cat", "B": "a dog",
        "C": "a cow", "D": "a horse", "category": "object", "image": RED, "source": "made up", "L2-category": "coarse",
        "comment": "nan", "split": "dev",
    }  # fmt: skip


def _seed(question_id: str, answer: str, kind: str, frames: int) -> dict[str, Any]:
    return {
        "image": [RED] * frames, "question": "what is it?", "choice_a": "cat", "choice_b": "dog", "choice_c": "cow",
        "choice_d": "horse", "answer": answer, "data_type": kind, "question_id": question_id, "data_id": "1",
    }  # fmt: skip


def _mme(question_id: str, category: str, answer: str) -> dict[str, Any]:
    question = "is it red? Please answer yes or no."
    return {"question_id": question_id, "image": RED, "question": question, "answer": answer, "category": category}


def _pope(number: int, answer: str) -> dict[str, Any]:
    return {
        "id": str(number), "question_id": str(number), "question": "is it red?", "answer": answer,
        "image_source": "made up", "image": RED, "category": "random",
    }  # fmt: skip


def _llava(category: str) -> dict[str, Any]:
    return {
        "question_id": category, "question": "what is it?", "image": RED, "image_id": "1", "category": category,
        "caption": "a red square", "gpt_answer": "a square",
    }  # fmt: skip


def _mlvu(kind: str) -> dict[str, Any]:
    question = "what is it?\n(A) cat\n(B) dog\n(C) cow\n(D) horse"
    return {"video_name": "clip.mp4", "duration": 2.0, "question": question, "answer": "A", "task_type": kind}


def _split(name: str, *rows: dict[str, Any]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_list(list(rows))})


def data_set(path: str, name: str | None) -> DatasetDict:
    """Return the made-up items of a data set, by its path and configuration on the model hub."""
    if path == "OpenGVLab/MVBench":
        video = "frames" if name == "episodic_reasoning" else "clip.mp4"
        row = {"video": video, "question": "what is it?", "candidates": ["cat", "dog"], "answer": "dog"}
        return _split("train", row)
    image = {"image": RED, "question": "what is it?"}
    clip = {"video_name": "clip", "question": "what is it?", "answer": "dog"}
    rows = {
        ("lmms-lab-encoder/VQAv2", None): lambda: _split(
            "validation",
            {**image, "question_id": 1, "answers": _vqa_answers(("yes", 2), ("no", 8)), "multiple_choice_answer": "no"},
            {**image, "question_id": 2, "answers": _vqa_answers(("dog", 10)), "multiple_choice_answer": "dog"},
        ),
        ("lmms-lab-encoder/GQA", "testdev_balanced_instructions"): lambda: _split(
            "testdev",
            {"id": "1", "imageId": "7", "question": "is it red?", "answer": "yes", "fullAnswer": "yes, it is"},
            {"id": "2", "imageId": "7", "question": "where is it?", "answer": "left", "fullAnswer": "on the left"},
        ),
        ("lmms-lab-encoder/GQA", "testdev_balanced_images"): lambda: _split("testdev", {"id": "7", "image": RED}),
        ("lmms-lab-encoder/VizWiz-VQA", None): lambda: _split(
            "val",
            {**image, "question_id": "1", "answers": _people(("blue", 9), ("unanswerable", 1)), "category": "other"},
            {**image, "question_id": "2", "answers": _people(("red", 3), ("green", 7)), "category": "other"},
        ),
        ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"): lambda: _split(
            "test", *[{**image, "choices": ["sun", "moon"], "answer": 1, "hint": hint} for hint in ("", "it is night")]
        ),
        ("lmms-lab-encoder/textvqa", None): lambda: _split(
            "validation",
            {**image, "question_id": 1, "answers": _people(("stop", 10)), "ocr_tokens": ["STOP", "4"]},
            {**image, "question_id": 2, "answers": _people(("go", 1), ("stop", 9)), "ocr_tokens": ["STOP", "4"]},
        ),
        ("lmms-lab-encoder/POPE", None): lambda: _split(
            "test", *[_pope(i, answer) for i, answer in enumerate(("yes", "yes", "no", "no"))]
        ),
        ("lmms-lab-encoder/MME", None): lambda: _split(
            "test",
            _mme("1", "existence", "Yes"), _mme("1", "existence", "No"),
            _mme("2", "count", "Yes"), _mme("2", "count", "No"),
            _mme("3", "code_reasoning", "Yes"), _mme("3", "code_reasoning", "No"),
        ),
        ("lmms-lab-encoder/MMBench", "en"): lambda: _split(
            "dev", _mmbench(1, "A"), _mmbench(1_000_001, "B"), _mmbench(2, "C"), _mmbench(1_000_002, "D")
        ),
        ("lmms-lab-encoder/SEED-Bench", None): lambda: _split(
            "test", _seed("1", "A", "image", 1), _seed("2", "A", "image", 1), _seed("3", "B", "video", 3)
        ),
        ("lmms-lab-encoder/llava-bench-in-the-wild", None): lambda: _split(
            "train", *[_llava(category) for category in ("conv", "detail", "complex")]
        ),
        ("lmms-lab-encoder/MMVet", None): lambda: _split(
            "test", *[{**image, "question_id": f"v{i}", "answer": "a square", "capability": "rec"} for i in (1, 2)]
        ),
        ("lmms-eval/ActivityNetQA", None): lambda: _split(
            "test", *[{**clip, "question_id": f"clip_{i}", "type": "3"} for i in (1, 2)]
        ),
        ("lmms-eval/VideoChatGPT", "Generic"): lambda: _split("test", clip),
        ("lmms-eval/VideoChatGPT", "Temporal"): lambda: _split("test", clip),
        ("lmms-eval/VideoChatGPT", "Consistency"): lambda: _split(
            "test",
            {**clip, "question_1": "what is it?", "question_2": "None"},
            {**clip, "question_1": "None", "question_2": "which animal is it?"},
        ),
        ("sy1998/MLVU_dev", None): lambda: _split("test", *[_mlvu(kind) for kind in MLVU_TYPES]),
        ("sy1998/MLVU_Test", None): lambda: _split("test", *[_mlvu(kind) for kind in MLVU_TEST_TYPES]),
        ("lmms-eval/egoschema", "Subset"): lambda: _split(
            "test",
            *[
                {
                    "question_idx": str(i), "question": "what is it?", "video_idx": "clip", "answer": "1",
                    "option": ["A. cat", "B. dog", "C. cow", "D. horse", "E. hen"],
                }
                for i in (1, 2)
            ],
        ),
    }  # fmt: skip
    return rows[path, name]()


def video_files(home: Path) -> list[Path]:
    """Return where the video tasks look for the clip, below HF_HOME. The one named `frames` is a folder of frames."""
    mvbench = [
        home / "mvbench_video" / folder / ("frames" if name == "episodic_reasoning" else "clip.mp4")
        for name, folder in MVBENCH_FOLDERS.items()
    ]
    return [
        *dict.fromkeys(mvbench),
        home / "activitynetqa" / "all_test" / "v_clip.mp4",
        home / "videochatgpt" / "Test_Videos" / "clip.mp4",
        home / "mlvu" / "clip.mp4",
        home / "mlvu_test" / "clip.mp4",
        home / "egoschema" / "videos" / "clip.mp4",
    ]


MVBENCH_ANSWERS = {
    f"mvbench_{name}": ["(B) dog" if i < 10 else "A"] for i, name in enumerate(MVBENCH_FOLDERS)
}  # B is right
ANSWERS: dict[str, list[Any]] = {
    "vqav2_val": ["yes", "A dog."],
    "gqa": ["Yes.", "right"],
    "vizwiz_vqa_val": ["blue", "Red"],
    "scienceqa_img": ["B. moon", "moon"],
    "textvqa_val": ["stop", "go"],
    "textvqa_val_published": ["stop", "go"],
    "pope": ["Yes", "no", "yes", "No, it is not"],
    "mme": ["Yes", "No.", "yes", "yes", "yes", "no"],
    "mmbench_en_dev_static": ["A", "B", "C", "A"],
    "mmbench_en_dev_published": ["A", "B", "C", "A"],
    "seedbench": ["A", "B", "B. dog"],
    "seedbench_published": ["A", "B", "B. dog"],
    "seedbench_ppl": [[0.1, 0.9, 0.9, 0.9], [0.3, 0.2, 0.9, 0.9], [0.5, 0.4, 0.6, 0.7]],  # the losses of the options
    "mlvu_dev": ["A", "A", "A", "B", "B", "B", "B"],
    "mlvu_dev_published": ["A", "A", "A", "B", "B", "B", "B"],
    "mlvu_test": ["A", "A", "A", "B", "B", "B", "B", "B", "B"],
    "egoschema_subset": ["B", "(C) cow"],
    "llava_in_the_wild": ["good", "poor", "poor"],
    "mmvet": ["good", "poor"],
    "activitynetqa": ["good", "poor"],
    "videochatgpt_gen": ["good"],
    "videochatgpt_temporal": ["good"],
    "videochatgpt_consistency": ["good", "good"],
    "msvd_qa": ["Dog.", "a good dog", "cat"],
    "msrvtt_qa": ["Dog.", "a good dog", "cat"],
} | MVBENCH_ANSWERS
MARKS = {
    # Two of ten say yes: for each of these two, 1 of the other nine agrees (1/3); for each of the eight, 2 (2/3): 0.6.
    # All ten say dog: 1.
    ("vqav2_val", "exact_match"): (0.6 + 1) / 2,
    ("gqa", "exact_match"): 1 / 2,
    # Nine say blue: 1. Three say red: for each of them 2/3, for the seven others 1: 0.9.
    ("vizwiz_vqa_val", "exact_match"): (1 + 0.9) / 2,
    ("scienceqa_img", "exact_match"): 1 / 2,  # the letter counts, the word does not
    # All say stop: 1. One says go: for this one 0, for the nine others 1/3: 0.3.
    ("textvqa_val", "exact_match"): (1 + 0.3) / 2,
    ("textvqa_val_published", "exact_match"): (1 + 0.3) / 2,
    # One yes found, one missed, one false, and "No, it is not" counts as neither.
    ("pope", "pope_accuracy"): 1 / 4,
    ("pope", "pope_precision"): 1 / 2,
    ("pope", "pope_recall"): 1 / 2,
    ("pope", "pope_f1_score"): 1 / 2,
    # existence: both right, 100 and 100 more for the pair; count: one right, 50 and 0.
    ("mme", "mme_perception_score"): 200 + 50,
    ("mme", "mme_cognition_score"): 200,
    # The second question is right with its options in the first order alone.
    ("mmbench_en_dev_static", "gpt_eval_score"): 100 / 2,
    ("mmbench_en_dev_published", "gpt_eval_score"): 100 / 2,
    **{
        (task, f"seed_{part}"): mark
        for task in ("seedbench", "seedbench_published")
        for part, mark in (("image", 1 / 2), ("video", 1), ("all", 2 / 3))
    },
    ("seedbench_ppl", "acc"): 2 / 3,  # the lowest loss: A is right, B is wrong, B is right
    ("mlvu_dev", "mlvu_percetion_score"): 100 * 3 / 7,
    ("mlvu_dev_published", "mlvu_percetion_score"): 100 * 3 / 7,
    ("mlvu_test", "mlvu_percetion_score"): 100 * 3 / 9,
    ("egoschema_subset", "score"): 1 / 2,
    # The judge gives (8, 8) to the good answer and (8, 4) to the poor ones.
    ("llava_in_the_wild", "gpt_eval_llava_all"): 66.7,  # 16 of 24
    ("llava_in_the_wild", "gpt_eval_llava_conv"): 100.0,
    ("llava_in_the_wild", "gpt_eval_llava_detail"): 50.0,
    ("llava_in_the_wild", "gpt_eval_llava_complex"): 50.0,
    ("mmvet", "gpt_eval_score"): 100 * (1.0 + 0.5) / 2,
    ("activitynetqa", "gpt_eval_accuracy"): 100 / 2,
    ("activitynetqa", "gpt_eval_score"): (4 + 1) / 2,
    ("videochatgpt_gen", "gpt_eval_score_correctness"): 4,
    ("videochatgpt_gen", "gpt_eval_score_detailed_orientation"): 3,
    ("videochatgpt_gen", "gpt_eval_score_context"): 2,
    ("videochatgpt_temporal", "gpt_eval_score_temporal"): 5,
    ("videochatgpt_consistency", "gpt_eval_score_consistency"): 1,
    # "Dog." is the answer, "a good dog" is judged to be, "cat" is neither.
    **{
        (task, metric): mark
        for task in ("msvd_qa", "msrvtt_qa")
        for metric, mark in (
            ("exact_match", 1 / 3),
            ("gpt_eval_accuracy", 100 / 3),
            ("gpt_eval_score", (1 + 4 + 1) / 3),
        )
    },
    **{(task, "mvbench_accuracy"): 100 if answers == ["(B) dog"] else 0 for task, answers in MVBENCH_ANSWERS.items()},
}
