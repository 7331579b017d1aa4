"""The public benchmarks on made-up items in their real columns, through lmms-eval's own tasks, with marks by hand."""

import json
import os

import numpy as np
import pytest

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

from tests.lmms.clips import write_clip  # noqa: E402
from tests.lmms.judge_stub import judge  # noqa: E402
from tests.lmms.made_up_benchmarks import ANSWERS, MARKS, MVBENCH_ANSWERS, data_set, video_files  # noqa: E402

IMAGE_TASKS = [
    "vqav2_val", "gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val", "textvqa_val_published", "pope", "mme",
    "mmbench_en_dev_static", "mmbench_en_dev_published", "seedbench", "seedbench_published", "seedbench_ppl",
]  # fmt: skip
VIDEO_TASKS = ["mvbench", "mlvu_dev", "mlvu_dev_published", "mlvu_test", "egoschema_subset"]
JUDGED_BY_ENDPOINT = ["activitynetqa", "videochatgpt", "msvd_qa", "msrvtt_qa"]
JUDGED_BY_BASE = ["llava_in_the_wild", "mmvet"]


def prescribed(model, processor):
    """Return the model with its answers replaced by the prescribed ones, after it has answered each request itself."""
    from experiments.lmms_eval_model.model import BuiltModel

    class PrescribedAnswers(BuiltModel):
        def generate_until(self, requests):
            for request in requests:
                request.args[1]["max_new_tokens"] = 2
            written = super().generate_until(requests)
            assert all(isinstance(text, str) for text in written)
            return [ANSWERS[request.args[4]][request.args[3]] for request in requests]

        def loglikelihood(self, requests):
            pairs = super().loglikelihood(requests)
            losses = [ANSWERS[request.args[4]][request.args[3]][request.idx] for request in requests]
            return [(loss, greedy) for loss, (_, greedy) in zip(losses, pairs, strict=True)]

    return PrescribedAnswers(model, processor, batch_size=3)


def put_videos(home):
    """Write the clip, or the folder of its frames, to each place where a video task looks for it."""
    from PIL import Image

    frames = [np.full((48, 48, 3), value, np.uint8) for value in (40, 200)]
    for path in video_files(home):
        if path.name == "frames":
            path.mkdir(parents=True)
            for i, frame in enumerate(frames):
                Image.fromarray(frame).save(path / f"{i}.jpg")
        else:
            write_clip(path, frames)
    for name, video in (("msvd_qa", "vid7.avi"), ("msrvtt_qa", "video7.mp4")):
        write_clip(home / name / "video" / video, frames)
        questions = [{"question": "what is it?", "answer": "dog", "video_id": 7, "id": i} for i in range(3)]
        (home / name / "test_qa.json").write_text(json.dumps(questions))


@pytest.fixture(scope="module")
def results(mini, home, tmp_path_factory):
    """The results of all tasks, and the paths at which the judge was asked."""
    import datasets

    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    put_videos(home)
    output = tmp_path_factory.mktemp("output")

    def local_data(path, name=None, split=None, **options):
        data = data_set(path, name)
        return data[split] if split else data

    parts, asked = {}, {}
    with pytest.MonkeyPatch.context() as patch, judge() as (address, paths):
        patch.setattr(datasets, "load_dataset", local_data)
        # `Dataset.map` of several processes puts a copy in place of os.environ, in which the judge's address would stay.
        patch.setattr(os, "environ", os.environ)
        patch.setenv("OPENAI_API_KEY", "none")
        for url, tasks in (
            (f"{address}/chat/completions", IMAGE_TASKS + VIDEO_TASKS + JUDGED_BY_ENDPOINT),
            (address, JUDGED_BY_BASE),
        ):
            patch.setenv("OPENAI_API_URL", url)
            paths.clear()
            run = evaluate_tasks(prescribed(*mini), tasks, output)
            parts |= run["results"]
            asked[url] = list(paths)
            parts.setdefault("samples", {}).update(run["samples"])
    return parts, asked


@pytest.mark.parametrize(("task", "metric"), MARKS)
def test_benchmark_with_prescribed_answers_has_the_mark_worked_out_by_hand(results, task, metric):
    assert results[0][task][f"{metric},none"] == pytest.approx(MARKS[task, metric])


def test_judged_benchmarks_ask_the_judge_at_the_endpoint(results):
    assert all(path == "/v1/chat/completions" for paths in results[1].values() for path in paths)
    # ActivityNet-QA 2, VideoChatGPT 3 + 1 + 1, MSVD-QA and MSRVTT-QA 3 each; LLaVA-Bench 3, MM-Vet 2.
    assert sorted(len(paths) for paths in results[1].values()) == [5, 13]


def test_published_prompts_hold_what_the_scripts_of_the_paper_write(results):
    prompts = {task: entries[0]["arguments"][0] for task, entries in results[0]["samples"].items()}
    assert "Reference OCR token: STOP, 4" in prompts["textvqa_val_published"]
    assert "Reference OCR token" not in prompts["textvqa_val"]
    assert "several options" not in prompts["mmbench_en_dev_published"]
    assert "several options" in prompts["mmbench_en_dev_static"]
    assert prompts["mlvu_dev_published"].endswith("(D) horse\nAnswer with one letter.")


def test_mvbench_published_asks_for_one_letter_in_all_of_its_tasks(mini, home, results, tmp_path, monkeypatch):
    import datasets

    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **options: data_set(path, name))
    run = evaluate_tasks(prescribed(*mini), ["mvbench_published"], tmp_path)
    assert set(run["samples"]) == set(MVBENCH_ANSWERS)
    for task, entries in run["samples"].items():
        assert entries[0]["arguments"][0].endswith("(B) dog\nAnswer with one letter.")
        assert run["results"][task]["mvbench_accuracy,none"] == MARKS[task, "mvbench_accuracy"]


ANALYSED = {
    "vqav2_val": ["no", "dog"],  # "A dog." is another text than "dog"
    "gqa": ["Yes.", "left"],
    "vizwiz_vqa_val": ["blue", "green"],
    "scienceqa_img": ["B", "B"],
    "textvqa_val": ["stop", "stop"],
    "textvqa_val_published": ["stop", "stop"],
    "pope": ["Yes", "yes", "no", "no"],
    "mme": ["Yes", "No.", "yes", "No", "yes", "no"],
    "mmbench_en_dev_static": ["A", "B", "C", "D"],
    "mmbench_en_dev_published": ["A", "B", "C", "D"],
    "seedbench": ["A", "A", "B"],
    "seedbench_published": ["A", "A", "B"],
    "seedbench_ppl": ["cat", "cat", "dog"],
    "egoschema_subset": ["B", "B"],
    "llava_in_the_wild": ["a square"] * 3,
    "mmvet": ["a square"] * 2,
    "activitynetqa": ["dog"] * 2,
    "msvd_qa": ["Dog.", "dog", "dog"],
    "msrvtt_qa": ["Dog.", "dog", "dog"],
    "mlvu_dev": ["A"] * 7,
    "mlvu_test": ["A"] * 9,
    "videochatgpt_gen": ["dog"],
    "videochatgpt_consistency": ["dog"] * 2,
} | {task: ["B"] for task in MVBENCH_ANSWERS}
"""The right answer of each document, as the model wrote it where its own answer is that one."""


@pytest.mark.parametrize("task", ANALYSED)
def test_analysed_answer_of_each_benchmark_is_its_right_answer(results, task):
    from experiments.lmms_eval_model.target_answers import analysed_answer

    assert [analysed_answer(task, entry) for entry in results[0]["samples"][task]] == ANALYSED[task]
