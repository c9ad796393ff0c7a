"""Run an elastic job under random faults, and report."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from soak import link
from soak.checks import losses
from soak.diary import entries
from soak.faults import HOSTS, TIMEOUT_S, Faults
from soak.figure import figure
from soak.job import Job
from soak.report import Report, report

SECONDS_TO_END = 180.0


def undisturbed(framework: str, seconds: float) -> list[tuple[int, float]]:
    """Return the losses of a job to which nothing is done."""
    with TemporaryDirectory() as name:
        job = Job(Path(name), framework, HOSTS[:3], TIMEOUT_S)
        try:
            _trains(job)
            time.sleep(seconds)
            job.end(SECONDS_TO_END)
            if job.status != 0:
                raise RuntimeError(f"a job to which nothing was done has failed: {job.log()[-2000:]}")
            return losses(list(entries(job.folder)))
        finally:
            job.kill()


def soak(framework: str, minutes: float, pause: float, seed: int, out: Path) -> Report:
    """Train for so long, do something every so many seconds, and return the report."""
    reference = undisturbed(framework, min(180.0, 30.0 * minutes))
    with TemporaryDirectory() as name:
        job = Job(Path(name), framework, HOSTS[:3], TIMEOUT_S)
        faults, done = Faults(job, seed), []
        processor = _processor()
        try:
            _trains(job)
            began = time.monotonic()
            due = began + pause
            while time.monotonic() - began < 60 * minutes and job.process.poll() is None:
                time.sleep(1)
                # A worker that hangs or starts slowly holds the job up for longer than the faults are apart.
                if time.monotonic() >= due and job.goes_on():
                    line = faults.next()
                    due = time.monotonic() + pause
                    if line is not None:
                        done.append((time.time(), line))
                        print(f"{framework} {(time.monotonic() - began) / 60:5.1f} min  {line}", flush=True)
            job.end(SECONDS_TO_END)
            took = (time.monotonic() - began) / 60, (_processor() - processor) / 60
            found = report(job, framework, *took, done, reference)
            figure(job, done, out / f"soak_{framework}.png")
            if not found.faultless:
                (out / f"soak_{framework}.log").write_text(job.log(), encoding="utf-8")
                job.keep_diaries(out / f"soak_{framework}")
            return found
        finally:
            job.kill()
            faults.end()


def _processor() -> float:
    """Return the processor time of all processes that have ended, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _trains(job: Job) -> None:
    """Wait until the workers have come together."""
    end = time.monotonic() + 180
    while not job.training():
        if time.monotonic() > end or job.process.poll() is not None:
            raise RuntimeError(f"the job has not begun: {job.log()[-2000:]}")
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of all jobs together (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=15, help="seconds between two faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--frameworks", nargs="+", choices=("torch", "keras"), default=["torch", "keras"])
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory of the figures")
    args = parser.parse_args()
    link.enter()
    reports = []
    for framework in args.frameworks:
        reports.append(soak(framework, args.minutes / len(args.frameworks), args.pause, args.seed, args.out))
        print("\n".join(reports[-1].lines()), flush=True)
    return 0 if all(each.faultless for each in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
