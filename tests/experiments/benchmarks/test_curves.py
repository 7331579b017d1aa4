"""The benchmark of curves: its runs are whole curves, and its ratios are relative to a pass for each point."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from experiments.benchmarks import curves
from experiments.benchmarks.curves import curve_ratios, curve_runs, random_llava
from probes import BlockAttention, RemoveTokens, TokenMap, intervene

LAYERS = 2
small_llava = partial(random_llava, 2, layers=LAYERS, width=64, side=2, text=8)


@torch.no_grad()
def test_curve_runs_equal_interventions_on_whole_passes() -> None:
    model, inputs = small_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    queries = ~tokens.mask("vision")
    spans = {
        "removal": [range(k, LAYERS) for k in range(LAYERS + 1)],
        "onset": [range(k) for k in range(LAYERS + 1)],
        "knock-out": [range(0), *(range(k, k + 1) for k in range(LAYERS))],
    }
    runs = curve_runs(model, inputs)
    assert set(runs) == {"pass", *spans}
    for name, points in spans.items():
        expected = []
        for layers in points:
            block = BlockAttention("vision", queries, layers) if name == "knock-out" else RemoveTokens("vision", layers)
            with intervene(model, tokens, block):
                expected.append(model(**inputs).logits[:, -1].log_softmax(dim=-1)[:, curves.ANSWER])
        assert runs[name]() == pytest.approx(torch.stack(expected).numpy(), abs=1e-5)


def test_curve_ratios_divide_by_a_pass_for_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MODELS", {"small": small_llava})
    monkeypatch.setattr(curves, "measure_curves", lambda *call: {"removal": 1.5, "onset": 3.0})
    assert curve_ratios(1, ["small"]) == {"small, removal": 0.5, "small, onset": 1.0}


def test_main_prints_a_row_for_each_curve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(curves, "MODELS", {"small": small_llava})
    threads = torch.get_num_threads()
    curves.main(["--rounds", "1"])
    torch.set_num_threads(threads)
    rows = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines() if "small" in line]
    assert [row[0].strip() for row in rows] == ["small, removal", "small, onset", "small, knock-out"]
    assert all(row[1].strip() == str(LAYERS + 1) for row in rows)
    assert all(float(row[2]) > 0 for row in rows)


def test_main_without_rounds_ends_with_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curves.main(["--rounds", "0"])
    assert "--rounds: must be at least 1" in capsys.readouterr().err
