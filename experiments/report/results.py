"""The report of a results folder: its records, tables, figures and claims as objects."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.records.benchmarks import is_benchmark_record
from experiments.records.files import Records, load_records, select_records
from experiments.records.views import Record, is_attention_experiment, parse_outcomes, record_seed
from experiments.report import tables
from experiments.report.analysis_names import name_analyses
from experiments.report.benchmark_samples import benchmark_samples
from experiments.report.claims.registry import Finding, judge_by_question_type, judge_claims
from experiments.report.experiment_results import ExperimentResults, match_results
from experiments.report.experiment_specs import ExperimentSpec, load_all_specs, load_specs
from experiments.report.figure_entries import FigureEntry, figure_entries
from experiments.report.fusion_depths import probed_records
from experiments.report.request import ReportRequest, parse_request
from experiments.report.run_groups import RunGroup, compare_with_baselines, group_runs
from experiments.report.tables import (
    ablation,
    benchmarks,
    blind_controls,
    claims,
    fusion_depth,
    generated_scores,
    knockout_types,
    onset,
    patch_words,
    photo_readout,
    provenance,
    question_types,
    writers,
)
from experiments.report.tables.table import Table

_VIEWS = ("image", "blank", "shuffled")
_MODEL_COLUMNS = ("visual_tokens", "compressor", "prefusion_layers")
_FRAME_COLUMNS = [
    *("record", "experiment", "name", "seed", "model", *_MODEL_COLUMNS, "question", "question_type", *_VIEWS, "guess")
]


class Report:
    """Records, tables, figures and claims of one results folder.

    `load` makes it from a folder. `python -m experiments.report` writes it to files.

    Args:
        records: The records of a results folder.
        request: Experiments and settings that the report covers; all by default.
        specs: Tables that the report may show; those of conf/experiment/ by default.
        attention_page: Attention page of some test questions, which the report links; None if there is none.
        folder: The results folder, which holds the answers to benchmarks; None if no frame of them is made.

    Raises:
        ValueError: if the request names an experiment without records, or a setting that no record has.
    """

    def __init__(
        self,
        records: Records,
        request: ReportRequest | None = None,
        specs: Sequence[ExperimentSpec] | None = None,
        attention_page: Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self.attention_page, self.folder = attention_page, folder
        request = request or ReportRequest((), {})
        self.specs: tuple[ExperimentSpec, ...] = load_specs() if specs is None else tuple(specs)
        self.records: Records = name_analyses(request.select_records(records))
        groups = group_runs(self.records)
        self.experiments: dict[str, ExperimentResults] = self._match_experiments(request, groups)
        if request.experiments:
            covered = (record for results in self.experiments.values() for record in results.records)
            self.records = select_records(self.records, covered)
            groups = group_runs(self.records)
        self.groups: tuple[RunGroup, ...] = groups
        self.probed: tuple[Record, ...] = probed_records(self.records)

    def __repr__(self) -> str:
        finished, failed = len(self.records.finished), len(self.records.failed)
        experiments = ", ".join(self.experiments) or "none"
        return f"Report of {finished} finished and {failed} failed records, experiments: {experiments}"

    def frame(self, experiment: str | None = None) -> pd.DataFrame:
        """Return the outcome of every question of every finished record, and the scores and depths of every document.

        Args:
            experiment: Only the records in the table of this experiment, with the row's label in the column `row`.

        Returns:
            One row for each record and question: `record` (identity), `experiment`, `name`, `seed`, `model` ("LLaVA" or
            "LLaVA-Mini"), `visual_tokens`, `compressor`, `prefusion_layers`, `question` (from 0), `question_type`. The
            columns `image`, `blank`, `shuffled` and `guess` are 1 if the answer is right, 0 if it is wrong, and NaN if it
            was not recorded: with the question's own image, with a blank image, with another question's image, and
            guessed from the text alone.

            Rows of benchmarks (docs/benchmarks.md) have other columns behind `prefusion_layers`: the `benchmark` of the cell,
            `task` and `doc_id`; the model's `answer`, the task's `target`, and `score_METRIC` for each metric. Where the
            cell has analyses by layer, `image` and `no_image` are 1 if `analysed_answer` is what the model writes with the
            image, and with the image hidden in all layers. `removal_depth`, `knockout_depth`, `onset` and `attention_depth`
            are the document's own (docs/fusion_depth.md), `attention` is the mass on the image by layer. What is not
            measured or not defined is missing.

        Raises:
            OSError: if a file of answers cannot be read.
            ValueError: if the report has no such experiment; if a document stands twice or has no analysis; or if there are
                benchmarks and the report was made without its folder.

        Example:
            >>> from experiments.report import load
            >>> frame = load("results/smol").frame()
            >>> float(frame.image.mean()) > float(frame.guess.mean())
            True
        """
        if experiment is None:
            return _concat_outcomes(map(self._frame_of, self.records.finished))
        results = _look_up("experiment", experiment, self.experiments)
        frames = (
            _outcome_frame(record).assign(row=row.label)
            for row in results.finished_rows
            if row.runs is not None
            for record in row.runs.finished
        )
        return _concat_outcomes(frames, "row")

    def _frame_of(self, record: Record) -> pd.DataFrame:
        if not is_benchmark_record(record):
            return _outcome_frame(record)
        if self.folder is None:
            raise ValueError("folder: None, and the frame of benchmarks needs it; use experiments.report.load(folder)")
        return _with_model_columns(record, benchmark_samples(record, self.folder))

    def table(self, name: str) -> Table:
        """Return a table by the stem of its files. Jupyter displays it; `.text` and `.data` are DataFrames.

        Raises:
            ValueError: if the report has no such table.

        Example:
            >>> from experiments.report import load
            >>> load("results/smol").table("fusion_depth").caption
            'Fusion depth of every probed model.'
        """
        return _look_up("table", name, self.tables)

    def latex(self, name: str) -> str:
        r"""Return a table as LaTeX with booktabs rules, ready for \input.

        Raises:
            ValueError: if the report has no such table.
        """
        return writers.latex(self.table(name))

    def figure(self, name: str) -> Figure:
        """Draw a figure by the stem of its files. Jupyter displays it.

        Raises:
            ValueError: if the report has no such figure, or lacks the measurements to draw it.

        Example:
            >>> from experiments.report import load
            >>> len(load("results/smol").figure("removal_by_block").axes)
            2
        """
        entry = next((entry for entry in self.figures if entry.stem == name), None)
        if entry is not None and entry.draw is None:
            raise ValueError(f"figure '{name}': {entry.caption[0].lower()}{entry.caption[1:]}")
        draw = _look_up("figure", name, self._drawable).draw
        assert draw is not None
        return draw()

    def claims(self) -> pd.DataFrame:
        """Return the paper's claims as far as these records can test them (docs/claims.md).

        Returns:
            One row for each claim and model that it was tested on: `claim`, `source` in the paper, `statement`, `model`,
            what was `compared`, `unit`, `value` with its 95% interval (`low`, `high`), the `line` above which the claim
            holds, `questions`, `seeds`, `smallest_effect`, `answer`, `reason` and `records` (identities). Shares and
            differences of accuracy are fractions.

        Example:
            >>> from experiments.report import load
            >>> claims = load("results/smol").claims().set_index("claim")
            >>> claims.answer["first_block"].unique().tolist()
            ['holds']
        """
        return self.tables["claims"].data.drop(columns="question_type")

    @functools.cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The answers to the paper's claims, one for each claim and model."""
        return judge_claims(self.groups)

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """All tables by name, in the order of the page."""
        failed_probes = [record for record in self.records.failed if is_attention_experiment(record)]
        made = (
            claims.claims_table(self.findings),
            benchmarks.benchmarks_table(self.records.finished),
            *tables.experiment_tables(tuple(self.experiments.values())),
            ablation.ablation_table(self._ablation_groups),
            fusion_depth.fusion_depth_table(self.probed, failed_probes),
            onset.onset_table(self.probed),
            blind_controls.blind_controls_table(self.probed),
            generated_scores.generated_scores_table(self.groups),
            question_types.question_type_table([g for g in self.groups if not g.only_analyses], self.probed),
            question_types.removal_by_question_type_table(self.probed),
            *knockout_types.knockout_types_tables(self.probed),
            *photo_readout.photo_readout_tables(self.probed),
            *patch_words.patch_words_tables(self.records.finished),
            claims.claims_by_question_type_table(judge_by_question_type(self.findings)),
            provenance.provenance_table(self.records),
        )
        return {table.name: table for table in made if table is not None}

    @functools.cached_property
    def figures(self) -> tuple[FigureEntry, ...]:
        """All figures with their captions, in the order of the page; a figure is drawn when its `draw` is called."""
        if self.records.finished and all(map(is_benchmark_record, self.records.finished)):
            return ()  # nothing is missing: benchmarks have a table
        # A record that holds nothing but a logit lens or swaps has no fusion depth, so it is not among the probed.
        others = [r for r in self.records.finished if r.get("lens") is not None or r.get("swaps") is not None]
        others.sort(key=lambda record: (record["name"], str(record_seed(record)), record["id"]))
        experiments = tuple(self.experiments.values())
        return tuple(figure_entries(experiments, (*self.probed, *others), self._ablation_groups, self.findings))

    @property
    def _drawable(self) -> dict[str, FigureEntry]:
        return {entry.stem: entry for entry in self.figures if entry.draw is not None}

    @functools.cached_property
    def _ablation_groups(self) -> tuple[RunGroup, ...]:
        """Groups that no experiment's table shows, or that were also run for something else, with comparisons."""
        shown = {record["id"] for results in self.experiments.values() for record in results.records}
        names = {spec.name for spec in self.specs}
        return compare_with_baselines(
            group
            for group in self.groups
            if not all(record["id"] in shown and record["experiment"] in names for record in group.records)
        )

    def _match_experiments(self, request: ReportRequest, groups: Sequence[RunGroup]) -> dict[str, ExperimentResults]:
        experiments = {}
        for spec in request.select_specs(self.specs):
            results = match_results(spec, groups, requested=bool(request.experiments))
            if results is not None:
                experiments[spec.name] = results
            elif request.experiments:
                command = f"python -m experiments.run -m experiment={spec.name}"
                raise ValueError(f"experiment {spec.name}: no record belongs to it; run `{command}` first")
        return experiments


def load(folder: Path | str, *request: str) -> Report:
    """Load the report of a results folder. No model is loaded, and nothing is trained or written.

    Args:
        folder: A results folder, which holds `records/`.
        request: Experiments and settings to select, as on the command line of `python -m experiments.report`:
            "experiment=table6_prefusion" or "train.max_steps=60".

    Returns:
        The report: `frame()`, `table(name)`, `latex(name)`, `figure(name)`, `claims()` and `records`.

    Raises:
        OSError: if the folder holds no records, or cannot be read.
        ValueError: if no record can be read, or if a word of the request is malformed or selects nothing.

    Example:
        >>> from experiments.report import load
        >>> report = load("results/smol")
        >>> report
        Report of 28 finished and 0 failed records, experiments: reducers_preset
    """
    folder = Path(folder)
    records = load_records(folder / "records")
    return Report(records, parse_request(request), load_all_specs(folder), _attention_page(records, folder), folder)


def _attention_page(records: Records, folder: Path) -> Path | None:
    """Return the attention page of the newest attention experiment that has one."""
    with_page = [
        (record["provenance"]["started"], page)
        for record in records.finished
        if is_attention_experiment(record) and (page := folder / "views" / f"{record['id']}.html").is_file()
    ]
    return max(with_page)[1] if with_page else None


def _look_up(kind: str, name: str, known: dict):
    if name not in known:
        raise ValueError(f"{kind} '{name}' is not in this report; choose from {', '.join(known) or 'none'}")
    return known[name]


def _outcome_frame(record: Record) -> pd.DataFrame:
    data = record["data"]
    outcomes = {**{view: record["accuracy"].get(view) for view in _VIEWS}, "guess": data.get("guess")}
    frame = pd.DataFrame(
        {
            "question": np.arange(data["examples"]),
            "question_type": data["kinds"],
            **{
                name: np.full(data["examples"], np.nan) if text is None else parse_outcomes(text).astype(float)
                for name, text in outcomes.items()
            },
        }
    )
    return _with_model_columns(record, frame)


def _with_model_columns(record: Record, frame: pd.DataFrame) -> pd.DataFrame:
    """Return a record's frame with columns before it that name the record and its model."""
    model = record["model"]
    columns = {
        "record": record["id"],
        "experiment": record["experiment"],
        "name": record["name"],
        "seed": record_seed(record),
        "model": model["label"],
        **{column: model[column] for column in _MODEL_COLUMNS},
    }
    return pd.concat([pd.DataFrame(columns, index=frame.index), frame], axis=1)


def _concat_outcomes(frames: Iterable[pd.DataFrame], *more_columns: str) -> pd.DataFrame:
    parts = list(frames)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*_FRAME_COLUMNS, *more_columns])
