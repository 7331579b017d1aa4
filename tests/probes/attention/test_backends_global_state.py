"""What the imports of nnsight and TransformerLens leave changed in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Records through a back end, then compares torch's methods with those before.
CODE = """
import warnings
import torch
{first}
from probes import TokenMap, planted, record_attention
backward, gradient, filters = torch.Tensor.backward, torch.Tensor.grad, list(warnings.filters)
planted_model = planted(layer=1, layers=2)
model, inputs = planted_model.model, planted_model.samples(2).inputs
with torch.no_grad(), record_attention(model, TokenMap.from_inputs(model, inputs), backend={backend!r}) as record:
    model(**inputs)
record.mass
assert torch.Tensor.backward is backward and torch.Tensor.grad is gradient and warnings.filters == filters
"""


@pytest.mark.parametrize("backend", ["nnsight", "transformer_lens"])
def test_record_attention_with_backend_leaves_torch_as_it_was(backend: str) -> None:
    run(CODE.format(first="", backend=backend))


def test_record_attention_caller_imported_nnsight_keeps_its_backward() -> None:
    """A caller who imports nnsight uses its gradient traces: `with loss.backward():`."""
    run(CODE.format(first="import nnsight", backend="nnsight"))


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
