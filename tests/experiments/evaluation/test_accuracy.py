from functools import partial
from itertools import islice

import pytest
import torch
from PIL import Image

from experiments.config.schema import TrainConfig
from experiments.data.encoding import IGNORED, Collator, Encoder, messages, on_answers
from experiments.data.samples import Sample, conversation, single_questions
from experiments.evaluation.accuracy import blank, correct, digits, greedy_matches, shuffled
from experiments.evaluation.questions import Questions
from experiments.training.trainer import train
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video

CPU = torch.device("cpu")


def test_greedy_matches_by_hand():
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3], [IGNORED, IGNORED, 2, 3]])
    logits = torch.zeros(2, 4, 5)
    logits[:, 1, 2] = 1  # the position before the answer predicts it
    logits[0, 2, 3] = 1
    logits[1, 2, 4] = 1  # the second row ends wrongly
    assert greedy_matches(logits, labels).tolist() == [True, False]


def test_one_pass_tells_what_generate_would_write(llava, processor, few, tmp_path):
    """After a little training, so that some answers are right: both ways call the same questions right."""
    config = TrainConfig(steps=100, batch_size=8, learning_rate=1e-2, warmup=1, train_vision=True)
    train(llava, processor, few.samples, config, tmp_path, 0, CPU)
    samples = list(single_questions(few.samples))
    found = correct(llava, Questions(samples, processor, 7, CPU), "test")
    generated = []
    for sample in samples:
        text = processor.apply_chat_template(messages(sample)[:1], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.image, return_tensors="pt")
        ids = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        end = ids.tolist().index(processor.tokenizer.eos_token_id) if processor.tokenizer.eos_token_id in ids else None
        generated.append(end is not None and processor.tokenizer.decode(ids[:end]) == sample.answers[0])
    assert found.tolist() == generated
    assert 0 < sum(generated) < len(generated)


def test_batches_do_not_change_answers(llava, processor, few):
    samples = list(single_questions(few.samples))[:12]
    with torch.no_grad():
        for inputs in Questions(samples, processor, 12, CPU).batches("all"):
            together = llava(**inputs).logits[:, -3:]
        alone = [llava(**inputs).logits[0, -3:] for inputs in Questions(samples, processor, 1, CPU).batches("one")]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_controls_change_the_picture_and_nothing_else(few):
    samples = list(single_questions(few.samples))
    for condition in (blank, shuffled):
        changed = condition(samples)
        assert [s.conversations for s in changed] == [s.conversations for s in samples]
        assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(changed, samples, strict=True))
    assert {s.image.getcolors()[0][1] for s in blank(samples)} == {(128, 128, 128)}
    assert sorted(s.image.tobytes() for s in shuffled(samples)) == sorted(s.image.tobytes() for s in samples)


def test_controls_of_videos_and_mixed_rows():
    def film(level: int) -> Video:
        return Video([Image.new("RGB", (4, 2), (level,) * 3)] * 3)

    films = [Sample(f"v{i}", (partial(film, i),), conversation([("?", "a")], ["<video>"]), ["x"]) for i in range(2)]
    image = Sample("i", (lambda: Image.new("RGB", (4, 2)),), conversation([("?", "a")]), ["x"])
    text = Sample("t", (), conversation([("?", "a")], []), ["x"])
    samples = [films[0], text, image, films[1]]
    first, unchanged, alone, second = shuffled(samples)
    assert (first.load, second.load) == (films[1].load, films[0].load)
    assert (unchanged, alone) == (text, image)
    (grey,) = blank(samples)[0].pictures
    assert [frame.getcolors() for frame in grey] == [[(8, (128, 128, 128))]] * 3


def test_digits():
    assert digits(torch.tensor([True, False, True])) == "101"


@pytest.mark.parametrize("prefusion", [None, 0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_the_answers_alone_are_those_of_the_whole(llava, processor, few, prefusion, side):
    """In batches as they are tested and as they are trained, of LLaVA and LLaVA-Mini: same loss, same gradient."""
    if prefusion is not None:
        torch.manual_seed(0)
        llava = LlavaMiniForConditionalGeneration.from_llava(
            llava, compressor="query", compressor_size=1, prefusion_layers=prefusion
        )
        processor = LlavaMiniProcessor.from_llava(processor, llava.config)
    inputs = Collator(processor, side)([Encoder(processor)(sample) for sample in islice(few.samples, 3)])
    asked, labels = on_answers(inputs)
    kept = len(asked["logits_to_keep"])
    assert torch.equal(asked["logits_to_keep"], torch.arange(inputs["labels"].shape[1])[-kept:])
    assert torch.equal(labels, inputs["labels"][:, -kept:])
    assert 0 < kept < inputs["labels"].shape[1]
    assert (inputs["labels"][:, : -kept + 1] == IGNORED).all()
    assert (inputs["labels"][:, -kept + 1] != IGNORED).any()
    gradients = []
    for given in (inputs, asked | {"labels": labels}):
        llava.zero_grad()
        found = llava(**given)
        found.loss.backward()
        gradients.append(llava.model.multi_modal_projector.linear_1.weight.grad.clone())
        torch.testing.assert_close(found.logits[:, -kept:], llava(**inputs).logits[:, -kept:])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(llava(**asked).logits, llava(**inputs).logits[:, -kept:])  # without labels, as in a test


def test_a_batch_without_answers_keeps_all_logits(llava, processor, few):
    inputs = Collator(processor)([Encoder(processor)(few.samples[0])])
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    assert len(on_answers(inputs)[0]["logits_to_keep"]) == inputs["labels"].shape[1]
