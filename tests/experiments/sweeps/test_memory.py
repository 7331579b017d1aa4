"""Free memory within control groups that are made up, and the memory that models need."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save_file

from experiments.files import ASSETS
from experiments.sweeps.memory import PROCESS_BYTES, available_memory, model_bytes, worker_memory
from tests.experiments.sweeps.run_sweep import tiny_cell

MIB = 2**20


def control_group(folder, limit, used, cached, names):
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, cache_name = names
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {cached}\n")


VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def with_groups(root, line):
    """Write which control group this process is in."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    return root / "sys/fs/cgroup"


def test_available_memory_is_within_the_tightest_control_group_of_version_2(tmp_path):
    mount = with_groups(tmp_path, "0::/outer/inner\n")
    control_group(mount / "outer", 50 * MIB, 30 * MIB, 10 * MIB, VERSION_2)
    control_group(mount / "outer" / "inner", "max", 30 * MIB, 0, VERSION_2)
    assert available_memory(tmp_path) == 30 * MIB
    control_group(mount / "outer" / "inner", 20 * MIB, 15 * MIB, 2 * MIB, VERSION_2)
    assert available_memory(tmp_path) == 7 * MIB
    control_group(mount / "outer" / "inner", 20 * MIB, 25 * MIB, 0, VERSION_2)
    assert available_memory(tmp_path) == 0


def test_available_memory_in_a_container_reads_the_root_of_its_mount(tmp_path):
    """A container without a namespace of its own names a folder that it cannot see."""
    mount = with_groups(tmp_path, "0::/docker/4f1c\n")
    control_group(mount, 64 * MIB, 16 * MIB, 0, VERSION_2)
    assert available_memory(tmp_path) == 48 * MIB


def test_available_memory_is_within_a_control_group_of_version_1(tmp_path):
    mount = with_groups(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n")
    control_group(mount / "memory" / "job", 40 * MIB, 10 * MIB, MIB, VERSION_1)
    assert available_memory(tmp_path) == 31 * MIB


def test_available_memory_without_control_groups_is_that_of_the_machine(tmp_path):
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_model_bytes_counts_parameters_in_the_dtype_of_the_cell(tmp_path, dtype, size):
    save_file({"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert model_bytes(SimpleNamespace(path=str(tmp_path), dtype=dtype)) == 22 * size
    joined = SimpleNamespace(vision=str(tmp_path), language=str(tmp_path), adapter=None, dtype=dtype)
    assert model_bytes(joined) == 44 * size


@pytest.mark.parametrize("path", ["no/such", "/no/such/folder", "a b"])
def test_model_bytes_of_a_model_that_is_not_here_is_zero(path):
    assert model_bytes(SimpleNamespace(path=path, dtype="float32")) == 0


def test_worker_memory_counts_the_copies_of_the_weights(tmp_path):
    from transformers import AutoModelForImageTextToText

    parameters = AutoModelForImageTextToText.from_pretrained(ASSETS / "tiny").num_parameters()
    expected = {"train.max_steps=0": 2, "train.max_steps=1": 5, "train.num_train_epochs=1": 5}
    for override, copies in expected.items():
        config = tiny_cell(tmp_path, override).config
        assert worker_memory(config) - PROCESS_BYTES == pytest.approx(copies * 4 * parameters, rel=0.01)
    adapted = tiny_cell(tmp_path, "train.max_steps=1", "train.lora_rank=4").config
    assert worker_memory(adapted) == worker_memory(tiny_cell(tmp_path).config)
