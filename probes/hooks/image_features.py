"""Image features that repeated calls of one model share, so that its vision tower runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from probes.unwrapping import require_model

METHOD = "get_image_features"
# Of the vision tower, for which the language model has no use; they take more memory than the features.
_DROPPED = ("hidden_states", "attentions")


@contextmanager
def reuse_image_features(model: PreTrainedModel) -> Iterator[None]:
    """Encode the images of the first call inside the block, and return the same features in the others.

    All calls inside the block must have the same images. Hooks on the vision tower see the first call alone. A model
    that encodes its images without `get_image_features`, as LLaVA-Mini does, encodes them in each call.

    Args:
        model: A transformers model, or a wrapper of one.

    Example:
        >>> runs = []
        >>> handle = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
        >>> with torch.no_grad(), reuse_image_features(model):
        ...     first, second = model(**inputs).logits, model(**inputs).logits
        >>> handle.remove()
        >>> len(runs), torch.equal(first, second)
        (1, True)
    """
    model = require_model(model)  # probes call it without its wrappers, whose hooks then do not run
    # A module's `forward` calls the method on itself, so that an attribute of the instance takes its place.
    encoders = [_StoredFeatures(module) for module in model.modules() if hasattr(type(module), METHOD)]

    def begin(*call: Any) -> None:
        for encoder in encoders:
            encoder.calls = 0

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin).remove)
        for encoder in encoders:
            encoder.install(stack)
        yield


class _StoredFeatures:
    """The features of one module, by the number of its call within a call of the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0
        self.encode: Callable[..., Any] = getattr(module, METHOD)
        self.features: list[Any] = []

    def install(self, stack: ExitStack) -> None:
        """Replace the module's method until `stack` closes."""
        own = vars(self.module)
        if METHOD in own:
            stack.callback(own.__setitem__, METHOD, own[METHOD])
        else:
            stack.callback(own.pop, METHOD)
        own[METHOD] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the features, computed in the first call of the model."""
        self.calls += 1
        if self.calls > len(self.features):
            features = self.encode(*args, **kwargs)
            self.features.append(_without_states(features) if isinstance(features, ModelOutput) else features)
        return self.features[self.calls - 1]


def _without_states(output: ModelOutput) -> ModelOutput:
    """Return a copy without the states of the vision tower, so that they can be freed."""
    kept = type(output)(**{name: value for name, value in output.items() if name not in _DROPPED})
    # LLaVA of transformers 5.17 sets `pooler_output` also on outputs that have no such field.
    vars(kept).update({name: value for name, value in vars(output).items() if name not in _DROPPED})
    return kept
