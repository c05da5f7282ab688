"""Passes: pure functions from a program to a program. `tnmoe.lower.run_passes` fixes their order."""
