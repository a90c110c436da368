"""The adapter: its checkpoint, keys and values of reference tokens, decoupled cross-attention,
layer weights, curves."""
