"""The lens of a record against norm and head, run by hand over transformers' hidden states of each question alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from experiments.config.schema import ProbeConfig
from experiments.data.encoding import IGNORED
from experiments.data.samples import conversation, single_questions
from experiments.data.shapes import load_shapes
from experiments.evaluation.analyses import analyse
from experiments.evaluation.questions import Questions
from experiments.evaluation.readouts import before_answers, lens
from experiments.files import ASSETS
from experiments.models.build import load
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

CPU = torch.device("cpu")
asked = partial(Questions, device=CPU)


@torch.no_grad()
def by_hand(model, samples, processor):
    """Whether the right first token ranks first `[depths, samples]`, and its log-probability."""
    right, logprobs = [], []
    for inputs in asked(samples, processor, 1).batches("by hand"):
        start = next(i for i, label in enumerate(inputs["labels"][0].tolist()) if label != IGNORED)
        word = inputs["input_ids"][0, start]
        output = model(**inputs, output_hidden_states=True)
        norm, head = model.model.language_model.norm, model.lm_head
        states = [head(norm(state[0, start - 1])) for state in output.hidden_states[:-1]]
        read = torch.stack([*states, output.logits[0, start - 1]]).log_softmax(-1)
        right.append(read.argmax(-1) == word)
        logprobs.append(read[:, word])
    return torch.stack(right, 1), torch.stack(logprobs, 1)


def agrees(model, samples, processor, batch_size):
    right, logprobs = by_hand(model, samples, processor)
    found = lens(model, asked(samples, processor, batch_size))
    assert found["samples"] == len(samples)
    assert [run["correct"] for run in found["depths"]] == ["".join(str(int(r)) for r in row) for row in right]
    assert [run["logprob"] for run in found["depths"]] == pytest.approx(logprobs.mean(1).tolist(), abs=3e-5)
    return found


def test_the_shipped_model_by_hand_and_by_generation():
    """Questions of several lengths, so that batches are padded."""
    model, processor = load(str(ASSETS / "tiny"))
    samples = list(single_questions(load_shapes("test", 2).samples))
    found = agrees(model, samples, processor, 5)
    assert len(found["depths"]) == 7
    for sample, digit in zip(samples, found["depths"][-1]["correct"], strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.questions[0]}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        assert digit == str(int(processor.decode(said) == sample.answers[0]))


def test_answers_of_several_tokens_count_by_their_first(deep, processor, few):
    samples = [
        type(s)(s.id, s.load, conversation([(s.questions[0], answer)], s.slots), s.kinds)
        for s, answer in zip(
            single_questions(few.samples), ("red and blue", "red", "2 red", "zebra", "2"), strict=False
        )
    ]
    agrees(deep, samples, processor, 2)


def test_a_llava_mini(deep, processor, few):
    mini = LlavaMiniForConditionalGeneration.from_llava(
        deep, compressor="query", compressor_size=2, prefusion_layers=2
    ).eval()
    samples = list(single_questions(few.samples))[:7]
    agrees(mini, samples, LlavaMiniProcessor.from_llava(processor, mini.config), 3)


labels_of_rows = st.integers(2, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([IGNORED, 4, 7]), min_size=width - 1, max_size=width - 1), min_size=1, max_size=4
    )
)


@given(labels_of_rows)
def test_the_position_ahead_of_each_rows_first_label(rows):
    """A first position predicts for the second, so none is labelled there; rows without a label have none."""
    labels = torch.tensor([[IGNORED, *row] for row in rows])
    before, wanted = before_answers(labels)
    places = [(i, next((k for k, label in enumerate(row) if label != IGNORED), None)) for i, row in enumerate(rows)]
    assert before.nonzero().tolist() == [[i, k] for i, k in places if k is not None]
    assert wanted.tolist() == [rows[i][k] for i, k in places if k is not None]


class Scaled(LlavaForConditionalGeneration):
    """Divides its logits, as Granite does: norm and head alone would give other log-probabilities."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output


def test_a_model_that_cannot_be_read_has_a_record_that_says_why(llava, questions):
    model = Scaled(copy.deepcopy(llava.config)).eval()
    found = analyse(model, questions, questions, ProbeConfig(lens=True, knockout=True))
    assert found["lens"] is None
    assert found["lens_note"] == "this model's logits are not its final norm and head alone: the lens cannot read it"
    assert len(found["knockout"]["windows"]) == 3


def test_a_record_has_the_lens_where_it_was_asked_for(llava, questions):
    found = analyse(llava, questions, questions, ProbeConfig(lens=True))
    assert found["lens"] == lens(llava, questions)
    assert (found["lens_note"], found["fusion"]) == (None, None)
    assert analyse(llava, questions, questions, ProbeConfig())["lens"] is None
