"""The command line. Exit codes: 0 fine, 1 a check failed, 2 bad input."""
