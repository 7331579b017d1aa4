"""`record_attention` with some statistics only: mass from the kernel's own log-sum-exp, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from probes import BlockAttention, RemoveTokens, TokenMap, intervene, record_attention
from probes.attention import layout
from tests.probes.attention_reference import check_record, expected_statistics, label_responses

Inputs = dict[str, torch.Tensor]


@torch.no_grad()
@pytest.mark.parametrize("visibility", [2**22, 60])
@pytest.mark.parametrize("side", ["left", "right"])
def test_record_attention_mass_alone_equals_full_matrices(
    make_llava: Callable[..., Any],
    make_inputs: Callable[..., Inputs],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    visibility: int,
) -> None:
    monkeypatch.setattr(layout, "VISIBILITY_PER_CHUNK", visibility)
    model, inputs = make_llava(), label_responses(make_inputs(side))
    tokens = TokenMap.from_inputs(model, inputs)
    attentions = make_llava("eager")(**inputs, output_attentions=True).attentions
    plain = model(**inputs).logits
    with record_attention(model, tokens, statistics=["mass"]) as attention:
        recorded = model(**inputs).logits
    assert torch.equal(plain, recorded)
    expected = expected_statistics(attentions, tokens, attention.targets)
    check_record(attention, {name: expected[name] for name in ("mass", "queries")})


@torch.no_grad()
def test_record_attention_mass_alone_computes_no_scores_of_widest_source(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vision has 4 columns of the call, the 7 instruction tokens more: their scores are not computed."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    widths: list[int] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(
        Tensor, "softmax", lambda *args, **kwargs: widths.append(args[0].shape[-1]) or softmax(*args, **kwargs)
    )
    with record_attention(model, tokens, statistics=["mass"]):
        model(**inputs)
    assert max(widths) == 4
    widths.clear()
    with record_attention(model, tokens, statistics=["mass", "entropy"]):
        model(**inputs)
    assert max(widths) == 7


@pytest.mark.parametrize("autograd", [False, True])
def test_record_attention_mass_alone_in_generation_equals_default(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs], autograd: bool
) -> None:
    """In a step, transformers packs the heads that share keys into the queries."""
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    records = []
    for statistics in (["mass"], ["mass", "entropy"]):
        with torch.set_grad_enabled(autograd), record_attention(model, tokens, statistics=statistics) as attention:
            model(**inputs)
        records.append(attention)
        with record_attention(model, tokens, statistics=statistics) as attention:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        records.append(attention)
    torch.testing.assert_close(records[0].mass, records[2].mass, equal_nan=True, rtol=0, atol=1e-6)
    torch.testing.assert_close(records[1].mass, records[3].mass, equal_nan=True, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask", "drop", "block"])
def test_record_attention_mass_alone_with_intervention_equals_default(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs], kind: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    change: Any = BlockAttention("instruction", "instruction", [1])
    if kind != "block":
        change = RemoveTokens("vision", [1], how=kind)  # type: ignore[arg-type]
    records = []
    for statistics in (["mass"], ["mass", "entropy"]):
        with (
            intervene(model, tokens, change),
            record_attention(model, tokens, statistics=statistics) as attention,
        ):
            model(**inputs)
        records.append(attention.mass)
    torch.testing.assert_close(records[0], records[1], equal_nan=True, rtol=0, atol=1e-6)
    assert records[0][1].isnan().sum() > records[0][0].isnan().sum()


@torch.no_grad()
def test_attention_record_without_a_statistic_raises_runtime_error(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs]
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, statistics=["contribution"]) as attention:
        model(**inputs)
    assert attention.statistics == ("mass", "contribution")
    assert list(attention.frame().columns[5:]) == ["mass", "contribution", "queries"]
    for name in ("entropy", "received", "sink_rate", "value_norm"):
        with pytest.raises(RuntimeError, match=f"{name} was not recorded, only mass, contribution"):
            getattr(attention, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": ["masses"]}, "statistics: 'masses'.*contribution"),
        ({"statistics": ["contribution"], "backend": "nnsight"}, "statistics: backend='nnsight'.*'contribution'"),
    ],
)
def test_record_attention_with_invalid_statistics_raises_value_error(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Inputs], arguments: dict[str, Any], message: str
) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    with pytest.raises(ValueError, match=message), record_attention(model, tokens, **arguments):
        pass
