"""The server's routes for the gallery in the browser: lists of pictures, and thumbnails.

Uploads use ComfyUI's own /upload/image. Its /view is no substitute for thumbnails: it drops the
EXIF rotation, sends the full size, and blocks all other requests.

A request that cannot be answered gets status 400, with the reason as {"error": text}.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.formats import recognise
from ...easyref_core.pictures.gallery import Crop, checked_crop
from ...easyref_core.untrusted import MAX_TEXT_BYTES, parse_json, shown
from . import gallery

_SIDES = range(32, 2049)
_MAX_ASKED = 2000
_SECONDS = 60.0  # for one thumbnail

# A folder of large photographs must neither fill the memory nor slow the sampling down. Threads of
# their own: one that waits for a dead disk takes none from ComfyUI.
_AT_ONCE = 2
_DECODING = asyncio.Semaphore(_AT_ONCE)
_THREADS = ThreadPoolExecutor(_AT_ONCE, "easyref-thumbnail")

_Route = Callable[[web.Request], Awaitable[web.Response]]


def register_routes() -> None:
    """Add the routes to ComfyUI's server, if one runs."""
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is None:
        return
    instance.routes.get("/easyref/folders")(_folders)
    instance.routes.get("/easyref/pictures")(_pictures)
    instance.routes.post("/easyref/formats")(_formats)
    instance.routes.post("/easyref/stamps")(_stamps)
    instance.routes.get("/easyref/thumbnail")(_thumbnail)


def _refusing(route: _Route) -> _Route:
    @functools.wraps(route)
    async def answer(request: web.Request) -> web.Response:
        try:
            return await route(request)
        except EasyRefError as error:
            return web.json_response({"error": str(error)}, status=400)

    return answer


@_refusing
async def _folders(request: web.Request) -> web.Response:
    """Folders of the input folder that hold pictures."""
    folders = await asyncio.to_thread(gallery.list_folders)
    return web.json_response(
        {"folders": [{"folder": folder, "pictures": count} for folder, count in folders]}
    )


@_refusing
async def _pictures(request: web.Request) -> web.Response:
    """The pictures of one folder: their number, and the names of the first 500."""
    names = await asyncio.to_thread(gallery.list_pictures, request.query.get("folder", ""))
    return web.json_response({"pictures": names[: gallery.MAX_LISTED], "found": len(names)})


@_refusing
async def _formats(request: web.Request) -> web.Response:
    """What files hold that begin as given, in base64: their formats, null where unknown."""
    formats = []
    for head in await _asked(request, "heads", "beginnings of files in base64"):
        try:
            found = recognise(base64.b64decode(head, validate=True))
        except (binascii.Error, TypeError, ValueError):
            raise EasyRefError(f"{shown(head)} is not base64. Ask with base64.") from None
        formats.append(found and {"name": found.name, "readable": found.readable})
    return web.json_response({"formats": formats})


@_refusing
async def _stamps(request: web.Request) -> web.Response:
    """A stamp for each file, which changes when the file does; empty if it is missing."""
    files = await _asked(request, "files", "names")
    stamps = await asyncio.to_thread(lambda: [gallery.stamp(file) for file in files])
    return web.json_response({"stamps": stamps})


@_refusing
async def _thumbnail(request: web.Request) -> web.Response:
    query = request.query
    crop = _crop(query.get("crop"))
    side = _side(query.get("side", "256"))
    work = functools.partial(gallery.thumbnail, query.get("file", ""), side, crop)
    async with _DECODING:
        decoding = asyncio.get_running_loop().run_in_executor(_THREADS, work)
        try:
            content = await asyncio.wait_for(decoding, _SECONDS)
        except asyncio.TimeoutError:
            raise EasyRefError(
                f"{shown(query.get('file', ''))} could not be read within {_SECONDS:g} seconds. "
                "Check the file and its disk."
            ) from None
    # With the file's stamp in the address, the response never changes.
    headers = {"Cache-Control": "private, max-age=86400"} if "v" in query else {}
    return web.Response(body=content, content_type="image/webp", headers=headers)


async def _asked(request: web.Request, key: str, what: str) -> list[Any]:
    """The list in a request's body, {key: list}.

    Raises:
        EasyRefError: another body, one that cannot be decoded, or one that is too large.
    """
    wanted = f'Ask with {{"{key}": [{what}]}} in UTF-8, at most {_MAX_ASKED}.'
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise EasyRefError(wanted)
    body = bytearray()
    try:
        async for chunk in request.content.iter_chunked(2**16):
            body += chunk
            if len(body) > MAX_TEXT_BYTES:
                raise EasyRefError(wanted)
    except EasyRefError:
        raise
    except Exception as error:  # broken compression; its types differ between releases of aiohttp
        raise EasyRefError(f"The request's body cannot be read. {wanted}") from error
    content = parse_json(bytes(body), "The request's body")
    asked = content.get(key) if isinstance(content, dict) else None
    if not isinstance(asked, list) or len(asked) > _MAX_ASKED:
        raise EasyRefError(wanted)
    return asked


def _side(text: str) -> int:
    side = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if side not in _SIDES:
        raise EasyRefError(f"side is {shown(text)}; it must be {_SIDES[0]} to {_SIDES[-1]}.")
    return side


def _crop(text: str | None) -> Crop | None:
    return checked_crop(parse_json(f"[{text}]", "crop"), "The thumbnail") if text else None
