"""The text after the first visual token of each row, against a loop over positions."""

import pytest
import torch

from probes.tokens.text_after_image import text_after_image
from probes.tokens.token_map import TokenMap


@pytest.mark.parametrize("groups", [("pad", "vision", "instruction", "response"), ("system", "vision", "instruction")])
def test_text_after_image_equals_a_loop_over_positions(groups):
    labels = torch.randint(len(groups), (40, 7), generator=torch.Generator().manual_seed(0))
    expected = []
    for row in labels.tolist():
        seen = False
        for label in row:
            seen = seen or groups[label] == "vision"
            expected.append(seen and groups[label] not in ("vision", "pad"))
    tokens = TokenMap(labels, groups=groups, generated=groups[-1])
    assert text_after_image(tokens).flatten().tolist() == expected
