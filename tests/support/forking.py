"""Processes forked from a server that has imported both frameworks, which takes as long as many tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.preloaded"])


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process that calls `target`, which begins with `enter`.

    The first call starts the server, whose frameworks read these variables when it imports them.
    """
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3"):
        process.start()
    return process


def enter(environment: Mapping[str, str], log: Path) -> None:
    """Give this process a group of its own, its environment variables, and a file for its output.

    A signal to the group reaches the processes that this one starts.
    """
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as sink, open(os.devnull, "rb") as nothing:
        for descriptor, file in ((0, nothing), (1, sink), (2, sink)):
            os.dup2(file.fileno(), descriptor)
