"""A Keras model as other frameworks see it."""
