"""The command line `python -m experiments.benchmark`, as far as it needs no lmms-eval."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from experiments.benchmark import benchmark_overrides
from experiments.config.data_schema import LmmsData


def test_overrides_give_the_configuration_of_the_hydra_form(compose_config):
    words = ["/models/it's (1), new=2", "--tasks", "gqa, pope", "--limit", "5", "--include", "a b", "--include", "c,d"]
    words += ["--batch-size", "3", "--device", "cpu", "--dtype", "bfloat16", "--results", "out, here"]
    config = compose_config(*benchmark_overrides(words))
    assert config.model.path == "/models/it's (1), new=2"
    assert (config.model.name, config.model.dtype) == ("checkpoint", "bfloat16")
    assert (config.data.tasks, config.data.include, config.data.test_samples) == (["gqa", "pope"], ["a b", "c,d"], 5)
    assert (config.batch_size, config.device, config.results) == (3, "cpu", "out, here")
    assert config.retry_failed


def test_overrides_of_a_short_command_keep_all_defaults(compose_config):
    config = compose_config(*benchmark_overrides(["asset:tiny", "--tasks", "gqa"]))
    assert config.data.test_samples == LmmsData(name="lmms", tasks=["gqa"]).test_samples == 0
    assert config.results == "results"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "gqa"], "model"),
        (["asset:tiny"], "--tasks"),
        (["asset:tiny", "--tasks", "gqa", "--limit", "0"], "'0'"),
        (["asset:tiny", "--tasks", "gqa", "--batch-size", "many"], "'many'"),
        (["asset:tiny", "--tasks", "gqa", "--judge", "x"], "--judge"),
    ],
)
def test_wrong_command_line_ends_with_status_2_and_names_the_word(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark_overrides(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed here")
def test_command_without_lmms_eval_ends_non_zero_in_one_line(tmp_path):
    words = ["asset:tiny", "--tasks", "gqa", "--results", str(tmp_path)]
    run = subprocess.run([sys.executable, "-m", "experiments.benchmark", *words], capture_output=True, text=True)
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("error: data=lmms: ")
    assert "docs/benchmarks.md" in line
    assert not list(tmp_path.rglob("*.json"))
