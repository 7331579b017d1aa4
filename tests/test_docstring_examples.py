"""The examples in docstrings run, and print what they say.

They find these names: `model` and `processor` (the tiny LLaVA that ships with the project), `mini` (a LLaVA-Mini made of
it), `image`, `inputs` (a question about the image), `tokens` (its token map), `folder` (an empty one) and `torch`.
"""

import copy
import doctest
import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_mini import LlavaMiniForConditionalGeneration
from probes import TokenMap

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [f for name in ("llava_mini", "probes", "experiments") for f in sorted((ROOT / name).rglob("*.py"))]
MODULES = [
    ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for source in SOURCES
    if ">>> " in source.read_text()
]


@pytest.fixture(scope="module")
def names():
    folder = ROOT / "experiments" / "assets" / "tiny"
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (48, 48), "red")
    inputs = processor(text="<image>\nhow many shapes are there", images=image, return_tensors="pt")
    return {
        "model": model,
        "mini": LlavaMiniForConditionalGeneration.from_llava(model, compressor="query", prefusion_layers=1).eval(),
        "processor": processor,
        "image": image,
        "inputs": inputs,
        "tokens": TokenMap.from_inputs(model, inputs),
        "folder": Path(),
        "torch": torch,
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module_print_what_they_say(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    module = importlib.import_module(name)
    fresh = {key: copy.copy(value) if key == "inputs" else value for key, value in names.items()}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(module, extraglobs=fresh, optionflags=flags)
    assert attempted
    assert not failed
