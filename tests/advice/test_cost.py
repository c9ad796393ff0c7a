"""The cost model: values computed by hand, and agreement with the parts of the library that it describes."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.advice.cost import Job, cost, messages
from hvd_slowmo.advice.host import Host, Work
from hvd_slowmo.advice.link import Line, Link, link_of
from hvd_slowmo.advice.recommend import MOST_TAU, OUTER, advise, rows_of, smallest_tau
from hvd_slowmo.advice.training import training_of
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES, ParameterGroups, lay_out
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.gossip import SGP
from hvd_slowmo.topology.analysis import out_degree
from hvd_slowmo.torch import SlowMo
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View

CHUNK = CHUNK_BYTES  # 16 MiB


def job(*, chunks=3, seconds=1.0, work=0.0, host=None, workers=2, per_chunk=0.1, latency=0.01, transport=0.0):
    """Return a job with a model of so many messages, each of which takes `per_chunk` seconds besides its latency."""
    line = Line(latency, per_chunk / CHUNK, transport / CHUNK)
    link = Link(workers, sums=line, pushes=line, alltoalls=line, allgathers=line)
    return Job(training_of(chunks * CHUNK // 4, seconds, work), link, host or Host())


def host(*, cores, average=0.0, slowmo=0.0, own=0.0, beside=0.0, bits=32, each=0.0):
    """Return a host with this time per message, and in the training's thread `each` per exchange."""
    works = [Work(Line(each, seconds / CHUNK)) for seconds in (average, slowmo)]
    return Host(cores, *works, ((bits, Work(Line(each, own / CHUNK), Line(0, beside / CHUNK))),))


def test_a_link_on_paper_is_that_of_a_ring():
    link = link_of(bandwidth=1e9, latency=0.001, workers=5)
    assert link.sums.seconds(1e9) == pytest.approx(8 * 0.001 + 2 * 4 / 5)
    assert link.pushes.seconds(1e9) == pytest.approx(0.001 + 1)
    assert link.alltoalls.seconds(1e9) == pytest.approx(4 * 0.001 + 4 / 5)
    assert link.allgathers == link.alltoalls
    with pytest.raises(ValueError, match=r"at least 2 workers\. Received: workers=1"):
        link_of(1e9, 0.001, 1)


@pytest.mark.parametrize("tau", [1, 12])
def test_an_outer_step_is_divided_among_the_steps_of_its_block(tau):
    found = cost(SlowMoConfig.local_sgd(tau), job())
    assert found.seconds == pytest.approx(1 + 3 * 0.11 / tau)
    assert found.overhead == pytest.approx(0.33 / tau)
    assert found.hidden == pytest.approx(0, abs=1e-9)
    assert found.sent == pytest.approx(3 * CHUNK / tau)  # 2 (m - 1) / m = 1 vector
    assert found.memory == 0


def test_messages_are_worked_on_while_the_next_one_travels():
    free = host(cores=4, slowmo=0.05)
    assert cost(SlowMoConfig(tau=1), job(host=free)).seconds == pytest.approx(1 + 3 * 0.11 + 0.05)
    slow = host(cores=4, slowmo=0.2)  # longer than a message travels
    assert cost(SlowMoConfig(tau=1), job(host=slow)).seconds == pytest.approx(1 + 0.11 + 3 * 0.2)
    # On one core the transport's own work takes its turn with the update.
    full = host(cores=1, slowmo=0.06)
    assert cost(SlowMoConfig(tau=1), job(host=full, transport=0.09)).seconds == pytest.approx(
        1 + 0.11 + 2 * (0.06 + 0.09) + 0.06
    )
    half = host(cores=0.5, slowmo=0.06)  # two workers per core
    assert cost(SlowMoConfig(tau=1), job(host=half, transport=0.09)).seconds == pytest.approx(
        1 + 0.11 + 2 * (0.06 + 2 * 0.09) + 0.06
    )


def test_an_exchange_has_a_cost_of_its_own():
    every = host(cores=4, each=0.5)
    assert cost(SlowMoConfig(tau=2), job(host=every)).seconds == pytest.approx(1 + (0.33 + 0.5) / 2)
    assert cost(SlowMoConfig.sgp(), job(host=every)).seconds == pytest.approx(1.33 + 0.5)
    assert cost(SlowMoConfig.ar_sgd(), job(chunks=1, host=every)).seconds == pytest.approx(1.11 + 0.5)
    assert cost(SlowMoConfig(tau=4, fragments=4, delay=1), job(host=every)).seconds == pytest.approx(1.5)


def test_averaged_gradients_travel_during_backward():
    found = cost(SlowMoConfig.ar_sgd(), job())
    assert found.seconds == pytest.approx(1 + 0.33 - 0.33 * 2 / 3)  # the last message waits for the end of backward
    assert found.hidden == pytest.approx(2 / 3)
    short = cost(SlowMoConfig.ar_sgd(), job(seconds=0.1))
    assert short.seconds == pytest.approx(0.1 + 0.33 - 0.05 * 2 / 3)
    busy = job(work=1.0, host=host(cores=1, average=0.02), transport=0.1)
    assert cost(SlowMoConfig.ar_sgd(), busy).seconds == pytest.approx(1 + 3 * (0.1 + 0.02))


def test_gossip_sends_a_message_per_step():
    alone = cost(SlowMoConfig.sgp(), job(workers=4))
    assert alone.seconds == pytest.approx(1.33)
    assert alone.sent == 3 * CHUNK
    over = cost(SlowMoConfig.sgp(tau=10, beta=0.5), job(workers=4))
    assert over.seconds == pytest.approx(1.33)  # a sum in the place of a message, which takes as long on these lines
    assert over.sent == pytest.approx((9 + 1.5) / 10 * 3 * CHUNK)
    assert over.memory == 2 * 3 * CHUNK


def test_dpsgd_has_a_partner_or_two_neighbours():
    assert cost(SlowMoConfig.dpsgd(), job(workers=4)) == cost(SlowMoConfig.sgp(), job(workers=4))
    found = cost(SlowMoConfig.dpsgd(), job(workers=5))
    assert found.seconds == pytest.approx(1 + 3 * 2 * 0.11)
    assert found.sent == 2 * 3 * CHUNK
    assert found.memory == 0


def test_late_messages_travel_beside_the_next_step():
    fits = cost(SlowMoConfig.osgp(), job(host=host(cores=4, average=0.02)))
    assert fits.seconds == pytest.approx(1 + 3 * 0.02)
    assert fits.hidden == pytest.approx(0.33 / 0.39)
    assert fits.sent == 3 * CHUNK
    assert fits.memory == 2 * 3 * CHUNK
    waits = cost(SlowMoConfig.osgp(), job(seconds=0.1))
    assert waits.seconds == pytest.approx(0.33)
    busy = job(work=1.0, host=host(cores=1, average=0.02), transport=0.1)
    assert cost(SlowMoConfig.osgp(), busy).seconds == pytest.approx(1 + 3 * (0.1 + 0.02))


def test_a_block_of_late_messages_begins_and_ends_without_one():
    found = cost(SlowMoConfig.osgp(tau=10, beta=0.5), job(seconds=0.1, workers=4, host=host(cores=4, average=0.02)))
    # Two steps without a message, eight that wait for one, nine that mix, and the outer step.
    assert found.seconds == pytest.approx((2 * 0.1 + 8 * 0.33 + 9 * 0.06 + 0.33) / 10)
    assert found.sent == pytest.approx((8 + 1.5) / 10 * 3 * CHUNK)
    assert found.memory == 4 * 3 * CHUNK
    assert cost(SlowMoConfig.osgp(tau=1), job()) == cost(SlowMoConfig(tau=1), job())._replace(memory=4 * 3 * CHUNK)


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8, 64])
@pytest.mark.parametrize("config", [SlowMoConfig.sgp(), SlowMoConfig.osgp(), SlowMoConfig.dpsgd()], ids=str)
def test_the_default_topologies_are_those_of_the_model(config, workers):
    graph = Graph(config, workers)
    found = cost(config, job(workers=workers))
    assert found.memory == len(graph.vectors) * 3 * CHUNK
    assert found.sent == out_degree(graph.array).mean() * 3 * CHUNK
    assert (out_degree(graph.array) == out_degree(graph.array).mean()).all()


def test_a_late_exchange_is_hidden_where_it_fits_into_its_steps():
    config = SlowMoConfig(tau=4, fragments=4, delay=1)
    fits = cost(config, job(chunks=4))
    assert fits.seconds == pytest.approx(1)
    assert fits.hidden == pytest.approx(1)
    assert fits.memory == pytest.approx((2 + 1 / 4) * 4 * CHUNK)
    late = cost(config, job(chunks=4, seconds=0.08))
    assert late.seconds == pytest.approx(0.11)
    assert late.hidden == pytest.approx(1 - 0.03 / 0.11)
    longer = cost(SlowMoConfig(tau=4, fragments=4, delay=2), job(chunks=4, seconds=0.08, latency=0.0))
    assert longer.seconds == pytest.approx(0.1)  # the links are never idle


def test_a_late_exchange_needs_the_processors():
    config = SlowMoConfig(tau=4, fragments=4, delay=1)
    spare = job(chunks=4, work=0.2, host=host(cores=1, own=0.01, beside=0.02), transport=0.03)
    assert cost(config, spare).seconds == pytest.approx(1.01)
    full = job(chunks=4, work=1.0, host=host(cores=1, own=0.01, beside=0.02), transport=0.03)
    assert cost(config, full).seconds == pytest.approx(1.06)
    one = cost(SlowMoConfig(tau=4, delay=1), full)  # one exchange of four messages, beside one of the four steps
    assert one.seconds == pytest.approx((4 + 4 * 0.06) / 4)


@pytest.mark.parametrize("delay", [1, 2])
def test_what_overlaps_takes_no_longer_than_one_thing_after_the_other(delay):
    """Threads that wait for each other use processor time, which is measured as the transport's."""
    shared = job(chunks=4, work=0.5, host=host(cores=0.5, average=0.02, own=0.01, beside=0.02), transport=5.0)
    assert cost(SlowMoConfig.ar_sgd(), shared).seconds == pytest.approx(1 + 4 * (0.11 + 0.02))
    assert cost(SlowMoConfig.ar_sgd(), shared).hidden == pytest.approx(0, abs=1e-9)
    assert cost(SlowMoConfig.osgp(), shared).seconds == pytest.approx(1 + 4 * (0.11 + 0.02))
    streamed = cost(SlowMoConfig(tau=4, fragments=4, delay=delay), shared)
    assert streamed.seconds == pytest.approx(1 + 0.11 + 0.01 + 0.02)


def test_few_bits_travel_twice_in_slices():
    config = SlowMoConfig(tau=1, fragments=1, delay=1, bits=8)
    found = cost(config, job(chunks=4, seconds=0.05, latency=0.0, workers=4))
    assert found.seconds == pytest.approx(2 * 4 * 0.1 / 4)
    assert found.sent == pytest.approx(1.5 * 4 * CHUNK / 4 * (1 + 4 / 1024))
    blocking = job(chunks=4, latency=0.0, host=host(cores=4, own=0.01, beside=0.02, bits=8))
    assert cost(SlowMoConfig(tau=1, bits=8), blocking).seconds == pytest.approx(1 + 4 * 0.05 + 0.03)


@dataclass(frozen=True)
class Matrix:
    spec: TensorSpec
    device: str = "cpu"


@pytest.mark.parametrize("rows", [1, 4096, 4097, 20_000])
@pytest.mark.parametrize("fragments", [1, 3, 12])
def test_messages_are_those_of_the_layout(rows, fragments):
    shape = (rows, 1024)
    spec = TensorSpec("weight", "parameter", shape, "float32", View.same(shape), "weight")
    layout = lay_out([Matrix(spec)], ParameterGroups.single(1), fragments=fragments).layout
    counts = {len(layout.of_fragment(number)) for number in range(fragments)}
    assert counts == {messages(4 * rows * 1024, fragments)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        SlowMoConfig(tau=2),
        SlowMoConfig.ar_sgd(),
        SlowMoConfig.sgp(),
        SlowMoConfig.streaming(2),
        SlowMoConfig.sgp(tau=2),
        SlowMoConfig.dpsgd(),
        SlowMoConfig.dpsgd(tau=4),
        SlowMoConfig.osgp(),
        SlowMoConfig.osgp(tau=4),
    ],
    ids=str,
)
def test_traffic_is_what_an_optimizer_hands_over(config):
    """With two workers a ring sends as much as is handed over for a sum; ledgers are short."""

    def work(comm):
        model = nn.Linear(512, 512, bias=False)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
        before = optimizer.bytes_sent
        for _ in range(8):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        return (optimizer.bytes_sent - before) / 8

    sent = cost(config, Job(training_of(512 * 512, 0.1), link_of(1e9, 0.001, 2))).sent
    late = 7 / 8 if config.delay else 1  # the last one counts when it has been waited for
    assert ThreadWorld(2).run(work)[0] == pytest.approx(late * sent, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        SlowMoConfig(gradients="node"),
        SlowMoConfig(gradients="all"),
        SlowMoConfig(shard=True),
        SlowMoConfig.osgp(topology="ring"),
        SlowMoConfig.dpsgd(topology="complete"),
        SlowMoConfig.sgp(topology="ring"),
        SlowMoConfig(gossip=SGP(), average=False),
    ],
    ids=str,
)
def test_other_settings_are_refused(config):
    with pytest.raises(ValueError, match=r"knows nothing of these settings\. Received: SlowMoConfig"):
        cost(config, job())


def test_the_recommended_tau_is_the_smallest():
    given = Job(training_of(25_000_000, 0.2), link_of(125e6, 0.001, 4))
    for form in OUTER:
        tau = smallest_tau(form, given, 0.05)
        below = cost(form.make(tau), given).overhead
        assert below <= 0.05
        assert tau == 2 or cost(form.make(tau - 1), given).overhead > 0.05
    assert smallest_tau(OUTER[0], given, 0.05) == math.ceil((6 * 6 * 0.001 + 1.5 * 0.8) / 0.2 / 0.05)
    advice = advise(given, 0.05)
    assert not advice.plain_suffices
    assert [choice.tau for choice in advice.choices] == sorted(choice.tau for choice in advice.choices)
    assert {choice.form for choice in advice.choices} == set(OUTER)


def test_every_recommendation_is_code():
    given = Job(training_of(25_000_000, 0.2), link_of(125e6, 0.001, 4))
    for choice in advise(given, 0.05).choices:
        assert eval(choice.code, {"SlowMoConfig": SlowMoConfig}) == choice.form.make(choice.tau)
    for row in rows_of(given, [12]):
        assert eval(row.form.code.format(tau=12), {"SlowMoConfig": SlowMoConfig}) == row.config


def test_a_fast_network_needs_no_outer_steps():
    fast = Job(training_of(1_000_000, 0.2), link_of(12.5e9, 1e-5, 4))
    assert advise(fast, 0.05).plain_suffices


def test_a_network_may_be_too_slow_for_any_tau():
    slow = Job(training_of(10**9, 1e-4), link_of(1e3, 1.0, 4))
    assert advise(slow, 0.05).choices == ()
    assert smallest_tau(OUTER[0], slow, 0.05) is None
    assert cost(OUTER[0].make(MOST_TAU), slow).overhead > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_more_steps_per_block_never_cost_more(seed):
    """The search for the smallest tau relies on it."""
    random = np.random.default_rng(seed)
    given = Job(
        training_of(int(10 ** random.uniform(4, 9)), 10 ** random.uniform(-3, 1)),
        link_of(10 ** random.uniform(6, 10), 10 ** random.uniform(-5, -2), int(random.integers(2, 100))),
        host(cores=random.uniform(0.5, 8), slowmo=random.uniform(0, 0.1), own=0.01, beside=0.05),
    )
    for form in OUTER:
        overheads = [cost(form.make(tau), given).overhead for tau in (2, 3, 5, 12, 40, 100, 1000)]
        assert all(b <= a + 1e-9 for a, b in pairwise(overheads)), form
