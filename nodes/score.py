"""EasyRef Score: how near pictures are to references and prompt."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..easyref_core.errors import EasyRefError
from ..easyref_core.evaluation.metrics.embedders import CLIP, DINO
from ..easyref_core.evaluation.metrics.model_directory import ModelKind
from ..easyref_core.evaluation.metrics.similarity import mean_cosine
from .checked import checked
from .host.folders import NO_MODEL, SCORE_MODELS, file_stamps, score_model_names, score_model_path
from .host.progress import progress_bar
from .host.scoring import embed
from .inputs import gather, prompt_input, references_from_batch
from .link_types import EasyRefReferenceGroup, References
from .newer_core import found_by

_ORDER = ("CLIP-I", "CLIP-T", "DINO-I")
_PAPER = 2.5  # by which the paper's tables multiply CLIP-T


@checked
class EasyRefScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefScore",
            display_name="EasyRef Score",
            category="EasyRef",
            description="Measures how near pictures are to references (CLIP-I, DINO-I) and to the "
            "prompt (CLIP-T), to compare weights, seeds and settings.",
            inputs=[
                io.Image.Input("images", tooltip="Generated pictures; of several the mean counts."),
                io.Image.Input(
                    "reference_images",
                    optional=True,
                    tooltip="Pictures to compare with, as one batch.",
                ),
                EasyRefReferenceGroup.Input(
                    "references",
                    optional=True,
                    tooltip="Pictures of any sizes to compare with, from EasyRef References; their "
                    "weights do not count here.",
                ),
                prompt_input("The positive prompt's text, for CLIP-T; empty leaves CLIP-T out."),
                io.Combo.Input(
                    "clip_model",
                    options=score_model_names(CLIP),
                    tooltip="CLIP for CLIP-I and CLIP-T: a folder in models/easyref_score, such as "
                    "openai/clip-vit-large-patch14. none leaves both out; demo knows the demo's "
                    "drawings only.",
                ),
                io.Combo.Input(
                    "dino_model",
                    options=score_model_names(DINO),
                    tooltip="DINO or DINOv2 for DINO-I: a folder in models/easyref_score, such as "
                    "facebook/dinov2-small. none leaves it out; demo knows the demo's drawings "
                    "only.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="clip_i",
                    tooltip="Likeness to the references by CLIP: mean cosine over all pairs of a "
                    "picture and a reference. 0 where it is left out.",
                ),
                io.Float.Output(
                    display_name="clip_t",
                    tooltip="Likeness to the prompt by CLIP: mean cosine over the pictures. 0 "
                    "where it is left out.",
                ),
                io.Float.Output(
                    display_name="dino_i",
                    tooltip="Likeness to the references by DINO, as clip_i; more sensitive to "
                    "details of the subject. 0 where it is left out.",
                ),
                io.String.Output(
                    display_name="text", tooltip="The scores in one line, with what was left out."
                ),
            ],
            **found_by(
                "metric, evaluate, similarity, clip score, clip-i, clip-t, dino, dino-i, compare, "
                "search"
            ),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, clip_model: str | None = None, dino_model: str | None = None, **_: Any
    ) -> Any:
        chosen = ((CLIP, clip_model), (DINO, dino_model))
        return [file_stamps(score_model_path(n, kind)) for kind, n in chosen if n is not None]

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        prompt: str,
        clip_model: str,
        dino_model: str,
        reference_images: torch.Tensor | None = None,
        references: References | None = None,
    ) -> io.NodeOutput:
        clip, dino = score_model_path(clip_model, CLIP), score_model_path(dino_model, DINO)
        if clip is None and dino is None:
            raise EasyRefError(
                "clip_model and dino_model are both none. Choose at least one; put the folders of "
                f"{CLIP.example} and {DINO.example} into models/{SCORE_MODELS} and refresh the "
                "page."
            )
        own = _pictures(references_from_batch(images, "images"))
        if not own:
            raise EasyRefError("images holds no picture. Connect generated pictures.")
        group = _pictures(gather(reference_images, references, "reference_images"))
        prompt = prompt.strip()
        if not group and (clip is None or not prompt):
            raise EasyRefError(
                "There is nothing to compare with. Connect reference_images or references, or "
                "write a prompt and choose a clip_model."
            )
        scores = _measure({CLIP: clip, DINO: dino}, own, group, prompt)
        line = _line(scores)
        values = [s if isinstance(s, float) else 0.0 for s in map(scores.get, _ORDER)]
        return io.NodeOutput(*values, line, ui={"text": (line,)})


def _pictures(references: References) -> list[Image.Image]:
    return [reference.picture for reference in references]


def _measure(
    models: Mapping[ModelKind, Path | None],
    own: list[Image.Image],
    group: list[Image.Image],
    prompt: str,
) -> dict[str, float | str]:
    """Each score of `_ORDER`, or why there is none."""
    bar, done = progress_bar(), count(1)
    total = sum(path is not None for path in models.values()) * len(own + group)
    scores: dict[str, float | str] = {}
    for kind, directory in models.items():
        likeness = f"{kind.name}-I"
        why = f"{kind.name.lower()}_model is {NO_MODEL}" if directory is None else ""
        scores[likeness] = why or "no references"
        if kind is CLIP:
            scores["CLIP-T"] = why or "no prompt"
        if directory is None:
            continue
        found, text = embed(kind, directory, own + group, prompt, lambda: bar(next(done), total))
        mine, theirs = found[: len(own)], found[len(own) :]
        if theirs:
            scores[likeness] = mean_cosine(mine, theirs)
        if text is not None:
            scores["CLIP-T"] = mean_cosine(mine, [text])
    return scores


def _line(scores: Mapping[str, float | str]) -> str:
    parts = []
    for name in _ORDER:
        score = scores[name]
        if isinstance(score, str):
            parts.append(f"{name} left out ({score})")
        elif name == "CLIP-T":
            parts.append(f"{name} {score:.3f} (x {_PAPER}: {_PAPER * score:.3f})")
        else:
            parts.append(f"{name} {score:.3f}")
    return ", ".join(parts)
