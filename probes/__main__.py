"""The command line: ask a model a question about images, and write a page of what each word attends to."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FRAMES = 8  # of a video, evenly spaced
_TOP_LAYERS = 3
_BAR = 20  # characters of attention 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status. Wrong input ends in one line."""
    options = _parser().parse_args(arguments)
    try:
        _check_files(options)
        _run(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m probes",
        description="Ask a vision-language model about images, and see what each word attends to.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the hub")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="image; repeat for several")
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help=f"video, of which {FRAMES} frames are read"
    )
    parser.add_argument("--question", required=True, help="the question")
    parser.add_argument("--compare", metavar="MODEL2", help="second model, shown beside the first")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: that of the checkpoint)")
    parser.add_argument("--out", default="attention.html", metavar="FILE", help="the page (default: attention.html)")
    return parser


def _check_files(options: argparse.Namespace) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        ValueError: If an input is missing, or the page cannot be written.
    """
    if not options.question.strip():
        raise ValueError("--question: is empty; write a question about the image")
    try:
        options.question.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--question: {options.question!r} is not text in UTF-8; check the terminal's encoding"
        ) from None
    if not options.image and not options.video:
        raise ValueError("--image: name at least one image or --video")
    for option in ("image", "video"):
        for path in getattr(options, option):
            if not Path(path).is_file():
                raise ValueError(f"--{option}: there is no file {path!r}")
    folder = Path(options.out).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out: {str(folder)!r} is not a folder that can be written")
    if Path(options.out).is_dir():
        raise ValueError(f"--out: {options.out!r} is a folder; name a file in it")


def _run(options: argparse.Namespace) -> None:
    import huggingface_hub
    import transformers

    from probes.ask import ask
    from probes.loading import check_model_config, load_model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # without a network it warns of each retry
    images = [_open_image(path) for path in options.image]
    videos = [_read_frames(path) for path in options.video]
    names = [options.model, *([options.compare] if options.compare else [])]
    for name in names:  # before the first model runs, which can take minutes
        check_model_config(name)
    view = None
    for name in names:
        model, processor = load_model(name, options.device, options.dtype)
        answer = ask(model, processor, options.question, images, videos)
        _report(name, answer)
        page = answer.view(name=Path(name).name)
        view = page if view is None else view.compare(page)
        del model
    assert view is not None
    view.title = options.question
    print(f"page: {view.save(options.out)}")


def _report(name: str, answer: Any) -> None:
    """Print the answer, the attention on the image by layer, and the removal curve."""
    mass, layers = answer.image_mass().tolist(), answer.attention.layers
    print(f"{name}\nanswer: {answer.text}\n")
    print(
        f"{'layer':>5}  {'attention on the image':<{_BAR + 5}}"
        + ("  answer without it from here" if answer.removal is not None else "")
    )
    for layer, share in zip(layers, mass, strict=True):
        bar = "█" * round(share * _BAR)
        line = f"{layer:>5}  {share:.2f} {bar:<{_BAR}}"
        if answer.removal is not None:
            line += f"  {_probability(answer.removal[layer])}"
        print(line.rstrip())
    if answer.removal is not None:
        print(f"{'none':>5}  {'':<{_BAR + 5}}  {_probability(answer.removal[-1])}")
    order = sorted(range(len(mass)), key=lambda index: -mass[index])[:_TOP_LAYERS]
    print("\nmost attention on the image: " + ", ".join(f"layer {layers[i]} ({mass[i]:.2f})" for i in order))
    for note in answer.notes:
        print(note)


def _probability(logarithm: Any) -> str:
    """Return the probability of an answer: with three decimals, or as a power of ten where long answers make it small."""
    probability = float(logarithm.exp())
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.0e}"


def _open_image(path: str) -> Any:
    from PIL import Image, ImageOps

    from probes.ask import require_8_bits
    from probes.view.run_data import rgb_on_white

    try:
        with Image.open(path) as image:
            require_8_bits(image)
            return rgb_on_white(ImageOps.exif_transpose(image))
    except ValueError as error:
        raise ValueError(f"--image: {path!r}: {error}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image: {path!r} cannot be read as an image ({type(error).__name__})") from None


def _read_frames(path: str) -> list[Any]:
    """Return evenly spaced frames of a video."""
    try:
        import av
    except ImportError:
        raise ValueError("--video: reading videos needs PyAV; pip install av") from None
    try:
        with av.open(path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"--video: {path!r} cannot be read as a video ({type(error).__name__})") from None
    if not frames:
        raise ValueError(f"--video: {path!r} has no frames")
    chosen = [round(index * (len(frames) - 1) / max(FRAMES - 1, 1)) for index in range(FRAMES)]
    return [frames[index] for index in dict.fromkeys(chosen)]


if __name__ == "__main__":
    sys.exit(main())
