"""Logit lens: next-token predictions of the final norm and head from the residual stream after every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks.decoder import MASK_FORMATS, as_indices, decoder_layers, find_decoder
from probes.hooks.layer_io import input_states
from probes.hooks.token_window import TokenWindow
from probes.hooks.unembedding import Unembedding
from probes.optional_packages import require_package
from probes.tokens.position_mask import select_positions
from probes.tokens.token_map import TokenMap
from probes.unwrapping import require_model

if TYPE_CHECKING:
    import pandas as pd

# Logits in memory at once (64 MiB in float32).
LOGITS_PER_CHUNK = 2**24


class LogitLens:
    """The most likely next tokens at chosen positions after every layer, in order of sample and position, on the CPU.

    `logit_lens` yields it.

    Attributes:
        depths: Numbers of layers after which the lens reads; 0 is the embeddings, the number of layers the output.
        tokens: The map of the inputs.
        positions: Mask of the positions of the map that are read.
        ids: Top token ids `[depths, kept, top]`, most likely first.
        logprobs: Their log-probabilities in nats, float32.
        tracked: Token ids that are followed whatever their rank.
        tracked_logprobs: Their log-probabilities `[depths, kept, tracked]`.
        tracked_ranks: Their ranks, 1 for the most likely token of the vocabulary.

    Example:
        >>> from probes import logit_lens
        >>> with torch.no_grad(), logit_lens(model, tokens, at="vision", top=3) as lens:
        ...     output = model(**inputs)
        >>> lens.ids.shape  # depths, positions, top
        torch.Size([7, 36, 3])
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
        # Index of each position among those that are read.
        self._slots = (self.positions.flatten().long().cumsum(0) - 1).view_as(self.positions)
        self._is_read = torch.zeros(len(depths), kept, dtype=torch.bool)
        self._ids = torch.empty(len(depths), kept, top, dtype=torch.long)
        self._logprobs = torch.empty(len(depths), kept, top)
        self._tracked_logprobs = torch.empty(len(depths), kept, len(tracked))
        self._tracked_ranks = torch.empty(len(depths), kept, len(tracked), dtype=torch.long)

    @property
    def ids(self) -> Int[Tensor, "depths kept top"]:
        """Return the top token ids, most likely first."""
        return self._check_complete(self._ids)

    @property
    def logprobs(self) -> Float[Tensor, "depths kept top"]:
        """Return the log-probabilities of the top tokens, in nats."""
        return self._check_complete(self._logprobs)

    @property
    def tracked_logprobs(self) -> Float[Tensor, "depths kept tracked"]:
        """Return the log-probabilities of the tracked tokens, in nats."""
        return self._check_complete(self._tracked_logprobs)

    @property
    def tracked_ranks(self) -> Int[Tensor, "depths kept tracked"]:
        """Return the ranks of the tracked tokens, 1 for the most likely token."""
        return self._check_complete(self._tracked_ranks)

    @property
    def index(self) -> Int[Tensor, "kept 2"]:
        """Return sample and position of each position that is read."""
        return self.positions.nonzero()

    def frame(self, tokenizer: Any) -> pd.DataFrame:
        """Return the top and tracked tokens as a table.

        Args:
            tokenizer: Decodes token ids.

        Returns:
            A row for each top or tracked token. The columns are depth, sample, position, group, row, column, rank, id,
            token, logprob. `rank` starts at 1. `row` and `column` are those of a visual token on the image's grid, and
            missing if unknown. A tracked token that is also among the top tokens has one row.

        Raises:
            RuntimeError: No forward pass has run inside `logit_lens`.

        Example:
            >>> from probes import logit_lens
            >>> with torch.no_grad(), logit_lens(model, tokens, at="vision", depths=[6], top=1) as lens:
            ...     output = model(**inputs)
            >>> lens.frame(processor.tokenizer)[["position", "row", "column"]].iloc[-1].tolist()
            [35, 5, 5]
        """
        require_package("pandas", "LogitLens.frame")
        import pandas as pd

        top, kept = self.ids, self.index
        not_in_top = ~(torch.tensor(self.tracked).view(-1, 1) == top[..., None, :]).any(-1)  # [depths, kept, tracked]
        ranks = torch.arange(1, top.shape[-1] + 1).expand_as(top)
        tracked = torch.tensor(self.tracked, dtype=torch.long).expand_as(not_in_top)
        listed = torch.cat([torch.ones_like(top, dtype=torch.bool), not_in_top], -1)
        depth_index, kept_index, _ = listed.nonzero().unbind(1)
        sample, position = kept[kept_index].unbind(1)
        groups = self.tokens.labels.cpu()[sample, position].tolist()
        ids = torch.cat([top, tracked], -1)[listed].tolist()
        columns = {
            "depth": torch.tensor(self.depths)[depth_index].numpy(),
            "sample": sample.numpy(),
            "position": position.numpy(),
            "group": [self.tokens.groups[group] for group in groups],
            "row": self._grid_coordinate("row", sample, position),
            "column": self._grid_coordinate("column", sample, position),
            "rank": torch.cat([ranks, self.tracked_ranks], -1)[listed].numpy(),
            "id": ids,
            "token": decode_one_by_one(tokenizer, ids),
            "logprob": torch.cat([self.logprobs, self.tracked_logprobs], -1)[listed].numpy(),
        }
        return pd.DataFrame(columns)

    def table(self, tokenizer: Any, sample: int = 0) -> pd.DataFrame:
        """Return the most likely token of one sample at every depth and position.

        Args:
            tokenizer: Decodes token ids.
            sample: Row of the token map.

        Returns:
            The tokens as text, with a row for each depth and a column for each position that is read.

        Raises:
            ValueError: No position of this sample is read.
            RuntimeError: No forward pass has run inside `logit_lens`.

        Example:
            >>> from probes import logit_lens
            >>> with torch.no_grad(), logit_lens(model, tokens, at="instruction") as lens:
            ...     output = model(**inputs)
            >>> lens.table(processor.tokenizer).shape  # depths, positions
            (7, 6)
        """
        require_package("pandas", "LogitLens.table")
        import pandas as pd

        rows = self.index[:, 0] == sample
        if not rows.any():
            raise ValueError(f"the lens read no position of sample {sample}: the map has {len(self.positions)} samples")
        best = self.ids[:, rows, 0]
        words = decode_one_by_one(tokenizer, best.flatten().tolist())
        width = best.shape[1]
        return pd.DataFrame(
            [words[line * width : (line + 1) * width] for line in range(len(best))],
            index=pd.Index(self.depths, name="depth"),
            columns=pd.Index(self.index[rows, 1].tolist(), name="position"),
        )

    def _grid_coordinate(self, name: str, sample: Int[Tensor, " rows"], position: Int[Tensor, " rows"]) -> pd.Series:
        """Return the row or column on the image's grid of some positions; missing if unknown."""
        import pandas as pd

        places = self.tokens.places
        values = [-1] * len(sample) if places is None else getattr(places, name).cpu()[sample, position].tolist()
        return pd.Series([pd.NA if value < 0 else value for value in values], dtype="Int64")

    def _check_complete(self, values: Tensor) -> Tensor:
        """Return `values`, and raise a RuntimeError if some positions have not been read."""
        if not self._is_read.all():
            raise RuntimeError("the lens read nothing: no complete forward pass of the model ran inside logit_lens")
        return values

    @torch.no_grad()
    def _add(self, depth: int, window: TokenWindow, hidden: Tensor, unembed: Unembedding) -> None:
        """Read one call's residual stream after `depth` layers, a chunk of positions at a time."""
        if hidden.shape[1] != window.stop - window.start:
            raise ValueError(
                f"after {depth} layers there are {hidden.shape[1]} positions, but the call has "
                f"{window.stop - window.start}: tokens were dropped there; mask them instead to read every position"
            )
        selected, slots = (part[:, window.start : window.stop] for part in (self.positions, self._slots))
        slots, depth_index = slots[selected], self.depths.index(depth)
        if self._is_read[depth_index, slots].any():
            raise RuntimeError("a second prompt ran inside one logit_lens: open one for each batch")
        # Positions past the map are generated ones. Copies of a row, for beams, are equal within the map.
        states = hidden[:: window.copies, : selected.shape[1]][selected.to(hidden.device)]
        top, tracked = self._ids.shape[-1], torch.tensor(self.tracked, dtype=torch.long, device=hidden.device)
        chunk = max(LOGITS_PER_CHUNK // (unembed.head.out_features * (1 + len(self.tracked))), 1)
        for chunk_states, chunk_slots in zip(states.split(chunk), slots.split(chunk), strict=True):
            logits = unembed(chunk_states)
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            best, ids = logits.topk(top)
            tracked_logits = logits[:, tracked.to(logits.device)]
            self._ids[depth_index, chunk_slots] = ids.cpu()
            self._logprobs[depth_index, chunk_slots] = (best - log_normalizer).cpu()
            self._tracked_logprobs[depth_index, chunk_slots] = (tracked_logits - log_normalizer).cpu()
            is_above = logits[:, None, :] > tracked_logits[..., None]
            self._tracked_ranks[depth_index, chunk_slots] = 1 + is_above.sum(-1).cpu()
        self._is_read[depth_index, slots] = True


@contextmanager
def logit_lens(
    model: PreTrainedModel,
    tokens: TokenMap,
    at: str | Bool[Tensor, "batch positions"] | None = None,
    depths: Iterable[int] | None = None,
    top: int = 5,
    track: Sequence[int] = (),
) -> Iterator[LogitLens]:
    """Decode the residual stream of one prompt into tokens, after every layer.

    The prompt may run in one call or in several that share a cache; generated tokens are not read. After the last layer
    the lens is the model's own prediction of the next token. Before that it reads states that the head was not trained
    on. It reads the input of the next layer, so any intervention on the layer before has acted. Only `top` and `track`
    are kept for each position, and the logits of only a few positions are in memory at a time.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); over patches, Neo et al., "Towards Interpreting
    Visual Information Processing in Vision-Language Models" (2024).

    Args:
        model: A transformers model with a head.
        tokens: Map of the inputs that the model will be called with.
        at: A group of the map or a mask of positions `[batch, positions]`; all but `pad` by default.
        depths: Numbers of layers after which to read, from 0 (the embeddings) to the number of layers; all by default.
        top: Number of the most likely tokens to keep.
        track: Token ids to follow whatever their rank, such as the possible answers.

    Yields:
        The lens. It can be read once the model has run the whole prompt.

    Raises:
        TypeError: Depths or tracked ids are no list of integers.
        ValueError: An unknown group or depth; a mask that is not bool or not of the map's shape; a model whose residual stream cannot be read in this way; or a call that
            does not fit `tokens`.
        RuntimeError: A second prompt runs inside the block, or the lens is read before a forward pass.

    Example:
        >>> from probes import logit_lens
        >>> with torch.no_grad(), logit_lens(model, tokens, depths=[0, 6], top=1) as lens:
        ...     logits = model(**inputs).logits
        >>> torch.equal(lens.ids[-1, :, 0], logits[0].argmax(-1))  # the last depth is the model's own prediction
        True
    """
    model = require_model(model)
    unembed, decoder = Unembedding(model, tokens), find_decoder(model, "decoder", MASK_FORMATS.values())
    layers = decoder_layers(decoder)
    selected_depths = tuple(sorted(set(range(len(layers) + 1) if depths is None else as_indices("depths", depths))))
    outside = [depth for depth in selected_depths if not 0 <= depth <= len(layers)]
    if outside:
        raise ValueError(f"depths {outside} are outside the model: 0 (embeddings) to {len(layers)} (all its layers)")
    words, tracked = unembed.head.out_features, tuple(as_indices("track", track))
    if not 1 <= top <= words or any(not 0 <= token < words for token in tracked):
        raise ValueError(f"top {top} or tracked ids {list(tracked)} do not fit a vocabulary of {words} tokens")
    if at is None:
        at = tokens.labels != (tokens.index("pad") if "pad" in tokens.groups else -1)
    positions = select_positions(tokens, at)
    if not positions.any():
        raise ValueError(f"no position to read: the map has none of {at if isinstance(at, str) else 'the mask'!r}")
    lens = LogitLens(tokens, positions, selected_depths, top, tracked)
    window = TokenWindow(decoder, tokens)
    last_states: list[Tensor] = []

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple):
            raise ValueError("return_dict is False: the lens finds the model's logits by name; leave it True")
        if last_states:
            kept = kwargs.get("logits_to_keep", 0)  # a number of last positions, or a tensor of positions
            last = int(kept[-1]) if isinstance(kept, Tensor) and kept.ndim else -1
            unembed.check(last_states.pop()[:, last], output.logits[:, -1])

    with ExitStack() as stack:
        stack.enter_context(window)
        for depth, module in enumerate([*layers, unembed.norm]):

            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int = depth) -> None:
                hidden = input_states(args, kwargs)
                if module is unembed.norm:
                    last_states[:] = [hidden.detach()]
                if depth in selected_depths:
                    lens._add(depth, window, hidden, unembed)

            if depth in selected_depths or module is unembed.norm:
                # First of the hooks: an intervention may cut the module's input.
                stack.callback(module.register_forward_pre_hook(read, prepend=True, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(check, with_kwargs=True).remove)
        yield lens


def decode_one_by_one(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode each token id as a text of its own.

    Args:
        tokenizer: Decodes a list of token ids.
        ids: Token ids.

    Returns:
        A text for each id.

    Example:
        >>> from probes.readouts.logit_lens import decode_one_by_one
        >>> decode_one_by_one(processor.tokenizer, inputs["input_ids"][0, -2:].tolist())
        [' are', ' there']
    """
    words = {token: tokenizer.decode([token]) for token in set(ids)}
    return [words[token] for token in ids]
