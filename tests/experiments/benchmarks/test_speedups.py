"""Test the speedup benchmark: its baseline runs all tokens through all layers, and all variants agree."""

from __future__ import annotations

import sys

import pytest
import torch

from experiments.benchmarks import speedups
from experiments.benchmarks.speedups import (
    BenchmarkSizes,
    SpeedupRequest,
    WholePrefusion,
    build_variants,
    long_video_rows,
)
from experiments.evaluation.flops import count_flops

SMALL = BenchmarkSizes(width=64, layers=1, prefusion=2, patches=16, text=5, frames=3)


@torch.no_grad()
def test_whole_prefusion_equals_decoder_layer() -> None:
    """With the decoder's weights it equals the decoder before its norm, for any `unread`."""
    inner = SMALL.model().model
    inner.prefusion.layers = inner.prefusion.layers[:1]
    inner.prefusion.layers[0].load_state_dict(inner.language_model.layers[0].state_dict())
    visual, text = torch.randn(2, 7, 64), torch.randn(2, 4, 64)
    whole_prefusion = WholePrefusion(inner.prefusion)
    fused = torch.cat(whole_prefusion(visual, text, inner.language_model.rotary_emb), dim=1)
    expected = inner.language_model(inputs_embeds=torch.cat([visual, text], dim=1)).last_hidden_state
    torch.testing.assert_close(inner.language_model.norm(fused), expected)
    assert torch.equal(whole_prefusion(visual, text, inner.language_model.rotary_emb, unread=5)[0], fused[:, 5:7])


@torch.no_grad()
def test_build_variants_all_give_same_embeddings() -> None:
    variants = build_variants(SMALL)
    variants.pop("language model")
    expected = variants["frame by frame, whole"]()
    for name, variant in variants.items():
        torch.testing.assert_close(variant(), expected, atol=1e-5, rtol=0, msg=name)
    flops = {name: count_flops(variant)[0] for name, variant in variants.items()}
    # transformers 5.17 computes rotary angles by a counted product in each call: batched, one call serves all frames.
    assert flops["batched, whole"] == pytest.approx(flops["frame by frame, whole"], rel=1e-3)
    assert flops["batched, whole"] > flops["batched, last layer's rows"]
    assert flops["second question"] < 0.5 * flops["first question, kept for more"]


def test_main_prints_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["width=64", "layers=1", "prefusion=2", "patches=16", "text=5", "frames=3", "repeats=1"]
    monkeypatch.setattr(sys, "argv", ["speedups", *arguments])
    monkeypatch.setattr(speedups, "measure_memories", lambda runs: [speedups.PeakMemory(2**21, 2**22) for _ in runs])
    speedups.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 8 + 2 + 2
    assert "| streamed | 256 | 2 |" in lines
    monkeypatch.setattr(sys, "argv", ["speedups", "long=10,1000"])
    speedups.main()
    assert "| 1,000 | 2.0 | 4.0 | 4.0 | 143.6 |" in capsys.readouterr().out


@pytest.mark.slow
def test_long_video_rows_memory_grows_little_with_frames() -> None:
    (few,), (many,) = (
        [
            [float(cell.replace(",", "")) for cell in row[1:]]
            for row in long_video_rows([BenchmarkSizes(64, 1, 1, 64, 5, length)])
        ]
        for length in (50, 1000)
    )
    assert many[0] - few[0] < 0.2 * many[3]  # memory of all pixels
    assert many[3] > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": "60"}, r"patches: 60 .*49 and 64"),
        ({"width": "100"}, r"width: 100 .*64"),
        ({"prefusion": "0"}, r"prefusion: 0"),
        ({"frames": "x"}, r"frames: 'x'"),
    ],
)
def test_read_invalid_sizes_raises(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkSizes.read(SpeedupRequest(**options))
