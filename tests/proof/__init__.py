"""Measured scenarios: what Sluice promises in numbers, run against the real thing. `python -m tests.proof`."""
