"""What each position of a batch is: padding, system prompt, picture, instruction or response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

import probes.families  # noqa: F401  registers the layouts
from probes.places import FAMILIES, Places, picture_sizes

GROUPS = ("pad", "system", "vision", "instruction", "response")


def visual_token_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Ids that stand for visual tokens: of images and, where there is one, of videos. ValueError when there is none."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = dict.fromkeys(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    if not ids:
        kind = type(config).__name__
        raise ValueError(f"{kind} has neither image_token_id nor image_token_index: is this a vision-language model?")
    return tuple(ids)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """One group for every position, so the groups partition each row.

    Args:
        labels: `[batch, positions]`, indices into `groups`.
        groups: Names of the groups, in the order of every group axis built from this map.
        generated: Group of the positions that follow the map when the model generates.
        places: Where in its picture each visual token lies; None for a family of models whose layout is not known.
        model_type: Of the model's config; "" for a map made by hand.
        stack: Which layers the map is of: "decoder", or "prefusion" for LLaVA-Mini's layers ahead of it.
    """

    labels: Int[Tensor, "batch positions"]
    groups: tuple[str, ...] = GROUPS
    generated: str = "response"
    places: Places | None = None
    model_type: str = ""
    stack: str = "decoder"

    @classmethod
    def from_inputs(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        processor: ProcessorMixin | None = None,
        images: Sequence[Any] | None = None,
    ) -> TokenMap:
        """Reads the map off what the model is called with.

        The first rule that holds decides:

        1. `pad`: `attention_mask` is 0;
        2. `vision`: the image or video token that the processor repeats, once for each visual token of the language
           model;
        3. `response`: `labels` are not -100; so is all that is generated after the last position;
        4. `system`: text before the row's first visual token (what LLaVA's template puts before the picture);
        5. `instruction`: all other text. A row without a picture has no `system`: its whole prompt is instruction.

        Args:
            model: Its config names the image token: `image_token_id` or `image_token_index`.
            inputs: `input_ids` `[batch, positions]`, and optionally `attention_mask` and `labels` of the same shape.
            processor: What made the inputs. With it and the sizes of the pictures `places` know their boxes.
            images: The original pictures of the batch in reading order, or their sizes; see `picture_sizes`. Not
                needed where the inputs have `image_sizes`.

        Raises:
            ValueError: `input_ids` are missing or not 2-D, another tensor has another shape, the config names no
                image token, no row holds a visual token, or the visual tokens are not those that the pictures make.
        """
        input_ids = inputs.get("input_ids")
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError(
                f"inputs need input_ids of shape [batch, positions]; given: {', '.join(inputs) or 'nothing'}"
            )
        for name in ("attention_mask", "labels"):
            if inputs.get(name) is not None and inputs[name].shape != input_ids.shape:
                shapes = f"{list(inputs[name].shape)}, input_ids {list(input_ids.shape)}"
                raise ValueError(f"inputs disagree: {name} has shape {shapes}; both need [batch, positions]")
        visual_ids = visual_token_ids(model.config)
        vision = torch.isin(input_ids, torch.tensor(visual_ids, device=input_ids.device))
        pad = torch.zeros_like(vision)
        if inputs.get("attention_mask") is not None:
            pad = inputs["attention_mask"] == 0
        vision = vision & ~pad
        if not vision.any():
            wanted = " or ".join(map(str, visual_ids))
            raise ValueError(f"no visual token: no unpadded position of input_ids is the image token {wanted}")
        response = torch.zeros_like(vision)
        if inputs.get("labels") is not None:
            response = inputs["labels"] != -100
        system = vision.any(dim=1, keepdim=True) & (vision.cumsum(dim=1) == 0)

        labels = torch.full_like(input_ids, GROUPS.index("instruction"))
        # From the weakest rule to the strongest: a later one overrides.
        for name, member in (("system", system), ("response", response), ("vision", vision), ("pad", pad)):
            labels[member] = GROUPS.index(name)
        places, model_type = None, model.config.model_type
        if model_type in FAMILIES:
            grids = FAMILIES[model_type](model.config, inputs, picture_sizes(inputs, images), processor)
            places = None if grids is None else Places.lay_out(vision, grids)
        return cls(labels, places=places, model_type=model_type)

    def require_places(self) -> Places:
        """`places`, or a ValueError that says why there are none."""
        if self.places is None:
            family = f"model_type {self.model_type!r}" if self.model_type else "a map made by hand"
            raise ValueError(f"no places of visual tokens for {family}: register its layout with probes.places.family")
        return self.places

    def index(self, group: str) -> int:
        """Place of `group` on a group axis. Raises ValueError for an unknown one."""
        if group not in self.groups:
            raise ValueError(f"unknown group {group!r}: this token map has {', '.join(self.groups)}")
        return self.groups.index(group)

    def mask(self, group: str) -> Bool[Tensor, "batch positions"]:
        """Which positions are of `group`. Raises ValueError for an unknown one."""
        return self.labels == self.index(group)

    def merge(self, groups: Mapping[str, Sequence[str]]) -> TokenMap:
        """A map with `groups[name]` pooled under `name`, at the place of the first of them.

        Raises:
            ValueError: A group is unknown or pooled twice, or a new name is that of a group left out of the pool.
        """
        renamed = {old: new for new, olds in groups.items() for old in olds}
        if len(renamed) < sum(len(olds) for olds in groups.values()):
            raise ValueError(f"a group is pooled twice in {dict(groups)}: each may go to one new group")
        for old in renamed:
            self.index(old)
        for new in groups:
            if new in self.groups and new not in renamed:
                raise ValueError(f"cannot pool into {new!r}: it is a group of its own; name it among the pooled ones")
        names = [renamed.get(old, old) for old in self.groups]
        pooled = tuple(dict.fromkeys(names))
        index = torch.tensor([pooled.index(name) for name in names], device=self.labels.device)
        generated = renamed.get(self.generated, self.generated)
        return replace(self, labels=index[self.labels], groups=pooled, generated=generated)
