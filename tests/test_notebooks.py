"""Every notebook runs in a Jupyter kernel, from any folder and with records of one's own, and shows what is committed."""

import importlib.util
import json
import math
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from experiments.report import load
from experiments.report.notebook import shipped_results, show
from tests.experiments.sample_records import records, write_records  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPORT_NOTEBOOKS = ("ablation_tables", "smol_study")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

_spec = importlib.util.spec_from_file_location("execute_notebooks", ROOT / "notebooks/execute.py")
assert _spec is not None
assert _spec.loader is not None
execute_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute_notebooks)


def run_notebook(path, folder, results=None):
    """Run a notebook in a kernel with a working directory.

    Args:
        path: The notebook.
        folder: The working directory.
        results: Results folder to put in the line marked `# yours:`.

    Returns:
        The outputs of every code cell, as (source, output).
    """
    book = nbformat.read(path, 4)
    for cell in book.cells:
        if results is not None and cell.cell_type == "code" and "# yours:" in cell.source:
            cell.source, count = re.subn(
                r"(?m)^results = .*# yours:.*$", f"results = Path({str(results)!r})", cell.source
            )
            assert count == 1, cell.source
    execute_notebooks.execute(book, folder)
    return [(cell.source, output) for cell in book.cells for output in cell.get("outputs", [])]


def shown_figures(outputs):
    """Return the data of every output that is a matplotlib figure."""
    shown = [output.data for _, output in outputs if "data" in output]
    return [data for data in shown if re.search(r"<\w*Figure size", data.get("text/plain", ""))]


def shown_text(outputs):
    """Return the text of every output: what a cell prints, tables as HTML, and what else it shows."""
    texts = []
    for source, output in outputs:
        data = output.get("data", {})
        if "iframe" not in data.get("text/html", ""):  # the attention page is too long to compare
            texts.append((source, output.get("text") or data.get("text/html") or data["text/plain"]))
    return texts


def differences(committed, executed):
    """Return the outputs whose words differ, or whose numbers differ by more than 2% and 0.02."""
    for (source, before), (_, after) in zip(shown_text(committed), shown_text(executed), strict=True):
        before, after = (re.sub(r" at 0x[0-9a-f]+", "", text) for text in (before, after))
        numbers = zip(NUMBER.findall(before), NUMBER.findall(after), strict=False)
        close = all(math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.02) for a, b in numbers)
        if NUMBER.sub("#", before) != NUMBER.sub("#", after) or not close:
            yield f"{source}\n--- committed\n{before}\n--- executed\n{after}"


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Let kernels use this project, and no display backend that pytest's environment names."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_in_a_kernel_shows_the_committed_outputs(path, tmp_path):
    book = nbformat.read(path, 4)
    committed = [(cell.source, output) for cell in book.cells for output in cell.get("outputs", [])]
    executed = run_notebook(path, tmp_path)
    assert not list(differences(committed, executed)), "run `make notebooks` if the change is meant"
    drawn = {"ablation_tables": 1, "attention_analysis": 7, "own_model": 3, "smol_study": 12}
    for outputs in (committed, executed):
        figures = shown_figures(outputs)
        assert len(figures) == drawn[path.stem]
        assert all("image/png" in data for data in figures)


@pytest.mark.parametrize(
    ("before", "after", "differ"),
    [
        ("59.8% right", "59.9% right", False),
        ("59.8% right", "62.0% right", True),
        ("layer 2", "layer 3", True),
        ("none of 6", "3 of 6", True),
        ("<A at 0x7f21>", "<A at 0x10ab>", False),
    ],
)
def test_differences_of_outputs_names_changed_words_and_numbers(before, after, differ):
    outputs = [[("source", {"output_type": "stream", "text": text})] for text in (before, after)]
    assert bool(list(differences(*outputs))) == differ


@pytest.mark.usefixtures("kernel")
def test_report_figure_after_pyplot_and_inline_backend_is_an_image(tmp_path):
    setups = ("", "import matplotlib.pyplot", "%matplotlib inline", "import matplotlib; matplotlib.use('Agg')")
    show_one = (
        "from experiments.report import load\nfrom experiments.report.notebook import shipped_results\n"
        "load(shipped_results('tiny')).figure('table8_compression')"
    )
    for setup in setups:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (setup, show_one)])
        nbclient.NotebookClient(book, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
        (output,) = book.cells[-1].outputs
        assert "image/png" in output.data


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", REPORT_NOTEBOOKS)
@pytest.mark.parametrize("parts", ["attention and ablation", "failed"])
def test_notebook_with_own_records_runs_and_prints_what_is_missing(name, parts, records, write_records):  # noqa: F811
    failed = [record for record in records if record["status"] == "failed"]
    results = write_records(failed if parts == "failed" else records)
    outputs = run_notebook(ROOT / "notebooks" / f"{name}.ipynb", results.parent, results)
    assert all("image/png" in data for data in shown_figures(outputs))
    missing = "".join(output.text for _, output in outputs if output.output_type == "stream")
    assert "is not in this report" in missing


@pytest.mark.parametrize("make_cwd", [lambda root: root, lambda root: root / "notebooks", lambda root: Path("/")])
def test_shipped_results_from_any_folder_finds_them(make_cwd, monkeypatch):
    monkeypatch.chdir(make_cwd(ROOT))
    assert shipped_results("smol") == ROOT / "results" / "smol"


def test_shipped_results_unknown_study_names_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^results/huge: .*# yours:") as error:
        shipped_results("huge")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_shipped_results_of_a_copied_notebook_are_found_above_it(tmp_path, monkeypatch):
    (tmp_path / "results" / "mine" / "records").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert shipped_results("mine") == tmp_path / "results" / "mine"


def test_show_prints_one_line_where_records_lack_a_measurement(capsys, tmp_path):
    report = load(shipped_results("tiny"))
    assert show(report.table, "sight") is report.table("sight")
    for make, argument in ((report.table, "none"), (report.figure, "none"), (report.frame, "none"), (load, tmp_path)):
        assert show(make, argument) is None
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1
        assert "none" in printed or str(tmp_path) in printed


def test_notebook_marks_lines_to_change_for_own_model():
    marks = {
        "attention_analysis": ("# 7B:", 2),
        "own_model": ("# yours:", 2),
        "ablation_tables": ("# yours:", 1),
        "smol_study": ("# yours:", 1),
    }
    for path in NOTEBOOKS:
        mark, count = marks[path.stem]
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert sum(mark in line for cell in cells for line in cell["source"]) == count


def test_committed_notebooks_name_no_path_of_a_machine_and_open_with_what_a_reader_learns():
    for path in NOTEBOOKS:
        text = path.read_text()
        assert str(ROOT) not in text
        opening = "".join(json.loads(text)["cells"][0]["source"])
        assert "You will learn" in opening, path.name
