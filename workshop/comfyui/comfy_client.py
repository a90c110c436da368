"""A client of a running ComfyUI: upload images, queue graphs, wait for them, fetch results.

Graphs are in ComfyUI's API form.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import requests
import websocket
from PIL import Image

from easyref_core.errors import EasyRefError

Prompt = Mapping[str, Mapping[str, Any]]

_HTTP_SECONDS = 30
_EVENT_SECONDS = 0.2  # a missed event costs no more; between two checks of the server


class ComfyUIError(EasyRefError):
    """ComfyUI refused a graph or failed while running it; the text is ComfyUI's own.

    Attributes:
        interrupted: the graph was stopped on request.
    """

    def __init__(self, message: str, *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted


@dataclass(frozen=True)
class Run:
    """A finished graph.

    Attributes:
        outputs: node id -> what the node shows ("images", "text", ...).
        cached: ids of the nodes whose results were still there from earlier graphs.
    """

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    cached: frozenset[str]


class ComfyClient:
    """Client of a ComfyUI server.

    Args:
        url: its address, without a slash at the end.
        is_alive: raises if the server is known to have ended, so that waiting stops.
    """

    def __init__(self, url: str, is_alive: Callable[[], None] = lambda: None) -> None:
        self.url = url
        # ComfyUI sends events and the outputs of cached nodes only to clients with an id.
        self._client_id = uuid.uuid4().hex
        self._is_alive = is_alive
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between this computer and itself

    def get(self, path: str, **query: str) -> bytes:
        """GET a path such as "/object_info".

        Raises:
            ComfyUIError: no answer, or an error status.
        """
        return self._send("GET", path, params=query)

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post_json(self, path: str, content: Any) -> Any:
        """POST JSON; returns the JSON of the answer, None where it is empty."""
        answer = self._send("POST", path, json=content)
        return json.loads(answer) if answer else None

    def upload(self, name: str, picture: Image.Image) -> str:
        """Put an image into ComfyUI's input folder as PNG, replacing a file of that name.

        Returns:
            The name by which Load Image finds it.
        """
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        file = (name, buffer.getvalue(), "image/png")
        data = {"overwrite": "true"}
        answer = self._send("POST", "/upload/image", data=data, files={"image": file})
        return json.loads(answer)["name"]

    def queue(self, prompt: Prompt) -> str:
        """Queue a graph and return its id.

        Raises:
            ComfyUIError: the graph did not pass validation; every node's complaint is in the text.
        """
        content = {"prompt": prompt, "client_id": self._client_id}
        return self.post_json("/prompt", content)["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 120) -> Run:
        """Wait until a queued graph is done.

        Raises:
            ComfyUIError: a node failed, the graph was interrupted, or the time is over.
        """
        end = time.monotonic() + seconds
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self._client_id}"
        with self._answering():
            socket = websocket.create_connection(address, _HTTP_SECONDS, http_no_proxy=["*"])
        with closing(socket):
            socket.settimeout(_EVENT_SECONDS)
            while time.monotonic() < end:
                entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
                if entry is not None:
                    return _finished(prompt_id, entry)
                self._is_alive()
                _wait_for_the_end_of_a_graph(socket)
        raise ComfyUIError(f"ComfyUI had not finished the graph after {seconds:.0f} seconds.")

    def run(self, prompt: Prompt, seconds: float = 120) -> Run:
        """Queue a graph and wait for it; see `queue` and `wait`."""
        return self.wait(self.queue(prompt), seconds)

    def interrupt(self) -> None:
        """Stop the graph that is running now."""
        self.post_json("/interrupt", {})

    def is_running(self, prompt_id: str) -> bool:
        """Whether a graph has left the queue and is being executed."""
        running = self.get_json("/queue")["queue_running"]
        return any(entry[1] == prompt_id for entry in running)

    def view(self, shown: Mapping[str, str]) -> bytes:
        """The file of an output entry (filename, subfolder, type)."""
        return self.get("/view", **{key: shown[key] for key in ("filename", "subfolder", "type")})

    def pictures(self, run: Run, node: str) -> list[Image.Image]:
        """All images that a node of a finished graph saved or previewed."""
        shown = run.outputs.get(node, {}).get("images", ())
        images = [Image.open(io.BytesIO(self.view(entry))) for entry in shown]
        for image in images:
            image.load()
        return images

    def _send(self, method: str, path: str, **content: Any) -> bytes:
        with self._answering():
            answer = self._session.request(
                method, self.url + path, timeout=_HTTP_SECONDS, **content
            )
        if not answer.ok:
            raise ComfyUIError(_refusal(answer))
        return answer.content

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (OSError, websocket.WebSocketException) as error:
            self._is_alive()
            raise ComfyUIError(f"ComfyUI does not answer at {self.url}: {error}") from None


def _wait_for_the_end_of_a_graph(socket: websocket.WebSocket) -> None:
    """Return after ComfyUI's event, or without one after `_EVENT_SECONDS` of silence."""
    with suppress(OSError, websocket.WebSocketException):
        while message := socket.recv():
            if isinstance(message, str):  # previews are bytes
                event = json.loads(message)
                if event["type"] == "executing" and event["data"]["node"] is None:
                    return


def _refusal(answer: requests.Response) -> str:
    """What a refused request says, with each node's complaint on a line of its own."""
    try:
        content = answer.json()
        lines = [_complaint(content["error"])]
        for node, found in (content.get("node_errors") or {}).items():
            name = f"{found.get('class_type', 'node')} ({node})"
            lines += [f"{name}: {_complaint(error)}" for error in found["errors"]]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"ComfyUI answered {answer.status_code}: {answer.text.strip()[:500]}"


def _complaint(error: Mapping[str, Any] | str) -> str:
    if isinstance(error, str):
        return error
    return ": ".join(part for part in (error.get("message"), error.get("details")) if part)


def _finished(prompt_id: str, entry: Mapping[str, Any]) -> Run:
    """A history entry as a Run, or its failure as an exception."""
    messages: dict[str, Mapping[str, Any]] = dict(entry["status"]["messages"])
    if "execution_interrupted" in messages:
        raise ComfyUIError("The graph was interrupted.", interrupted=True)
    if "execution_error" in messages:
        error = messages["execution_error"]
        raise ComfyUIError(
            f"{error.get('node_type')} ({error.get('node_id')}): "
            f"{str(error.get('exception_message', '')).strip()}"
        )
    cached = messages.get("execution_cached", {}).get("nodes", ())
    return Run(prompt_id, entry["outputs"], frozenset(cached))
