"""What happens while a sampler runs: run, model call, layer."""
