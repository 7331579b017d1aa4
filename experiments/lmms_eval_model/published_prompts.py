"""Prompts and images of tasks as in LLaVA's scripts, which LLaVA-Mini's paper used, where lmms-eval's differ."""

from __future__ import annotations

from typing import Any

from PIL import Image

_LETTERS = "ABCDE"
_DIRECTLY = "Answer with the option's letter from the given choices directly."


def mmbench_prompt(document: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return MMBench's question with its options (LLaVA, llava/eval/model_vqa_mmbench.py).

    lmms-eval writes "There are several options:" between them.

    Example:
        >>> mmbench_prompt({"hint": "nan", "question": "What is it?", "A": "a cat", "B": "a dog", "C": "nan"})
        "What is it?\\nA. a cat\\nB. a dog\\nAnswer with the option's letter from the given choices directly."
    """
    hint = [document["hint"]] if _is_text(document["hint"]) else []
    options = [f"{letter}. {document[letter]}" for letter in _LETTERS if _is_text(document.get(letter))]
    return "\n".join([*hint, document["question"], *options, _DIRECTLY])


def seedbench_image(document: dict[str, Any]) -> list[Image.Image]:
    """Return SEED-Bench's image, or the middle frame of its video, as LLaVA's evaluation extracts it.

    lmms-eval gives all frames, each as an image.
    """
    images = document["image"]
    return [images[len(images) // 2].convert("RGB")]


def _is_text(value: Any) -> bool:
    """Return whether a cell of MMBench's table is filled. Empty cells are None, a float, or the text "nan"."""
    return isinstance(value, str) and value not in ("", "nan")
