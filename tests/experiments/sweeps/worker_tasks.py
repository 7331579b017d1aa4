"""Jobs for tests of workers, which import no torch, and the command line with them in place of cells.

`python -m tests.experiments.sweeps.worker_tasks -m name=hold seed=0,1 ...` runs a sweep of them.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import tqdm

from experiments import run
from experiments.sweeps.locks import CellLock


def act(config):
    """Do what `name` says, after noting this process beside the records under the seed."""
    folder = Path(config.results)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    note = folder / f"{config.seed}.json"
    note.with_suffix(".part").write_text(json.dumps({"pid": os.getpid(), **environment}))
    note.with_suffix(".part").rename(note)
    if config.name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif config.name == "leave":
        os._exit(3)
    elif config.name == "hold":
        with CellLock(folder / "locks" / str(config.seed)), tqdm.tqdm(total=1):
            note.with_suffix(".held").touch()
            time.sleep(60)
    elif config.name == "exit":
        print("error: nothing can run", file=sys.stderr)
        sys.exit(1)
    elif config.name == "wrong":
        raise ValueError(f"seed: {config.seed} is wrong")
    elif config.name == "write":
        for step in tqdm.tqdm(range(3), desc="steps", mininterval=0):
            print(f"line {step} of seed {config.seed}")
            time.sleep(0.1)
    return config.seed / 4


if __name__ == "__main__":
    run.run_job = act
    run.main()
