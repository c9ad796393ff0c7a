"""Elastic jobs on this machine: several names of it are the hosts, one worker each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.installation import ROOT


def hvd_slowmo_run(
    folder: Path, script: str, workers: int, hosts: Sequence[str] | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Start a script under `hvd-slowmo run`.

    Args:
        folder: working directory of the job.
        script: text of the script.
        workers: number of workers.
        hosts: names of this machine, of an elastic job: a worker for each line of `folder`/hosts, which `set_hosts`
            changes; None for a job that is not elastic.
        variables: environment variables of the workers.
    """
    (folder / "train.py").write_text(script)
    options = ["-np", str(workers)]
    if hosts is not None:
        set_hosts(folder, hosts)
        discover = folder / "discover.sh"
        discover.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
        discover.chmod(0o755)
        options += ["--network-interfaces", "lo", "--min-np", "1", "--max-np", "4"]
        options += ["--host-discovery-script", str(discover)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "torch", ROOT / "tf")))
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "hvd_slowmo.cli.main", "run", *options, "python", "train.py"]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def set_hosts(folder: Path, hosts: Sequence[str]) -> None:
    """Give an elastic job other hosts."""
    incoming = folder / "hosts.new"
    incoming.write_text("".join(f"{host}:1\n" for host in hosts))
    incoming.replace(folder / "hosts")
