"""Environment of workers on this machine, as set by horovodrun, for processes that are started in another way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environments(size: int) -> Iterator[list[dict[str, str]]]:
    """Yield the environment variables of each worker, by rank; their rendezvous server runs until exit.

    Args:
        size: number of workers.

    Raises:
        ImportError: Horovod is not installed.
    """
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    slots = get_host_assignments(parse_hosts(f"localhost:{size}"), size)
    server = RendezvousServer()
    port = server.start()
    try:
        server.init(slots)
        run = {key: str(value) for key, value in create_run_env_vars("127.0.0.1", [_loopback()], port).items()}
        yield [{**os.environ, **run, **create_slot_env_vars(slot)} for slot in slots]
    finally:
        server.stop()
        server._httpd.server_close()  # stop() ends the thread but leaves the port open


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
