"""Command line chat with a LLaVA-Mini: `python -m llava_mini.chat MODEL --image a.jpg --query "What is it?"`.

Without --query the program reads one question a line from the standard input and answers each in turn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, logging

import llava_mini  # noqa: F401 (registers the Auto classes)

from .chat_messages import check_text
from .checkpoint_files import MODEL_FILES, PROCESSOR_FILES, name_damaged_file
from .encoded_images import Pictures
from .images import to_rgb
from .video import Video

ENCODED_IMAGES_BYTES = 2**31  # memory limit of the encoded images that are reused from turn to turn


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_mini.chat", description="Ask a LLaVA-Mini questions about images and videos."
    )
    parser.add_argument("model", help="a folder or a name on the model hub")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video, an animated image or a folder of frames; may be given several times",
    )
    parser.add_argument("--query", help="answer this question and exit; without it, chat until end of input (Ctrl-D)")
    parser.add_argument("--fps", type=float, help="frames a second sampled from a video (default: 1)")
    parser.add_argument("--num-frames", type=int, help="frames sampled from a video, instead of --fps")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32 (default: as saved)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def generate_answer(
    model: Any, processor: Any, chat: list[dict[str, Any]], options: argparse.Namespace, pictures: Pictures | None
) -> tuple[str, Pictures | None]:
    """Generate the model's next turn and write it to the standard output while it is generated.

    Args:
        model: A LLaVA-Mini in evaluation mode.
        processor: Its processor.
        chat: Messages up to and including the new question.
        options: Parsed command line; see [`parse_arguments`].
        pictures: Encoded images and videos of the chat, as the previous turn returned them; None in the first turn.

    Returns:
        The answer's text, and the encoded images and videos for the next turn.
    """
    inputs = processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        stream=True,  # decode video frames one at a time while the model encodes them
    ).to(model.device)
    # A single query has no later turn. A compressor that reads the question must encode the images with every question.
    # A plain LLaVA encodes them in every turn too.
    is_reused = options.query is None and hasattr(model, "encode_pictures") and "text" not in model.model.needs
    if is_reused and "pixel_values" in inputs:
        pixel_values = inputs.pop("pixel_values")
        if pictures is None:
            with torch.no_grad():
                pictures = model.encode_pictures(pixel_values, inputs["visual_layout"], max_bytes=ENCODED_IMAGES_BYTES)
        inputs["pictures"] = pictures
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output_ids = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer)
    return processor.decode(output_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), pictures


def check_options(options: argparse.Namespace) -> None:
    """Check the parsed command line before anything is loaded.

    Raises:
        ValueError: If an option is out of range, has no effect or contradicts another.
    """
    if options.fps is not None and options.num_frames is not None:
        raise ValueError(
            f"--fps {options.fps:g} and --num-frames {options.num_frames} both set how many frames a video gives: "
            "give one of them"
        )
    for name, value in (("--fps", options.fps), ("--num-frames", options.num_frames)):
        if value is not None and not options.video:
            raise ValueError(f"{name} {value:g} has no effect without --video")
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise ValueError(f"--fps must be a positive number; got {options.fps:g}")
    for name, value in (("--num-frames", options.num_frames), ("--max-new-tokens", options.max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if options.query is not None:
        check_text(options.query, "--query")


def run_chat(options: argparse.Namespace) -> None:
    """Load the model, then answer the query or every question of the standard input.

    Raises:
        ValueError: If an option is wrong, or an image, a video or the model cannot be read.
        OSError: If a file or the model does not exist.
        ImportError: If a video is given and PyAV is not installed.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_options(options)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if not (dtype == "auto" or isinstance(dtype, torch.dtype)):
        raise ValueError(f"--dtype: no dtype '{options.dtype}'; use auto, bfloat16, float16 or float32")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise ValueError(f"--device: '{options.device}' is not available here; use cpu") from None
    # Read the images and videos once before the model, which takes minutes to load.
    for path in options.image:
        to_rgb(path)
    videos = [Video(path, fps=options.fps, frames=options.num_frames) for path in options.video]
    # The Auto classes read these files before our classes can check them.
    with name_damaged_file(options.model, MODEL_FILES + PROCESSOR_FILES):
        processor = AutoProcessor.from_pretrained(options.model)
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype)
    model = model.to(options.device).eval()
    visual_parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in options.image]
    visual_parts += [{"type": "video", "video": video} for video in videos]
    chat: list[dict[str, Any]] = []
    pictures = None
    for query in [options.query] if options.query is not None else _read_queries():
        content = [*(visual_parts if not chat else []), {"type": "text", "text": query}]
        chat.append({"role": "user", "content": content})
        answer, pictures = generate_answer(model, processor, chat, options, pictures)
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def _read_queries() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error prints one line to the standard error."""
    options = parse_arguments(argv)
    try:
        run_chat(options)
    except (ValueError, OSError, ImportError, RuntimeError, TemplateError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
