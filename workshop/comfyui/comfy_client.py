"""A running ComfyUI from outside: upload pictures, queue graphs, wait for them, fetch results.

Only the standard library and Pillow; graphs are in ComfyUI's API form.
"""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from easyref_core.errors import EasyRefError

Prompt = Mapping[str, Mapping[str, Any]]

_POLL_SECONDS = 0.05
_HTTP_SECONDS = 30


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
    """Speaks with a ComfyUI server.

    Args:
        url: its address, without a slash at the end.
        is_alive: raises when the server is known to be gone, so that nobody waits for it.
    """

    def __init__(self, url: str, is_alive: Callable[[], None] = lambda: None) -> None:
        self.url = url
        # ComfyUI tells the outputs of cached nodes only to clients with a name.
        self._name = uuid.uuid4().hex
        self._is_alive = is_alive
        # A proxy set for the internet must not be asked for this computer's own addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> bytes:
        """GET a path such as "/object_info".

        Raises:
            ComfyUIError: no answer, or another status than 200.
        """
        return self._send(urllib.request.Request(self.url + path))

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post_json(self, path: str, content: Any) -> Any:
        """POST JSON; the answer's JSON, None where it is empty."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        answer = self._send(request)
        return json.loads(answer) if answer else None

    def upload(self, name: str, picture: Image.Image) -> str:
        """Put a picture into ComfyUI's input folder, over any of that name, as PNG.

        Returns:
            The name by which Load Image finds it.
        """
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n',
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n",
        ]
        body = "".join(parts).encode() + buffer.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(
            f"{self.url}/upload/image",
            data=body,
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        return json.loads(self._send(request))["name"]

    def queue(self, prompt: Prompt) -> str:
        """Queue a graph and return its id.

        Raises:
            ComfyUIError: the graph did not pass validation; every node's complaint is in the text.
        """
        content = {"prompt": prompt, "client_id": self._name}
        return self.post_json("/prompt", content)["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 120) -> Run:
        """Wait until a queued graph is done.

        Raises:
            ComfyUIError: a node failed, the graph was interrupted, or the time is over.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _finished(prompt_id, entry)
            self._is_alive()
            time.sleep(_POLL_SECONDS)
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
        """The file behind an output entry (filename, subfolder, type)."""
        query = {key: shown[key] for key in ("filename", "subfolder", "type")}
        return self.get(f"/view?{urllib.parse.urlencode(query)}")

    def pictures(self, run: Run, node: str) -> list[Image.Image]:
        """All pictures that a node of a finished graph saved or previewed."""
        shown = run.outputs.get(node, {}).get("images", ())
        found = [Image.open(io.BytesIO(self.view(entry))) for entry in shown]
        for picture in found:
            picture.load()
        return found

    def _send(self, request: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=_HTTP_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyUIError(_refusal(error.code, error.read())) from None
        except OSError as error:
            self._is_alive()
            raise ComfyUIError(f"ComfyUI does not answer at {self.url}: {error}") from None


def _refusal(status: int, body: bytes) -> str:
    """What a refused request says, with each node's complaint on a line of its own."""
    try:
        content = json.loads(body)
        lines = [_complaint(content["error"])]
        for node, found in (content.get("node_errors") or {}).items():
            name = f"{found.get('class_type', 'node')} ({node})"
            lines += [f"{name}: {_complaint(error)}" for error in found["errors"]]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError, AttributeError):
        text = body.decode("utf-8", "replace").strip()
        return f"ComfyUI answered {status}: {text[:500]}"


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
