"""Processors, chat templates and samples that cannot be encoded end in one line, which names what is wrong."""

import copy

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from experiments.data.encoding import IGNORE_INDEX, Collator, SampleEncoder
from experiments.data.length_limit import LengthLimit, cut_question
from experiments.data.samples import Sample, llava_conversation
from experiments.evaluation.questions import EncodedQuestions
from llava_mini.chat_templates import VICUNA_TEMPLATE

IMAGE = Image.new("RGB", (48, 48), "red")
HEADER = "{% if add_generation_prompt %}A:{% endif %}"
# Each writes "U:what</s>" and "A:red</s>" for messages that are strings, and fails or prints lists for parts.
STRING_TEMPLATES = {
    "adds strings": "{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}" + HEADER,
    "strips strings": "{% for m in messages %}{{ m.role[0] }}:{{ m.content.strip() }}</s>{% endfor %}" + HEADER,
    "splits strings": "{% for m in messages %}{{ m.role[0] }}:{{ m.content.split('x')[0] }}</s>{% endfor %}" + HEADER,
    "prints lists": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}" + HEADER,
    "trims lists": "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }}</s>{% endfor %}" + HEADER,
}
PARTS = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"


def one_question(question="what?", answer="red", placeholders=("<image>",), name="s1"):
    loaders = (lambda: IMAGE,) * len(placeholders)
    return Sample(name, loaders, llava_conversation([(question, answer)], placeholders), ["x"])


def with_template(processor, monkeypatch, template):
    monkeypatch.setattr(processor, "chat_template", template)
    return SampleEncoder(processor)


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("template", STRING_TEMPLATES.values(), ids=STRING_TEMPLATES)
def test_sample_encoder_with_a_template_of_strings_raises(processor, monkeypatch, template, has_image):
    encode = with_template(processor, monkeypatch, template)
    with pytest.raises(ValueError, match=r"^sample s1: the chat template takes .* a string, not a list of parts.*$"):
        encode(one_question(placeholders=("<image>",) * has_image))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for m in messages %}{{ m.content[0].url.lower() }}{% endfor %}", "UndefinedError"),
        ("{% for m in messages %}{{ 1 / 0 }}{% endfor %}", "ZeroDivisionError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
    ],
)
def test_sample_encoder_with_a_template_that_raises_names_sample_and_reason(processor, monkeypatch, template, reason):
    encode = with_template(processor, monkeypatch, template)
    with pytest.raises(ValueError, match=rf"^sample s1: the chat template fails with {reason}.*$"):
        encode(one_question())


def test_sample_encoder_with_a_template_without_header_of_answers_raises(processor, monkeypatch):
    encode = with_template(processor, monkeypatch, "{% for m in messages %}{{ m.role }}:" + PARTS + "</s>{% endfor %}")
    with pytest.raises(ValueError, match=r"^sample s1: .*ignores add_generation_prompt.*$"):
        encode(one_question())


@pytest.mark.parametrize(
    ("role", "missing"), [("user", "leaves out the text 'what\\?'"), ("assistant", "does not write the answer 'what'")]
)
def test_sample_encoder_with_a_template_that_omits_a_turn_raises(processor, monkeypatch, role, missing):
    """The answer also stands in the question, where it does not count as written."""
    body = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'image' %}<image>"
        f"{{% elif m.role != '{role}' %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}</s>{{% endfor %}}"
    )
    encode = with_template(processor, monkeypatch, body + "{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(ValueError, match=rf"^sample s1: the chat template {missing}.*$"):
        encode(one_question(answer="what"))


@pytest.mark.parametrize("make", [SampleEncoder, Collator])
def test_sample_encoder_and_collator_without_pad_token_raise(processor, make):
    processor = copy.deepcopy(processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"^the tokenizer of the LlavaProcessor has no pad token.*'</s>'.*$"):
        make(processor)


@pytest.mark.parametrize("template", [None, ""])
def test_sample_encoder_without_chat_template_raises(processor, monkeypatch, template):
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match=r"^the LlavaProcessor has no chat template.*$"):
        SampleEncoder(processor)


@pytest.mark.parametrize("answers", [[""], [" \n"], ["", " "]])
def test_sample_encoder_of_empty_answers_raises(processor, answers):
    turns = llava_conversation([("what?", answer) for answer in answers])
    sample = Sample("s1", (lambda: IMAGE,), turns, ["x"] * len(answers))
    for encode in (SampleEncoder(processor), lambda sample: SampleEncoder(processor).check([sample])):
        with pytest.raises(ValueError, match=r"^sample s1: all its answers are empty.*$"):
            encode(sample)


def test_sample_encoder_of_a_question_beyond_the_positions_raises(processor):
    long_question = one_question("is there a blue ring? " * 1250)
    length = len(SampleEncoder(processor)(long_question)["input_ids"])
    limit = LengthLimit.for_model(LlamaConfig(max_position_embeddings=2048))
    with pytest.raises(
        ValueError, match=rf"^sample s1: its {length} tokens exceed the 2048 positions.*data.max_length.*$"
    ):
        SampleEncoder(processor, limit)(long_question)
    with pytest.raises(ValueError, match=r"^sample s1: .* 2048 positions"):
        SampleEncoder(processor, limit).check([long_question])  # before its image is loaded
    with pytest.raises(ValueError, match=r"^sample s1: .* 2048 positions"):
        EncodedQuestions([long_question], processor, 1, torch.device("cpu"), limit=limit)


def test_sample_encoder_of_as_many_tokens_as_positions_is_unchanged(processor):
    plain = SampleEncoder(processor)(one_question())
    length = len(plain["input_ids"])
    assert SampleEncoder(processor, LengthLimit(length))(one_question())["input_ids"] == plain["input_ids"]
    with pytest.raises(ValueError, match=rf"its {length} tokens exceed the {length - 1} positions"):
        SampleEncoder(processor, LengthLimit(length - 1))(one_question())


@pytest.mark.parametrize("question", ["is there a blue ring? " * 50, "is there a blue ring? " * 50 + "<image>"])
def test_sample_encoder_with_max_length_cuts_the_end_of_the_question(processor, question):
    """Answer, image and template stay whole, and the question keeps its first tokens."""
    placeholders = () if question.endswith("<image>") else ("<image>",)
    turns = llava_conversation([(question, "red")], placeholders)
    sample = Sample("s1", (lambda: IMAGE,), turns, ["x"])
    whole = SampleEncoder(processor)(sample)
    cut = SampleEncoder(processor, LengthLimit(2048, 40))(sample)
    end = processor.tokenizer.decode(whole["input_ids"]).rsplit("ring?", 1)[1]  # the header of the answer, and it
    assert len(cut["input_ids"]) <= 40
    assert len(cut["input_ids"]) >= 38  # a word at the cut may take other tokens
    assert processor.tokenizer.decode(cut["input_ids"]).endswith(end.strip())
    assert cut["input_ids"].count(processor.tokenizer.image_token_id) == 9
    assert [i for i in cut["labels"] if i != IGNORE_INDEX] == [i for i in whole["labels"] if i != IGNORE_INDEX]
    kept = len(cut["input_ids"]) - len(processor.tokenizer(end, add_special_tokens=False)["input_ids"]) - 2
    assert cut["input_ids"][:kept] == whole["input_ids"][:kept]


def test_sample_encoder_with_max_length_drops_last_turns_first(processor):
    pairs = [("what?", "red"), ("is there a blue ring?", "no"), ("why?", "yes")]
    sample = Sample("s1", (lambda: IMAGE,), llava_conversation(pairs), ["x"] * 3)
    two = Sample("s1", (lambda: IMAGE,), llava_conversation(pairs[:2]), ["x"] * 2)
    expected = SampleEncoder(processor)(two)["input_ids"]
    assert SampleEncoder(processor, LengthLimit(None, len(expected)))(sample)["input_ids"] == expected


def test_sample_encoder_with_max_length_drops_as_few_turns_as_needed_in_few_encodings(processor, monkeypatch):
    pairs = [(f"is there a {'blue ' * (number % 3)}ring?", "no") for number in range(40)]
    samples = [Sample("s1", (lambda: IMAGE,), llava_conversation(pairs[:n]), ["x"] * n) for n in range(1, 41)]
    whole = [SampleEncoder(processor)(sample)["input_ids"] for sample in samples]
    encodings = []
    encode = SampleEncoder._encode_whole
    monkeypatch.setattr(SampleEncoder, "_encode_whole", lambda *given: encodings.append(1) or encode(*given))
    for limit in (len(whole[0]), len(whole[7]) + 1, len(whole[20]), len(whole[38])):
        encodings.clear()
        expected = max((ids for ids in whole if len(ids) <= limit), key=len)
        assert SampleEncoder(processor, LengthLimit(None, limit))(samples[-1])["input_ids"] == expected
        assert len(encodings) <= 8  # log2(40), and the first and the last


def test_sample_encoder_with_max_length_keeps_the_last_answer_that_is_not_empty(processor):
    pairs = [("what?", ""), ("is there a blue ring? " * 20, "no"), ("why?", ""), ("where?", "")]
    sample = Sample("s1", (lambda: IMAGE,), llava_conversation(pairs), ["x"] * 4)
    cut = SampleEncoder(processor, LengthLimit(None, 40))(sample)
    assert "no" in processor.tokenizer.decode([i for i in cut["labels"] if i != IGNORE_INDEX])


def test_sample_encoder_with_max_length_below_image_and_answer_raises(processor):
    with pytest.raises(ValueError, match=r"^sample s1: data.max_length=10 leaves no question.*$"):
        SampleEncoder(processor, LengthLimit(2048, 10))(one_question())


@pytest.mark.parametrize("max_length", [0, -1, 4096])
def test_length_limit_outside_the_positions_raises(max_length):
    with pytest.raises(ValueError, match=rf"^data.max_length: {max_length} tokens .* 2048 positions"):
        LengthLimit.for_model(LlamaConfig(max_position_embeddings=2048), max_length)


def test_cut_question_keeps_turns_that_hold_an_image(processor):
    turns = [*llava_conversation([("this?", "red")]), *llava_conversation([("that?", "no")])]
    sample = Sample("s1", (lambda: IMAGE, lambda: IMAGE), turns, ["x", "x"])
    shorter = cut_question(sample, 1, processor.tokenizer)
    assert shorter is None or shorter.placeholders == sample.placeholders
    assert cut_question(sample, 100, processor.tokenizer) is None


def test_sample_encoder_with_the_vicuna_template_accepts_every_check(processor, monkeypatch):
    encode = with_template(processor, monkeypatch, VICUNA_TEMPLATE)
    encode.check([one_question(), one_question("{'type': 'text'} is what?"), one_question("a  b", " yes ")])
