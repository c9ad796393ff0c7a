"""Small models of each framework, and what they must be compared in."""
