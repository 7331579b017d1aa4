"""Gradient-weighted relevancy: which positions, such as patches, the logit of an answer came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import FAMILIES, decoder_layers, find_decoder
from probes.hooks.layer_io import hidden_of, hidden_states
from probes.hooks.token_window import TokenWindow
from probes.hooks.unembedding import Unembedding
from probes.tokens.token_map import TokenMap

# Matrices of one layer that are alive at once (measured: 4.6): scores, weights, their gradients and the product.
MATRICES = 5


@dataclass(frozen=True, eq=False)
class Relevancy:
    """Of one answer token a sample, as float32 on the CPU.

    Attributes:
        rollout: Relevancy of each position for the answer through all layers together; what the answer's own position
            starts with is 1, and nothing else does.
        layers: Gradient times attention of each layer alone: mean over heads of the positive part, at the query that
            predicts the answer.
        at: Position that predicts the answer.
        answers: Token ids of the answers.
        logits: Their logits, whose gradient was taken.
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
    """Runs the model on a prompt and asks which positions the logits of the answers came from.

    With A the attention weights of a layer's heads and dA the gradient of the answer's logit with respect to them, a
    layer moves relevancy by M = mean over heads of relu(dA * A), and R <- R + M R from the first layer to the last,
    starting at the identity (Chefer et al. 2021, "Generic Attention-model Explainability", Eq. 5 and 6, for a decoder
    alone; LVLM-Interpret uses it for LLaVA). `rollout` is the answer's row of R. Only that row is carried, from the
    last layer back to the first, while each layer is run a second time on its kept input: so one layer's matrices are
    held at a time, about 20 bytes x batch x heads x positions^2 in all, and one hidden state for each layer. The model
    runs eager attention meanwhile, as the fused kernels have no weights; its own implementation is restored after.

    Relevancy is a heuristic: it follows attention and the gradient's first order, and is blind to what values carry.
    Check what it finds by an intervention.

    Args:
        model: A transformers model in eval mode, with a head.
        tokens: Map of `inputs`.
        inputs: What the model is called with: a prompt, or a prompt and (the start of) its answer.
        answers: Token ids to explain; the model's own most likely ones by default.
        at: Positions that predict them. By default the last before the first `response` position, or the last
            unpadded one in rows without a response.
        limit_gib: What one layer's matrices may take.

    Raises:
        ValueError: The model is in training mode, gives no attention weights, or its logits are not its norm and head;
            `answers` or `at` do not fit the map, or the map the inputs.
        RuntimeError: The matrices would be over the limit, or another probe is open on the model.
    """
    unembed, decoder = Unembedding(model, tokens), find_decoder(model, families=FAMILIES.values())
    layers = decoder_layers(decoder)
    if model.training:
        raise ValueError("the model is in training mode, where dropout hides attention: call model.eval() first")
    if _probed(decoder):
        raise RuntimeError("another probe is open on this model: leave its block first, relevancy runs layers twice")
    batch, length = tokens.labels.shape
    heads = decoder.config.num_attention_heads
    gib = 4 * MATRICES * batch * heads * length**2 / 2**30
    if gib > limit_gib:
        raise RuntimeError(
            f"one layer's attention of {batch} x {heads} heads x {length}^2 positions takes {gib:.1f} GiB, over the limit"
            f" of {limit_gib:g}: use fewer samples at a time, or raise limit_gib"
        )
    # Tensors made in inference mode cannot enter the backward pass, hence the copies too.
    with torch.inference_mode(False):
        at = _answer_positions(tokens) if at is None else at.cpu().clone()
        if at.shape != (batch,) or not ((at >= 0) & (at < length)).all():
            raise ValueError(f"at must give one position from 0 to {length - 1} for each of {batch} samples")
        if answers is not None and answers.shape != (batch,):
            raise ValueError(f"answers have shape {list(answers.shape)}: one token id for each of {batch} is needed")
        rows = torch.arange(batch)
        with _eager(decoder):
            calls, last, logits = _run(model, decoder, unembed, tokens, inputs, at)
            unembed.check(last[rows, at], logits)
            answers = logits.argmax(-1).cpu() if answers is None else answers.cpu().clone()
            last = last.detach().requires_grad_()
            with torch.enable_grad():
                score = unembed(last[rows, at])[rows, answers]
            (gradient,) = torch.autograd.grad(score.sum(), last)

            row = nn.functional.one_hot(at, length).float()
            alone: list[Tensor] = []
            for layer, (args, kwargs) in zip(reversed(layers), reversed(calls), strict=True):
                moved, gradient = _step(layer, args, kwargs, gradient)
                alone.append(moved[rows, at].cpu())
                row = row + torch.einsum("bq,bqk->bk", row.to(moved.device), moved).cpu()
    return Relevancy(row, torch.stack(alone[::-1]), at, answers, score.detach().cpu())


def _answer_positions(tokens: TokenMap) -> Int[Tensor, " batch"]:
    labels = tokens.labels.cpu()
    places = torch.arange(labels.shape[1]).expand_as(labels)
    pad = labels == tokens.index("pad") if "pad" in tokens.groups else torch.zeros_like(labels, dtype=torch.bool)
    last = places.masked_fill(pad, -1).amax(1)
    if "response" not in tokens.groups:
        return last
    response = labels == tokens.index("response")
    first = places.masked_fill(~response, labels.shape[1]).amin(1)
    return torch.where(response.any(1), first - 1, last)


def _probed(decoder: PreTrainedModel) -> bool:
    """Whether another probe listens in. Other hooks may stay, such as those that transformers leaves for its own use."""
    hooks = (
        hook
        for module in decoder.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any((getattr(hook, "__module__", None) or "").startswith(f"{__package__}.") for hook in hooks)


@contextmanager
def _eager(decoder: PreTrainedModel) -> Iterator[None]:
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(implementation)


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    unembed: Unembedding,
    tokens: TokenMap,
    inputs: Mapping[str, Any],
    at: Int[Tensor, " batch"],
) -> tuple[list[tuple[Any, Any]], Tensor, Tensor]:
    """One plain forward pass: what each layer and the final norm were called with, and the logits at `at`."""
    calls: list[tuple[Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(TokenWindow(decoder, tokens))
        for module in (*decoder_layers(decoder), unembed.norm):
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        logits = model(**{**inputs, "use_cache": False}).logits[torch.arange(len(at)), at]
    args, kwargs = calls.pop()
    return calls, hidden_states(args, kwargs), logits


def _step(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Float[Tensor, "batch positions width"]
) -> tuple[Float[Tensor, "batch queries keys"], Float[Tensor, "batch positions width"]]:
    """Runs one layer again: how it moves relevancy, and the gradient with respect to its input."""
    kept: list[Tensor] = []
    attention = layer.get_submodule("self_attn")
    handle = attention.register_forward_hook(lambda module, args, output: kept.append(output[1]))
    hidden = hidden_states(args, kwargs).detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = hidden_of(
                layer(hidden, *args[1:], **{name: value for name, value in kwargs.items() if name != "hidden_states"})
            )
    finally:
        handle.remove()
    if kept[0] is None:
        raise ValueError(f"{type(attention).__name__} gives no attention weights under eager attention")
    slope, before = torch.autograd.grad(output, [kept[0], hidden], gradient.to(output.device))
    return (slope * kept[0].detach()).relu_().mean(1).float(), before
