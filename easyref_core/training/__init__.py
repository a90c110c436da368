"""Training: the three progressive stages of EasyRef (arXiv 2412.09618, section 3.3), then layer
pooling and identity (arXiv 2605.26111).

config, recipe      settings from YAML, validated; check_settings: those that contradict each other
records, samples    data files to samples; augment crops and chooses
base, model         frozen SDXL; encoder and adapter around its UNet; build_model makes them
batches             samples to latents, noise and text states
schedule            learning rates, timesteps and loss weights
engine, checkpoints optimiser steps and resuming, shared with the demo's pretraining
processes, memory   accelerate; estimate of the memory needed
disk                files written whole or not at all
loop                a run of all these; progress and preview show it
merge               parts trained apart, in one adapter
"""
