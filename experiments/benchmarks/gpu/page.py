"""The page of the run on a GPU, made from the records of its steps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.steps import Step
from experiments.markdown import markdown_cell, markdown_table

STEPS_FOLDER = "steps"

INTRODUCTION = """# On a GPU

`make gpu` on a machine with CUDA runs the steps below, in under ten minutes and without network, and writes this page.
Weights are random, in the shapes of the real models. Each step runs in a process of its own: one that fails or runs out
of memory leaves the others as they are. The environment must be there (README, Install). A second call runs only what is
not finished, or was measured with other code, another torch or another GPU.
`python -m experiments.benchmarks.gpu --small --device cpu --results FOLDER` tries the run with tiny models.
"""


def read_step_records(results: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the steps that have run, by the name of the step. A damaged record counts as missing."""
    records = {}
    for path in sorted((results / STEPS_FOLDER).glob("*.json")):
        try:
            records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
    return records


def gpu_page(steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]], results: Path) -> str:
    """Return the page as Markdown.

    Args:
        steps: All steps.
        records: The records of those that have run, by name.
        results: The folder of the records, for the tables that the steps wrote.
    """
    return "\n".join(
        [INTRODUCTION, _headline(records), "", _overview(steps, records), *_sections(steps, records, results)]
    )


def _headline(records: Mapping[str, Mapping[str, Any]]) -> str:
    machines = [record["fingerprint"]["device"] for record in records.values()]
    on_gpu = [record for record in records.values() if record["on_gpu"]]
    if not records:
        return "**It has not run on a GPU yet: there was none. No number in this project was measured on one.**"
    if not on_gpu:
        return f"**These records are from {machines[0]}. The run has not been on a GPU.**"
    versions = sorted({f"torch {record['fingerprint']['torch']}" for record in on_gpu})
    return f"Measured on {', '.join(sorted(set(machines)))} with {', '.join(versions)}."


def _overview(steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for step in steps:
        record = records.get(step.name)
        outcome = (
            [record["status"], f"{record['seconds']:.0f}", record["started"][:10]] if record else ["not run", "", ""]
        )
        command = markdown_cell(shlex.join(("python", "-m", *step.arguments)))
        rows.append([step.title, *outcome, str(step.limit), f"`{command}`"])
    return markdown_table(["step", "status", "seconds", "date", "limit, s", "command"], rows, ["seconds", "limit, s"])


def _sections(steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]], results: Path) -> list[str]:
    """Return a section for each step that has run: the tables that it wrote, or the end of its output."""
    lines: list[str] = []
    for step in steps:
        if (record := records.get(step.name)) is None:
            continue
        lines += ["", f"## {step.title}", ""]
        tables = [results / name for name in record["files"] if name.endswith(".md")]
        if record["status"] == "finished" and tables:
            lines += ["\n".join(path.read_text(encoding="utf-8").rstrip() for path in tables)]
            others = [name for name in record["files"] if not name.endswith(".md")]
            for name in others:
                lines += ["", f"![{step.title}]({name})"] if name.endswith(".png") else []
            lines += ["", "Files: " + ", ".join(f"[{Path(name).name}]({name})" for name in others) + "."]
        else:
            if record["status"] != "finished":
                lines += [f"**{record['status'].capitalize()} after {record['seconds']:.0f} s.** Its last output:", ""]
            lines += ["```", *record["output"], "```"]
    return [*lines, ""]
