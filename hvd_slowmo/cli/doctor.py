"""The subcommand `doctor`."""

from __future__ import annotations

import argparse
import os
import sys

from hvd_slowmo.errors import escape_controls
from hvd_slowmo.installer.doctor import Finding, Level, examine


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="show the installed versions and any problem that prevents training",
        description="Examine the frameworks and Horovod of this environment. The exit status is 1 if training would "
        "not work here, and 0 otherwise.",
    )
    parser.set_defaults(run=_doctor)


def _doctor(_: argparse.Namespace) -> int:
    problems = warnings = 0
    for finding in examine(os.environ):
        problems += finding.level is Level.PROBLEM
        warnings += finding.level is Level.WARNING
        _show(finding)
    if problems:
        print(f"\nProblems: {problems}. Training would not work here until they are fixed.")
        return 1
    print("\nTraining works here." + (f" Warnings: {warnings}." if warnings else ""))
    return 0


def _show(finding: Finding) -> None:
    text = escape_controls(finding.text)  # of a foreign exception, perhaps
    first, *more = [*text.splitlines(), *([f"Fix: {finding.fix}"] if finding.fix else [])]
    print(f"{finding.level.value:<8} {first}")
    for line in more:
        print(f"{'':<8} {line}")
    sys.stdout.flush()
