"""The algorithm, once, on any framework."""
