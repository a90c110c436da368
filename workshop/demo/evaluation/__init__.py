"""Evaluation of a trained demo set on held-out identities: sample images, classify, tabulate."""
