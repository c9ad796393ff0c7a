"""The progress of a build: recorded output of `make`, replayed by a fake clock on machines of several speeds."""

import re
from pathlib import Path

import pytest

from hvd_slowmo.cli.console import Console
from hvd_slowmo.installer.costs import cost
from hvd_slowmo.installer.progress import Estimate, Meter, after_line, begin, estimate, spell

OUTPUT = {
    together: (Path(__file__).parent / f"build_output_{name}.txt").read_text().splitlines()
    for together, name in ((True, "together"), (False, "alone"))
}
"""Of PyTorch and TensorFlow with two jobs, files in groups and one by one: the lines of files and libraries."""

LARGE = {
    True: ("tensorflow/Unity/unity_3_cxx.cxx", "tensorflow/Unity/unity_2_cxx.cxx", "torch/Unity/unity_3_cxx.cxx"),
    False: ("tensorflow/mpi_ops.cc", "torch/mpi_ops_v2.cc", "torch/adapter_v2.cc"),
}


def compiled(line):
    """Return the target and the file that a line tells of, as the build names it."""
    build = after_line(begin([], 1), line, 0.0)
    return (build.running[0].target, build.running[0].name) if build.running else None


def of(frameworks, together):
    """Return the recorded lines that a build for these frameworks has."""
    needs = {"torch": ["pytorch"], "tensorflow": ["tensorflow", "compatible17_gloo"]}
    left_out = [target for name, targets in needs.items() if name not in frameworks for target in targets]
    return [
        line
        for line in OUTPUT[together]
        if not any(re.search(rf"/{name}\.dir/|target {name}$", line) for name in left_out)
    ]


def replay(frameworks, jobs, pace, together):
    """Return the times of all lines and the end: each job takes the next file, in seconds of its cost times `pace`.

    pace: function of the time.
    """
    skew = 0.15 if together else 0.3  # how much costs differ from the table, either way; in groups it evens out
    free, lines, ends = [0.0] * jobs, [], {}
    for number, line in enumerate(of(frameworks, together)):
        found = compiled(line)
        if found is None:
            target = line.split()[-1]
            if "Built target" in line:
                lines.append((max([t for (name, _), t in ends.items() if name == target], default=0.0), line))
            continue
        job = free.index(min(free))
        odd = 1 + skew * ((7 * number) % 5 - 2) / 2
        lines.append((free[job], line))
        free[job] += cost(found[1]) * odd * pace(free[job])
        ends[found] = free[job]
    return sorted(lines, key=lambda pair: pair[0]), max(free)


def course(frameworks, jobs, pace, together):
    """Return (time, estimate) at a hundred times of a build, and its end."""
    lines, end = replay(frameworks, jobs, pace, together)
    build, found = begin(frameworks, jobs, together), []
    for tick in (end * share / 100 for share in range(100)):
        while lines and lines[0][0] <= tick:
            seconds, line = lines.pop(0)
            build = after_line(build, line, seconds)
        found.append((tick, estimate(build, tick)))
    return found, end


BOTH = ["torch", "tensorflow"]
CASES = [
    (frameworks, jobs, slow, together)
    for frameworks in (["torch"], ["tensorflow"], BOTH)
    for jobs in (1, 2, 4, 6, 8)
    for slow in (0.5, 8.0)
    for together in (True, False)
]


@pytest.mark.slow
@pytest.mark.parametrize(("frameworks", "jobs", "slow", "together"), CASES)
def test_share_and_time_left_are_those_of_the_build(frameworks, jobs, slow, together):
    found, end = course(frameworks, jobs, lambda seconds: slow, together)
    tolerance = 0.25 if jobs < 4 else 0.4  # of many jobs, most have nothing to do at the end
    for seconds, each in found:
        if seconds > 0.15 * end and (jobs < 4 or each.left is not None):
            assert abs(each.left - (end - seconds)) < tolerance * end, seconds
        if jobs == 1:
            assert abs(each.percent - 100 * seconds / end) < 10, seconds
    # As many jobs as groups are all at work from the beginning, and the largest one is the last.
    assert found[-1][1].percent >= (90 if jobs < 4 else 60 if together else 85)
    assert sum(each.percent >= 98 for _, each in found) < 6  # of 100 times


@pytest.mark.parametrize("together", [True, False])
def test_a_machine_that_becomes_slower_is_noticed(together):
    begun = 90 if together else 200
    found, end = course(BOTH, 2, lambda seconds: 1.0 if seconds < begun else 5.0, together)
    for seconds, each in found:
        if seconds > 2.5 * begun:
            assert 0.1 * (end - seconds) - 10 < each.left < 2 * (end - seconds) + 150, seconds
    # Of 100 times; a group that comes last takes a fifth of the time here.
    assert sum(each.percent >= (99 if together else 98) for _, each in found) < 6


@pytest.mark.parametrize("together", [True, False])
def test_the_large_files_are_named_with_their_age(together):
    found, _ = course(BOTH, 2, lambda seconds: 8.0, together)
    for file in LARGE[together]:
        ages = [each.age for _, each in found if each.file == file]
        assert ages == sorted(ages)
    last = found[-1][1]
    assert last.file
    assert last.age > 0


@pytest.mark.parametrize("together", [True, False])
def test_each_known_file_is_in_the_table(together):
    build = begin(BOTH, 2, together)
    for line in OUTPUT[together]:
        build = after_line(build, line, 0.0)
    assert estimate(build, 1.0).left is None or not build.running
    assert set(build.targets) == {"gloo", "compatible17_gloo", "pytorch", "tensorflow"}
    assert build.built == set(build.targets)
    assert Meter(BOTH, 2, together).processor_seconds == sum(cost(name) for _, name in build.compiled)
    assert min(map(cost, LARGE[together])) > max(
        cost(name) for _, name in build.compiled if name not in LARGE[together]
    )


@pytest.mark.parametrize(("frameworks", "least", "most"), [(["torch"], 2, 3), (BOTH, 4, 6)])
def test_the_time_that_is_announced_is_that_of_measured_builds(frameworks, least, most):
    """Compiling for PyTorch alone took 150 s of a processor, for both frameworks 290 s."""
    assert least <= Meter(frameworks, 2).processor_seconds / 60 <= most


def test_files_and_libraries_that_nobody_expected():
    meter = Meter(["torch"], 2)
    meter.read("[  1%] Building CUDA object horovod/common/ops/cuda/CMakeFiles/kernels.dir/cuda_kernels.cu.o", 3.0)
    assert meter.at(4.0) == (0, "compiling kernels/cuda_kernels.cu for 0 min 01 s")
    meter.read("[  1%] Building CXX object third_party/CMakeFiles/compatible_gloo.dir/allreduce.cc.o", 5.0)
    meter.read("some other line", 5.0)
    assert meter.at(8.0)[1].endswith("compiling kernels/cuda_kernels.cu for 0 min 05 s")


def test_nothing_is_known_before_the_first_file():
    assert Meter(BOTH, 2).at(60.0) == (None, "")


def test_a_second_pass_does_not_take_the_share_back():
    meter = Meter(BOTH, 2)
    for line in OUTPUT[True]:
        meter.read(line, 10.0)
    assert meter.at(20.0) == (100, "about 10 s left")
    meter.read("[ 28%] Built target compatible17_gloo", 21.0)
    assert meter.at(22.0)[0] == 100


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Estimate(1, None, "gloo/pair.cc", 3.4), "compiling gloo/pair.cc for 0 min 03 s"),
        (Estimate(60, 41.0, "a.cc", 61.0), "about 40 s left, compiling a.cc for 1 min 01 s"),
        (Estimate(60, 100.0, "", 0.0), "about 2 min left"),
        (Estimate(None, None, "", 0.0), ""),
    ],
)
def test_words(found, words):
    assert spell(found) == words


def test_the_console_prints_share_time_and_note(capsys):
    console = Console(verbose=False)
    console.progress("building", 71, 190.0, "about 2 min left")
    console.progress("building", 72, 195.0, "not yet")
    console.progress("fetching", None, 290.0)
    assert capsys.readouterr().out.splitlines() == [
        "  building:  71 %, 3 min 10 s, about 2 min left",
        "  fetching: 4 min 50 s",
    ]
