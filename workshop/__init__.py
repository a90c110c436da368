"""The workshop: what trains, judges, draws and photographs the demo and the documentation.

It is never part of a release, and nothing that ships imports it.
"""
