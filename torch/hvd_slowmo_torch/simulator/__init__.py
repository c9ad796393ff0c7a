"""Many workers in one process, as the last axis of stacked tensors."""
