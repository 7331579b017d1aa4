"""Run jobs in several worker processes: start them, hand out jobs, notice those that die, and end all of them.

concurrent.futures and loky give up all jobs when one process dies, for example for lack of memory. Here each worker has
a connection of its own, which closes when it dies, so the others go on.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any

import cloudpickle
from hydra.core.utils import JobReturn, JobStatus, env_override

from experiments.sweeps.worker import Exited, JobRunner, Output, Progress, Ready, Returned, worker_main
from experiments.sweeps.worker_display import WorkerDisplay

_END_SECONDS = 10.0  # that a worker has to release its locks, after which it is killed


@dataclass(frozen=True)
class LocalJob:
    """One job of a sweep on this machine.

    Attributes:
        number: Hydra's number of the job.
        overrides: Its overrides.
        name: What sets it apart from the sweep's other jobs.
        shared: Identifies the base model and the data, which a worker keeps from one job to the next.
    """

    number: int
    overrides: Sequence[str]
    name: str
    shared: str = ""


@dataclass
class _Worker:
    """A worker as its parent sees it.

    Attributes:
        number: Its row in the display.
        environment: Environment variables that only it has.
        process: Its process.
        connection: The parent's end of its connection.
        ready: Whether it has loaded what it needs.
        job: Its job, None after the last one.
        lines: What the job has written so far.
    """

    number: int
    environment: Mapping[str, str]
    process: Any
    connection: connection.Connection
    ready: bool = False
    job: LocalJob | None = None
    lines: list[str] = field(default_factory=list)


def run_in_workers(
    jobs: Sequence[LocalJob], runner: JobRunner, environments: Sequence[Mapping[str, str]], display: WorkerDisplay
) -> list[JobReturn]:
    """Run jobs in one process for each environment.

    A worker that dies fails its job, and the others go on. If it was killed, as when memory runs out, no other replaces
    it while others run. A job that exits, and an exception such as Ctrl-C, end all workers.

    Args:
        jobs: The jobs, at least as many as environments.
        runner: Runs a job in its worker.
        environments: Environment variables of each worker, beyond those of this process.
        display: Shows what the workers do.

    Returns:
        What Hydra returns of each job, in their order.

    Raises:
        SystemExit: If a job exits.
        ChildProcessError: If a worker ends before its first job.
    """
    with display, _Pool(jobs, cloudpickle.dumps(runner), display) as pool:
        for environment in environments:
            pool.start(environment)
        while pool.workers:
            for ready in connection.wait([worker.connection for worker in pool.workers]):
                pool.receive(next(worker for worker in pool.workers if worker.connection is ready))
    return [pool.returned[job.number] for job in jobs]


class _Pool:
    """The workers that run, and the jobs that no worker has yet. Leaving it as a context manager ends all processes."""

    def __init__(self, jobs: Sequence[LocalJob], runner: bytes, display: WorkerDisplay) -> None:
        self.pending, self.runner, self.display = list(jobs), runner, display
        self.workers: list[_Worker] = []
        self.returned: dict[int, JobReturn] = {}
        self._processes: list[Any] = []  # all that were started

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        deadline = time.monotonic() + _END_SECONDS
        try:
            for process in self._processes:
                if kind:
                    process.terminate()
            for process in self._processes:
                process.join(max(deadline - time.monotonic(), 0))
        finally:  # also after a second Ctrl-C
            for process in self._processes:
                process.kill()

    def start(self, environment: Mapping[str, str]) -> None:
        """Start a worker and give it a job."""
        context = get_context("spawn")  # a forked process could not use CUDA
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(theirs,))
        with env_override(dict(environment)):
            process.start()
        theirs.close()  # so that ours ends when the process does
        worker = _Worker(len(self._processes), environment, process, ours)
        self._processes.append(process)
        self.workers.append(worker)
        with contextlib.suppress(OSError):  # it died already, and `receive` will find that out
            ours.send_bytes(self.runner)
        self._give_job(worker, "")

    def receive(self, worker: _Worker) -> None:
        """Receive one message of a worker, or notice that it died.

        Raises:
            SystemExit: If its job exits.
            ChildProcessError: If it ended before its first job.
        """
        try:
            message = cloudpickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._bury(worker)
            return
        if isinstance(message, Ready):
            worker.ready = True
        elif isinstance(message, Output):
            worker.lines.append(message.line)
        elif isinstance(message, Progress):
            self.display.progress(worker.number, message)
        elif isinstance(message, Exited):
            self.display.write(worker.lines)
            sys.exit(message.code)
        elif isinstance(message, Returned):
            assert worker.job
            self._end_job(worker, message.result)
            self._give_job(worker, worker.job.shared)

    def _give_job(self, worker: _Worker, shared: str) -> None:
        """Give a worker its next job, or end it.

        Of the jobs left, it gets the first that shares model and data with its last one, so that it need not read them
        again. Otherwise it gets the first that shares them with no other worker's job.
        """
        others = {other.job.shared for other in self.workers if other.job and other is not worker}
        order = sorted(self.pending, key=lambda job: (job.shared != shared, job.shared in others))
        worker.job = order[0] if order else None
        if worker.job:
            self.pending.remove(worker.job)
            self.display.started(worker.number, worker.job.name)
        else:
            self.workers.remove(worker)
        with contextlib.suppress(OSError):  # it died, and `receive` will find that out
            worker.connection.send(worker.job and (worker.job.number, worker.job.overrides))

    def _end_job(self, worker: _Worker, result: JobReturn) -> None:
        assert worker.job
        self.returned[worker.job.number] = result
        self.display.finished(worker.number, worker.job.name, result, worker.lines)
        worker.lines = []

    def _bury(self, worker: _Worker) -> None:
        """Fail the job of a worker that died, and start another worker where that is right."""
        worker.process.join()
        code = worker.process.exitcode
        self.workers.remove(worker)
        cause = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        killed = code == -signal.SIGKILL
        if not worker.ready and not killed:  # no worker can start, so no job can run
            raise ChildProcessError(f"a worker process {cause} before its first job")
        if killed:
            cause += ", as when memory runs out; hydra.launcher.workers=N starts fewer workers"
        error = RuntimeError(f"worker process {worker.process.pid} {cause}; the same command runs the job again")
        assert worker.job
        overrides = list(worker.job.overrides)
        self._end_job(worker, JobReturn(overrides, status=JobStatus.FAILED, _return_value=error))
        if self.pending and not (killed and self.workers):
            self.start(worker.environment)
