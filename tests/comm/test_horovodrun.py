"""Jobs that horovodrun itself starts, as users start them."""

import subprocess
import sys
from pathlib import Path

import pytest

HOROVODRUN = Path(sys.executable).with_name("horovodrun")

SCRIPT = """
import horovod.torch as hvd, torch
import hvd_slowmo.torch as slowmo
{init}
model = torch.nn.Linear(3, 2)
optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, slowmo.SlowMoConfig(tau=2))
for k in range(4):
    optimizer.zero_grad()
    model(torch.full((1, 3), float(hvd.rank() + k))).sum().backward()
    optimizer.step()
print("weight", model.weight.double().sum().item())
"""


def horovodrun(tmp_path, text, *options):
    script = tmp_path / "train.py"
    script.write_text(text)
    return subprocess.run(
        [HOROVODRUN, *options, sys.executable, script], capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("options", [("-np", "2"), ("-np", "4", "-H", "localhost:2,127.0.0.1:2")])
def test_a_script_under_horovodrun(tmp_path, options):
    result = horovodrun(tmp_path, SCRIPT.format(init="hvd.init()"), *options)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = [line.split()[-1] for line in result.stdout.splitlines() if "weight" in line]
    assert len(weights) == int(options[1])
    assert len(set(weights)) == 1


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_a_script_that_forgets_init_is_told_so(tmp_path):
    result = horovodrun(tmp_path, SCRIPT.format(init=""), "-np", "2")
    assert result.returncode != 0
    advice = "Call hvd_slowmo.torch.init() or hvd.init() first."
    assert f"Horovod has not been initialized, and this is one of 2 workers. {advice}" in result.stderr


REPEATED = """
import copy, time
import horovod.torch as hvd, torch
import hvd_slowmo.torch as slowmo
hvd.init()
slowmo.SlowMo._chunk_bytes = 4096  # several messages at once


def train(steps, resumed=None):
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Linear(30, 200), torch.nn.ReLU(), torch.nn.Linear(200, 1))
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = slowmo.SlowMo(base, model, slowmo.SlowMoConfig(tau=6, gradients="all"))
    if resumed:
        model.load_state_dict(resumed[0])
        optimizer.load_state_dict(resumed[1])
    for k in range(optimizer.steps, steps):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(100 * hvd.rank() + k))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if (k + hvd.rank()) % 3 == 0:
            time.sleep(0.003)  # what is ready at once differs from run to run
        optimizer.step()
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

whole, again = train(40), train(40, train(10))
print("bitwise", all(torch.equal(whole[0][name], again[0][name]) for name in whole[0]))
"""


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_averaged_gradients_of_three_repeat_to_the_bit_where_horovod_fuses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    result = horovodrun(tmp_path, REPEATED, "-np", "3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("bitwise True") == 3, result.stdout


NODES = """
import horovod.torch as hvd, torch
import hvd_slowmo.torch as slowmo
slowmo.init()
model = torch.nn.Linear(3, 2)
config = slowmo.SlowMoConfig(tau=4, gradients="node")
optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config)
for k in range(6):
    optimizer.zero_grad()
    model(torch.full((1, 3), float(hvd.rank() + k))).square().sum().backward()
    optimizer.step()
    print("weight", k, hvd.rank(), model.weight.double().sum().item())
optimizer.join()
print("weight", "joined", hvd.rank(), model.weight.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough  # over torch.distributed: test_distributed.py
@pytest.mark.parametrize("hosts", ["localhost:2,127.0.0.1:2", "localhost:2,127.0.0.1:1"])
def test_two_nodes_average_gradients_within_and_parameters_between(tmp_path, hosts):
    size = sum(int(host.split(":")[1]) for host in hosts.split(","))
    result = horovodrun(tmp_path, NODES, "-np", str(size), "-H", hosts)
    assert result.returncode == 0, result.stderr[-3000:]
    seen: dict[str, dict[int, str]] = {}
    for line in result.stdout.splitlines():
        if "weight" in line:
            _, step, rank, value = line.split(":", 1)[1].split()
            seen.setdefault(step, {})[int(rank)] = value
    for step, values in seen.items():
        assert values[0] == values[1], f"step {step}: a node's workers differ"
        assert (values[2] == values[0]) == (step in ("3", "joined")), f"step {step}: {values}"


MIXED_NODES = """
import os
rank = int(os.environ["HOROVOD_RANK"])
config = dict(tau=4, gradients="node", warmup_steps=2)
batches = [[[float(rank + k), 1.0, 0.5]] for k in range((6, 9, 4, 7)[rank])]

def say(where, total):
    print("weight", where, rank, total)

if rank % 2:
    import keras, tensorflow as tf
    import hvd_slowmo.tf as slowmo
    slowmo.init()
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = slowmo.SlowMo(keras.optimizers.SGD(2.0**-7), slowmo.SlowMoConfig(**config),
                              parameter_map=slowmo.ParameterMap())
    optimizer.broadcast(model)
    for k, x in enumerate(batches):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(tf.constant(x, tf.float64))))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        say(k, float(model.layers[0].kernel.numpy().sum()))
    optimizer.join()
    say("joined", float(model.layers[0].kernel.numpy().sum()))
else:
    import torch
    import hvd_slowmo.torch as slowmo
    slowmo.init()
    model = torch.nn.Linear(3, 2).double()
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=2.0**-7), model, slowmo.SlowMoConfig(**config),
                              parameter_map=slowmo.ParameterMap())
    for k, x in enumerate(batches):
        optimizer.zero_grad()
        model(torch.tensor(x).double()).square().sum().backward()
        optimizer.step()
        say(k, model.weight.sum().item())
    optimizer.join()
    say("joined", model.weight.sum().item())
"""


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_two_nodes_of_both_frameworks_with_uneven_data(tmp_path):
    """A PyTorch and a Keras worker per node: gradients averaged within nodes, parameters between; also in a join."""
    result = horovodrun(tmp_path, MIXED_NODES, "-np", "4", "-H", "localhost:2,127.0.0.1:2")
    assert result.returncode == 0, result.stderr[-3000:]
    seen: dict[str, dict[int, float]] = {}
    for line in result.stdout.splitlines():
        if "weight" in line:
            _, step, rank, value = line.split(":", 1)[1].split()
            seen.setdefault(step, {})[int(rank)] = float(value)
    for step in ("0", "1", "2", "3", "joined"):
        values = seen[step]
        assert values[0] == pytest.approx(values[1], rel=1e-13), f"step {step}: a node's workers differ"
        equal = values[2] == pytest.approx(values[0], rel=1e-13)
        assert equal == (step in ("0", "1", "joined")), f"step {step}: {values}"
