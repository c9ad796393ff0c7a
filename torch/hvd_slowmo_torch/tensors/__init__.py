"""The core's operations on PyTorch tensors."""
