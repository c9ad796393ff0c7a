"""The share of Horovod's build that is done, and the time left at the speed measured so far.

CMake counts files, and one takes ten times as long as another. Here each file counts with its cost, the processor
seconds that compiling it took once (costs.py). A "file" is also a group of files that are compiled together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hvd_slowmo.installer.costs import cost, target_costs

_COMPILED = re.compile(r"^\[\s*\d+%\] Building \w+ object .*CMakeFiles/(?P<target>[^/]+)\.dir/(?P<file>.+)\.o$")
_BUILT = re.compile(r"^\[\s*\d+%\] Built target (?P<target>\S+)$")

_MEASURED = 0.05
"""Share of the build from which on its speed predicts the rest."""

_LARGE = 34
"""Cost of a file from which on its age tells the machine's speed; smaller ones may be finished already."""

_ALMOST = 0.8
"""The most that a file in compilation counts as done, whatever its age: the rest is what its cost may be wrong by."""

_OVERDUE = 1.5
"""Multiple of its expected time after which a smaller file must have been finished, though no line said so."""


class File(NamedTuple):
    """A file in compilation."""

    target: str
    name: str
    since: float  # s


class Estimate(NamedTuple):
    """The state of a build at one time.

    Attributes:
        percent: of the cost; None before the first file.
        left: seconds; None until the speed is known, and of more than two jobs once the last file is started.
        file: the one in compilation that will take longest; "" if there is none.
        age: seconds for which it has been compiled.
    """

    percent: int | None
    left: float | None
    file: str
    age: float


@dataclass(frozen=True)
class Build:
    """A build as its output shows it.

    Attributes:
        jobs: files compiled at once.
        together: files are compiled in groups.
        targets: libraries that are being built, or will be.
        last: time of the last file that was started, s; None before the first one.
        busy: job-seconds of compilation up to then.
        compiled: files by target that have been started.
        running: those that are in compilation.
        built: finished targets.
    """

    jobs: int
    together: bool
    targets: tuple[str, ...]
    last: float | None = None
    busy: float = 0.0
    compiled: tuple[tuple[str, str], ...] = ()
    running: tuple[File, ...] = ()
    built: frozenset[str] = frozenset()


def begin(frameworks: Sequence[str], jobs: int, together: bool = True) -> Build:
    """Return a build for these frameworks before its first line.

    Args:
        frameworks: "torch" and "tensorflow", or one of them.
        jobs: files compiled at once.
        together: files are compiled in groups, as they are unless MPI or NCCL is asked for.

    Example:
        >>> begin(["torch"], jobs=2).targets
        ('gloo', 'pytorch')
    """
    targets = {"torch": ("pytorch",), "tensorflow": ("compatible17_gloo", "tensorflow")}
    return Build(jobs, together, ("gloo", *(target for name in frameworks for target in targets[name])))


def after_line(build: Build, line: str, seconds: float) -> Build:
    """Return the build after a line of its output.

    A line says when a file is started, and never when it is finished. With all jobs at work, the file that must have
    been finished is the one that is expected first.

    Args:
        build: before the line.
        line: of the output.
        seconds: time.

    Example:
        >>> build = begin(["torch"], jobs=1)
        >>> build = after_line(build, "[  2%] Building CXX object gloo/CMakeFiles/gloo.dir/allreduce_local.cc.o", 10.0)
        >>> [file.name for file in build.running]
        ['gloo/allreduce_local.cc']
    """
    if match := _BUILT.match(line):
        target = match["target"]
        running = tuple(file for file in build.running if file.target != target)
        return replace(build, running=running, built=build.built | {target})
    match = _COMPILED.match(line)
    if match is None:
        return build
    target, running = match["target"], build.running
    if len(running) >= build.jobs:
        first = max(running, key=lambda file: (seconds - file.since) / cost(file.name))
        running = tuple(file for file in running if file is not first)
    name = _name(target, match["file"])
    return replace(
        build,
        targets=build.targets if target in build.targets else (*build.targets, target),
        last=seconds,
        busy=build.busy + (0.0 if build.last is None else len(build.running) * (seconds - build.last)),
        compiled=(*build.compiled, (target, name)),
        running=(*running, File(target, name, seconds)),
    )


def estimate(build: Build, seconds: float) -> Estimate:
    """Return the share that is done and the time left.

    Args:
        build: as its output shows it.
        seconds: time.
    """
    if build.last is None:
        return Estimate(None, None, "", 0.0)
    waiting = _waiting(build)
    started = sum(cost(name) for _, name in build.compiled)
    total = started + sum(waiting)
    finished = started - sum(cost(file.name) for file in build.running)
    speed = _speed(build, finished, seconds)
    rests = {
        file: max(cost(file.name) - speed * (seconds - file.since), (1 - _ALMOST) * cost(file.name))
        for file in _alive(build, speed, seconds)
    }
    unfinished = list(rests.values())
    done = total - sum(unfinished) - sum(waiting)
    known = speed > 0 and done >= _MEASURED * total
    # Of many jobs, few have work at the end, and what these few add tells less and less of the speed.
    known = known and (bool(waiting) or build.jobs <= 2)
    left = _span([*unfinished, *waiting], build.jobs) / speed if known else None
    longest = max(rests, key=lambda file: rests[file], default=None)
    return Estimate(
        int(100 * done / total),
        left,
        "" if longest is None else longest.name,
        0.0 if longest is None else seconds - longest.since,
    )


def spell(found: Estimate) -> str:
    """Return the time left and the file in compilation in words.

    Example:
        >>> spell(Estimate(71, 130.0, "torch/mpi_ops_v2.cc", 75.0))
        'about 2 min left, compiling torch/mpi_ops_v2.cc for 1 min 15 s'
    """
    parts = []
    if found.left is not None:
        rounded = max(10, 10 * round(found.left / 10))
        parts.append(f"about {round(found.left / 60)} min left" if found.left >= 90 else f"about {rounded} s left")
    if found.file:
        parts.append(f"compiling {found.file} for {int(found.age) // 60} min {int(found.age) % 60:02d} s")
    return ", ".join(parts)


class Meter:
    """The build that a running command's output shows."""

    def __init__(self, frameworks: Sequence[str], jobs: int, together: bool = True) -> None:
        self._build = begin(frameworks, jobs, together)

    @property
    def processor_seconds(self) -> float:
        """Time that the rest of the build takes, as far as its files are known."""
        return sum(_waiting(self._build))

    def read(self, line: str, seconds: float) -> None:
        """Take note of a line."""
        self._build = after_line(self._build, line, seconds)

    def at(self, seconds: float) -> tuple[int | None, str]:
        """Return the percentage, None if unknown, and the rest in words."""
        found = estimate(self._build, seconds)
        return found.percent, spell(found)


def _speed(build: Build, finished: float, seconds: float) -> float:
    """Return the cost per second of one job; 0 until a file is finished.

    Args:
        build: with a file.
        finished: cost of the finished files.
        seconds: time.
    """
    assert build.last is not None, "with a file"
    speed = 0.0
    for _ in range(4):  # which files are in compilation, and what they add, depends on the speed
        alive = _alive(build, speed, seconds)
        added = sum(min(speed * (seconds - file.since), _ALMOST * cost(file.name)) for file in alive)
        speed = (finished + added) / max(build.busy + len(alive) * (seconds - build.last), 1e-9)
    # A large file that is overdue says that the machine has become slower.
    large = [file for file in build.running if cost(file.name) >= _LARGE]
    return min([speed, *(cost(file.name) / max(seconds - file.since, 1e-9) for file in large)])


def _alive(build: Build, speed: float, seconds: float) -> list[File]:
    """Return the files that can still be in compilation at this speed."""
    return [
        file
        for file in build.running
        if file is build.running[-1]  # its library is not there yet, so the last file is not finished
        or cost(file.name) >= _LARGE
        or speed * (seconds - file.since) < _OVERDUE * cost(file.name)
    ]


def _span(costs: Sequence[float], jobs: int) -> float:
    """Return the time at which the last file is done, if each job takes the next one at speed 1.

    Example:
        >>> _span([1, 1, 1, 4], jobs=2)
        5
    """
    free: list[float] = [0] * jobs
    for each in costs:
        free[free.index(min(free))] += each
    return max(free)


def _waiting(build: Build) -> list[float]:
    """Return the costs of the known files that are still to be started, in about their order."""
    started = set(build.compiled)
    found: list[tuple[bool, float, float]] = []
    for target in build.targets:
        files = target_costs(target, build.together)
        if target not in build.built:
            # All gloo comes first, then the libraries that need it, side by side.
            places = ((not target.endswith("gloo"), number / len(files)) for number in range(len(files)))
            pairs = zip(places, files.items(), strict=True)
            found += [(*place, each) for place, (name, each) in pairs if (target, name) not in started]
    return [each for *_, each in sorted(found)]


def _name(target: str, file: str) -> str:
    """Return the name of a file, the same in each of the libraries that have it."""
    if target.endswith("gloo"):
        return f"gloo/{file}"
    if file.startswith("__/"):
        return file.removeprefix("__/")
    return f"{target.removeprefix('py')}/{file}"
