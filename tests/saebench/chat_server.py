"""A server on loopback that speaks the chat completions interface, and answers by rule.

Asked to describe, it names the word that is marked most often; asked to detect, it lists the passages that
contain the word the description names.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Counts requests, and fails those it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key = "secret"
        self.answered: list[dict[str, Any]] = []
        self.busy_requests = 0
        """how many of the next requests are answered with 429"""
        self.fails_after: int | None = None
        """after how many answers every request gets 500"""
        self.body: bytes | None = None
        """what is sent in place of every answer"""
        self.hangs_after: int | None = None
        """after how many answers a request gets none"""
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            hangs = len(self.server.answered) == self.server.hangs_after
            status, body = (0, {}) if hangs else self._answer(request)
        if hangs:
            self.server.closing.wait()
            return
        data = json.dumps(body).encode() if self.server.body is None else self.server.body
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        server = self.server
        if self.path != "/v1/chat/completions":
            return 404, {"error": {"message": f"no {self.path}"}}
        if self.headers["Authorization"] != f"Bearer {server.key}":
            return 401, {"error": {"message": "wrong key"}}
        if request["model"] != "by-rule":
            return 404, {"error": {"message": f"no model {request['model']}"}}
        if server.busy_requests > 0:
            server.busy_requests -= 1
            return 429, {"error": {"message": "busy"}}
        if server.fails_after is not None and len(server.answered) >= server.fails_after:
            return 500, {"error": {"message": "broken"}}
        server.answered.append(request)
        prompt = " ".join(message["content"] for message in request["messages"])
        answer = _detect(prompt) if "should activate" in prompt else _describe(prompt)
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": answer},
                }
            ],
            "usage": {
                "prompt_tokens": len(prompt.split()),
                "completion_tokens": len(answer.split()),
                "total_tokens": len(prompt.split()) + len(answer.split()),
            },
        }

    def log_message(self, *_: Any) -> None:
        pass


def _describe(prompt: str) -> str:
    examples = prompt.partition("are given below:")[2]
    words = Counter(word.strip() for word in re.findall(r"<<(.*?)>>", examples))
    return f'This neuron activates on the word "{words.most_common(1)[0][0]}".'


def _detect(prompt: str) -> str:
    found = re.search(r'fires on the word "(.*?)"', prompt)
    assert found is not None, prompt
    passages = re.findall(r"^(\d+)\. (.*)$", prompt, flags=re.MULTILINE)
    return ", ".join(n for n, passage in passages if found[1] in passage) or "None"
