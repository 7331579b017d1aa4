"""Token ids, labels and batches of conversations."""

import re

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.data.encoding import IGNORE_INDEX, Collator, SampleEncoder, chat_messages
from experiments.data.samples import Sample, llava_conversation
from experiments.data.scenes import IMAGE_SIZE
from experiments.models import scratch
from experiments.models.from_parts import multimodal_chat_template
from llava_mini import LlavaMiniProcessor
from llava_mini.chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE
from llava_mini.video import Video

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tokens of the conversation TURNS in each chat template. Every second part is an answer, whose tokens are labelled.
LLAMA_3 = (
    "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> \n \n You are a helpful language and vision assistant . "
    "You are able to understand the visual content that the user provides , and assist the user with a variety of tasks "
    "using natural language . <|eot_id|> <|start_header_id|> user <|end_header_id|> \n \n <image> \n What is it ? "
    "<|eot_id|> <|start_header_id|> assistant <|end_header_id|> \n \n",
    "A red cat . <|eot_id|>",
    "<|start_header_id|> user <|end_header_id|> \n \n Sure ? <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> \n \n",
    "Yes \n Quite sure <|eot_id|>",
)
VICUNA = (
    "<s> A chat between a curious user and an artificial intelligence assistant . The assistant gives helpful , detailed , "
    "and polite answers to the user ' s questions . USER : <image> \n What is it ? ASSISTANT :",
    "A red cat . </s>",
    "USER : Sure ? ASSISTANT :",
    "Yes \n Quite sure </s>",
)
SMOLLM2 = (
    "<|im_start|> system \n You are a helpful AI assistant named SmolLM , trained by Hugging Face <|im_end|> \n "
    "<|im_start|> user \n <image> \n What is it ? <|im_end|> \n <|im_start|> assistant \n",
    "A red cat . <|im_end|>",
    "\n <|im_start|> user \n Sure ? <|im_end|> \n <|im_start|> assistant \n",
    "Yes \n Quite sure <|im_end|>",
    "\n",
)
TEMPLATES = {
    "llama-3.1": (LLAMA_3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>", LLAMA_3),
    "vicuna": (VICUNA_TEMPLATE, "<s>", "</s>", VICUNA),
    "smollm2": (multimodal_chat_template(SMOLLM2_TEMPLATE), "<|im_start|>", "<|im_end|>", SMOLLM2),
}
TURNS = llava_conversation([("What is it?", "A red cat."), ("Sure?", "Yes\nQuite sure")])
RED_IMAGE = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "red")


def word_tokenizer(bos: str, eos: str, parts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, punctuation and line breaks that drops spaces and prepends the start token."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(" ".join(parts).split(" ")))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="no other word"))
    tokenizer.add_special_tokens([word for word in vocabulary if re.fullmatch("<.+>", word)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\n]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.mark.parametrize("visual_tokens", [None, 1, 4], ids=["llava", "mini-1", "mini-4"])
@pytest.mark.parametrize("template_name", TEMPLATES)
def test_sample_encoder_labels_only_answer_tokens(template_name, visual_tokens):
    template, bos, eos, parts = TEMPLATES[template_name]
    plain = scratch.build_processor(word_tokenizer(bos, eos, parts), IMAGE_SIZE, patch=16)
    plain.chat_template = template
    processor = plain
    if visual_tokens:
        processor = LlavaMiniProcessor(
            plain.image_processor, plain.tokenizer, chat_template=template, num_visual_tokens=visual_tokens
        )
    encoded = SampleEncoder(processor)(Sample("s", (lambda: RED_IMAGE,), TURNS, ["x", "x"]))
    expected = [
        (token, is_answer)
        for i, part in enumerate(parts)
        for token in part.replace("<image>", " ".join(["<image>"] * (visual_tokens or 9))).split(" ")
        for is_answer in [i % 2 == 1]
    ]
    assert processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == [token for token, _ in expected]
    assert [label != IGNORE_INDEX for label in encoded["labels"]] == [is_answer for _, is_answer in expected]
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True))


def test_sample_encoder_returns_the_ids_of_the_processor(processor, shapes_split):
    sample = shapes_split.samples[0]
    encoded = SampleEncoder(processor)(sample)
    text = processor.apply_chat_template(chat_messages(sample), tokenize=False)
    assert encoded["input_ids"] == processor(text=text, images=sample.image)["input_ids"][0]


def test_sample_encoder_labels_each_answer_with_its_end_token(processor, shapes_split):
    sample = shapes_split.samples[1]
    encoded = SampleEncoder(processor)(sample)
    decode = processor.tokenizer.decode
    runs: list[list[int]] = [[]]
    for label in encoded["labels"]:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    assert [decode(run) for run in runs if run] == [answer + "</s>" for answer in sample.answers]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("what?", ["what?"]),
        ("<image>\nwhat?", ["IMAGE", "what?"]),
        ("what?\n<image>", ["IMAGE", "what?"]),  # as in LLaVA's own training code
        ("<video>", ["VIDEO"]),
        ("<image>\n<image>\nwhat?", ["IMAGE", "IMAGE", "what?"]),
        ("is <image> like <image>?", ["is ", "IMAGE", " like ", "IMAGE", "?"]),
    ],
)
def test_chat_messages_puts_a_single_image_first(value, content):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}]
    user, assistant = chat_messages(Sample("s", (), turns, ["x"]))
    assert [part.get("text", part["type"].upper()) for part in user["content"]] == content
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def test_sample_encoder_with_a_template_that_rewrites_earlier_turns_raises(processor, shapes_split, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match=r"sample shapes-train-0-0: .*turn by turn"):
        SampleEncoder(processor)(shapes_split.samples[0])


def test_sample_encoder_with_a_template_without_images_raises(processor, shapes_split, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match=r"sample shapes-train-0-0: .*0 <image>.* 1 <image>"):
        SampleEncoder(processor)(shapes_split.samples[0])


def test_sample_encoder_of_a_text_sample_has_no_image_token(processor):
    sample = Sample("t", (), llava_conversation([("is there a blue ring?", "no")], placeholders=()), ["existence"])
    encoded = SampleEncoder(processor)(sample)
    assert processor.image_token not in processor.tokenizer.decode(encoded["input_ids"])
    assert "pixel_values" not in Collator(processor)([encoded])


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_masks_each_row(processor, shapes_split, side):
    encoder = SampleEncoder(processor)
    short = Sample("s", (lambda: Image.new("RGB", (48, 48)),), llava_conversation([("yes?", "no")]), ["x"])
    samples = [shapes_split.samples[0], short]
    batch = Collator(processor, side)([encoder(s) for s in samples])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    for row, sample in enumerate(samples):
        not_padding = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][not_padding].tolist() == encoder(sample)["input_ids"]
        assert (batch["labels"][row][~not_padding] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row][~not_padding] == processor.tokenizer.pad_token_id).all()
    first = batch["attention_mask"][1, 0]
    assert torch.equal(first, torch.tensor(0 if side == "left" else 1))


@pytest.fixture
def mini_processor(processor):
    """A LLaVA-Mini processor: four tokens per image, 2 x 2 tiles, and a template that accepts videos."""
    return LlavaMiniProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=multimodal_chat_template(
            "{{ bos_token }}{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
            "{% endfor %}"
        ),
        num_visual_tokens=4,
        tiles=2,
    )


def grey_image(level: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (level, level, level))


def test_collator_of_videos_text_and_images_equals_the_processor(mini_processor):
    """A batch equals what the processor returns for all rows at once."""
    clip = Video([grey_image(level) for level in (10, 20, 30)])
    samples = [
        Sample("v", (lambda: clip,), llava_conversation([("what?", "a")], ["<video>"]), ["x"]),
        Sample("t", (), llava_conversation([("who?", "b")], []), ["x"]),
        Sample(
            "i",
            (lambda: grey_image(40), lambda: grey_image(50)),
            llava_conversation([("why?", "c")], ["<image>"] * 2),
            ["x"],
        ),
    ]
    encoder = SampleEncoder(mini_processor)
    items = [encoder(sample) for sample in samples]
    assert [item["input_ids"].count(encoder.tokenizer.image_token_id) for item in items] == [3 * 4, 0, 2 * 4]
    batch = Collator(mini_processor)(items)
    expected = mini_processor(
        text=["<s><video>\nwhat?a</s>", "<s>who?b</s>", "<s><image>\n<image>\nwhy?c</s>"],
        images=[grey_image(40), grey_image(50)],
        videos=[clip],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "visual_layout"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["visual_layout"].tolist() == [[0, 3, 2], [2, 1, 2], [2, 1, 2]]
    assert [mini_processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]] == [
        "a</s>",
        "b</s>",
        "c</s>",
    ]


def test_sample_encoder_of_two_images_inserts_tokens_for_each(processor):
    """The labels stay on the answer after them."""
    turns = llava_conversation([("what differs?", "nothing")], ["<image>", "<image>"])
    encoded = SampleEncoder(processor)(Sample("s", (lambda: RED_IMAGE, lambda: RED_IMAGE), turns, ["x"]))
    assert encoded["input_ids"].count(processor.tokenizer.image_token_id) == 18
    labels = [label for label in encoded["labels"] if label != IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == "nothing</s>"
    assert Collator(processor)([encoded])["pixel_values"].shape == (2, 3, 48, 48)


def test_sample_encoder_of_a_video_for_llava_raises(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", multimodal_chat_template("{{ messages[0]['content'] }}yes"))
    sample = Sample("clip", (lambda: Video([RED_IMAGE]),), llava_conversation([("what?", "yes")], ["<video>"]), ["x"])
    with pytest.raises(ValueError, match=r"sample clip: a LlavaProcessor .*not videos"):
        SampleEncoder(processor)(sample)
