"""Jobs for Horovod workers (see ../pool.py): each way in which TensorFlow loses a collective."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.grappler import tf_optimizer

from hvd_slowmo_tf.horovod import HorovodComm
from hvd_slowmo_tf.traces.graph_comm import GraphSafeComm


class AsSeveral(HorovodComm):
    """A single worker that is treated as one of two; its sums are its own values."""

    def __init__(self) -> None:
        super().__init__(hvd.global_process_set, None)
        self.size = 2

    def start_sum(self, name: str, x: Any) -> Any:
        # As hvd.allreduce does with several workers; with one it sends nothing.
        from horovod.tensorflow.mpi_ops import Sum, _allreduce

        return _allreduce(x, name=f"allreduce.{name}", op=Sum, ignore_name_scope=True)


def constant(comm: Any) -> Any:
    """Sum a constant, which constant folding replaces by its first result."""
    return comm.wait(comm.start_sum("constant", tf.constant([1.0, 2.0])))


def constant_in_a_loop(comm: Any) -> Any:
    """Sum a constant in each iteration of a loop."""

    def body(k: Any, total: Any) -> Any:
        return k + 1, total + comm.wait(comm.start_sum("loop", tf.constant([1.0, 2.0])))

    start = (tf.constant(0), tf.zeros([2]))
    return tf.while_loop(lambda k, _: k < 3, body, start, parallel_iterations=1)[1]


def merged(comm: Any) -> Any:
    """Sum one tensor twice. TensorFlow merges the two, although Horovod tells them apart by name."""
    x = tf.random.uniform([2]) * 0 + 1
    one, other = comm.start_sum("same", x), comm.start_sum("same", x)
    return comm.wait(one) + comm.wait(other)


def unused(comm: Any) -> Any:
    """Start a sum whose result is unused."""
    comm.wait(comm.start_sum("unused", tf.random.uniform([2])))
    return tf.zeros([2])


CASES = {"constant": constant, "constant_in_a_loop": constant_in_a_loop, "merged": merged, "unused": unused}


def kept(case: str, safe: bool) -> dict[str, int]:
    """Return the number of collectives in the traced graph, as written and after Grappler. One worker."""
    comm = GraphSafeComm(AsSeveral()) if safe else AsSeveral()
    function = tf.function(lambda: CASES[case](comm), autograph=False).get_concrete_function()
    definition = function.graph.as_graph_def(add_shapes=True)
    meta = tf.compat.v1.train.export_meta_graph(graph_def=definition, graph=function.graph)
    needed = [t.op.name for t in function.outputs] + [op.name for op in function.graph.control_outputs]
    for name in needed:
        meta.collection_def["train_op"].node_list.value.append(name)
    config = config_pb2.ConfigProto()
    config.graph_options.rewrite_options.min_graph_nodes = -1
    optimized = tf_optimizer.OptimizeGraph(config, meta)
    return {"written": _count(definition), "left": _count(optimized)}


def _count(graph: Any) -> int:
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return sum(node.op == "HorovodAllreduce" for node in nodes)


def exchanged(case: str, traced: bool) -> tuple[list[list[float]], int]:
    """Return the results of two calls, and the bytes of both, on several workers.

    Workers match collectives by the names in a graph, so "eager" is a call of a function from eager code.
    """
    comm = GraphSafeComm(HorovodComm(hvd.global_process_set, None))
    call = tf.function(lambda: CASES[case](comm), autograph=False)
    outer = tf.function(lambda: call(), autograph=False) if traced else call
    results = [outer().numpy().tolist() for _ in range(2)]
    return results, comm.bytes_sent


def expected(case: str, size: int) -> tuple[list[list[float]], int]:
    value = {
        "constant": np.array([1.0, 2.0]) * size,
        "constant_in_a_loop": np.array([1.0, 2.0]) * size * 3,
        "merged": np.ones(2) * size * 2,
        "unused": np.zeros(2),
    }[case]
    count = {"constant": 1, "constant_in_a_loop": 3, "merged": 2, "unused": 1}[case]
    return [value.tolist()] * 2, 2 * count * 8
