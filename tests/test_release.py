"""The files around a release: one version everywhere, and workflows and hooks that run what the Makefile runs."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def project_value(pattern: str) -> str:
    """Return the one match of a pattern in `pyproject.toml`. Python 3.10 cannot read TOML by itself."""
    (value,) = re.findall(pattern, PROJECT, re.MULTILINE)
    return value


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def commands_of(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def make_commands(target: str) -> list[str]:
    """Return the commands of a target in the Makefile, with the environment's folder written out."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]


def test_version_in_citation_readme_and_changelog_equals_that_of_pyproject():
    version = project_value(r'^version = "(.*)"$')
    assert load(ROOT / "CITATION.cff")["version"] == version
    assert re.search(r"version = \{(.*)\}", (ROOT / "README.md").read_text())[1] == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.*)\]", changelog, re.MULTILINE)[1]
    assert newest == version or (newest == "Unreleased" and f"This will be {version}" in changelog)


def test_citation_title_equals_that_of_the_readme():
    assert f"title = {{{load(ROOT / 'CITATION.cff')['title']}}}" in (ROOT / "README.md").read_text()


def test_python_versions_of_workflow_and_classifiers_are_those_allowed():
    allowed = SpecifierSet(project_value(r'^requires-python = "(.*)"$'))
    expected = [f"3.{minor}" for minor in range(30) if Version(f"3.{minor}") in allowed]
    jobs = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    assert jobs["python"]["strategy"]["matrix"]["python"] == expected
    assert re.findall(r"Python :: (3\.\d+)", PROJECT) == expected


def test_transformers_versions_of_workflow_are_the_oldest_and_newest_allowed():
    allowed = SpecifierSet(project_value(r'^    "transformers([^"]*)"'))
    jobs = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    oldest, newest = map(Version, jobs["transformers"]["strategy"]["matrix"]["transformers"])
    assert oldest in allowed
    assert Version(f"{oldest.major}.{oldest.minor - 1}.99") not in allowed
    assert newest in allowed
    assert Version(f"{newest.major}.{newest.minor + 1}.0") not in allowed
    constrained = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert Version(constrained) in allowed


def test_pre_commit_hooks_run_the_commands_of_make_lint():
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == make_commands("lint")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_existing_targets_with_pinned_actions_and_least_permissions(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-24.04"
        assert set(re.findall(r"make ([a-z-]+)", commands_of(job))) <= targets, name
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step["uses"]), step


def test_publish_workflow_uploads_with_trusted_publisher_and_without_token():
    jobs = load(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in yaml.safe_dump(jobs)
    assert "make dist" in commands_of(jobs["build"])
    assert "tests/test_distribution.py" in commands_of(jobs["build"])
