"""The forms in which conversation files are published."""

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.data.conversation_forms import parse_entries, to_llava_form
from experiments.data.llava_json import load_llava_json

LLAVA = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
MESSAGES = [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "a cat"}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
]
NAMES = [{"from": "user", "value": LLAVA[0]["value"]}, {"from": "assistant", "value": "a cat"}]
LEADING_ANSWER = [{"from": "gpt", "value": "hello"}, *LLAVA]


@pytest.mark.parametrize(
    "entry",
    [
        {"conversations": LLAVA},
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"messages": LLAVA},
        {"messages": PARTS},
        {"conversations": NAMES},
        {"conversations": LEADING_ANSWER},
    ],
    ids=["llava", "messages", "role and content", "messages in llava's turns", "parts", "names", "leading answer"],
)
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_load_llava_json_of_every_form_gives_the_same_sample(tmp_path, entry, lines):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    entries = [{"id": "one", "image": "a.png", **entry}, {"id": "two", "image": "a.png", "conversations": LLAVA}]
    path.write_text("\n".join(map(json.dumps, entries)) + "\n" if lines else json.dumps(entries))
    first, second = load_llava_json(str(path), str(tmp_path), "test").samples
    assert (first.conversations, first.answers) == (LLAVA, ["a cat"])
    assert second.conversations == LLAVA
    assert len(first.loaders) == 1


def test_parse_entries_accepts_blank_lines_and_a_byte_order_mark():
    assert parse_entries(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}\n', Path("x.jsonl")) == [{"a": 1}, {"a": 2}]
    assert parse_entries(b"\xef\xbb\xbf[1]", Path("x.json")) == [1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x\.jsonl', line 2"),
        ("x.json", b'[{"a": 1}', r"x\.json' is not JSON"),
        ("x.json", b'{"a": 1}', r"x\.json'.*dict"),
        ("x.json", b"[]", r"x\.json'.*none"),
        ("x.jsonl", b"", r"x\.jsonl'"),
    ],
)
def test_parse_entries_of_a_broken_file_names_file_and_line(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_entries(text, Path(name))


def test_to_llava_form_refuses_a_system_turn():
    turns = [{"role": "system", "content": "be brief"}, *MESSAGES]
    with pytest.raises(ValueError, match=r"entry 3, turn 0.*system"):
        to_llava_form({"messages": turns}, "'x.json', entry 3")


@pytest.mark.parametrize("entry", [3, {"text": "no turns"}, {"conversations": "no list"}, {"messages": [1, 2]}])
def test_to_llava_form_leaves_what_is_no_conversation_to_later_checks(entry):
    converted = to_llava_form(entry, "here")
    assert converted == entry or converted == {"conversations": [1, 2]}
