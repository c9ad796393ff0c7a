"""Keras' train function, where a trace of it fails."""

from __future__ import annotations

import sys
from types import FrameType

import keras


def drop_traced() -> None:
    """Drop the train functions of the models whose training is being traced; called where the trace is refused.

    TensorFlow keeps a failed trace that has made variables: from then on the function does nothing, and a
    `train_on_batch` after the error would train nothing without a word. Keras makes a dropped function anew. A model's
    optimizer does not know the model, but it is the model's train step that calls it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model):
            caller.train_function = None
        frame = frame.f_back
