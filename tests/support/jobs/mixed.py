"""Jobs for Horovod workers of both frameworks (see ../pool.py): misuse, real layers, `fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hvd_slowmo import ParameterMap, SlowMoConfig
from hvd_slowmo.core.start import bulk
from support.problems import Problem, config_of
from support.trainings.mixed import MAP, TORCH, worker


def misuse(kind: str, odd: int) -> str:
    """Do one thing wrong on rank `odd`; return the error."""
    rank = horovod().rank()
    wrong = rank == odd
    config: dict[str, Any] = {"tau": 3}
    options: dict[str, Any] = {}
    if kind == "config" and wrong:
        config["tau"] = 4
    if kind == "average":
        config["inner_state"] = "average"
    if kind == "no map" and wrong:
        options["parameter_map"] = None
    if kind == "another map" and wrong:
        options["parameter_map"] = ParameterMap(MAP.pairs, {**MAP.orient, "net/holder/part1": "same"})
    if kind == "argument" and wrong:
        options["parameter_map"] = "no map"
    try:
        if kind in ("layers", "units", "precision", "eps", "no maps", "unknown"):
            network(kind if wrong or kind in ("no maps", "unknown") else "", SlowMoConfig(tau=3))
        else:
            mine = worker(Problem(config), **options)
            for step in range(3):
                if kind == "not finite" and wrong and step == 2:
                    mine.problem = Endless(config)
                mine.step(step, step)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Endless(Problem):
    """Module whose gradients are infinite."""

    def gradient(self, worker: int, step: int, x: np.ndarray) -> np.ndarray:
        return np.full_like(x, np.inf)


def network(kind: str, config: SlowMoConfig, start: bool = True) -> tuple[Any, Any]:
    """Return a model of a convolution, BatchNorm and a dense layer on the flattened feature map, and its optimizer.

    kind: the deviation from this model. start: in Keras, broadcast the variables here.
    """
    parameter_map = None if kind == "no maps" else ParameterMap()
    units = 5 if kind == "units" else 4
    eps = 1e-3 if kind == "eps" else 1e-5
    if TORCH:
        import torch
        from torch import nn

        from hvd_slowmo.torch import SlowMo

        torch.manual_seed(horovod().rank())
        layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, eps=eps, momentum=0.25), nn.Tanh(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(12, units), nn.Linear(units, 2)]
        if kind == "layers":
            del layers[1]
        if kind == "unknown":
            layers.append(nn.PReLU())
        model = nn.Sequential(*layers).to(torch.float32 if kind == "precision" else torch.float64)
        model[0].requires_grad_(kind != "frozen")
        base = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.5)
        return model, SlowMo(base, model, config, parameter_map=parameter_map)
    import keras

    from hvd_slowmo.tf import SlowMo as KerasSlowMo

    keras.config.set_dtype_policy("float32" if kind == "precision" else "float64")
    keras.utils.set_random_seed(horovod().rank())
    kl = keras.layers
    layers = [kl.Conv2D(3, 3), kl.BatchNormalization(epsilon=eps, momentum=0.75), kl.Activation("tanh")]
    layers += [kl.MaxPooling2D(2), kl.Flatten(), kl.Dense(units), kl.Dense(2)]
    layers[0].trainable = kind != "frozen"
    if kind == "layers":
        del layers[1]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers])
    optimizer = KerasSlowMo(keras.optimizers.SGD(0.05, momentum=0.5), config, parameter_map=parameter_map)
    if start:
        optimizer.broadcast(model)
    return model, optimizer


def handed_out() -> dict[str, np.ndarray]:
    """Return the network's wire values after the start, in which a frozen layer travels in pieces."""
    bulk.SMALL_BYTES = 0
    return on_the_wire(network("frozen", SlowMoConfig(tau=3))[0])


def batches(rank: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return images (n, 6, 6) and targets (n, 2)."""
    rng = np.random.default_rng(rank)
    for _ in range(count):
        x = rng.normal(size=(5, 6, 6))
        yield x, np.stack([x.mean((1, 2)), x[:, 2, 3]], axis=1)


def trained(config: dict[str, Any], lengths: list[int], epochs: int = 2) -> list[dict[str, np.ndarray]]:
    """Train the network on uneven data with a join per epoch; return its wire values after each."""
    hvd = horovod()
    model, optimizer = network("", config_of(config))
    step = torch_step(model, optimizer) if TORCH else keras_step(model, optimizer)
    history = []
    for _ in range(epochs):
        for x, y in batches(hvd.rank(), lengths[hvd.rank()]):
            step(x, y)
        optimizer.join()
        history.append(on_the_wire(model))
    return history


def few_bits(settings: dict[str, Any]) -> np.ndarray:
    """Train a dense layer and return its weights, as tests/support/few_bits.py does with those of PyTorch."""
    rank, config = horovod().rank(), SlowMoConfig(**{"tau": 4, "bits": 8, **settings})
    parameter_map, start = (
        ParameterMap({"weight": "net/dense/kernel", "bias": "net/dense/bias"}),
        np.random.default_rng(0),
    )
    weight, bias = start.normal(size=(50, 70)).astype(np.float32), start.normal(size=50).astype(np.float32)
    train = _torch_few_bits if TORCH else _keras_few_bits
    return train(rank, config, parameter_map, weight, bias)


def centres(rank: int, steps: int = 13) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return the places to which a dense layer's parameters are drawn in each step, one step more for each rank."""
    for k in range(steps + rank):
        weight, bias = (np.random.default_rng([rank, k]).normal(size=size) for size in ((50, 70), 50))
        yield weight.astype(np.float32), bias.astype(np.float32)


def _torch_few_bits(
    rank: int, config: SlowMoConfig, parameter_map: ParameterMap, weight: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    import torch

    from hvd_slowmo.torch import SlowMo

    model = torch.nn.Linear(70, 50)
    model.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.125), model, config, parameter_map=parameter_map)
    for w, b in centres(rank):
        model.weight.grad = model.weight.detach() - torch.from_numpy(w)
        model.bias.grad = model.bias.detach() - torch.from_numpy(b)
        optimizer.step()
    optimizer.join()
    return model.weight.detach().numpy()


def _keras_few_bits(
    rank: int, config: SlowMoConfig, parameter_map: ParameterMap, weight: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    import keras
    import tensorflow as tf

    from hvd_slowmo.tf import SlowMo

    model = keras.Sequential([keras.Input((70,)), keras.layers.Dense(50, name="dense", dtype="float32")], name="net")
    kernel, offset = model.variables
    kernel.assign(weight.T)
    offset.assign(bias)
    optimizer = SlowMo(keras.optimizers.SGD(0.125), config, parameter_map=parameter_map)
    optimizer.broadcast(model)
    for w, b in centres(rank):
        optimizer.apply([tf.constant(kernel.numpy() - w.T), tf.constant(offset.numpy() - b)], [kernel, offset])
    optimizer.join(model)
    return np.asarray(kernel.numpy().T)


def torch_step(model: Any, optimizer: Any) -> Any:
    import torch

    def step(x: np.ndarray, y: np.ndarray) -> None:
        optimizer.zero_grad()
        (model(torch.tensor(x)[:, None]) - torch.tensor(y)).square().mean().backward()
        optimizer.step()

    return step


def keras_step(model: Any, optimizer: Any) -> Any:
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x[..., None], training=True) - y))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    return lambda x, y: step(tf.constant(x), tf.constant(y))


def on_the_wire(model: Any) -> dict[str, np.ndarray]:
    if TORCH:
        from hvd_slowmo_torch.interop.layers import entries_torch
        from hvd_slowmo_torch.interop.weights import read_torch

        return {name: value.copy() for name, value in read_torch(model, entries_torch(model)).items()}
    from hvd_slowmo_tf.interop.layers import entries_keras
    from hvd_slowmo_tf.interop.weights import read_keras, variables_of

    return read_keras(variables_of(model), entries_keras(model))


def with_fit(epochs: int) -> tuple[dict[str, np.ndarray], Any]:
    """Train with `fit` in Keras and a loop in PyTorch; return the final model, and the epochs' losses or joins."""
    hvd = horovod()
    config = SlowMoConfig(tau=3)
    if TORCH:
        model, optimizer = network("", config)
        step, behind = torch_step(model, optimizer), []
        for _ in range(epochs):
            for x, y in batches(hvd.rank(), 4):
                step(x, y)
            behind.append(optimizer.join().behind)
        optimizer.join(leaving=True)
        return on_the_wire(model), behind
    from hvd_slowmo.tf import SlowMoCallback

    model, optimizer = network("", config, start=False)
    model.compile(optimizer, "mse")
    x, y = (np.concatenate(part) for part in zip(*batches(hvd.rank(), 6), strict=True))
    x = x[..., None]
    options: dict[str, Any] = {"verbose": 0, "shuffle": False, "validation_data": (x, y)}
    history = model.fit(x, y, batch_size=5, epochs=epochs, callbacks=[SlowMoCallback()], **options)
    return on_the_wire(model), history.history["loss"]


def horovod() -> Any:
    """Return this worker's Horovod module."""
    if TORCH:
        import horovod.torch as hvd
    else:
        import horovod.tensorflow as hvd
    return hvd
