"""The logit lens of a record against norm and head applied to transformers' hidden states of each question."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from experiments.config.schema import ProbeConfig
from experiments.data.encoding import IGNORE_INDEX
from experiments.data.samples import llava_conversation, single_questions
from experiments.data.shapes import load_shapes
from experiments.evaluation.analyses import run_probes
from experiments.evaluation.questions import EncodedQuestions
from experiments.evaluation.readouts import answer_start, measure_lens
from experiments.files import ASSETS
from experiments.models.build import load_checkpoint
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

CPU = torch.device("cpu")
encode_questions = partial(EncodedQuestions, device=CPU)


@torch.no_grad()
def reference_lens(model, samples, processor):
    """Return whether the right first token ranks first `[depths, samples]`, and its log-probability."""
    correct, logprobs = [], []
    for inputs in encode_questions(samples, processor, 1).batches("reference"):
        start = next(i for i, label in enumerate(inputs["labels"][0].tolist()) if label != IGNORE_INDEX)
        target = inputs["input_ids"][0, start]
        output = model(**inputs, output_hidden_states=True)
        norm, head = model.model.language_model.norm, model.lm_head
        states = [head(norm(state[0, start - 1])) for state in output.hidden_states[:-1]]
        logprobs_by_depth = torch.stack([*states, output.logits[0, start - 1]]).log_softmax(-1)
        correct.append(logprobs_by_depth.argmax(-1) == target)
        logprobs.append(logprobs_by_depth[:, target])
    return torch.stack(correct, 1), torch.stack(logprobs, 1)


def check_measure_lens(model, samples, processor, batch_size):
    """Check the `lens` part of a record against the reference, and return it."""
    correct, logprobs = reference_lens(model, samples, processor)
    lens = measure_lens(model, encode_questions(samples, processor, batch_size))
    assert lens["samples"] == len(samples)
    assert [run["correct"] for run in lens["depths"]] == ["".join(str(int(r)) for r in row) for row in correct]
    assert [run["logprob"] for run in lens["depths"]] == pytest.approx(logprobs.mean(1).tolist(), abs=3e-5)
    return lens


def test_measure_lens_of_the_shipped_model_equals_reference_and_generation():
    """Questions have several lengths, so that batches are padded."""
    model, processor = load_checkpoint(str(ASSETS / "tiny"))
    samples = list(single_questions(load_shapes("test", 2).samples))
    lens = check_measure_lens(model, samples, processor, 5)
    assert len(lens["depths"]) == 7
    for sample, digit in zip(samples, lens["depths"][-1]["correct"], strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.questions[0]}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        assert digit == str(int(processor.decode(generated) == sample.answers[0]))


def test_measure_lens_of_answers_with_several_tokens_reads_the_first(deep_llava, processor, shapes_split):
    samples = [
        type(s)(s.id, s.loaders, llava_conversation([(s.questions[0], answer)], s.placeholders), s.question_types)
        for s, answer in zip(
            single_questions(shapes_split.samples), ("red and blue", "red", "2 red", "zebra", "2"), strict=False
        )
    ]
    check_measure_lens(deep_llava, samples, processor, 2)


def test_measure_lens_of_a_llava_mini_equals_reference(deep_llava, processor, shapes_split):
    mini = LlavaMiniForConditionalGeneration.from_llava(
        deep_llava, compressor="query", compressor_size=2, prefusion_layers=2
    ).eval()
    samples = list(single_questions(shapes_split.samples))[:7]
    check_measure_lens(mini, samples, LlavaMiniProcessor.from_llava(processor, mini.config), 3)


labels_of_rows = st.integers(2, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([IGNORE_INDEX, 4, 7]), min_size=width - 1, max_size=width - 1), min_size=1, max_size=4
    )
)


@given(labels_of_rows)
def test_answer_start_is_the_position_before_each_rows_first_label(rows):
    """The first position is never labelled, since nothing predicts it. Rows without a label have no such position."""
    labels = torch.tensor([[IGNORE_INDEX, *row] for row in rows])
    mask, targets = answer_start(labels)
    first_labels = [
        (i, next((k for k, label in enumerate(row) if label != IGNORE_INDEX), None)) for i, row in enumerate(rows)
    ]
    assert mask.nonzero().tolist() == [[i, k] for i, k in first_labels if k is not None]
    assert targets.tolist() == [rows[i][k] for i, k in first_labels if k is not None]


class ScaledLogitsLlava(LlavaForConditionalGeneration):
    """A LLaVA that divides its logits, as Granite does: norm and head alone give other log-probabilities."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output


def test_run_probes_of_a_model_the_lens_cannot_read_notes_the_reason(llava, questions):
    model = ScaledLogitsLlava(copy.deepcopy(llava.config)).eval()
    parts = run_probes(model, questions, questions, ProbeConfig(lens=True, knockout=True))
    assert parts["lens"] is None
    assert "final norm and head" in parts["lens_note"]
    assert len(parts["knockout"]["windows"]) == 3


def test_run_probes_on_too_few_images_notes_why_there_is_no_readout(llava, processor):
    samples = list(single_questions(load_shapes("test", 4).samples))
    parts = run_probes(llava, encode_questions(samples, processor, 8), (), ProbeConfig(readout=True))
    assert (parts["readout"], parts["fusion"]) == (None, None)
    assert "5 images" in parts["readout_note"]
    assert "found 4" in parts["readout_note"]


def test_run_probes_has_a_lens_only_if_configured(llava, questions):
    parts = run_probes(llava, questions, questions, ProbeConfig(lens=True))
    assert parts["lens"] == measure_lens(llava, questions)
    assert (parts["lens_note"], parts["fusion"]) == (None, None)
    assert run_probes(llava, questions, questions, ProbeConfig())["lens"] is None
