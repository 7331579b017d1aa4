"""Contextual lens: the words of a text corpus whose hidden states are most like a given state.

The language model reads a corpus. The state of every word after every layer is kept, with the sentence that it stands
in. A state, such as that of a visual token, is then named by the words of the nearest states (cosine similarity).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from probes.hooks.decoder import as_indices, decoder_layers, find_decoder
from probes.optional_packages import require_package
from probes.readouts.hidden_states import record_states
from probes.tokens.token_map import GROUPS, TokenMap
from probes.unwrapping import require_model

if TYPE_CHECKING:
    import pandas as pd

# Similarities in memory at once (64 MiB in float32).
SIMILARITIES_PER_CHUNK = 2**24
# A word: letters and digits, with hyphens and apostrophes inside.
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The words nearest to some states, most similar first.

    `ContextualLens.read` returns it.

    Attributes:
        lens: The lens that was read.
        similarity: Cosine similarity `[states, top]`, from -1 to 1.
        entry: Index of each word in `lens.words` `[states, top]`.
        depth: Number of layers after which the word had the similar state `[states, top]`.
    """

    lens: ContextualLens
    similarity: Float[Tensor, "states top"]
    entry: Int[Tensor, "states top"]
    depth: Int[Tensor, "states top"]

    @property
    def words(self) -> list[list[str]]:
        """Return the words of each state."""
        return [[self.lens.words[entry] for entry in entries] for entries in self.entry.tolist()]

    def frame(self) -> pd.DataFrame:
        """Return the neighbours as a table.

        Returns:
            A row for each neighbour. The columns are state, rank (from 1), word, text (the sentence of the word), depth
            and similarity.

        Example:
            >>> from probes import contextual_lens
            >>> lens = contextual_lens(model, processor.tokenizer, ["the red ring", "the blue cross"])
            >>> list(lens.read(torch.randn(3, 128), top=2).frame().columns)
            ['state', 'rank', 'word', 'text', 'depth', 'similarity']
        """
        require_package("pandas", "Neighbours.frame")
        import pandas as pd

        states, top = self.entry.shape
        entries = self.entry.flatten().tolist()
        columns = {
            "state": torch.arange(states).repeat_interleave(top).numpy(),
            "rank": torch.arange(1, top + 1).repeat(states).numpy(),
            "word": [self.lens.words[entry] for entry in entries],
            "text": [self.lens.texts[entry] for entry in entries],
            "depth": self.depth.flatten().numpy(),
            "similarity": self.similarity.flatten().numpy(),
        }
        return pd.DataFrame(columns)


class ContextualLens:
    """States of the words of a corpus, by number of layers, to which other states are compared.

    `contextual_lens` builds it.

    Attributes:
        words: The words.
        texts: The sentence of each word.
        depths: Numbers of layers after which the words' states are kept.
        states: The states, scaled to length 1 `[depths, words, width]`, float16.
        fingerprint: Hash of the language model's weights. States of another model have no meaning here.
    """

    def __init__(
        self,
        words: Sequence[str],
        texts: Sequence[str],
        depths: Sequence[int],
        states: Float[Tensor, "depths words width"],
        fingerprint: str,
    ) -> None:
        self.words, self.texts, self.depths = tuple(words), tuple(texts), tuple(depths)
        self.states, self.fingerprint = states, fingerprint

    def read(
        self, states: Float[Tensor, "states width"], top: int = 5, depths: Iterable[int] | None = None
    ) -> Neighbours:
        """Return the words whose states are nearest to each of `states`.

        States are compared across depths: a visual token after few layers is often nearest to words after more layers
        (arXiv 2602.00462).

        Args:
            states: Hidden states of the same language model, before its final norm; for example of `record_states`.
            top: Number of words for each state. A word counts once for each sentence and depth.
            depths: The words' depths to compare with; all of the lens by default.

        Returns:
            The neighbours, on the CPU.

        Raises:
            ValueError: States of another width or that are not finite, a depth that the lens does not have, or a `top`
                below 1 or above the number of the words' states.

        Example:
            >>> from probes import contextual_lens, record_states
            >>> lens = contextual_lens(model, processor.tokenizer, ["the red ring", "the blue cross"])
            >>> with torch.no_grad(), record_states(model, tokens, "vision", layers=[2]) as states:
            ...     output = model(**inputs)
            >>> lens.read(states[2], top=3).similarity.shape  # visual tokens, words
            torch.Size([36, 3])
        """
        width = self.states.shape[-1]
        if states.ndim != 2 or states.shape[1] != width:
            raise ValueError(f"states have shape {list(states.shape)}: the lens needs [states, {width}]")
        if not (finite := states.isfinite().all(1)).all():
            raise ValueError(
                f"states: row {int(finite.int().argmin())} is not finite; leave out tokens that were dropped"
            )
        selected = self.depths if depths is None else tuple(as_indices("depths", depths))
        if outside := [depth for depth in selected if depth not in self.depths]:
            raise ValueError(f"depths: {outside[0]} is not in the lens, which has {', '.join(map(str, self.depths))}")
        if not 1 <= top <= len(selected) * len(self.words):
            raise ValueError(
                f"top is {top}: it must be 1 to {len(selected) * len(self.words)}, the states to compare with"
            )
        parts = [
            self._nearest(part, top, selected)
            for part in normalize(states.detach().float(), dim=-1).split(
                max(SIMILARITIES_PER_CHUNK // len(self.words), 1)
            )
        ]
        if not parts:
            return Neighbours(
                self, *(torch.empty(0, top, dtype=kind) for kind in (torch.float32, torch.long, torch.long))
            )
        similarity, entry, depth = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
        return Neighbours(self, similarity, entry, depth)

    def save(self, path: str | Path) -> None:
        """Write the lens to a file in safetensors' format, with its corpus and the fingerprint of its model.

        Args:
            path: The file.

        Example:
            >>> from probes import contextual_lens
            >>> from probes.readouts.contextual_lens import ContextualLens
            >>> contextual_lens(model, processor.tokenizer, ["the red ring"]).save(folder / "lens.safetensors")
            >>> ContextualLens.load(folder / "lens.safetensors", model).words[-2:]
            ('red', 'ring')
        """
        content = {"words": self.words, "texts": self.texts, "depths": self.depths}
        metadata = {name: json.dumps(values) for name, values in content.items()} | {"fingerprint": self.fingerprint}
        save_file({"states": self.states.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> ContextualLens:
        """Read a lens that `save` has written.

        Args:
            path: The file.
            model: The model whose states the lens is to read.

        Raises:
            ValueError: The file holds no lens, or one of a language model with other weights.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if not {"words", "texts", "depths", "fingerprint"} <= metadata.keys():
                raise ValueError(f"{path}: holds no contextual lens; write one with ContextualLens.save")
            found, expected = metadata["fingerprint"], language_model_fingerprint(model)
            if found != expected:
                raise ValueError(
                    f"{path}: the lens is of a language model with fingerprint {found}, this model has {expected}; build "
                    "one with contextual_lens"
                )
            words, texts, depths = (json.loads(metadata[name]) for name in ("words", "texts", "depths"))
            return cls(words, texts, depths, file.get_tensor("states"), found)

    def _nearest(self, states: Tensor, top: int, depths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return similarity, entry and depth of the nearest words of states of length 1, one depth at a time."""
        best = states.new_full((len(states), top), -torch.inf)
        entry, found_depth = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
        for depth in depths:
            words = self.states[self.depths.index(depth)].to(states.device, torch.float32)
            similarity, index = (states @ words.T).topk(min(top, len(words)))
            candidates = torch.cat([best, similarity], 1)
            best, order = candidates.topk(top)
            entry = torch.cat([entry, index], 1).gather(1, order)
            found_depth = torch.cat([found_depth, torch.full_like(index, depth)], 1).gather(1, order)
        return best, entry, found_depth


@torch.no_grad()
def contextual_lens(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Iterable[str] | None = None,
    depths: Iterable[int] | None = None,
    batch_size: int = 16,
) -> ContextualLens:
    """Let the language model read a corpus without images, and keep the states of its words.

    Of each word, the state of its last token is kept: the first one at which a causal model has read the whole word. A
    word whose text before it has occurred already is kept once, since a causal model gives it the same state. The first
    token of a text is left out: it has no context, and is an attention sink in many models.

    Source: Krojer et al., "LatentLens: Revealing Highly Interpretable Visual Tokens in LLMs" (arXiv 2602.00462). The
    paper keeps every token, of three million phrases. As there, states are compared by cosine similarity, without
    centring, over all depths of the words.

    Args:
        model: A transformers model with a decoder.
        tokenizer: Its tokenizer, a fast one.
        corpus: Texts, such as captions. By default 247 short captions that ship with this package. Only words that occur
            in it can be read.
        depths: Numbers of layers after which to keep states, from 1; all by default. Memory is 2 bytes times depths,
            words and width.
        batch_size: Texts of a forward pass.

    Returns:
        The lens.

    Raises:
        ValueError: No word in the corpus, a depth outside the model, or a tokenizer that does not report offsets.

    Example:
        >>> from probes import contextual_lens
        >>> lens = contextual_lens(model, processor.tokenizer, ["the red ring", "the red cross"])
        >>> lens.words[-3:]
        ('red', 'ring', 'cross')
        >>> lens.depths
        (1, 2, 3, 4, 5, 6)
    """
    model = require_model(model)
    layers = len(decoder_layers(find_decoder(model)))
    selected = tuple(sorted(set(range(1, layers + 1) if depths is None else as_indices("depths", depths))))
    if not selected or not 1 <= selected[0] <= selected[-1] <= layers:
        raise ValueError(f"depths: {list(selected)} must be 1 to {layers}, the number of the model's layers")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} does not report offsets; use a fast tokenizer")
    if isinstance(corpus, str):
        raise TypeError("corpus: found a str; pass a list of texts")
    texts = list(shipped_captions() if corpus is None else corpus)
    encoded = [_find_last_tokens(tokenizer, text) for text in texts]
    _drop_repeated_prefixes(encoded)
    encoded = [text for text in encoded if text.last_tokens]
    if not encoded:
        raise ValueError(f"corpus: {len(texts)} texts hold no word after a first token; pass sentences")
    # Texts of one length need no padding, which some models with two-way attention do not hide.
    encoded.sort(key=lambda text: len(text.ids))
    batches = [
        same_length[first : first + batch_size]
        for same_length in (list(group) for _, group in itertools.groupby(encoded, lambda text: len(text.ids)))
        for first in range(0, len(same_length), batch_size)
    ]
    return ContextualLens(
        [word for text in encoded for word in text.words],
        [text.text for text in encoded for _ in text.words],
        selected,
        torch.cat([_record_word_states(model, batch, selected) for batch in batches], 1),
        language_model_fingerprint(model),
    )


def shipped_captions() -> list[str]:
    """Return the captions that ship with this package: plain scenes, objects, colours and places.

    Example:
        >>> from probes.readouts.contextual_lens import shipped_captions
        >>> len(shipped_captions())
        247
    """
    return files("probes.readouts").joinpath("captions.txt").read_text(encoding="utf-8").splitlines()


def language_model_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of the weights of the model's decoder: names, dtypes, shapes and values.

    Args:
        model: A transformers model with a decoder.

    Returns:
        16 hex digits. The vision tower and the head do not count, since states of text do not depend on them.

    Example:
        >>> from probes.readouts.contextual_lens import language_model_fingerprint
        >>> len(language_model_fingerprint(model))
        16
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(find_decoder(require_model(model)).named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass
class _EncodedText:
    """A text, its token ids, and the words to keep with the position of each one's last token."""

    text: str
    ids: list[int]
    words: list[str]
    last_tokens: list[int]


def _find_last_tokens(tokenizer: Any, text: str) -> _EncodedText:
    """Encode a text, and find the last token of each word."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    words, positions = [], []
    for match in _WORD.finditer(text):
        inside = [
            position
            for position, (start, stop) in enumerate(encoding["offset_mapping"])
            if start < min(stop, match.end()) and stop > match.start()
        ]
        if inside and inside[-1] > 0 and inside[-1] not in positions:  # a token may end two words
            words.append(match.group())
            positions.append(inside[-1])
    return _EncodedText(text, list(encoding["input_ids"]), words, positions)


def _drop_repeated_prefixes(encoded: Sequence[_EncodedText]) -> None:
    """Drop the words whose tokens up to the last one have occurred in an earlier text."""
    known: set[tuple[int, ...]] = set()
    for text in encoded:
        prefixes = [tuple(text.ids[: position + 1]) for position in text.last_tokens]
        kept = [index for index, prefix in enumerate(prefixes) if prefix not in known]
        known.update(prefixes)
        text.words, text.last_tokens = [text.words[i] for i in kept], [text.last_tokens[i] for i in kept]


def _record_word_states(
    model: PreTrainedModel, batch: Sequence[_EncodedText], depths: Sequence[int]
) -> Float[Tensor, "depths words width"]:
    """Return the states of the words of texts of one length, scaled to length 1, float16, on the CPU."""
    ids = torch.tensor([text.ids for text in batch])
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(batch):
        kept[row, text.last_tokens] = True
    tokens = TokenMap(torch.full_like(ids, GROUPS.index("instruction")))
    device = model.get_input_embeddings().weight.device
    with record_states(model, tokens, kept, layers=[depth - 1 for depth in depths]) as states:
        find_decoder(model)(input_ids=ids.to(device), use_cache=False)
    return torch.stack([normalize(states[depth - 1].float(), dim=-1).half().cpu() for depth in depths])
