"""The model that an optimizer trains, held weakly."""

from __future__ import annotations

import weakref

import keras


class TrainedModel:
    """Remembers the model that is trained, for checkpoints, without keeping it alive."""

    def __init__(self) -> None:
        self._model: weakref.ref[keras.Model] | None = None
        self._variables: list[keras.Variable] = []

    def remember(self, model: keras.Model | None, variables: list[keras.Variable]) -> None:
        """Remember the model, None where only its variables are known, and these."""
        self._model = None if model is None else weakref.ref(model)
        self._variables = variables

    @property
    def whole(self) -> keras.Model | None:
        """The model; None where it was not given, or is gone."""
        return None if self._model is None else self._model()

    @property
    def known(self) -> keras.Model | list[keras.Variable]:
        """The model; its variables where it was not given, or is gone."""
        whole = self.whole
        return self._variables if whole is None else whole
