"""What is gained by computing once what the cells of a sweep share.

    python -m experiments.benchmarks.cache_sharing experiment=table6_prefusion row=5,6,7,8 train.steps=5 data.test=100

Takes the overrides of a sweep. Its cells run one after the other in this process, in three ways that take turns: with
nothing shared, with the base model and the data kept from cell to cell, and with the frozen tower's features kept as well.
Each turn starts with nothing at hand, so that the first cell of a turn pays for what later ones find. Cells that see the
same training pictures, as the rows of a table with one seed do, find the most.

Writes `sharing/<identity>.json` and its table (.md) into the results folder; records of cells are not kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments import devices
from experiments.benchmarks.harness import in_turns, results_stem, timed, write_results
from experiments.cell import Cell
from experiments.config import registry as configuration
from experiments.data import load
from experiments.errors import EXPECTED, stop
from experiments.models import build
from experiments.provenance import provenance
from experiments.sweeps import hydra_api, plan
from experiments.sweeps.runner import attempt

NOTHING, KEPT, FEATURES = "nothing", "base model, data", "base model, data, features"
CLOCKS = {"cpu": "CPU", "seconds": "clock"}


@dataclass(frozen=True)
class Ran:
    """A cell that has run.

    Args:
        cpu: Seconds of this process's threads.
        seconds: By the clock.
        steps: Of training.
        answers: A digit for each question, in each condition: 1 where it was answered rightly.
        losses: As they were logged.
    """

    cpu: float
    seconds: float
    steps: int
    answers: Mapping[str, str]
    losses: Sequence[float]


def run_sharing(cells: Mapping[str, Cell], rounds: int) -> list[Path]:
    """Measure these cells, by name, in each of the three ways in each round; write the record and its table.

    Raises:
        ValueError: There is nothing to share or no round, or a cell cannot be run.
        PermissionError: The results folder cannot be written.
        RuntimeError: A cell fails.
    """
    if len(cells) < 2:
        raise ValueError(
            f"what cells share is measured on a sweep of two or more, found {len(cells)}; "
            "give a setting several values, such as prefusion.layers=0,1,2"
        )
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, found {rounds}")
    first = next(iter(cells.values()))
    stem = results_stem(first.config, {"sharing": [cell.id for cell in cells.values()], "rounds": rounds}, "sharing")
    ways = {way: [_in(cell, way) for cell in cells.values()] for way in (NOTHING, KEPT, FEATURES)}
    turns = {way: partial(_turn, of_way, way == NOTHING) for way, of_way in ways.items()}
    _turn(ways[FEATURES][:1], True)  # what libraries do once is no cell's
    ran = in_turns(turns, rounds)
    expected = ran[NOTHING][0]
    record = {
        "rounds": rounds,
        "cells": [
            {"name": name, "id": cell.id, "steps": one.steps, "questions": len(one.answers["image"])}
            for (name, cell), one in zip(cells.items(), expected, strict=True)
        ],
        "ways": [
            {"shared": way, "turns": _times(turns), **_differences(turns, expected)} for way, turns in ran.items()
        ],
        "config": first.resolved,
        "provenance": provenance(devices.choose_device(first.config.device)),
    }
    return write_results(record, table(record), stem)


def _in(cell: Cell, way: str) -> Cell:
    return replace(cell, config=replace(cell.config, keep_features=way == FEATURES, save=None))


def _turn(cells: Sequence[Cell], anew: bool) -> list[Ran]:
    """The cells one after the other in a results folder of their own, each with nothing at hand if `anew`."""
    found: list[Ran] = []
    with TemporaryDirectory(prefix=".sharing.", dir=cells[0].config.results) as results:
        for cell in cells:
            if anew or not found:
                load.forget()
                build.forget()
            found.append(_run(replace(cell, config=replace(cell.config, results=results))))
    return found


def _run(cell: Cell) -> Ran:
    """Of what a sweep does for a cell, all but reading its configuration."""
    began = time.process_time()
    seconds, standing = timed(lambda: attempt(replace(cell, data=load.load_data(cell.config.data)), record_all=False))
    cpu, record = time.process_time() - began, standing.record
    if record is None or record["status"] != "finished":
        raise RuntimeError(f"{cell.label} {standing.state}: {record and record['error']}")
    history = record["train"]["log"] if record["train"] else []
    steps = max((entry["step"] for entry in history), default=0)
    return Ran(cpu, seconds, steps, record["accuracy"], [entry["loss"] for entry in history if "loss" in entry])


def _times(turns: Sequence[Sequence[Ran]]) -> list[list[dict[str, float]]]:
    return [[{clock: round(asdict(ran)[clock], 3) for clock in CLOCKS} for ran in turn] for turn in turns]


def _differences(turns: Sequence[Sequence[Ran]], expected: Sequence[Ran]) -> dict[str, Any]:
    """How many questions were right in one and wrong in the other, of how many; and the greatest of a logged loss."""
    pairs = [pair for turn in turns for pair in zip(turn, expected, strict=True)]
    answers = [
        a != b
        for ran, other in pairs
        for condition, digits in other.answers.items()
        for a, b in zip(ran.answers[condition], digits, strict=True)
    ]
    losses = [abs(a - b) for ran, other in pairs for a, b in zip(ran.losses, other.losses, strict=True)]
    return {"answers": len(answers), "answers_changed": sum(answers), "loss_changed": max(losses, default=0.0)}


@dataclass(frozen=True)
class Spread:
    """The middle of some rounds, the least and the most."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of medians; the least and the most of single rounds."""
        single = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(above) / statistics.median(below), min(single), max(single))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def gains(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For both clocks and each way: `first`, the seconds of the first cell of a turn, and `first_cost`, over those with
    nothing shared; `later`, the mean of the others, `an_hour`, cells in an hour of it, and `gain`, over those with
    nothing shared."""
    found = []
    for clock in CLOCKS:
        times = {way["shared"]: [[cell[clock] for cell in turn] for turn in way["turns"]] for way in record["ways"]}
        first = {way: [turn[0] for turn in turns] for way, turns in times.items()}
        later = {way: [statistics.mean(turn[1:]) for turn in turns] for way, turns in times.items()}
        found += [
            {
                "clock": clock,
                "shared": way,
                "first": Spread.of(first[way]),
                "first_cost": Spread.ratio(first[way], first[NOTHING]),
                "later": Spread.of(later[way]),
                "an_hour": 3600 / statistics.median(later[way]),
                "gain": Spread.ratio(later[NOTHING], later[way]),
            }
            for way in times
        ]
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a line for each clock and way, with notes on what is measured."""
    lines = [
        ["time", "shared", "first cell, s", "cost", "a later cell, s", "later cells an hour", "gain"],
        ["---", "---", *["---:"] * 5],
    ]
    for row in gains(record):
        later = [str(row["later"]), f"{row['an_hour']:,.0f}", str(row["gain"])]
        lines.append([CLOCKS[row["clock"]], row["shared"], str(row["first"]), str(row["first_cost"]), *later])
    cells = "; ".join(f"{c['name']}: {c['steps']} steps, {c['questions']} questions" for c in record["cells"])
    told = "; ".join(
        f"{way['shared']}: {way['answers_changed']} of {way['answers']:,}, {way['loss_changed']:.1e}"
        for way in record["ways"]
    )
    notes = [
        f"Cells of {record['config']['model']['name']}, in this order: {cells}. {record['provenance']['device']}, medians "
        f"of {record['rounds']} rounds in which the ways take turns; in brackets the least and the most of a single round. "
        "Cost: the first cell's time over its time with nothing shared. Gain: later cells an hour over those with nothing "
        "shared.",
        "Each turn starts with nothing at hand: its first cell reads the base model, loads the data and fills the features "
        "that later ones find. CPU seconds are those of this process, without a GPU's; the clock also counts what else the "
        "machine did. Importing libraries is in neither.",
        f"Questions right in one and wrong in the other, and the greatest difference of a logged loss, from the first round "
        f"with nothing shared: {told}. Kept features are rounded to bf16, and the last bits may differ for it.",
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(f"\n{note}" for note in notes)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and say where the results are. Returns the exit status, 0; wrong input ends the program with one line."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.cache_sharing", description=about)
    parser.add_argument("overrides", nargs="*", help="as for `python -m experiments.run -m`")
    parser.add_argument("--rounds", type=int, default=5, help="in which the ways take turns (%(default)s)")
    asked = parser.parse_intermixed_args(argv)
    configuration.register()
    try:
        with hydra_api.hydra() as hydra:
            _, jobs = plan.expand(hydra, asked.overrides)
        cells = {job.cell.id: (job.name, job.cell) for job in jobs if job.cell}
        paths = run_sharing(dict(cells.values()), asked.rounds)
    except (*EXPECTED, RuntimeError) as error:
        stop(error)
    print(paths[-1].read_text(), *paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
