"""Token maps: the token group of every position, that is padding, system, vision, instruction or response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

import probes.tokens.families  # noqa: F401  registers the layouts
from probes.tokens.layout_registry import LAYOUTS
from probes.tokens.model_inputs import original_image_sizes
from probes.tokens.places import Places
from probes.unwrapping import unwrap_model

GROUPS = ("pad", "system", "vision", "instruction", "response")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Assign every prompt position to exactly one token group.

    Args:
        labels: Group of each position `[batch, positions]`, as an index into `groups`.
        groups: Names of the groups, in the order of every group axis built from this map.
        generated: Group of the tokens that the model generates after the mapped positions.
        places: Image coordinates of each visual token. None for a model family with an unknown layout, and for inputs
            without pixels.
        model_type: `model_type` of the model's config; "" for a map built without a model.
        stack: Layers whose sequences are mapped: "decoder", or LLaVA-Mini's "prefusion".
        samples: Row of the inputs that each row of the map belongs to `[batch]`; None if both have the same rows.

    Raises:
        ValueError: If a label is no index into `groups`, a group name occurs twice, or `generated` is no group.

    Example:
        >>> tokens = TokenMap.from_inputs(model, inputs)
        >>> {group: int(tokens.mask(group).sum()) for group in tokens.groups}
        {'pad': 0, 'system': 0, 'vision': 36, 'instruction': 6, 'response': 0}
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
            raise ValueError(
                f"groups {self.groups} must be unique and include {self.generated!r}, the group of generated tokens"
            )
        if self.labels.ndim != 2 or ((self.labels < 0) | (self.labels >= len(self.groups))).any():
            raise ValueError(
                f"labels {list(self.labels.shape)} must be [batch, positions] with values from 0 to "
                f"{len(self.groups) - 1}, one group per position"
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
        """Build the map from the inputs of a model call.

        The first rule that applies to a position determines its group:

        1. `pad`: `attention_mask` is 0.
        2. `vision`: the token is the image or video token, which the processor repeats once per visual token of the
           language model.
        3. `response`: `labels` are not -100, or `assistant_masks` or LLaVA-Mini's `answer_mask` are set. Tokens
           generated after the last position are also response.
        4. `system`: text before the first visual token of the row, where LLaVA's template puts the system prompt.
        5. `instruction`: all other text. A row without an image has no `system`; its whole prompt is instruction.

        Args:
            model: Model whose config names the image token, as `image_token_id` or `image_token_index`.
            inputs: `input_ids` `[batch, positions]`. Optional are `attention_mask`, `labels` and `assistant_masks` (from
                `apply_chat_template`) of the same shape, and `answer_mask`, which may be shorter and is aligned to the
                end of the rows.
            processor: Processor that produced the inputs. `places` have boxes only with it and with the image sizes.
            images: Original images of the batch in reading order, or their sizes; see
                `probes.tokens.model_inputs.original_image_sizes`. Not needed if the inputs hold `image_sizes`.
            stack: "decoder" for the layers of the language model. "prefusion" for the layers in which LLaVA-Mini fuses
                text with patches. There the map has one row per frame: its patches, then the compressed tokens if the
                layers process them (`places` count these as one more tile), then the fused text, then `pad`. Text keeps
                the group that it has in the decoder.

        Returns:
            The token map, on the device of `input_ids`.

        Raises:
            ValueError: If `input_ids` are missing or not 2-D, another tensor has another shape, the config names no
                image token, no row holds a visual token, the visual tokens do not match the images, `input_ids`
                hold audio tokens, or the model has no such stack.

        Example:
            >>> tokens = TokenMap.from_inputs(model, inputs, processor, [image])
            >>> tokens.places.box[0][tokens.mask("vision")[0]][0].tolist()  # left, top, right, bottom in pixels
            [0.0, 0.0, 8.0, 8.0]
        """
        model = unwrap_model(model)
        input_ids = inputs.get("input_ids")
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError(
                f"inputs need input_ids of shape [batch, positions]; given: {', '.join(inputs) or 'nothing'}"
            )
        for name in ("attention_mask", "labels", "assistant_masks"):
            if inputs.get(name) is not None and torch.as_tensor(inputs[name]).shape != input_ids.shape:
                shapes = f"{list(torch.as_tensor(inputs[name]).shape)}, input_ids {list(input_ids.shape)}"
                raise ValueError(f"{name} has shape {shapes}; both must be [batch, positions]")
        audio = getattr(model.config, "audio_token_id", None)
        if audio is not None and (input_ids == audio).any():
            raise ValueError(
                f"input_ids hold audio tokens ({audio}), which no group of a token map describes: leave the audio out"
            )
        visual_ids = visual_token_ids(model.config)
        vision = torch.isin(input_ids, torch.tensor(visual_ids, device=input_ids.device))
        pad = torch.zeros_like(vision)
        if inputs.get("attention_mask") is not None:
            pad = inputs["attention_mask"] == 0
        vision = vision & ~pad
        system = vision.any(dim=1, keepdim=True) & (vision.cumsum(dim=1) == 0)
        labels = torch.full_like(input_ids, GROUPS.index("instruction"))
        # From the weakest rule to the strongest, since later assignments override earlier ones.
        for name, member in (
            ("system", system),
            ("response", _response_mask(inputs)),
            ("vision", vision),
            ("pad", pad),
        ):
            labels[member] = GROUPS.index(name)

        samples = None
        if stack == "prefusion":
            labels, samples = _prefusion_labels(model, inputs, labels)
            vision = labels == GROUPS.index("vision")
        elif stack != "decoder":
            raise ValueError(f"unknown stack {stack!r}; choose decoder or prefusion")
        elif not vision.any():
            image_tokens = " or ".join(map(str, visual_ids))
            raise ValueError(f"no visual token in input_ids: no unpadded position holds the image token {image_tokens}")
        model_type, places = model.config.model_type, None
        layout = LAYOUTS.get(model_type if stack == "decoder" else f"{model_type}/{stack}")
        has_pixels = any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
        vision_type = getattr(getattr(model.config, "vision_config", None), "model_type", None)
        # Pixtral's `image_sizes` are those of the processed images.
        sizes = original_image_sizes({} if vision_type == "pixtral" else inputs, images)
        grids = layout(model.config, inputs, sizes, processor) if layout and has_pixels else None
        if grids is not None:
            places = Places.from_grids(vision, grids, samples)
        return cls(labels, places=places, model_type=model_type, stack=stack, samples=samples)

    def require_places(self) -> Places:
        """Return `places`.

        Raises:
            ValueError: If there are none; the message names the reason.
        """
        if self.places is None:
            subject = f"model_type {self.model_type!r}" if self.model_type else "a map built without a model"
            reason = "register its layout with probes.tokens.layout_registry.register_layout"
            if self.model_type in LAYOUTS:
                reason = "its inputs held no pixels, or this variant has an unknown layout"
            raise ValueError(f"no places of visual tokens for {subject}: {reason}")
        return self.places

    def index(self, group: str) -> int:
        """Return the index of `group` on a group axis.

        Raises:
            ValueError: If the group is unknown.

        Example:
            >>> tokens.index("vision")
            2
        """
        if group not in self.groups:
            raise ValueError(f"unknown group {group!r}; this token map has {', '.join(self.groups)}")
        return self.groups.index(group)

    def mask(self, group: str) -> Bool[Tensor, "batch positions"]:
        """Return the mask of the positions in `group` `[batch, positions]`.

        Raises:
            ValueError: If the group is unknown.

        Example:
            >>> tokens.mask("vision").sum().item()
            36
        """
        return self.labels == self.index(group)

    def merge(self, groups: Mapping[str, Sequence[str]]) -> TokenMap:
        """Return a map that pools groups.

        Args:
            groups: For each new name, the groups to pool. The pool takes the index of the first of them.

        Raises:
            ValueError: If a group is unknown or pooled twice, or a new name belongs to a group outside its pool.

        Example:
            >>> tokens.merge({"text": ["system", "instruction", "response"]}).groups
            ('pad', 'text', 'vision')
        """
        new_names = {old: new for new, olds in groups.items() for old in olds}
        if len(new_names) < sum(len(olds) for olds in groups.values()):
            raise ValueError(f"a group is pooled twice in {dict(groups)}; assign each group to one pool")
        for old in new_names:
            self.index(old)
        for new in groups:
            if new in self.groups and new not in new_names:
                raise ValueError(f"cannot pool into {new!r}: it is a separate group; include it in the pool")
        names = [new_names.get(old, old) for old in self.groups]
        pooled = tuple(dict.fromkeys(names))
        index = torch.tensor([pooled.index(name) for name in names], device=self.labels.device)
        generated = new_names.get(self.generated, self.generated)
        return replace(self, labels=index[self.labels], groups=pooled, generated=generated)

    def relabel(self, groups: Mapping[str, Bool[Tensor, "batch positions"]]) -> TokenMap:
        """Return a map in which the masked positions belong to the named groups, whatever their group was before.

        Args:
            groups: For each group, the mask of its positions `[batch, positions]`. New names are appended to the group
                axis. `places` are unchanged.

        Raises:
            ValueError: If a mask has another shape or includes padding, or if masks overlap.

        Example:
            >>> last = torch.zeros_like(tokens.mask("pad"))
            >>> last[:, -1] = True
            >>> tokens.relabel({"last": last}).groups
            ('pad', 'system', 'vision', 'instruction', 'response', 'last')
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
        """Return a map in which `group` is replaced by one group per image, frame or tile.

        The new groups are named GROUP_0, GROUP_1, ...; their number is the largest that a row needs.

        Args:
            group: A group of visual tokens.
            by: "image", "frame" (within its image) or "tile" (within its frame).

        Raises:
            ValueError: If the group or `by` is unknown, a position of the group is no visual token, or a new name is
                taken.

        Example:
            >>> tokens.split("vision", by="image").groups
            ('pad', 'system', 'vision_0', 'instruction', 'response')
        """
        if by not in ("image", "frame", "tile"):
            raise ValueError(f"cannot split by {by!r}; choose image, frame or tile")
        first, mask, number = self.index(group), self.mask(group), getattr(self.require_places(), by)
        if not mask.any() or (number[mask] < 0).any():
            raise ValueError(f"cannot split {group!r} by {by}: all of its positions must be visual tokens")
        parts = [f"{group}_{n}" for n in range(int(number[mask].max()) + 1)]
        if taken := set(parts) & set(self.groups):
            raise ValueError(f"cannot split {group!r}: the map already has a group {sorted(taken)[0]!r}")
        labels = torch.where(self.labels > first, self.labels + len(parts) - 1, self.labels)
        labels = torch.where(mask, first + number, labels)
        return replace(self, labels=labels, groups=(*self.groups[:first], *parts, *self.groups[first + 1 :]))


def visual_token_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the token ids that stand for visual tokens of images and, if the model has one, of videos.

    Args:
        config: Config of the whole vision-language model.

    Raises:
        ValueError: If the config names no such token.

    Example:
        >>> visual_token_ids(model.config) == (model.config.image_token_id,)
        True
    """
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = dict.fromkeys(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    if not ids:
        raise ValueError(
            f"{type(config).__name__} has neither image_token_id nor image_token_index; "
            "pass the config of a vision-language model"
        )
    return tuple(ids)


def _response_mask(inputs: Mapping[str, Any]) -> Bool[Tensor, "batch positions"]:
    """Return the mask of positions that are supervised or written by the assistant."""
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


def _prefusion_labels(
    model: PreTrainedModel, inputs: Mapping[str, Any], labels: Int[Tensor, "batch positions"]
) -> tuple[Int[Tensor, "frames positions"], Int[Tensor, " frames"]]:
    """Return the group of every position in the pre-fusion sequences, and the input row of each sequence."""
    if not hasattr(model, "prefusion_positions"):
        raise ValueError(f"{type(model).__name__} has no stack 'prefusion'; only LLaVA-Mini has pre-fusion layers")
    positions, samples = (part.to(labels.device) for part in model.prefusion_positions(**inputs))
    text = labels[samples].gather(1, positions.clamp(min=0))
    # In the codes of prefusion_positions, -1 marks filler and lower values mark visual tokens.
    visual = torch.where(positions == -1, GROUPS.index("pad"), GROUPS.index("vision"))
    return torch.where(positions >= 0, text, visual), samples
