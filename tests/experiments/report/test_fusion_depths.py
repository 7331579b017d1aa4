"""Tests of fusion depths as texts, and of the order of probed records."""

from __future__ import annotations

import copy
from typing import Any

from experiments.records.files import Records
from experiments.report.fusion_depths import depth_text, probed_records


def test_depth_text_depth_gives_interval_and_reading_layers(probed: dict[str, Any]) -> None:
    assert depth_text(probed, "removal") == "2 of 6 layers (95% CI 2 to 3, n = 120)"
    assert "read at layers 1, 2" in depth_text(probed, "knockout")
    probed["fusion"] = None
    assert depth_text(probed, "removal") == "not measured"


def test_depth_text_of_an_image_that_lowers_accuracy_says_so(probed: dict[str, Any]) -> None:
    onward = probed["removal"]["onward"]
    onward[0]["correct"], onward[-1]["correct"] = onward[-1]["correct"], onward[0]["correct"]
    assert "makes answers worse" in depth_text(probed, "removal")
    assert "makes answers worse" not in depth_text(probed, "knockout")


def test_depth_text_without_depth_gives_the_reason(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    assert depth_text(probed, "removal") == "none: it is not shown that the answers depend on the image"


def test_depth_text_prefusion_model_that_uses_the_image_says_so(probed: dict[str, Any]) -> None:
    probed["fusion"]["removal"] |= {"depth": None, "low": None, "high": None}
    probed["model"]["prefusion_layers"] = 2
    assert "the image reaches the text before them" in depth_text(probed, "removal")
    probed["accuracy"]["blank"] = probed["accuracy"]["image"]
    assert depth_text(probed, "removal") == "none: it is not shown that the answers depend on the image"


def test_probed_records_puts_plain_llava_first(records: list[dict[str, Any]]) -> None:
    mini = copy.deepcopy(records[-1])
    mini["model"]["prefusion_layers"], mini["name"] = 2, "a"
    found = probed_records(Records((mini, *records[:2], records[-1]), (), (), ()))
    assert [record["name"] for record in found] == ["tiny | LLaVA", "a"]
