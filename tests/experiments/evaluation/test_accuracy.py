"""Exact-match accuracy and its blind controls."""

from functools import partial
from itertools import islice

import pytest
import torch
from PIL import Image

from experiments.config.schema import TrainConfig
from experiments.data.encoding import IGNORE_INDEX, Collator, SampleEncoder, chat_messages, restrict_to_answers
from experiments.data.samples import Sample, llava_conversation, single_questions
from experiments.evaluation import questions as questions_module
from experiments.evaluation.accuracy import (
    answer_questions,
    blank_images,
    correct_answers,
    greedy_answers,
    greedy_matches,
    outcome_digits,
    shuffled_images,
)
from experiments.evaluation.questions import EncodedQuestions
from experiments.training.trainer import train_llava
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video

CPU = torch.device("cpu")


def test_greedy_matches_of_known_logits():
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 2, 3], [IGNORE_INDEX, IGNORE_INDEX, 2, 3]])
    logits = torch.zeros(2, 4, 5)
    logits[:, 1, 2] = 1  # the position before the answer predicts it
    logits[0, 2, 3] = 1
    logits[1, 2, 4] = 1  # the second row has a wrong last token
    assert greedy_matches(logits, labels).tolist() == [True, False]


def test_correct_answers_equals_the_outcomes_of_generate(llava, processor, shapes_split, tmp_path):
    """After a short training, so that some answers are correct and some are not."""
    config = TrainConfig(max_steps=100, batch_size=8, learning_rate=1e-2, warmup_steps=1, train_vision=True)
    train_llava(llava, processor, shapes_split.samples, config, tmp_path, 0, CPU)
    samples = list(single_questions(shapes_split.samples))
    outcomes = correct_answers(llava, EncodedQuestions(samples, processor, 7, CPU), "test")
    generated = []
    for sample in samples:
        text = processor.apply_chat_template(chat_messages(sample)[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        ids = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        end = ids.tolist().index(processor.tokenizer.eos_token_id) if processor.tokenizer.eos_token_id in ids else None
        generated.append(end is not None and processor.tokenizer.decode(ids[:end]) == sample.answers[0])
    assert outcomes.tolist() == generated
    assert 0 < sum(generated) < len(generated)


def test_questions_beyond_the_memory_limit_are_encoded_again_and_equal(processor, shapes_split, monkeypatch):
    samples = list(single_questions(shapes_split.samples))[:6]
    one_image = samples[0].image.width * samples[0].image.height * 3
    monkeypatch.setattr(questions_module, "MOST_KEPT_BYTES", 2 * one_image)
    some, none = (EncodedQuestions(samples, processor, 4, CPU, keep=keep) for keep in (True, False))
    assert [some.encoded[index] is some.encoded[index] for index in range(6)] == [True, True, *[False] * 4]
    for first, second in zip(some.batches("some kept"), none.batches("none kept"), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_logits_of_a_question_do_not_depend_on_its_batch(llava, processor, shapes_split):
    samples = list(single_questions(shapes_split.samples))[:12]
    with torch.no_grad():
        for inputs in EncodedQuestions(samples, processor, 12, CPU).batches("all"):
            batched = llava(**inputs).logits[:, -3:]
        single = [
            llava(**inputs).logits[0, -3:] for inputs in EncodedQuestions(samples, processor, 1, CPU).batches("one")
        ]
    torch.testing.assert_close(batched, torch.stack(single), atol=1e-5, rtol=1e-4)


def test_blind_controls_change_the_images_alone(shapes_split):
    samples = list(single_questions(shapes_split.samples))
    for condition in (blank_images, shuffled_images):
        changed = condition(samples)
        assert [s.conversations for s in changed] == [s.conversations for s in samples]
        assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(changed, samples, strict=True))
    assert {s.image.getcolors()[0][1] for s in blank_images(samples)} == {(128, 128, 128)}
    assert sorted(s.image.tobytes() for s in shuffled_images(samples)) == sorted(s.image.tobytes() for s in samples)


def test_blind_controls_of_videos_and_text_keep_their_kind():
    def clip(level: int) -> Video:
        return Video([Image.new("RGB", (4, 2), (level,) * 3)] * 3)

    clips = [
        Sample(f"v{i}", (partial(clip, i),), llava_conversation([("?", "a")], ["<video>"]), ["x"]) for i in range(2)
    ]
    image = Sample("i", (lambda: Image.new("RGB", (4, 2)),), llava_conversation([("?", "a")]), ["x"])
    text = Sample("t", (), llava_conversation([("?", "a")], []), ["x"])
    samples = [clips[0], text, image, clips[1]]
    first, unchanged_text, only_image, second = shuffled_images(samples)
    assert (first.loaders, second.loaders) == (clips[1].loaders, clips[0].loaders)
    assert unchanged_text == text
    assert only_image.image.getcolors() == [(8, (128, 128, 128))]  # no other question has an image
    (grey,) = blank_images(samples)[0].visual_inputs
    assert [frame.getcolors() for frame in grey] == [[(8, (128, 128, 128))]] * 3


def test_shuffled_images_are_never_the_own_ones():
    """One image has most questions, so that the question half the set away may be about the same image."""
    loaders = [partial(Image.new, "RGB", (4, 2), (level,) * 3) for level in range(3)]
    samples = [
        Sample(str(n), (loaders[image],), llava_conversation([("?", "a")]), ["x"])
        for n, image in enumerate([0, 0] + [1] * 8 + [2, 2])
    ]
    assert all(a.loaders != b.loaders for a, b in zip(shuffled_images(samples), samples, strict=True))


def test_outcome_digits_are_1_for_correct():
    assert outcome_digits(torch.tensor([True, False, True])) == "101"


@pytest.mark.parametrize("prefusion", [None, 0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_restrict_to_answers_keeps_logits_loss_and_gradient(llava, processor, shapes_split, prefusion, side):
    """In left-padded and right-padded batches, for LLaVA and LLaVA-Mini."""
    if prefusion is not None:
        torch.manual_seed(0)
        llava = LlavaMiniForConditionalGeneration.from_llava(
            llava, compressor="query", compressor_size=1, prefusion_layers=prefusion
        )
        processor = LlavaMiniProcessor.from_llava(processor, llava.config)
    inputs = Collator(processor, side)([SampleEncoder(processor)(sample) for sample in islice(shapes_split.samples, 3)])
    model_inputs, labels = restrict_to_answers(inputs)
    kept_count = len(model_inputs["logits_to_keep"])
    assert torch.equal(model_inputs["logits_to_keep"], torch.arange(inputs["labels"].shape[1])[-kept_count:])
    assert torch.equal(labels, inputs["labels"][:, -kept_count:])
    assert 0 < kept_count < inputs["labels"].shape[1]
    assert (inputs["labels"][:, : -kept_count + 1] == IGNORE_INDEX).all()
    assert (inputs["labels"][:, -kept_count + 1] != IGNORE_INDEX).any()
    gradients = []
    for batch in (inputs, model_inputs | {"labels": labels}):
        llava.zero_grad()
        output = llava(**batch)
        output.loss.backward()
        gradients.append(llava.model.multi_modal_projector.linear_1.weight.grad.clone())
        torch.testing.assert_close(output.logits[:, -kept_count:], llava(**inputs).logits[:, -kept_count:])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        llava(**model_inputs).logits, llava(**inputs).logits[:, -kept_count:]
    )  # without labels, as in evaluation


def test_restrict_to_answers_without_labels_keeps_all_logits(llava, processor, shapes_split):
    inputs = Collator(processor)([SampleEncoder(processor)(shapes_split.samples[0])])
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    assert len(restrict_to_answers(inputs)[0]["logits_to_keep"]) == inputs["labels"].shape[1]


def test_answer_questions_returns_the_texts_of_generate_up_to_the_first_wrong_token(llava, processor, shapes_split):
    """An untrained model answers wrongly, so each answer is the first token that `generate` writes."""
    samples = list(single_questions(shapes_split.samples))[:8]
    outcomes, tokens = answer_questions(llava, EncodedQuestions(samples, processor, 3, CPU), "test")
    assert not outcomes.any()
    for sample, answer in zip(samples, tokens, strict=True):
        text = processor.apply_chat_template(chat_messages(sample)[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        ids = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        right = processor.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
        same = next((i for i, pair in enumerate(zip(ids, right, strict=False)) if pair[0] != pair[1]), len(right))
        assert answer == ids[: same + 1]


def test_greedy_answers_of_known_logits():
    """The first row is right, the second wrong at its first token, the third at its second of three."""
    labels = torch.tensor([[IGNORE_INDEX, 2, 3, IGNORE_INDEX], [IGNORE_INDEX, 2, 3, 1], [IGNORE_INDEX, 2, 3, 1]])
    logits = torch.zeros(3, 4, 5)
    for row, tokens in enumerate([(2, 3, 4), (4, 3, 1), (2, 4, 1)]):
        for position, token in enumerate(tokens):
            logits[row, position, token] = 1
    assert greedy_answers(logits, labels) == [[2, 3], [4], [2, 4]]
