"""System prompts of conversations: rendered by templates with a system role, refused by others."""

import json

import pytest
from PIL import Image

from experiments.data.encoding import IGNORE_INDEX, SampleEncoder
from experiments.data.length_limit import LengthLimit
from experiments.data.llava_json import load_llava_json
from experiments.data.samples import Sample, llava_conversation, single_questions
from llava_mini.chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE

PARTS = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
TURN = "{{ m.role }}:" + PARTS + "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
# As the published templates of these families do it, with parts as content.
GEMMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}" + TURN
)
MISTRAL = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}" + TURN
)
GEMMA_3 = (  # puts the system prompt into the first question
    "{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set prefix = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{{ m.role }}:{{ prefix if loop.first else '' }}" + PARTS + "</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PIXTRAL = (  # takes the system prompt as a string, and parts in other turns
    "{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set prefix = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{{ m.role }}:{{ prefix if loop.first else '' }}" + PARTS + "</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ROLES = "{% for m in messages %}" + TURN
DROPS = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}:"
    + PARTS
    + ("</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
)


def sample(system, pairs=(("what?", "red"),)):
    return Sample("s1", (lambda: Image.new("RGB", (48, 48)),), llava_conversation(pairs), ["x"] * len(pairs), system)


def encode(processor, monkeypatch, template, item):
    monkeypatch.setattr(processor, "chat_template", template)
    return SampleEncoder(processor)(item)


@pytest.mark.parametrize(
    "template",
    [ROLES, GEMMA_3, PIXTRAL, LLAMA_3_TEMPLATE, VICUNA_TEMPLATE],
    ids=["roles", "gemma 3", "pixtral", "llama 3", "vicuna"],
)
def test_sample_encoder_writes_the_system_prompt_once_ahead_of_the_question(processor, monkeypatch, template):
    """Labels and answers are those of the conversation without it, and the template's own prompt is replaced."""
    pairs = (("what?", "red"), ("is there a blue ring?", "no"))
    with_prompt = encode(processor, monkeypatch, template, sample("is there a green cross?", pairs))
    plain = encode(processor, monkeypatch, template, sample(None, pairs))
    text, plain_text = (processor.tokenizer.decode(item["input_ids"]) for item in (with_prompt, plain))
    assert text.count("green cross") == 1
    assert text.index("green cross") < text.index("what")
    assert "green cross" not in plain_text
    labels, plain_labels = ([i for i in item["labels"] if i != IGNORE_INDEX] for item in (with_prompt, plain))
    assert labels == plain_labels
    assert labels


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (GEMMA_2, r"no system role \(TemplateError: System role not supported\)"),
        (MISTRAL, r"no system role \(TemplateError: Conversation roles must alternate"),
        (DROPS, r"no system role, which it leaves out"),
    ],
    ids=["gemma 2", "mistral", "drops it"],
)
@pytest.mark.parametrize("system", ["be brief", "what?", "a"])
def test_sample_encoder_with_a_template_without_system_role_raises(processor, monkeypatch, template, reason, system):
    """Also where the text of the prompt is in the question, or in the names of roles."""
    with pytest.raises(ValueError, match=rf"^sample s1: the chat template of the LlavaProcessor has {reason}"):
        encode(processor, monkeypatch, template, sample(system))
    assert encode(processor, monkeypatch, template, sample(None))["input_ids"]


def test_sample_encoder_with_a_template_that_fails_in_any_case_names_that_fault(processor, monkeypatch):
    with pytest.raises(ValueError, match=r"^sample s1: the chat template fails with ZeroDivisionError"):
        encode(processor, monkeypatch, "{{ 1 / 0 }}", sample("be brief"))


def test_single_questions_and_truncated_samples_keep_the_system_prompt(processor, monkeypatch):
    pairs = (("what?", "red"), ("is there a blue ring?", "no"))
    assert [single.system for single in single_questions([sample("be brief", pairs)])] == ["be brief"] * 2
    monkeypatch.setattr(processor, "chat_template", ROLES)
    whole = SampleEncoder(processor)(sample("is there a ring?", pairs))
    first = SampleEncoder(processor)(sample("is there a ring?", pairs[:1]))
    cut = SampleEncoder(processor, LengthLimit(2048, len(whole["input_ids"]) - 1))(sample("is there a ring?", pairs))
    assert cut["input_ids"] == first["input_ids"]


def test_load_llava_json_reads_the_system_turn(tmp_path):
    turns = [{"from": "system", "value": "be brief"}, *llava_conversation([("what?", "red")], ())]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns[1:]}]))
    first, second = load_llava_json(str(tmp_path / "data.json"), str(tmp_path), "test").samples
    assert (first.system, first.conversations) == ("be brief", turns[1:])
    assert second.system is None


def test_load_llava_json_of_an_image_in_the_system_prompt_raises(tmp_path):
    turns = [{"from": "system", "value": "<image>"}, *llava_conversation([("what?", "red")], ())]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(ValueError, match="entry 0: the system prompt holds <image>"):
        load_llava_json(str(tmp_path / "data.json"), str(tmp_path), "test")
