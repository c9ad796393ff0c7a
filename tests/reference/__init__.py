"""The NumPy oracles, and the tests of these; they share no code with the library."""
