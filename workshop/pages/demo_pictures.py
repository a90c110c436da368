"""Draws the help page's picture of Demo Models into web/docs/images.

    python -m workshop.pages.demo_pictures

The cards and nodes are those of make_pictures.
"""

from __future__ import annotations

from .make_pictures import (
    CLIP,
    EASYREF,
    MODEL,
    OUT,
    SOFT,
    TEXT,
    Sheet,
)

VAE = "#ff6e6e"
CONTROL = "#80cbc4"
IMAGE = "#64b5f6"


def demo_models() -> None:
    sheet = Sheet(242)
    kinds = (
        ("model", MODEL, "EasyRef Apply, KSampler", "instead of an SDXL model"),
        ("clip", CLIP, "CLIP Text Encode", "instead of SDXL's text encoders"),
        ("vae", VAE, "VAE Decode", "instead of SDXL's autoencoder"),
        ("easyref", EASYREF, "EasyRef Encode, EasyRef Apply", "instead of EasyRef Loader"),
        ("control_net", CONTROL, "Apply ControlNet", "instead of a ControlNet for SDXL"),
        ("images", IMAGE, "EasyRef Encode, Preview Image", "four pictures of one character"),
    )
    _, outputs = sheet.node(
        14, 40, 150, "EasyRef Demo Models", (), [(name, colour) for name, colour, *_ in kinds]
    )
    for row, (name, colour, target, stands) in enumerate(kinds):
        end = (214.0, 30.0 + 34 * row)
        sheet.link(outputs[name], end, colour)
        sheet.text(226, end[1] - 1, target, TEXT, 10.5)
        sheet.text(226, end[1] + 13, stands, SOFT, 9.5)
    sheet.text(14, 222, "They know drawn characters, at 128 x 128.", SOFT, 10)
    sheet.save("demo_models")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    demo_models()


if __name__ == "__main__":
    main()
