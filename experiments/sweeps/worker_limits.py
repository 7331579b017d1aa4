"""How many workers a sweep starts on this machine, and which GPU each of them sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What workers share.

    Attributes:
        cores: CPU cores that this process may use.
        memory: Bytes of free memory.
        device: The device that a cell would use: "cpu", "cuda", "cuda:1" or "mps".
        gpus: The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES takes.
    """

    cores: int
    memory: int
    device: str
    gpus: Sequence[str] = ()


@dataclass(frozen=True)
class WorkerPlan:
    """The workers of a sweep.

    Attributes:
        environments: Environment variables of each worker.
        reason: Why there are so many, for the log: "2 cores".
    """

    environments: Sequence[Mapping[str, str]]
    reason: str


def plan_workers(jobs: int, machine: Machine, threads: int, memory: int, workers: int | None = None) -> WorkerPlan:
    """Return the workers for some jobs: one for each core or each GPU, as far as the memory allows, or a given number.

    Each worker sees one GPU alone, by CUDA_VISIBLE_DEVICES. If the setting `device` names one of several GPUs
    ("cuda:1"), all cells run there, so there is one worker, which sees all.

    Args:
        jobs: Number of jobs.
        machine: The machine.
        threads: CPU threads of a worker.
        memory: Bytes of memory that a worker needs.
        workers: How many workers to start, whatever the cores and the memory; None to find out.

    Example:
        >>> machine = Machine(cores=4, memory=8 * 2**30, device="cuda", gpus=["0", "1"])
        >>> plan = plan_workers(6, machine, threads=1, memory=2**30)
        >>> [environment["CUDA_VISIBLE_DEVICES"] for environment in plan.environments], plan.reason
        (['0', '1'], '2 GPUs')
        >>> plan_workers(6, Machine(cores=8, memory=5 * 2**30, device="cpu"), threads=2, memory=2 * 2**30).reason
        '2 of 4 workers: each needs about 2.0 GiB, and 5.0 GiB are free'
    """
    slots: list[dict[str, str]]
    if machine.device == "cpu":
        slots, reason = [{} for _ in range(max(machine.cores // threads, 1))], _count(machine.cores, "core")
        if threads > 1:
            reason += f", {threads} threads a worker"
    elif machine.device == "cuda" and machine.gpus:
        slots, reason = [{_VISIBLE: gpu} for gpu in machine.gpus], _count(len(machine.gpus), "GPU")
    else:
        slots, reason = [{}], f"device={machine.device}"
    wanted = workers or len(slots)
    if workers:
        reason = f"hydra.launcher.workers={workers}"
    elif (fitting := max(machine.memory // memory, 1)) < min(wanted, jobs):
        reason = (
            f"{fitting} of {wanted} workers: each needs about {memory / _GIB:.1f} GiB, and {machine.memory / _GIB:.1f} "
            "GiB are free"
        )
        wanted = fitting
    common = {"OMP_NUM_THREADS": str(threads)}  # torch's threads are those of `threads` anyway: this is for NumPy
    environments = [slots[number % len(slots)] | common for number in range(min(wanted, jobs))]
    return WorkerPlan(environments, reason)


def visible_gpus(count: int, variable: str | None) -> list[str]:
    """Return the names of the GPUs that this process sees, for CUDA_VISIBLE_DEVICES of its workers.

    Args:
        count: How many GPUs torch counts. CUDA counts one of several MIG instances.
        variable: This process's CUDA_VISIBLE_DEVICES, None if it is not set.

    Example:
        >>> visible_gpus(2, None), visible_gpus(2, "3,GPU-8a4"), visible_gpus(1, "MIG-1f,MIG-2b")
        (['0', '1'], ['3', 'GPU-8a4'], ['MIG-1f', 'MIG-2b'])
    """
    if variable is None:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in variable.split(",")]
    return names if names[0].startswith("MIG-") else names[:count]  # CUDA ignores all names after a wrong one


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
