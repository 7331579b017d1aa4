"""What each position of a batch is: padding, system prompt, picture, instruction or response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

import probes.tokens.families  # noqa: F401  registers the layouts
from probes.tokens.grid import FAMILIES, Places, picture_sizes

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
        places: Where in its picture each visual token lies; None for a family of models whose layout is not known, and
            where the inputs hold no pixels.
        model_type: Of the model's config; "" for a map made by hand.
        stack: The layers whose sequences these are: "decoder", or LLaVA-Mini's "prefusion".
        samples: Which row of the inputs each row of the map belongs to; None where they are the same.

    Raises:
        ValueError: A label is no index into `groups`, or a name stands twice or is that of no group.
    """

    labels: Int[Tensor, "batch positions"]
    groups: tuple[str, ...] = GROUPS
    generated: str = "response"
    places: Places | None = None
    model_type: str = ""
    stack: str = "decoder"
    samples: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if len(set(self.groups)) < len(self.groups) or self.generated not in self.groups:
            raise ValueError(f"groups {self.groups} need names of their own, {self.generated!r} (generated) among them")
        if self.labels.ndim != 2 or ((self.labels < 0) | (self.labels >= len(self.groups))).any():
            raise ValueError(
                f"labels must be [batch, positions], from 0 to {len(self.groups) - 1}: every position has a group"
            )

    @classmethod
    def from_inputs(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        processor: ProcessorMixin | None = None,
        images: Sequence[Any] | None = None,
        stack: str = "decoder",
    ) -> TokenMap:
        """Reads the map off what the model is called with.

        The first rule that holds decides:

        1. `pad`: `attention_mask` is 0;
        2. `vision`: the image or video token that the processor repeats, once for each visual token of the language
           model;
        3. `response`: `labels` are not -100, or `assistant_masks` or LLaVA-Mini's `answer_mask` are set; so is all that
           is generated after the last position;
        4. `system`: text before the row's first visual token (what LLaVA's template puts before the picture);
        5. `instruction`: all other text. A row without a picture has no `system`: its whole prompt is instruction.

        Args:
            model: Its config names the image token: `image_token_id` or `image_token_index`.
            inputs: `input_ids` `[batch, positions]`, and optionally `attention_mask`, `labels` and `assistant_masks`
                (of `apply_chat_template`) of the same shape, and `answer_mask`, which may be shorter: rows end with it.
            processor: What made the inputs. With it and the sizes of the pictures `places` know their boxes.
            images: The original pictures of the batch in reading order, or their sizes; see `picture_sizes`. Not
                needed where the inputs have `image_sizes`.
            stack: "decoder" for the language model's own layers. "prefusion" for the layers in which LLaVA-Mini fuses
                text with patches: a row for each frame, with its patches first, then the compressed tokens where these
                go through too, which `places` count as one more tile, then the text that is fused; `pad` fills the
                rest. Text has the group that it has in the decoder.

        Raises:
            ValueError: `input_ids` are missing or not 2-D, another tensor has another shape, the config names no
                image token, no row holds a visual token, the visual tokens are not those that the pictures make, or
                the model has no such stack.
        """
        input_ids = inputs.get("input_ids")
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError(
                f"inputs need input_ids of shape [batch, positions]; given: {', '.join(inputs) or 'nothing'}"
            )
        for name in ("attention_mask", "labels", "assistant_masks"):
            if inputs.get(name) is not None and torch.as_tensor(inputs[name]).shape != input_ids.shape:
                shapes = f"{list(torch.as_tensor(inputs[name]).shape)}, input_ids {list(input_ids.shape)}"
                raise ValueError(f"inputs disagree: {name} has shape {shapes}; both need [batch, positions]")
        visual_ids = visual_token_ids(model.config)
        vision = torch.isin(input_ids, torch.tensor(visual_ids, device=input_ids.device))
        pad = torch.zeros_like(vision)
        if inputs.get("attention_mask") is not None:
            pad = inputs["attention_mask"] == 0
        vision = vision & ~pad
        system = vision.any(dim=1, keepdim=True) & (vision.cumsum(dim=1) == 0)
        labels = torch.full_like(input_ids, GROUPS.index("instruction"))
        # From the weakest rule to the strongest: a later one overrides.
        for name, member in (("system", system), ("response", _answers(inputs)), ("vision", vision), ("pad", pad)):
            labels[member] = GROUPS.index(name)

        samples = None
        if stack == "prefusion":
            labels, samples = _prefused(model, inputs, labels)
            vision = labels == GROUPS.index("vision")
        elif stack != "decoder":
            raise ValueError(f"unknown stack {stack!r}: there are decoder and prefusion")
        elif not vision.any():
            wanted = " or ".join(map(str, visual_ids))
            raise ValueError(f"no visual token: no unpadded position of input_ids is the image token {wanted}")
        model_type, places = model.config.model_type, None
        layout = FAMILIES.get(model_type if stack == "decoder" else f"{model_type}/{stack}")
        pixels = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
        grids = layout(model.config, inputs, picture_sizes(inputs, images), processor) if layout and pixels else None
        if grids is not None:
            places = Places.lay_out(vision, grids, samples)
        return cls(labels, places=places, model_type=model_type, stack=stack, samples=samples)

    def require_places(self) -> Places:
        """`places`, or a ValueError that says why there are none."""
        if self.places is None:
            family = f"model_type {self.model_type!r}" if self.model_type else "a map made by hand"
            reason = "register its layout with probes.tokens.grid.family"
            if self.model_type in FAMILIES:
                reason = "its inputs held no pixels, or it is a variant whose layout is not known"
            raise ValueError(f"no places of visual tokens for {family}: {reason}")
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

    def relabel(self, groups: Mapping[str, Bool[Tensor, "batch positions"]]) -> TokenMap:
        """A map in which the positions of each mask belong to the group of its name, whatever they were before.

        Names may be those of groups there are; new ones follow these on the group axis. Places stay.

        Raises:
            ValueError: A mask has another shape or holds padding, or masks overlap.
        """
        labels, names = self.labels.clone(), list(self.groups)
        taken = self.mask("pad") if "pad" in self.groups else torch.zeros_like(labels, dtype=torch.bool)
        for name, mask in groups.items():
            mask = mask.to(labels.device, torch.bool)
            if mask.shape != labels.shape:
                raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}, the map {list(labels.shape)}")
            if (mask & taken).any():
                row, position = (mask & taken).nonzero()[0].tolist()
                raise ValueError(f"position {position} of row {row} cannot be {name!r}: it is padding or in two masks")
            taken = taken | mask
            names = names if name in names else [*names, name]
            labels[mask] = names.index(name)
        return replace(self, labels=labels, groups=tuple(names))

    def split(self, group: str, by: str) -> TokenMap:
        """A map with a group for each picture of `group`, for instance: `split("vision", by="image")` puts vision_0,
        vision_1, ... in the place of vision, as many as the row with most of them has.

        Args:
            group: Of visual tokens.
            by: "image", "frame" (of its image) or "tile" (of its frame).

        Raises:
            ValueError: An unknown group or `by`, a position of the group without a place, or a name that is taken.
        """
        if by not in ("image", "frame", "tile"):
            raise ValueError(f"cannot split by {by!r}: there are image, frame, tile")
        first, mask, number = self.index(group), self.mask(group), getattr(self.require_places(), by)
        if not mask.any() or (number[mask] < 0).any():
            raise ValueError(f"cannot split {group!r} by {by}: it holds no visual tokens, or others too")
        parts = [f"{group}_{n}" for n in range(int(number[mask].max()) + 1)]
        if taken := set(parts) & set(self.groups):
            raise ValueError(f"cannot split {group!r}: there is a group {sorted(taken)[0]!r} already")
        labels = torch.where(self.labels > first, self.labels + len(parts) - 1, self.labels)
        labels = torch.where(mask, first + number, labels)
        return replace(self, labels=labels, groups=(*self.groups[:first], *parts, *self.groups[first + 1 :]))


def _answers(inputs: Mapping[str, Any]) -> Bool[Tensor, "batch positions"]:
    """What is supervised or said by the assistant."""
    ids = inputs["input_ids"]
    response = torch.zeros_like(ids, dtype=torch.bool)
    if inputs.get("labels") is not None:
        response |= inputs["labels"] != -100
    if inputs.get("assistant_masks") is not None:
        response |= torch.as_tensor(inputs["assistant_masks"], device=ids.device).bool()
    if inputs.get("answer_mask") is not None:
        answers = inputs["answer_mask"].bool()
        response |= nn.functional.pad(answers, (ids.shape[1] - answers.shape[1], 0))
    return response


def _prefused(
    model: PreTrainedModel, inputs: Mapping[str, Any], labels: Int[Tensor, "batch positions"]
) -> tuple[Int[Tensor, "frames places"], Int[Tensor, " frames"]]:
    """Groups in the sequences that the model's pre-fusion layers see, and the row of the inputs each is from."""
    if not hasattr(model, "prefusion_positions"):
        raise ValueError(f"{type(model).__name__} has no stack 'prefusion': only LLaVA-Mini has")
    held, samples = (part.to(labels.device) for part in model.prefusion_positions(**inputs))
    text = labels[samples].gather(1, held.clamp(min=0))
    # By the codes of prefusion_positions: -1 fills up, what lies below is visual.
    visual = torch.where(held == -1, GROUPS.index("pad"), GROUPS.index("vision"))
    return torch.where(held >= 0, text, visual), samples
