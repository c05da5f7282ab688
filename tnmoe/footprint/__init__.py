"""Bytes alive step by step, and where emitted code says `del`."""
