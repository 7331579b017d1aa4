"""The table over benchmarks, from records whose scores a test prescribes."""

import copy
import hashlib
import json

import pytest

from experiments.records.files import load_records
from experiments.report import load
from experiments.report.__main__ import main
from experiments.report.benchmark_columns import benchmark_columns, column_score
from experiments.report.benchmark_rows import benchmark_rows
from experiments.report.formatting import NONE

SETTINGS = {
    "compressor": {"name": "none", "size": 1},
    "prefusion": {"layers": 0, "location": "outside"},
    "reduction": {"name": "none", "layers": []},
    "budget": {"method": "none"},
    "tiles": 1,
    "model": {"name": "tiny", "path": "asset:tiny"},
    "data": {"name": "lmms", "test_samples": 0, "include": []},
    "train": {"max_steps": 0},
}


def score(value, error=None, higher=True):
    return {"value": value, "standard_error": error, "higher_is_better": higher}


@pytest.fixture
def write(tmp_path):
    """A function that writes a record with prescribed scores, and its files of answers, to the results folder."""

    def call(name, tasks, seed=0, weights="w0", started="2026-11-29T10:00:00", documents="d0", **settings):
        config = copy.deepcopy(SETTINGS) | {"seed": seed, "name": "single"}
        for key, value in settings.items():
            group, _, setting = key.partition("__")
            config[group][setting] = value
        config["data"]["tasks"] = list(tasks)
        compressor = config["compressor"]["name"], config["reduction"]["name"]
        methods = [method for method in compressor if method != "none"]
        identity = hashlib.sha256(json.dumps([config, weights]).encode()).hexdigest()[:16]
        parts = {}
        for task, scores in tasks.items():
            file = tmp_path / "answers" / f"{task}-{identity}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("{}\n")
            parts[task] = {
                "scores": scores
                if isinstance(next(iter(next(iter(scores.values())).values())), dict)
                else {task: scores},
                "documents": 8,
                "documents_hash": documents,
                "prompt": "is it red?",
                "versions": {task: "0.0"},
                "settings_hash": "s0",
                "cost": {"flops": 1e9, "cache_bytes": 10, "visual_tokens": 36, "visual_tokens_mean": 36.0},
                "file": f"answers/{file.name}",
                "sha256": hashlib.sha256(b"{}\n").hexdigest(),
            }
        record = {
            "schema": 1,
            "id": identity,
            "experiment": "single",
            "name": f"{name}, seed {seed}",
            "status": "finished",
            "error": None,
            "config": config,
            "cost": {"flops": 1e9, "cache_bytes": 10, "visual_tokens": 36, "visual_tokens_mean": 36.0},
            "data": {"name": "lmms", "fingerprint": "f0", "examples": 8 * len(tasks)},
            "benchmarks": {"lmms_eval": "0.7.3", "weights": weights, "judge": None, "tasks": parts},
            "train": None,
            "model": {
                "label": "LLaVA" if compressor[0] == "none" else "LLaVA-Mini",
                "layers": 6,
                "visual_tokens": 36,
                "prefusion_layers": 0,
                "compressor": "+".join(methods) or "none",
                "parameters": 1000,
            },
            "provenance": {"started": started},
        }
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / f"{identity}.json").write_text(json.dumps(record))
        return record

    return call


def table_of(folder):
    return load(folder).table("benchmarks")


def row_of(table, model):
    return next(row for row in table.text.to_dict("records") if row["Model"] == model)


def test_table_shows_each_score_in_the_unit_of_the_paper_and_the_mean_share_of_the_uncut_model(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5, 0.02)}, "mme": {"mme_perception_score": score(1000.0)}})
    reduced = {"gqa": {"exact_match": score(0.4, 0.02)}, "mme": {"mme_perception_score": score(1100.0)}}
    write("tiny, 1 token by average", reduced, compressor__name="average", weights="w1")
    table = table_of(tmp_path)
    assert row_of(table, "tiny")["GQA"] == "50.0 ± 2.0"
    assert row_of(table, "tiny")["MME"] == "1000.0"
    assert row_of(table, "tiny")["Relative (%)"] == "100.0"
    assert row_of(table, "tiny, 1 token by average")["Relative (%)"] == "95.0"  # (0.8 + 1.1) / 2
    assert table.data["GQA"].tolist()[:2] == [50.0, 40.0]
    assert any("which is the row 'tiny'" in note for note in table.notes)


def test_table_has_no_relative_score_without_an_uncut_row(write, tmp_path):
    write("tiny, average", {"gqa": {"exact_match": score(0.4)}}, compressor__name="average")
    write("other", {"gqa": {"exact_match": score(0.5)}}, model__name="other", model__path="x")
    table = table_of(tmp_path)
    assert row_of(table, "tiny, average")["Relative (%)"] == NONE
    assert row_of(table, "other")["Relative (%)"] == "100.0"


def test_reduction_of_other_weights_has_no_relative_score(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5)}})
    write("tiny, fastv", {"gqa": {"exact_match": score(0.4)}}, reduction__name="fastv", weights="w1")
    write("tiny, vtw", {"gqa": {"exact_match": score(0.25)}}, reduction__name="vtw")
    table = table_of(tmp_path)
    assert row_of(table, "tiny, fastv")["Relative (%)"] == NONE
    assert row_of(table, "tiny, vtw")["Relative (%)"] == "50.0"


def test_scores_on_other_documents_than_the_uncut_model_s_do_not_count(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5)}})
    average = {"compressor__name": "average"}
    write("tiny, average", {"gqa": {"exact_match": score(0.4)}}, documents="d1", **average)
    assert row_of(table_of(tmp_path), "tiny, average")["Relative (%)"] == NONE


def test_records_with_other_task_lists_and_seeds_share_a_row(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5, 0.03)}})
    write("tiny", {"pope": {"pope_f1_score": score(0.8)}})
    write("tiny", {"gqa": {"exact_match": score(0.7, 0.04)}}, seed=1, weights="w1")
    table = table_of(tmp_path)
    row = row_of(table, "tiny")
    assert row["Seeds"] == "2"
    assert row["GQA"] == "60.0 ± 3.5"  # sqrt((9 + 16) / 2) = 3.54
    assert row["POPE"] == "80.0 (1 of 2 seeds)"


def test_relative_score_compares_the_same_seeds_and_scores_of_fewer_seeds_say_so(write, tmp_path):
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        write("tiny", {"gqa": {"exact_match": score(value)}}, seed=seed)
    average = {"compressor__name": "average"}
    write("tiny, average", {"gqa": {"exact_match": score(0.5)}}, **average)
    write("tiny, average", {"pope": {"pope_f1_score": score(0.8)}}, seed=1, **average)
    row = row_of(table_of(tmp_path), "tiny, average")
    assert row["GQA"] == "50.0 (1 of 2 seeds)"
    assert row["Relative (%)"] == "100.0"


def test_rows_of_other_data_have_labels_and_uncut_models_of_their_own(write, tmp_path):
    for version, value in (("f0", 0.5), ("f1", 0.25)):
        for name, share, settings in (("tiny", 1.0, {}), ("tiny, average", 0.8, {"compressor__name": "average"})):
            made = write(name, {"gqa": {"exact_match": score(share * value)}}, weights=version, **settings)
            made["data"]["fingerprint"] = version
            (tmp_path / "records" / f"{made['id']}.json").write_text(json.dumps(made))
    rows = table_of(tmp_path).text
    assert rows["Model"].is_unique
    measured = rows["Relative (%)"][rows["Seeds"] != NONE]
    assert sorted(measured) == ["100.0", "100.0", "80.0", "80.0"]


def test_older_weights_of_the_same_settings_are_left_out_and_named(write, tmp_path):
    old = write("tiny", {"gqa": {"exact_match": score(0.5)}}, started="2026-11-29T09:00:00")
    write("tiny", {"pope": {"pope_f1_score": score(0.8)}}, weights="w1", started="2026-11-29T11:00:00")
    table = table_of(tmp_path)
    assert "GQA" not in table.text.columns
    assert any(old["id"] in note for note in table.notes)


def test_published_scores_stand_beside_their_own_task_alone(write, tmp_path):
    names = ("gqa", "textvqa_val", "vqav2_val")
    pope = {"pope_f1_score": score(0.8)}
    write("tiny", {**{name: {"exact_match": score(0.5)} for name in names}, "pope": pope})
    row = row_of(table_of(tmp_path), "LLaVA-Mini 7B, as published")
    assert (row["GQA"], row["POPE"]) == ("60.9", "84.4†")
    assert (row["TextVQA"], row["VQAv2"], row["Relative (%)"]) == (NONE,) * 3


def test_published_scores_are_left_out_where_not_all_documents_were_answered(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5)}}, data__test_samples=8)
    assert table_of(tmp_path).text["Model"].tolist() == ["tiny"]


def test_unknown_task_has_a_column_of_its_own_name_and_lower_scores_do_not_count(write, tmp_path):
    for name, value, settings in (("tiny", 4.0, {}), ("tiny, average", 2.0, {"compressor__name": "average"})):
        tasks = {"mine": {"accuracy": score(value / 8, None)}, "errors": {"loss": score(value, None, higher=False)}}
        write(name, tasks, **settings)
    table = table_of(tmp_path)
    assert row_of(table, "tiny, average")["mine"] == "0.250"
    assert row_of(table, "tiny, average")["errors"] == "2.000"
    assert row_of(table, "tiny, average")["Relative (%)"] == "50.0"


def test_group_without_own_score_has_the_mean_over_its_tasks():
    (column,) = benchmark_columns("pope_full")
    scores = {name: {"pope_f1_score": score(value)} for name, value in (("a", 0.8), ("b", 0.9), ("c", 1.0))}
    assert column_score({"scores": scores}, "pope_full", column)["value"] == pytest.approx(90.0)


def test_rows_of_equal_names_are_told_apart_by_their_settings(write, tmp_path):
    write("checkpoint", {"gqa": {"exact_match": score(0.5)}}, model__path="a")
    write("checkpoint", {"gqa": {"exact_match": score(0.5)}}, model__path="b")
    rows = benchmark_rows(load_records(tmp_path / "records").finished)
    assert {row.label for row in rows} == {"checkpoint, model.path=a", "checkpoint, model.path=b"}


def test_report_of_benchmarks_alone_writes_the_table_and_no_figure(write, tmp_path, capsys):
    write("tiny", {"gqa": {"exact_match": score(0.5)}})
    assert main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Not drawn" not in page
    assert "Scores of public benchmarks" in page
    assert (tmp_path / "report" / "tables" / "benchmarks.tex").is_file()
    assert "GQA" in capsys.readouterr().out


def test_changed_answers_are_an_unreadable_record_in_one_line(write, tmp_path):
    write("tiny", {"gqa": {"exact_match": score(0.5)}})
    kept = write("other", {"gqa": {"exact_match": score(0.5)}}, model__path="x")
    broken = next(p for p in (tmp_path / "answers").iterdir() if kept["id"] not in p.name)
    broken.write_text("{1}\n")
    records = load_records(tmp_path / "records")
    assert [record["id"] for record in records.finished] == [kept["id"]]
    (entry,) = records.unreadable
    assert entry.reason.startswith("benchmarks.tasks.gqa.file: ")
    assert "\n" not in entry.reason
