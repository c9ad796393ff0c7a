"""A PyTorch model as the core sees it: layout, vectors, statistics, changes from outside, gradients."""
