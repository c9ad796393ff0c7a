"""The NumPy oracles and their tests; they share no code with the library."""
