"""The network of the soak: one of its own where the machine allows that, whose rate changes while the job trains."""

from __future__ import annotations

import os
import subprocess
import sys

from support.installation import ROOT

RATE = "1gbit"
_SCRIPT = str(ROOT / "benchmarks" / "link.sh")
_INSIDE = "SOAK_HAS_A_NETWORK"  # set for the program that `enter` starts


def enter() -> None:
    """Run this program anew in a network namespace, unless it is in one; return where that can't be had."""
    if allowed():
        return
    if subprocess.run(["bash", _SCRIPT, RATE, "true"], capture_output=True, check=False).returncode == 0:
        os.environ[_INSIDE] = "yes"
        os.execvp("bash", ["bash", _SCRIPT, "none", sys.executable, "-m", "soak", *sys.argv[1:]])


def allowed() -> bool:
    """Return whether the rate can be changed."""
    return _INSIDE in os.environ


def slow_down() -> None:
    """Let all workers together send no more than `RATE`."""
    _tc("replace", "dev", "lo", "root", "tbf", "rate", RATE, "burst", "1mb", "latency", "100ms")


def set_free() -> None:
    """Let the loopback device be as fast as it is."""
    _tc("delete", "dev", "lo", "root")


def _tc(*words: str) -> None:
    subprocess.run(["tc", "qdisc", *words], check=True)
