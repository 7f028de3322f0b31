"""A small OpenAI-compatible endpoint on 127.0.0.1 that answers as told and fails when told to.

with ChatServer(lambda request: "[[A]]") as server:
    server.faults.append(Fault(status=429, headers={"Retry-After": "1"}))
    ...
    assert len(server.requests) == 2
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.loopback import LoopbackHandler, LoopbackServer

KEY = "sk-loopbackKey0123456789abcdef"
MODEL = "loopback-judge"
SNAPSHOT = "loopback-judge-2026-11-01"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests."""

    status: int | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # the connection is cut
    delay: float = 0.0  # seconds before anything else
    times: int = 1


class ChatServer(LoopbackServer):
    """State and life of the server; a context manager."""

    def __init__(self, reply: Callable[[dict[str, Any]], str | None], key: str = KEY) -> None:
        super().__init__(type("Bound", (Handler,), {"server_": self}))
        self.reply, self.key = reply, key
        self.requests: list[tuple[float, dict[str, Any]]] = []  # when, and the body
        self.open = self.most_open = 0  # requests at a time
        self.url = f"{self.address}/v1"

    def env(self) -> dict[str, str]:
        """What a client's process needs to talk to this server and to nothing else."""
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1,localhost"}


class Handler(LoopbackHandler):
    server_: ChatServer

    def do_POST(self) -> None:
        server = self.server_
        with server.lock:
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self.answer_post(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except BrokenPipeError:
            self.close_connection = True  # the client gave up
        finally:
            with server.lock:
                server.open -= 1

    def answer_post(self, request: dict[str, Any]) -> None:
        server = self.server_
        server.requests.append((time.monotonic(), request))
        if fault := server.take_fault():
            time.sleep(fault.delay)
            if fault.drop:
                return self.cut()
            if fault.status:
                return self.send(fault.status, fault.body, fault.headers)
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"no such route: {self.path}")
        if self.headers["Authorization"] != f"Bearer {server.key}":
            return self.refuse(401, f"Incorrect API key provided: {self.headers['Authorization']}")
        if request["model"] != MODEL:
            return self.refuse(404, f"The model `{request['model']}` does not exist")
        message = {"role": "assistant", "content": server.reply(request)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "chatcmpl-1", "object": "chat.completion", "model": SNAPSHOT, "choices": [choice]}
        self.send(200, json.dumps(body).encode())

    def refuse(self, status: int, message: str) -> None:
        self.send(status, json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode())
