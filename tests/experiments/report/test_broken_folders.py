"""Results folders that no report can be made of end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.report.__main__ import main


def break_folder(results: Path, fault: str) -> None:
    """Make a results folder that no report can be made of."""
    records = results / "records"
    records.mkdir(parents=True)
    if fault == "file":
        records.rmdir()
        results.rmdir()
        results.write_text("")
    elif fault == "records is a file":
        records.rmdir()
        records.write_text("")
    elif fault == "no folder":
        records.rmdir()
        results.rmdir()
    elif fault == "one level too deep":
        records.rmdir()
        (results / "a.json").write_text("{}")
    elif fault != "empty":
        texts = {
            "truncated": "{",
            "newer": '{"schema": 2}',
            "older": '{"schema": 0}',
            "not an object": "[1]",
            "no text": "\x00\x01",
            "no schema": "{}",
        }
        for name in ("a.json", "b.json"):
            (records / name).write_text(texts[fault])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("empty", "no records in"),
        ("no folder", "there is no folder"),
        ("file", "Not a directory"),
        ("records is a file", "Not a directory"),
        ("one level too deep", "name the folder that holds records/"),
        ("truncated", "a.json: not valid JSON"),
        ("no text", "a.json: not valid JSON"),
        ("newer", "a.json: schema: this version reads 1, found 2"),
        ("older", "a.json: schema: this version reads 1, found 0"),
        ("no schema", "a.json: schema: this version reads 1, found None"),
        ("not an object", "a.json: a record must be a JSON object"),
    ],
)
def test_main_folder_without_readable_record_is_one_error_line(
    fault: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "mine"
    break_folder(results, fault)
    assert main([f"results={results}"]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert reason in output.err
    assert str(results) in output.err
    assert not (tmp_path / "mine" / "report").exists()
