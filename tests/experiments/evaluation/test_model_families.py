"""Every model family gets the inputs of its own processor, and every analysis runs on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.config.schema import ProbeConfig, TrainConfig
from experiments.data.encoding import IGNORE_INDEX, chat_messages, restrict_to_answers
from experiments.data.samples import Sample, llava_conversation
from experiments.evaluation.accuracy import correct_answers
from experiments.evaluation.analyses import run_probes
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import EncodedQuestions
from experiments.training.trainer import set_trainable_parameters
from tests.experiments.model_families import chat_family, image_questions, noise_image
from tests.probes.tokens.families.build import MODEL_FAMILIES, TinyFamily, tiny

CPU = torch.device("cpu")
WITHOUT_BOUND = (
    "paligemma",
    "gemma3",
    "gemma3n",
    "gemma4",
    "llama4",
    "aya_vision",
)  # a two-way prefix, or short windows
ALL_PROBES = ProbeConfig(attention=True, random_control=True, removal=True, knockout=True, readout=True, lens=True)


def plain_inputs(family: TinyFamily, samples: list[Sample], messages: list[list[dict]], **options) -> dict:
    """Return what a plain call of the processor makes of rendered chats, without labels."""
    texts = [family.processor.apply_chat_template(m, tokenize=False, **options) for m in messages]
    images = [list(sample.visual_inputs) for sample in samples]
    inputs = family.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    return {name: values for name, values in inputs.items() if name != "labels"}


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_encoded_questions_equal_a_plain_processor_call(name, monkeypatch):
    """The same inputs, and the same logits of the model, for a batch of images of unequal size."""
    family, samples = chat_family(name, monkeypatch), image_questions()[:4]
    expected = plain_inputs(family, samples, [chat_messages(sample) for sample in samples])
    (batch,) = EncodedQuestions(samples, family.processor, 4, CPU).batches("all")
    labels, inputs = batch["labels"], {key: values for key, values in batch.items() if key != "labels"}
    assert set(inputs) == set(expected)
    for key, values in expected.items():
        assert torch.equal(inputs[key], values), key
    model = family.model()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(**expected).logits, rtol=0, atol=0)
    decoded = [family.processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in labels]
    # The template of BLIP-2 writes a space before an answer, and a line break after it.
    assert decoded == ([" a\n", " b\n"] if name == "blip_2" else ["a<eos>", "b<eos>"]) * 2


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_restrict_to_answers_of_every_family_predicts_what_generate_writes(name, monkeypatch):
    """The teacher-forced first token of each answer is the token that `generate` writes after the prompt alone."""
    family, samples = chat_family(name, monkeypatch), image_questions()
    model, predicted, generated = family.model(), [], []
    for batch in EncodedQuestions(samples, family.processor, 4, CPU).batches("all"):
        inputs, labels = restrict_to_answers(batch)
        with torch.no_grad():
            logits = model(**inputs).logits[:, -labels.shape[1] :]
        first = (labels != IGNORE_INDEX).int().argmax(1)
        predicted += logits[torch.arange(len(first)), first - 1].argmax(-1).tolist()
    for sample in samples:
        inputs = plain_inputs(family, [sample], [chat_messages(sample)[:1]], add_generation_prompt=True)
        if name == "paligemma":  # its processor ends every text with a line break: here after the answer, not before
            length = inputs["input_ids"].shape[1]
            inputs = {k: v[:, :-1] if v.ndim == 2 and v.shape[1] == length else v for k, v in inputs.items()}
        generated += model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    assert predicted == generated


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_run_probes_of_every_family_measures_every_part(name, monkeypatch):
    family = chat_family(name, monkeypatch)
    model, questions = family.model(), EncodedQuestions(image_questions(), family.processor, 4, CPU)
    parts = run_probes(model, questions, questions, ALL_PROBES)
    intact = "".join(str(int(c)) for c in correct_answers(model, questions, "accuracy"))
    assert parts["removal"]["onward"][-1]["correct"] == intact  # onward from the end of the model, nothing is removed
    assert parts["knockout"]["windows"][0]["correct"] == intact
    if name == "gemma3n":  # what needs a single residual stream is left out with the reason
        assert (parts["lens"], parts["readout"]) == (None, None)
        for part in ("lens", "readout"):
            assert "has several residual streams" in parts[f"{part}_note"]
    else:
        assert parts["lens"]["samples"] == parts["readout"]["samples"] == 6
    mass = np.array(parts["attention"]["mass"], dtype=float)
    assert mass.shape == (4, 3, 6)
    measured = mass[~np.isnan(mass)]  # a short window may hide the image from a whole layer
    assert measured.size
    assert ((measured >= 0) & (measured <= 1)).all()
    bound = parts["attention"]["uniform_entropy"]
    assert (bound is None) == (name in WITHOUT_BOUND)
    visual = questions.first()["input_ids"] == model.config.image_token_id
    assert forward_cost(model, questions)["visual_tokens"] == visual.sum()


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "llava_onevision", "internvl", "gemma3"])
def test_encoded_questions_with_several_images_and_none_equal_a_plain_processor_call(name, monkeypatch):
    """A conversation with an image in each turn, a text, and one image: answers keep their places."""
    family = chat_family(name, monkeypatch)
    turns = [*llava_conversation([("this?", "a")]), *llava_conversation([("and this?", "bb")])]
    images = [noise_image(index, size) for index, size in enumerate([(40, 24), (24, 32), (60, 20)])]
    samples = [
        Sample("two", (lambda: images[0], lambda: images[1]), turns, ["x", "x"]),
        Sample("text", (), llava_conversation([("who is there?", "a")], ()), ["x"]),
        Sample("one", (lambda: images[2],), llava_conversation([("what?", "cc")]), ["x"]),
    ]
    expected = plain_inputs(family, samples, [chat_messages(sample) for sample in samples])
    (batch,) = EncodedQuestions(samples, family.processor, 3, CPU).batches("all")
    for key, values in expected.items():
        assert torch.equal(batch[key], values), key
    decoded = [family.processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert decoded == ["a<eos>bb<eos>", "a<eos>", "cc<eos>"]


def test_encoded_questions_of_a_text_for_paligemma_raise_with_the_sample(monkeypatch):
    family = chat_family("paligemma", monkeypatch)
    text = Sample("t1", (), llava_conversation([("who is there?", "a")], ()), ["x"])
    with pytest.raises(ValueError, match=r"sample t1: .*PaliGemmaProcessor.*images"):
        EncodedQuestions([text], family.processor, 1, CPU)


def test_encoded_questions_of_a_processor_without_image_token_raise():
    with pytest.raises(ValueError, match=r"Blip2Processor hold no image token"):
        EncodedQuestions(image_questions(), tiny("blip_2").processor, 1, CPU)


def test_encoded_questions_of_a_processor_without_chat_template_raise():
    with pytest.raises(ValueError, match=r"Qwen2_5_VLProcessor has no chat template"):
        EncodedQuestions(image_questions(), tiny("qwen2_5_vl").processor, 1, CPU)


def test_set_trainable_parameters_of_a_model_without_llava_parts_raises():
    with pytest.raises(ValueError, match=r"^train: a Idefics3ForConditionalGeneration has no multi_modal_projector.*$"):
        set_trainable_parameters(tiny("idefics3").model(), TrainConfig(max_steps=1))
