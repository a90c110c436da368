"""Pretraining of the demo's autoencoder, MLLM, base model and ControlNet."""
