"""Keras models that are given values by other means than steps."""

import logging

import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig


def between_fits(how):
    """Train, give the weight the value 1, and go on with gradients of zero; return the weight and the warnings.

    With "average" Keras itself overwrites the weight, with its moving average, and 1 means that this one stays.
    """
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hvd_slowmo").addHandler(handler)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    optimizer = SlowMo(keras.optimizers.SGD(0.1, use_ema=how == "average"), SlowMoConfig(tau=2, beta=0.5))
    model.compile(optimizer, "mse")
    x = np.ones((12, 1), np.float32)
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
    average = model.get_weights()[0].item()
    if how not in ("nothing", "average"):
        model.set_weights([np.ones((1, 1), np.float32)])
    if how == "restart":
        optimizer.restart()
    if how == "nothing":
        before = model.get_weights()[0].item()
        model.fit(x, x, batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
        return before != model.get_weights()[0].item(), said
    model.fit(0 * x, x, batch_size=2, verbose=0, callbacks=[SlowMoCallback()])
    logging.getLogger("hvd_slowmo").removeHandler(handler)
    weight = model.get_weights()[0].item()
    return weight / average if how == "average" else weight, said


def restarted():
    """Restart within a block in a custom training loop, and from another step on one worker."""
    import horovod.tensorflow as hvd

    variable = keras.Variable([0.0])
    optimizer = SlowMo(keras.optimizers.SGD(1.0), SlowMoConfig(tau=3, beta=0.5))
    optimizer.broadcast([variable])
    optimizer.apply([tf.constant([-1.0 - hvd.rank()])], [variable])
    variable.assign([5.0 + hvd.rank()])
    optimizer.restart()
    found = [float(variable.numpy()[0])]
    for _ in range(5):
        optimizer.apply([tf.constant([0.0])], [variable])
    found.append(float(variable.numpy()[0]))
    if hvd.rank() == 0:
        optimizer.apply([tf.constant([0.0])], [variable])
    try:
        optimizer.restart()
    except ValueError as error:
        return found, str(error)
    return found, ""


def broadcasts_left_in():
    """Train as Horovod's example of a custom loop does: it broadcasts model and optimizer after the first batch."""
    import horovod.tensorflow as hvd

    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = SlowMo(keras.optimizers.SGD(0.25, momentum=0.5), SlowMoConfig(tau=3, beta=0.5))
    optimizer.broadcast(model)
    begin = model.get_weights()[0].item()
    for batch in range(8):
        optimizer.apply([tf.constant([[-1.0 - hvd.rank()]])], model.trainable_variables)
        if batch == 0:  # Horovod can't broadcast Keras 3's own variables, those of any optimizer
            for variables in (model.variables, optimizer.variables):
                hvd.broadcast_variables([v.value for v in variables], root_rank=0)
    optimizer.join(model)
    return begin, model.get_weights()[0].item(), optimizer.steps


def joined_together(lengths):
    """Train two optimizers of one name by different numbers of steps."""
    import horovod.tensorflow as hvd

    import hvd_slowmo.tf as slowmo

    variables = [keras.Variable([0.0]) for _ in range(2)]
    optimizers = [SlowMo(keras.optimizers.SGD(1.0), SlowMoConfig(tau=2)) for _ in variables]
    for optimizer, variable in zip(optimizers, variables, strict=True):
        optimizer.broadcast([variable])
    for _ in range(lengths[hvd.rank()]):
        for number, (optimizer, variable) in enumerate(zip(optimizers, variables, strict=True)):
            optimizer.apply([tf.constant([-1.0 - number])], [variable])
    behind = [result.behind for result in slowmo.join(*optimizers)]
    return [float(v.numpy()[0]) for v in variables], behind
