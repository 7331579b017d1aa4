"""A SLURM of one node in a temporary folder: munged, slurmctld and slurmd, which end with the block that starts them."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from getpass import getuser
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel")
_PATH = f"{os.environ['PATH']}:/usr/sbin"
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES
"""


def missing_commands() -> list[str]:
    """Return the commands that a cluster needs and this machine lacks."""
    return [command for command in COMMANDS if shutil.which(command, path=_PATH) is None]


@contextmanager
def cluster(cpus: int = 2) -> Iterator[dict[str, str]]:
    """Run a cluster inside the block, and yield the environment variables with which sbatch finds it.

    Args:
        cpus: CPUs of its node.

    Raises:
        RuntimeError: If it does not start, or does not stop its jobs, within a minute. The message holds the logs of the
            daemons.
    """
    host = socket.gethostname()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller, node = _free_ports(2)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                host=host, controller=controller, node=node, user=getuser(), folder=folder, cpus=cpus
            ).lstrip()
        )
        environment = {"SLURM_CONF": str(configuration), "PATH": _PATH}
        pid, seed, munge_socket = (folder / f"munge.{name}" for name in ("pid", "seed", "socket"))
        munged = ["munged", "--foreground", f"--key-file={key}", f"--pid-file={pid}", f"--seed-file={seed}"]
        start = partial(_daemon, folder=folder, environment=environment)
        stack.enter_context(start([*munged, f"--socket={munge_socket}"]))
        _wait_for(munge_socket.is_socket, folder)
        stack.enter_context(start(["slurmctld", "-D"]))
        stack.enter_context(start(["slurmd", "-D", "-N", host]))
        stack.callback(_cancel_all, folder, environment)
        _wait_for(lambda: _output(["sinfo", "--noheader", "--format=%t"], environment) == "idle", folder)
        yield environment


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unbound in sockets:
            unbound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


@contextmanager
def _daemon(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (
        (folder / f"{command[0]}.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _cancel_all(folder: Path, environment: dict[str, str]) -> None:
    """Cancel all jobs and wait until they end: a job outlives the daemons that started it."""
    _output(["scancel", f"--user={getuser()}"], environment)
    _wait_for(lambda: not _output(["squeue", "--noheader"], environment), folder)


def _output(command: list[str], environment: dict[str, str]) -> str:
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return ended.stdout.strip()


def _wait_for(condition: Callable[[], bool], folder: Path) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("*.log")))
    raise RuntimeError(f"SLURM did not start, or stop its jobs, within a minute\n{logs}")
