"""The workshop: finds and drives a ComfyUI; draws, trains and evaluates the demo; makes pictures of
help pages and templates; lists the files of a release.

It is never part of a release, and nothing that ships imports it.
"""
