"""SlowMo under `model.fit`."""

import keras


class SlowMoCallback(keras.callbacks.Callback):
    """Placeholder."""
