"""FLOPs and bytes of torch's operations, one family a file; `registry` finds the formula of an operation."""
