"""Talk to a LLaVA-Mini: `python -m llava_mini.chat MODEL --image a.jpg --query "What is it?"`; turn by turn without a query."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, logging

import llava_mini  # noqa: F401 (registers the Auto classes)

from .encoded_images import Pictures

ROOM = 2**31  # bytes for what is kept of the pictures from turn to turn


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini.chat", description="Talk to a LLaVA-Mini about pictures."
    )
    parser.add_argument("model", help="a folder or a name on the model hub")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--query", help="ask this and end; without it, a chat until the end of input (Ctrl-D)")
    parser.add_argument("--fps", type=float, help="frames a second taken from a video (1)")
    parser.add_argument("--num-frames", type=int, help="frames taken from a video, in place of --fps")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (512)")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; by default as saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def answer(
    model: Any, processor: Any, chat: list[dict[str, Any]], options: argparse.Namespace, pictures: Pictures | None
) -> tuple[str, Pictures | None]:
    """What the model says next, written to the standard output while it is generated; and the chat's pictures, encoded
    once for all turns."""
    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        fps=options.fps,
        num_frames=options.num_frames,
        stream=True,  # a video's frames are decoded while the model takes them
    ).to(model.device)
    # a lone query needs nothing kept, and of a compressor that reads the question nothing can be
    keeps = options.query is None and "text" not in model.model.needs
    if keeps and "pixel_values" in inputs:
        pixel_values = inputs.pop("pixel_values")
        if pictures is None:
            with torch.no_grad():
                pictures = model.encode_pictures(pixel_values, inputs["visual_layout"], max_bytes=ROOM)
        inputs["pictures"] = pictures
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    new = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer)
    return processor.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), pictures


def talk(options: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if not (dtype == "auto" or isinstance(dtype, torch.dtype)):
        raise ValueError(f"--dtype: no dtype '{options.dtype}'; use auto, bfloat16, float16 or float32")
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    pictures = [{"type": kind, kind: path} for kind in ("image", "video") for path in getattr(options, kind)]
    chat: list[dict[str, Any]] = []
    encoded = None
    for query in [options.query] if options.query is not None else _lines():
        content = [*(pictures if not chat else []), {"type": "text", "text": query}]
        chat.append({"role": "user", "content": content})
        said, encoded = answer(model, processor, chat, options, encoded)
        chat.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


def _lines() -> Any:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        talk(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
