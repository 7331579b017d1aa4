"""Questions to a model of every family: the prompt with its answer is what the model generated from."""

import copy

import pytest
import torch
from PIL import Image
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from probes import RemoveTokens, TokenMap, intervene
from probes.ask import append_answer, ask, encode_prompt
from probes.view.page import page_data
from tests.experiments.model_families import chat_family, noise_image
from tests.probes.tokens.families.build import MODEL_FAMILIES

TINY = "experiments/assets/tiny"


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_append_answer_gives_the_logits_that_the_answer_was_generated_from(name, monkeypatch):
    """The answer's positions, token types and masks are right if every generated token is predicted again."""
    family = chat_family(name, monkeypatch)
    model = family.model()
    prompt = encode_prompt(model, family.processor, "what is it?", [noise_image(0, (40, 24))])
    with torch.no_grad():
        generated = model.generate(
            **prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        ids = generated.sequences[0, prompt["input_ids"].shape[1] :]
        inputs, labels = append_answer(model, prompt, ids)
        logits = model(**inputs).logits[0, -len(ids) - 1 : -1]
    assert torch.equal(labels[0, -len(ids) :], ids)
    torch.testing.assert_close(logits.float(), torch.cat(generated.logits).float(), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_ask_records_every_word_of_the_question_and_the_answer(name, monkeypatch):
    family = chat_family(name, monkeypatch)
    answer = ask(family.model(), family.processor, "what is it?", [noise_image(0, (40, 24))], answer=" a thing")
    texts = [word["text"].strip() for word in page_data(answer.view().html())["runs"][0]["words"]]
    assert [text for text in texts if text != "predicts the answer"] == ["what", "is", "it?", "a", "thing"]
    assert answer.image_mass().isfinite().all()


@pytest.fixture(scope="module")
def shipped():
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)
    return model, processor, Image.open("experiments/assets/scene.png").convert("RGB")


def test_ask_under_an_intervention_answers_as_the_intervened_model_does(shipped):
    model, processor, image = shipped
    everywhere = RemoveTokens("vision", layers=range(6))
    question = "what shape is right of the green ring?"
    blind = ask(model, processor, question, [image], interventions=[everywhere])
    assert blind.attention.mass[..., blind.attention.sources.index("vision")].isnan().all()
    other = ask(model, processor, question, [Image.new("RGB", image.size)], interventions=[everywhere])
    assert blind.text == other.text
    assert blind.removal is None


def test_encode_prompt_of_a_processor_that_reads_no_videos_is_refused(shipped):
    model, processor, image = shipped
    with pytest.raises(ValueError, match=r"^videos: .*LlavaProcessor"):
        encode_prompt(model, processor, "how many rings are there?", [image], videos=[[image, image]])


def test_encode_prompt_without_a_chat_template_needs_the_image_token_in_the_question(shipped):
    model, _, image = shipped
    processor = AutoProcessor.from_pretrained(TINY)
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"^processor: .*LlavaProcessor.*chat_template"):
        encode_prompt(model, processor, "how many rings are there?", [image])
    inputs = encode_prompt(model, processor, "<image> how many rings are there?", [image])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36  # 6 x 6 patches


def test_encode_prompt_has_one_start_token_if_template_and_tokenizer_both_write_it(shipped):
    """The tokenizers of Gemma 3, Llama 4 and Mistral 3 add a start token, and so do their templates."""
    model, _, image = shipped
    processor = AutoProcessor.from_pretrained(TINY)
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
    question = "how many rings are there?"
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    expected = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(encode_prompt(model, processor, question, [image])["input_ids"], expected["input_ids"])


def test_removal_curve_is_the_probability_of_every_word_of_the_answer(shipped):
    """Intact, and without the image in all layers, the words are read one by one, each in a pass of its own."""
    model, processor, image = shipped
    question, words = "what shape is right of the green ring?", "triangle red left"
    answer = ask(model, processor, question, [image], answer=words)
    prompt = encode_prompt(model, processor, question, [image])
    ids = processor.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    assert len(ids) > 1
    for interventions, found in (
        ([], answer.removal[-1]),
        ([RemoveTokens("vision", layers=range(6))], answer.removal[0]),
    ):
        expected = 0.0
        for count in range(len(ids)):
            inputs, _ = append_answer(model, prompt, ids[:count])
            tokens = TokenMap.from_inputs(model, inputs, processor, [image])
            with torch.no_grad(), intervene(model, tokens, *interventions):
                expected += float(model(**inputs).logits[0, -1].log_softmax(-1)[ids[count]])
        assert float(found) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("images", "key"), [([], "images"), (["empty"], "answer")])
def test_ask_what_cannot_be_asked_is_named(shipped, images, key):
    model, processor, image = shipped
    with pytest.raises(ValueError, match=f"^{key}: "):
        ask(model, processor, "what is it?", [image for _ in images], max_new_tokens=1, answer="" if images else None)


def test_ask_one_image_instead_of_a_list_raises_in_one_line(shipped):
    model, processor, image = shipped
    with pytest.raises(TypeError, match=r"^images: found a Image; .* list of images$"):
        ask(model, processor, "what is it?", image)


def test_ask_a_tokenizer_that_changes_the_text_shows_all_words(shipped):
    model, processor, image = shipped
    processor = copy.deepcopy(processor)
    processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    answered = ask(model, processor, "What Shape is right of the green ring?", [image])
    assert answered.text == "triangle"
    assert {"what", "shape", "ring?"} <= {word.text.strip() for word in answered.attention.words.words}
    assert any(note.startswith("The words are those of the whole prompt") for note in answered.notes)


def test_ask_in_training_mode_raises_value_error(shipped):
    model, processor, image = shipped
    with pytest.raises(ValueError, match="training mode"):
        ask(copy.deepcopy(model).train(), processor, "what is it?", [image])


def test_answer_repr_is_one_line_with_question_and_text(shipped):
    model, processor, image = shipped
    question = "what shape is right of the green ring?"
    assert repr(ask(model, processor, question, [image])) == f"Answer(question='{question}', text='triangle')"
