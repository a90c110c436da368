"""Methods of the benchmark on tiny models: those of the same settings share a pipeline."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

from easyref_core.evaluation.methods import Generated, Method
from easyref_core.evaluation.methods.load import load_method
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import GenerationSettings
from easyref_core.evaluation.trials import Trial

_open: list[Method] = []


@cache
def pipeline(settings: GenerationSettings) -> GenerationPipeline:
    return GenerationPipeline(settings)


def load(settings: GenerationSettings, *trials: Trial) -> Method:
    """The method of trials; the one before is closed."""
    while _open:
        _open.pop().close()
    method = load_method(trials[0].variant.method, pipeline(settings), trials)
    _open.append(method)
    return method


def generate(method: Method, work: Path, *trials: Trial) -> list[Generated]:
    """Images of trials, none of which may fail."""
    results = method.generate(trials, work)
    assert [result.error for result in results] == [""] * len(results)
    return results


def images(results: list[Generated]) -> list[Image.Image]:
    assert [result.error for result in results] == [""] * len(results)
    return [result.image for result in results if result.image is not None]


def pixels(results: list[Generated]) -> list[bytes]:
    return [image.tobytes() for image in images(results)]
