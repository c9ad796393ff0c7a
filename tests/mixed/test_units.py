"""The foundations of a job of both frameworks, without workers: stores that read and write one wire, and the start."""

import numpy as np
import pytest
import torch
from torch import nn

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
import tensorflow as tf
from keras import layers as kl

from hvd_slowmo import ParameterMap, SlowMoConfig
from hvd_slowmo.comm.protocol import ScopedComm, SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.layout import ParameterGroups, lay_out
from hvd_slowmo.core.start.bulk import Gift
from hvd_slowmo.core.start.startup import Position, common_groups, hand_out, meet
from hvd_slowmo.interop.copy import copy_to_keras
from hvd_slowmo.torch import SlowMo
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import mapped_refs
from hvd_slowmo_tf.model.store import VariableStore
from hvd_slowmo_tf.traces.gradients import VariableGradients
from hvd_slowmo_torch.model.gradients import TorchGradients
from hvd_slowmo_torch.model.layout import groups_of, refs_of
from hvd_slowmo_torch.model.store import TorchStore
from hvd_slowmo_torch.model.watch import ModelWatch
from hvd_slowmo_torch.tensors.bulk import TorchCarrier, bodies_of
from support.problems import Problem, distance
from support.trainings.keras import doubles
from support.trainings.mixed import KerasWorker, TorchComm, TorchWorker

CONFIG = SlowMoConfig(tau=3)
# See keras/test_threads.py.
tf.config.threading.set_inter_op_parallelism_threads(16)


class Torch(nn.Module):
    """Tensors that Keras has in another orientation, in another cut, or in several parts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.flat, self.gru = nn.Linear(8, 3), nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)


def keras_model():
    x = keras.Input((4, 4, 1))
    y = kl.Flatten()(kl.BatchNormalization(epsilon=1e-5)(kl.Conv2D(2, 3)(x)))
    y = kl.GRU(4)(kl.Reshape((1, 3))(kl.Dense(3)(y)))
    return keras.Model(x, kl.Dense(2)(y))


@pytest.fixture(scope="module")
def models():
    ours, theirs = Torch(), keras_model()
    for tensor in ours.state_dict().values():
        if tensor.is_floating_point():
            nn.init.normal_(tensor)
    copy_to_keras(ours, theirs)
    return ours, theirs


@pytest.fixture(scope="module")
def layouts(models):
    """Both adapters' layouts of models of the same values, with messages of 10 elements."""
    ours, theirs = models
    inner = torch.optim.SGD(ours.parameters(), lr=0.1)
    refs = refs_of(ours, inner, ParameterMap())
    others = mapped_refs(theirs, ParameterMap(), theirs.trainable_variables)
    parameters = sum(ref.spec.role == "parameter" for ref in others)
    return lay_out(refs, groups_of(refs, ours, inner), 40), lay_out(others, ParameterGroups.single(parameters), 40)


@pytest.fixture(scope="module")
def stores(models, layouts):
    ours, theirs = models
    mine = TorchStore(layouts[0], torch.optim.SGD(ours.parameters(), lr=0.1), (), set)
    return mine, VariableStore(layouts[1], {}, InnerOptimizer(keras.optimizers.SGD(0.1))), ours, theirs


def test_both_stores_have_the_same_chunks_and_read_the_same(stores, layouts):
    mine, other, *_ = stores
    assert mine.layout.chunks == layouts[1].layout.chunks
    assert len(mine.layout.chunks) > 15
    for chunk in mine.layout.chunks:
        assert np.array_equal(mine.read("model", chunk).numpy(), other.read("model", chunk).numpy())


def test_both_stores_write_the_same(stores):
    mine, other, ours, theirs = stores
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for chunk in mine.layout.chunks:
            value = rng.normal(size=chunk.size).astype(mine.layout.segments[chunk.segment].dtype)
            mine.write("model", chunk, torch.from_numpy(value))
            other.write("model", chunk, tf.constant(value))
    twin = keras_model()
    copy_to_keras(ours, twin)
    for v, expected in zip(theirs.variables, twin.variables, strict=True):
        if v.name != "seed_generator_state":
            assert np.array_equal(v.numpy(), expected.numpy()), v.path


@pytest.mark.slow
def test_what_a_trace_that_was_given_up_has_written_is_of_no_consequence(stores, layouts):
    _, other, _, theirs = stores
    chunks = layouts[1].layout.parameter_chunks
    values = [other.read("model", chunk) for chunk in chunks]
    before = [v.numpy() for v in theirs.trainable_variables]
    for cut in range(len(chunks)):
        for chunk in chunks[:cut]:
            other.write("model", chunk, other.zeros(chunk))
        for chunk, value in zip(chunks, values, strict=True):
            other.write("model", chunk, value)
        assert all(np.array_equal(v.numpy(), x) for v, x in zip(theirs.trainable_variables, before, strict=True)), cut


@pytest.mark.slow
def test_gradients_of_both_are_the_same_and_one_that_lacks_is_known(models, layouts):
    ours, theirs = models
    twin = keras_model()
    for p in ours.parameters():
        p.grad = torch.randn_like(p)
    ours.head.bias.grad = None
    gradients = Torch()
    for p, g in zip(gradients.parameters(), ours.parameters(), strict=True):
        p.data = torch.zeros_like(p) if g.grad is None else g.grad
    copy_to_keras(gradients, twin)
    given = [v.value for v in twin.trainable_variables]
    mine = TorchGradients(layouts[0], ModelWatch(layouts[0], set))
    other = VariableGradients(layouts[1], theirs.trainable_variables, [*given[:-1], None])
    assert mine.present() == other.present().numpy().tolist()
    assert mine.present().count(0.0) == 1
    for chunk in layouts[0].layout.parameter_chunks:
        flat = other.read(chunk)
        assert np.array_equal(mine.read(chunk).numpy(), flat.numpy())
        other.write(chunk, flat)
    for before, after in zip(given[:-1], other.means(), strict=False):
        assert np.array_equal(before, after)
    other.admit(tf.range(len(mine.present()), dtype=tf.float64))
    counts = other.counts().numpy()
    assert len(counts) == len(theirs.trainable_variables)
    assert len(set(counts)) == len(counts)


def test_common_groups_are_within_one_group_everywhere():
    everyone = [(0, 0, 1, 1, 0), (0, 0, 0, 0, 0), (2, 0, 1, 1, 2)]
    assert common_groups(everyone, 0) == ParameterGroups((0, 1, 2, 2, 0), (0, 0, 1))
    assert common_groups(everyone, 1) == ParameterGroups((0, 1, 2, 2, 0), (0, 0, 0))
    found = common_groups(everyone, 2)
    assert found == ParameterGroups((0, 1, 2, 2, 0), (2, 0, 1))
    assert [found.common(own) for own in (0, 1, 2, 3)] == [1, 2, 0, None]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([("a", 3, 0), ("b", 0, 0)], "starts at step 0 on every worker, and here is rank 0 step 3, rank 1 step 0"),
        ([("a", 0, 0), ("a", 3, 2)], "not at the same step: rank 0 step 0, rank 1 step 3"),
        ([("a", 3, 2), ("a", 4, 2)], "not at the same step"),
        ([("a", 3, 4), ("a", 3, 4)], "the state on rank 0 is one of 4 workers, this job has 2"),
    ],
)
def test_starts_that_do_not_go_together_raise_everywhere(positions, message):
    def work(comm):
        with pytest.raises(ValueError, match=message):
            meet(ScopedComm(comm, "x"), Position(*positions[comm.rank], (0,)))

    ThreadWorld(2).run(work)


class HandingOut:
    """The part of a starting worker that hands out: one tensor to all and one value to those of its framework."""

    carrier = TorchCarrier()

    def __init__(self, framework, rank):
        self.framework, self.rank, self.taken = framework, rank, None
        self.common = torch.full((500,), float(rank))

    def frozen(self):
        return bodies_of({"common": self.common})

    def own(self, job):
        return Gift(values=lambda: f"own {self.rank}")

    def take(self, values):
        self.taken = values


def test_what_one_framework_alone_can_read_comes_from_its_first_worker():
    def work(comm):
        worker = HandingOut("abab"[comm.rank], comm.rank)
        job = meet(ScopedComm(comm, "x"), Position(worker.framework, 0, 0, (0,)))
        assert job.mixed
        hand_out(worker, ScopedComm(TorchComm(comm), "x"), job, range(comm.size), [True] * comm.size)
        return worker.common.unique().item(), worker.taken

    assert ThreadWorld(4).run(work) == [(0.0, None), (0.0, None), (0.0, "own 0"), (0.0, "own 1")]


def test_what_the_pytorch_adapter_refuses_with_a_map():
    def over(model, parameters, **options):
        base = torch.optim.SGD(parameters, lr=0.1)
        return SlowMo(base, model, CONFIG, comm=SoloComm(), parameter_map=ParameterMap(), **options)

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"It lacks: 1.weight, 1.bias. Add them, or freeze them"):
        over(model, model[0].parameters())
    optimizer = over(model, model.parameters())
    with pytest.raises(ValueError, match="no parameters can be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    model[1].requires_grad_(False)
    assert sum(segment.size for segment in over(model, model.parameters()).worker.assembly.machine.layout.segments) == 6


def test_what_the_keras_adapter_refuses_with_a_map():
    import hvd_slowmo.tf as slowmo

    inner = keras.optimizers.SGD(0.1, use_ema=True)
    with pytest.raises(ValueError, match=r"use_ema .* can't be used with a parameter_map"):
        slowmo.SlowMo(inner, CONFIG, parameter_map=ParameterMap())
    with pytest.raises(TypeError, match=r"`parameter_map` must be a ParameterMap. Received: bool"):
        slowmo.SlowMo(keras.optimizers.SGD(0.1), CONFIG, parameter_map=True)
    model = keras.Sequential([keras.Input((2,)), kl.Dense(1), kl.Dense(1)])
    optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.1), CONFIG, parameter_map=ParameterMap())
    with pytest.raises(ValueError, match="the layers must be known: call broadcast\\(model\\)"):
        optimizer.broadcast(model.variables)
    optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.1), CONFIG, parameter_map=ParameterMap())
    optimizer.build(model.layers[0].variables)
    with pytest.raises(ValueError, match=r"must train what the model does, and that differs for .*dense_.*/kernel"):
        optimizer.broadcast(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"tau": 3}, {"tau": 3, "gossip": "sgp"}, pytest.param({"tau": 3, "warmup_steps": 2}, marks=pytest.mark.slow)],
)
@pytest.mark.sample("config0")
def test_both_start_the_same_collectives_in_the_same_order(config):
    """ThreadWorld refuses what Horovod would forgive: other names, lengths or types in any place."""
    problem = Problem(config, steps=7)

    def work(comm):
        mine = (TorchWorker, KerasWorker)[comm.rank](problem, comm)
        history = [{"x": mine.flat()}]
        for step in range(problem.steps):
            mine.step(step, step)
            history.append({"x": mine.flat()})
        mine.join()
        return history

    with doubles(40):
        histories = ThreadWorld(2).run(work)
    assert distance(histories, problem) < 1e-12
