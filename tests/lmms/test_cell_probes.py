"""Analyses by layer of benchmark documents, against explicit calls with masks in every layer, one document at a time."""

import contextlib

import pytest

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval")

import torch  # noqa: E402

from tests.lmms.shapes_tasks import write_tasks  # noqa: E402

LAYERS, DOCUMENTS = 6, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the questions about shapes, and the questions."""
    path = tmp_path_factory.mktemp("shapes")
    return path, write_tasks(path)[:DOCUMENTS]


@pytest.fixture(scope="module")
def results(folder):
    """The results folder of a cell with analyses on both kinds of task."""
    from hydra import compose, initialize_config_module

    from experiments.config.registry import register_configs
    from experiments.sweeps.plan import identify_cell
    from experiments.sweeps.runner import run_if_needed

    register_configs()
    path = folder[0]
    words = ["data=lmms", "data.tasks=[shapes_write,shapes_choice]", f"data.include=[{path / 'tasks'}]", "batch_size=3"]
    words += [f"results={path / 'results'}", f"data.test_samples={DOCUMENTS}", "probe.attention_questions=6"]
    words += [f"probe.{name}=true" for name in ("attention", "removal", "onset", "knockout")]
    with initialize_config_module("conf", version_base="1.3"):
        cell = identify_cell(compose("config", words))
    status = run_if_needed(cell, record_input_errors=False)
    assert status.state == "finished"
    return path / "results"


@pytest.fixture(scope="module")
def frame(results):
    """The joined frame of the cell."""
    from experiments.report import load

    return load(results).frame()


@pytest.fixture(scope="module")
def inputs_of(llava):
    """A function that returns the model's inputs for a question with an answer, and the number of prompt tokens.

    The prompt is the one from which the model generates.
    """
    from dataclasses import replace

    from experiments.data.prompts import prompt_inputs

    def call(question):
        _, processor = llava
        sample = question.sample(frames_as_images=True)
        prompt = prompt_inputs(processor, [replace(sample, conversations=sample.conversations[:1])])
        tokenizer = processor.tokenizer
        ids = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        answer = torch.tensor([ids])
        inputs = prompt | {"input_ids": torch.cat([prompt["input_ids"], answer], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return {name: value for name, value in inputs.items() if value is not None}, prompt["input_ids"].shape[1]

    return call


@contextlib.contextmanager
def hidden_image(model, image, removed=(), blocked=()):
    """Hide the image from text by a mask in some layers. Where it is removed, the layer leaves the image's states as they are."""
    length = len(image)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    text_to_image = ~image[:, None] & image[None]
    mask = torch.zeros(length, length).masked_fill(~causal | text_to_image, torch.finfo(torch.float32).min)

    def hide(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask[None, None]}

    def restore(module, args, kwargs, output):
        states = output if isinstance(output, torch.Tensor) else output[0]
        before = args[0] if args else kwargs["hidden_states"]
        states[:, image] = before[:, image]

    layers = model.model.language_model.layers
    handles = [layers[i].register_forward_pre_hook(hide, with_kwargs=True) for i in {*removed, *blocked}]
    handles += [layers[i].register_forward_hook(restore, with_kwargs=True) for i in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_right(model, inputs, prompt, **hidden):
    """Whether greedy decoding writes the answer and ends it."""
    image = inputs["input_ids"][0] == model.config.image_token_id
    with torch.no_grad(), hidden_image(model, image, **hidden):
        logits = model(**inputs).logits[0]
    return bool((logits[prompt - 1 : -1].argmax(-1) == inputs["input_ids"][0, prompt:]).all())


def test_depths_of_each_document_are_those_of_explicit_calls_layer_by_layer(llava, folder, inputs_of, frame):
    model, every = llava[0], range(LAYERS)
    rows = frame[frame.task == "shapes_write"].set_index("doc_id")
    found = set()
    for number in range(DOCUMENTS):
        row = rows.loc[number]
        if not folder[1][number].images + folder[1][number].frames:
            assert row[["image", "no_image", "removal_depth", "knockout_depth", "onset", "attention"]].isna().all()
            continue
        inputs, prompt = inputs_of(folder[1][number])
        onward = [is_right(model, inputs, prompt, removed=every[k:]) for k in range(LAYERS + 1)]
        upto = [is_right(model, inputs, prompt, removed=every[:k]) for k in range(LAYERS + 1)]
        damaged = [onward[-1] and not is_right(model, inputs, prompt, blocked=[layer]) for layer in every]
        removal = onset = knockout = None
        if onward[LAYERS] and not onward[0]:
            removal = next(k for k in range(LAYERS + 1) if all(onward[k:]))
            onset = next(k for k in range(LAYERS + 1) if not any(upto[k:]))
        if any(damaged):
            knockout = next(k for k in range(LAYERS + 1) if 10 * sum(damaged[:k]) >= 9 * sum(damaged))
        assert (row.image, row.no_image) == (onward[-1], onward[0])
        given = [None if row.isna()[name] else row[name] for name in ("removal_depth", "onset", "knockout_depth")]
        assert given == [removal, onset, knockout]
        found.add(removal)
    assert len(found) > 2  # depths differ between the documents, and one has none


def test_attention_of_each_document_is_that_of_eager_attention(folder, inputs_of, frame):
    from experiments.models.build import load_checkpoint

    eager, _ = load_checkpoint("asset:tiny", torch.float32, "eager")
    rows = frame[frame.task == "shapes_write"].set_index("doc_id")
    recorded = [i for i, question in enumerate(folder[1]) if question.images + question.frames][:6]
    assert rows.index[rows.attention.notna()].tolist() == recorded
    for number in recorded:
        inputs, prompt = inputs_of(folder[1][number])
        image = inputs["input_ids"][0] == eager.config.image_token_id
        queries = ~image & (image.cumsum(0) > 0)
        queries[prompt:] = False
        with torch.no_grad():
            weights = eager(**inputs, output_attentions=True).attentions
        mass = [layer[0][:, queries][:, :, image].sum(-1).mean().item() for layer in weights]
        assert rows.attention[number] == pytest.approx(mass, abs=1e-4)
        assert rows.attention_depth[number] == next(k for k in range(LAYERS + 1) if sum(mass[:k]) >= 0.9 * sum(mass))


def test_scores_are_those_of_the_task_and_answers_those_of_the_documents(folder, frame):
    answers = [question.answer for question in folder[1]]
    for task in ("shapes_write", "shapes_choice"):
        rows = frame[frame.task == task]
        assert rows.doc_id.tolist() == list(range(DOCUMENTS))
        assert rows.target.tolist() == rows.analysed_answer.tolist() == answers
    written = frame[(frame.task == "shapes_write") & frame.image.notna()]
    assert len(written) > DOCUMENTS // 2
    assert written.score_correct.tolist() == written.image.tolist()  # this task's score is an exact match too
    assert frame[frame.task == "shapes_choice"].score_acc.isin([0, 1]).all()


def test_other_batch_sizes_and_orders_of_requests_give_equal_parts(folder, llava, results, tmp_path):
    from experiments.config.data_schema import LmmsData
    from experiments.config.schema import Config, ProbeConfig
    from experiments.lmms_eval_model.benchmark_probes import measure_benchmark_probes
    from experiments.lmms_eval_model.evaluate import evaluate_tasks
    from experiments.lmms_eval_model.model import BuiltModel
    from experiments.records.files import load_records

    (record,) = load_records(results / "records").finished
    recorded = record["benchmarks"]["tasks"]["shapes_choice"]["probes"]
    built = BuiltModel(*llava, batch_size=4)
    run = evaluate_tasks(built, ["shapes_choice"], tmp_path, DOCUMENTS, [folder[0] / "tasks"])
    built.batch_size = 1
    built.requests.reverse()
    logged = [("shapes_choice", entry) for entry in run["samples"]["shapes_choice"]][::-1]
    config = Config(data=LmmsData(name="lmms", tasks=["shapes_choice"]), probe=ProbeConfig(removal=True))
    part = measure_benchmark_probes(built, logged, config)
    for name in ("documents", "without_image"):
        assert part[name] == recorded[name][::-1]
    assert part["without_image"]
    for name in ("inside", "onward"):
        outcomes = [entry["correct"][::-1] for entry in part["removal"][name]]
        assert outcomes == [entry["correct"] for entry in recorded["removal"][name]]
    assert part["onset"] is None
