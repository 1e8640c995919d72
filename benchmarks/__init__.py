"""Benchmarks of speed and faults. Each program prints a table and, as its last line, one JSON object."""
