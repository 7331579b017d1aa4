"""Image and video files of data sets: orientation, folders of frames, animations, and unusual images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.encoding import Collator, SampleEncoder
from experiments.data.llava_json import load_llava_json
from experiments.data.media_files import MediaFile
from experiments.data.samples import Split
from experiments.models.feature_cache import VisionFeatureCache
from experiments.models.from_parts import multimodal_chat_template
from llava_mini import LlavaMiniProcessor

ORIENTATION = 0x0112
TURNS = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
NOISE = np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8)
SQUARE = np.ascontiguousarray(NOISE[:48])  # of the processor's size, so that frames are not resized


def load(folder, entry, **options):
    """Return the one sample of a file with an entry."""
    (folder / "data.json").write_text(json.dumps([{"conversations": TURNS} | entry]))
    return load_llava_json(str(folder / "data.json"), str(folder), "test", **options).samples[0]


def mini_processor(processor, **fields):
    template = multimodal_chat_template("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    return LlavaMiniProcessor(
        processor.image_processor, processor.tokenizer, chat_template=template, num_visual_tokens=4, **fields
    )


def expected_pixels(processor, image):
    return processor.image_processor([image.convert("RGB")], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_encoded_image_has_the_orientation_that_the_processor_asks_for(tmp_path, processor, orientation, ignore):
    """The released code keeps the stored pixels; transformers turns them by the EXIF entry."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(NOISE).save(tmp_path / "a.png", exif=exif)
    stored = Image.fromarray(NOISE)
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    upright = stored if turn is None else stored.transpose(turn)
    mini = mini_processor(processor, ignore_orientation=ignore)
    pixels = Collator(mini)([SampleEncoder(mini)(load(tmp_path, {"image": "a.png"}))])["pixel_values"]
    assert torch.equal(pixels, expected_pixels(processor, stored if ignore else upright))
    plain = Collator(processor)([SampleEncoder(processor)(load(tmp_path, {"image": "a.png"}))])["pixel_values"]
    assert torch.equal(plain, expected_pixels(processor, upright))


@pytest.mark.parametrize("ignore", [False, True])
def test_cached_features_have_the_orientation_that_the_processor_asks_for(tmp_path, processor, llava, ignore):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    Image.fromarray(SQUARE).save(tmp_path / "a.png", exif=exif)
    mini = mini_processor(processor, ignore_orientation=ignore)
    sample = load(tmp_path, {"image": "a.png"})
    features = VisionFeatureCache(tmp_path / "cache", llava, mini, Split("test", [sample], "0" * 16, 1))
    (cached,) = features.encode_sample(SampleEncoder(mini), sample)["pixel_values"]
    shown = Image.fromarray(SQUARE if ignore else np.ascontiguousarray(SQUARE[::-1, ::-1]))
    with torch.no_grad():
        states = llava.model.vision_tower(expected_pixels(processor, shown), output_hidden_states=True).hidden_states
    assert torch.equal(cached[:, 0], states[llava.config.vision_feature_layer].to(torch.bfloat16))


@pytest.mark.parametrize("ignore", [False, True])
def test_encoded_frames_of_a_folder_have_the_orientation_that_the_processor_asks_for(tmp_path, processor, ignore):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    (tmp_path / "clip").mkdir()
    Image.fromarray(SQUARE).save(tmp_path / "clip" / "1.png", exif=exif)
    mini = mini_processor(processor, ignore_orientation=ignore)
    pixels = Collator(mini)([SampleEncoder(mini)(load(tmp_path, {"video": "clip"}))])["pixel_values"]
    stored = Image.fromarray(SQUARE)
    expected = expected_pixels(processor, stored if ignore else stored.transpose(Image.Transpose.ROTATE_180))
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("ignore", [False, True])
def test_encoded_video_file_is_turned_by_its_display_matrix_in_either_case(tmp_path, processor, ignore):
    """The released code reads videos with decord, which turns them too."""
    import av

    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "rgb24"
        stream.set_display_rotation(180)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(SQUARE, format="rgb24")))
        container.mux(stream.encode(None))
    (shown,) = load(tmp_path, {"video": "clip.mp4"}).visual_inputs[0]
    assert np.array_equal(np.asarray(shown), SQUARE[::-1, ::-1])
    mini = mini_processor(processor, ignore_orientation=ignore)
    pixels = Collator(mini)([SampleEncoder(mini)(load(tmp_path, {"video": "clip.mp4"}))])["pixel_values"]
    assert torch.equal(pixels, expected_pixels(processor, Image.fromarray(SQUARE[::-1, ::-1].copy())))


@pytest.mark.parametrize("names", [[f"{i}.png" for i in range(12)], [f"frame_{i:03}.jpg" for i in range(12)]])
def test_folder_of_frames_is_sampled_in_natural_order_like_a_video(tmp_path, names):
    """Midpoints of three equal parts of 12 frames: bounds 0, 4, 7 and 11."""
    (tmp_path / "clip").mkdir()
    for level, name in enumerate(names):
        Image.new("RGB", (8, 8), (20 * level,) * 3).save(tmp_path / "clip" / name)
    sample = load(tmp_path, {"video": "clip"}, frames=3)
    assert sample.placeholders == ["<video>"]
    assert [round(np.asarray(frame).mean() / 20) for frame in sample.visual_inputs[0]] == [2, 5, 9]


def test_load_llava_json_fingerprint_depends_on_the_frames_of_a_folder(tmp_path):
    (tmp_path / "clip").mkdir()
    entries = json.dumps([{"video": "clip", "conversations": TURNS}])
    (tmp_path / "data.json").write_text(entries)
    prints = set()
    for name, side in (("1.png", 4), ("2.png", 4), ("2.png", 40)):
        Image.fromarray(NOISE[:side, :4].copy()).save(tmp_path / "clip" / name)
        prints.add(load_llava_json(str(tmp_path / "data.json"), str(tmp_path), "test").fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_is_a_video_and_as_an_image_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (60 * i,) * 3) for i in range(4)]
    frames[0].save(tmp_path / f"clip.{suffix}", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    (video,) = load(tmp_path, {"video": f"clip.{suffix}"}, frames=2).visual_inputs
    assert [frame.getpixel((0, 0))[0] for frame in video] == [60, 120]  # parts bounded by 0, 2 and 3
    assert load(tmp_path, {"image": f"clip.{suffix}"}).image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["P", "CMYK", "I;16", "L", "LA", "RGBA", "1"])
def test_image_of_every_mode_is_loaded_in_rgb(tmp_path, mode):
    suffix = "tiff" if mode == "CMYK" else "PNG"  # an upper-case suffix too
    image = Image.new("RGB", (8, 8), "white").convert(mode) if mode != "I;16" else Image.new("I;16", (8, 8), 65535)
    image.save(tmp_path / f"a.{suffix}")
    loaded = load(tmp_path, {"image": f"a.{suffix}"}).image
    assert (loaded.mode, loaded.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    assert MediaFile(tmp_path / f"a.{suffix}", "image", "entry 0").fault() is None
