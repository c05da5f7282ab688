"""What emitted files carry word for word."""
