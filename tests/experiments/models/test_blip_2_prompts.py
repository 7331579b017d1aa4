"""Prompts of BLIP-2 from a chat template, against its own processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from experiments.data.encoding import IGNORE_INDEX
from experiments.data.samples import Sample, llava_conversation
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.blip_2_prompts import Blip2ChatProcessor
from experiments.models.build import load_checkpoint
from tests.experiments.model_families import chat_family, image_questions, noise_image
from tests.probes.tokens.families.build import tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BLIP-2 (OPT) with its own processor, as on the hub: without a chat template."""
    family = tiny("blip_2")
    family.model().save_pretrained(tmp_path)
    processor = transformers.Blip2Processor(family.processor.image_processor, family.processor.tokenizer, 4)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_load_checkpoint_of_blip_2_writes_the_inputs_of_its_own_processor(folder):
    """The tokens and logits of each question equal those of BLIP-2's own processor, in spite of left padding."""
    model, processor = load_checkpoint(str(folder))
    own = transformers.AutoProcessor.from_pretrained(folder)
    samples = image_questions()
    for start, batch in enumerate(EncodedQuestions(samples, processor, 3, CPU).batches("all")):
        labels = batch.pop("labels")
        for row, sample in enumerate(samples[3 * start : 3 * start + 3]):
            question, answer = (turn["value"] for turn in sample.conversations)
            text = f"Question: {question.removeprefix('<image>').strip()} Answer: {answer}\n"
            expected = own(text=text, images=list(sample.visual_inputs), return_tensors="pt")
            kept = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row, kept].tolist() == expected["input_ids"][0].tolist()
            with torch.no_grad():
                logits = model(**batch).logits[row, kept]
                torch.testing.assert_close(logits, model(**expected).logits[0], rtol=1e-4, atol=1e-4)
            answers = labels[row][labels[row] != IGNORE_INDEX]
            assert processor.tokenizer.decode(answers) == f" {answer}\n"


def test_load_checkpoint_of_blip_2_keeps_the_chat_template_of_the_folder(folder):
    (folder / "chat_template.jinja").write_text("<image>IMAGE {{ messages[0].content[1].text }}")
    _, processor = load_checkpoint(str(folder))
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert processor.apply_chat_template([{"role": "user", "content": parts}]) == "<image>IMAGE what?"


def test_saved_processor_of_blip_2_is_read_by_transformers_and_by_load_checkpoint(folder):
    _, processor = load_checkpoint(str(folder))
    processor.save_pretrained(folder)
    assert type(transformers.AutoProcessor.from_pretrained(folder)) is transformers.Blip2Processor
    _, again = load_checkpoint(str(folder))
    assert again.chat_template == processor.chat_template
    assert again.num_query_tokens == 4


@pytest.mark.parametrize("images", [0, 2])
def test_encoded_questions_for_blip_2_without_one_image_raise_with_the_sample(images, monkeypatch):
    processor = chat_family("blip_2", monkeypatch).processor
    talk = llava_conversation([("what?", "a")], ("<image>",) * images)
    sample = Sample("s1", tuple(lambda: noise_image(0, (9, 9)) for _ in range(images)), talk, ["x"])
    with pytest.raises(ValueError, match=rf"sample s1: .*one image.*found {images} images"):
        EncodedQuestions([sample], processor, 1, CPU)


def test_blip_2_chat_processor_image_inside_a_text_raises():
    own = tiny("blip_2").processor
    processor = Blip2ChatProcessor(own.image_processor, own.tokenizer, num_query_tokens=4)
    with pytest.raises(ValueError, match=r"before the text: .*'what <image>\?'"):
        processor(text=["what <image>?"], images=[[noise_image(0, (9, 9))]])


def test_load_checkpoint_of_blip_2_with_an_encoder_decoder_raises(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {
        "model_type": "t5",
        "d_model": 16,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "d_kv": 8,
        "vocab_size": 300,
    }
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        qformer_config=vision | {"encoder_hidden_size": 16},
        text_config=text,
        num_query_tokens=2,
        image_token_index=3,
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny("blip_2").processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model.path: the language model .*, a t5, is an encoder-decoder; .*OPT$"):
        load_checkpoint(str(tmp_path))
