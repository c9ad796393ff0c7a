"""The images of an epoch, dealt to the workers step by step."""

from __future__ import annotations

import numpy as np


class Epochs:
    """Numbers of a worker's images, which depend on seed, epoch and step alone: a resumed run sees the same ones.

    All workers take equally many steps; a partial batch at the end of an epoch is left out.

    Args:
        count: number of images of all workers.
        batch: images per step, all workers together.
        seed: of the run.
        rank, workers: of this worker, and their number.

    Example:
        >>> first, second = (Epochs(9, 4, 0, rank, 2) for rank in range(2))
        >>> first.steps, len(set(np.concatenate(first.batches(0) + second.batches(0))))
        (2, 8)
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int, workers: int) -> None:
        if batch % workers:
            raise ValueError(
                f"`--batch-size` counts the images of all workers. Received: {batch}, with {workers} workers. "
                "Give a multiple of their number."
            )
        if batch > count:
            raise ValueError(f"{count} images are fewer than a batch of {batch}. Give a smaller `--batch-size`.")
        self.steps = count // batch
        self._count, self._batch, self._seed, self._rank, self._workers = count, batch, seed, rank, workers

    def batches(self, epoch: int, first: int = 0) -> list[np.ndarray]:
        """Return the numbers of this worker's images for each step of an epoch, from the step `first` on."""
        order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        steps = range(first, self.steps)
        return [order[k * self._batch : (k + 1) * self._batch][self._rank :: self._workers] for k in steps]
