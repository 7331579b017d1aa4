"""Measure the time that a sweep saves when its cells share the base model, the data and cached features.

    python -m experiments.benchmarks.cache_sharing experiment=table6_prefusion row=5,6,7,8 train.max_steps=5 data.test_samples=100

The arguments are the overrides of a sweep. Its cells run one after the other in this process, in three modes that take
turns: nothing shared; base model and data shared between cells; cached features of the frozen vision tower shared as well.
Each turn starts with empty caches, so the first cell of a turn fills what later cells use. Cells with the same training
images save most, such as the rows of a table with one seed.

Writes `sharing/<identity>.json` and its table (.md) into the results folder. Records of the cells are not kept.
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
from experiments.benchmarks.harness import results_stem, run_in_turns, time_run, write_results
from experiments.cell import Cell
from experiments.config import registry
from experiments.data import load
from experiments.errors import INPUT_ERRORS, exit_with_error
from experiments.markdown import markdown_table
from experiments.models import build
from experiments.provenance import provenance
from experiments.sweeps import hydra_api, plan
from experiments.sweeps.runner import run_if_needed

SHARE_NOTHING, SHARE_BASE_AND_DATA, SHARE_FEATURES_TOO = "nothing", "base model, data", "base model, data, features"
SHARING_MODES = (SHARE_NOTHING, SHARE_BASE_AND_DATA, SHARE_FEATURES_TOO)
CLOCKS = {"cpu": "CPU", "seconds": "clock"}


@dataclass(frozen=True)
class CellRun:
    """Times and results of one run of a cell.

    Args:
        cpu: CPU seconds of this process, all threads.
        seconds: Wall-clock seconds.
        steps: Training steps.
        answers: For each condition, a digit for each question: 1 if the answer was right, else 0.
        losses: The logged losses.
    """

    cpu: float
    seconds: float
    steps: int
    answers: Mapping[str, str]
    losses: Sequence[float]


@dataclass(frozen=True)
class Spread:
    """A median over rounds, with the lowest and the highest single round."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Return the spread of one value per round."""
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    @classmethod
    def ratio(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Return the ratio of two medians, with the lowest and the highest ratio of a single round."""
        single = [a / b for a, b in zip(numerators, denominators, strict=True)]
        return cls(statistics.median(numerators) / statistics.median(denominators), min(single), max(single))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


def measure_sharing(cells: Mapping[str, Cell], rounds: int) -> list[Path]:
    """Run all cells in each sharing mode in each round, and write the record and its table.

    Args:
        cells: Cells by name.
        rounds: Number of rounds.

    Returns:
        The paths that were written.

    Raises:
        ValueError: If there are fewer than two cells or no round, or a cell cannot be run.
        PermissionError: If the results folder cannot be written.
        RuntimeError: If a cell fails.
    """
    if len(cells) < 2:
        raise ValueError(
            f"sharing needs a sweep of two or more cells, found {len(cells)}; "
            "give a setting several values, such as prefusion.layers=0,1,2"
        )
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, found {rounds}")
    first = next(iter(cells.values()))
    stem = results_stem(first.config, {"sharing": [cell.id for cell in cells.values()], "rounds": rounds}, "sharing")
    mode_cells = {mode: [_cell_in_mode(cell, mode) for cell in cells.values()] for mode in SHARING_MODES}
    turns = {mode: partial(_run_turn, cells, mode == SHARE_NOTHING) for mode, cells in mode_cells.items()}
    # One uncounted cell does what libraries do only once.
    _run_turn(mode_cells[SHARE_FEATURES_TOO][:1], clear_each_time=True)
    runs = run_in_turns(turns, rounds)
    expected = runs[SHARE_NOTHING][0]
    record = {
        "rounds": rounds,
        "cells": [
            {"name": name, "id": cell.id, "steps": run.steps, "questions": len(run.answers["image"])}
            for (name, cell), run in zip(cells.items(), expected, strict=True)
        ],
        "ways": [
            {"shared": mode, "turns": _turn_times(turns), **_differences(turns, expected)}
            for mode, turns in runs.items()
        ],
        "config": first.resolved,
        "provenance": provenance(devices.select_device(first.config.device)),
    }
    return write_results(record, sharing_markdown(record), stem)


def sharing_gains(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the sharing modes of a record, for both clocks.

    Returns:
        A row for each clock and mode. `first` is the seconds of the first cell of a turn, and `first_cost` the same over
        that with nothing shared. `later` is the mean seconds of the other cells, and `an_hour` such cells per hour.
        `gain` is `later` with nothing shared over `later`.
    """
    rows = []
    for clock in CLOCKS:
        times = {mode["shared"]: [[cell[clock] for cell in turn] for turn in mode["turns"]] for mode in record["ways"]}
        first = {mode: [turn[0] for turn in turns] for mode, turns in times.items()}
        later = {mode: [statistics.mean(turn[1:]) for turn in turns] for mode, turns in times.items()}
        rows += [
            {
                "clock": clock,
                "shared": mode,
                "first": Spread.of(first[mode]),
                "first_cost": Spread.ratio(first[mode], first[SHARE_NOTHING]),
                "later": Spread.of(later[mode]),
                "an_hour": 3600 / statistics.median(later[mode]),
                "gain": Spread.ratio(later[SHARE_NOTHING], later[mode]),
            }
            for mode in times
        ]
    return rows


def sharing_markdown(record: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row for each clock and sharing mode, and notes on what was measured."""
    columns = ["time", "shared", "first cell, s", "cost", "a later cell, s", "later cells an hour", "gain"]
    rows = []
    for row in sharing_gains(record):
        later = [str(row["later"]), f"{row['an_hour']:,.0f}", str(row["gain"])]
        rows.append([CLOCKS[row["clock"]], row["shared"], str(row["first"]), str(row["first_cost"]), *later])
    cells = "; ".join(f"{c['name']}: {c['steps']} steps, {c['questions']} questions" for c in record["cells"])
    differences = "; ".join(
        f"{mode['shared']}: {mode['answers_changed']} of {mode['answers']:,}, {mode['loss_changed']:.1e}"
        for mode in record["ways"]
    )
    notes = [
        f"Cells of {record['config']['model']['name']}, in this order: {cells}. {record['provenance']['device']}, medians "
        f"of {record['rounds']} rounds in which the modes take turns; in brackets the lowest and the highest single round. "
        "Cost: time of the first cell over its time with nothing shared. Gain: later cells per hour over those with "
        "nothing shared.",
        "Each turn starts with empty caches: its first cell reads the base model, loads the data and computes the features "
        "that later cells use. CPU seconds are those of this process, without a GPU's; the clock also includes delays by "
        "other load. Neither includes the import of libraries.",
        "Questions whose answer turned from right to wrong or back, and the largest difference of a logged loss, from the "
        f"first round with nothing shared: {differences}. Cached features are rounded to bf16, so the last bits may differ.",
    ]
    lines = markdown_table(columns, rows, columns[2:])
    return "\n".join([lines, *(f"\n{note}" for note in notes)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a sweep, print its table and the paths of the results, and return the exit status 0.

    Invalid input ends the program with one line.
    """
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.cache_sharing", description=description)
    parser.add_argument("overrides", nargs="*", help="overrides, as for `python -m experiments.run -m`")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the modes take turns (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    registry.register_configs()
    try:
        with hydra_api.open_hydra() as hydra:
            _, jobs = plan.expand_sweep(hydra, arguments.overrides)
        named_cells = {job.cell.id: (job.name, job.cell) for job in jobs if job.cell}
        paths = measure_sharing(dict(named_cells.values()), arguments.rounds)
    except (*INPUT_ERRORS, RuntimeError) as error:
        exit_with_error(error)
    print(paths[-1].read_text(), *paths, sep="\n")
    return 0


def _cell_in_mode(cell: Cell, mode: str) -> Cell:
    return replace(cell, config=replace(cell.config, keep_features=mode == SHARE_FEATURES_TOO, save=None))


def _run_turn(cells: Sequence[Cell], clear_each_time: bool) -> list[CellRun]:
    """Run the cells one after the other in a temporary results folder.

    Args:
        cells: The cells, in order.
        clear_each_time: Empty the caches before each cell, not only before the first.
    """
    runs: list[CellRun] = []
    with TemporaryDirectory(prefix=".sharing.", dir=cells[0].config.results) as results:
        for cell in cells:
            if clear_each_time or not runs:
                load.clear_data_cache()
                build.clear_model_cache()
            runs.append(_time_cell(replace(cell, config=replace(cell.config, results=results))))
    return runs


def _time_cell(cell: Cell) -> CellRun:
    """Time all that a sweep does for a cell, except for reading its configuration."""
    start = time.process_time()
    seconds, status = time_run(
        lambda: run_if_needed(replace(cell, data=load.load_data(cell.config.data)), record_input_errors=False)
    )
    cpu, record = time.process_time() - start, status.record
    if record is None or record["status"] != "finished":
        raise RuntimeError(f"{cell.label} {status.state}: {record and record['error']}")
    log = record["train"]["log"] if record["train"] else []
    steps = max((entry["step"] for entry in log), default=0)
    return CellRun(cpu, seconds, steps, record["accuracy"], [entry["loss"] for entry in log if "loss" in entry])


def _turn_times(turns: Sequence[Sequence[CellRun]]) -> list[list[dict[str, float]]]:
    return [[{clock: round(asdict(run)[clock], 3) for clock in CLOCKS} for run in turn] for turn in turns]


def _differences(turns: Sequence[Sequence[CellRun]], expected: Sequence[CellRun]) -> dict[str, Any]:
    """Return the number of answers, how many changed between right and wrong, and the largest change of a loss."""
    pairs = [pair for turn in turns for pair in zip(turn, expected, strict=True)]
    changes = [
        a != b
        for run, reference in pairs
        for condition, digits in reference.answers.items()
        for a, b in zip(run.answers[condition], digits, strict=True)
    ]
    losses = [abs(a - b) for run, reference in pairs for a, b in zip(run.losses, reference.losses, strict=True)]
    return {"answers": len(changes), "answers_changed": sum(changes), "loss_changed": max(losses, default=0.0)}


if __name__ == "__main__":
    sys.exit(main())
