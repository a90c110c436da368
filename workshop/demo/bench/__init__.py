"""The embedded benchmark: `easyref bench` on the demo models, with small models to score with."""
