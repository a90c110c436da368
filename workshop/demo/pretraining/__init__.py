"""The demo models that a real user downloads ready-made: autoencoder, base, MLLM, ControlNet."""
