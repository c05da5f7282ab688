"""What is told about one plan."""
