"""The attention page of a cell, and its setting."""

import json
import logging

import pytest
from PIL import Image

from experiments.data.samples import Sample, llava_conversation
from experiments.evaluation.attention_page import attention_page_path, write_attention_page
from experiments.models.build import load_checkpoint
from experiments.run import main
from experiments.run_cell import run_cell
from probes.view.page import page_data
from tests.experiments.sweeps.run_sweep import tiny_cell


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint("asset:tiny")


def sample(number, load):
    return Sample(f"sample-{number}", (load,), llava_conversation([("what colour is at top left?", "red")]), ["place"])


def test_write_attention_page_has_a_run_for_each_question_with_both_answers(tiny, tmp_path):
    samples = [
        sample(i, lambda colour=colour: Image.new("RGB", (48, 48), colour)) for i, colour in enumerate(["red", "blue"])
    ]
    path = attention_page_path(str(tmp_path), "0123")
    write_attention_page(*tiny, samples, path, "a title")
    runs = page_data(path.read_text())["runs"]
    assert len(runs) == 2
    for run in runs:
        assert run["name"].startswith("what colour is at top left? Answer: ")
        assert run["name"].endswith(" Right: red.")
        assert [word["text"] for word in run["words"]][:3] == ["what", "colour", "is"]


def test_write_attention_page_names_a_sample_that_it_cannot_show(tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_attention_page(*tiny, [sample(7, lambda: "a video")], tmp_path / "views" / "page.html", "a title")
    assert "sample-7" in caplog.text
    assert not (tmp_path / "views").exists()


def test_run_with_view_questions_writes_the_page_beside_the_record(tmp_path, monkeypatch):
    arguments = ["model=tiny", "data.train_samples=20", "data.test_samples=4", "probe.view_questions=2"]
    monkeypatch.setattr("sys.argv", ["run", *arguments, f"results={tmp_path}"])
    main()
    record = json.loads(next((tmp_path / "records").iterdir()).read_text())
    assert len(page_data((tmp_path / "views" / f"{record['id']}.html").read_text())["runs"]) == 2


def test_run_cell_whose_record_cannot_be_written_has_its_page(tmp_path):
    """A finished cell never runs again, so a page that came after the record would be missing after a kill between."""
    cell = tiny_cell(tmp_path, "probe.view_questions=1")

    def fail(record):
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        run_cell(cell, tmp_path / "work", fail)
    assert len(page_data(attention_page_path(str(tmp_path), cell.id).read_text())["runs"]) == 1


def test_run_with_view_questions_and_a_reduction_is_refused(tmp_path, monkeypatch, capsys):
    arguments = ["model=tiny", "data.test_samples=4", "probe.view_questions=2", "reduction=fastv"]
    monkeypatch.setattr("sys.argv", ["run", *arguments, f"results={tmp_path}"])
    with pytest.raises(SystemExit):
        main()
    assert "probe.view_questions" in capsys.readouterr().err
