"""PyTorch models in a form that other frameworks can read."""
