"""The page of command lines names every module that runs as a program, and shows the help of those with options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/reference/commands.md").read_text()
CHILD_PROCESSES = {  # another module starts them, with a request on standard input
    "experiments.benchmarks.model_cost.run",
    "experiments.benchmarks.probe_overhead.run",
    "experiments.benchmarks.ratios.measurements",
}
FORMER_NAMES = {"experiments.cost.gains", "experiments.cost.latency", "experiments.cost.paper"}


def programs() -> Iterator[str]:
    """Yield the names of the modules with code under `if __name__ == "__main__":`, as `python -m` takes them."""
    for package in ("experiments", "llava_mini", "probes"):
        for path in (ROOT / package).rglob("*.py"):
            statements = ast.parse(path.read_text()).body
            tests = (ast.unparse(each.test) for each in statements if isinstance(each, ast.If))
            if "__name__ == '__main__'" in tests:
                words = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(words[:-1] if words[-1] == "__main__" else words)


def rows() -> dict[str, str]:
    """Return what the table of the page says that each command does."""
    return dict(re.findall(r"^\| `python -m ([\w.]+)` \| (.*?) \|", PAGE, re.MULTILINE))


def test_commands_page_table_names_every_program_and_no_other():
    assert set(rows()) == set(programs()) - CHILD_PROCESSES - FORMER_NAMES


def test_commands_page_has_one_section_for_every_command_with_options():
    settings = {"experiments.run"}  # its help is the page of settings
    expected = {name for name, does in rows().items() if "no options" not in does} - settings
    shown = re.findall(r"^## ([\w.]+)\n\n```\{command-help\} ([\w.]+)\n```$", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted((name, name) for name in expected)


def test_programs_left_out_of_the_commands_page_read_a_request_or_name_the_new_command():
    sources = {name: (ROOT / f"{name.replace('.', '/')}.py").read_text() for name in CHILD_PROCESSES | FORMER_NAMES}
    assert all("json.load(sys.stdin)" in sources[name] for name in CHILD_PROCESSES)
    assert all("exit_with_new_name(" in sources[name] for name in FORMER_NAMES)
