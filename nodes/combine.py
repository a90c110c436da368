"""EasyRef Combine Tokens: the tokens of several groups as one set, or one for each latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..easyref_core.tokens.combine import (
    METHODS,
    WEIGHING,
    WeightedTokens,
    combine_tokens,
    read_weights,
)
from ..easyref_core.tokens.reference_tokens import ReferenceTokens, stack_tokens
from .checked import checked
from .inputs import Numbered, accepted, connected
from .link_types import EasyRefTokens
from .newer_core import found_by

_BATCH = "batch"


@checked
class EasyRefCombineTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCombineTokens",
            display_name="EasyRef Combine Tokens",
            category="EasyRef",
            description="Combines the reference tokens of several groups into one set: "
            "concatenated, averaged, added, subtracted, one group to avoid, or one for each latent "
            "of a batch.",
            inputs=[
                io.Autogrow.Input(
                    "tokens",
                    template=Numbered(EasyRefTokens.Input("tokens"), least=2),
                    tooltip="Reference tokens, all of one adapter; a new input appears as you "
                    "connect, up to 100. For avoid: 1 are the tokens to follow, 2 those to avoid.",
                ),
                io.Combo.Input(
                    "method",
                    options=[*METHODS, _BATCH],
                    default=METHODS[0],
                    tooltip="concatenate: all in one sequence, attention chooses. average: "
                    "the weighted mean. add, subtract: the sum, or the first minus the others. "
                    "avoid: 2 replaces the black picture in the negative branch. batch: one token "
                    "set per latent, 1 for the first.",
                ),
                io.String.Input(
                    "weights",
                    default="1, 1",
                    tooltip="Weights of tokens_1, tokens_2 and so on in average, add and "
                    "subtract: numbers, separated by commas. Missing ones are 1. Other methods "
                    "ignore them.",
                ),
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="One set of tokens to apply.")
            ],
            **found_by("merge, average, concat, mix styles, subtract, batch"),
        )

    @classmethod
    def validate_inputs(
        cls, weights: str | None = None, tokens: Mapping[str, Any] | None = None
    ) -> bool | str:
        # ComfyUI passes growing inputs too; weights is None if it is linked.
        return accepted(lambda: read_weights(weights or ""))

    @classmethod
    def execute(
        cls, method: str, weights: str, tokens: Mapping[str, ReferenceTokens] | None = None
    ) -> io.NodeOutput:
        given = list(connected(tokens, "tokens", "tokens"))
        if method == _BATCH:
            return io.NodeOutput(stack_tokens([value for _, value in given]))
        last = max([2, *(number for number, _ in given)])
        numbers = read_weights(weights, last) if method in WEIGHING else ()
        parts = [
            WeightedTokens(
                value, numbers[number - 1] if number <= len(numbers) else 1.0, f"tokens_{number}"
            )
            for number, value in given
        ]
        return io.NodeOutput(combine_tokens(parts, method))
