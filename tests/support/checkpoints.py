"""Checkpoints of PyTorch workers on threads: saved, loaded and damaged."""

from hvd_slowmo.comm import ThreadWorld
from support.problems import Problem
from support.trainings.pytorch import advance, build, held

RESET = Problem({"tau": 4, "buffers": "reset"}, options={"momentum": 0.875})


def saved(path, workers, steps, problem=RESET, join=False, before=lambda optimizer: None):
    """A checkpoint of so many workers after so many steps; what they held."""

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        before(optimizer)
        advance(problem, model, optimizer, comm.rank, range(steps))
        if join:
            optimizer.join()
        optimizer.save(path)
        return held(model, optimizer)

    return ThreadWorld(workers).run(work)


def loaded(path, workers, problem=RESET, then=0):
    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        optimizer.load(path)
        advance(problem, model, optimizer, comm.rank, range(optimizer.steps, optimizer.steps + then))
        return held(model, optimizer)

    return ThreadWorld(workers).run(work)


def damaged(files, rng):
    """One of the files, with something wrong."""
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    at = int(rng.integers(len(data)))
    kind = ["flip", "header", "byte", "truncate", "append", "cut", "swap"][rng.integers(7)]
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "header":
        data[at % (8 + int.from_bytes(data[:8], "little"))] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        data[at] = (data[at] + int(rng.integers(1, 256))) % 256
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += bytes(int(rng.integers(1, 9)))
    elif kind == "cut":
        del data[at]
    else:
        other = files[(files.index(file) + 1) % len(files)]
        data = bytearray(other.read_bytes())
    file.write_bytes(data)
    return kind


def files(path):
    """All of a checkpoint's, by what is behind the checkpoint's name."""
    return {file.name[len(path.name) :]: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}
