"""Checkpoints of the whole job under `model.fit`: their epochs, and the points at which they are saved."""

from __future__ import annotations

import keras

from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo_tf.model.layout import parts_of
from hvd_slowmo_tf.optimizer import SlowMo

_EPOCH = "epoch"


class FitCheckpoints:
    """Checkpoints of one `fit`.

    Args:
        checkpoints: as the user gave them.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._looked = False

    def find(self, model: keras.Model, optimizer: SlowMo) -> None:
        """Look for a checkpoint before the first epoch, once, and let `fit` begin with its epoch. A collective.

        A model that has its variables is restored at once: where all epochs are done, no other place follows.
        """
        if self._looked:
            return
        self._looked = True
        self._checkpoints.find(optimizer)
        model._initial_epoch = self._checkpoints.values.get(_EPOCH)  # as BackupAndRestore does
        if model.built and optimizer.worker.parameter_map is None:
            optimizer.worker.trained.remember(model, parts_of(model)[0])
            self._checkpoints.restore()

    def restore(self) -> None:
        """Restore what was found, if that has not been done. A collective, after the workers' start."""
        self._checkpoints.restore()

    def after_batch(self, epoch: int) -> None:
        """Save within an epoch, which a resume begins again."""
        self._checkpoints.step(epoch=epoch)

    def between_epochs(self, epoch: int) -> None:
        """Save, and wait until it is whole: some worker may end here, and answers no more.

        Args:
            epoch: that a resume begins with.
        """
        self._checkpoints.finish()
        if self._checkpoints.every is None:
            self._checkpoints.save(epoch=epoch)
        self._checkpoints.step(epoch=epoch)
        self._checkpoints.finish()
