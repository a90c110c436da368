"""Requests to the gallery's routes that no page sends."""

from __future__ import annotations

import json
import zlib
from typing import Any
from urllib.parse import quote

from corpus import EITHER, USED, Case, Way
from homes import Home

JSON = {"Content-Type": "application/json"}
THUMBNAIL = "/easyref/thumbnail?file=picture.png"


def nothing(home: Home) -> None:
    """The home as it is."""


def request(
    name: str, method: str, address: str, result: str = "refused", needs: int = 0, **more: Any
) -> Case:
    way = Way("comfy_entry_points.route", (method, address), more, name="route")
    return Case(name, nothing, (way,), result, needs=needs)


def stamps(name: str, body: str, result: str = "refused", **more: Any) -> Case:
    headers = JSON | more.pop("headers", {})
    return request(name, "POST", "/easyref/stamps", result, body=body, headers=headers, **more)


def thumbnail(name: str, query: str, result: str = "refused") -> Case:
    return request(name, "GET", f"/easyref/thumbnail?{query}", result)


def latin(content: bytes) -> str:
    return content.decode("latin-1")


def files(*names: str) -> str:
    return json.dumps({"files": names})


BOMB = latin(zlib.compress(bytes(120_000_000), 9))

CASES = (
    stamps("deep JSON", '{"files":' + "[" * 100_000 + "]" * 100_000 + "}"),
    stamps("deep braces", '{"files":' * 50_000 + "1" + "}" * 50_000),
    stamps("no JSON", "{"),
    stamps("nothing", ""),
    stamps("a list", "[]"),
    stamps("files that is no list", '{"files": {"a": 1}}'),
    stamps("files without a list", "{}"),
    stamps("files of numbers", '{"files": [1, null, [], {}, true, 1e400]}', EITHER),
    stamps(
        "files of odd names",
        files("\0", "..", "../../etc/passwd", "a" * 10_000, "", "\x1b"),
        USED,
    ),
    stamps("two thousand names outside", files(*["../" * 200 + "etc/passwd"] * 2_000), USED),
    stamps("a million files", '{"files": [' + ",".join(['""'] * 1_000_000) + "]}"),
    stamps("half a surrogate pair", '{"files": ["\\ud800.png"]}', USED),
    stamps("a number of 100,000 digits", '{"files": [' + "9" * 100_000 + "]}"),
    stamps("bytes that are no UTF-8", '{"files": ["\xff\xfe"]}'),
    stamps(
        "an unknown charset",
        '{"files": []}',
        headers={"Content-Type": "application/json; charset=klingon"},
    ),
    stamps(
        "a charset that is a codec for bytes",
        '{"files": []}',
        headers={"Content-Type": "application/json; charset=zlib"},
    ),
    stamps(
        "a charset that is no name",
        '{"files": []}',
        headers={"Content-Type": 'application/json; charset="a b"'},
    ),
    stamps(
        "a charset of UTF-16",
        '{"files": []}',
        headers={"Content-Type": "application/json; charset=utf-16"},
    ),
    stamps("a type that is none", '{"files": []}', EITHER, headers={"Content-Type": "\xfc/;=;;"}),
    stamps("broken gzip", "not gzip", headers={"Content-Encoding": "gzip"}),
    stamps("broken deflate", "not deflate", headers={"Content-Encoding": "deflate"}),
    stamps("broken brotli", "not brotli", headers={"Content-Encoding": "br"}),
    stamps("deflate of 120 MB", BOMB, headers={"Content-Encoding": "deflate"}),
    request(
        "a body of 90 MB",
        "POST",
        "/easyref/stamps",
        needs=180,  # the client's, in the same process
        body=" " * 1_000,
        repeat=90_000,
        headers=JSON,
    ),
    request(
        "a form for JSON",
        "POST",
        "/easyref/stamps",
        body="files=a",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    ),
    request("another method", "DELETE", "/easyref/stamps"),
    # Folders
    *(
        request(f"pictures of {name}", "GET", f"/easyref/pictures?folder={quote(folder)}", result)
        for name, folder, result in (
            ("a folder above", "../", "refused"),
            ("an absolute folder", "/etc", "refused"),
            ("a zero byte", "\0", "refused"),
            ("a name of 100,000 characters", "a" * 5_000, "refused"),
            ("control characters", "\x1b[31m\r\nX: y", "refused"),
            ("half a name", "%", "refused"),
            ("a drive", "C:\\", "refused"),
        )
    ),
    # Thumbnails
    *(
        thumbnail(f"a thumbnail of side {side[:20]}", f"file=picture.png&side={quote(side)}")
        for side in ("0", "-1", "1e9", "9" * 5_000, "nan", "", "²", "2049", " ")
    ),
    *(
        thumbnail(f"a crop of {crop[:30]}", f"file=picture.png&side=64&crop={quote(crop)}")
        for crop in (
            "0,0,1",
            "0,0,0,0",
            "-1,0,1,1",
            "0,0,1e400,1",
            "NaN,0,1,1",
            "[[[[",
            "null",
            "0,0,1,1],[",
            "[" * 3_000,
            "0,0,1,true",
            '"0",0,1,1',
            "9" * 5_000,
            "0,0,1,Infinity",
            "\0",
        )
    ),
    *(
        thumbnail(f"a thumbnail of {name}", f"side=64&file={quote(file)}")
        for name, file in (
            ("nothing", ""),
            ("a file above", "../outside.png"),
            ("an absolute file", "/etc/passwd"),
            ("a zero byte", "picture.png\0.png"),
            ("a name of 5,000 characters", "a" * 5_000 + ".png"),
            ("control characters", "\x1b[31m\r\nX: y.png"),
            ("a folder", "."),
            ("a file that is missing", "missing.png"),
            ("a share", "\\\\server\\share\\a.png"),
        )
    ),
    thumbnail("a thumbnail of names that are no UTF-8", "side=64&file=%ff%fe.png"),
    thumbnail("a thumbnail asked for twice", "file=picture.png&file=..&side=64&side=-1", EITHER),
)
