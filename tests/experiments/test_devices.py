"""The device of a cell."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from experiments.devices import warn_if_bfloat16_is_slow

UNITS = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("device", "found", "warns"),
    [
        ("cpu", {}, True),
        ("cpu", {"amx_bf16": True}, False),
        ("cpu", {"avx512_bf16": True}, False),
        ("cpu", {"architecture": "aarch64"}, False),
        ("cuda", {}, False),
    ],
)
def test_bfloat16_on_a_cpu_without_units_for_it_warns_and_names_the_settings(
    device: str,
    found: dict[str, Any],
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: UNITS | found)
    with caplog.at_level(logging.WARNING):
        warn_if_bfloat16_is_slow(torch.device(device))
    assert ("model.dtype=float32 train.bf16=false" in caplog.text) is warns
