"""The guides: their Python runs, their command lines compose, the reference names everything public."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava_mini
import llava_mini.compressors
import probes
import probes.interventions
import probes.plots
import probes.pruning
import probes.view
from experiments.config.registry import register_configs
from experiments.sweeps.hydra_api import compose_job, compose_sweep, open_hydra, split_jobs
from probes import TokenMap
from probes.ask import encode_prompt
from probes.loading import load_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: ([^\n]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
NOT_RUN = {
    "CONTRIBUTING.md": "tests/llava_mini/test_contributing.py runs it",
    "benchmarks.md": "needs a checkpoint of 7 billion parameters and lmms-eval",
    "data.md": "needs torchvision and a download",
}


def blocks(page, language):
    """Return the code blocks of a page in one language, as (line number, reason not to run it or None, code)."""
    text = page.read_text()
    found = (match for match in BLOCK.finditer(text) if match[2] == language)
    return [(text.count("\n", 0, match.start(3)), match[1] or None, match[3]) for match in found]


@pytest.fixture
def names():
    """Names that guides use without making them: the tiny LLaVA and a question about the shipped image."""
    model, processor = load_model(str(ROOT / "experiments/assets/tiny"))
    image = Image.open(ROOT / "experiments/assets/scene.png")
    inputs = encode_prompt(model, processor, "what shape is right of the green ring?", [image])
    tokens = TokenMap.from_inputs(model, inputs, processor, [image])
    return {
        "model": model,
        "processor": processor,
        "image": image,
        "inputs": inputs,
        "tokens": tokens,
        "torch": torch,
        "__name__": "guide",
    }


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page.stem != "fusion_depth" and any(not reason for _, reason, _ in blocks(page, "python"))
    ],
    ids=lambda page: page.stem,
)
def test_python_blocks_of_guide_run_in_order(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "results"):  # paths in guides begin at the root of the repository
        (tmp_path / folder).symlink_to(ROOT / folder)
    for line, reason, code in blocks(page, "python"):
        if reason is None:
            exec(compile("\n" * line + code, str(page), "exec"), names)


def test_fusion_depth_guide_shows_what_its_blocks_print(names, capsys):
    page = ROOT / "docs/fusion_depth.md"
    for _, _, code in blocks(page, "python"):
        exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"print\(.*\)  # (.*)", page.read_text())
    assert len(shown) == 2
    assert set(shown) <= set(printed)


def test_python_blocks_that_do_not_run_are_these():
    reasons = {page.name: reason for page in PAGES for _, reason, _ in blocks(page, "python") if reason}
    assert reasons == NOT_RUN


def command_lines():
    """Return every command line of `experiments.run` in the guides, as (page, words behind the module's name)."""
    for page in PAGES:
        for _, _, code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[1:3] != ["-m", "experiments.run"] and "experiments.run" in words:
                    words = words[words.index("experiments.run") - 2 :]
                if words[1:3] == ["-m", "experiments.run"]:
                    yield page.name, words[3:]


COMMAND_LINES = [
    (page, words)
    for page, words in command_lines()
    if "hydra/sweeper=optuna" not in words  # another package, with pip install hydra-optuna-sweeper
]


@pytest.fixture(scope="module")
def hydra():
    register_configs()
    with open_hydra() as opened:
        yield opened


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES, ids=[f"{page} {' '.join(w)}" for page, w in COMMAND_LINES])
def test_command_line_of_guide_composes(page, words, hydra):
    overrides = [word for word in words if word != "-m" and not word.startswith("--") and not word.startswith("$")]
    sweep = compose_sweep(hydra, overrides)
    jobs = split_jobs(hydra, sweep)
    assert jobs
    for job in {tuple(job) for job in (jobs[0], jobs[-1])}:
        compose_job(hydra, sweep, job, {})


def test_reference_names_every_public_object():
    documented = set(
        itertools.chain.from_iterable(
            re.findall(r"\.\. auto\w+:: (?:[\w.]+\.)?(\w+)", page.read_text())
            for page in (ROOT / "docs/reference").glob("*.rst")
        )
    )
    packages = (probes, probes.interventions, probes.pruning, probes.plots, llava_mini)
    public = {name for package in packages for name in package.__all__}
    constants = {"GROUP_LINES", "PositionMode", "RemovalMode"}  # shown in the signatures that use them
    assert public - constants <= documented


def test_reference_has_a_section_for_every_compressor():
    text = (ROOT / "docs/reference/compressors.rst").read_text()
    for compressor in set(llava_mini.compressors.COMPRESSORS.values()):
        assert f"autoclass:: {compressor.__module__}.{compressor.__name__}\n" in text, compressor.__name__
