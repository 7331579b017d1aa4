"""The probes and LLaVA-Mini in an environment without the packages that only some of their parts need."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ["transformer-lens", "nnsight", "hydra-core", "omegaconf", "matplotlib", "pandas", "accelerate", "peft", "av"]
# Asks the tiny LLaVA, and records the attention of a LLaVA-Mini made from it.
CODE = """
import torch
import probes, llava_mini
from PIL import Image
from probes.ask import ask
from probes.loading import load_model
model, processor = load_model("experiments/assets/tiny", "cpu")
answer = ask(model, processor, "what shape is right of the green ring?", [Image.open("experiments/assets/scene.png")])
mini = llava_mini.LlavaMiniForConditionalGeneration.from_llava(
    model, compressor="query", compressor_size=1, prefusion_layers=2
)
mini_processor = llava_mini.LlavaMiniProcessor.from_llava(processor, mini.config)
inputs = mini_processor(images=[Image.new("RGB", (48, 48))], text="<image>what is it?", return_tensors="pt")
with torch.no_grad(), probes.record_attention(mini, probes.TokenMap.from_inputs(mini, inputs)) as attention:
    mini(**inputs)
print(answer.text, len(attention.mass), len(answer.notes))
for code in {codes}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
"""
PACKAGE_OF_PART = {
    "answer.attention.frame()": "pandas",
    "answer.lens.table(processor.tokenizer)": "pandas",
    "answer.attention.plot()": "matplotlib",
    "import probes.plots": "matplotlib",
    "import llava_mini.transformer_lens": "transformer-lens",
    "probes.record_attention(model, answer.tokens, backend='nnsight').__enter__()": "nnsight",
    "probes.record_attention(model, answer.tokens, backend='transformer_lens').__enter__()": "transformer-lens",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `CODE` prints where only links to the other packages than `ABSENT` are on the path."""
    folder = tmp_path_factory.mktemp("packages")
    hidden = {file.parts[0] for name in ABSENT for file in metadata.files(name) or ()}
    for path in map(Path, sys.path):
        if path.name == "site-packages":
            for entry in path.iterdir():
                if entry.name not in hidden and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
    # -S keeps the environment's own folder of packages off the path.
    command = [sys.executable, "-S", "-c", CODE.replace("{codes}", repr(list(PACKAGE_OF_PART)))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_probes_and_llava_mini_without_optional_packages_run(lines):
    """The answer and its measurements, the attention of a LLaVA-Mini of six layers, and no note on a missing part."""
    assert lines[0] == "triangle 6 0"


def test_part_whose_package_is_absent_names_its_installation(lines):
    assert [line.split(": ")[-1] for line in lines[1:]] == [f"pip install {name}" for name in PACKAGE_OF_PART.values()]
