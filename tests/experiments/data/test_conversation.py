import pytest
import torch
from PIL import Image

from experiments.data.conversation import IGNORED, Collator, Encoder, messages
from experiments.data.samples import Sample, conversation
from experiments.joined import image_chat_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_ids_are_what_the_processor_makes(processor, few):
    sample = few.samples[0]
    encoded = Encoder(processor)(sample)
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    assert encoded["input_ids"] == processor(text=text, images=sample.image)["input_ids"][0]


@pytest.mark.parametrize("template", [None, image_chat_template(CHATML), VICUNA], ids=["tiny", "chatml", "vicuna"])
def test_labels_are_the_answers_and_their_ends_and_nothing_else(processor, few, template, monkeypatch):
    if template:
        monkeypatch.setattr(processor, "chat_template", template)
    sample = few.samples[1]
    encoded = Encoder(processor)(sample)
    decode = processor.tokenizer.decode
    runs: list[list[int]] = [[]]
    for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (IGNORED, i)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    ends = {"chatml": "<|im_end|>"}.get("chatml" if template and "im_end" in template else "", "</s>")
    assert [decode(run).strip() for run in runs if run] == [answer + ends for answer in sample.answers]


def test_a_template_that_rewrites_earlier_turns_is_refused(processor, few, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match="turn by turn"):
        Encoder(processor)(few.samples[0])


def test_text_only(processor):
    sample = Sample("t", None, conversation([("is there a blue ring?", "no")], image=False), ["existence"])
    encoded = Encoder(processor)(sample)
    assert processor.image_token not in processor.tokenizer.decode(encoded["input_ids"])
    assert "pixel_values" not in Collator(processor)([{**encoded, "image": None}])


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_masks(processor, few, side):
    encoder = Encoder(processor)
    short = Sample("s", lambda: Image.new("RGB", (48, 48)), conversation([("yes?", "no")]), ["x"])
    samples = [few.samples[0], short]
    batch = Collator(processor, side)([{**encoder(s), "image": s.image} for s in samples])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    for row, sample in enumerate(samples):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == encoder(sample)["input_ids"]
        assert (batch["labels"][row][~kept] == IGNORED).all()
        assert (batch["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
    first = batch["attention_mask"][1, 0]
    assert torch.equal(first, torch.tensor(0 if side == "left" else 1))
