"""Backends: a program as NumPy execution or as torch source; they read ops and programs, and decide nothing."""
