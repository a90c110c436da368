"""Qwen2-VL in plain torch: files, configuration, names, prompt, vision tower, decoder, memory."""
