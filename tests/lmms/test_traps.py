"""lmms-eval's silent failures: each ends in an error here, or is repaired."""

import json

import pytest
import torch

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

from tests.lmms.clips import write_clip  # noqa: E402
from tests.lmms.judge_stub import judge  # noqa: E402
from tests.lmms.made_up_benchmarks import data_set  # noqa: E402


@pytest.fixture(scope="module")
def evaluated(llava):
    """The tiny LLaVA as lmms-eval's model."""
    from experiments.lmms_eval_model.model import BuiltModel

    return BuiltModel(*llava)


@pytest.fixture
def local_data(monkeypatch):
    """Made-up items in place of the model hub's data sets."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **options: data_set(path, name))


def test_repair_of_loglikelihood_is_made_once_and_keeps_texts(monkeypatch):
    """Trap 2."""
    from lmms_eval import evaluator
    from lmms_eval.api.instance import unwrap_generation_output

    from experiments.lmms_eval_model.loglikelihood_repair import repair_loglikelihood

    monkeypatch.setattr(evaluator, "unwrap_generation_output", unwrap_generation_output)
    assert unwrap_generation_output((0.5, True)) == ("(0.5, True)", None)  # the fault of 0.7.3
    assert repair_loglikelihood()
    assert evaluator.unwrap_generation_output((0.5, True)) == ((0.5, True), None)
    assert evaluator.unwrap_generation_output("red") == ("red", None)
    assert not repair_loglikelihood()


def test_results_name_the_weights_and_the_version_and_new_weights_get_new_answers(mini, local_data, tmp_path):
    """Traps 6 and 12: the same folder with other weights is another model, and nothing is answered from a cache."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.model import PretrainedModel

    folder = tmp_path / "model"
    mini[0].save_pretrained(folder)
    mini[1].save_pretrained(folder)
    saved = PretrainedModel(str(folder))
    assert type(saved.model) is type(mini[0])
    first = evaluate_tasks(saved, ["pope"], tmp_path)
    other = PretrainedModel(str(folder)).model
    torch.manual_seed(0)
    torch.nn.init.normal_(other.get_output_embeddings().weight)
    other.save_pretrained(folder)
    second = evaluate_tasks(PretrainedModel(str(folder)), ["pope"], tmp_path)
    assert first["config"]["lmms_eval"] == "0.7.3"
    assert first["config"]["weights"] != second["config"]["weights"]
    answers = [[entry["filtered_resps"] for entry in run["samples"]["pope"]] for run in (first, second)]
    assert answers[0] != answers[1]


def test_task_with_a_judge_is_refused_without_a_key(evaluated, tmp_path):
    """Trap 7."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    for task in ("llava_in_the_wild", "mmvet", "activitynetqa", "msvd_qa"):
        with pytest.raises(ValueError, match=f"OPENAI_API_KEY.*{task}"):
            evaluate_tasks(evaluated, [task], tmp_path)


def test_answers_without_a_judgement_are_refused(evaluated, local_data, tmp_path, monkeypatch):
    """Trap 7: a judge that answers with something else than scores."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from tests.lmms import judge_stub

    monkeypatch.setattr(judge_stub, "judgement", lambda prompt: "I cannot say")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with judge() as (address, _):
        monkeypatch.setenv("OPENAI_API_URL", address)
        with pytest.raises(ValueError, match=r"llava_in_the_wild.*judge"):
            evaluate_tasks(evaluated, ["llava_in_the_wild"], tmp_path)


def test_video_task_is_refused_without_hf_home(evaluated, tmp_path, monkeypatch):
    """Trap 9."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    monkeypatch.delenv("HF_HOME")
    for task in ("mlvu_dev", "mvbench", "egoschema_subset"):
        with pytest.raises(ValueError, match=f"HF_HOME.*{task}"):
            evaluate_tasks(evaluated, [task], tmp_path)


def test_missing_video_raises_an_error_that_names_it(evaluated, home, local_data, tmp_path):
    """Trap 9: the task itself ends the program."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    videos = home / "egoschema" / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    moved = (videos / "clip.mp4").exists() and (videos / "clip.mp4").rename(videos / "other.mp4")
    try:
        with pytest.raises(FileNotFoundError, match=r"egoschema_subset, document 0.*clip\.mp4"):
            evaluate_tasks(evaluated, ["egoschema_subset"], tmp_path)
    finally:
        if moved:
            moved.rename(videos / "clip.mp4")


@pytest.mark.parametrize("task", ["mme", "mlvu_dev", "mmbench_en_dev_static"])
def test_limit_is_refused_for_scores_of_whole_tasks(evaluated, task, tmp_path):
    """Trap 11."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    with pytest.raises(ValueError, match=f"limit.*{task}"):
        evaluate_tasks(evaluated, [task], tmp_path, limit=2)


def test_prompts_are_the_default_ones_of_each_task(evaluated, local_data, tmp_path):
    """Trap 10: no built-in task has prompts under the model's name, which would replace the default ones whole."""
    from lmms_eval import tasks as lmms_tasks

    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.manifest import MODEL_NAME

    run = evaluate_tasks(evaluated, ["pope"], tmp_path, limit=1)
    prompt = run["samples"]["pope"][0]["arguments"][0]
    assert prompt == "is it red?\nAnswer the question using a single word or phrase."
    folder = lmms_tasks.__path__[0]
    for name in (
        "gqa/gqa.yaml",
        "mme/mme.yaml",
        "pope/pope.yaml",
        "mlvu/mlvu_dev.yaml",
        "scienceqa/scienceqa_img.yaml",
    ):
        with open(f"{folder}/{name}") as file:
            assert f"{MODEL_NAME}:" not in file.read()


def test_unknown_task_is_refused_by_its_name(evaluated, tmp_path):
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    with pytest.raises(ValueError, match=r"tasks.*'pop'"):
        evaluate_tasks(evaluated, ["pop"], tmp_path)


def test_own_task_without_its_files_is_refused(evaluated, home, tmp_path, monkeypatch):
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with judge() as (address, _):
        monkeypatch.setenv("OPENAI_API_URL", f"{address}/chat/completions")
        with pytest.raises(FileNotFoundError, match=r"msrvtt_qa.*test_qa\.json"):
            evaluate_tasks(evaluated, ["msrvtt_qa"], tmp_path)


def test_videos_of_msvd_are_found_by_the_names_of_its_mapping(tmp_path, monkeypatch):
    import numpy as np

    from experiments.lmms_eval_model.video_questions import question_video

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    clip = write_clip(tmp_path / "msvd_qa" / "video" / "mv89psg6zh4_33_46.avi", [np.zeros((8, 8, 3), np.uint8)])
    document = {"data": "msvd_qa", "video_id": 1}
    with pytest.raises(FileNotFoundError, match="vid1"):
        question_video(document)
    (tmp_path / "msvd_qa" / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid1\n")
    assert question_video(document) == [str(clip)]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batchsize": 2}, TypeError, "batchsize"),
        ({"dtype": "int8"}, ValueError, "dtype.*int8"),
        ({"batch_size": "auto"}, ValueError, "batch_size.*auto"),
    ],
)
def test_wrong_argument_of_the_model_is_refused(arguments, error, words):
    from experiments.lmms_eval_model.model import PretrainedModel

    with pytest.raises(error, match=words):
        PretrainedModel("asset:tiny", **arguments)


def test_misspelt_generation_option_is_refused(evaluated, local_data, tmp_path):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "pope", "doc_id": 0, "repeats": 1}
    arguments = ("is it red?", {"max_new_tokens": 2, "temprature": 0}, None, 0, "pope", "test")
    with pytest.raises(ValueError, match="temprature"):
        evaluated.generate_until([Instance("generate_until", arguments, 0, metadata)])


def test_results_can_be_written_as_json(evaluated, local_data, tmp_path):
    from experiments.lmms_eval_model.evaluate import evaluate_tasks

    results = evaluate_tasks(evaluated, ["pope"], tmp_path, limit=1)["results"]
    assert json.loads(json.dumps(results))["pope"].keys() >= {"pope_accuracy,none", "pope_f1_score,none"}
