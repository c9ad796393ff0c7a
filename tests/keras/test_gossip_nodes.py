"""Gossip between nodes in Keras: the graph is one over nodes, and in a join a node waits for no message."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import Problem
from support.trainings import keras as keras_training

# See test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

NODES = [[0, 2], [1, 3]]  # not in order


@pytest.mark.slow
@pytest.mark.thorough
def test_uneven_data_equal_the_oracle():
    config = {"gossip": "sgp", "topology": "star", "overlap": True, "gradients": "node", "tau": 4}
    problem = Problem(config, options={"momentum": 0.75})
    plan = [(5, 3, 2, 4), (3, 3, 3, 3)]
    worlds = [ThreadWorld(2) for _ in NODES]

    def work(comm):
        number = next(i for i, ranks in enumerate(NODES) if comm.rank in ranks)
        node = worlds[number].member(NODES[number].index(comm.rank))
        worker, seen, taken = keras_training.Worker(problem, comm, node), [], 0
        for lengths in plan:
            for _ in range(lengths[comm.rank]):
                worker.step(taken, worker.optimizer.steps)
                taken += 1
            worker.optimizer.join(worker.parts)
            seen.append(worker.flat())
        return seen

    with keras_training.doubles(40):
        histories = ThreadWorld(4).run(work)
    for number, joined in enumerate(s for s in problem.gossip_reference(4, plan, NODES) if s.joined):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number], joined.z[rank], rtol=0, atol=1e-12)
