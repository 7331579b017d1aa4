"""Cells with data=lmms: scores in the record, answers in files beside it, resumed, and refused where they would be wrong."""

import importlib
import json
import multiprocessing
import os
import signal
import sys

import pytest

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

from experiments.files import file_sha256  # noqa: E402
from experiments.records.files import load_records  # noqa: E402
from tests.experiments.sweeps.run_sweep import restored_logging  # noqa: E402
from tests.lmms.local_tasks import KILL_VARIABLE, write_local_tasks, write_task  # noqa: E402

ANSWERS = {"colours": ["red", "blue", "green", "green"], "counts": ["1", "2", "2", "1"]}
"""Prescribed answers: three of four colours are right, two of four counts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the local tasks and their data."""
    folder = tmp_path_factory.mktemp("local")
    write_local_tasks(folder)
    write_task(folder, "silent", data="colours", process_results="no_score")
    return folder


@pytest.fixture
def run(folder):
    """A function that runs one cell in this process from its overrides, and returns the cell and its status."""
    from hydra import compose, initialize_config_module

    from experiments.config.registry import register_configs
    from experiments.sweeps.plan import identify_cell
    from experiments.sweeps.runner import run_if_needed

    register_configs()

    def call(results, *overrides, tasks="colours,counts"):
        given = [f"data.tasks=[{tasks}]", f"data.include=[{folder / 'tasks'}]", f"results={results}", "batch_size=3"]
        with initialize_config_module("conf", version_base="1.3"):
            cell = identify_cell(compose("config", ["data=lmms", *given, *overrides]))
        return cell, run_if_needed(cell, record_input_errors=False)

    return call


@pytest.fixture
def prescribed(monkeypatch):
    """Replace the answers of every model by the prescribed ones, and count the requests that it gets."""
    from experiments.lmms_eval_model.model import BuiltModel

    asked = []
    written = BuiltModel.generate_until

    def generate_until(self, requests):
        written(self, requests)
        asked.extend(request.args[4] for request in requests)
        return [ANSWERS[request.args[4]][request.args[3]] for request in requests]

    monkeypatch.setattr(BuiltModel, "generate_until", generate_until)
    return asked


def test_cell_with_prescribed_answers_records_the_marks_worked_out_by_hand(run, prescribed, tmp_path):
    _, status = run(tmp_path)
    part = status.record["benchmarks"]
    assert part["lmms_eval"] == "0.7.3"
    assert part["judge"] is None
    colours, counts = part["tasks"]["colours"], part["tasks"]["counts"]
    right = colours["scores"]["colours"]["right"]
    assert right["value"] == 3 / 4
    # Outcomes 1, 1, 0, 1: variance 4 x 3/16 / 3 = 1/4, so the standard error is 1/2 / 2.
    assert right["standard_error"] == pytest.approx(1 / 4)
    assert right["higher_is_better"] is True
    assert counts["scores"]["counts"]["right"]["value"] == 2 / 4
    assert [task["documents"] for task in (colours, counts)] == [4, 4]
    assert colours["prompt"] == "colours 0?"
    assert colours["versions"] == {"colours": "1.5"}
    assert colours["cost"]["visual_tokens"] == 36
    assert status.record["data"]["examples"] == 8
    file = tmp_path / counts["file"]
    assert file_sha256(file) == counts["sha256"]
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert [line["answer"] for line in lines] == ANSWERS["counts"]
    assert [line["target"] for line in lines] == ["1", "1", "2", "3"]
    assert [line["scores"]["right"] for line in lines] == [1, 0, 1, 0]
    assert lines[2]["prompt"] == "counts 2?"


def test_group_records_the_scores_of_its_tasks(run, prescribed, tmp_path):
    _, status = run(tmp_path, tasks="both")
    task = status.record["benchmarks"]["tasks"]["both"]
    assert {name: scores["right"]["value"] for name, scores in task["scores"].items()} == {
        "colours": 0.75,
        "counts": 0.5,
    }
    assert task["documents"] == 8


def test_another_task_list_answers_the_new_task_alone(run, prescribed, tmp_path):
    run(tmp_path, tasks="colours")
    assert set(prescribed) == {"colours"}
    prescribed.clear()
    _, status = run(tmp_path, tasks="counts,colours")
    assert set(prescribed) == {"counts"}
    assert list(status.record["benchmarks"]["tasks"]) == ["counts", "colours"]
    prescribed.clear()
    run(tmp_path, tasks="counts,colours")
    assert not prescribed  # the cell is finished


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_damaged_answers_make_the_record_unreadable_and_the_cell_unfinished(run, prescribed, tmp_path, damage):
    cell, status = run(tmp_path)
    file = tmp_path / status.record["benchmarks"]["tasks"]["counts"]["file"]
    if damage == "removed":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"answer": "2"', '"answer": "1"'))
    with pytest.raises(ValueError, match=r"benchmarks\.tasks\.counts\.file: .*run") as error:
        load_records(tmp_path / "records")
    assert "\n" not in str(error.value)
    prescribed.clear()
    again, repaired = run(tmp_path)
    assert again.id == cell.id
    assert set(prescribed) == {"counts"}
    assert repaired.record["benchmarks"] == status.record["benchmarks"]


def test_cell_gives_the_scores_of_evaluate_tasks_with_its_reduction(run, folder, llava, tmp_path):
    from experiments.config.schema import Config, ReductionConfig
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.model import BuiltModel
    from experiments.models.token_reduction import token_dropper_for_inference

    settings = ["reduction=fastv", "reduction.reference_depth=0", "reduction.layers=[2]", "reduction.keep=0.25"]
    _, status = run(tmp_path, *settings, tasks="colours")
    reduction = ReductionConfig(name="fastv", layers=[2], keep=0.25)
    built = BuiltModel(*llava, token_dropper_for_inference(Config(reduction=reduction)), batch_size=2)
    alone = evaluate_tasks(built, ["colours"], tmp_path, include=[folder / "tasks"])
    part = status.record["benchmarks"]
    assert part["weights"] == alone["config"]["weights"]
    assert part["tasks"]["colours"]["scores"]["colours"]["right"]["value"] == alone["results"]["colours"]["right,none"]
    lines = (tmp_path / part["tasks"]["colours"]["file"]).read_text().splitlines()[1:]
    assert [json.loads(line)["answer"] for line in lines] == [
        e["filtered_resps"][0] for e in alone["samples"]["colours"]
    ]
    assert part["tasks"]["colours"]["cost"]["visual_tokens_mean"] == pytest.approx((2 * 36 + 4 * 9) / 6)


def test_killed_cell_resumes_to_an_equal_record(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(KILL_VARIABLE, "1")
        # A copy of this process has the model's packages imported.
        killed = multiprocessing.get_context("fork").Process(target=run, args=[tmp_path / "killed"])
        killed.start()
        killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    (first,) = (tmp_path / "killed" / "answers").iterdir()
    written = first.stat().st_mtime_ns
    cell, resumed = run(tmp_path / "killed")
    whole_cell, whole = run(tmp_path / "whole")
    assert first.stat().st_mtime_ns == written
    assert cell.id == whole_cell.id
    assert resumed.record["benchmarks"] == whole.record["benchmarks"]
    for task in whole.record["benchmarks"]["tasks"].values():
        assert (tmp_path / "killed" / task["file"]).read_bytes() == (tmp_path / "whole" / task["file"]).read_bytes()


def test_changed_weights_in_the_same_folder_are_answered_again(run, llava, tmp_path):
    import torch

    from experiments.models.build import load_checkpoint

    folder = tmp_path / "model"
    for part in llava:
        part.save_pretrained(folder)
    settings = ["model=checkpoint", f"model.path={folder}"]
    cell, first = run(tmp_path / "results", *settings, tasks="colours")
    other, _ = load_checkpoint(str(folder))
    torch.manual_seed(0)
    torch.nn.init.normal_(other.get_output_embeddings().weight)
    other.save_pretrained(folder)
    changed_cell, second = run(tmp_path / "results", *settings, tasks="colours")
    assert changed_cell.id != cell.id
    parts = [status.record["benchmarks"] for status in (first, second)]
    assert parts[0]["weights"] != parts[1]["weights"]
    assert parts[0]["tasks"]["colours"]["file"] != parts[1]["tasks"]["colours"]["file"]
    (newest,) = load_records(tmp_path / "results" / "records").finished
    assert newest["id"] == changed_cell.id


def test_cell_with_training_data_trains_and_then_answers(run, tmp_path):
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "train.json").write_text(
        json.dumps([{"id": i, "image": "a.png", "conversations": turns} for i in range(4)])
    )
    settings = [
        f"data.path={tmp_path / 'train.json'}",
        f"data.images={tmp_path}",
        "train.max_steps=1",
        "train.batch_size=2",
    ]
    _, status = run(tmp_path / "results", *settings, "compressor=average", tasks="colours")
    assert status.record["train"]["steps"] == 1
    assert status.record["model"]["visual_tokens"] == 1
    assert status.record["benchmarks"]["tasks"]["colours"]["documents"] == 4


def run_words(monkeypatch, capsys, module, words):
    """Run a command line in this process, and return its exit status and the last line of its standard error."""
    from experiments.errors import FULL_ERROR_VARIABLE

    monkeypatch.setenv(FULL_ERROR_VARIABLE, "")
    monkeypatch.setattr(sys, "argv", [module, *words])
    status = 0
    try:
        with restored_logging():
            importlib.import_module(module).main()
    except SystemExit as ended:
        status = ended.code
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if lines else ""


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """A function that runs `python -m experiments.benchmark` on local tasks, with two documents of each."""

    def call(tasks):
        words = ["asset:tiny", "--tasks", tasks, "--include", str(folder / "tasks"), "--limit", "2"]
        return run_words(monkeypatch, capsys, "experiments.benchmark", [*words, "--results", str(tmp_path)])

    return call


def test_command_writes_the_record_of_the_hydra_form(run, command, tmp_path):
    status, last = command("colours")
    assert status == 0
    assert last.startswith("record ")
    (file,) = (tmp_path / "records").iterdir()
    cell, status = run(tmp_path, "model=checkpoint", "model.path=asset:tiny", "data.test_samples=2", tasks="colours")
    assert file.stem == cell.id
    assert status.record["benchmarks"]["tasks"]["colours"]["documents"] == 2


def test_command_sets_hf_home_where_it_is_not_set(command, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command("colours")[0] == 0
    assert os.environ["HF_HOME"] == str(tmp_path / "cache" / "huggingface")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("mmvet", ["OPENAI_API_KEY", "mmvet"]),
        ("colours,mmvet", ["OPENAI_API_KEY", "mmvet"]),
        ("nonsense", ["tasks", "'nonsense'"]),
        ("silent", ["data.tasks", "silent"]),
        ("mme", ["limit", "mme"]),
    ],
)
def test_command_ends_non_zero_in_one_line_without_a_score(command, tmp_path, tasks, words):
    status, error = command(tasks)
    assert status == 1
    assert error.startswith("error: ")
    assert all(word in error for word in words)
    assert not list(tmp_path.rglob("records/*.json"))


def test_sweep_of_three_compressors_over_two_tasks_gives_a_table(folder, tmp_path, monkeypatch, capsys):
    from experiments.report import load

    words = ["data=lmms", "data.tasks=[colours,counts]", f"data.include=[{folder / 'tasks'}]", f"results={tmp_path}"]
    words += ["-m", "compressor=none,average,query", "hydra/launcher=basic", "batch_size=4"]
    status, last = run_words(monkeypatch, capsys, "experiments.run", words)
    assert status == 0, last
    report = load(tmp_path)
    table = report.table("benchmarks")
    assert len(table.text) == 3
    finished = {r["config"]["compressor"]["name"]: r["benchmarks"]["tasks"] for r in report.records.finished}
    uncut = finished["none"]
    for name, row in zip(("none", "average", "query"), table.data.to_dict("records"), strict=True):
        values = {t: finished[name][t]["scores"][t]["right"]["value"] for t in ("colours", "counts")}
        assert {t: row[t] for t in values} == values
        ratios = [
            values[t] / uncut[t]["scores"][t]["right"]["value"]
            for t in values
            if uncut[t]["scores"][t]["right"]["value"]
        ]
        expected = sum(ratios) / len(ratios) if ratios else None
        assert row["relative"] == pytest.approx(expected) if expected is not None else row["relative"] is None
