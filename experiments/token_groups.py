"""Which position of a batch of questions is what, in the paper's terms."""

from __future__ import annotations

from transformers import PreTrainedModel

from experiments.evaluation import Inputs
from probes import TokenMap


def token_map(model: PreTrainedModel, inputs: Inputs) -> TokenMap:
    """The paper's token types: the instruction is the system prompt and the user's text together (section 3).

    Where in the picture a token lies is not asked: features in the place of pixels would not tell.
    """
    inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return TokenMap.from_inputs(model, inputs).merge({"instruction": ["system", "instruction"]})
