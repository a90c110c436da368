"""Training: the three progressive stages of EasyRef (arXiv 2412.09618, section 3.3)."""
