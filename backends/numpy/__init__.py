"""The reference semantics: a program executed by NumPy."""
