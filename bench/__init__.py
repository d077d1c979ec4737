"""Benchmarks of sandboxcore; see README.md beside this file. Run them with `python -m bench`."""
