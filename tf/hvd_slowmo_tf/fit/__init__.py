"""SlowMo under `model.fit`."""
