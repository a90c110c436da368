"""EasyRef Combine Tokens: the tokens of several groups made into one set, or one a latent."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..easyref_core.combine import METHODS, Part, combine_tokens
from ..easyref_core.tokens import ReferenceTokens, stack
from .link_types import EasyRefTokens

_COUNT = 4
_BATCH = "batch"


class EasyRefCombineTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCombineTokens",
            display_name="EasyRef Combine Tokens",
            category="EasyRef",
            description="Makes the reference tokens of several groups into one set: side by side, "
            "mixed, added, subtracted, one group to be avoided, or one for each latent of a batch.",
            inputs=[
                EasyRefTokens.Input(
                    f"tokens_{number}",
                    optional=number > 2,
                    tooltip="Reference tokens, all of one adapter. For avoid: 1 are the tokens to "
                    "follow, 2 those to avoid.",
                )
                for number in range(1, _COUNT + 1)
            ]
            + [
                io.Combo.Input(
                    "method",
                    options=[*METHODS, _BATCH],
                    default=METHODS[0],
                    tooltip="concatenate: all side by side, attention chooses. average, weighted "
                    "average: a mix. add, subtract: sum, or the first less the others. avoid: 2 "
                    "takes the place of the black picture in the negative branch. batch: one "
                    "token set per latent, 1 for the first.",
                ),
            ]
            + [
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=-3.0,
                    max=3.0,
                    step=0.05,
                    tooltip="What these tokens count in weighted average, add and subtract. The "
                    "other methods do not use it.",
                )
                for number in range(1, _COUNT + 1)
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="One set of tokens to apply.")
            ],
        )

    @classmethod
    def execute(cls, method: str, **given: Any) -> io.NodeOutput:
        parts = []
        for number in range(1, _COUNT + 1):
            tokens: ReferenceTokens | None = given.get(f"tokens_{number}")
            if tokens is not None:
                parts.append(Part(tokens, given[f"weight_{number}"], f"tokens_{number}"))
        if method == _BATCH:
            return io.NodeOutput(stack([part.tokens for part in parts]))
        return io.NodeOutput(combine_tokens(parts, method))
