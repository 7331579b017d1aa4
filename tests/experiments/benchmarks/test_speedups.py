"""The measuring of gains: its plain way of running is the whole sequence through the layers, and the ways agree."""

from __future__ import annotations

import sys

import pytest
import torch

from experiments.benchmarks import speedups
from experiments.benchmarks.speedups import Request, Sizes, WholePrefusion, long_videos, ways_of_running
from experiments.evaluation.flops import counted

SMALL = Sizes(width=64, layers=1, prefusion=2, patches=16, text=5, frames=3)


@torch.no_grad()
def test_the_baseline_runs_everything_through_every_layer() -> None:
    """With the decoder's own weights it is the decoder ahead of its norm, whatever `unread` says."""
    inner = SMALL.model().model
    inner.prefusion.layers = inner.prefusion.layers[:1]
    inner.prefusion.layers[0].load_state_dict(inner.language_model.layers[0].state_dict())
    visual, text = torch.randn(2, 7, 64), torch.randn(2, 4, 64)
    plain = WholePrefusion(inner.prefusion)
    fused = torch.cat(plain(visual, text, inner.language_model.rotary_emb), dim=1)
    expected = inner.language_model(inputs_embeds=torch.cat([visual, text], dim=1)).last_hidden_state
    torch.testing.assert_close(inner.language_model.norm(fused), expected)
    assert torch.equal(plain(visual, text, inner.language_model.rotary_emb, unread=5)[0], fused[:, 5:7])


@torch.no_grad()
def test_every_way_gives_the_same() -> None:
    ways = ways_of_running(SMALL)
    ways.pop("language model")
    expected = ways["frame by frame, whole"]()
    for name, way in ways.items():
        torch.testing.assert_close(way(), expected, atol=1e-5, rtol=0, msg=name)
    flops = {name: counted(way)[0] for name, way in ways.items()}
    assert flops["batched, whole"] == flops["frame by frame, whole"] > flops["batched, last layer's rows"]
    assert flops["second question"] < 0.5 * flops["first question, kept for more"]


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["width=64", "layers=1", "prefusion=2", "patches=16", "text=5", "frames=3", "repeats=1"]
    monkeypatch.setattr(sys, "argv", ["gains", *words])
    monkeypatch.setattr(speedups, "memories", lambda runs: [speedups.Memory(2**21, 2**22) for _ in runs])
    speedups.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 8 + 2 + 2
    assert "| streamed | 256 | 2 |" in lines
    monkeypatch.setattr(sys, "argv", ["gains", "long=10,1000"])
    speedups.main()
    assert "| 1,000 | 2.0 | 4.0 | 4.0 | 143.6 |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_long_video_is_flat_beyond_its_tokens() -> None:
    (few,), (many,) = (
        [[float(cell.replace(",", "")) for cell in row[1:]] for row in long_videos([Sizes(64, 1, 1, 64, 5, length)])]
        for length in (50, 1000)
    )
    assert many[0] - few[0] < 0.2 * many[3]  # pixels, were they held
    assert many[3] > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"patches": "60"}, "60 is no square; near it are 49 and 64"),
        ({"width": "100"}, "100 is no multiple of 64"),
        ({"prefusion": "0"}, "nothing to gain"),
        ({"frames": "x"}, "frames: 'x' is no whole number above 0"),
    ],
)
def test_wrong_sizes(words: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes.read(Request(**words))
