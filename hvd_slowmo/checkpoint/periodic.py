"""Checkpoints of a whole job every so many steps, written beside the training, the newest of which is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hvd_slowmo.checked_numbers import integer
from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.job import EXTRA, AnyPath
from hvd_slowmo.checkpoint.saving import Saving
from hvd_slowmo.checkpoint.series import Found, Series
from hvd_slowmo.checkpoint.state import WorkerState
from hvd_slowmo.checkpoint.values import dump, load
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts.roll_call import RollCall
from hvd_slowmo.core.start.handshake import agreed, logger
from hvd_slowmo.core.step import preemption
from hvd_slowmo.errors import CheckpointError

_VALUE, _OBJECT = "value/", "object/"


class Stateful(Protocol):
    """Part of a script with a state of its own: a learning-rate scheduler, a sampler, a loss scaler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Continue from a state."""


class SavedWorker(Protocol):
    """An adapter's worker."""

    @property
    def comm(self) -> ScopedComm:
        """The workers under the optimizer's name."""

    @property
    def roll(self) -> RollCall:
        """The knowledge about all workers, once they have started."""

    def state_maker(self) -> Callable[[], WorkerState]:
        """Return a function that returns this worker's state. A collective."""


class SavedOptimizer(Protocol):
    """A SlowMo optimizer of either framework."""

    @property
    def worker(self) -> SavedWorker:
        """This worker's part apart from the framework."""

    @property
    def steps(self) -> int:
        """Inner steps completed."""

    def load(self, path: AnyPath) -> None:
        """Continue from a checkpoint. A collective."""


class Checkpoints:
    """Checkpoints in a directory: saved periodically, and resumed by the same command line.

    Every rank makes one with the same arguments, calls `resume` once the optimizer is constructed, `step` after every
    step of the optimizer, and `finish` at the end. A save copies the state to host memory and goes on in a thread. An
    interrupted save leaves the checkpoints before it as they are.

    Args:
        folder: the directory, which all ranks see; it is made if it does not exist.
        every: number of steps between two saves, >= 1. A save takes place at the first point from there on where all
            workers are together: an outer step, or any step that averages all workers' gradients. None: only where
            `save` is called and, with `SlowMoCallback`, at the end of every epoch.
        keep: number of checkpoints that are kept, >= 1.

    Attributes:
        values: the values that `step` was given for the checkpoint that was resumed; {} without one.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Example:
        >>> import tempfile, torch
        >>> import hvd_slowmo.torch as slowmo
        >>> def train(folder, steps):
        ...     model = torch.nn.Linear(3, 1)
        ...     optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
        ...     checkpoints = slowmo.Checkpoints(folder, every=4, keep=2)
        ...     start = checkpoints.resume(optimizer)
        ...     for step in range(start, steps):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(8, 3)).mean().backward()
        ...         optimizer.step()
        ...         checkpoints.step()
        ...     checkpoints.finish()
        ...     return start
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train(folder, 5), train(folder, 9), train(folder, 9)
        (0, 4, 8)
    """

    def __init__(self, folder: AnyPath, *, every: int | None = None, keep: int = 3) -> None:
        self.every = None if every is None else integer("every", every, 1, "a positive integer or None")
        self.keep = integer("keep", keep, 1, "a positive integer")
        self.values: dict[str, Any] = {}
        self._series = Series(Path(folder).absolute(), self.keep)
        self._objects: Mapping[str, Stateful] = {}
        self._optimizer: SavedOptimizer | None = None
        self._found: Found | None = None
        self._saving: Saving | None = None
        self._last = 0  # step of the last save that has begun, or of the resume

    def resume(self, optimizer: SavedOptimizer, **objects: Stateful) -> int:
        """Continue from the newest checkpoint that is whole, if there is one. A collective.

        A damaged one is left out with a warning, and the one before it is taken. In an elastic job workers that have
        made steps go on from where they are: call it wherever the function begins.

        Args:
            optimizer: SlowMo, of either framework; in Keras it is built, and `broadcast` has been called.
            objects: by names of the caller's choice, what is saved and restored with it: anything with `state_dict()`
                and `load_state_dict()` of numbers, strings, lists, dicts and NumPy arrays.

        Returns:
            The number of steps completed; 0 if there is no checkpoint.

        Raises:
            CheckpointError: on every rank, if no checkpoint is whole, or it does not fit.
            ValueError: on every rank, if arguments differ.
        """
        self.find(optimizer, **objects)
        self.restore()
        return optimizer.steps

    def find(self, optimizer: SavedOptimizer, **objects: Stateful) -> None:
        """Take the first half of `resume`: look for the checkpoint, and set `values`. A collective."""
        self._optimizer, self._objects = optimizer, dict(objects)
        if elastic() and optimizer.steps > 0:  # the same on all, newcomers included; a save of former workers is over
            self._found, self._saving, self._last, self.values = None, None, optimizer.steps, {}
            return
        comm, settings = optimizer.worker.comm.scoped("checkpoints"), {"every": self.every, "keep": self.keep}
        self._found = self._series.find(comm, {**settings, "objects": sorted(objects)})
        extra = {} if self._found is None else self._found.extra
        self.values = {
            name.removeprefix(_VALUE): load(value) for name, value in extra.items() if name.startswith(_VALUE)
        }

    def restore(self) -> None:
        """Take the second half of `resume`, once: load the checkpoint that was found. A collective."""
        found, self._found = self._found, None
        if found is None:
            return
        optimizer = self._known_optimizer()
        optimizer.load(found.path)
        self._last = found.step
        comm = optimizer.worker.comm.scoped("checkpoints")

        def restored() -> tuple[bool, dict[str, Any]]:
            self._restore_objects(found, comm)
            return True, {}

        agreed(comm, restored, {})
        if comm.rank == 0:
            logger.info("%s: resumed from %s", comm.name, found.path)

    def step(self, **values: Any) -> None:
        """Save if a save is due, and see to the one that is under way. Call it after every step, on every rank.

        After `optimizer.step()` and all that follows it (the scheduler's step), and after `join()` too, where one is
        called. Within a block it costs microseconds, and nothing is exchanged.

        Args:
            values: numbers, strings, lists, dicts and NumPy arrays, to be found in `values` after a resume; each rank
                its own.

        Raises:
            CheckpointFileError: on every rank, if the system refused a file of the last save on one.
            ValueError: on every rank, if something can't be saved on one.
            SystemExit: with status `PREEMPTED`, after a signal; see `on_preemption`.
        """
        optimizer = self._known_optimizer()
        roll, steps = optimizer.worker.roll, optimizer.steps
        preemption.tell(roll)
        if not roll.together(steps):
            return
        self._advance()
        ending = preemption.saves_to() in (self, None) and preemption.due(roll, steps)
        if ending or (self.every is not None and steps // self.every > self._last // self.every):
            self.save(**values)
        if ending:
            self.finish()
            preemption.end(steps, self._series.path(steps))

    def save(self, **values: Any) -> None:
        """Begin a save now. A collective, after the same step on every rank.

        Args:
            values: as in `step`.

        Raises:
            CheckpointFileError, ValueError: as `step`, for the save before, which is awaited.
        """
        self.finish()
        optimizer = self._known_optimizer()
        steps = optimizer.steps
        make, path = optimizer.worker.state_maker(), self._series.path(steps)
        comm, prune = optimizer.worker.comm, self._series.remove_older
        self._saving = Saving(comm, path, make, lambda: self._extra(values), prune)
        self._last = steps

    def finish(self) -> None:
        """Wait until the save that is under way is whole. A collective; call it at the end of the training.

        Raises:
            CheckpointFileError, ValueError: as `step`.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.finish()

    def _advance(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None and not saving.advance():  # after an error nothing is under way
            self._saving = saving

    def _extra(self, values: Mapping[str, Any]) -> Arrays:
        arrays: Arrays = {f"{EXTRA}{_VALUE}{name}": dump(name, value) for name, value in values.items()}
        for name, each in self._objects.items():
            arrays[f"{EXTRA}{_OBJECT}{name}"] = dump(name, dict(each.state_dict()))
        return arrays

    def _restore_objects(self, found: Found, comm: ScopedComm) -> None:
        for name, each in self._objects.items():
            if _OBJECT + name in found.extra:
                each.load_state_dict(load(found.extra[_OBJECT + name]))
            elif found.workers == comm.size:
                raise CheckpointError(f"{found.path} has no state of `{name}`. Resume the objects that were saved.")
            elif comm.rank == 0:
                logger.warning(
                    "%s: `%s` begins anew: each of %d workers had its own state of it, and now there are %d.",
                    comm.name,
                    name,
                    found.workers,
                    comm.size,
                )

    def _known_optimizer(self) -> SavedOptimizer:
        if self._optimizer is None:
            raise RuntimeError(
                "Checkpoints do not know the optimizer yet. Call resume(optimizer) first, on every rank."
            )
        return self._optimizer
