"""Methods that drop visual tokens inside the language model, built on `RemoveTokens`.

They are context managers around forward calls or `generate`, and need no training. They yield the receipt of their
removals; `receipt[i].chosen` marks the removed positions. Layers are numbered from 0. A method that drops "after layer
k" of its paper gets `layer=k`, the first layer that runs without the tokens.

Each method keeps an exact number of each row's visual tokens: the asked share of them, rounded down.
"""

from probes.pruning.dart import dart
from probes.pruning.fastv import fastv
from probes.pruning.kept_tokens import PositionMode, RemovalMode, count_kept_tokens
from probes.pruning.pyramid_drop import pyramid_drop
from probes.pruning.random_drop import random_drop
from probes.pruning.sparsevlm import sparsevlm
from probes.pruning.vtw import vtw

__all__ = [
    "PositionMode",
    "RemovalMode",
    "count_kept_tokens",
    "dart",
    "fastv",
    "pyramid_drop",
    "random_drop",
    "sparsevlm",
    "vtw",
]
