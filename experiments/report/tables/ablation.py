"""Ablation table: accuracy and cost of every configuration that belongs to no experiment's table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.views import parse_outcomes
from experiments.report.formatting import (
    ACCURACY_DEFINITION,
    EXACT_MATCH,
    NONE,
    format_interval,
    format_milliseconds,
    format_p_value,
    format_quantity,
)
from experiments.report.run_groups import RunGroup, baselines
from experiments.report.statistics import accuracy_interval
from experiments.report.tables.generated_scores import with_score_columns
from experiments.report.tables.table import (
    LATENCY_COLUMN,
    Table,
    data_frame,
    group_name,
    interval_columns,
    shorten_reason,
    token_count,
)
from experiments.report.training_ends import (
    TRAINING_COLUMN,
    is_still_improving,
    training_end,
    training_notes,
    trains_until_plateau,
)

_AFTER_ACCURACY = ("n", "Seeds", "Difference", "p", "FLOPs", LATENCY_COLUMN, "Parameters")
_COLUMNS = (
    *("model", "visual_tokens", "prefusion_layers", "compressor", "settings"),
    *("accuracy", "accuracy_low", "accuracy_high", "examples", "seeds"),
    *("difference", "difference_low", "difference_high", "p_holm", "flops", "cache_bytes", "parameters", "status"),
)


def ablation_table(groups: Sequence[RunGroup]) -> Table:
    """Build the ablation table: one row for each run group, then the blind controls of each baseline.

    Args:
        groups: Run groups compared with their baselines.
    """
    data, text = [], []
    records = [record for group in groups for record in group.finished]
    until_plateau = any(map(trains_until_plateau, records))
    for group in groups:
        row: dict[str, Any] = {
            "model": group.label,
            "visual_tokens": group.visual_tokens,
            "prefusion_layers": group.prefusion_layers,
            "compressor": group.compressor,
            "settings": group.settings,
        }
        cells = {
            "Model": group.label,
            "Tokens": token_count(group),
            "Pre-fusion": str(group.prefusion_layers),
            "Compressor": group.compressor,
            "Settings": group.settings or NONE,
        }
        if group.accuracy is None:
            reason = group.failure_reasons
            data.append({**row, "status": reason})
            text.append(
                {
                    **cells,
                    "Accuracy (%)": shorten_reason(reason),
                    **dict.fromkeys(_AFTER_ACCURACY, "failed"),
                    **({TRAINING_COLUMN: "failed"} if until_plateau else {}),
                }
            )
            continue
        parameters = float(np.mean([record["model"]["parameters"] for record in group.finished]))
        data.append(
            {
                **row,
                **interval_columns("accuracy", group.accuracy),
                "examples": group.examples,
                "seeds": len(group.finished),
                **interval_columns("difference", group.difference),
                "p_holm": group.p_value,
                "flops": group.flops,
                "cache_bytes": group.cache_bytes,
                "latency_seconds": group.latency,
                "parameters": parameters,
                **({"still_improving": any(map(is_still_improving, group.finished))} if until_plateau else {}),
                "status": group.failure_reasons or "finished",
            }
        )
        text.append(
            {
                **cells,
                "Accuracy (%)": format_interval(group.accuracy),
                "n": str(group.examples),
                "Seeds": _seed_count(group),
                "Difference": format_interval(group.difference, sign=True) if group.difference else group.comparison,
                "p": format_p_value(group.p_value) if group.p_value is not None else group.comparison,
                "FLOPs": format_quantity(group.flops),
                LATENCY_COLUMN: format_milliseconds(group.latency),
                "Parameters": format_quantity(parameters),
                **({TRAINING_COLUMN: training_end(group)} if until_plateau else {}),
            }
        )
    for numbers, cells in _control_rows(groups):
        data.append({**numbers, "status": "control"})
        text.append({**cells, **({TRAINING_COLUMN: NONE} if until_plateau else {})})
    numbers_frame, text_frame = data_frame(data, _COLUMNS), pd.DataFrame(text)
    if len(text_frame) and (text_frame["Settings"] == NONE).all():
        text_frame = text_frame.drop(columns="Settings")
    timed = [group for group in groups if group.latency > 0]
    if not timed:
        numbers_frame, text_frame = (
            frame.drop(columns=[LATENCY_COLUMN, "latency_seconds"], errors="ignore")
            for frame in (numbers_frame, text_frame)
        )
    conventions = sorted(
        {r["cost"].get("convention") or "unstated" for g in groups for r in g.finished if r.get("cost")}
    )
    notes = (
        f"{ACCURACY_DEFINITION} Mean over n examples and the seeds, with its 95% bootstrap interval over both. With two or "
        "three seeds the interval is too narrow where these differ much.",
        "Difference: percentage points from the LLaVA trained alike (no compressor, no pre-fusion) on the same "
        "examples, with its 95% interval. p: exact paired randomisation test over examples, Holm-corrected over the "
        "rows compared. The test is about these trained models, not about other seeds.",
        "Tokens: visual tokens that the language model reads. Pre-fusion: layers before the language model.",
        *(f"FLOPs of one prompt: {convention}." for convention in conventions),
        *(f"Latency: {note}." for note in sorted({group.finished[0]["cost"]["latency_note"] for group in timed})),
        *_guess_notes(groups),
        *training_notes(records, "its difference is no finding"),
        *(f"{group_name(group)}: {group.failure_reasons}." for group in groups if group.failed),
    )
    numeric = ("Tokens", "Pre-fusion", "Accuracy (%)", *_AFTER_ACCURACY)
    caption = f"Ablation: accuracy ({EXACT_MATCH}) and cost of every configuration."
    table = Table("ablation", caption, numbers_frame, text_frame, numeric, notes)
    controls = [None] * (len(text) - len(groups))
    of_family = baselines(groups)
    compared_with = [None if of_family.get(g.family) is g else of_family.get(g.family) for g in groups]
    return with_score_columns(table, [*groups, *controls], [*compared_with, *controls])


def _seed_count(group: RunGroup) -> str:
    finished = len(group.finished)
    return f"{finished} of {finished + len(group.lost)}" if group.lost else str(finished)


def _control_rows(groups: Sequence[RunGroup]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return the rows for the text-only guess and the blank image of every baseline.

    Without a baseline, the controls of the first finished group are shown.
    """
    finished = [group for group in groups if group.finished]
    shown = [group for group in finished if group.is_baseline] or finished[:1]
    rows = []
    for group in shown:
        guess, blank = group.finished[0]["data"].get("guess"), group.outcomes("blank")
        controls = {
            "Text-only guess": None if guess is None else parse_outcomes(guess)[None],
            f"{group.label}, blank image": blank,
        }
        for name, matrix in controls.items():
            row: dict[str, Any] = {"model": name, "settings": group.settings}
            cells = {"Model": name, "Settings": group.settings or NONE}
            cells |= dict.fromkeys(("Tokens", "Pre-fusion", "Compressor"), NONE)
            if matrix is None:
                cells |= {"Accuracy (%)": "not recorded", **dict.fromkeys(_AFTER_ACCURACY, NONE)}
            else:
                seeds, examples = matrix.shape
                interval = accuracy_interval(matrix)
                row |= {**interval_columns("accuracy", interval), "examples": examples, "seeds": seeds}
                cells |= {"Accuracy (%)": format_interval(interval), **dict.fromkeys(_AFTER_ACCURACY, NONE)}
                cells |= {"n": str(examples), "Seeds": str(seeds) if "blank" in name else NONE}
            rows.append((row, cells))
    return rows


def _guess_notes(groups: Sequence[RunGroup]) -> list[str]:
    notes = {record["data"].get("guess_note") for group in groups for record in group.finished} - {None}
    return [f"Text-only guess: {note}." for note in sorted(notes)]
