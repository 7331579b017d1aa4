"""How many workers a sweep starts, and which GPU each sees, on machines that are made up."""

import os

import pytest

from experiments.sweeps.worker_limits import Machine, plan_workers, visible_gpus

GIB = 2**30


def machine(device="cpu", cores=8, memory=1000 * GIB, gpus=()):
    """Return a machine."""
    return Machine(cores, memory, device, gpus)


def pinned(plan):
    """Return the GPU of each worker of a plan, None for one that sees all."""
    return [environment.get("CUDA_VISIBLE_DEVICES") for environment in plan.environments]


@pytest.mark.parametrize(("jobs", "threads", "expected"), [(20, 1, 8), (3, 1, 3), (20, 2, 4), (20, 3, 2), (20, 16, 1)])
def test_plan_workers_on_cpu_gives_each_worker_its_cores(jobs, threads, expected):
    plan = plan_workers(jobs, machine(), threads, GIB)
    assert pinned(plan) == [None] * expected
    assert {environment["OMP_NUM_THREADS"] for environment in plan.environments} == {str(threads)}


def test_plan_workers_on_gpus_pins_one_worker_to_each():
    assert pinned(plan_workers(20, machine("cuda", gpus=["0", "1", "2"]), 1, GIB)) == ["0", "1", "2"]
    assert pinned(plan_workers(2, machine("cuda", gpus=["3", "GPU-8a", "0"]), 1, GIB)) == ["3", "GPU-8a"]


@pytest.mark.parametrize("device", ["cuda:1", "mps", "cpu and cuda:0"])
def test_plan_workers_on_a_device_that_is_named_leaves_one_worker_unpinned(device):
    plan = plan_workers(20, machine(device, gpus=["0", "1"]), 1, GIB)
    assert pinned(plan) == [None]
    assert device in plan.reason


@pytest.mark.parametrize(("memory", "expected"), [(7.9, 2), (9, 3), (100, 8), (1, 1)])
def test_plan_workers_starts_as_many_as_the_memory_allows(memory, expected):
    plan = plan_workers(20, machine(memory=int(memory * GIB)), 1, 3 * GIB)
    assert len(plan.environments) == expected
    assert ("GiB" in plan.reason) == (expected < 8)
    assert f"{memory:.1f} GiB" in plan.reason or expected == 8


def test_plan_workers_names_the_memory_only_where_it_limits():
    assert "GiB" not in plan_workers(2, machine(memory=7 * GIB), 1, 3 * GIB).reason


def test_plan_workers_with_a_given_number_starts_that_many_on_all_gpus_in_turn():
    plan = plan_workers(20, machine("cuda", memory=GIB, gpus=["0", "1"]), 1, 3 * GIB, workers=3)
    assert pinned(plan) == ["0", "1", "0"]
    assert len(plan_workers(2, machine(), 1, GIB, workers=3).environments) == 2


@pytest.mark.parametrize(
    ("count", "variable", "expected"),
    [
        (3, None, ["0", "1", "2"]),
        (2, "5,2", ["5", "2"]),
        (1, " 1 ", ["1"]),
        (1, "0,-1,1", ["0"]),
        (2, "GPU-8932f937,GPU-4cf8db2d", ["GPU-8932f937", "GPU-4cf8db2d"]),
        (1, "MIG-c6d4f1ef,MIG-cba663e8", ["MIG-c6d4f1ef", "MIG-cba663e8"]),
    ],
)
def test_visible_gpus_are_those_of_this_process(count, variable, expected):
    assert visible_gpus(count, variable) == expected


def test_visible_gpus_of_this_machine_are_what_torch_counts():
    import torch

    count = torch.cuda.device_count()
    assert len(visible_gpus(count, os.environ.get("CUDA_VISIBLE_DEVICES"))) >= count
