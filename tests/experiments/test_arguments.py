"""Command lines of `key=value` words."""

from dataclasses import dataclass

import pytest

from experiments.arguments import parse_arguments, parse_count


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    tokens: str = "1,4"


def test_parse_arguments_returns_given_values_and_defaults():
    assert parse_arguments(["tokens=9"], Options, None) == Options("tiny", "9")
    assert parse_arguments([], Options, None) == Options()


@pytest.mark.parametrize("word", ["tok=1", "nonsense", "=3"])
def test_parse_arguments_with_unknown_word_names_the_options(word):
    with pytest.raises(ValueError, match=rf"{word.partition('=')[0]!r}.*model, tokens"):
        parse_arguments([word], Options, None)


@pytest.mark.parametrize("words", [["--help"], ["model=x", "-h"]])
def test_parse_arguments_with_help_prints_options_and_exits_without_error(capsys, words):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words, Options, "What it does.")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "What it does." in printed
    assert "model=tiny" in printed


def test_parse_count_refuses_what_is_no_count():
    assert parse_count("frames", "12") == 12
    assert parse_count("prefusion", "0") == 0
    for text in ("-1", "many", "1.5", "0"):
        with pytest.raises(ValueError, match=f"frames: '{text}'"):
            parse_count("frames", text)
