"""Exact measurements of the project's speed; each program prints a table and, last, one JSON object."""
