"""Small models of each framework, and the values to compare."""
