"""The workflow templates and their pictures."""
