"""The Keras adapter on several workers, as threads of this process."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.tf import SGP, SlowMo, SlowMoConfig
from hvd_slowmo.torch import SlowMo as Other
from support.models.keras import batch, fit, held, loop, net, same, with_statistics
from support.problems import Problem, config_of, with_node
from support.trainings.keras import GraphComm, Worker, doubles
from support.trainings.pytorch import Model, advance

pytestmark = [pytest.mark.slow]

# Several workers' graphs wait in this process's threads at once; with fewer threads than workers they would wait for
# each other for ever. Set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)

SGD = keras.optimizers.SGD
Scaled = keras.optimizers.LossScaleOptimizer


def run(size, work, **options):
    return ThreadWorld(size).run(lambda comm: work(GraphComm(comm)), **options)


def variables(*values, **options):
    return [keras.Variable(np.array(v, "float32"), name=f"v{n}", **options) for n, v in enumerate(values)]


def over(comm, inner, given, **config):
    optimizer = SlowMo(inner, config_of(config), comm=comm)
    optimizer.broadcast(given)
    return optimizer


def ramp(*values):
    return [None if v is None else tf.constant(v, tf.float32) for v in values]


def test_workers_that_have_not_started_and_xla_raise_with_the_cure():
    def work(comm):
        given = variables([1.0, 2.0])
        optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=comm)
        with pytest.raises(ValueError, match=r"optimizer.broadcast\(model.variables\) before the first gradient"):
            optimizer.apply(ramp([1.0, 1.0]), given)
        optimizer.broadcast(given)
        with pytest.raises(ValueError, match="Compile the model with jit_compile=False, or give fit"):
            tf.function(lambda: optimizer.apply(ramp([1.0, 1.0]), given), jit_compile=True)()
        optimizer.apply(ramp([1.0, 1.0]), given)

    run(2, work)


@pytest.mark.slow
def test_gradients_of_all_equal_one_worker_on_the_joined_batch_and_meet_the_inner_clipping():
    def joined(rank, k):
        parts = [batch(r, k) for r in range(2)]
        return tuple(np.concatenate(each) for each in zip(*parts, strict=True))

    def inner():
        return SGD(0.1, momentum=0.5, global_clipnorm=0.3, weight_decay=0.01)

    alone = loop(net(), inner(), range(5), data=joined)

    def work(comm):
        model = net(comm.rank)
        optimizer = SlowMo(inner(), SlowMoConfig.ar_sgd(), comm=comm)
        optimizer.broadcast(model.variables)
        return loop(model, optimizer, range(5), rank=comm.rank)

    first, second = run(2, work)
    assert same(first, second)
    for found, expected in zip(first, alone, strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_are_averaged_once_an_update():
    def work(comm):
        given = variables([8.0])
        optimizer = over(
            comm, SGD(1.0, gradient_accumulation_steps=2, clipvalue=1.5), given, tau=2, gradients="all", beta=0.0
        )
        seen = []
        for k in range(4):
            optimizer.apply(ramp([1.0 + comm.rank + k]), given)
            seen.append((float(given[0].value[0]), optimizer.steps, int(optimizer._iterations)))
        sent = optimizer.bytes_sent
        joined = optimizer.join(given)
        return seen, sent, joined.behind

    (first, sent, behind), (second, _, _) = run(2, work)
    assert first == second
    # Means of the gradients: 1.5, 2.5 | 3.5, 4.5; the mean of a pair is clipped to 1.5.
    assert first == [(8.0, 0, 1), (6.5, 1, 2), (6.5, 1, 3), (5.0, 2, 4)]
    assert sent > 0
    assert behind == 0


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_a_variable_without_a_gradient_on_one_worker_or_on_all():
    def work(comm):
        given = variables([8.0], [8.0], [8.0])
        optimizer = over(comm, SGD(0.5, weight_decay=0.5), given, tau=2, gradients="all", warmup_steps=1)
        for _ in range(2):
            optimizer.apply(ramp([1.0], [2.0] if comm.rank else None, None), given)
        return [v.numpy().tolist() for v in given]

    first, second = run(2, work)
    assert first == second
    assert first[1] == first[0]  # half of 2 is 1
    assert first[2] == [8.0]  # no decay either, as without SlowMo


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["local", "all"])
@pytest.mark.sample("local")
def test_a_worker_in_a_join_takes_all_that_the_others_do(gradients):
    """Constraints, the moving average and measurements, and leaves alone what nobody has a gradient for."""

    def work(comm):
        given = variables([8.0, 1.0], [4.0])
        given[0].constraint = keras.constraints.NonNeg()
        inner = SGD(0.5, weight_decay=0.25, use_ema=True, ema_momentum=0.5)
        optimizer = SlowMo(inner, SlowMoConfig(tau=2, beta=0.9, gradients=gradients), comm=comm, metrics=True)
        optimizer.broadcast(given)
        for _ in range(6 if comm.rank else 1):
            optimizer.apply(ramp([1.0, 3.0], None), given)
        optimizer.join(given)
        values = [v.numpy().tolist() for v in (*given, *optimizer._model_variables_moving_average)]
        seen = optimizer.metrics()
        return values, optimizer.steps, int(optimizer.iterations), (seen.step, seen.delta_norm, seen.v_norm)

    first, second = run(2, work)
    assert first == second
    assert first[0][1] == [4.0]
    assert first[0][0][1] == 0.0


def test_overflows_on_one_worker_do_not_shift_the_count():
    """TFA #2351, PyTorch #76282: the scaler skips a worker's step, and the workers still meet."""

    def work(comm):
        given = variables([8.0, -8.0])
        optimizer = over(comm, Scaled(SGD(0.5), dynamic_growth_steps=3), given, tau=3)
        overflows = np.random.default_rng(comm.rank).random(18) < 0.4
        overflows[0] = comm.rank == 0
        outer, scales = [], []
        for k, overflow in enumerate(overflows):
            loss = optimizer.scale_loss(tf.constant(np.inf if overflow else 1.0 + comm.rank, tf.float32))
            optimizer.apply([tf.fill([2], loss) * 0.01], given)
            scales.append(float(optimizer.inner_optimizer.dynamic_scale))
            if k % 3 == 2:
                outer.append(given[0].numpy())
        return outer, scales, int(overflows.sum()), int(optimizer.iterations)

    (first, a, some, n), (second, b, others, m) = run(2, work)
    assert same(first, second)
    assert np.isfinite(first).all()
    assert a != b
    assert some != others
    assert n == m == 18


@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
def test_what_is_not_finite_on_one_worker(nonfinite):
    def work(comm):
        given = variables([8.0])
        optimizer = over(comm, SGD(1.0, momentum=0.5), given, tau=2, beta=0.0, nonfinite=nonfinite)
        optimizer.apply(ramp([1.0]), given)
        bad = [np.nan if comm.rank == 1 else 1.0]
        if nonfinite == "raise":
            with pytest.raises(ValueError, match=r"not finite .* on rank 1"):
                optimizer.apply(ramp(bad), given)
            return float(given[0].value[0]), optimizer.steps
        optimizer.apply(ramp(bad), given)
        return float(given[0].value[0]), float(optimizer.inner_optimizer.momentums[0].value[0])

    first, second = run(2, work)
    if nonfinite == "raise":
        assert first == (5.5, 1)  # its inner step, and nothing of an outer one
        assert np.isnan(second[0])
    else:
        assert first == (5.5, -1.5)
        assert second == (5.5, 0.0)  # the others' parameters, and momentum anew


@pytest.mark.parametrize(
    "inner", [lambda: SGD(0.1, momentum=0.9), lambda: keras.optimizers.AdamW(0.1, amsgrad=True)], ids=["SGD", "AdamW"]
)
def test_a_variable_without_a_gradient_on_any_worker_keeps_its_momentum(inner):
    def steps(apply, given):
        for k in range(5):
            apply([[1.0 + k], [2.0 + k] if k % 2 == 0 else None], given)
        return [v.numpy() for v in given]

    def alone(gradients, given):
        pairs = [(tf.constant(g), v) for g, v in zip(gradients, given, strict=True) if g is not None]
        optimizer.apply_gradients(pairs)

    def work(comm):
        given = variables([8.0], [4.0])
        mine = SlowMo(inner(), SlowMoConfig.ar_sgd(), comm=comm)
        mine.broadcast(given)
        return steps(lambda gradients, given: mine.apply(ramp(*gradients), given), given)

    given, optimizer = variables([8.0], [4.0]), inner()
    optimizer.build(given)
    expected = steps(alone, given)
    for found in run(2, work):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_variable_of_two_models_is_one():
    """As of a layer that both share: [*encoder.variables, *decoder.variables] has it twice."""

    def work(comm, times):
        given = variables([8.0], [4.0])
        optimizer = SlowMo(SGD(1.0), SlowMoConfig(tau=2, beta=0.5), comm=comm)
        optimizer._chunk_bytes = 4
        optimizer.broadcast([*given, *given[: times - 1]])
        for _ in range(6):
            optimizer.apply(ramp([1.0 + comm.rank], [1.0]), given)
        return [v.numpy() for v in given], len(optimizer._trainable_variables)

    once, twice = (run(2, lambda comm, times=times: work(comm, times)) for times in (1, 2))
    assert twice[0][1] == 2
    assert all(same(a, b) for (a, _), (b, _) in zip(once, twice, strict=True))


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
@pytest.mark.sample("raise-1", "exclude-2")
def test_inner_state_that_is_averaged_must_be_finite(fragments, nonfinite):
    """An infinite second moment of Adam stops the parameters, which stay finite."""

    def work(comm):
        given, adam = variables([8.0, 4.0], [2.0]), keras.optimizers.Adam(0.01)
        settings = {"fragments": fragments, "nonfinite": nonfinite, "inner_state": "average"}
        optimizer = over(comm, adam, given, tau=2, beta=0.0, **settings)
        for _ in range(3):
            optimizer.apply(ramp([1.0, 1.0], [1.0]), given)
        if comm.rank == 1:
            adam._velocities[0].assign([np.inf, 0.0])
        for _ in range(4):
            optimizer.apply(ramp([1.0, 1.0], [1.0]), given)
        return [x.numpy() for x in (*given, *adam._velocities, *adam._momentums)]

    results = run(2, work, return_exceptions=True)
    if nonfinite == "raise":
        assert all("averaged inner state are not finite (NaN or infinity) on rank 1" in str(r) for r in results)
    else:
        assert all(np.isfinite(x).all() for result in results for x in result)


def test_rates_that_differ_warn_once_with_the_ranks(caplog):
    def work(comm):
        given = variables([8.0])
        optimizer = over(comm, SGD(0.5 if comm.rank else 0.25), given, tau=1)
        optimizer.learning_rate = 0.5 if comm.rank else 0.25  # the start has made them equal
        for _ in range(3):
            optimizer.apply(ramp([1.0]), given)
        return given[0].numpy()

    first, second = run(2, work)
    assert same(first, second)
    said = [r.getMessage() for r in caplog.records if "learning rates differ" in r.getMessage()]
    assert len(said) == 2  # once on each worker
    assert "rank 0: 0.25" in said[0]
    assert "rank 1: 0.5" in said[0]


@pytest.mark.parametrize("buffers", ["maintain", "reset", "average"])
@pytest.mark.sample("average")
def test_buffers(buffers):
    def work(comm):
        given = variables([8.0])
        optimizer = over(comm, keras.optimizers.Nadam(0.125), given, tau=2, inner_state=buffers)
        for _ in range(2):
            optimizer.apply(ramp([1.0 + comm.rank]), given)
        inner = optimizer.inner_optimizer
        return float(inner._momentums[0].value[0]), float(inner._u_product), int(inner.iterations)

    (a, u, n), (b, _, _) = run(2, work)
    assert (n == 0) == (buffers == "reset")
    if buffers == "reset":
        assert (a, b, u) == (0.0, 0.0, 1.0)
    else:
        assert (a == b) == (buffers == "average")


@pytest.mark.slow
def test_statistics_are_averaged_at_outer_steps_and_joins_and_seeds_are_left_alone():
    def work(comm):
        model = with_statistics()
        model.add(keras.layers.Dropout(0.5, seed=comm.rank))
        optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=comm)
        optimizer.broadcast(model.variables)
        loop(model, optimizer, range(2), rank=comm.rank)
        after = held(model)
        loop(model, optimizer, range(2, 3), rank=comm.rank)
        within = held(model)
        optimizer.join()
        seeds = [v.numpy().tolist() for v in model.variables if v.name == "seed_generator_state"]
        return after, within, held(model), seeds

    first, second = run(2, work)
    moving = [4, 5]  # behind the first layer's kernel and bias, gamma and beta
    assert same(first[0], second[0])
    assert not same([first[1][n] for n in moving], [second[1][n] for n in moving])
    assert same(first[2], second[2])
    assert first[3] != second[3]


@pytest.mark.slow
def test_metrics_equal_the_pytorch_adapters():
    problem = Problem({"tau": 3, "alpha": 0.75}, steps=9)

    def theirs(comm):
        model = Model(problem.start())
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = Other(base, model, config_of(problem.config), comm=comm, metrics=True)
        found = []
        for step in range(problem.steps):
            advance(problem, model, optimizer, comm.rank, range(step, step + 1))
            found.append(optimizer.metrics())
        return found

    def ours(comm):
        worker = Worker(problem, comm)
        worker.optimizer = SlowMo(SGD(0.1), config_of(problem.config), comm=GraphComm(comm), metrics=True)
        worker.optimizer.broadcast(worker.parts)
        found = []
        for step in range(problem.steps):
            worker.step(step, step)
            found.append(worker.optimizer.metrics())
        return found

    expected = ThreadWorld(2).run(theirs)
    with doubles():
        for mine, other in zip(ThreadWorld(2).run(ours), expected, strict=True):
            for a, b in zip(mine, other, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert a._replace(seconds_waited=0, bytes_sent=0) == pytest.approx(
                        b._replace(seconds_waited=0, bytes_sent=0)
                    )


def test_gradients_averaged_within_nodes():
    """gradients="node": the node's mean at every step, all workers' at the outer step."""
    world, nodes = ThreadWorld(4), [ThreadWorld(2), ThreadWorld(2)]

    def work(comm):
        given = variables([8.0])
        node = nodes[comm.rank // 2].member(comm.rank % 2)
        optimizer = SlowMo(
            SGD(1.0), SlowMoConfig(tau=2, beta=0.0, gradients="node"), comm=with_node(GraphComm(comm), GraphComm(node))
        )
        optimizer.broadcast(given)
        seen = []
        for _ in range(2):
            optimizer.apply(ramp([float(comm.rank)]), given)
            seen.append(float(given[0].value[0]))
        return seen

    assert world.run(work) == [[7.5, 5.0], [7.5, 5.0], [5.5, 5.0], [5.5, 5.0]]


@pytest.mark.thorough  # two minutes, most of them for traces
@pytest.mark.parametrize(("lengths", "gossip"), [((2, 2, 4, 4), None), ((2, 2, 6, 6), SGP())], ids=str)
def test_a_join_across_the_end_of_the_warm_up_with_nodes(lengths, gossip):
    """A worker that is done meets all first, then its node; both frameworks alike."""
    config = SlowMoConfig(tau=4, beta=0.5, gradients="node", warmup_steps=4, gossip=gossip)

    def joined(comm, node):
        given = variables([8.0, -1.0])
        optimizer = SlowMo(SGD(0.25), config, comm=with_node(GraphComm(comm), GraphComm(node)))
        optimizer.broadcast(given)
        for _ in range(lengths[comm.rank]):
            optimizer.apply([given[0].value - float(comm.rank)], given)
        optimizer.join()
        return given[0].numpy()

    def theirs(comm, node):
        model = torch.nn.ParameterList([torch.tensor([8.0, -1.0], dtype=torch.float64)])
        optimizer = Other(torch.optim.SGD(model.parameters(), lr=0.25), model, config, comm=with_node(comm, node))
        for _ in range(lengths[comm.rank]):
            optimizer.zero_grad()
            (0.5 * (model[0] - float(comm.rank)).square().sum()).backward()
            optimizer.step()
        optimizer.join()
        return model[0].detach().numpy().copy()

    results = []
    for work in (joined, theirs):
        world, nodes = ThreadWorld(4), [ThreadWorld(2), ThreadWorld(2)]
        results += world.run(
            lambda comm, work=work, nodes=nodes: work(comm, nodes[comm.rank // 2].member(comm.rank % 2))
        )
    assert results[0][0] > 1
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-12)


def test_fit_needs_the_callback():
    def work(comm):
        with pytest.raises(ValueError, match="Give fit\\(\\) a SlowMoCallback"):
            fit(net(), SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=comm), range(2))

    run(2, work)
