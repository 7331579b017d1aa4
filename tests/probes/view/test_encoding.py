"""Storage of attention in 8 bits a value."""

import base64
import gzip

import numpy as np
import pytest

from probes.view.encoding import decode_rows, encode_floats, encode_indices, encode_rows


@pytest.mark.parametrize("signed", [False, True])
def test_encode_rows_error_is_at_most_half_a_step_of_the_row(signed):
    generator = np.random.default_rng(0)
    values = generator.exponential(size=(2, 3, 4, 50)).astype(np.float32) * generator.exponential(size=(2, 3, 4, 1))
    if signed:
        values *= generator.choice([-1, 1], size=values.shape)
    error = np.abs(decode_rows(encode_rows(values, signed)) - values)
    half_step = np.abs(values).max(-1, keepdims=True) / (254 if signed else 510)
    assert (error <= half_step * 1.0001).all()


def test_encode_rows_undefined_and_empty_rows_are_zero():
    values = np.full((1, 1, 2, 3), np.nan)
    values[0, 0, 1] = 0
    assert (decode_rows(encode_rows(values)) == 0).all()


def test_encode_rows_negative_value_of_unsigned_rows_is_refused():
    with pytest.raises(ValueError, match=r"values: -0\.5"):
        encode_rows(np.array([[[[-0.5, 1.0]]]]))


def test_encode_rows_bytes_are_levels_in_reading_order():
    encoded = encode_rows(np.array([[[[0.0, 1.0, 2.0]]]]))
    assert list(gzip.decompress(base64.b64decode(encoded["values"]))) == [0, 128, 255]
    assert base64.b64decode(encoded["scale"]) == np.float32(2).tobytes()


def test_encode_floats_and_indices_are_little_endian():
    assert base64.b64decode(encode_floats(np.array([1.0]))) == b"\x00\x00\x80?"
    assert gzip.decompress(base64.b64decode(encode_indices(np.array([1, 256])))) == b"\x01\x00\x00\x01"


@pytest.mark.parametrize("value", [65536, -1])
def test_encode_indices_that_do_not_fit_are_refused(value):
    with pytest.raises(ValueError, match=f"^values: {value} "):
        encode_indices(np.array([0, value]))
