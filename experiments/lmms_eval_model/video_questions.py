"""MSVD-QA and MSRVTT-QA from their authors' files, judged and by exact match. lmms-eval has neither."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm")


class AuthorsVideoQuestions(ConfigurableTask):
    """Questions of `test_qa.json` about the videos of the folder `video`, both in a folder of HF_HOME.

    The files are those of Xu et al. (2017), https://github.com/xudejing/video-question-answering. The name of the folder
    is the task's `dataset_path`.

    Raises:
        FileNotFoundError: If there is no test_qa.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the authors' file as lmms-eval's data set. Nothing is downloaded."""
        file = _folder(self.config.dataset_path) / "test_qa.json"
        if not file.is_file():
            raise FileNotFoundError(f"task {self.config.task}: no file '{file}'; put the authors' file there")
        rows = json.loads(file.read_text())
        names = ("question", "answer", "video_id", "id")
        documents = [{"data": self.config.dataset_path} | {name: row[name] for name in names} for row in rows]
        self.dataset = DatasetDict({"test": Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset


def question_video(document: dict[str, Any]) -> list[str]:
    """Return the path of a question's video.

    MSVD's videos are vid1.avi and so on, or have the names of `youtube_mapping.txt`. MSRVTT's are video0.mp4 and so on.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder, number = _folder(document["data"]), document["video_id"]
    name = f"vid{number}" if document["data"] == "msvd_qa" else f"video{number}"
    mapping = folder / "youtube_mapping.txt"
    lines = mapping.read_text().splitlines() if mapping.is_file() else []
    clips = {number_name: clip for clip, number_name in map(str.split, lines)}
    for stem in (name, clips.get(name, name)):
        for suffix in VIDEO_SUFFIXES:
            if (file := folder / "video" / f"{stem}{suffix}").is_file():
                return [str(file)]
    raise FileNotFoundError(
        f"task {document['data']}: no video '{folder / 'video' / name}' ({', '.join(VIDEO_SUFFIXES)})"
    )


def score_answer(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return an answer's exact match, and the judge's decision and score from 0 to 5.

    Exact match compares with the authors' answer, one word, without case and final punctuation. The judge has the prompt
    of Video-ChatGPT (Maaz et al. 2024), which lmms-eval has for ActivityNet-QA.

    Raises:
        ValueError: If the judge gives no decision.
    """
    from lmms_eval.tasks.activitynetqa.utils import get_eval, parse_score

    answer = results[0]
    review, _ = get_eval(document["question"], document["answer"], answer, 64)
    judgement = parse_score(review)
    if judgement is None:
        raise ValueError(f"task {document['data']}, question {document['id']}: the judge gave no score, but {review!r}")
    return {
        "exact_match": float(_plain(answer) == _plain(document["answer"])),
        "gpt_eval_accuracy": 100.0 * (judgement[0] == "yes"),
        "gpt_eval_score": float(judgement[1]),
    }


def _plain(text: str) -> str:
    return text.strip().rstrip(string.punctuation).lower()


def _folder(name: str) -> Path:
    return Path(os.environ["HF_HOME"]).expanduser() / name
