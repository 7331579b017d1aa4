"""The command line `python -m experiments.run`: shipped experiments and options, and one line for each wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from experiments import run
from experiments.config.documentation import settings
from experiments.config.plain import to_plain
from experiments.config.schema import Config
from experiments.errors import FULL_ERROR_VARIABLE, one_line
from experiments.files import ASSETS
from tests.experiments.conftest import required_overrides
from tests.experiments.sweeps.run_sweep import restored_logging

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
TABLE = ("experiment=table6_prefusion",)


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs the command line in this process and returns exit status, standard output and error."""
    monkeypatch.setenv(FULL_ERROR_VARIABLE, "")  # the program sets it; the test's end restores it
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        status: object = 0
        try:
            run.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    with restored_logging():
        yield call


@pytest.fixture
def assert_refused(command, tmp_path):
    """A function that asserts that a command line ends with one error line, status 1 and no record; returns the line."""

    def check(arguments: list[str], message: str) -> str:
        results = [] if any(a.startswith("results=") for a in arguments) else [f"results={tmp_path / 'results'}"]
        status, _, error = command(*arguments, *results)
        assert status == 1
        *_, last = error.strip().splitlines()
        assert last.startswith("error: ")
        assert message in last
        assert "Traceback" not in error
        assert "Error executing job" not in error  # Hydra's own line
        assert not list((tmp_path / "results").rglob("*.json"))
        return last

    return check


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_to_typed_config(compose_config, experiment):
    overrides = [f"experiment={experiment}", *required_overrides("experiment", experiment)]
    config = OmegaConf.to_object(compose_config(*overrides))
    assert isinstance(config, Config)
    assert config.name == experiment


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_option_composes_to_plain_config(compose_config, path):
    group, option = path.parent.name, path.stem
    assert yaml.safe_dump(to_plain(compose_config(f"{group}={option}", *required_overrides(group, option))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeed=1"], "seeed: no such setting (did you mean seed?)"),
        (["modle=tiny"], "modle: no such setting (did you mean model?)"),
        (["train.max_step=8"], "train.max_step: no such setting (did you mean train.max_steps?)"),
        (["seed=1=2"], "seed=1=2: "),
        (["seed"], "seed: has no '='"),
        (["seed=0,1"], "seed=0,1: several values for one run"),
        (["train.max_steps=many"], "train.max_steps=many: Value 'many'"),
        (["model=none"], "model: no option 'none'; it has checkpoint, llava-1.5-13b,"),
        (["experiment=table6_prefusio"], "experiment: no option 'table6_prefusio' (did you mean table6_prefusion?)"),
        (["data.images=photos"], "data.images: the chosen data has no such setting; it belongs to llava_json or lmms"),
        (["compressor=tome"], "compressor: no option 'tome', but compressor.name=tome exists"),
        (["probe.attention_questions=0"], "probe.attention_questions: must be at least 2, found 0"),
        (["data.rounds.place=-1"], "data.rounds.place: must be at least 0, found -1"),
        (["model=checkpoint"], "model.path"),
        (["model=checkpoint", "model.path=./no/such/folder"], "model.path: no folder './no/such/folder'"),
        (["data=llava_json", "data.path=none.json", "data.images=."], "data.path: no file 'none.json'"),
        (["data.train_samples=-1"], "data.train_samples: must be at least 0, found -1"),
        (["results=/proc/results"], "'/proc/results'"),
        (["model.dtype=int8"], "model.dtype: 'int8'"),
        (["model.attention=spda"], "model.attention: unknown 'spda'"),
        (["model.attention=flash_attention_2"], "model.attention: 'flash_attention_2' cannot run here"),
        (["model=scratch", "model.dtype=bfloat16"], "model.dtype: a model from scratch is pretrained in float32"),
        (["tiles=0"], "tiles: must be at least 1, found 0"),
        (["seed=-1"], "seed: must be at least 0, found -1"),
        (["seed=4294967296"], "seed: must be below 4294967296, found 4294967296"),
        (["batch_size=0"], "batch_size: must be at least 1, found 0"),
        (["compressor.size=-1"], "compressor.size: must be at least 0, found -1"),
        (["prefusion.layers=-1"], "prefusion.layers: must be at least 0, found -1"),
        *(
            ([f"probe.{name}=true"], f"data.test_samples: the interval of probe.{name} needs at least 2 questions")
            for name in ("attention", "removal", "onset", "knockout")
        ),
        (["data.seed=-1"], "data.seed: must be at least 0, found -1"),
        (
            ["model.dtype=float16", "train.bf16=true", "train.max_steps=1"],
            "train.bf16: bfloat16 autocast cannot train a model whose model.dtype is float16",
        ),
        (["budget.share=2"], "budget.share: must be above 0 and at most 1, found 2.0"),
        (["probe.sinks=true"], "probe.sinks: is measured with attention"),
        (["model=checkpoint", "model.path=./no/such/folder", "compressor.name=averag"], "'averag'"),
        (["probe.removal_block_size=99"], "probe.removal_block_size: 99 "),
        (["experiment=swaps", "data=shapes_video"], "probe.swaps: data 'shapes_video' has no minimal pairs"),
        (["experiment=swaps", "probe.swap_pairs=9"], "probe.swap_pairs: must be at least 10, found 9"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_main_with_wrong_setting_ends_with_one_line_and_writes_nothing(assert_refused, arguments, message):
    assert_refused([*arguments, "data.test_samples=1"], message)


@pytest.mark.parametrize("flags", [[], ["-m"]], ids=["run", "sweep"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# @package _global_\ndata: {test_samples: 4\nseed: 3\n", "experiment/mine.yaml: line 3, column 5: "),
        ("# My table.\nseed: 3\n", "error: experiment/mine: begin the file with `# @package _global_`"),
    ],
    ids=["no YAML", "no package"],
)
def test_main_with_wrong_experiment_file_ends_with_one_line(assert_refused, tmp_path, flags, content, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    assert_refused(["--config-dir", str(tmp_path), *flags, "experiment=mine"], message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.steps=5"],
        ["+train.steps=5"],
        ["++train.steps=5"],
        ["-m", "train.steps=5,6"],
        ["-m", "+train.steps=5,6"],
        ["-m", "++train.steps=5,6"],
        ["experiment=cost", "+train.steps=5"],
    ],
    ids=" ".join,
)
def test_main_with_renamed_setting_ends_with_old_and_new_name(assert_refused, arguments):
    assert_refused(arguments, "error: train.steps: renamed; use train.max_steps")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["+seeed=1"], "seeed"),
        (["++train.foo=1"], "train.foo"),
        (["-m", "+seeed=1,2"], "seeed"),
        (["-m", "++train.foo=1,2"], "train.foo"),
        (["experiment=cost", "+cost.foo=1"], "cost.foo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_main_with_unknown_setting_added_ends_with_its_name(assert_refused, arguments, key):
    assert_refused(arguments, f"error: {key}: no such setting")


@pytest.mark.parametrize(
    ("arguments", "override", "advice"),
    [
        (["~seed"], "~seed", "seed=VALUE"),
        (["-m", "experiment=table6_prefusion", "~rows"], "~rows", "rows=VALUE"),
        (["experiment=cost", "~cost"], "~cost", "cost=VALUE"),
        (["cost={text: 9}"], "cost={text: 9}", "add experiment=cost"),
        (["++cost.text=9"], "++cost.text=9", "add experiment=cost"),
        (["-m", "bench.text=9,10"], "bench.text=9", "add experiment=bench_probe"),
        (["train=null"], "train=null", "train=OPTION"),
        (["name=${nope}"], "name", "'nope'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_main_with_deleted_or_null_setting_names_override_and_advice(assert_refused, arguments, override, advice):
    assert advice in assert_refused(arguments, f"error: {override}: ")


@pytest.mark.parametrize(
    ("arguments", "override", "row", "setting"),
    [
        ([*TABLE, "row=1", "compressor.size=4"], "compressor.size=4", "row 1 ('1 token')", "compressor.size=1"),
        ([*TABLE, "row=1", "compressor=average"], "compressor=average", "row 1 ('1 token')", "compressor.name=query"),
        (["-m", *TABLE, "prefusion=paper"], "prefusion=paper", "row 0 ('LLaVA')", "prefusion.layers=0"),
        (["-m", *TABLE, "row=6", "prefusion.layers=2,3"], "prefusion.layers=3", "row 6", "prefusion.layers=2"),
        (
            ["experiment=table10_equal_flops", "row=1", "compressor.size=4"],
            "compressor.size=4",
            "FLOPs budget of table10_equal_flops",
            "compressor.size=3",
        ),
    ],
    ids=["setting", "group option", "sweep, group option", "sweep, setting", "FLOPs budget"],
)
def test_main_with_override_that_row_would_undo_is_refused(assert_refused, arguments, override, row, setting):
    line = assert_refused(arguments, f"error: {override}: ")
    assert row in line
    assert f" sets {setting};" in line


CONVERSATION = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"id": "1", "image": "broken.png", "conversations": CONVERSATION}], "broken.png"),
        ([{"id": "1", "image": "none.png", "conversations": CONVERSATION}], "none.png"),
        ({"a": 1}, "list of conversations"),
        ([{"id": "1", "text": "hello"}], "entry 0"),
    ],
    ids=["broken image", "no image", "no list", "no conversation"],
)
def test_main_with_wrong_data_file_ends_with_one_line_and_writes_nothing(assert_refused, tmp_path, entries, message):
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    assert_refused(["data=llava_json", f"data.path={tmp_path / 'data.json'}", f"data.images={tmp_path}"], message)


def test_cost_is_that_of_a_question_about_one_image(command, tmp_path):
    """The first question has none, the second two: neither is what a table's token count means."""
    shutil.copy(ASSETS / "scene.png", tmp_path)
    entries = []
    for count in (0, 2, 1):
        human = {"from": "human", "value": "<image>\n" * count + "what?"}
        image = {"image": ["scene.png"] * count} if count else {}
        entries.append({"id": str(count), **image, "conversations": [human, {"from": "gpt", "value": "this"}]})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data = ["data=llava_json", f"data.path={tmp_path / 'data.json'}", f"data.images={tmp_path}", "data.test_samples=0"]
    assert command(*data, f"results={tmp_path}")[0] == 0
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert record["cost"]["visual_tokens"] == 36


def test_main_with_checkpoint_that_lacks_weights_ends_with_one_line(assert_refused, tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    missing = next(name for name in weights if "layers.3.mlp.up_proj" in name)
    del weights[missing]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    model = ["model=checkpoint", f"model.path={tmp_path / 'model'}"]
    assert_refused([*model, "data.test_samples=1"], "lacks 1 weights, the first is")


@pytest.mark.parametrize(("value", "has_traceback"), [("", False), ("1", True)])
def test_program_with_wrong_input_shows_traceback_only_with_hydra_full_error(value, has_traceback):
    words = [sys.executable, "-m", "experiments.run", "seeed=1"]
    environment = {**os.environ, FULL_ERROR_VARIABLE: value}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "seeed" in ended.stderr
    assert ("Traceback" in ended.stderr) == has_traceback
    if not has_traceback:
        assert ended.stderr.startswith("error: seeed: no such setting")
        assert ended.stderr.endswith("`python -m experiments.run --help` lists all\n")
        assert ended.stderr.count("\n") == 1


def test_help_lists_every_setting_option_and_flag(command):
    status, text, _ = command("--retry-failed", "--help")
    assert status == 0
    lines = text.splitlines()
    for entry in settings():
        assert any(line.startswith(f"{entry.key}={entry.default}  # {entry.help}") for line in lines), entry.key
    assert re.search(r"^experiment: .*table6_prefusion", text, re.MULTILINE)
    assert "--retry-failed" in text
    assert "retry_failed: true" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-m a=1 --retry-failed b=2", "-m retry_failed=true a=1 b=2"),
        ("--retry-failed --cfg job a=1", "--cfg job retry_failed=true a=1"),
        ("a=1 --cfg job --retry-failed", "retry_failed=true a=1 --cfg job"),
        ("--retry-failed", "retry_failed=true"),
        ("-m a=1", "-m a=1"),
    ],
)
def test_with_retry_override_replaces_flag_by_override(arguments, expected):
    assert run._with_retry_override(arguments.split()) == expected.split()


def test_one_line_of_hydra_error_keeps_message_and_cause():
    error = HydraException("a\n  b")
    error.__cause__ = KeyError("c")
    assert one_line(error) == "a b 'c'"


def test_console_script_ignores_packages_of_the_current_folder(tmp_path):
    for name in ("experiments", "probes", "llava_mini", "conf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a package of the user')\n")
    assert 'llava-mini-run = "experiments.run:run_script"' in (ROOT / "pyproject.toml").read_text()
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "llava-mini-run"  # as pip writes it: its own folder comes first on the path
    script.write_text("from experiments.run import run_script\nrun_script()\n")
    words = [sys.executable, str(script), "--cfg", "job", "seed=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["seed"] == 3


def test_feature_caches_of_a_scratch_model_are_those_of_its_pretrained_tower(command, tmp_path):
    """Cells that differ in the tower's pretraining share no file, for training, validation or test images."""
    sizes = ["data.train_samples=64", "data.validation_samples=4", "data.test_samples=4"]
    training = [
        "model.caption_pretraining.max_steps=0",
        "train.max_steps=1",
        "train.eval_steps=1",
        "keep_features=true",
    ]
    for steps in (1, 2):
        pretraining = f"model.vision_pretraining.max_steps={steps}"
        assert command("model=scratch", "data=shapes", pretraining, *sizes, *training, f"results={tmp_path}")[0] == 0
        assert len(list((tmp_path / "shared").iterdir())) == 3 * steps


def test_scratch_model_without_training_of_its_own_is_pretrained(command, tmp_path):
    """Its accuracy would be that of random weights otherwise."""
    sizes = ["data.train_samples=64", "data.test_samples=4", "model.caption_pretraining.max_steps=0"]
    towers = []
    for steps in (0, 2):  # the first step of a warm-up changes nothing
        words = [f"model.vision_pretraining.max_steps={steps}", f"save={tmp_path}/{steps}", f"results={tmp_path}"]
        assert command("model=scratch", "data=shapes", "model.attention=eager", *sizes, *words)[0] == 0
        weights = load_file(tmp_path / str(steps) / "model.safetensors")
        towers.append({name: tensor for name, tensor in weights.items() if "vision_tower" in name})
    assert towers[0].keys() == towers[1].keys()
    assert not all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    records = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    assert [record["train"] for record in records] == [None, None]
    assert sum(record["provenance"]["train_seconds"] > 0 for record in records) == 1
