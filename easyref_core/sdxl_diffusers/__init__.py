"""The adapter on a diffusers UNet of SDXL's kind."""
