"""Gradient-weighted attention relevancy: how much each position, such as an image patch, contributed to an answer's logit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.compiled_code import EagerExecution
from probes.hooks.decoder import MASK_FORMATS, decoder_layers, find_decoder
from probes.hooks.layer_io import input_states, output_states
from probes.hooks.token_window import TokenWindow
from probes.hooks.unembedding import Unembedding
from probes.tokens.answer_positions import answer_positions
from probes.tokens.token_map import TokenMap
from probes.unwrapping import require_eval_mode

# Attention matrices of one layer that are in memory at once: scores, weights, their gradients and the product.
# Measured: 4.6.
MATRICES_PER_LAYER = 5


@dataclass(frozen=True, eq=False)
class Relevancy:
    """Relevancy of each position for one answer token a sample, as float32 on the CPU.

    Attributes:
        rollout: Relevancy of each position for the answer through all layers together. The position that predicts the
            answer starts at 1, all others at 0.
        layers: Gradient times attention of each layer alone: mean over heads of the positive part, at the query that
            predicts the answer.
        at: Position that predicts the answer.
        answers: Token ids of the answers.
        logits: Logits of the answers, whose gradient was taken.
    """

    rollout: Float[Tensor, "batch positions"]
    layers: Float[Tensor, "layers batch positions"]
    at: Int[Tensor, " batch"]
    answers: Int[Tensor, " batch"]
    logits: Float[Tensor, " batch"]


def relevancy(
    model: PreTrainedModel,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    answers: Int[Tensor, " batch"] | None = None,
    at: Int[Tensor, " batch"] | None = None,
    limit_gib: float = 8.0,
) -> Relevancy:
    """Compute how much each position contributed to the logits of the answers.

    Let A be the attention weights of a layer's heads and dA the gradient of the answer's logit with respect to them. A
    layer moves relevancy by M = mean over heads of relu(dA * A), and R <- R + M R from the first layer to the last,
    starting at the identity. This is Chefer et al. 2021, "Generic Attention-model Explainability", Eq. 5 and 6, for a
    decoder alone; LVLM-Interpret uses it for LLaVA. `rollout` is the answer's row of R.

    Only that row is computed, from the last layer back to the first; each layer runs a second time on its stored input.
    So memory holds the matrices of one layer, about 20 bytes x batch x heads x positions^2, and one hidden state for
    each layer. The model runs eager attention meanwhile, because the fused kernels return no weights. Its own
    implementation is restored afterwards.

    Relevancy is a heuristic: it follows attention and the first order of the gradient, and ignores the content of the
    values. Check its findings with an intervention.

    Args:
        model: A transformers model in eval mode, with a head.
        tokens: Map of `inputs`.
        inputs: Arguments of the model's forward call: a prompt, or a prompt and (the start of) its answer.
        answers: Token ids to explain, `[batch]`, or a list of them; by default the model's own most likely ones.
        at: Positions that predict them, `[batch]`, or a list. By default the position before the first `response` position, or
            the last unpadded one in rows without a response.
        limit_gib: Memory limit in GiB for the matrices of one layer.

    Returns:
        The relevancy of all positions.

    Raises:
        ValueError: The model is in training mode, returns no attention weights, or computes its logits by more than its
            norm and head; `answers` or `at` do not fit the map, or the map does not fit the inputs.
        RuntimeError: The matrices would exceed the limit, or another probe is open on the model.

    Example:
        >>> answer = relevancy(model, tokens, inputs)
        >>> answer.rollout[tokens.mask("vision")].shape
        torch.Size([36])
    """
    model = require_eval_mode(model)
    unembed, decoder = Unembedding(model, tokens), find_decoder(model, mask_formats=MASK_FORMATS.values())
    layers = decoder_layers(decoder)
    if hybrid := [number for number, layer in enumerate(layers) if not hasattr(layer, "self_attn")]:
        raise ValueError(
            f"layers {hybrid} of {type(decoder).__name__} have no attention weights to follow (no self_attn)"
        )
    if any(getattr(layer.self_attn, "is_kv_shared_layer", False) for layer in layers):
        raise ValueError(f"layers of {type(decoder).__name__} share keys: gradients cannot be taken layer by layer")
    if _has_open_probe(decoder):
        raise RuntimeError("another probe is open on this model: leave its block first, as relevancy runs layers twice")
    batch, length = tokens.labels.shape
    heads = decoder.config.num_attention_heads
    gib = 4 * MATRICES_PER_LAYER * batch * heads * length**2 / 2**30
    if gib > limit_gib:
        raise RuntimeError(
            f"one layer's attention of {batch} x {heads} heads x {length}^2 positions takes {gib:.1f} GiB, over the limit"
            f" of {limit_gib:g}: use fewer samples at a time, or raise limit_gib"
        )
    # Tensors made in inference mode cannot enter the backward pass, so leave that mode and copy what was given.
    with torch.inference_mode(False):
        at = answer_positions(tokens) if at is None else torch.as_tensor(at).cpu().clone()
        if at.shape != (batch,) or not ((at >= 0) & (at < length)).all():
            raise ValueError(
                f"at is {at.tolist()}: it must hold one position from 0 to {length - 1} for each of {batch} samples"
            )
        answers = None if answers is None else torch.as_tensor(answers)
        if answers is not None and answers.shape != (batch,):
            raise ValueError(f"answers have shape {list(answers.shape)}: one token id for each of {batch} is needed")
        samples = torch.arange(batch)
        with _eager_attention(decoder), EagerExecution(decoder):
            calls, last_hidden, logits = _record_layer_calls(model, decoder, unembed, tokens, inputs, at)
            unembed.check(last_hidden[samples, at], logits)
            answers = logits.argmax(-1).cpu() if answers is None else answers.cpu().clone()
            if not ((answers >= 0) & (answers < logits.shape[-1])).all():
                raise ValueError(f"answers are {answers.tolist()}: use token ids from 0 to {logits.shape[-1] - 1}")
            last_hidden = last_hidden.detach().requires_grad_()
            with torch.enable_grad():
                answer_logits = unembed(last_hidden[samples, at])[samples, answers]
            (gradient,) = torch.autograd.grad(answer_logits.sum(), last_hidden)

            rollout = nn.functional.one_hot(at, length).float()
            layer_relevancy: list[Tensor] = []
            for layer, (args, kwargs) in zip(reversed(layers), reversed(calls), strict=True):
                weighted, gradient = _backpropagate_layer(layer, args, kwargs, gradient)
                layer_relevancy.append(weighted[samples, at].cpu())
                rollout = rollout + torch.einsum("bq,bqk->bk", rollout.to(weighted.device), weighted).cpu()
    return Relevancy(rollout, torch.stack(layer_relevancy[::-1]), at, answers, answer_logits.detach().cpu())


def _has_open_probe(decoder: PreTrainedModel) -> bool:
    """Return whether a hook of this package is on the decoder.

    Other hooks may stay, such as those that transformers leaves for its own use.
    """
    hooks = (
        hook
        for module in decoder.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any((getattr(hook, "__module__", None) or "").startswith(f"{__package__}.") for hook in hooks)


@contextmanager
def _eager_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Run eager attention inside the block."""
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(implementation)


@torch.no_grad()
def _record_layer_calls(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    unembed: Unembedding,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    at: Int[Tensor, " batch"],
) -> tuple[list[tuple[Any, Any]], Tensor, Tensor]:
    """Run one forward pass, and return the arguments of each layer, the final norm's input, and the logits at `at`."""
    calls: list[tuple[Any, Any]] = []

    def record_call(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(TokenWindow(decoder, tokens))
        for module in (*decoder_layers(decoder), unembed.norm):
            stack.callback(module.register_forward_pre_hook(record_call, with_kwargs=True).remove)
        # The answer's logit may be any position's, so `inputs` cannot restrict which ones are computed.
        arguments = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
        logits = model(**{**arguments, "use_cache": False, "return_dict": True}).logits[torch.arange(len(at)), at]
    args, kwargs = calls.pop()
    return calls, input_states(args, kwargs), logits


def _backpropagate_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Float[Tensor, "batch positions width"]
) -> tuple[Float[Tensor, "batch queries keys"], Float[Tensor, "batch positions width"]]:
    """Run one layer again, and return M of `relevancy` and the gradient with respect to the layer's input."""
    attention_weights: list[Tensor] = []
    attention = layer.get_submodule("self_attn")
    handle = attention.register_forward_hook(lambda module, args, output: attention_weights.append(output[1]))
    hidden = input_states(args, kwargs).detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = output_states(
                layer(hidden, *args[1:], **{name: value for name, value in kwargs.items() if name != "hidden_states"})
            )
    finally:
        handle.remove()
    weights = attention_weights[0]
    if weights is None:
        raise ValueError(f"{type(attention).__name__} returns no attention weights under eager attention")
    weights_gradient, input_gradient = torch.autograd.grad(output, [weights, hidden], gradient.to(output.device))
    return (weights_gradient * weights.detach()).relu_().mean(1).float(), input_gradient
