"""Encoding the golden group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from comfyhost import CASE, Pack
from goldens import IMAGE_SIZE, pictures, user_prompt


@pytest.fixture
def encode(pack: Pack, fresh_easyref: Any) -> Callable[..., Any]:
    """Encodes the golden group; the settings of the node may be changed."""
    group = pack.part("easyref_core.encode.group").Reference
    references = tuple(group(p) for p in pictures(CASE))

    def run(easyref: Any = fresh_easyref, **settings: Any) -> Any:
        given = {
            "prompt": user_prompt(CASE),
            "aggregation": "easyref",
            "image_size": IMAGE_SIZE,
            "references": references,
        }
        return pack.run("EasyRefEncode", easyref, **(given | settings))

    return run
