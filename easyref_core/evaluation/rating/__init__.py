"""Blind comparison of a run's images by a person: `easyref bench --rate`.

pairs (who is compared, in which order) -> session (what is shown, votes) -> server and page
votes -> preferences (win rates) -> results.json
"""
