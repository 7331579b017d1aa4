"""The judge of open answers: which tasks need one, how its address is given, and whether it has judged every answer."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

ENDPOINT = "/chat/completions"
JUDGED_TASKS = {
    "llava_in_the_wild": "base",
    "mmvet": "base",
    "activitynetqa": "endpoint",
    "videochatgpt": "endpoint",
    "videochatgpt_gen": "endpoint",
    "videochatgpt_temporal": "endpoint",
    "videochatgpt_consistency": "endpoint",
    "msvd_qa": "endpoint",
    "msrvtt_qa": "endpoint",
}
"""The judged tasks, and what OPENAI_API_URL holds for each: the base address of the API, or the whole endpoint."""

DEFAULT_ADDRESS = "https://api.openai.com/v1"
"""The judge's address where OPENAI_API_URL is not set."""
_SECONDS = 10


def check_judge(tasks: Iterable[str], environment: Mapping[str, str]) -> None:
    """Check, before anything runs, that the judged tasks among `tasks` can reach their judge.

    Without a judge LLaVA-Bench reports 100 and MM-Vet 0, and ActivityNet-QA waits two minutes an item before it fails.

    Args:
        tasks: Names of tasks and groups.
        environment: The environment's variables. OPENAI_API_KEY is the key, OPENAI_API_URL the address.

    Raises:
        ValueError: If a variable is missing or has the other form, or nothing answers at the address.

    Example:
        >>> check_judge(["pope"], {})
        >>> check_judge(["mmvet"], {})
        Traceback (most recent call last):
        ...
        ValueError: OPENAI_API_KEY: not set, and mmvet has a judge; set the key of its API
    """
    forms = {name: JUDGED_TASKS[name] for name in tasks if name in JUDGED_TASKS}
    if not forms:
        return
    first = next(iter(forms))
    if not environment.get("OPENAI_API_KEY"):
        raise ValueError(f"OPENAI_API_KEY: not set, and {first} has a judge; set the key of its API")
    if len(set(forms.values())) > 1:
        other = next(name for name, form in forms.items() if form != forms[first])
        raise ValueError(
            f"tasks: {first} and {other} read OPENAI_API_URL differently (base address, endpoint); run one after the other"
        )
    address = environment.get("OPENAI_API_URL")
    if address is not None and address.endswith(ENDPOINT) != (forms[first] == "endpoint"):
        right = (
            f"the endpoint, which ends in {ENDPOINT}" if forms[first] == "endpoint" else f"the part before {ENDPOINT}"
        )
        raise ValueError(f"OPENAI_API_URL: {first} takes {right}; found '{address}'")
    parts = urlsplit(address or DEFAULT_ADDRESS)
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    try:
        socket.create_connection((parts.hostname or "", port), _SECONDS).close()
    except OSError as error:
        raise ValueError(f"OPENAI_API_URL: nothing answers at {parts.hostname}:{port} ({error})") from error


def check_judgements(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Check that the judge has judged every answer.

    LLaVA-Bench counts an answer without a judgement as -1 of -1, and MM-Vet as 0 of 1. VideoChatGPT counts it as 0,
    which its results do not tell from a judgement of 0.

    Args:
        samples: The part `samples` of lmms-eval's results: for each task one entry a document.

    Raises:
        ValueError: If an answer has no judgement.
    """
    for task, entries in samples.items():
        for entry in entries:
            llava, mmvet = entry.get("gpt_eval_llava_all"), entry.get("gpt_eval_score")
            failed = llava is not None and -1 in llava["scores"]
            failed |= task == "mmvet" and mmvet is not None and not mmvet["eval_model"]
            if failed:
                raise ValueError(
                    f"task {task}, document {entry['doc_id']}: the judge gave no score; run the task again"
                )
