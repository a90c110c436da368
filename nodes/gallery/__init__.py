"""The gallery's routes and files."""
