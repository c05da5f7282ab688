"""Published layers, and those to compare them with, by name."""
