import re

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from experiments.data.encoding import IGNORED, Collator, Encoder, messages
from experiments.data.samples import Sample, conversation
from experiments.data.scenes import SIDE
from experiments.models import scratch
from experiments.models.from_parts import image_chat_template
from llava_mini import LlavaMiniProcessor
from llava_mini.chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE
from llava_mini.video import Video

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What a model of each family reads, token by token, of the two questions and answers of TURNS; every second part is what
# it shall learn to write.
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
FAMILIES = {
    "llama-3.1": (LLAMA_3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>", LLAMA_3),
    "vicuna": (VICUNA_TEMPLATE, "<s>", "</s>", VICUNA),
    "smollm2": (image_chat_template(SMOLLM2_TEMPLATE), "<|im_start|>", "<|im_end|>", SMOLLM2),
}
TURNS = conversation([("What is it?", "A red cat."), ("Sure?", "Yes\nQuite sure")])
PICTURE = Image.new("RGB", (SIDE, SIDE), "red")


def words(bos: str, eos: str, parts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer of words, marks and line breaks; spaces are dropped, and every text begins with the start token."""
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


@pytest.mark.parametrize("visual", [None, 1, 4], ids=["llava", "mini-1", "mini-4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_token_by_token(family, visual):
    template, bos, eos, parts = FAMILIES[family]
    plain = scratch.processor(words(bos, eos, parts), SIDE, patch=16)
    plain.chat_template = template
    processor = plain
    if visual:
        processor = LlavaMiniProcessor(
            plain.image_processor, plain.tokenizer, chat_template=template, num_visual_tokens=visual
        )
    encoded = Encoder(processor)(Sample("s", (lambda: PICTURE,), TURNS, ["x", "x"]))
    expected = [
        (token, learn)
        for i, part in enumerate(parts)
        for token in part.replace("<image>", " ".join(["<image>"] * (visual or 9))).split(" ")
        for learn in [i % 2 == 1]
    ]
    assert processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == [token for token, _ in expected]
    assert [label != IGNORED for label in encoded["labels"]] == [learn for _, learn in expected]
    assert all(label in (IGNORED, i) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True))


def test_ids_are_what_the_processor_makes(processor, few):
    sample = few.samples[0]
    encoded = Encoder(processor)(sample)
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    assert encoded["input_ids"] == processor(text=text, images=sample.image)["input_ids"][0]


def test_labels_of_the_tiny_llava(processor, few):
    sample = few.samples[1]
    encoded = Encoder(processor)(sample)
    decode = processor.tokenizer.decode
    runs: list[list[int]] = [[]]
    for label in encoded["labels"]:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    assert [decode(run) for run in runs if run] == [answer + "</s>" for answer in sample.answers]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("what?", ["what?"]),
        ("<image>\nwhat?", ["IMAGE", "what?"]),
        ("what?\n<image>", ["IMAGE", "what?"]),  # as LLaVA's own training code moves it
        ("<video>", ["VIDEO"]),
        ("<image>\n<image>\nwhat?", ["IMAGE", "IMAGE", "what?"]),
        ("is <image> like <image>?", ["is ", "IMAGE", " like ", "IMAGE", "?"]),
    ],
)
def test_where_pictures_stand_in_a_message(value, content):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}]
    user, assistant = messages(Sample("s", (), turns, ["x"]))
    assert [part.get("text", part["type"].upper()) for part in user["content"]] == content
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}


def test_a_template_that_rewrites_earlier_turns_is_refused(processor, few, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match="turn by turn"):
        Encoder(processor)(few.samples[0])


def test_a_template_that_leaves_the_picture_out_is_refused(processor, few, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match=r"sample shapes-train-0-0: the chat template writes 0 <image> where .* has 1"):
        Encoder(processor)(few.samples[0])


def test_text_only(processor):
    sample = Sample("t", (), conversation([("is there a blue ring?", "no")], slots=()), ["existence"])
    encoded = Encoder(processor)(sample)
    assert processor.image_token not in processor.tokenizer.decode(encoded["input_ids"])
    assert "pixel_values" not in Collator(processor)([encoded])


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_and_masks(processor, few, side):
    encoder = Encoder(processor)
    short = Sample("s", (lambda: Image.new("RGB", (48, 48)),), conversation([("yes?", "no")]), ["x"])
    samples = [few.samples[0], short]
    batch = Collator(processor, side)([encoder(s) for s in samples])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    for row, sample in enumerate(samples):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == encoder(sample)["input_ids"]
        assert (batch["labels"][row][~kept] == IGNORED).all()
        assert (batch["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
    first = batch["attention_mask"][1, 0]
    assert torch.equal(first, torch.tensor(0 if side == "left" else 1))


@pytest.fixture
def mini(processor):
    """A LLaVA-Mini's processor: four tokens a picture, in tiles of 2 x 2, with a template that knows videos."""
    return LlavaMiniProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=image_chat_template(
            "{{ bos_token }}{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
            "{% endfor %}"
        ),
        num_visual_tokens=4,
        tiles=2,
    )


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (level, level, level))


def test_rows_of_all_kinds_in_one_batch(mini):
    """Videos, text alone, several images: as the processor makes them of all rows at once."""
    film = Video([grey(level) for level in (10, 20, 30)])
    samples = [
        Sample("v", (lambda: film,), conversation([("what?", "a")], ["<video>"]), ["x"]),
        Sample("t", (), conversation([("who?", "b")], []), ["x"]),
        Sample("i", (lambda: grey(40), lambda: grey(50)), conversation([("why?", "c")], ["<image>"] * 2), ["x"]),
    ]
    encoder = Encoder(mini)
    items = [encoder(sample) for sample in samples]
    assert [item["input_ids"].count(encoder.tokenizer.image_token_id) for item in items] == [3 * 4, 0, 2 * 4]
    batch = Collator(mini)(items)
    expected = mini(
        text=["<s><video>\nwhat?a</s>", "<s>who?b</s>", "<s><image>\n<image>\nwhy?c</s>"],
        images=[grey(40), grey(50)],
        videos=[film],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "visual_layout"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["visual_layout"].tolist() == [[0, 3, 2], [2, 1, 2], [2, 1, 2]]
    assert [mini.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]] == ["a</s>", "b</s>", "c</s>"]


def test_several_images_in_a_plain_llava(processor):
    """Each takes its own tokens, and the labels stay on the answer behind them."""
    turns = conversation([("what differs?", "nothing")], ["<image>", "<image>"])
    encoded = Encoder(processor)(Sample("s", (lambda: PICTURE, lambda: PICTURE), turns, ["x"]))
    assert encoded["input_ids"].count(processor.tokenizer.image_token_id) == 18
    labels = [label for label in encoded["labels"] if label != IGNORED]
    assert processor.tokenizer.decode(labels) == "nothing</s>"
    assert Collator(processor)([encoded])["pixel_values"].shape == (2, 3, 48, 48)


def test_a_plain_llava_takes_no_video(processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", image_chat_template("{{ messages[0]['content'] }}yes"))
    sample = Sample("film", (lambda: Video([PICTURE]),), conversation([("what?", "yes")], ["<video>"]), ["x"])
    with pytest.raises(ValueError, match="sample film: a LlavaProcessor takes images, not videos"):
        Encoder(processor)(sample)
