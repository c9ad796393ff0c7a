"""Exchange of the workers' host names before Horovod starts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_PAUSE_S = 0.05
_open = build_opener(ProxyHandler({})).open  # the server belongs to this job and is not behind a proxy


def hosts_by_rendezvous(host: str, environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the host name of every worker, by rank, through horovodrun's rendezvous server for gloo.

    Horovod can report the hosts only after its initialization, which already needs the process sets derived from them.
    A second initialization is unsafe: while other workers are still ending the first one, it may find their old
    addresses.

    Args:
        host: host name of this worker.
        environment: environment variables, as set by horovodrun.

    Returns:
        The host names, or None if the job has no such server (under MPI) or is elastic.

    Raises:
        TimeoutError: a worker has not called init() within HOROVOD_GLOO_TIMEOUT_SECONDS (default 30).
        OSError: the server cannot be reached.
    """
    names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT", "HOROVOD_RANK", "HOROVOD_SIZE")
    if any(name not in environment for name in names) or environment.get("HOROVOD_ELASTIC") == "1":
        return None
    address, port, rank, size = (environment[name] for name in names)
    folder = f"http://{address}:{port}/slowmo.hosts"
    limit = float(environment.get("HOROVOD_GLOO_TIMEOUT_SECONDS", "30"))
    deadline = time.monotonic() + limit
    with _open(_signed(f"{folder}/{rank}", "PUT", host.encode()), timeout=limit):
        pass
    found: list[str] = []
    while len(found) < int(size):
        try:
            with _open(_signed(f"{folder}/{len(found)}", "GET"), timeout=limit) as answer:
                found.append(answer.read().decode())
        except HTTPError as error:
            if error.code != 404:
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {len(found)} has not called init() within {limit:.0f} s. Start all workers together, or "
                    "increase HOROVOD_GLOO_TIMEOUT_SECONDS."
                ) from None
            time.sleep(_PAUSE_S)
    return found


def _signed(url: str, method: str, body: bytes | None = None) -> Request:
    """Return a request with the signature of the job, for which a Horovod built by `install-horovod` asks."""
    request = Request(url, body, method=method)
    try:
        from horovod.runner.common.util.secret import SIGNATURE_HEADER, sign
    except ImportError:  # Horovod as published
        return request
    request.add_header(SIGNATURE_HEADER, sign(method, request.selector, body or b""))
    return request
