"""A judge on the loopback interface: it prefers answers with the word "good"."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

SCORES = {
    "factual accuracy of generative": 4,
    "detail orientation of generative": 3,
    "contextual understanding of generative": 2,
    "temporal understanding of generative": 5,
    "consistency of generative": 1,
}


def judgement(prompt: str) -> str:
    """Return what the judge writes, in the form that the prompt asks for."""
    for words, score in SCORES.items():
        if words in prompt:
            return str({"score": score})
    if "correctness of generative outputs" in prompt:
        is_good = "good" in prompt.split("Predicted Answer:")[1].splitlines()[0]
        return str({"pred": "yes", "score": 4} if is_good else {"pred": "no", "score": 1})
    if "Correctness\n--- |" in prompt:
        return "1.0" if "| good |" in prompt else "0.5"
    return "8 8\nboth are right" if "\ngood\n" in prompt else "8 4\nthe first is better"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = "\n".join(message["content"] for message in request["messages"])
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        message = {"role": "assistant", "content": judgement(prompt)}
        body = json.dumps({"model": request["model"], "choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """Write no log."""


@contextmanager
def judge():
    """Run the judge, and yield its base address and the list of the paths that it was asked at."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.paths = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.paths  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
