"""Measurements for `hvd_slowmo.advice` that need PyTorch: the workers' processors, and the steps of a training run."""
