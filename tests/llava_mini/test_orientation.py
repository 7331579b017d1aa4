"""EXIF orientation of images: turned upright as transformers does, or kept as stored as the released code does."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, LlavaProcessor

from llava_mini import LlavaMiniConfig, LlavaMiniProcessor
from llava_mini.images import to_rgb
from llava_mini.video import Video

ORIENTATION = 0x0112
# For each orientation, the stored array from the upright one, after the EXIF standard: where the first row and the
# first column of the stored image are shown.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


def upright_array(mode: str = "RGB") -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 4), dtype=np.uint8)
    noise[..., 3] |= 1 << 7
    return noise[..., :3] if mode == "RGB" else noise


def save_stored(path, orientation: int, mode: str = "RGB", **options) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright_array(mode)))
    Image.fromarray(stored, mode).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("webp", {"lossless": True}), ("tiff", {}), ("mpo", None), ("jpg", None)]
)
def test_to_rgb_turns_every_format_upright(tmp_path, orientation, suffix, options):
    path = tmp_path / f"image.{suffix}"
    save_stored(path, orientation, **(options or {"quality": 100, "subsampling": 0}))
    tolerance = 0 if options is not None else 12  # JPEG is lossy
    turned = to_rgb(path)
    difference = np.abs(np.asarray(turned).astype(int) - upright_array())
    assert difference.max() <= tolerance
    assert np.array_equal(np.asarray(to_rgb(turned)), np.asarray(turned))
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(turned))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_to_rgb_of_every_mode_turns_it_upright(mode, tmp_path):
    image = Image.fromarray(upright_array()[..., 0].astype(np.uint16)) if mode == "I;16" else None
    image = image or Image.fromarray(upright_array("RGBA"), "RGBA").convert(mode if mode != "F" else "L").convert(mode)
    expected = to_rgb(image).transpose(Image.Transpose.ROTATE_270)
    image.getexif()[ORIENTATION] = 6
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(expected))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_to_rgb_with_an_undefined_orientation_keeps_the_pixels(orientation):
    image = Image.fromarray(upright_array())
    image.getexif()[ORIENTATION] = orientation
    assert np.array_equal(np.asarray(to_rgb(image)), upright_array())


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_to_rgb_with_damaged_exif_keeps_the_pixels(exif, tmp_path):
    image = Image.fromarray(upright_array())
    image.save(tmp_path / "damaged.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert np.array_equal(np.asarray(to_rgb(tmp_path / "damaged.jpg")), np.asarray(Image.open(tmp_path / "plain.jpg")))


def test_to_rgb_reads_the_orientation_of_xmp(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    Image.fromarray(np.ascontiguousarray(STORED[8](upright_array()))).save(tmp_path / "a.webp", lossless=True, xmp=xmp)
    assert np.array_equal(np.asarray(to_rgb(tmp_path / "a.webp")), upright_array())


@pytest.mark.parametrize("orientation", STORED)
def test_to_rgb_with_ignore_orientation_equals_the_released_code(tmp_path, orientation):
    save_stored(tmp_path / "a.jpg", orientation)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.asarray(opened.convert("RGB"))
    kept = to_rgb(tmp_path / "a.jpg", ignore_orientation=True)
    assert np.array_equal(np.asarray(kept), expected)
    assert np.array_equal(np.asarray(to_rgb(kept)), expected)


@pytest.fixture
def processor(llava_processor) -> LlavaMiniProcessor:
    return LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig())


@pytest.mark.parametrize("orientation", STORED)
def test_processor_gives_the_pixels_of_transformers(tmp_path, llava_processor, processor, orientation):
    path = tmp_path / "photo.jpg"
    save_stored(path, orientation, quality=90)
    assert isinstance(llava_processor, LlavaProcessor)
    assert not isinstance(llava_processor, LlavaMiniProcessor)
    text = "<image> what"
    expected = llava_processor(images=[str(path)], text=[text], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=path, text=text, return_tensors="pt")["pixel_values"], expected)
    with Image.open(path) as opened:
        assert torch.equal(processor(images=opened, text=text, return_tensors="pt")["pixel_values"], expected)
    chat = [{"role": "user", "content": [{"type": "image", "url": str(path)}, {"type": "text", "text": "what"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = llava_processor.apply_chat_template(chat, **options)["pixel_values"]
    assert torch.equal(theirs, expected)
    assert torch.equal(processor.apply_chat_template(chat, **options)["pixel_values"], expected)
    frames = Video([str(path)])
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(next(iter(frames))), np.asarray(ImageOps.exif_transpose(opened)))


def test_processor_with_ignore_orientation_is_saved_with_it(tmp_path, llava_processor, processor):
    save_stored(tmp_path / "photo.jpg", 6)
    LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig(), ignore_orientation=True).save_pretrained(
        tmp_path / "saved"
    )
    LlavaMiniConfig().save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.ignore_orientation
    with Image.open(tmp_path / "photo.jpg") as opened:
        stored = opened.convert("RGB")
    expected = llava_processor.image_processor([stored], return_tensors="pt")["pixel_values"]
    squashed = llava_processor.image_processor([stored.resize((24, 24), 0)], return_tensors="pt")["pixel_values"]
    pixels = loaded(
        images=tmp_path / "photo.jpg", videos=Video([tmp_path / "photo.jpg"]), text="<image> <video>", stream=True
    )["pixel_values"]
    assert torch.equal(torch.cat(list(pixels)), torch.cat([expected, squashed]))
    assert not torch.equal(processor(images=tmp_path / "photo.jpg")["pixel_values"], expected)


def test_apply_chat_template_of_base64_with_ignore_orientation_raises(tmp_path, llava_processor):
    save_stored(tmp_path / "photo.jpg", 6)
    address = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "photo.jpg").read_bytes()).decode()
    chat = [{"role": "user", "content": [{"type": "image", "url": address}]}]
    processor = LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig(), ignore_orientation=True)
    with pytest.raises(ValueError, match=r"ignore_orientation=True.*data:image/jpeg"):
        processor.apply_chat_template(chat, tokenize=True)
    processor.ignore_orientation = False
    turned = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["pixel_values"]
    assert torch.equal(turned, processor(images=tmp_path / "photo.jpg")["pixel_values"])
