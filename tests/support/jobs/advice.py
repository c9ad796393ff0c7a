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
    few = mock.patch.object(measuring, "REPEATS", 1), mock.patch.multiple(host, _REPEATS=1, _ROWS=(1, 1024))
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with few[0], few[1], streams[0] as out, streams[1] as err:
        status = main(["advise", *arguments])
    return status, out.getvalue(), err.getvalue()
