"""The forms in which conversation files are published."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.data.bad_entries import EntryError
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


def test_parse_entries_accepts_json_lines_under_any_name():
    lines = b'{"a": 1}\n{"a": 2}'
    for name in ("x.jsonl", "x.json", "x.txt"):
        assert parse_entries(lines, Path(name)) == [{"a": 1}, {"a": 2}]
    assert parse_entries(b'{"a": 1}\n', Path("x.jsonl")) == [{"a": 1}]
    assert parse_entries('{"a": "\u2028"}\n{"a": 2}'.encode(), Path("x.jsonl")) == [{"a": "\u2028"}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x\.jsonl', line 2"),
        ("x.json", b'[{"a": 1}', r"x\.json' is not JSON"),
        ("x.json", b'{"a": 1}', r"x\.json'.*dict"),
        ("x.json", b"[]", r"x\.json'.*none"),
        ("x.jsonl", b"", r"x\.jsonl'"),
        ("x.json", b"", r"x\.json' is not JSON"),
        ("x.json", b'{"a": 1}\n{"a": \n', r"x\.json', line 2"),
        ("x.json.gz", gzip.compress(b"[1]", mtime=0), r"x\.json\.gz' is a gzip file"),
        ("x.json", gzip.compress(b"[1]", mtime=0), r"x\.json' is a gzip file"),
        ("x.parquet", b"PAR1\0\0", r"x\.parquet' is a parquet file"),
        ("x.json", b"id\tquestion\n1\twhat?", r"x\.json' is not JSON"),
    ],
)
def test_parse_entries_of_a_broken_file_names_file_and_line(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_entries(text, Path(name))


def test_to_llava_form_takes_a_first_system_turn_as_the_system_prompt():
    turns = [{"role": "system", "content": "be brief"}, *MESSAGES]
    assert to_llava_form({"messages": turns}) == {"system": "be brief", "conversations": LLAVA}
    assert to_llava_form({"system": "be brief", "messages": MESSAGES})["system"] == "be brief"
    parts = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *MESSAGES]
    assert to_llava_form({"messages": parts})["system"] == "be brief"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": [*MESSAGES, {"role": "system", "content": "be brief"}]}, r"^turn 2: a system turn after"),
        ({"messages": [{"from": "system", "value": "a"}] * 2 + MESSAGES}, r"^turn 1: a system turn after"),
        ({"system": "a", "messages": [{"from": "system", "value": "b"}, *MESSAGES]}, r"^turn 0: .*\"system\""),
        ({"image": "a.png", "images": ["a.png"], "messages": MESSAGES}, r'"image" and "images"'),
    ],
)
def test_to_llava_form_of_a_contradiction_raises(entry, message):
    with pytest.raises(EntryError, match=message):
        to_llava_form(entry)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_to_llava_form_takes_the_path_in_a_part_if_the_entry_has_none(part):
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}, MESSAGES[1]]
    assert to_llava_form({"messages": turns}) == {"image": ["a.png"], "conversations": LLAVA}
    assert to_llava_form({"messages": turns, "images": ["b.png"]})["image"] == ["b.png"]


@pytest.mark.parametrize("entry", [3, {"text": "no turns"}, {"conversations": "no list"}, {"messages": [1, 2]}])
def test_to_llava_form_leaves_what_is_no_conversation_to_later_checks(entry):
    converted = to_llava_form(entry)
    assert converted == entry or converted == {"conversations": [1, 2]}
