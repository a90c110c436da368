"""Find, start and talk to a ComfyUI."""
