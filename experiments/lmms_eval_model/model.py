"""A model of this project as lmms-eval's model: it generates answers, and scores given ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from experiments.data.encoding import IGNORE_INDEX, Collator, SampleEncoder, restrict_to_answers
from experiments.data.length_limit import LengthLimit
from experiments.data.prompts import prompt_inputs
from experiments.data.samples import Sample
from experiments.devices import inference_mode, select_device
from experiments.evaluation.accuracy import greedy_matches
from experiments.lmms_eval_model.generation_options import cut_at_stops, generate_arguments
from experiments.lmms_eval_model.loglikelihood_repair import repair_loglikelihood
from experiments.lmms_eval_model.request_samples import VideoSampling, request_sample
from experiments.models.build import load_checkpoint
from experiments.models.token_reduction import TokenDropper, keep_all_tokens
from llava_mini import LlavaMiniProcessor


class BuiltModel(lmms):
    """A built model, and what runs around each of its forward calls.

    lmms-eval calls `generate_until` and `loglikelihood` with its requests. It hands each process its share of them.

    Args:
        model: Any vision-language model with a chat template, on its device.
        processor: Its processor.
        around: Makes a context for each call of the model from the model and its inputs: a method that drops visual
            tokens, layers that do not get the image, attention that is knocked out.
        batch_size: Requests of a batch.
        sampling: Which frames of a video the model gets. Models other than LLaVA-Mini get each frame as an image.

    Attributes:
        requests: The requests that were answered since this list was last emptied, in order.

    Raises:
        ValueError: If the processor has no chat template, image token, pad token or fast tokenizer.
    """

    is_simple = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        around: TokenDropper = keep_all_tokens,
        batch_size: int = 1,
        sampling: VideoSampling = VideoSampling(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        repair_loglikelihood()
        # lmms-eval deletes the modules among a model's attributes once it has the answers. A tuple is not a module, so
        # that the model can run the next tasks.
        self._parts = (model, processor)
        self.around, self.batch_size = around, batch_size
        self.requests: list[Instance] = []
        self.sampling = VideoSampling(
            sampling.frames, sampling.max_frames, as_images=not isinstance(processor, LlavaMiniProcessor)
        )
        self._encode = SampleEncoder(processor, LengthLimit.for_model(model.config, None))
        self._collate = Collator(processor, side="left")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._parts[0]

    @property
    def processor(self) -> ProcessorMixin:
        """The model's processor."""
        return self._parts[1]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the model's answer to each request, without what follows a stop string of its task.

        Args:
            requests: Requests with the arguments (prompt, generation options, doc_to_visual, document, task, split).

        Raises:
            ValueError: If the model or its processor refuses a request or an option.
        """
        answers: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}  # rows of a batch share the options
        for i, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(i)
        groups = [[requests[i] for i in indices] for indices in by_options.values()]
        for indices, group in zip(by_options.values(), groups, strict=True):
            arguments, stops = generate_arguments(group[0].args[1])
            texts = [text for batch in self._batches(group) for text in self._generate(batch, arguments)]
            answers |= {i: cut_at_stops(text, stops) for i, text in zip(indices, texts, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return the loss of the given answer of each request, and whether greedy decoding writes it.

        lmms-eval's multiple choice takes the option with the lowest value, so this is the mean loss in nats over the
        answer's tokens and its end-of-turn token. Its guide names the log-probability, with which the worst would win
        (https://github.com/EvolvingLMMs-Lab/lmms-eval/issues/370).

        Args:
            requests: Requests with the arguments (prompt, answer, doc_to_visual, document, task, split). The answer is a
                text, or a function of the document.

        Raises:
            ValueError: If the processor refuses a request.
        """
        return [pair for batch in self._batches(requests) for pair in self._score(batch)]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"task {requests[0].args[-2]}: this model answers one round; choose a task without rounds"
        )

    def sample(self, request: Instance, answer: str | None = None) -> Sample:
        """Return a request as a sample of this project, named by its task and document.

        Args:
            request: A request of `generate_until` or `loglikelihood`, whose task lmms-eval has loaded.
            answer: The answer of the sample; None for the prompt alone.

        Raises:
            FileNotFoundError: If a video is missing.
            ValueError: If the prompt's placeholders do not fit its images and videos.
        """
        prompt, _, doc_to_visual, doc_id, task, split = request.args
        name = f"task {task}, document {doc_id}"
        try:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        except SystemExit as error:  # the video tasks end the program where a file is missing
            raise FileNotFoundError(f"{name}: {error}") from error
        return request_sample(name, prompt, visuals or [], self.sampling, answer)

    def _batches(self, requests: Sequence[Instance]) -> Iterator[Sequence[Instance]]:
        starts = range(0, len(requests), self.batch_size)
        tasks = ", ".join(dict.fromkeys(request.args[4] for request in requests))
        for start in tqdm(starts, desc=f"answering {tasks:.40}", disable=self._rank > 0, leave=False):
            batch = requests[start : start + self.batch_size]
            yield batch
            self.requests += batch

    def _generate(self, requests: Sequence[Instance], arguments: dict[str, Any]) -> list[str]:
        inputs = self._to_device(prompt_inputs(self.processor, [self.sample(request) for request in requests]))
        with inference_mode(self.model), self.around(self.model, inputs):
            generated = self.model.generate(**inputs, **arguments)
        written = generated[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _score(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        samples = [self.sample(request, self._answer(request)) for request in requests]
        inputs = self._to_device(self._collate([self._encode(sample) for sample in samples]))
        with inference_mode(self.model), self.around(self.model, inputs):
            model_inputs, labels = restrict_to_answers(inputs)
            logits = self.model(**model_inputs).logits
        targets = labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, -labels.shape[1] : -1].transpose(1, 2).float(),
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        means = losses.sum(1) / (targets != IGNORE_INDEX).sum(1)
        return list(zip(means.tolist(), greedy_matches(logits, labels).tolist(), strict=True))

    def _answer(self, request: Instance) -> str:
        _, answer, _, doc_id, task, split = request.args
        return answer(self.task_dict[task][split][doc_id]) if callable(answer) else answer

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }


class PretrainedModel(BuiltModel):
    """A saved model, by its folder or hub name: what `lmms-eval --model llava_mini --model_args pretrained=...` makes.

    Args:
        pretrained: A folder, a name on the model hub, or `asset:tiny`.
        batch_size: Requests of a batch.
        device: auto, cpu, cuda, cuda:1 or mps. With several processes each has the device that accelerate gives it.
        dtype: Floating type of the weights: float32, bfloat16 or float16.
        attention: Attention implementation: sdpa, eager or flash_attention_2.
        frames: Number of evenly spaced frames of a video; None takes one a second, as the paper does.
        max_frames: Largest number of frames of a video.

    Raises:
        FileNotFoundError: If there is no such folder and the name is not a hub name.
        TypeError: If another argument is given.
        ValueError: If an argument is out of range, or the folder holds no vision-language model.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "float32",
        attention: str = "sdpa",
        frames: int | None = None,
        max_frames: int | None = None,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: must be an integer of at least 1, found {batch_size!r}")
        weights = getattr(torch, str(dtype), None)
        if not (isinstance(weights, torch.dtype) and weights.is_floating_point):
            raise ValueError(f"dtype: '{dtype}' is not a floating type of torch; use float32, bfloat16 or float16")
        model, processor = load_checkpoint(str(pretrained), weights, attention)
        is_distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
        model.to(Accelerator().device if is_distributed else select_device(device))
        super().__init__(model, processor, batch_size=int(batch_size), sampling=VideoSampling(frames, max_frames))
