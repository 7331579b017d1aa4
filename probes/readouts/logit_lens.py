"""Logit lens: what the model's own final norm and head read from the residual stream after every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import FAMILIES, decoder_layers, find_decoder
from probes.hooks.layer_io import hidden_states
from probes.hooks.token_window import TokenWindow
from probes.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

from probes.hooks.unembedding import Unembedding

# Logits held at once (64 MiB in float32).
LOGITS_PER_CHUNK = 2**24


class LogitLens:
    """The most likely next words at chosen positions after every layer, in order of sample and position, on the CPU.

    Attributes:
        depths: After how many layers; 0 is the embeddings, the model's number of layers its own output.
        tokens: The map of the inputs.
        positions: Which positions of the map were read.
        ids: Top token ids `[depths, kept, top]`, most likely first.
        logprobs: Their log-probabilities in nats, float32.
        tracked: Token ids that were followed wherever they rank.
        tracked_logprobs: Their log-probabilities `[depths, kept, tracked]`.
        tracked_ranks: Their ranks, 1 for the most likely token of the vocabulary.
    """

    def __init__(
        self,
        tokens: TokenMap,
        positions: Bool[Tensor, "batch positions"],
        depths: tuple[int, ...],
        top: int,
        tracked: tuple[int, ...],
    ) -> None:
        self.depths, self.tokens, self.positions, self.tracked = depths, tokens, positions.cpu(), tracked
        kept = int(self.positions.sum())
        self._slots = (self.positions.flatten().long().cumsum(0) - 1).view_as(self.positions)
        self._read = torch.zeros(len(depths), kept, dtype=torch.bool)
        self._ids = torch.empty(len(depths), kept, top, dtype=torch.long)
        self._logprobs = torch.empty(len(depths), kept, top)
        self._tracked_logprobs = torch.empty(len(depths), kept, len(tracked))
        self._tracked_ranks = torch.empty(len(depths), kept, len(tracked), dtype=torch.long)

    @property
    def ids(self) -> Int[Tensor, "depths kept top"]:
        return self._whole(self._ids)

    @property
    def logprobs(self) -> Float[Tensor, "depths kept top"]:
        return self._whole(self._logprobs)

    @property
    def tracked_logprobs(self) -> Float[Tensor, "depths kept tracked"]:
        return self._whole(self._tracked_logprobs)

    @property
    def tracked_ranks(self) -> Int[Tensor, "depths kept tracked"]:
        return self._whole(self._tracked_ranks)

    @property
    def index(self) -> Int[Tensor, "kept 2"]:
        """Sample and position of each kept row."""
        return self.positions.nonzero()

    def frame(self, tokenizer: Any) -> pd.DataFrame:
        """One row for each top or tracked token: depth, sample, position, group, row, column, rank, id, token, logprob.

        `rank` starts at 1. `row` and `column` are those of a visual token whose place is known, else missing. A tracked
        token that is among the top has one row.
        """
        import pandas as pd

        top, kept = self.ids, self.index
        low = ~(torch.tensor(self.tracked).view(-1, 1) == top[..., None, :]).any(-1)  # [depths, kept, tracked]
        ranks = torch.arange(1, top.shape[-1] + 1).expand_as(top)
        tracked = torch.tensor(self.tracked, dtype=torch.long).expand_as(low)
        listed = torch.cat([torch.ones_like(top, dtype=torch.bool), low], -1)
        depth, place, _ = listed.nonzero().unbind(1)
        sample, position = kept[place].unbind(1)
        groups = self.tokens.labels.cpu()[sample, position].tolist()
        ids = torch.cat([top, tracked], -1)[listed].tolist()
        columns = {
            "depth": torch.tensor(self.depths)[depth].numpy(),
            "sample": sample.numpy(),
            "position": position.numpy(),
            "group": [self.tokens.groups[group] for group in groups],
            "row": self._place("row", sample, position),
            "column": self._place("column", sample, position),
            "rank": torch.cat([ranks, self.tracked_ranks], -1)[listed].numpy(),
            "id": ids,
            "token": decode(tokenizer, ids),
            "logprob": torch.cat([self.logprobs, self.tracked_logprobs], -1)[listed].numpy(),
        }
        return pd.DataFrame(columns)

    def table(self, tokenizer: Any, sample: int = 0) -> pd.DataFrame:
        """The most likely word of one sample: one row for each depth, one column for each of its kept positions."""
        import pandas as pd

        rows = self.index[:, 0] == sample
        if not rows.any():
            raise ValueError(f"the lens read no position of sample {sample}: the map has {len(self.positions)} samples")
        best = self.ids[:, rows, 0]
        words = decode(tokenizer, best.flatten().tolist())
        width = best.shape[1]
        return pd.DataFrame(
            [words[line * width : (line + 1) * width] for line in range(len(best))],
            index=pd.Index(self.depths, name="depth"),
            columns=pd.Index(self.index[rows, 1].tolist(), name="position"),
        )

    def _place(self, name: str, sample: Int[Tensor, " kept"], position: Int[Tensor, " kept"]) -> pd.Series:
        import pandas as pd

        places = self.tokens.places
        known = [-1] * len(sample) if places is None else getattr(places, name).cpu()[sample, position].tolist()
        return pd.Series([pd.NA if value < 0 else value for value in known], dtype="Int64")

    def _whole(self, values: Tensor) -> Tensor:
        if not self._read.all():
            raise RuntimeError("the lens read nothing: no complete forward pass of the model ran inside logit_lens")
        return values

    @torch.no_grad()
    def _add(self, depth: int, window: TokenWindow, hidden: Tensor, unembed: Unembedding) -> None:
        """Reads one call's residual stream after `depth` layers, a chunk of positions at a time."""
        if hidden.shape[1] != window.stop - window.start:
            raise ValueError(
                f"after {depth} layers there are {hidden.shape[1]} positions, the call has {window.stop - window.start}:"
                " tokens were dropped there; mask them instead to read every position"
            )
        chosen, slots = (part[:, window.start : window.stop] for part in (self.positions, self._slots))
        slots, place = slots[chosen], self.depths.index(depth)
        if self._read[place, slots].any():
            raise RuntimeError("a second prompt ran inside one logit_lens: open one for each batch")
        # Positions past the map are generated ones; copies of a row, for beams, are alike as long as it lasts.
        rows = hidden[:: window.copies, : chosen.shape[1]][chosen.to(hidden.device)]
        top, tracked = self._ids.shape[-1], torch.tensor(self.tracked, dtype=torch.long, device=hidden.device)
        chunk = max(LOGITS_PER_CHUNK // (unembed.head.out_features * (1 + len(self.tracked))), 1)
        for part, slot in zip(rows.split(chunk), slots.split(chunk), strict=True):
            logits = unembed(part)
            whole = logits.logsumexp(-1, keepdim=True)
            best, ids = logits.topk(top)
            followed = logits[:, tracked.to(logits.device)]
            self._ids[place, slot] = ids.cpu()
            self._logprobs[place, slot] = (best - whole).cpu()
            self._tracked_logprobs[place, slot] = (followed - whole).cpu()
            above = logits[:, None, :] > followed[..., None]
            self._tracked_ranks[place, slot] = 1 + above.sum(-1).cpu()
        self._read[place, slots] = True


@contextmanager
def logit_lens(
    model: PreTrainedModel,
    tokens: TokenMap,
    at: str | Bool[Tensor, "batch positions"] | None = None,
    depths: Iterable[int] | None = None,
    top: int = 5,
    track: Sequence[int] = (),
) -> Iterator[LogitLens]:
    """Reads words off the residual stream of one prompt, in one call or in several that share a cache.

    The lens after the last layer is the model's own prediction of the next token; before that it reads states that
    the head was not trained on. What it keeps is `top` and `track` for each position: the logits of a few positions at
    a time are all that is ever held. Generated tokens are left out. It sees what enters the next layer, after any
    intervention on the last one. Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); over patches, Neo
    et al., "Towards Interpreting Visual Information Processing in Vision-Language Models" (2024).

    Args:
        model: A transformers model with a head.
        tokens: Map of the inputs that the model will be called with.
        at: A group of the map or a mask of positions; all but `pad` by default.
        depths: After how many layers to read, 0 (the embeddings) to the number of layers; all by default.
        top: How many of the most likely tokens to keep.
        track: Token ids to follow wherever they rank, such as the possible answers.

    Raises:
        ValueError: An unknown group or depth, a model whose residual stream cannot be read in this way, or a call that
            `tokens` do not fit.
        RuntimeError: A second prompt runs inside the block, or the lens is read before a forward pass.
    """
    unembed, decoder = Unembedding(model, tokens), find_decoder(model, families=FAMILIES.values())
    layers = decoder_layers(decoder)
    chosen = tuple(sorted(set(range(len(layers) + 1) if depths is None else depths)))
    outside = [depth for depth in chosen if not 0 <= depth <= len(layers)]
    if outside:
        raise ValueError(f"depths {outside} are outside the model: 0 (embeddings) to {len(layers)} (all its layers)")
    words = unembed.head.out_features
    if not 1 <= top <= words or any(not 0 <= token < words for token in track):
        raise ValueError(f"top {top} or tracked ids {list(track)} do not fit a vocabulary of {words} tokens")
    if at is None:
        at = tokens.labels != (tokens.index("pad") if "pad" in tokens.groups else -1)
    positions = tokens.mask(at) if isinstance(at, str) else at
    if positions.shape != tokens.labels.shape:
        raise ValueError(
            f"the mask of positions has shape {list(positions.shape)}, the token map {list(tokens.labels.shape)}"
        )
    if not positions.any():
        raise ValueError(f"no position to read: the map has none of {at if isinstance(at, str) else 'the mask'!r}")
    lens = LogitLens(tokens, positions, chosen, top, tuple(track))
    window = TokenWindow(decoder, tokens)
    last: list[Tensor] = []

    def check(module: nn.Module, args: Any, output: Any) -> None:
        if last:
            unembed.check(last.pop(), output.logits[:, -1])

    with ExitStack() as stack:
        stack.enter_context(window)
        for depth, module in enumerate([*layers, unembed.norm]):

            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int = depth) -> None:
                hidden = hidden_states(args, kwargs)
                if module is unembed.norm:
                    last[:] = [hidden[:, -1].detach()]
                if depth in chosen:
                    lens._add(depth, window, hidden, unembed)

            if depth in chosen or module is unembed.norm:
                # First of all: an intervention may cut what the module is called with.
                stack.callback(module.register_forward_pre_hook(read, prepend=True, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(check).remove)
        yield lens


def decode(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token id as text of its own."""
    words = {token: tokenizer.decode([token]) for token in set(ids)}
    return [words[token] for token in ids]
