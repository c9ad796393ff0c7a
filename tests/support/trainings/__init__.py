"""Train a problem or a model, on threads and as jobs on Horovod workers."""
