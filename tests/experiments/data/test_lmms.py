"""Settings and fingerprint of data=lmms, without lmms-eval."""

from importlib.metadata import PackageNotFoundError

import pytest

from experiments.config.data_schema import LmmsData
from experiments.config.plain import from_plain
from experiments.config.renamed_keys import migrate
from experiments.config.schema import CheckpointModel
from experiments.data import lmms
from experiments.data.lmms import load_benchmarks
from experiments.data.load import load_data
from experiments.files import ASSETS
from experiments.models.model_files import model_file_versions, model_files_digest

TASK = "task: mine\ndataset_path: {data}\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ndoc_to_text: !function utils.text\n"


@pytest.fixture
def installed(monkeypatch):
    """Let lmms-eval be installed, as far as the fingerprint asks."""
    monkeypatch.setattr(lmms, "version", lambda name: "0.7.3")


@pytest.fixture
def folder(tmp_path):
    """A folder with a task file, its functions and a local data set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.arrow").write_text("red")
    (tmp_path / "rows.json").write_text("[1]")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(TASK.format(data=tmp_path / "data", file=tmp_path / "rows.json"))
    (tasks / "utils.py").write_text("def text(document): return ''")
    return tmp_path


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["tasks/mine.yaml", "tasks/utils.py", "data/a.arrow", "rows.json"])
def test_fingerprint_changes_with_task_files_and_the_local_data_they_name(folder, name):
    before = load_benchmarks([str(folder / "tasks")]).fingerprint
    assert load_benchmarks([str(folder / "tasks")]).fingerprint == before
    (folder / "notes.txt").write_text("not named by the task")
    assert load_benchmarks([str(folder / "tasks")]).fingerprint == before
    (folder / name).write_text((folder / name).read_text() + " # changed")
    assert load_benchmarks([str(folder / "tasks")]).fingerprint != before


@pytest.mark.usefixtures("installed")
def test_fingerprint_does_not_depend_on_where_the_folders_lie(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "tasks"
    other.mkdir()
    for file in (folder / "tasks").iterdir():
        (other / file.name).write_text(file.read_text())
    assert load_benchmarks([str(other)]).fingerprint == load_benchmarks([str(folder / "tasks")]).fingerprint


@pytest.mark.usefixtures("installed")
def test_fingerprint_changes_with_the_version_of_lmms_eval(monkeypatch):
    before = load_benchmarks([]).fingerprint
    monkeypatch.setattr(lmms, "version", lambda name: "0.8.0")
    assert load_benchmarks([]).fingerprint != before


def test_load_data_without_lmms_eval_names_the_section_that_installs_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lmms, "version", missing)
    with pytest.raises(ImportError, match=r"data=lmms: .*Install of docs/benchmarks\.md"):
        load_data(LmmsData(name="lmms", tasks=["pope"]))


@pytest.mark.usefixtures("installed")
def test_load_data_with_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.include: .*'nowhere'"):
        load_data(LmmsData(name="lmms", tasks=["pope"], include=["nowhere"]))
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"data\.include: .*bad\.yaml"):
        load_data(LmmsData(name="lmms", tasks=["pope"], include=[str(tmp_path)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": []}, r"data\.tasks"),
        ({"tasks": ["gqa", "pope", "gqa"]}, r"data\.tasks: .*'gqa'"),
        ({"frames": 0}, r"data\.frames: .*0"),
        ({"max_frames": -1}, r"data\.max_frames: .*-1"),
        ({"test_samples": -1}, r"data\.test_samples: .*-1"),
        ({"path": "train.json"}, r"data\.images: .*train\.json"),
        ({"images": "images"}, r"data\.path: .*images"),
        ({"validation_samples": 5}, r"data\.validation_samples: 5"),
    ],
)
def test_wrong_setting_is_refused_with_its_key_and_value(settings, words):
    with pytest.raises(ValueError, match=words):
        LmmsData(**{"name": "lmms", "tasks": ["gqa"], **settings})


def test_configuration_of_a_record_is_read_back_unchanged():
    data = {"name": "lmms", "tasks": ["gqa"], "path": "a.json", "images": "b", "frames": 8}
    assert migrate({"data": data})["data"] == {**migrate({"data": {}})["data"], **data}
    config = from_plain(migrate({"model": {"name": "tiny", "path": "asset:tiny"}, "data": data}))
    assert isinstance(config.data, LmmsData)
    assert (config.data.tasks, config.data.frames) == (["gqa"], 8)


def test_model_files_digest_changes_with_the_weights_in_a_folder_and_not_with_its_path(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"1234")
        (folder / "config.json").write_text("{}")
    one, two = (model_files_digest(CheckpointModel(name="m", path=str(folder))) for folder in folders)
    assert one == two
    (folders[1] / "model.safetensors").write_bytes(b"1235")
    assert model_files_digest(CheckpointModel(name="m", path=str(folders[1]))) != one
    assert model_files_digest(CheckpointModel(name="m", path="llava-hf/llava-1.5-7b-hf")) == ""
    assert model_files_digest(CheckpointModel(name="m", path="asset:tiny"))


def test_model_file_versions_of_a_shipped_adapter_are_those_of_its_folder():
    hub = {"name": "m", "path": "llava-hf/llava-1.5-7b-hf"}
    by_name, by_folder = (
        model_file_versions(
            from_plain(
                migrate({"model": hub, "data": {"name": "shapes"}, "train": {"lora_init": adapter, "lora_rank": 2}})
            )
        )
        for adapter in ("asset:smol_grids", str(ASSETS / "smol_grids"))
    )
    assert by_name == by_folder
    assert list(by_name) == ["train.lora_init"]
