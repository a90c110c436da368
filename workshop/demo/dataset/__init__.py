"""Drawn pictures for training and judging the demo models: groups with something in common."""
