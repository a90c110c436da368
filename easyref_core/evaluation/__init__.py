"""Measure how well generated images follow groups of references: `easyref bench`.

groups -> trials (a variant of a method on a group) -> images (methods) -> scores (metrics) -> page
"""
