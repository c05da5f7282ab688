"""FLOPs, traffic, what is saved, and the price of a step."""
