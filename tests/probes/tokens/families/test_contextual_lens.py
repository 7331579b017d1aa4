"""Word states of the contextual lens on every model family, against the model's own hidden states of each text alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from probes import contextual_lens
from tests.probes.tokens.families.build import MODEL_FAMILIES, tiny
from tests.probes.tokens.families.tiny_family import LAYERS

TEXTS = ["see the cat", "two red cats run", "a ring"]


@pytest.mark.parametrize("family", [family for family in MODEL_FAMILIES if family != "gemma3n"])
def test_contextual_lens_states_equal_hidden_states_of_each_text_alone(family: str) -> None:
    """Depths up to the last but one: transformers applies the final norm to the last of its hidden states."""
    torch.manual_seed(0)
    model, tokenizer = tiny(family).model().eval(), tiny(family).processor.tokenizer
    depths = list(range(1, LAYERS))
    lens = contextual_lens(model, tokenizer, TEXTS, depths=depths)
    expected, words = [], []
    for text in sorted(TEXTS, key=len):  # the byte tokenizer has a token for each letter
        encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        with torch.no_grad():
            output = model.get_decoder()(input_ids=encoding["input_ids"], output_hidden_states=True)
        ends = [text.index(word) + len(word) for word in text.split()]
        last = [[int(stop) for _, stop in encoding["offset_mapping"][0]].index(end) for end in ends]
        expected += [torch.stack([output.hidden_states[d][0, p] for d in depths]) for p in last if p]
        words += [word for word, position in zip(text.split(), last, strict=True) if position]
    assert list(lens.words) == words
    states = normalize(torch.stack(expected, 1).float(), dim=-1)
    torch.testing.assert_close(lens.states.float(), states, rtol=0, atol=1e-3)
