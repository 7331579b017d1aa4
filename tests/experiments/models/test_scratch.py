"""The tiny LLaVA that ships with the project: transformers alone loads it, and it is as good as its card."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from experiments.data.samples import OneQuestionPerImage
from experiments.data.scenes import CELL_SIZE, GRID_SIZE
from experiments.data.shapes import QUESTION_TYPES, load_shapes
from experiments.evaluation.accuracy import blank_images, correct_answers, shuffled_images
from experiments.evaluation.questions import EncodedQuestions
from experiments.files import ASSETS
from experiments.models.build import load_checkpoint

TINY = ASSETS / "tiny"
CPU = torch.device("cpu")


def test_shipped_model_loads_with_transformers_alone_and_answers():
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    processor = AutoProcessor.from_pretrained(TINY)
    assert type(model) is LlavaForConditionalGeneration
    sample = load_shapes("test", 1).samples[0]
    question = sample.questions[sample.question_types.index("place")]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=sample.image, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True) == sample.answers[sample.question_types.index("place")]


def test_shipped_model_is_smaller_than_8_megabytes():
    assert sum(path.stat().st_size for path in TINY.rglob("*.safetensors")) < 8e6


def test_shipped_model_answers_all_question_types_and_needs_the_image():
    """Test on 300 questions about other scenes than the card's (another seed).

    Bounds leave three standard errors below the card's scores: 85% overall, 50% on reading order, 84% or more elsewhere.
    """
    model, processor = load_checkpoint(str(TINY))
    samples = list(OneQuestionPerImage(load_shapes("test", 300, seed=7).samples))
    outcomes = correct_answers(model, EncodedQuestions(samples, processor, 100, CPU), "accuracy").float()
    assert outcomes.mean() > 0.79
    for question_type in QUESTION_TYPES:
        of_type = outcomes[[s.question_types[0] == question_type for s in samples]]
        assert of_type.mean() > (0.28 if question_type == "reading" else 0.68), question_type
    for control in (blank_images, shuffled_images):
        changed = EncodedQuestions(control(samples), processor, 100, CPU)
        assert correct_answers(model, changed, control.__name__).float().mean() < 0.45


def test_shipped_class_token_attends_to_patches_with_objects():
    """Compare patches that hold an object's centre with all others, in the layer that compressors read.

    The area under the ROC curve is the share of such pairs in which the object's patch has more of the class token's
    attention. The bound leaves room below the card's 0.95; untrained attention has 0.5.
    """
    model, processor = load_checkpoint(str(TINY))
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    samples = load_shapes("test", 100, seed=7).samples
    pixels = processor.image_processor([samples.render(i) for i in range(100)], return_tensors="pt")
    with torch.no_grad():
        attention = tower(**pixels, output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
    areas = []
    for scores, colour, centre in zip(attention, samples.scenes.colour, samples.scenes.centre, strict=True):
        is_object = torch.zeros(36, dtype=torch.bool)
        for cell in (colour >= 0).nonzero()[0]:
            row, column = divmod(int(cell), GRID_SIZE)
            x, y = centre[cell]
            is_object[int((row * CELL_SIZE + y) // 8) * 6 + int((column * CELL_SIZE + x) // 8)] = True
        areas.append((scores[is_object][:, None] > scores[~is_object]).float().mean())
    assert torch.stack(areas).mean() > 0.85


def test_load_checkpoint_with_missing_weights_raises(tmp_path):
    from safetensors.torch import load_file, save_file

    for path in TINY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(TINY / "model.safetensors")
    missing_weight = next(name for name in weights if "layers.3.mlp.up_proj" in name)
    save_file(
        {k: v for k, v in weights.items() if k != missing_weight}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is .*layers.3.mlp.up_proj"):
        load_checkpoint(str(tmp_path))
