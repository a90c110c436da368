"""The page of a comparison, for one browser on this computer."""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...untrusted import parse_json
from .session import RatingSession

_HERE = Path(__file__).parent
_FILES = {"": ("page.html", "text/html"), "page.css": ("page.css", "text/css")}
_FILES["page.js"] = ("page.js", "text/javascript")
_LONGEST_REQUEST = 4096  # bytes
_PATIENCE = 30.0  # seconds for a request to arrive
_POLICY = "; ".join(
    (
        *(f"{name} 'none'" for name in ("default-src", "base-uri", "frame-ancestors")),
        *(f"{name}-src 'self'" for name in ("script", "style", "connect")),
        "img-src 'self' data:",
        "form-action 'self'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RatingServer(ThreadingHTTPServer):
    """Serves one session on 127.0.0.1, to who knows the secret in its address.

    Args:
        session: that is shown.
        end: computes and writes the results; called once, at the end.
        port: 0 for any that is free.

    Raises:
        EasyRefError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, session: RatingSession, end: Callable[[], Any], port: int = 0) -> None:
        self.session = session
        self.end = end
        self._ending = threading.Lock()
        self.secret = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise EasyRefError(
                f"The page cannot be served on port {port} of 127.0.0.1 ({reason}). Choose another "
                "one with --port, or leave it out."
            ) from error

    def ended(self) -> dict[str, Any]:
        """End the session, once; a second window gets the same results."""
        with self._ending:
            if self.session.results is None:
                self.session.end(self.end())
            return self.session.state()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    timeout = _PATIENCE
    server_version, sys_version = "easyref", ""

    def do_GET(self) -> None:
        name = self._asked()
        if name is None:
            return
        if name in _FILES:
            file, kind = _FILES[name]
            self._send(_HERE.joinpath(file).read_bytes(), f"{kind}; charset=utf-8")
        elif name == "state":
            self._answer(self.server.session.state)
        elif name.startswith("picture/"):
            self._send_picture(name.removeprefix("picture/"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        name = self._asked()
        if name is None:
            return
        session = self.server.session
        content = self._content()
        if content is None:
            self._refuse(HTTPStatus.BAD_REQUEST)
        elif name == "vote":
            pair, choice = content.get("pair"), content.get("choice")
            if not isinstance(pair, str) or not isinstance(choice, int):
                self._refuse(HTTPStatus.BAD_REQUEST)
            else:
                self._answer(lambda: session.vote(pair, choice))
        elif name == "undo":
            self._answer(session.undo)
        elif name == "end":
            self._answer(self.server.ended)
            if session.results is not None:
                # From another thread, as it waits for the loop that waits for nobody here.
                threading.Thread(target=self.server.shutdown, daemon=True).start()
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _asked(self) -> str | None:
        """What is asked for; None, and refused, for who does not know the address."""
        port = self.server.server_port
        hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        # A page of another site may reach this server by a name that it lets point here.
        if host not in hosts or origin not in (None, *(f"http://{name}" for name in hosts)):
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        _, secret, *rest = (*self.path.split("?")[0].split("/", 2), "")
        given = secret.encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.server.secret.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return rest[0]

    def _content(self) -> dict[str, Any] | None:
        """The JSON object that came; None if it is none."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal():
            return None
        if len(length) > 6 or int(length) > _LONGEST_REQUEST:
            return None
        try:
            content = parse_json(self.rfile.read(int(length)), "the request")
        except (EasyRefError, OSError):
            return None
        return content if isinstance(content, dict) else None

    def _answer(self, act: Callable[[], dict[str, Any]]) -> None:
        """Send what an action returns, or the sentence that says why it failed."""
        status = HTTPStatus.OK
        try:
            content = act()
        except EasyRefError as error:
            status, content = HTTPStatus.CONFLICT, {"error": str(error)}
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send_picture(self, name: str) -> None:
        try:
            content = self.server.session.picture(name)
        except EasyRefError:
            content = None
        if content is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            # Names are new in every session, so what is fetched ahead may be kept.
            self._send(content, "image/png", cache="private, max-age=3600, immutable")

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send(f"{status.phrase}\n".encode(), "text/plain; charset=utf-8", status)

    def _send(
        self,
        content: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        cache: str = "no-store",
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": cache}
        for name, value in {**headers, **_HEADERS}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows the address and the results."""
