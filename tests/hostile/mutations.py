"""Seeded mutations of files: of their JSON's values, and of their bytes."""

from __future__ import annotations

import json
import math
import struct
from copy import deepcopy
from random import Random
from typing import Any

# What a value may become; 1e400 is written as Infinity, NaN as NaN, which Python reads back.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 0.5, -0.0, 1e-300, 1e300, math.inf, math.nan),
    *(2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30, -(2**63), 10**9),
    *("", "0", "1", "F32", "BF16", "I64", "qwen2_vl", "\0", "\x1b[31m", "../../x", "é", "\ud800"),
    *([], {}, [0], [1, 2], [[1]], {"a": 1}, [-1], [2**40, 2**40]),
)


def mutated_json(content: Any, random: Random) -> Any:
    """A copy in which one to three values, keys or lists have changed."""
    content = json.loads(json.dumps(content))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return deepcopy(random.choice(VALUES))
        holder, key = random.choice(places)
        _change(holder, key, random)
    return content


def _places(content: Any) -> Any:
    """(holder, key) of every value inside."""
    waiting = [content]
    while waiting:
        holder = waiting.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for key in list(keys):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def _change(holder: Any, key: Any, random: Random) -> None:
    value = holder[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        name = str(key)
        cut = random.randrange(len(name) + 1)
        holder[random.choice((name[:cut], name + ".weight", name.upper(), "\x07" + name))] = value
        holder.pop(key, None)
    elif kind == 2 and isinstance(value, list) and value:
        value.append(deepcopy(random.choice(value)))
    elif kind in (3, 4) and number:
        holder[key] = random.choice(
            (value + 1, value - 1, value * 2, -value, value * 1.0, value // 2)
        )
    elif kind == 5:
        holder[key] = [value]
    else:
        holder[key] = deepcopy(random.choice(VALUES))


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """A copy with one to eight changes of single bytes or short pieces."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(5)
        if kind == 0:
            del changed[at : at + random.choice((1, 1, 8, 1000))]
        elif kind == 1:
            changed[at:at] = random.randbytes(random.choice((1, 4, 16)))
        elif kind == 2:
            changed[at:at] = changed[max(0, at - 16) : at]
        elif at < len(changed):
            changed[at] = random.choice((changed[at] ^ 1 << random.randrange(8), 0, 0xFF))
    return bytes(changed)


def mutated_safetensors(content: bytes, random: Random) -> bytes:
    """Another header before the same data, and now and then other data or another length."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = random.randrange(10)
    if kind < 6:
        header = json.dumps(mutated_json(json.loads(header), random)).encode()
    elif kind < 9:
        header = mutated_bytes(header, random)
    if random.randrange(10) == 0:
        data = data[: random.randrange(len(data) + 1)]
    length = len(header)
    if random.randrange(20) == 0:
        length = random.choice((0, length - 1, length + 8, 2**31, 2**40, 2**63))
    return struct.pack("<Q", length) + header + data
