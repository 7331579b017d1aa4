"""`lmms-eval --model llava_mini` finds the model by its entry point, in one process and in two."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

from tests.lmms.shapes_tasks import write_tasks  # noqa: E402


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The folder with the tasks about shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    write_tasks(folder)
    return folder


def command(folder, output, processes=1, arguments="pretrained=asset:tiny"):
    """Run lmms-eval on shapes, and return the finished process."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    options = ["--model", "llava_mini", "--model_args", arguments, "--tasks", "shapes_write,shapes_score"]
    options += ["--include_path", str(folder / "tasks"), "--log_samples", "--output_path", str(output)]
    options += ["--batch_size", "3"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "lmms_eval", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )


def samples(output):
    """Return the logged samples of each task, by document."""
    found = {}
    for file in output.rglob("*_samples_*.jsonl"):
        task = file.stem.partition("_samples_")[2]
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        found[task] = {entry["doc_id"]: entry for entry in entries}
    return found


def test_two_processes_score_each_document_as_one_process_does(shapes, llava, tmp_path):
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.model import BuiltModel

    run = command(shapes, tmp_path / "two", processes=2)
    two = samples(tmp_path / "two")
    assert set(two) == {"shapes_write", "shapes_score"}, run.stdout[-3000:] + run.stderr[-3000:]
    one = evaluate_tasks(BuiltModel(*llava, batch_size=3), list(two), tmp_path, include=[shapes / "tasks"])["samples"]
    for task, entries in one.items():
        assert len(two[task]) == len(entries)
        for entry in entries:
            other = two[task][entry["doc_id"]]
            assert other["correct"] == entry["correct"]
            if task == "shapes_score":
                assert other["loss"] == pytest.approx(entry["loss"], rel=1e-3, abs=1e-5)
            else:
                assert [other["filtered_resps"]] == entry["filtered_resps"]  # the file holds the only one itself


def test_misspelt_argument_is_named_and_leaves_no_results_although_the_exit_status_is_0(shapes, tmp_path):
    """Trap 1."""
    run = command(shapes, tmp_path, arguments="pretrained=asset:tiny,fames=8")
    assert "fames" in run.stdout + run.stderr
    assert run.returncode == 0
    assert not list(tmp_path.rglob("*_results.json"))
