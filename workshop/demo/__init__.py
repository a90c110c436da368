"""The demo: its drawn data, training and evaluation, and small random model sets for tests."""
