"""Groups of references from a folder of tagged pictures: `easyref build-groups`.

tagged_pictures -> grouping (tags, duplicates, similarity, split) -> build_groups -> a folder
"""
