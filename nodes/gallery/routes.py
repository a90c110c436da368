"""The server's routes for the gallery in the browser: lists of pictures, and thumbnails.

Uploads use ComfyUI's own /upload/image. Its /view is no substitute for thumbnails: it drops the
EXIF rotation, sends the full size, and blocks all other requests.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from aiohttp import web

from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.gallery import Crop, checked_crop
from . import gallery

_SIDES = range(32, 2049)
_MAX_ASKED = 2000

# A folder of large photographs must neither fill the memory nor slow the sampling down.
_DECODING = asyncio.Semaphore(2)


def register_routes() -> None:
    """Add the routes to ComfyUI's server, if one runs."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is None:
        return
    instance.routes.get("/easyref/folders")(_folders)
    instance.routes.get("/easyref/pictures")(_pictures)
    instance.routes.post("/easyref/stamps")(_stamps)
    instance.routes.get("/easyref/thumbnail")(_thumbnail)


async def _folders(request: web.Request) -> web.Response:
    """Folders of the input folder that hold pictures."""
    folders = await asyncio.to_thread(gallery.list_folders)
    return web.json_response(
        {"folders": [{"folder": folder, "pictures": count} for folder, count in folders]}
    )


async def _pictures(request: web.Request) -> web.Response:
    """The pictures of one folder: their number, and the names of the first 500."""
    try:
        names = await asyncio.to_thread(gallery.list_pictures, request.query.get("folder", ""))
    except EasyRefError as error:
        return _refused(error)
    return web.json_response({"pictures": names[: gallery.MAX_LISTED], "found": len(names)})


async def _stamps(request: web.Request) -> web.Response:
    """A stamp for each file, which changes when the file does; empty if it is missing."""
    try:
        files: Any = (await request.json())["files"]
        if not isinstance(files, list) or len(files) > _MAX_ASKED:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return _refused(EasyRefError('Ask with {"files": [names]}.'))
    stamps = await asyncio.to_thread(lambda: [gallery.stamp(file) for file in files])
    return web.json_response({"stamps": stamps})


async def _thumbnail(request: web.Request) -> web.Response:
    query = request.query
    try:
        crop = _crop(query.get("crop"))
        side = int(query.get("side", "256"))
        if side not in _SIDES:
            raise EasyRefError(f"side is {side}; it must be {_SIDES[0]} to {_SIDES[-1]}.")
        file = query.get("file", "")
        async with _DECODING:
            content = await asyncio.to_thread(gallery.thumbnail, file, side, crop)
    except ValueError as error:
        return _refused(error)
    # With the file's stamp in the address, the response never changes.
    headers = {"Cache-Control": "private, max-age=86400"} if "v" in query else {}
    return web.Response(body=content, content_type="image/webp", headers=headers)


def _crop(text: str | None) -> Crop | None:
    return checked_crop(json.loads(f"[{text}]"), "The thumbnail") if text else None


def _refused(error: ValueError) -> web.Response:
    return web.json_response({"error": str(error)}, status=400)
