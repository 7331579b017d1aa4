"""The command line of the probes: its output, and one line for wrong input."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from probes.__main__ import main
from probes.view.page import page_data
from tests.tiny_models import tiny_llama

TINY, SCENE = "experiments/assets/tiny", "experiments/assets/scene.png"
QUESTION = ["--question", "what shape is right of the green ring?"]


def test_main_prints_a_row_for_each_layer_and_writes_the_page(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main([TINY, "--image", SCENE, *QUESTION, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert [int(layer) for layer in re.findall(r"^ +(\d) +\d\.\d\d", printed, re.MULTILINE)] == [*range(6)]
    assert f"page: {out}" in printed
    assert len(page_data(out.read_text())["runs"]) == 1


def test_main_with_two_images_and_two_models_has_both(tmp_path):
    out = tmp_path / "page.html"
    images = ["--image", SCENE, "--image", SCENE]
    assert main([TINY, *images, *QUESTION, "--compare", TINY, "--device", "cpu", "--out", str(out)]) == 0
    runs = page_data(out.read_text())["runs"]
    assert [len(run["images"]) for run in runs] == [2, 2]
    assert {*runs[0]["patches"]["image"]} == {0, 1}


def test_main_turns_a_photograph_upright_before_the_model_reads_it(tmp_path):
    image = Image.open(SCENE).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    answers = []
    for path in (SCENE, str(tmp_path / "turned.png")):
        out = tmp_path / "page.html"
        assert main([TINY, "--image", path, *QUESTION, "--device", "cpu", "--out", str(out)]) == 0
        answers.append(page_data(out.read_text())["runs"][0])
    assert answers[0]["images"][0]["frames"] == answers[1]["images"][0]["frames"]
    assert answers[0]["maps"][0] == answers[1]["maps"][0]


def text_model(folder):
    tiny_llama().save_pretrained(folder)
    return folder


def incomplete_model(folder):
    AutoModelForImageTextToText.from_pretrained(TINY).save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[:-1]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def broken_config(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "lla')
    return folder


@pytest.mark.parametrize(
    ("make", "value"), [(text_model, "llama"), (incomplete_model, "weights"), (broken_config, "config.json")]
)
def test_main_model_that_cannot_be_shown_ends_in_one_line(make, value, tmp_path, capsys):
    model = make(tmp_path / "model")
    assert main([str(model), "--image", SCENE, *QUESTION, "--out", str(tmp_path / "page.html")]) == 1
    assert value in one_error_line(capsys)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ([], "--image", "at least one image"),
        (["--image", "none.png"], "--image", "none.png"),
        (["--image", "{tmp}/16_bits.png"], "--image", "16_bits.png"),
        (["--video", "none.mp4"], "--video", "none.mp4"),
        (["--image", "pyproject.toml"], "--image", "pyproject.toml"),
        (["--video", "pyproject.toml"], "--video", "pyproject.toml"),
        (["--image", SCENE, "--out", "missing/page.html"], "--out", "missing"),
        (["--image", SCENE, "--out", "docs"], "--out", "docs"),
        (["--image", SCENE, "--device", "cuda:99"], "device", "cuda:99"),
        (["--image", SCENE, "--dtype", "float12"], "dtype", "float12"),
        (["--image", SCENE, "--dtype", "int8"], "dtype", "int8"),
        (["--image", SCENE, "--question", " "], "--question", "empty"),
        (["--image", SCENE, "--question", "what \udce9 is"], "--question", "udce9"),
    ],
)
def test_main_wrong_input_ends_in_one_line(arguments, key, value, capsys, tmp_path):
    Image.new("I;16", (48, 48), 40000).save(tmp_path / "16_bits.png")
    assert main([TINY, *QUESTION, *(word.format(tmp=tmp_path) for word in arguments)]) == 1
    line = one_error_line(capsys)
    assert line.startswith(f"error: {key}")
    assert value in line


def edit_config(model, **settings):
    """Change settings of the language model in a checkpoint's config."""
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= settings
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "values"),
    [
        (lambda model: edit_config(model, num_hidden_layers=3), ["layers [3, 4, 5]", "num_hidden_layers"]),
        (lambda model: edit_config(model, intermediate_size=64), ["another shape", "mlp"]),
        (lambda model: (model / "chat_template.jinja").write_text("{% for %}"), ["chat template"]),
    ],
    ids=["too few layers", "too narrow", "broken template"],
)
def test_main_of_checkpoint_that_contradicts_itself_ends_in_one_line(edit, values, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "model")
    edit(tmp_path / "model")
    arguments = ["--image", SCENE, *QUESTION, "--device", "cpu", "--out", str(tmp_path / "page.html")]
    assert main([str(tmp_path / "model"), *arguments]) == 1
    line = one_error_line(capsys)
    assert all(value in line for value in values)


def test_main_imports_no_module_that_a_config_names(tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "named_by_config"}')
    (tmp_path / "named_by_config.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    scene = str(Path(SCENE).resolve())
    monkeypatch.chdir(tmp_path)
    assert main(["model", "--image", scene, *QUESTION]) == 1
    assert "named_by_config" in one_error_line(capsys)


@pytest.mark.parametrize("model", [f"{TINY}y", "experiments/assets", "owner/misspelt"])
def test_main_without_a_checkpoint_of_the_given_name_ends_in_one_line(model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a test asks no hub
    assert main([model, "--image", SCENE, *QUESTION]) == 1
    line = one_error_line(capsys)
    assert line.startswith("error: model: ")
    assert f"'{model}'" in line


def test_main_checks_the_second_model_before_the_first_runs(capsys, monkeypatch):
    monkeypatch.setattr("probes.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main([TINY, "--image", SCENE, *QUESTION, "--compare", "experiments/assets"]) == 1
    line = one_error_line(capsys)
    assert line.startswith("error: model: ")
    assert "'experiments/assets'" in line


def one_error_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_main_shows_transparent_images_as_the_processor_does(tmp_path, capsys):
    """On white. The pixels below are black, where another image would be seen."""
    scene = Image.open(SCENE).convert("RGBA")
    pixels = [(0, 0, 0, 0) if sum(pixel[:3]) > 700 else pixel for pixel in scene.getdata()]
    scene.putdata(pixels)
    scene.save(tmp_path / "transparent.png")
    Image.alpha_composite(Image.new("RGBA", scene.size, "white"), scene).convert("RGB").save(tmp_path / "white.png")
    shown = []
    for name in ("transparent", "white"):
        out = tmp_path / f"{name}.html"
        arguments = ["--image", str(tmp_path / f"{name}.png"), *QUESTION, "--device", "cpu", "--out", str(out)]
        assert main([TINY, *arguments]) == 0
        shown.append(capsys.readouterr().out.splitlines()[:10])
    assert shown[0] == shown[1]


def test_main_with_incomplete_weights_ends_in_one_line(tmp_path, capsys):
    model = tmp_path / "cut"
    shutil.copytree(TINY, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert main([str(model), "--image", SCENE, *QUESTION, "--out", str(tmp_path / "page.html")]) == 1
    line = one_error_line(capsys)
    assert line.startswith("error: model")
    assert str(model) in line
