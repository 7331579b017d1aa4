"""The registry of visual layouts."""

from __future__ import annotations

from probes.tokens.layout_registry import LAYOUTS, register_layout


def test_register_layout_with_two_model_types_adds_both() -> None:
    before = dict(LAYOUTS)
    try:
        layout = register_layout("a", "b")(lambda *arguments: None)
        assert LAYOUTS["a"] is LAYOUTS["b"] is layout
    finally:
        LAYOUTS.clear()
        LAYOUTS.update(before)
