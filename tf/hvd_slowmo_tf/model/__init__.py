"""A Keras model as the core sees it: layout, vectors, variables."""
