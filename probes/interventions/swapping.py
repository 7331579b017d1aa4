"""Swaps of minimal pairs: text attends to one image in the first k layers, and to the other image in the layers after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import decoder_layers, find_decoder
from probes.hooks.image_features import reuse_image_features
from probes.hooks.layer_io import input_states, replace_input_states
from probes.hooks.partial_call import can_run_subset
from probes.replay import replay
from probes.tokens.answer_positions import answer_positions
from probes.tokens.text_after_image import text_after_image
from probes.tokens.token_map import TokenMap
from probes.unwrapping import require_eval_mode

SHARED_KEYS = "shared_kv_states"  # in calls of Gemma 3n and 4: keys and values of earlier layers


@dataclass(frozen=True, eq=False)
class Swaps:
    """Answers to minimal pairs with the images swapped from layer k on, for k = 0, 1, ..., all layers.

    Entry [k, p, s] is a run on image s of pair p in the first k layers, and on the pair's other image from there on.
    k = 0 has the other image in all layers, the last k has the own image in all layers.

    Attributes:
        answers: Token id of the right answer to each image, `[pairs, 2]`.
        difference: log p(answer to the other image) - log p(answer to the own image), in nats.
        predicted: Id of the most likely token.
    """

    answers: Int[np.ndarray, "pairs 2"]
    difference: Float[np.ndarray, "layers+1 pairs 2"]
    predicted: Int[np.ndarray, "layers+1 pairs 2"]

    @classmethod
    def join(cls, batches: Sequence[Swaps]) -> Swaps:
        """Return the pairs of several batches as one.

        Args:
            batches: Swaps of one model.

        Example:
            >>> from probes import planted
            >>> pairs = planted(layer=2, layers=4).pairs(4, changed="red")
            >>> swaps = swap_images(*pairs.arguments)
            >>> Swaps.join([swaps, swaps]).difference.shape
            (5, 8, 2)
        """
        return cls(
            np.concatenate([batch.answers for batch in batches]),
            np.concatenate([batch.difference for batch in batches], axis=1),
            np.concatenate([batch.predicted for batch in batches], axis=1),
        )

    @property
    def right(self) -> Bool[np.ndarray, " pairs"]:
        """Whether the model answers both images of a pair right when nothing is swapped."""
        return (self.predicted[-1] == self.answers).all(axis=1)

    @property
    def flipped(self) -> Bool[np.ndarray, "layers+1 pairs 2"]:
        """Whether the most likely token is the answer to the other image."""
        return self.predicted == self.answers[:, ::-1]


@torch.no_grad()
def swap_images(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], answers: Int[Tensor, "pairs 2"]
) -> Swaps:
    """Swap the two images of minimal pairs at the input of each layer, and read the answer.

    Rows 2p and 2p + 1 of the batch are pair p: one prompt, two images that differ in one property. With v_A(k) and
    t_A(k) the visual and the text states at the input of layer k in the intact run on image A, the swap into A runs
    layers k, k + 1, ... on

        text states t_A(k), visual states v_B(k)

    so text attends to A in the first k layers, and to B from there on. The other direction, states of A from layer k on
    in the run on B, is measured too: text then attends to B in the first k layers alone. Where the answer still moves
    to the other image's, text reads the property that differs in layer k or later. `reading_layer` reads this off.

    The swap is an interchange intervention (Geiger et al. 2021, arXiv 2106.02997): states of a run on another input are
    patched in, as in causal tracing (Meng et al. 2022, arXiv 2202.05262). Vision Function Layer (arXiv 2509.24791) swaps
    the visual tokens of minimal pairs in the cache, and measures how often answers change.

    Positions of the text that precede the first visual token stay. Both directions of all pairs cost one pass on the
    batch, and a pass on the text after the image for each k, on layers k and later (on all positions if the model does
    not support fewer). Images are encoded once, by LLaVA-Mini in each pass.

    Args:
        model: A transformers model with a decoder.
        tokens: Map of `inputs`. The answer is read where `probes.tokens.answer_positions` places it.
        inputs: Arguments of the model's forward call.
        answers: Token id of the right answer to each image; the two of a pair differ.

    Returns:
        The answers for k = 0, 1, ..., all layers.

    Raises:
        ValueError: The rows are no pairs, a row has no visual token, or `answers` do not fit.

    Example:
        >>> from probes import planted
        >>> pairs = planted(layer=2, layers=4).pairs(8, changed="red")
        >>> swap_images(*pairs.arguments).flipped.mean(axis=(1, 2)).tolist()  # the image in layers k + 1, ..., 4
        [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    model, decoder = require_eval_mode(model), find_decoder(model)
    _check_pairs(tokens, inputs, answers)
    layers = decoder_layers(decoder)
    text = text_after_image(tokens)
    can_run_text_alone = can_run_subset(decoder, text.shape[1]) and all(hasattr(layer, "self_attn") for layer in layers)
    partner = torch.arange(len(text)) ^ 1
    states: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(input_states(args, kwargs))

    def swap(
        number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = input_states(args, kwargs)
        mask, order = text.to(hidden.device), partner.to(hidden.device)
        for kind, key_values in (kwargs.get(SHARED_KEYS) or {}).items():
            kwargs[SHARED_KEYS][kind] = tuple(
                torch.where(mask[:, None, :, None], part[order], part) for part in key_values
            )
        # The batch is the third dimension from the end: Gemma 3n has several residual streams before it.
        others = states[number].to(hidden.device).index_select(-3, order)
        return replace_input_states(args, kwargs, torch.where(mask[..., None], others, hidden))

    runs = []
    rows = text if can_run_text_alone else None
    with reuse_image_features(model), replay(model, range(len(layers)), rows) as resume_from:
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            intact = _read_answers(model, tokens, inputs, answers)
        for number, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(partial(swap, number), with_kwargs=True)
            with hook, resume_from(number):
                # A row has its own image and the text states of its partner: it is the partner's run.
                runs.append([value[partner] for value in _read_answers(model, tokens, inputs, answers.flip(1))])
    difference, predicted = (
        torch.stack(values).unflatten(1, (-1, 2)).numpy() for values in zip(*runs, intact, strict=True)
    )
    return Swaps(answers.cpu().numpy(), difference, predicted)


def _check_pairs(tokens: TokenMap, inputs: Mapping[str, Any], answers: Int[Tensor, "pairs 2"]) -> None:
    """Check that rows 2p and 2p + 1 have one prompt, each row has an image, and each pair has two answers."""
    rows = len(tokens.labels)
    if rows % 2 or list(answers.shape) != [rows // 2, 2] or answers.is_floating_point():
        raise ValueError(
            f"answers are {answers.dtype} of shape {list(answers.shape)}, for {rows} rows: they must be one token id for "
            "each row, [rows / 2, 2]"
        )
    if (answers[:, 0] == answers[:, 1]).any():
        pair = int((answers[:, 0] == answers[:, 1]).nonzero()[0])
        raise ValueError(f"answers of pair {pair} are both token {int(answers[pair, 0])}: they must differ")
    ids = inputs["input_ids"]
    differ = (ids[0::2] != ids[1::2]).any(dim=1) | (tokens.labels[0::2] != tokens.labels[1::2]).any(dim=1).to(
        ids.device
    )
    if differ.any():
        pair = int(differ.nonzero()[0])
        raise ValueError(
            f"rows {2 * pair} and {2 * pair + 1} have different prompts: a pair differs in its images alone"
        )
    if (without := ~tokens.mask("vision").any(dim=1)).any():
        raise ValueError(f"rows {without.nonzero()[:, 0].tolist()} have no visual token: a swap needs an image")


def _read_answers(
    model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any], answers: Int[Tensor, "pairs 2"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Run the model, and compare the logits of its answers.

    Args:
        model: The model.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call. They may restrict the logits to the last positions.
        answers: Token id of the answer that each row counts as its own; the other row of the pair has the other answer.

    Returns:
        The logit of the other answer minus that of the own answer, and the most likely token.
    """
    logits = model(**{**inputs, "use_cache": False, "return_dict": True}).logits
    from_end = answer_positions(tokens) - tokens.labels.shape[1]
    if -int(from_end.min()) > logits.shape[1]:
        raise ValueError(
            f"logits cover the last {logits.shape[1]} positions: the answer is predicted {-int(from_end.min())} before "
            "the end"
        )
    at_answer = logits[torch.arange(len(logits), device=logits.device), from_end.to(logits.device)].float()
    own, other = (at_answer.gather(1, ids.reshape(-1, 1).to(logits.device))[:, 0] for ids in (answers, answers.flip(1)))
    return (other - own).cpu(), at_answer.argmax(dim=-1).cpu()
