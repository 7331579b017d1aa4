"""The tiny LLaVA that ships with the project: loadable by transformers alone, and as good as its card says."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from experiments.data.samples import OneQuestionEach
from experiments.data.shapes import KINDS, load_shapes
from experiments.evaluation.accuracy import blank, correct, shuffled
from experiments.evaluation.questions import Questions
from experiments.files import ASSETS
from experiments.models.build import load

TINY = ASSETS / "tiny"
CPU = torch.device("cpu")


def test_transformers_alone_loads_it_and_it_answers():
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    processor = AutoProcessor.from_pretrained(TINY)
    assert type(model) is LlavaForConditionalGeneration
    sample = load_shapes("test", 1).samples[0]
    question = sample.questions[sample.kinds.index("place")]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=sample.image, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True) == sample.answers[sample.kinds.index("place")]


def test_size():
    assert sum(path.stat().st_size for path in TINY.rglob("*.safetensors")) < 8e6


def test_it_sees_every_kind_of_question_and_nothing_else():
    """300 questions about other scenes than the card's (another seed).

    Bounds leave three standard errors below the card's scores: 94% overall, 86% on comparisons, 91% or more elsewhere.
    """
    model, processor = load(str(TINY))
    samples = list(OneQuestionEach(load_shapes("test", 300, seed=7).samples))
    right = correct(model, Questions(samples, processor, 100, CPU), "picture").float()
    assert right.mean() > 0.90
    for kind in KINDS:
        assert right[[s.kinds[0] == kind for s in samples]].mean() > 0.72, kind
    for condition in (blank, shuffled):
        changed = Questions(condition(samples), processor, 100, CPU)
        assert correct(model, changed, condition.__name__).float().mean() < 0.45


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(TINY / "model.safetensors")
    lost = next(name for name in weights if "layers.3.mlp.up_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is .*layers.3.mlp.up_proj"):
        load(str(tmp_path))
