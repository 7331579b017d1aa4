"""The computation of the released code, which the ratios are relative to, gives the same logits with more FLOPs."""

from __future__ import annotations

import pytest
import torch

from experiments.benchmarks import released_ratio
from experiments.benchmarks.released_ratio import build_model, make_inputs, released_logits
from experiments.evaluation.flops import count_flops


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_released_logits_equal_the_models_and_take_all_layers(frames: int) -> None:
    model = build_model(width=64, vision_width=128, side=4)
    inputs = make_inputs(model, frames, text=6)
    torch.testing.assert_close(released_logits(model, **inputs), model(**inputs).logits, atol=1e-5, rtol=0)
    released, ours = (
        count_flops(run)[0] for run in (lambda: released_logits(model, **inputs), lambda: model(**inputs))
    )
    # Linear maps that are left out: the last vision layer, and patches' queries, outputs and MLPs in the last pre-fusion.
    tower_layer = 2 * 17 * 12 * 128**2
    prefusion_rows = 2 * 16 * (2 * 64**2 + 3 * 64 * (64 * 43 // 16))
    assert released - ours > frames * (tower_layer + prefusion_rows)


def test_main_prints_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(released_ratio, "build_model", lambda: build_model(width=64, vision_width=64, side=2))
    threads = torch.get_num_threads()
    released_ratio.main(["--frames", "1", "2", "--rounds", "1"])
    torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if " question" in line]
    assert [line.split("|")[1].strip() for line in lines] == [
        f"{frames}, {name}" for frames in ("1 frame", "2 frames") for name in ("question", "second question")
    ]
    assert all(float(line.split("|")[5]) < 1e-5 for line in lines)


@pytest.mark.parametrize("option", ["--frames", "--rounds"])
def test_main_without_frames_or_rounds_ends_with_the_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        released_ratio.main([option, "0"])
    assert f"{option}: must be at least 1" in capsys.readouterr().err
