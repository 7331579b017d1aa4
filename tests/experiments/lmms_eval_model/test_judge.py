"""The checks of the judge of open answers. They need no lmms-eval."""

import socket

import pytest

from experiments.lmms_eval_model.judge import check_judge, check_judgements

KEY = {"OPENAI_API_KEY": "none"}


@pytest.fixture
def port():
    """A port of the loopback interface at which something accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("task", "path"), [("mmvet", "/v1"), ("videochatgpt_gen", "/v1/chat/completions")])
def test_check_judge_accepts_the_form_of_the_address_that_the_task_reads(task, path, port):
    check_judge([task, "pope"], KEY | {"OPENAI_API_URL": f"http://127.0.0.1:{port}{path}"})


@pytest.mark.parametrize(("task", "path"), [("mmvet", "/v1/chat/completions"), ("activitynetqa", "/v1")])
def test_check_judge_other_form_of_the_address_raises_value_error(task, path, port):
    with pytest.raises(ValueError, match=f"OPENAI_API_URL: {task}.*{path}"):
        check_judge([task], KEY | {"OPENAI_API_URL": f"http://127.0.0.1:{port}{path}"})


def test_check_judge_tasks_that_read_the_address_differently_raise_value_error():
    with pytest.raises(ValueError, match="mmvet and msvd_qa"):
        check_judge(["mmvet", "msvd_qa"], KEY)


def test_check_judge_address_without_answer_raises_value_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    with pytest.raises(ValueError, match=f"127.0.0.1:{closed}"):
        check_judge(["mmvet"], KEY | {"OPENAI_API_URL": f"http://127.0.0.1:{closed}/v1"})


def test_check_judgements_names_the_document_without_a_score():
    check_judgements({"mmvet": [{"doc_id": 0, "gpt_eval_score": {"score": 0.0, "eval_model": "gpt"}}]})
    check_judgements({"activitynetqa": [{"doc_id": 0, "gpt_eval_score": {"score": 0}}]})
    with pytest.raises(ValueError, match="mmvet, document 3"):
        check_judgements({"mmvet": [{"doc_id": 3, "gpt_eval_score": {"score": 0.0, "eval_model": ""}}]})
    with pytest.raises(ValueError, match="llava_in_the_wild, document 5"):
        check_judgements({"llava_in_the_wild": [{"doc_id": 5, "gpt_eval_llava_all": {"scores": [-1, -1]}}]})
