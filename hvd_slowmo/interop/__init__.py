"""Comparing and copying models between PyTorch and Keras: the one place that imports both adapters."""
