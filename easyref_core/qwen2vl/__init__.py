"""Qwen2-VL in plain torch: configuration, names, prompt, vision tower and decoder."""
