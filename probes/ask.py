"""Ask a model a question about images, and record what each word of the prompt and of its answer attends to."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention
from probes.attention.sinks import SINK_STATISTICS, find_sinks
from probes.attribution import Relevancy, relevancy
from probes.fusion.curves import ScoreFunction, removal_curve
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.interventions import intervene
from probes.readouts.logit_lens import LogitLens, decode_one_by_one, logit_lens
from probes.tokens.token_map import TokenMap, visual_token_ids
from probes.unwrapping import require_eval_mode
from probes.view.page import AttentionView
from probes.view.run_data import LayerCurve, PatchMap, PatchTexts
from probes.view.words import find_words

MOST_NEW_TOKENS = 64
SINK_RULE = (
    "Visual sinks (dashed): patches that stand out for at least half of the words and heads of a layer. A patch stands out "
    "for a word and a head if it gets at least 10 times the attention of the median patch, and is an outlier among the "
    "patches' scores. No constant depends on the model."
)
STATISTICS = ("received", *SINK_STATISTICS)
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Answer:
    """A model's answer, and what was recorded while it was read again with its prompt.

    Attributes:
        question: The question.
        text: The answer, without special tokens.
        images: The images of the prompt; a video is a list of its frames.
        tokens: Map of the prompt and the answer.
        inputs: Inputs of the prompt and the answer.
        attention: Attention of each word of the question and the answer.
        removal: Log-probability (nats) of the answer, its special tokens left out, without the image from layer k on, for
            k = 0, 1, ..., all layers; None if it was not measured.
        lens: The logit lens on the visual tokens; None if it was not read.
        relevancy: Relevancy for the answer's first token; None if it was not computed.
        tokenizer: The tokenizer of the model.
        notes: Why a part is missing.
    """

    question: str
    text: str
    images: tuple[Any, ...]
    tokens: TokenMap
    inputs: Mapping[str, Any]
    attention: AttentionRecord
    tokenizer: Any
    notes: tuple[str, ...] = ()
    removal: Float[Tensor, " starts"] | None = None
    lens: LogitLens | None = None
    relevancy: Relevancy | None = None

    def __repr__(self) -> str:
        """Return question and answer in one line: the fields hold thousands of numbers, which a notebook would print."""
        return f"Answer(question={self.question!r}, text={self.text!r})"

    def view(self, name: str = "", title: str = "") -> AttentionView:
        """Return the page of this answer.

        Args:
            name: Name of the run on the page; by default the model's type.
            title: Title of the page; by default the question.
        """
        parts: dict[str, Any] = {"maps": [*self._relevancy_maps(), *self._lens_maps()]}
        sinks = find_sinks(self.attention, self.tokens, self.attention.targets)
        parts["sinks"] = sinks.by_attention[:, 0], SINK_RULE
        if self.removal is not None:
            label = "probability of the answer without the image, from a layer on"
            starts = range(len(self.removal))
            parts["removal"] = LayerCurve(label, starts, self.removal.exp().tolist())
        return AttentionView([self.attention.view_run(self.images, name, **parts)], title or self.question)

    def image_mass(self) -> Float[Tensor, " layers"]:
        """Return the attention on the image by layer: mean over heads and over the words that can attend to it."""
        return self.attention.mass[:, 0, ..., self.attention.sources.index("vision")].nanmean((1, 2))

    def _relevancy_maps(self) -> list[PatchMap]:
        if self.relevancy is None:
            return []
        layers = self.relevancy.layers[list(self.attention.layers), 0][:, None, None]
        rollout = self.relevancy.rollout[0].expand(len(layers), 1, 1, -1)
        return [
            PatchMap("relevancy", "relevancy for the answer, this layer", "gradient x attention", layers),
            PatchMap("rollout", "relevancy for the answer, all layers", "relevancy", rollout),
        ]

    def _lens_maps(self) -> list[PatchTexts]:
        if self.lens is None:
            return []
        texts = [decode_one_by_one(self.tokenizer, ids.tolist()) for ids in self.lens.ids[..., 0]]
        return [PatchTexts("lens", "logit lens on the patches", texts)]


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    question: str,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
    answer: str | None = None,
    interventions: Sequence[Any] = (),
    max_new_tokens: int = MOST_NEW_TOKENS,
) -> Answer:
    """Let a model answer a question about images, and record the attention of each word.

    The model answers greedily. Then it reads the prompt and its answer in one pass, in which the attention is recorded.
    The removal curve, the logit lens on visual tokens and the relevancy for the answer follow, where the model's family
    supports them; `notes` say what is missing. They are left out under interventions.

    Args:
        model: A vision-language model in eval mode.
        processor: Its processor.
        question: The question.
        images: PIL images, in the order in which the question follows them.
        videos: Videos, each a list of frames, after the images.
        answer: An answer to read instead of the model's own.
        interventions: Interventions that act while the model answers and while attention is recorded.
        max_new_tokens: Most tokens of the answer.

    Raises:
        TypeError: If images are not a list.
        ValueError: If there is no image or video, the model has no image tokens, or the answer is empty.

    Example:
        >>> from probes.ask import ask
        >>> answered = ask(model, processor, "how many rings are there?", [image], max_new_tokens=3)
        >>> page = answered.view().save(folder / "page.html")
    """
    model = require_eval_mode(model)
    if not isinstance(images, Sequence):
        raise TypeError(f"images: found a {type(images).__name__}; pass a list of images")
    if not images and not videos:
        raise ValueError("images: a question needs at least one image or video")
    visual_token_ids(model.config)
    prompt = encode_prompt(model, processor, question, images, videos)
    tokenizer = processor.tokenizer
    seen = (*images, *(list(video) for video in videos))
    sizes = [*images, *(video[0] for video in videos)]
    if answer is None:
        with torch.no_grad(), ExitStack() as stack:
            prompt_map = TokenMap.from_inputs(model, prompt, processor, sizes)
            _intervene(stack, model, prompt_map, interventions)
            generated = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        ids = generated[0, prompt["input_ids"].shape[1] :]
    else:
        ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(model.device)
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if not text:
        raise ValueError(f"answer: the model's answer is empty (token ids {ids.tolist()}); pass answer='...'")
    inputs, labels = append_answer(model, prompt, ids)
    tokens = TokenMap.from_inputs(model, {**inputs, "labels": labels}, processor, sizes)
    notes: list[str] = []
    try:
        words = find_words(tokens, inputs["input_ids"], tokenizer, question=question)
    except ValueError:  # the tokenizer changes the text, as with lower case or composed letters
        words = find_words(tokens, inputs["input_ids"], tokenizer)
        notes.append("The words are those of the whole prompt: its tokens do not spell the question as it was given.")
    with torch.no_grad(), ExitStack() as stack:
        _intervene(stack, model, tokens, interventions)
        attention = stack.enter_context(record_attention(model, tokens, words=words, statistics=STATISTICS))
        model(**inputs)
    first, score = ids[:1].cpu(), _whole_answer_logprob(ids.tolist(), tokenizer.all_special_ids)
    measurements: dict[str, Callable[[], Any]] = {
        "removal": lambda: torch.from_numpy(removal_curve(model, tokens, inputs, score)[:, 0]),
        "lens": lambda: _read_lens(model, tokens, inputs),
        "relevancy": lambda: relevancy(model, tokens, inputs, first),
    }
    measured: dict[str, Any] = dict.fromkeys(measurements)
    for name, measure in {} if interventions else measurements.items():
        try:
            measured[name] = measure()
        except (ValueError, RuntimeError, NotImplementedError) as error:  # the family does not support it
            notes.append(f"There is no {name}: {str(error).strip().splitlines()[0]}.")
            log.warning(notes[-1])
    return Answer(question, text, seen, tokens, inputs, attention, tokenizer, tuple(notes), **measured)


def encode_prompt(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    question: str,
    images: Sequence[Any] = (),
    videos: Sequence[Sequence[Any]] = (),
) -> dict[str, Any]:
    """Return the inputs of a prompt: images, videos, then the question, in the model's own chat template.

    A processor without a chat template gets the question as it is, and places the images itself.

    Args:
        model: The model, whose device the inputs are moved to.
        processor: Its processor.
        question: The question.
        images: PIL images.
        videos: Videos, each a list of frames.

    Raises:
        ValueError: If a PIL image has more than 8 bits a channel, the processor reads no videos, its chat template cannot
            be rendered, or the prompt has no visual token.
    """
    if videos and not (getattr(processor, "video_processor", None) or getattr(processor, "video_token", None)):
        raise ValueError(f"videos: a {type(processor).__name__} reads no videos; pass frames as images")
    for image in (*images, *(frame for video in videos for frame in video)):
        require_8_bits(image)
    parts = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    text, template = question, getattr(processor, "chat_template", None)
    if template:
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"processor: its chat template cannot be rendered: {error}") from error
    arguments: dict[str, Any] = {"images": [list(images)]} if images else {}
    bos = processor.tokenizer.bos_token
    # A template that writes the start token itself must not get a second one.
    if template and bos and text.startswith(bos):
        arguments["add_special_tokens"] = False
    if videos:
        arguments["videos"] = [list(video) for video in videos]
    try:
        inputs = processor(text=[text], **arguments, return_tensors="pt")
        visual = torch.tensor(visual_token_ids(model.config))
        if parts and not torch.isin(inputs["input_ids"], visual).any():
            raise ValueError("the prompt has no visual token")
    except ValueError as error:
        if template:
            raise
        name = type(processor).__name__
        raise ValueError(f"processor: {name} has no chat_template; set it, or write image tokens: {error}") from error
    return dict(inputs.to(model.device, model.dtype))


def require_8_bits(image: Any) -> None:
    """Check that a PIL image has at most 8 bits a channel. Converting another to RGB would clip it, mostly to white.

    Raises:
        ValueError: If it has more.
    """
    mode = getattr(image, "mode", "")
    if mode == "F" or mode.startswith("I"):
        raise ValueError(
            f"images: an image of mode {mode} has more than 8 bits a channel; scale its values to 0 to 255 and convert it, "
            "for example with llava_mini.images.to_rgb"
        )


def append_answer(
    model: PreTrainedModel, prompt: Mapping[str, Any], ids: Int[Tensor, " answer"]
) -> tuple[dict[str, Any], Int[Tensor, "1 positions"]]:
    """Return the inputs of a prompt with an answer, and labels that mark the answer.

    Args:
        model: The model that the inputs are for.
        prompt: Inputs of one prompt.
        ids: Token ids of the answer.
    """
    shape, count = prompt["input_ids"].shape, len(ids)
    filling = {"input_ids": ids[None], "attention_mask": torch.ones(1, count, dtype=torch.long)}
    if model.config.model_type == "paligemma":  # its answers are a suffix, which is causal; the prefix is two-way
        filling["token_type_ids"] = torch.ones(1, count, dtype=torch.long)
    inputs = dict(prompt)
    for name, value in prompt.items():
        if isinstance(value, Tensor) and value.shape == shape:
            more = filling.get(name, torch.zeros(1, count, dtype=value.dtype))
            inputs[name] = torch.cat([value, more.to(value)], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : shape[1]] = -100
    if "answer_mask" in inspect.signature(model.forward).parameters:  # LLaVA-Mini fuses the image into prompts alone
        inputs["answer_mask"] = labels >= 0
    return inputs, labels


def _whole_answer_logprob(ids: Sequence[int], special: Sequence[int]) -> ScoreFunction:
    """Return a score function: the log-probability (nats) of an answer at the end of the inputs, without special tokens.

    The first token alone would tell little of an answer such as "The ring is red".
    """
    counted = [number for number, token in enumerate(ids) if token not in special]
    at = torch.tensor(counted) - len(ids) - 1  # each token is predicted by the position before it

    def score(logits: Float[Tensor, "batch positions vocabulary"]) -> Float[Tensor, " batch"]:
        predicted = logits[:, at.to(logits.device)].float().log_softmax(-1)
        return predicted[:, range(len(counted)), [ids[number] for number in counted]].sum(1)

    return score


def _intervene(stack: ExitStack, model: PreTrainedModel, tokens: TokenMap, interventions: Sequence[Any]) -> None:
    if interventions:
        stack.enter_context(intervene(model, tokens, *interventions))


def _read_lens(model: PreTrainedModel, tokens: TokenMap, inputs: Mapping[str, Any]) -> LogitLens:
    layers = len(decoder_layers(find_decoder(model)))
    with torch.no_grad(), logit_lens(model, tokens, at="vision", depths=range(layers + 1), top=1) as lens:
        model(**inputs)
    return lens
