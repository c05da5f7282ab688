"""A planned backward pass of the module's own."""
