"""Checkpoints that go from PyTorch to Keras and back."""

import numpy as np
import pytest
import torch
from torch import nn

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
import tensorflow as tf
from keras import layers as kl

from hvd_slowmo import ParameterMap
from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint import job as snapshot
from hvd_slowmo.comm.protocol import ScopedComm, SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.tf import SlowMo as KerasSlowMo
from hvd_slowmo.tf import SlowMoCallback
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.checkpoints import files
from support.models.keras import fit
from support.problems import config_of
from support.trainings.checkpoints import CASES, KerasWorker, TorchWorker, apart
from support.trainings.keras import GraphComm, doubles
from support.trainings.mixed import TorchComm
from support.trainings.pytorch import same

STOP, END = 6, 14


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample("momentum")
def test_a_run_goes_on_in_the_other_framework(case, tmp_path):
    """In the middle of a block, both ways; and a state that goes there and back is the same up to rounding."""
    config, base = CASES[case]

    def work(comm):
        told = {}
        for first, second in ((TorchWorker, KerasWorker), (KerasWorker, TorchWorker)):
            path = tmp_path / first.__name__
            path.mkdir(exist_ok=True)
            worker = first(config, base, comm)
            worker.advance(range(STOP))
            worker.save(path / "a")
            whole = worker.advance(range(STOP, END))
            other = second(config, base, comm)
            other.load(path / "a")
            other.save(path / "b")
            told[first] = apart(whole, other.advance(range(STOP, END)))
            again = first(config, base, comm)
            again.load(path / "b")
            again.save(path / "c")
            assert apart(whole, again.advance(range(STOP, END))) < 1e-12
            assert again.optimizer.steps == other.optimizer.steps == END
        return told

    with doubles(200):  # tensors lie across chunks
        for told in ThreadWorld(2).run(work):
            assert max(told.values()) < 1e-9
    for name in ("TorchWorker", "KerasWorker"):
        a, b, c = ([snapshot.read_checkpoint(tmp_path / name / x, rank, 2) for rank in range(2)] for x in "abc")
        for first, there, back in zip(a, b, c, strict=True):
            first, there, back = ({**each.common, **each.own} for each in (first, there, back))
            assert first.keys() == back.keys()
            for key, value in first.items():
                if key.startswith("framework/"):  # which parameters have changed, say: afterwards all count as changed
                    continue
                if key.startswith(("optimizer_state/momentum", "optimizer_state/velocity")):
                    np.testing.assert_allclose(back[key], value, rtol=1e-15, err_msg="a converted momentum is rounded")
                else:
                    assert np.array_equal(back[key], value), "there and back"
                    assert np.array_equal(there[key], value), "either framework writes the very same values"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 6])
@pytest.mark.sample("5")
def test_workers_of_both_frameworks_have_one_checkpoint(steps, tmp_path):
    """In the middle of a block each goes on with its own state, also where ranks have changed their framework."""
    config, base = {"tau": 3, "inner_state": "reset"}, CASES["momentum"][1]

    def side(worker):
        given = [] if isinstance(worker, TorchWorker) else [worker.model]
        return lambda: worker.optimizer.worker.state(*given, None)

    def work(comm):
        kinds = (TorchWorker, KerasWorker)
        worker = kinds[comm.rank](config, base, rank=comm.rank)
        worker.advance(range(steps))
        snapshot.save(side(worker), ScopedComm(comm, "both"), tmp_path / "a")
        whole = worker.advance(range(steps, steps + 4))
        told = []
        for kind in (kinds[comm.rank], kinds[1 - comm.rank]):
            other = kind(config, base, rank=comm.rank)
            snapshot.load(side(other), ScopedComm(comm, "both"), tmp_path / "a")
            told.append(apart(whole, other.advance(range(steps, steps + 4))))
        return told

    with doubles():
        for same_kind, other_kind in ThreadWorld(2).run(work):
            assert same_kind == 0
            assert other_kind < 1e-9
    facts, _, _ = safefile.read(tmp_path / "a")
    assert facts.per_worker == (("model", "anchor", "v", "optimizer_state") if steps == 5 else ())


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"tau": 2, "inner_state": "reset"}, {"tau": 3, "gradients": "all"}])
def test_a_job_of_both_frameworks_in_float32_goes_on_with_another_number_of_workers(config, tmp_path):
    """0.1 is another number in Keras, where rates have float32."""

    def made(comm):
        given = config_of(config)
        if comm.rank != 1:
            model = nn.Sequential(nn.Linear(4, 3))
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            return model, SlowMo(base, model, given, comm=TorchComm(comm), parameter_map=ParameterMap())
        other = keras.Sequential([keras.Input((4,)), kl.Dense(3)])
        optimizer = KerasSlowMo(keras.optimizers.SGD(0.1), given, comm=GraphComm(comm), parameter_map=ParameterMap())
        optimizer.broadcast(other)
        return other, optimizer

    def save(comm):
        model, optimizer = made(comm)
        for _ in range(4):
            if comm.rank != 1:
                model(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                gradients = [tf.ones(v.shape) for v in model.trainable_variables]
                optimizer.apply(gradients, model.trainable_variables)
        optimizer.save(*([tmp_path / "a"] if comm.rank != 1 else [tmp_path / "a", model]))

    def load(comm):
        model, optimizer = made(comm)
        optimizer.load(*([tmp_path / "a"] if comm.rank != 1 else [tmp_path / "a", model]))
        return optimizer.steps

    ThreadWorld(2).run(save)
    facts, _, _ = safefile.read(tmp_path / "a")
    assert facts.per_worker == ()
    assert ThreadWorld(3).run(load) == [4] * 3


def test_both_write_the_same_files_for_a_model_of_many_layers(tmp_path):
    """Convolutions, a flattened feature map, BatchNorm, a GRU's gates in another order, float32."""
    theirs = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            kl.Conv2D(3, 3),
            kl.BatchNormalization(epsilon=1e-5),
            kl.Flatten(),
            kl.Dense(8),
            kl.Reshape((2, 4)),
            kl.GRU(3),
            kl.Dense(1),
        ]
    )
    ours = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(48, 8), nn.GRU(4, 3), nn.Linear(3, 1)])
    config = SlowMoConfig(tau=3)
    torch.manual_seed(1)
    base = torch.optim.AdamW(ours.parameters(), lr=0.1, amsgrad=True)
    optimizer = SlowMo(base, ours, config, comm=SoloComm())
    for k in range(4):
        for p in ours.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        optimizer.step()
    ours[1].running_mean += torch.arange(3)
    optimizer.save(tmp_path / "a")
    other = KerasSlowMo(keras.optimizers.AdamW(0.5, amsgrad=True), config)
    other.load(tmp_path / "a", theirs)
    np.testing.assert_array_equal(theirs.layers[1].moving_mean.numpy(), ours[1].running_mean.numpy())
    np.testing.assert_array_equal(theirs.layers[0].kernel.numpy(), ours[0].weight.detach().permute(2, 3, 1, 0).numpy())
    assert float(other.learning_rate) == np.float32(0.1)
    assert int(other.inner_optimizer.iterations) == int(other.iterations) == other.steps == 4
    other.save(tmp_path / "b", theirs)
    (facts, a, _), (others, b, _) = (safefile.read(tmp_path / name) for name in "ab")
    assert facts == others
    assert {name for name in set(a) - set(b) if "/watch/" not in name} == {"framework/torch/1.num_batches_tracked"}
    assert all(name.startswith("framework/keras/") for name in set(b) - set(a))  # the GRU's seed
    rate = "progress/learning_rate"  # 0.1 is another number in Keras, where rates have float32
    assert all(np.array_equal(a[name], b[name]) for name in (set(a) & set(b)) - {rate})
    assert (b[rate] == np.float32(0.1)).all()
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    optimizer.load(tmp_path / "b")
    optimizer.save(tmp_path / "c")
    _, c, _ = safefile.read(tmp_path / "c")
    assert a.keys() == c.keys()
    known = {name for name in a if "/watch/" not in name}  # Keras does not know which parameters have changed
    assert all(np.array_equal(a[name], c[name]) for name in known - {rate})


def test_what_one_framework_alone_names_is_refused_by_the_other(tmp_path):
    model = nn.ParameterList([nn.Parameter(torch.ones(2))])
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2), comm=SoloComm())
    optimizer.save(tmp_path / "torch")
    part = keras.Variable(np.ones(2, "float32"))
    other = KerasSlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2))
    with pytest.raises(ValueError, match=r"give the Keras model: optimizer.save\(path, model\)"):
        other.load(tmp_path / "torch")
    other.broadcast([part])
    with pytest.raises(CheckpointError, match=r"by the names of torch alone.*of keras alone: .*ParameterList is not a"):
        other.load(tmp_path / "torch")
    with pytest.raises(TypeError, match="a ParameterMap needs the Keras model"):
        other.save(tmp_path / "keras", parameter_map=ParameterMap())
    other.save(tmp_path / "keras")
    with pytest.raises(CheckpointError, match=r"by the names of keras alone.*: only the variables were given"):
        optimizer.load(tmp_path / "keras")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(2.0))
        self.out = nn.Linear(2, 3)


@keras.saving.register_keras_serializable(package="tests")
class Scale(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], name="scale")

    def call(self, x):
        return x * self.scale


def test_explicit_pairs_and_a_schedule(tmp_path):
    model = Scaled()
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.5), model, SlowMoConfig(tau=2), comm=SoloComm())
    for _ in range(3):
        model.scale.grad = torch.ones(2)
        optimizer.step()
    paired = ParameterMap({"scale": "net/scaled/scale"}, orient={"net/out/kernel": ()})
    optimizer.save(tmp_path / "a", parameter_map=paired)
    theirs = keras.Sequential([keras.Input((2,)), Scale(name="scaled"), kl.Dense(3, name="out")], name="net")
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.5, 0.25])
    other = KerasSlowMo(keras.optimizers.SGD(schedule), SlowMoConfig(tau=2))
    with pytest.raises(CheckpointError, match=r"by the names of a ParameterMap, here .* keras alone: .*Scale is not a"):
        other.load(tmp_path / "a", theirs)
    other.load(tmp_path / "a", theirs, parameter_map=paired)
    np.testing.assert_array_equal(theirs.layers[0].scale.numpy(), model.scale.detach().numpy())
    assert float(other.learning_rate) == 0.5
    assert int(other.iterations) == 3


@pytest.mark.slow
def test_kept_by_keras_alone(tmp_path):
    """Dropout's generators, a moving average of the weights, a loss scale, an optimizer that PyTorch does not have."""

    def made():
        model = keras.Sequential([keras.Input((4,)), kl.Dense(3), kl.Dropout(0.5, seed=3), kl.Dense(2)])
        inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.Lion(0.01, use_ema=True))
        return model, KerasSlowMo(inner, SlowMoConfig(tau=3))

    model, optimizer = made()
    fit(model, optimizer, range(4), callbacks=[SlowMoCallback()])
    optimizer.save(tmp_path / "a")  # the model of fit
    again, other = made()
    other.load(tmp_path / "a", again)
    other.save(tmp_path / "b", again)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    fit(model, optimizer, range(4, 9), callbacks=[SlowMoCallback()])
    fit(again, other, range(4, 9), callbacks=[SlowMoCallback()])
    assert same([v.numpy() for v in model.variables], [v.numpy() for v in again.variables])
    ours = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    slow = SlowMo(torch.optim.SGD(ours.parameters(), lr=0.1), ours, SlowMoConfig(tau=3), comm=SoloComm())
    with pytest.raises(
        CheckpointError, match="has anchor, v, average beside the model, this optimizer keeps anchor, v"
    ):
        slow.load(tmp_path / "a")


@pytest.mark.slow
def test_micro_batches_that_wait_are_not_saved_and_a_load_drops_them(tmp_path):
    model = keras.Sequential([keras.Input((4,)), kl.Dense(2)])
    optimizer = KerasSlowMo(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), SlowMoConfig(tau=3))
    fit(model, optimizer, range(4))
    optimizer.save(tmp_path / "a", model)
    fit(model, optimizer, range(4, 7))
    with pytest.raises(CheckpointError, match="multiple of gradient_accumulation_steps=2 calls"):
        optimizer.save(tmp_path / "b", model)
    assert not (tmp_path / "b").exists()
    ends = []
    for _ in range(2):  # with what the third of these batches left, and without
        optimizer.load(tmp_path / "a", model)
        fit(model, optimizer, range(4, 8))
        ends.append([v.numpy() for v in model.variables])
    assert same(*ends)
