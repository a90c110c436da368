"""A folder in the layout of face-api's `model`, with small random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from easyref_core.evaluation.metrics.faces.networks import (
    FaceDescriptor,
    FaceDetector,
    FaceLandmarks,
)

NETWORKS: dict[str, type[nn.Module]] = {
    "tiny_face_detector_model": FaceDetector,
    "face_landmark_68_model": FaceLandmarks,
    "face_recognition_model": FaceDescriptor,
}
_SCALE, _MINIMUM = 0.001, -0.128


def write_face_model(folder: Path, *names: str) -> Path:
    """Write networks, all without names, quantised to bytes as face-api's are."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name in names or NETWORKS:
        entries, content = [], b""
        for parameter, value in NETWORKS[name]().named_parameters():
            stored = torch.randint(0, 256, value.shape, generator=generator, dtype=torch.uint8)
            quantization = {"dtype": "uint8", "scale": _SCALE, "min": _MINIMUM}
            entries.append(
                {
                    "name": parameter.replace(".", "/"),
                    "shape": list(value.shape),
                    "dtype": "float32",
                    "quantization": quantization,
                }
            )
            content += stored.numpy().tobytes()
        (folder / f"{name}.bin").write_bytes(content)
        write_manifest(folder, name, [{"paths": [f"{name}.bin"], "weights": entries}])
    return folder


def manifest_path(folder: Path, name: str) -> Path:
    return folder / f"{name}-weights_manifest.json"


def write_manifest(folder: Path, name: str, groups: object) -> None:
    manifest_path(folder, name).write_text(json.dumps(groups))


def read_manifest(folder: Path, name: str) -> list[dict]:
    return json.loads(manifest_path(folder, name).read_text())
