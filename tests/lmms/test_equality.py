"""Answers and losses through lmms-eval are those of the project's own evaluation, item by item."""

from contextlib import nullcontext

import pytest
import torch

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

from tests.lmms.shapes_tasks import choices, write_tasks  # noqa: E402

MODELS = ["llava", "mini", "fastv"]
METHODS = ["vtw", "pyramid_drop", "inside", "hidden", "knocked_out"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The questions, and the folder with their tasks."""
    folder = tmp_path_factory.mktemp("shapes")
    return write_tasks(folder), folder


def method(name, model):
    """Return what runs around each call, by the name of a method."""
    from hydra import compose, initialize_config_module

    from experiments.config import registry
    from experiments.models.token_reduction import keep_all_tokens, token_dropper_for_inference
    from probes import BlockAttention, RemoveTokens, TokenMap, intervene
    from probes.tokens.token_map import visual_token_ids

    if name in ("llava", "mini"):
        return keep_all_tokens
    if name in ("hidden", "knocked_out"):

        def around(model, inputs):
            if not torch.isin(inputs["input_ids"], torch.tensor(visual_token_ids(model.config))).any():
                return nullcontext()  # a batch of text alone
            tokens = TokenMap.from_inputs(model, {k: v for k, v in inputs.items() if k != "pixel_values"})
            layers = range(3, model.config.get_text_config().num_hidden_layers)
            if name == "hidden":
                return intervene(model, tokens, RemoveTokens("vision", layers=layers))
            return intervene(model, tokens, BlockAttention("vision", "instruction", layers=layers))

        return around
    registry.register_configs()
    overrides = ["prefusion=inside", "compressor=query"] if name == "inside" else [f"reduction={name}"]
    with initialize_config_module("conf", version_base="1.3"):
        return token_dropper_for_inference(compose("config", overrides))


@pytest.fixture(scope="module")
def built(llava, mini):
    """Return the model, the processor and what runs around them, by a name."""

    def build(name):
        if name != "inside":
            model, processor = mini if name == "mini" else llava
        else:
            from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

            model = LlavaMiniForConditionalGeneration.from_llava(
                llava[0], compressor="average", prefusion_layers=0, keep_patches=True
            )
            processor = LlavaMiniProcessor.from_llava(llava[1], model.eval().config)
        return model, processor, method(name, model)

    return build


@pytest.fixture(scope="module")
def expected(built, shapes):
    """Return, by a model's name, for each question: greedy outcome, loss, and written answer, computed alone."""
    cache = {}

    def compute(name):
        from experiments.evaluation.accuracy import answer_questions
        from experiments.evaluation.questions import EncodedQuestions
        from llava_mini import LlavaMiniProcessor

        if name in cache:
            return cache[name]
        model, processor, around = built(name)
        as_images = not isinstance(processor, LlavaMiniProcessor)
        samples = [question.sample(as_images) for question in shapes[0]]
        encoded = EncodedQuestions(samples, processor, 1, model.device)
        outcomes = answer_questions(model, encoded, "outcomes", around)[0].tolist()
        losses, texts = [], []
        for inputs in encoded.batches("losses"):
            answer_mask = {"answer_mask": inputs["labels"] >= 0} if "visual_layout" in inputs else {}
            with torch.no_grad(), around(model, inputs):
                losses.append(model(**inputs, **answer_mask).loss.item())
            prompt = int((inputs["labels"] >= 0).int().argmax())
            prefix = {
                key: value[:, :prompt] if value.shape == inputs["labels"].shape else value
                for key, value in inputs.items()
                if key != "labels"
            }
            with torch.no_grad(), around(model, prefix):
                ids = model.generate(**prefix, max_new_tokens=3, do_sample=False)[0, prompt:]
            texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        cache[name] = outcomes, losses, texts
        return cache[name]

    return compute


def run(name, tasks, built, shapes, batch_size, output):
    """Return the samples of tasks through lmms-eval, each task's in the order of the questions."""
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.model import BuiltModel

    model, processor, around = built(name)
    evaluated = BuiltModel(model, processor, around, batch_size)
    samples = evaluate_tasks(evaluated, tasks, output, include=[shapes[1] / "tasks"])["samples"]
    return [samples[task] for task in tasks]


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*((name, size) for name in MODELS for size in (1, 3, 16)), *((name, 3) for name in METHODS)],
)
def test_built_model_answers_and_scores_as_the_own_evaluation(name, batch_size, built, shapes, expected, tmp_path):
    written, scored = run(name, ["shapes_write", "shapes_score"], built, shapes, batch_size, tmp_path)
    outcomes, losses, texts = expected(name)
    assert [bool(entry["correct"]) for entry in scored] == outcomes
    assert [entry["loss"] for entry in scored] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert [entry["filtered_resps"][0] for entry in written] == texts


def test_own_evaluation_of_shapes_has_right_and_wrong_answers(expected):
    for name in ("llava", "fastv"):
        assert 0 < sum(expected(name)[0]) < len(expected(name)[0])


def test_multiple_choice_takes_the_answer_with_the_lowest_loss(built, shapes, tmp_path):
    """Trap 3. The reference scores each choice with a forward call of its own."""
    from experiments.evaluation.questions import EncodedQuestions

    model, processor, _ = built("llava")
    (entries,) = run("llava", ["shapes_choice"], built, shapes, 3, tmp_path)
    for question, entry in zip(shapes[0], entries, strict=True):
        words = choices({"answer": question.answer})
        samples = [question.sample(frames_as_images=True) for _ in words]
        for sample, word in zip(samples, words, strict=True):
            sample.conversations[1]["value"] = word
        batches = EncodedQuestions(samples, processor, 1, model.device).batches("choices")
        with torch.no_grad():
            losses = [model(**inputs).loss.item() for inputs in batches]
        assert entry["acc"] == float(losses.index(min(losses)) == words.index(question.answer))


def test_scores_of_llava_mini_do_not_let_prefusion_see_the_answer(built, shapes, expected):
    """Trap 4. Without the mask of the answers the losses differ, so the equality above would fail."""
    from experiments.evaluation.questions import EncodedQuestions

    model, processor, _ = built("mini")
    samples = [question.sample(frames_as_images=False) for question in shapes[0]]
    leaking = []
    for inputs in EncodedQuestions(samples, processor, 1, model.device).batches("losses"):
        with torch.no_grad():
            nothing = torch.zeros_like(inputs["labels"], dtype=torch.bool)
            leaking.append(model(**inputs, answer_mask=nothing).loss.item())
    assert max(abs(a - b) for a, b in zip(leaking, expected("mini")[1], strict=True)) > 0.01


def test_scores_under_fastv_rank_patches_by_the_prompt(built, shapes, expected):
    """Trap 5. Ranked by the answer, some losses differ, so the equality above would fail."""
    from experiments.evaluation.questions import EncodedQuestions

    model, processor, around = built("fastv")
    samples = [question.sample(frames_as_images=True) for question in shapes[0]]
    leaking = []
    for inputs in EncodedQuestions(samples, processor, 1, model.device).batches("losses"):
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), around(model, unlabelled):
            leaking.append(model(**inputs).loss.item())
    assert max(abs(a - b) for a, b in zip(leaking, expected("fastv")[1], strict=True)) > 0.01
