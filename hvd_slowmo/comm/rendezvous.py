"""Which worker is on which host, before Horovod has started."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_PAUSE_S = 0.05
_open = build_opener(ProxyHandler({})).open  # the server is one of this job, behind no proxy


def hosts_by_rendezvous(host: str, environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Every worker's host, by rank, through the server at which horovodrun has gloo's workers find each other.

    Horovod could tell them once it has started, but its process sets must be known then, and a second start beside
    workers that have not ended the first one may find these's old addresses.

    Args:
        host: this worker's.

    Returns:
        None where there is no such server: under MPI, or in an elastic job.

    Raises:
        TimeoutError: a worker has not come within Horovod's own limit.
    """
    names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT", "HOROVOD_RANK", "HOROVOD_SIZE")
    if any(name not in environment for name in names) or environment.get("HOROVOD_ELASTIC") == "1":
        return None
    address, port, rank, size = (environment[name] for name in names)
    folder = f"http://{address}:{port}/slowmo.hosts"
    limit = float(environment.get("HOROVOD_GLOO_TIMEOUT_SECONDS", "30"))
    deadline = time.monotonic() + limit
    with _open(Request(f"{folder}/{rank}", data=host.encode(), method="PUT"), timeout=limit):
        pass
    found: list[str] = []
    while len(found) < int(size):
        try:
            with _open(f"{folder}/{len(found)}", timeout=limit) as answer:
                found.append(answer.read().decode())
        except HTTPError as error:
            if error.code != 404:
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {len(found)} has not called init() within {limit:.0f} s. Start all workers together, or set "
                    "HOROVOD_GLOO_TIMEOUT_SECONDS."
                ) from None
            time.sleep(_PAUSE_S)
    return found
