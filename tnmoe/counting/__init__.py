"""What any torch model costs: formulas over torch's operations, and the run on fake tensors that calls them."""
