"""Reference tokens: the value that travels, its file, and combinations."""
