"""The PyTorch adapter of hvd-slowmo; users open it as `import hvd_slowmo.torch as slowmo`."""
