from __future__ import annotations

import subprocess
import sys

import pytest

from experiments.arguments import request
from experiments.cost.__main__ import Request, estimates, notes
from experiments.cost.paper_values import table

SLIPS = {
    "Table 6, 3 layers",
    "Table 12, pre-fusion within the language model",
    "Table 14, 336 px, Mini, compression",
    "Table 14, 336 px, Mini, pre-fusion",
    "Table 14, 336 px, Mini, LLM",
    "Table 14, 672 px, LLaVA, vision encoder",
    "Table 14, 672 px, Mini, vision encoder",
    "Table 14, 672 px, Mini, compression",
    "Table 14, 672 px, Mini, pre-fusion",
    "Table 14, 672 px, Mini, LLM",
}


def test_every_printed_figure_but_the_slips() -> None:
    rows = table()
    assert set(rows.source[~rows.fits]) == SLIPS
    assert rows.note[~rows.fits].str.len().all(), "a figure that does not fit says why"


def test_the_totals_of_the_slips_fit() -> None:
    """Table 14 books pre-fusion's work under the language model: the sum of the two is right."""
    rows = table().set_index("source")
    for pixels in ("336", "672"):
        both = rows.loc[[f"Table 14, {pixels} px, Mini, pre-fusion", f"Table 14, {pixels} px, Mini, LLM"]]
        assert both.printed.sum() == pytest.approx(both.ours.sum(), abs=0.006)


def test_the_command_line() -> None:
    asked = request(["model=tiny", "tokens=1,all", "frames=1,10000", "text=20"], Request)
    rows = estimates(asked)
    assert list(rows["in the LLM"]) == ["1", "36", "10,000", "360,000"]
    assert list(rows["of LLaVA"][rows.tokens == "all"]) == ["100.0%", "100.0%"]
    assert "The longest prompt has 360,020 tokens" in notes(asked, rows)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=nothing"], "no geometry 'nothing': use tiny, smol"),
        (["model=tiny", "tokens=3"], "tokens: 3 is no square; near it are 1 and 4"),
        (["model=tiny", "tokens=-1"], "tokens: '-1' is no whole number above 0"),
        (["model=tiny", "frames=many"], "frames: 'many' is no whole number above 0"),
        (["tok=1"], "no option 'tok': use model, tokens"),
        (["model=tiny", "compressor=best"], "compressor must be 'none' or one of"),
    ],
)
def test_bad_words_are_one_clear_error(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimates(request(words, Request))


def test_one_line_and_status_1() -> None:
    done = subprocess.run([sys.executable, "-m", "experiments.cost", "tok=1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: no option 'tok'")
