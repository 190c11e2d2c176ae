"""A small real HTTP server that speaks the chat protocol as a test says, faults included."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # status (0 breaks the connection), and a JSON value, or bytes that are sent as they are


def reply(*texts: str, finish: str = "stop", tokens: int | None = None, logprobs: list[float] | None = None) -> Answer:
    """A chat completion."""
    content = {"content": [{"token": "a", "logprob": p, "bytes": None, "top_logprobs": []} for p in logprobs or []]}
    choices = [
        {
            "index": k,
            "finish_reason": finish,
            "message": {"role": "assistant", "content": text},
            "logprobs": content if logprobs else None,
        }
        for k, text in enumerate(texts)
    ]
    usage = None if tokens is None else {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def refusal(said: str, status: int = 400) -> Answer:
    return status, {"error": {"message": said}}


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on a free port -> its URL, and the bodies that it was sent.

    Args:
        answer: from a body and the number of requests before it.
    """
    bodies: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body | {"authorization": self.headers["Authorization"], "path": self.path})
                number = len(bodies) - 1
            status, content = answer(body, number)
            if status == 0:  # the connection breaks
                return
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
