"""Jobs for workers (see ../pool.py): `hvd-slowmo advise`."""

from __future__ import annotations

import contextlib
import io
from unittest import mock

from hvd_slowmo.advice import measuring
from hvd_slowmo.cli.main import main
from hvd_slowmo_torch.advice import host


def advise(arguments: list[str]) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of the command on this worker, whose measurements are short."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("hvd_slowmo.torch.init"))  # the pool's workers are connected
        stack.enter_context(mock.patch.object(measuring, "REPEATS", 1))
        stack.enter_context(mock.patch.multiple(host, _REPEATS=1, _ROWS=(1, 1024)))
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        status = main(["advise", *arguments])
    return status, out.getvalue(), err.getvalue()
