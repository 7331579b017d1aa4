"""Generated answers against transformers' own generate for each question alone, and against teacher-forced outcomes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from experiments.config.schema import Config, ReductionConfig
from experiments.data.encoding import chat_messages
from experiments.data.samples import Sample, single_questions
from experiments.data.shapes import load_shapes
from experiments.evaluation.accuracy import blank_images, correct_answers, shuffled_images
from experiments.evaluation.generated_answers import generate_answers, measure_generated_answers
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.build import load_checkpoint
from experiments.models.token_reduction import token_dropper_for_inference
from experiments.records.files import read_record
from experiments.sweeps.plan import identify_cell
from experiments.sweeps.runner import run_if_needed
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from tests.experiments.model_families import chat_family, image_questions
from tests.probes.tokens.families.build import MODEL_FAMILIES

CPU = torch.device("cpu")
NEW_TOKENS = 4


@pytest.fixture(params=["llava", "mini"])
def model_and_processor(request, llava, processor):
    if request.param == "llava":
        return llava, processor
    torch.manual_seed(1)
    mini = LlavaMiniForConditionalGeneration.from_llava(
        llava, compressor="query", compressor_size=2, prefusion_layers=1
    )
    for parameter in mini.model.prefusion.parameters():  # copies of the first layers change little
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mini.eval(), LlavaMiniProcessor.from_llava(processor, mini.config)


def generate_alone(model, processor, samples) -> list[str]:
    """Return what transformers' generate writes for each question in a batch of its own."""
    texts = []
    for sample in samples:
        prompt = processor.apply_chat_template(chat_messages(sample)[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=prompt, images=sample.image, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generate_answers_in_batches_equals_generate_of_each_question(model_and_processor, shapes_split, batch_size):
    model, processor = model_and_processor
    samples = list(single_questions(shapes_split.samples))[:17]
    assert len({len(sample.questions[0]) for sample in samples}) > 3  # rows of a batch are padded
    answers = generate_answers(model, processor, samples, batch_size, NEW_TOKENS, "test")
    assert answers == generate_alone(model, processor, samples)
    assert len(set(answers)) > 3


@pytest.mark.parametrize(
    "reduction", [ReductionConfig(), ReductionConfig("fastv", [2], keep=0.5), ReductionConfig("vtw", [3])]
)
def test_generated_answers_are_right_where_teacher_forced_tokens_are(compose_config, reduction):
    """The shipped LLaVA with and without token reduction: some of its answers are right and some are not."""
    model, processor = load_checkpoint("asset:tiny")
    config: Config = compose_config()
    config.reduction = reduction
    drop_tokens = token_dropper_for_inference(config)
    samples = [s for s in single_questions(load_shapes("test", 6).samples) if " " not in s.answers[0]]
    outcomes = correct_answers(model, EncodedQuestions(samples, processor, 16, CPU), "test", drop_tokens)
    answers = generate_answers(model, processor, samples, 16, 4, "test", drop_tokens)
    assert [answer == sample.answers[0] for answer, sample in zip(answers, samples, strict=True)] == outcomes.tolist()
    assert 0 < outcomes.sum() < len(samples)


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_generate_answers_of_every_family_equals_generate_of_each_question(name, monkeypatch):
    family, samples = chat_family(name, monkeypatch), image_questions()[:3]
    model, expected = family.model(), []
    for sample in samples:
        text = family.processor.apply_chat_template(
            chat_messages(sample)[:1], tokenize=False, add_generation_prompt=True
        )
        inputs = family.processor(text=[text], images=[list(sample.visual_inputs)], return_tensors="pt")
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(family.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert generate_answers(model, family.processor, samples, 3, 2, "test") == expected


def test_measure_generated_answers_scores_every_input(llava, processor, shapes_split):
    """An annotator's answer that is the model's own counts; the others are nobody's."""
    samples = list(single_questions(shapes_split.samples))[:5]
    own = generate_alone(llava, processor, samples)
    matches = [0, 1, 2, 3, 10]
    annotated = [
        replace(sample, annotators=[[answer] * count + ["of nobody"] * (10 - count)])
        for sample, answer, count in zip(samples, own, matches, strict=True)
    ]
    controls = {"blank": blank_images, "shuffled": shuffled_images}
    part = measure_generated_answers(llava, processor, annotated, "vqa", NEW_TOKENS, 2, controls=controls)
    assert (part["metric"], part["references"], part["max_new_tokens"]) == ("vqa", 10, NEW_TOKENS)
    assert part["image"] == {"answers": own, "scores": [0.0, 0.3, 0.6, 0.9, 1.0]}
    assert part["blank"]["answers"] == generate_alone(llava, processor, blank_images(samples))
    assert part["shuffled"]["answers"] == generate_alone(llava, processor, shuffled_images(samples))


def test_measure_generated_answers_without_annotators_has_one_reference(llava, processor, shapes_split):
    samples = list(single_questions(shapes_split.samples))[:2]
    own = generate_alone(llava, processor, samples)
    right = [
        replace(s, conversations=[s.conversations[0], {"from": "gpt", "value": f"{a.upper()}."}])
        for s, a in zip(samples, own, strict=True)
    ]
    part = measure_generated_answers(llava, processor, right, "gqa", NEW_TOKENS, 2)
    assert part["references"] == 1
    assert part["image"]["scores"] == [1.0, 1.0]
    assert "blank" not in part


def test_generate_answers_of_a_prompt_beyond_the_positions_names_the_sample(llava, processor, shapes_split):
    llava.config.text_config.max_position_embeddings = 12
    samples = list(single_questions(shapes_split.samples))[:1]
    with pytest.raises(ValueError, match=rf"sample {samples[0].id}: .* 12 positions"):
        generate_answers(llava, processor, samples, 1, NEW_TOKENS, "test")


def test_cell_with_a_vqa_score_records_generated_answers_with_controls(compose_config, tmp_path):
    """Two entries; the annotators of the first agree with the shipped LLaVA, those of the second do not."""
    turns = [
        {"from": "human", "value": "<image>\nwhat shape is right of the green ring?"},
        {"from": "gpt", "value": "x"},
    ]
    for i in range(2):
        Image.new("RGB", (48, 48), (100 * i, 0, 0)).save(tmp_path / f"{i}.png")
    model, processor = load_checkpoint("asset:tiny")
    sample = Sample("0", (lambda: Image.open(tmp_path / "0.png").convert("RGB"),), turns, ["x"])
    (own,) = generate_alone(model, processor, [sample])
    annotated = [[f"{own.upper()}."] * 10, ["of nobody"] * 10]
    entries = [{"image": f"{i}.png", "conversations": turns, "answers": annotated[i]} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    settings = {"path": tmp_path / "data.json", "images": tmp_path, "score": "vqa", "max_new_tokens": NEW_TOKENS}
    overrides = [f"data.{name}={value}" for name, value in settings.items()]
    overrides += ["data=llava_json", "model=tiny", "device=cpu", "probe.controls=true", f"results={tmp_path}/results"]
    cell = identify_cell(compose_config(*overrides))
    run_if_needed(cell, record_input_errors=False)
    part = read_record(tmp_path / "results" / "records" / f"{cell.id}.json")["generated"]
    assert (part["metric"], part["references"], part["max_new_tokens"]) == ("vqa", 10, NEW_TOKENS)
    assert part["image"]["answers"][0] == own
    assert part["image"]["scores"] == [1.0, 0.0]
    assert {len(part[view]["answers"]) for view in ("image", "blank", "shuffled")} == {2}
