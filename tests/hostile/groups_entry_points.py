"""Building groups of a home's tagged pictures, and comparing the images of its run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from entry_points import command

from easyref_core.errors import EasyRefError


def build(base: str, *more: str) -> Any:
    """Groups of `tagged`, into `groups`; what was written stays in there."""
    command(base, "build-groups", f"{base}/tagged", "--out", f"{base}/groups", *more)
    found = [path.relative_to(base).as_posix() for path in Path(base, "groups").rglob("*.png")]
    return {"pictures": sorted(found)}


def rate(base: str, *more: str) -> Any:
    """One vote for a pair of `run`, through the session that its page talks to."""
    from easyref_core.evaluation.rating import rate as module
    from easyref_core.evaluation.rating.server import RatingServer

    seen: dict[str, Any] = {}

    def serve(server: RatingServer) -> None:
        state = server.session.state()
        if state["pair"] is not None:
            pair = state["pair"]
            for name in (*pair["references"], pair["left"], pair["right"]):
                with contextlib.suppress(EasyRefError):  # as where the page asks for it
                    server.session.picture(name)
            state = server.session.vote(pair["id"], 1)
        seen.update(done=state["done"], total=state["total"])

    module.RatingServer.serve_forever = serve  # type: ignore[method-assign]
    module._write_page = lambda folder: None
    command(base, "bench", "--rate", f"{base}/run", *more)
    json.loads(Path(base, "run", "results.json").read_text())
    return seen
