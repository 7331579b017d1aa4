"""Items that a thread prepares one ahead: order, bound, errors, and the thread's end."""

import threading

import pytest
import torch

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.read_ahead import read_ahead
from tests.tiny_models import IMAGE_TOKEN, tiny_llava_config


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_read_ahead_prepares_the_next_item_while_one_is_used_and_no_more():
    prepared = [threading.Event() for _ in range(4)]
    threads = set()

    def items():
        for number, event in enumerate(prepared):
            threads.add(threading.current_thread().name)
            event.set()
            yield number

    with read_ahead(items()) as numbers:
        for number in range(3):
            assert next(numbers) == number
            assert prepared[number + 1].wait(timeout=60)
            assert not any(event.is_set() for event in prepared[number + 2 :])
        assert list(numbers) == [3]
    assert len(threads) == 1
    assert threads.isdisjoint({threading.current_thread().name})
    assert reader_threads() == []


def test_read_ahead_raises_an_error_where_its_item_would_come():
    def items():
        yield 1
        raise ValueError("frame 1 is damaged")

    with read_ahead(items()) as numbers:
        assert next(numbers) == 1
        with pytest.raises(ValueError, match="frame 1 is damaged"):
            next(numbers)
    assert reader_threads() == []


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tiny_llava_config(LlavaMiniConfig, compressor_heads=2, prefusion_layers=2, frames_per_chunk=2)
    return LlavaMiniForConditionalGeneration(config).eval()


def arguments(pixels):
    return {
        "input_ids": torch.tensor([[1, *[IMAGE_TOKEN] * 5, 2, 3]]),
        "visual_layout": torch.tensor([[0, 5, 1]]),
        "pixel_values": pixels,
    }


@torch.no_grad()
def test_streamed_chunks_are_read_in_a_thread_with_the_same_logits(model):
    pixels, threads = torch.randn(5, 3, 8, 8), set()

    def stream():
        for frame in pixels.split(1):
            threads.add(threading.current_thread().name)
            yield frame

    assert torch.equal(model(**arguments(stream())).logits, model(**arguments(pixels)).logits)
    assert len(threads) == 1
    assert next(iter(threads)).startswith("read_ahead")
    assert reader_threads() == []


@torch.no_grad()
@pytest.mark.parametrize("call", ["forward", "encode_pictures"])
def test_error_of_a_stream_ends_the_call_and_its_thread(model, call):
    def stream():
        yield from torch.randn(3, 1, 3, 8, 8)
        raise ValueError("frame 3 is damaged")

    inputs = arguments(stream())
    with pytest.raises(ValueError, match="frame 3 is damaged") as raised:
        model(**inputs) if call == "forward" else model.encode_pictures(inputs["pixel_values"], inputs["visual_layout"])
    assert raised.value.__traceback__ is not None  # holds the frames of the call
    assert reader_threads() == []


@torch.no_grad()
def test_error_of_the_model_ends_the_thread_of_the_stream(model):
    def fail(*call):
        raise RuntimeError("out of memory")

    with (
        model.model.prefusion.register_forward_hook(fail),
        pytest.raises(RuntimeError, match="out of memory") as raised,
    ):
        model(**arguments(iter(torch.randn(5, 1, 3, 8, 8))))
    assert raised.value.__traceback__ is not None
    assert reader_threads() == []
