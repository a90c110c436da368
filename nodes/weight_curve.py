"""EasyRef Weight Curve: a weight that changes over the sampling."""

from __future__ import annotations

from comfy_api.latest import io

from ..easyref_core.adapter.curves import SHAPES, curve_points
from .checked import checked
from .inputs import weight_input
from .link_types import EasyRefCurve
from .newer_core import found_by
from .sampling.weights import Curve


@checked
class EasyRefWeightCurve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWeightCurve",
            display_name="EasyRef Weight Curve",
            category="EasyRef",
            description="Lets the weight of references change over the sampling; the factor "
            "multiplies the weight.",
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="linear",
                    tooltip="How the factor goes from the start of the sampling to its end. "
                    "custom points uses points.",
                ),
                weight_input(
                    "Factor at the start of the sampling, where composition is decided.",
                    "start_value",
                ),
                weight_input(
                    "Factor at the end of the sampling, where details are decided.",
                    "end_value",
                    default=0.0,
                ),
                io.String.Input(
                    "points",
                    default="0:1, 0.5:0.2, 1:0",
                    tooltip="For custom points: place:factor, separated by commas, places from 0 "
                    "(start) to 1 (end) in rising order.",
                ),
            ],
            outputs=[
                EasyRefCurve.Output(
                    display_name="curve", tooltip="For EasyRef Apply or EasyRef Region."
                )
            ],
            **found_by("schedule, weight schedule, fade"),
        )

    @classmethod
    def execute(
        cls, shape: str, start_value: float, end_value: float, points: str
    ) -> io.NodeOutput:
        return io.NodeOutput(Curve(curve_points(shape, start_value, end_value, points)))
