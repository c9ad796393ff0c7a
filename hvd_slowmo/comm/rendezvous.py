"""horovodrun's store, in which the workers of a job leave each other small messages."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from hvd_slowmo.comm.time_limit import as_horovod_reads

_PAUSE_S = 0.05
_open = build_opener(ProxyHandler({})).open  # the server belongs to this job and is not behind a proxy


class Rendezvous:
    """The store. It lives as long as the launcher, whatever becomes of the workers.

    Args:
        environment: variables of horovodrun.

    Raises:
        LookupError: the job has no such store (under MPI).
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        names = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
        if any(name not in environment for name in names):
            raise LookupError("this job has no rendezvous server: horovodrun has not started it over gloo.")
        address, port = (environment[name] for name in names)
        self._url = f"http://{address}:{port}"
        given = as_horovod_reads(environment.get("HOROVOD_GLOO_TIMEOUT_SECONDS", ""))
        self.limit_s = given or 30.0  # Horovod's own where none is given

    def put(self, path: str, value: bytes) -> None:
        """Leave a message.

        Raises:
            OSError: the server can't be reached.
        """
        with _open(_signed(f"{self._url}/{path}", "PUT", value), timeout=self.limit_s):
            pass

    def get(self, path: str) -> bytes | None:
        """Return a message; None while there is none.

        Raises:
            OSError: the server can't be reached.
        """
        try:
            with _open(_signed(f"{self._url}/{path}", "GET"), timeout=self.limit_s) as answer:
                found: bytes = answer.read()
                return found
        except HTTPError as error:
            if error.code == 404:
                return None
            raise


class RendezvousBoard:
    """`hvd_slowmo.comm.absence.Board` in horovodrun's store.

    Args:
        environment: variables of horovodrun.

    Raises:
        LookupError: the job has no store.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._rendezvous = Rendezvous(environment)

    def mark(self, key: str) -> None:
        self._rendezvous.put(f"slowmo.failed.{key}", b"1")

    def marked(self, key: str) -> bool:
        return self._rendezvous.get(f"slowmo.failed.{key}") is not None


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
    if any(name not in environment for name in ("HOROVOD_RANK", "HOROVOD_SIZE")):
        return None
    if environment.get("HOROVOD_ELASTIC") == "1":
        return None
    try:
        rendezvous = Rendezvous(environment)
    except LookupError:
        return None
    deadline = time.monotonic() + rendezvous.limit_s
    rendezvous.put(f"slowmo.hosts/{environment['HOROVOD_RANK']}", host.encode())
    found: list[str] = []
    while len(found) < int(environment["HOROVOD_SIZE"]):
        name = rendezvous.get(f"slowmo.hosts/{len(found)}")
        if name is not None:
            found.append(name.decode())
        elif time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {len(found)} has not called init() within {rendezvous.limit_s:.0f} s. Start all workers "
                "together, or increase HOROVOD_GLOO_TIMEOUT_SECONDS."
            )
        else:
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
