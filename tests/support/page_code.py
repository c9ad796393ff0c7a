"""The Python code of a page, run in a process of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from support import forking

LIMIT_S = 120
KERAS_OWN = "__array__ implementation doesn't accept"  # from NumPy, when Keras saves


def run(page: Path, blocks: Sequence[tuple[int, str]], folder: Path) -> tuple[int | None, str]:
    """Run blocks in order and in one namespace, with warnings as errors; return the exit status and the output.

    Args:
        blocks: number of the first line and code of each.
        folder: an empty directory in which the code runs.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOROVOD_")}
    log = folder.with_name(f"{folder.name}.log")
    process = forking.start(_work, page, blocks, folder, environment, log)
    process.join(LIMIT_S)
    status = process.exitcode  # None: it still runs
    process.kill()
    return status, log.read_text("utf-8", errors="replace")


def _work(
    page: Path, blocks: Sequence[tuple[int, str]], folder: Path, environment: Mapping[str, str], log: Path
) -> None:
    forking.enter(environment, log)
    os.chdir(folder)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=KERAS_OWN, category=DeprecationWarning)
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        # Empty lines in front of a block keep its line numbers, so that an error names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
