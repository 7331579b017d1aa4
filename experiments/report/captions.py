"""The figures of a report in their order, each drawn with its caption, or a hole with the reason it was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from experiments.records.views import Record, describe
from experiments.report import figures
from experiments.report.experiment_results import Study
from experiments.report.run_groups import Cell, told_apart


@dataclass(frozen=True)
class Drawing:
    """One figure of the report; `figure` is None where it could not be drawn, and `caption` then says why."""

    stem: str
    title: str
    caption: str
    figure: Figure | None


def draw(studies: Sequence[Study], probed: Sequence[Record], ablation: Sequence[Cell]) -> Iterator[Drawing]:
    """Draw every figure: each study, and its cost where rows differ in it; the probes of the first of the probed records
    that holds them; the largest group of the ablation's cells.

    Where there are studies, figures of other experiments that were not run are not missed.
    """
    for study in studies:
        if study.finished:
            yield Drawing(study.name, study.definition.title, _rows(study), figures.rows_figure(study))
            if figures.costs_apart(study):
                title = f"Accuracy against cost: {study.name}"
                yield Drawing(f"{study.name}{COST}", title, _STUDY_COST, figures.study_cost_figure(study))
        else:
            yield Drawing(study.name, study.definition.title, "Not drawn: no row is finished.", None)
    for stem, title, needs, draw_record, caption in _PROBES:
        record = next((record for record in probed if record.get(needs) is not None), None)
        if record is not None:
            yield Drawing(stem, title, f"{caption(record)} {_source(record)}", draw_record(record))
        elif probed or not studies:
            why = next((f" ({note})" for record in probed if (note := record.get(f"{needs}_note"))), "")
            yield Drawing(stem, title, f"Not drawn: no finished record holds {needs} measurements{why}.", None)
    if studies and not ablation:
        return
    families = Counter(cell.family for cell in ablation if cell.finished)
    # Cells trained otherwise, or on other data, cannot share axes with these.
    drawn = told_apart([cell for cell in ablation if families and cell.family == families.most_common(1)[0][0]])
    for stem, title, draw_cells, text in _SWEEPS:
        try:
            figure = draw_cells(drawn)
        except ValueError as error:
            yield Drawing(stem, title, f"Not drawn: {error}.", None)
        else:
            yield Drawing(stem, title, f"{text} {_sample(drawn)}{_left_out(len(families))}", figure)


def _rows(study: Study) -> str:
    seeds = " Small dots: single seeds." if len(study.seeds) > 1 else ""
    return (
        "Accuracy of each row, with its 95% bootstrap interval over examples and seeds, and the FLOPs of one prompt."
        f"{seeds} Lines: the first row, and what is right without sight."
    )


def _sample(cells: Sequence[Cell]) -> str:
    finished = [cell for cell in cells if cell.finished]
    runs = sorted({len(cell.finished) for cell in finished})
    devices = sorted({r["provenance"].get("device") or "device unknown" for cell in finished for r in cell.finished})
    return (
        f"Bars are 95% bootstrap intervals over examples and seeds; n = {finished[0].examples} test examples a seed, "
        f"{_span(runs)} seed{'s' if runs[-1] > 1 else ''} a cell; {', '.join(devices)}."
    )


def _left_out(families: int) -> str:
    if families == 1:
        return ""
    return f" Drawn is the largest of {families} groups of cells trained alike on the same data; the table lists all."


def _source(record: Record) -> str:
    device = record["provenance"].get("device", "device unknown")
    return f"Model: {describe(record)} (one seed), data {record['data']['name']}, {device}, record {record['id']}."


def _mass(record: Record) -> str:
    attention = record["attention"]
    note = attention.get("queries_note")
    return (
        "Share of a query's attention that falls on a group of tokens, averaged over heads and queries"
        f"{f' ({note})' if note else ''}. Line and band: mean and 95% bootstrap interval over "
        f"n = {attention['samples']} samples. {_controls(record)}"
    )


def _entropy(record: Record) -> str:
    return (
        "Entropy in nats of the attention renormalised within a group of tokens: high where attention is spread "
        "evenly, low where it falls on few tokens. Line and band: mean and 95% bootstrap interval over "
        f"n = {record['attention']['samples']} samples. {_controls(record)}"
    )


def _controls(record: Record) -> str:
    control = (record["attention"].get("control") or {}).get("name")
    dashed = f"Dashed: {control}." if control else "No control model was recorded."
    return f"{dashed} Dotted: attention spread evenly over all visible tokens."


def _removal(record: Record) -> str:
    random = record["removal"].get("random_inside")
    control = "; open squares hide as many random text tokens instead" if random else ""
    return (
        f"Left: visual tokens hidden inside one block of layers and visible in all others{control}. Right: visual "
        "tokens hidden from a layer onward, so that only the first layers see them; the shaded range is the 95% "
        "interval of the fusion depth. "
        f"Bars and band: 95% bootstrap intervals over n = {record['data']['examples']} examples."
    )


def _fusion(record: Record) -> str:
    knockout, readout = record.get("knockout"), record.get("readout")
    parts = ["Where text takes in the picture, by what was measured."]
    if record.get("attention") is not None:
        parts.append("Attention says where text looks.")
    if record.get("removal") is not None:
        parts.append("Removal: accuracy with vision hidden from a layer on.")
    if knockout is not None:
        parts.append(f"Knock-out: accuracy with all text cut off from vision in {_layers(knockout['width'])}.")
    if readout is not None:
        parts.append(
            "Read-out: share of right answers that a linear classifier reads off the mean state of the question, on "
            f"pictures it was not trained on (n = {readout['samples']}); after 0 layers it has the question's words alone."
        )
    parts.append("Bands: 95% bootstrap intervals. Dotted line and shade: the curve's fusion depth and its interval.")
    return " ".join(parts)


def _lens(record: Record) -> str:
    guess = record["data"].get("guess") is not None
    return (
        "What the model's own final norm and head read where the answer is to begin, after each layer. Above: share of "
        "questions for which the right answer's first token ranks first of the vocabulary; below: that token's mean "
        "log-probability. After 0 layers it is the embedding that is read, after all of them the model's own prediction. "
        f"Band: 95% bootstrap interval over n = {record['lens']['samples']} questions."
        f"{' The text-only guess is right where the whole answer is.' if guess else ''}"
    )


def _layers(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers in a row"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


_FRONT = "Broad dashes join the {} that no other beats in mean accuracy at the same cost or less (the Pareto front)."
_STUDY_COST = (
    "Accuracy of the rows, numbered in their order, with 95% bootstrap intervals over examples and seeds, against what "
    "one prompt costs: a panel for each cost that was measured and in which rows differ. "
    f"{_FRONT.format('rows')} Horizontal lines: what is right without sight."
)
_PROBES: tuple[tuple[str, str, str, Callable[[Record], Figure], Callable[[Record], str]], ...] = (
    ("removal_by_block", "Accuracy without visual tokens", "removal", figures.removal_figure, _removal),
    ("fusion_by_curve", "Fusion depth by curve", "knockout", figures.fusion_figure, _fusion),
    ("attention_by_layer", "Attention mass by layer", "attention", figures.attention_figure, _mass),
    ("entropy_by_layer", "Attention entropy by layer", "attention", figures.entropy_figure, _entropy),
    ("lens_by_layer", "The right answer's first word by layer: logit lens", "lens", figures.lens_figure, _lens),
)
_SWEEPS: tuple[tuple[str, str, Callable[[Sequence[Cell]], Figure], str], ...] = (
    (
        "ablation",
        "Accuracy by visual tokens, pre-fusion depth and compressor",
        figures.ablation_figure,
        "Test accuracy of every ablation cell; horizontal lines are plain LLaVA and the controls without a picture; a "
        "cross marks a cell that failed. Points are set apart sideways to keep bars readable.",
    ),
    (
        "accuracy_vs_cost",
        "Accuracy against cost",
        figures.cost_figure,
        "Test accuracy against the FLOPs of one prompt, and where they were measured against the time that its prefill "
        "takes and the bytes of keys and values that it leaves in the language model's cache; the star is plain LLaVA. "
        f"{_FRONT.format('cells')}",
    ),
)
COST = "_cost"
"""What the figure of a study's cost has behind the study's name."""
STEMS = tuple(entry[0] for entry in (*_PROBES, *_SWEEPS))
