"""Benchmarks: named scenarios, CPU per request as a ratio to a bare proxy of the same HTTP stack, measured in the same run."""
