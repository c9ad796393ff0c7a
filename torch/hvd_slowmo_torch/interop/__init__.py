"""A PyTorch model as other frameworks see it."""
