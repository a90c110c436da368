"""Draws the help pages' pictures of Demo Models and Demo Latent into web/docs/images.

    python -m workshop.pages.demo_pictures

The cards and nodes are those of make_pictures.
"""

from __future__ import annotations

from .make_pictures import (
    CLIP,
    EASYREF,
    FIELD,
    MODEL,
    OUT,
    SOFT,
    TEXT,
    Sheet,
)

VAE = "#ff6e6e"
CONTROL = "#80cbc4"
LATENT = "#ff9cf9"


def demo_models() -> None:
    sheet = Sheet(242)
    kinds = (
        ("model", MODEL, "EasyRef Apply, KSampler", "instead of an SDXL model"),
        ("clip", CLIP, "CLIP Text Encode", "instead of SDXL's text encoders"),
        ("vae", VAE, "VAE Decode", "instead of SDXL's autoencoder"),
        ("easyref", EASYREF, "EasyRef Encode, Apply, Demo Latent", "instead of EasyRef Loader"),
        ("control_net", CONTROL, "Apply ControlNet", "instead of a ControlNet for SDXL"),
        ("latent", LATENT, "KSampler", "better left free: see EasyRef Demo Latent"),
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


def demo_latent() -> None:
    sheet = Sheet(250)
    size = [("width", "1216"), ("height", "832"), ("batch_size", "2")]
    _, empty = sheet.node(14, 16, 138, "Empty Latent Image", (), [("LATENT", LATENT)], size, LATENT)
    _, models = sheet.node(14, 148, 138, "EasyRef Demo Models", (), [("easyref", EASYREF)])
    inputs, outputs = sheet.node(
        186,
        66,
        146,
        "EasyRef Demo Latent",
        [("latent", LATENT), ("easyref", EASYREF)],
        [("latent", LATENT)],
    )
    sheet.link(empty["LATENT"], inputs["latent"], LATENT)
    sheet.link(models["easyref"], inputs["easyref"], EASYREF)
    target = (356.0, outputs["latent"][1])
    sheet.link(outputs["latent"], target, LATENT)
    sheet.text(target[0] + 9, target[1], "KSampler", TEXT, 10)
    for x, w, h, words in ((206, 60.8, 41.6, "yours"), (320, 22.8, 15.6, "demo models")):
        for step in (6, 0):
            sheet.box(x + step, 200 - h - step / 2 + 18, w, h, FIELD, LATENT, 2, 1.2)
        sheet.text(x + w / 2 + 3, 232, words, SOFT, 10, "mm")
    sheet.save("demo_latent")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in (demo_models, demo_latent):
        draw()


if __name__ == "__main__":
    main()
