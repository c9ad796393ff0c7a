"""Record the collectives that a worker starts, in short scenarios that every adapter runs.

`SCENARIOS` lists the scenarios; `record` runs one on threads and returns its collectives as text. `Training`,
`TorchTraining` and `KerasTraining` hold all calls of the adapters, so that a renamed method or argument changes them
alone; scenarios name nothing but settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from support.problems import chunks_of, with_node

# isort: split
# PyTorch comes first: in the other order its libraries may not load.
import keras
import tensorflow as tf

import hvd_slowmo.tf
import hvd_slowmo.torch
from hvd_slowmo import ParameterMap, SlowMoConfig
from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.comm.threads import ThreadWorld
from support.trainings.keras import GraphComm
from support.trainings.mixed import TorchComm

# Every worker waits in a thread of TensorFlow's pool, and with fewer threads than workers all would wait forever. Must
# be set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)


@dataclass
class _Collective:
    line: str
    phase: int  # the phase in which its result was awaited, or in which it was started until then
    awaited: bool = False


class Record:
    """The collectives of one worker by phase, in the order in which they were started.

    A collective belongs to the phase that awaits its result. With OSGP a PyTorch worker starts its messages at the end
    of a step and a Keras worker within the next one, since a traced step can leave nothing in flight. Both await them
    in that next step, and start nothing else in between.
    """

    def __init__(self) -> None:
        self._titles: list[str] = []
        self._collectives: list[_Collective] = []

    def phase(self, title: str) -> None:
        """Begin a phase."""
        self._titles.append(title)

    def started(self, line: str) -> int:
        """Note a collective that has been started; return its number."""
        self._collectives.append(_Collective(line, len(self._titles) - 1))
        return len(self._collectives) - 1

    def awaited(self, number: int) -> None:
        """Note that the result of a collective is being awaited."""
        collective = self._collectives[number]
        collective.phase, collective.awaited = len(self._titles) - 1, True

    @property
    def lines(self) -> list[str]:
        """All collectives."""
        return [collective.line for collective in self._collectives]

    def text(self, prefix: str = "") -> str:
        """Return a paragraph per phase; successive steps with the same collectives share one.

        Args:
            prefix: begins each heading.
        """
        lines: list[tuple[str, ...]] = [
            tuple(c.line + ("" if c.awaited else " (never awaited)") for c in self._collectives if c.phase == number)
            for number in range(len(self._titles))
        ]

        def alike(phase: tuple[int, str]) -> Any:
            number, title = phase
            return lines[number] if title.startswith("step ") else number

        paragraphs = []
        for _, group in groupby(enumerate(self._titles), alike):
            numbers, titles = zip(*group, strict=True)
            title = titles[0]
            if len(titles) > 1:
                title = f"steps {titles[0].removeprefix('step ')} to {titles[-1].removeprefix('step ')}"
            paragraphs.append("\n".join([f"# {prefix}{title}", *lines[numbers[0]]]))
        return "\n\n".join(paragraphs) + "\n"


class RecordingComm:
    """Another Comm, with a line in a record for each collective.

    A line has the kind, the name, the number of elements and the type; a push also has the ranks to which it sends. The
    length of a gather's message is left out, since it depends on the framework.

    Args:
        comm: the Comm.
        record: receives the lines.
        prefix: begins each line.
    """

    def __init__(self, comm: Comm, record: Record, prefix: str = "") -> None:
        self._comm, self._record, self._prefix = comm, record, prefix
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: Any = None if comm.node is None else RecordingComm(comm.node, record, "node ")

    def start_sum(self, name: str, x: Any) -> Any:
        number = self._started("sum", name, _spell(x))
        return number, self._comm.start_sum(name, x)

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        receivers = " ".join(str(rank) for rank, weight in enumerate(shares[:, self.rank]) if weight)
        number = self._started("push", name, f"{_spell(x)} to {receivers}")
        return number, self._comm.start_push(name, x, shares)

    def start_alltoall(self, name: str, parts: Any) -> Any:
        number = self._started("alltoall", name, *(str(part.shape[0]) for part in parts), "bytes")
        return number, self._comm.start_alltoall(name, parts)

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> Any:
        number = self._started("allgather", name, *map(str, lengths), "bytes")
        return number, self._comm.start_allgather(name, x, lengths)

    def open_beside(self) -> None:
        self._comm.open_beside()

    def start_beside(self, work: Callable[[Comm], Any]) -> Any:
        """Note its collectives when it is waited for: another thread's would stand anywhere."""
        there = Record()
        there.phase("")
        return there, self._comm.start_beside(lambda comm: work(RecordingComm(comm, there, self._prefix)))

    def wait(self, handle: Any) -> Any:
        number, inner = handle
        if isinstance(number, Record):
            result = self._comm.wait(inner)
            for line in number.lines:
                self._record.awaited(self._record.started(line))
            return result
        self._record.awaited(number)
        return self._comm.wait(inner)

    def gather(self, name: str, item: Any) -> list[Any]:
        self._record.awaited(self._started("gather", name))
        return self._comm.gather(name, item)

    def _started(self, *parts: str) -> int:
        return self._record.started(self._prefix + " ".join(parts))


def _spell(x: Any) -> str:
    return f"{x.size if isinstance(x.size, int) else x.numel()} {str(x.dtype).removeprefix('torch.')}"


# The float32 tensors of the model. With messages of CHUNK_BYTES the parameters travel as two chunks, and the statistics
# as one chunk of float64 behind them.
CHUNK_BYTES = 20
PARAMETERS = {"kernel": (3, 2), "bias": (3,)}
STATISTICS = {"mean": (2,)}
FROZEN = (20, 30)
PATHS = {name: f"net/layer/{name}" for name in (*PARAMETERS, *STATISTICS)}  # in Keras
MAP = ParameterMap(PATHS, orient=dict.fromkeys(PATHS.values(), "same"))


class Training(ABC):
    """One worker's training: a phase of its record for each method.

    Args:
        record: of the worker.
        comm: the workers.
        node: the workers of the same node, for gradients="node".
        config: the settings.
        metrics: whether outer steps measure.
        parameter_map: for a job of both frameworks.
        frozen: the model has a frozen tensor that is too large to be gathered.
    """

    optimizer: Any
    model: Any

    def __init__(
        self,
        record: Record,
        comm: Comm,
        node: Comm | None,
        config: SlowMoConfig,
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
        frozen: bool = False,
    ) -> None:
        self.rank = comm.rank
        self._record = record
        self._frozen = frozen
        record.phase("construction")
        self._construct(comm, node, config, metrics=metrics, parameter_map=parameter_map)

    @abstractmethod
    def _construct(self, comm: Comm, node: Comm | None, config: SlowMoConfig, **options: Any) -> None:
        """Set the model and the optimizer, and bring all workers to one start."""

    @abstractmethod
    def _step(self, gradient: float) -> None:
        """Take a step with this gradient for every element."""

    def steps(self, count: int, gradient: float = 1.0) -> None:
        """Take steps; each is a phase."""
        for _ in range(count):
            self._record.phase(f"step {self.optimizer.steps + 1}")
            self._step(gradient)

    def join(self) -> None:
        """Wait for the workers with more data."""
        self._record.phase("join")
        self.optimizer.join()

    def average(self) -> None:
        """Enter and leave averaged_parameters()."""
        self._record.phase("averaged_parameters")
        with self.optimizer.averaged_parameters():
            pass

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        self._record.phase("save")
        self.optimizer.save(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        self._record.phase("load")
        self.optimizer.load(path)

    def checkpoints(self, folder: Path) -> None:
        """Look for checkpoints in an empty directory, save one there, and resume it."""
        checkpoints = Checkpoints(folder)
        for _ in range(2):
            self._record.phase("resume")
            checkpoints.resume(self.optimizer)
            self.steps(1)
            self._record.phase("periodic save")
            checkpoints.save()
            checkpoints.finish()

    def add_group(self) -> None:
        """Add a parameter group."""
        raise NotImplementedError("only PyTorch has parameter groups")


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in PARAMETERS.items():
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        for name, shape in STATISTICS.items():
            self.register_buffer(name, torch.zeros(shape))


class TorchTraining(Training):
    """A PyTorch worker; its backward starts the collectives of averaged gradients."""

    def _construct(self, comm: Comm, node: Comm | None, config: SlowMoConfig, **options: Any) -> None:
        self.model = TorchModel()
        self.parameters = list(self.model.parameters())
        if self._frozen:
            self.model.frozen = torch.nn.Parameter(torch.ones(FROZEN), requires_grad=False)
        inner = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.5)
        workers = with_node(TorchComm(comm), None if node is None else TorchComm(node))
        self.optimizer = hvd_slowmo.torch.SlowMo(inner, self.model, config, comm=workers, **options)

    def _step(self, gradient: float) -> None:
        self.optimizer.zero_grad()
        (gradient * sum(p.sum() for p in self.parameters)).backward()
        self.optimizer.step()

    def add_group(self) -> None:
        self._record.phase("add_param_group")
        self.model.added = torch.nn.Parameter(torch.ones(2))
        self.parameters.append(self.model.added)
        self.optimizer.add_param_group({"params": [self.model.added], "lr": 0.01})


class KerasLayer(keras.layers.Layer):
    def build(self, shape: Any) -> None:
        for name, size in PARAMETERS.items():
            self.add_weight(shape=size, initializer="ones", name=name)
        for name, size in STATISTICS.items():
            self.add_weight(shape=size, trainable=False, name=name)

    def call(self, x: Any) -> Any:
        return x


class FrozenLayer(keras.layers.Layer):
    def build(self, shape: Any) -> None:
        self.add_weight(shape=FROZEN, initializer="ones", name="weight")

    def call(self, x: Any) -> Any:
        return x


class KerasTraining(Training):
    """A Keras worker in a custom training loop."""

    def _construct(self, comm: Comm, node: Comm | None, config: SlowMoConfig, **options: Any) -> None:
        layers = [KerasLayer(name="layer"), *([FrozenLayer(trainable=False)] if self._frozen else [])]
        self.model = keras.Sequential([keras.Input((1,)), *layers], name="net")
        inner = keras.optimizers.SGD(0.1, momentum=0.5)
        workers = with_node(GraphComm(comm), None if node is None else GraphComm(node))
        self.optimizer = hvd_slowmo.tf.SlowMo(inner, config, comm=workers, **options)
        self.optimizer.broadcast(self.model)

    def _step(self, gradient: float) -> None:
        variables = self.model.trainable_variables
        self.optimizer.apply([tf.fill(v.shape, gradient) for v in variables], variables)


FRAMEWORKS: dict[str, tuple[type[Training], ...]] = {
    "torch": (TorchTraining,),
    "keras": (KerasTraining,),
    "mixed": (TorchTraining, KerasTraining),  # by rank
}
BOTH = ("torch", "keras")


@dataclass(frozen=True)
class Scenario:
    """A short training.

    Args:
        config: the settings.
        train: the steps of each worker; receives its training and an empty directory that all workers share.
        workers: number of workers.
        nodes: number of nodes, of as many workers each; 0: no worker knows of nodes.
        frameworks: keys of FRAMEWORKS under which it runs.
        every_rank: record all workers and not rank 0 alone, since their phases differ.
        options: more arguments of Training.
        differs: the reason why each framework has a golden file; empty if one file serves all.
        traced: which command runs Keras workers with traces too, beside the same code run eagerly: "test" for
            `make test`, "test-all" for `make test-all`; "only" for `make test-all` with traces and never eagerly, since
            many eager steps take longer than a trace.
    """

    config: SlowMoConfig
    train: Callable[[Training, Path], None]
    workers: int = 2
    nodes: int = 0
    frameworks: Sequence[str] = BOTH
    every_rank: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    differs: str = ""
    traced: Literal["test", "test-all", "only"] = "test-all"


@contextmanager
def _eager() -> Iterator[None]:
    """Run each tf.function as Python code, which saves the seconds that tracing it takes."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def record(scenario: Scenario, framework: str, folder: Path, traced: bool = False) -> str:
    """Run a scenario on threads; return the collectives of its workers as a golden file has them.

    Args:
        scenario: the training.
        framework: a key of FRAMEWORKS.
        folder: an empty directory.
        traced: whether Keras workers run traces, as in use, or the same code eagerly, which is faster.
    """
    world = ThreadWorld(scenario.workers)
    share = scenario.workers // scenario.nodes if scenario.nodes else 0
    nodes = [ThreadWorld(share) for _ in range(scenario.nodes)]
    records = [Record() for _ in range(scenario.workers)]
    trainings = FRAMEWORKS[framework]

    def work(comm: Comm) -> None:
        mine = records[comm.rank]
        node = RecordingComm(nodes[comm.rank // share].member(comm.rank % share), mine, "node ") if nodes else None
        training = trainings[comm.rank % len(trainings)]
        scenario.train(training(mine, RecordingComm(comm, mine), node, scenario.config, **scenario.options), folder)

    with chunks_of(CHUNK_BYTES), nullcontext() if traced else _eager():
        world.run(work)
    if not scenario.every_rank:
        return records[0].text()
    return "\n".join(each.text(f"rank {rank}, ") for rank, each in enumerate(records))


def _steps(count: int) -> Callable[[Training, Path], None]:
    return lambda training, _: training.steps(count)


def _steps_and_join(*counts: int) -> Callable[[Training, Path], None]:
    """Take as many steps as the number for the rank, the last one for all ranks behind it; then join and step."""

    def train(training: Training, _: Path) -> None:
        training.steps(counts[min(training.rank, len(counts) - 1)])
        training.join()
        training.steps(1)

    return train


def _average(training: Training, _: Path) -> None:
    training.steps(1)
    training.average()
    training.steps(1)


def _save_and_load(training: Training, folder: Path) -> None:
    training.steps(3)
    training.save(folder / "checkpoint")
    training.steps(1)
    training.load(folder / "checkpoint")
    training.steps(1)


def _checkpoints(training: Training, folder: Path) -> None:
    training.steps(1)
    training.checkpoints(folder / "checkpoints")


def _exclude(training: Training, _: Path) -> None:
    """Exclude rank 1 from an outer step, and then from a join in which it alone has taken a step since."""
    last = training.rank == 1
    training.steps(1)
    training.steps(1, float("nan") if last else 1.0)
    training.steps(int(last), float("nan"))
    training.join()
    training.steps(1)


def _add_group(training: Training, _: Path) -> None:
    training.steps(1)
    training.add_group()
    training.steps(1)


SCENARIOS: dict[str, Scenario] = {
    "local": Scenario(SlowMoConfig(tau=2), _steps(4)),
    "frozen": Scenario(SlowMoConfig(tau=2), _steps(2), options={"frozen": True}),
    "local_join": Scenario(SlowMoConfig(tau=2), _steps_and_join(1, 4), every_rank=True),
    "warmup": Scenario(SlowMoConfig(tau=2, warmup_steps=2), _steps(6), traced="test"),
    "gradients_all": Scenario(SlowMoConfig(tau=2, gradients="all"), _steps(3)),
    "gradients_all_join": Scenario(
        SlowMoConfig(tau=2, gradients="all"),
        _steps_and_join(1, 3),
        every_rank=True,
        differs="at its end PyTorch gathers the inner optimizer's state; Keras joins in a trace, which can't gather",
    ),
    "gradients_node": Scenario(SlowMoConfig(tau=2, gradients="node"), _steps_and_join(1), workers=4, nodes=2),
    "inner_state_average": Scenario(SlowMoConfig(tau=2, inner_state="average"), _steps(2)),
    "fragments_join": Scenario(
        SlowMoConfig(tau=4, fragments=2), _steps_and_join(2, 5), frameworks=["torch"], every_rank=True
    ),
    "late_join": Scenario(SlowMoConfig(tau=2, delay=1), _steps_and_join(3, 5), every_rank=True),
    "streamed": Scenario(SlowMoConfig(tau=2, fragments=2, delay=1), _steps(4)),
    "few_bits": Scenario(SlowMoConfig(tau=2, bits=8), _steps_and_join(2, 3), every_rank=True),
    "streamed_few_bits": Scenario(SlowMoConfig.streaming(tau=2, delay=2), _steps(4)),
    "streamed_save_and_load": Scenario(SlowMoConfig(tau=2, fragments=2, delay=1), _save_and_load, frameworks=["torch"]),
    "streamed_average": Scenario(SlowMoConfig(tau=2, fragments=2, delay=2), _average, frameworks=["torch"]),
    "sgp": Scenario(SlowMoConfig.sgp(tau=3), _steps_and_join(4), workers=3),
    "sgp_alone": Scenario(SlowMoConfig.sgp(), _steps(65), traced="only"),
    "sgp_noaverage": Scenario(SlowMoConfig.sgp(tau=2, average=False), _steps_and_join(3)),
    "sgp_nodes": Scenario(SlowMoConfig.sgp(tau=2, gradients="node"), _steps(2), workers=4, nodes=2),
    # Ends with a step that leaves nothing in flight, since its successor is an outer step. After any other step PyTorch
    # has already sent messages that Keras has not.
    "osgp": Scenario(SlowMoConfig.osgp(tau=3), _steps_and_join(4)),
    "dpsgd": Scenario(SlowMoConfig.dpsgd(tau=2), _steps(3)),
    "averaged_parameters": Scenario(SlowMoConfig(tau=2), _average),
    "save_and_load": Scenario(SlowMoConfig(tau=2), _save_and_load),
    "checkpoints": Scenario(SlowMoConfig(tau=2), _checkpoints),
    "metrics": Scenario(SlowMoConfig(tau=2), _steps(2), options={"metrics": True}),
    "nonfinite_exclude": Scenario(SlowMoConfig(tau=2, nonfinite="exclude"), _exclude, every_rank=True),
    "add_param_group": Scenario(SlowMoConfig(tau=2), _add_group, frameworks=["torch"]),
    "mixed": Scenario(
        SlowMoConfig(tau=2, warmup_steps=1),
        _steps_and_join(2, 4),
        frameworks=["mixed"],
        every_rank=True,
        options={"parameter_map": MAP},
    ),
    "mixed_gradients_all_join": Scenario(
        SlowMoConfig(tau=2, gradients="all"),
        _steps_and_join(1, 3),
        frameworks=["mixed"],
        every_rank=True,
        options={"parameter_map": MAP},
    ),
}
