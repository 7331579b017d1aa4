"""The feature cache after file faults, and without a writable file."""

import errno
import os

import numpy as np
import pytest
import torch

from experiments.models.feature_cache import VisionFeatureCache


def _corrupt_a_row(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def _truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def _corrupt_all(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _lose_a_checksum(path):  # a kill between a row and its checksum
    with path.open("r+b") as file:
        file.seek(8 * 7)
        file.write(bytes(8))


def _write_half_a_row(path):  # by an interrupted writer, with the checksum of the whole row
    with path.open("r+b") as file:
        file.seek(-600, os.SEEK_END)
        file.write(bytes(600))


@pytest.mark.parametrize(
    "fault",
    [
        _corrupt_a_row,
        _truncate,
        _corrupt_all,
        _lose_a_checksum,
        _write_half_a_row,
        os.unlink,
        lambda path: os.truncate(path, 0),
    ],
)
def test_get_after_a_file_fault_computes_the_same_features_and_stores_them(
    llava, processor, shapes_split, tmp_path, tower_runs, fault
):
    loads = [sample.loaders[0] for sample in shapes_split.samples]
    features = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    expected = [features.get(load) for load in loads]
    fault(features.path)
    recomputing = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    assert all(torch.equal(recomputing.get(load), row) for load, row in zip(loads, expected, strict=True))
    tower_runs.clear()
    repaired = VisionFeatureCache(tmp_path, llava, processor, shapes_split)
    assert all(torch.equal(repaired.get(load), row) for load, row in zip(loads, expected, strict=True))
    assert len(tower_runs) == 1


@pytest.mark.parametrize("failure", ["at once", "half way", "no folder"])
def test_get_without_a_writable_file_computes_the_features(
    llava, processor, shapes_split, tmp_path, monkeypatch, caplog, failure
):
    pwrite = os.pwrite

    def pwrite_on_a_full_disk(file, data, offset):
        if failure == "half way" and len(data) > 8:
            return pwrite(file, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    loads = [sample.loaders[0] for sample in shapes_split.samples]
    expected = [VisionFeatureCache(tmp_path / "other", llava, processor, shapes_split).get(load) for load in loads]
    folder = tmp_path / "here"
    if failure == "no folder":
        folder.write_text("a file")
    monkeypatch.setattr(os, "pwrite", pwrite_on_a_full_disk)
    features = VisionFeatureCache(folder, llava, processor, shapes_split)
    for _ in range(2):
        assert all(torch.equal(features.get(load), row) for load, row in zip(loads, expected, strict=True))
    if failure != "half way":
        assert len(caplog.messages) == 1
        assert "computed and not cached" in caplog.text
    if failure == "no folder":
        return
    monkeypatch.undo()
    writable = VisionFeatureCache(folder, llava, processor, shapes_split)
    assert all(torch.equal(writable.get(load), row) for load, row in zip(loads, expected, strict=True))
