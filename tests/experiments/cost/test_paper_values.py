"""Test the recomputed figures of the paper, and the command line of cost estimates."""

from __future__ import annotations

import sys

import pytest

from experiments.arguments import parse_arguments
from experiments.cost.__main__ import CostRequest, cost_notes, cost_table, main
from experiments.cost.paper_values import printed_flops_table

CONTRADICTED_FIGURES = {
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


def test_printed_flops_table_fits_all_figures_except_known_errors() -> None:
    rows = printed_flops_table()
    assert set(rows.source[~rows.fits]) == CONTRADICTED_FIGURES
    assert rows.note[~rows.fits].str.len().all(), "a figure that does not fit needs a note"


def test_printed_flops_table_sum_of_prefusion_and_llm_fits() -> None:
    """Table 14 counts pre-fusion under the language model, so only the sum of the two is right."""
    rows = printed_flops_table().set_index("source")
    for pixels in ("336", "672"):
        both = rows.loc[[f"Table 14, {pixels} px, Mini, pre-fusion", f"Table 14, {pixels} px, Mini, LLM"]]
        assert both.printed.sum() == pytest.approx(both.ours.sum(), abs=0.006)


def test_cost_table_has_row_for_each_model_and_frame_count() -> None:
    request = parse_arguments(["model=tiny", "tokens=1,all", "frames=1,10000", "text=20"], CostRequest, None)
    rows = cost_table(request)
    assert list(rows["in the LLM"]) == ["1", "36", "10,000", "360,000"]
    assert list(rows["of LLaVA"][rows.tokens == "all"]) == ["100.0%", "100.0%"]
    assert "The longest prompt has 360,020 tokens" in cost_notes(request, rows)[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nothing"], r"model: .*'nothing'.*tiny, smol"),
        (["model=tiny", "tokens=3"], r"tokens: 3 .*1 and 4"),
        (["model=tiny", "tokens=-1"], r"tokens: '-1'"),
        (["model=tiny", "frames=many"], r"frames: 'many'"),
        (["tok=1"], r"option 'tok'.*model, tokens"),
        (["model=tiny", "compressor=best"], r"compressor .*'best'"),
    ],
)
def test_cost_table_invalid_option_raises(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost_table(parse_arguments(arguments, CostRequest, None))


def test_main_invalid_option_exits_with_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cost", "tok=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    # Python prints a text and exits with status 1.
    assert isinstance(ended.value.code, str)
    assert ended.value.code.startswith("error: ")
    assert "option 'tok'" in ended.value.code
    assert "\n" not in ended.value.code
