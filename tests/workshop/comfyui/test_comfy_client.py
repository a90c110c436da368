"""The client of a ComfyUI, against a server that is slow to answer."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from workshop.comfyui.comfy_client import ComfyClient

_PROTOCOL_ID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of every websocket, by RFC 6455


class SlowServer(BaseHTTPRequestHandler):
    """Answers every request after half a second; the graph is done by then."""

    def do_GET(self) -> None:
        time.sleep(0.5)
        if self.path.startswith("/ws"):
            key = self.headers["Sec-WebSocket-Key"] + _PROTOCOL_ID
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            accepted = base64.b64encode(hashlib.sha1(key.encode()).digest())
            self.send_header("Sec-WebSocket-Accept", accepted.decode())
            self.end_headers()
            return
        entry = {"status": {"messages": []}, "outputs": {"save": {"text": ["done"]}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"graph": entry}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing in the tests' output."""


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_slow_to_answer_is_waited_for(address: str) -> None:
    run = ComfyClient(address).wait("graph")
    assert run.outputs == {"save": {"text": ["done"]}}
