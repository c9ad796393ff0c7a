"""Transports of the PyTorch adapter: Horovod and torch.distributed."""
