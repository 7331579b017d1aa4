"""What runs inside a worker: one process that runs jobs of a sweep one after the other, as its parent hands them out.

A worker sends its parent everything that a job would show: the lines that it writes to stdout and stderr, and the
progress bars of tqdm. So the outputs of several workers do not mix.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import tqdm
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from experiments.errors import INPUT_ERRORS, one_line

Send = Callable[[object], None]


@dataclass(frozen=True)
class Ready:
    """The worker waits for its first job."""


@dataclass(frozen=True)
class Output:
    """A line that the job wrote."""

    line: str


@dataclass(frozen=True)
class Progress:
    """A step of the progress bar that the job updated last.

    Attributes:
        stage: What the bar counts: "training", "accuracy".
        done: Steps done.
        total: All steps, None if that is not known.
        rate: Steps per second, None before the first.
    """

    stage: str
    done: float
    total: float | None
    rate: float | None


@dataclass(frozen=True)
class Returned:
    """The job ended, and Hydra returned this."""

    result: JobReturn


@dataclass(frozen=True)
class Exited:
    """The job ended the program, because no other job can run either."""

    code: Any


@dataclass(frozen=True)
class JobRunner:
    """Everything that a process of its own needs to run jobs of a sweep.

    Attributes:
        context: Hydra's context.
        sweep: The configuration of the sweep.
        task: The function that runs a job.
        singletons: Hydra's global state, from `Singleton.get_state()`.
    """

    context: HydraContext
    sweep: DictConfig
    task: TaskFunction
    singletons: Any

    def set_up(self) -> None:
        """Give this process Hydra's global state."""
        setup_globals()
        Singleton.set_state(self.singletons)

    def run(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """Run a job, and return what Hydra returns of it. An error becomes one that can be pickled."""
        result = JobReturn(overrides=list(overrides))
        try:
            config = self.context.config_loader.load_sweep_config(self.sweep, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)
            result = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Exception as error:
            result.status, result.return_value = JobStatus.FAILED, error
        if result.status == JobStatus.FAILED:
            result.return_value = _portable_error(result._return_value)
        return result


def worker_main(connection: Connection) -> None:
    """Run the jobs that come through a connection until None comes. This is the main function of a worker.

    The first message is a pickled `JobRunner`, each further one the number and the overrides of a job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent ends its workers
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that the cell's lock is released
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(message: object) -> None:
        with lock:
            connection.send_bytes(cloudpickle.dumps(message))

    sys.stdout = sys.stderr = _LineSender(send)
    _send_progress_bars(send)
    try:
        runner: JobRunner = cloudpickle.loads(connection.recv_bytes())
        runner.set_up()
        send(Ready())
        while (job := connection.recv()) is not None:
            try:
                send(Returned(runner.run(*job)))
            except SystemExit as exit:
                send(Exited(exit.code))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # nobody reads what else this process would write


def _end_with_parent() -> None:
    """End this process when its parent has ended, also by SIGKILL: a new sweep must not wait for its cell."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _portable_error(error: Any) -> Exception:
    """Return an error that keeps its message in another process, where its cause is lost and its class may be unknown."""
    if isinstance(error, INPUT_ERRORS):
        return ValueError(one_line(error))
    return RuntimeError(f"{type(error).__name__}: {one_line(error)}")


class _LineSender(io.TextIOBase):
    """A text stream that sends each whole line to the parent."""

    def __init__(self, send: Send) -> None:
        self._send, self._rest, self._lock = send, "", threading.Lock()

    def write(self, text: str) -> int:
        """Send the lines that this text completes."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._send(Output(line.rpartition("\r")[2]))
        return len(text)


def _send_progress_bars(send: Send) -> None:
    """Make tqdm's bars send their numbers instead of drawing themselves, whichever library makes them."""

    def display(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
        bar.leave = False  # the bar then writes nothing when it closes
        numbers = bar.format_dict
        if msg is None:
            stage = (numbers["prefix"] or "training").removesuffix(": ")  # Trainer's bar has no name
            send(Progress(stage, numbers["n"], numbers["total"], numbers["rate"]))
        return False

    tqdm.tqdm.set_lock(
        threading.RLock()
    )  # its own lock is a semaphore of the system, which a killed worker would leave
    # tqdm's documentation names `display` as the method to overload. Bars of all libraries inherit from this class.
    tqdm.tqdm.display = display  # type: ignore[assignment, method-assign]
    # Trainer writes its losses, which the record holds.
    tqdm.tqdm.write = classmethod(lambda *_, **__: None)  # type: ignore[assignment, method-assign]
