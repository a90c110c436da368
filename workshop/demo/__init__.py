"""Model sets small enough to run every workflow anywhere, in the layouts of the real ones."""
