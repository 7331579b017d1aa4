"""Captions of a report's figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.records.views import Record, record_label
from experiments.report.experiment_results import ExperimentResults, ResultRow
from experiments.report.formatting import EXACT_MATCH
from experiments.report.run_groups import RunGroup
from experiments.report.training_ends import STILL_IMPROVING, describe_training, training_end

_PARETO_FRONT = "Broad dashes: the Pareto front, the {} whose accuracy no other reaches at the same or lower cost."
EXPERIMENT_COST = (
    f"Accuracy ({EXACT_MATCH}) of the rows, numbered in their order, with 95% bootstrap intervals over examples and seeds, "
    "against the cost of one prompt. There is a panel for each cost that was measured and in which rows differ. "
    f"{_PARETO_FRONT.format('rows')} Horizontal lines: the blind controls."
)
CLAIMS = (
    "The statistic of each claim with its 95% interval over questions and seeds, and the line above which the claim holds. "
    "Shares lie from 0 to 100% unless parts have opposite signs."
)
ABLATION = (
    f"Test accuracy ({EXACT_MATCH}) of every ablation cell. Horizontal lines are plain LLaVA and the blind controls; a cross marks a cell "
    "that failed. Points are offset sideways to keep bars readable."
)
ABLATION_COST = (
    f"Test accuracy ({EXACT_MATCH}) against the FLOPs of one prompt and, where measured, against the time of its prefill "
    "and the bytes of its keys and values in the language model's cache. The star is plain LLaVA. "
    f"{_PARETO_FRONT.format('cells')}"
)


def experiment_rows(results: ExperimentResults) -> str:
    """Return the caption of an experiment's rows figure."""
    seeds = " Small dots: single seeds." if len(results.seeds) > 1 else ""
    return (
        f"Accuracy ({EXACT_MATCH}) of each row, with its 95% bootstrap interval over examples and seeds, and the FLOPs of "
        f"one prompt.{seeds} Vertical lines: the first row and the blind controls."
    )


def learning_curves(results: ExperimentResults, rows: Sequence[ResultRow]) -> str:
    """Return the caption of an experiment's learning-curve figure, with the last accuracy of each row.

    Args:
        results: The experiment's rows with their runs.
        rows: The rows with a learning curve.
    """
    band = " Band: range over seeds." if len(results.seeds) > 1 else ""
    ends = []
    for row in rows:
        assert row.runs is not None
        last = [record["train"]["validation"][-1]["accuracy"] for record in row.runs.finished]
        ends.append(f"{row.label} {100 * np.mean(last):.1f} ({training_end(row.runs)})")
    return (
        f"Accuracy ({EXACT_MATCH}) and loss on the validation split during training. Line: mean over seeds.{band} A seed that ended earlier "
        f"keeps its last value. An open marker ends a row that was {STILL_IMPROVING}. Accuracy at the end (%): "
        f"{'; '.join(ends)}. {describe_training(record for row in rows if row.runs for record in row.runs.finished)}"
    )


def ablation_sample(groups: Sequence[RunGroup], families: int) -> str:
    """Return the sentences on intervals, sample sizes and devices below an ablation figure.

    Args:
        groups: The groups drawn; at least one is finished.
        families: Number of families of finished groups, of which the figure shows the largest.
    """
    finished = [group for group in groups if group.finished]
    seed_counts = sorted({len(group.finished) for group in finished})
    devices = sorted({r["provenance"].get("device") or "device unknown" for group in finished for r in group.finished})
    sample = (
        f"Bars are 95% bootstrap intervals over examples and seeds; n = {finished[0].examples} test examples per seed, "
        f"{_span(seed_counts)} seed{'s' if seed_counts[-1] > 1 else ''} per cell; {', '.join(devices)}."
    )
    if families == 1:
        return sample
    return (
        f"{sample} The figure shows the largest of {families} groups of cells trained alike on the same data; the table "
        "lists all."
    )


def probe_source(record: Record) -> str:
    """Return the sentence that names a probed record's model, data and device."""
    device = record["provenance"].get("device", "device unknown")
    return f"Model: {record_label(record)} (one seed), data {record['data']['name']}, {device}, record {record['id']}."


def attention_mass(record: Record) -> str:
    """Return the caption of the attention figure."""
    attention = record["attention"]
    note = attention.get("queries_note")
    return (
        "Share of a query's attention that falls on a token group, averaged over heads and queries"
        f"{f' ({note})' if note else ''}. Line and band: mean and 95% bootstrap interval over "
        f"n = {attention['samples']} samples. {_attention_controls(record)}"
    )


def attention_entropy(record: Record) -> str:
    """Return the caption of the entropy figure."""
    return (
        "Entropy in nats of the attention renormalised within a token group: high if attention is spread evenly, low if "
        "it falls on few tokens. Line and band: mean and 95% bootstrap interval over "
        f"n = {record['attention']['samples']} samples. {_attention_controls(record)}"
    )


def removal(record: Record) -> str:
    """Return the caption of the removal figure."""
    control = "; open squares hide as many random text tokens instead" if record["removal"].get("random_inside") else ""
    onset = (
        "Triangles: visual tokens hidden in the first layers, so that the image arrives late; the blue line is the onset, "
        "the first layer that needs the image. "
        if record.get("onset")
        else ""
    )
    return (
        f"Left: visual tokens hidden inside one block of layers and visible in all others{control}. Right: visual tokens "
        "hidden from a layer onward, so that only the first layers attend to them; the shaded range is the 95% interval "
        f"of the fusion depth. {onset}Bars and band: 95% bootstrap intervals over n = {record['data']['examples']} examples."
    )


def contribution(record: Record) -> str:
    """Return the caption of the contribution figure."""
    control = (record["contribution"].get("control") or {}).get("name")
    dashed = f" Dashed: {control}." if control else ""
    return (
        "Norm of what attention to the image adds to the output of the attention module (attention times value, through "
        "the output projection), as a share of the norms of all token groups. Means over heads and queries; line and band: "
        f"mean and 95% bootstrap interval over n = {record['contribution']['samples']} samples.{dashed} Right: the norm "
        "for the instruction, by layer and head."
    )


def sinks(record: Record) -> str:
    """Return the caption of the sinks figure."""
    left_out = " Attention mass and entropy of this record leave them out." if record["sinks"].get("left_out") else ""
    return (
        "A visual token is a sink by attention if it takes far more attention than the others from at least half of the "
        "text's queries and heads, and a sink by value norm if its value is far smaller. Left: questions with at least one "
        "sink in the layer. Right: attention on the sinks by attention. Line and band: mean and 95% bootstrap interval "
        f"over n = {record['sinks']['samples']} samples.{left_out}"
    )


def fusion(record: Record) -> str:
    """Return the caption of the fusion figure."""
    knockout, readout = record.get("knockout"), record.get("readout")
    parts = ["Layers in which text takes in the image, by method."]
    if record.get("attention") is not None:
        parts.append("Attention: share of the instruction's attention on vision.")
    if record.get("removal") is not None:
        parts.append("Removal: accuracy with vision hidden from a layer onward.")
    if knockout is not None:
        parts.append(f"Knock-out: accuracy with all text cut off from vision in {_layer_count(knockout['width'])}.")
    if readout is not None:
        parts.append(
            "Read-out: share of right answers that a linear classifier reads off the mean state of the question, on "
            f"images held out of its training (n = {readout['samples']}); after 0 layers the state holds only the "
            "question's words."
        )
    parts.append("Bands: 95% bootstrap intervals. Dotted line and shade: the curve's fusion depth and its interval.")
    return " ".join(parts)


def knockout_types(record: Record) -> str:
    """Return the caption of the knock-out figure by question type."""
    return (
        f"Accuracy with all text cut off from vision in {_layer_count(record['knockout']['width'])}, by type of question. "
        "Where it falls, text needs to read the image there. Bands: 95% bootstrap intervals over the questions of the type."
    )


def logit_lens(record: Record) -> str:
    """Return the caption of the logit-lens figure."""
    guess = " The text-only guess counts whole answers." if record["data"].get("guess") is not None else ""
    return (
        "The model's own final norm and head applied after each layer, at the position where the answer begins. Above: "
        "share of questions whose right answer's first token ranks first in the vocabulary; below: mean log-probability "
        "of that token. After 0 layers the input is the embedding; after all layers the output is the model's own "
        f"prediction. Band: 95% bootstrap interval over n = {record['lens']['samples']} questions.{guess}"
    )


def swaps(record: Record) -> str:
    """Return the caption of the swaps figure."""
    properties = record["swaps"]["properties"]
    right = [f"{name} {entry['right']} of {entry['pairs']}" for name, entry in properties.items()]
    without = [name for name, entry in properties.items() if entry["layer"] is None]
    note = f" Not drawn, as the model does not answer by it: {', '.join(without)}." if without else ""
    return (
        "Minimal pairs: two images that differ in one property, and one question. Text attends to one image in the first "
        "layers, and to the other image in the layers after. Left: the move of log p(answer to the other image) - log "
        "p(answer to the own image), as a share of the move between the two intact runs. The reading layer is the first "
        "with less than half of it from there on. Right: runs whose most likely answer is that to the other image. Bands: "
        f"95% bootstrap intervals over the pairs that the model answers right on both images: {', '.join(right)}.{note}"
    )


def _attention_controls(record: Record) -> str:
    control = (record["attention"].get("control") or {}).get("name")
    dashed = f"Dashed: {control}." if control else "No control model was recorded."
    return f"{dashed} Dotted: attention spread evenly over all visible tokens."


def _layer_count(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers in a row"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
