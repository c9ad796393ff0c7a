"""A training function that Horovod, Ray or Spark starts on several workers, as from a notebook.

Run it with: python examples/launch_function.py --with horovod
Or on Ray (needs the package ray): python examples/launch_function.py --with ray
Or on Spark (needs pyspark, pyarrow and Java): python examples/launch_function.py --with spark
Or as a script: torchrun --nproc-per-node 2 examples/launch_function.py
"""

import argparse
import hashlib
import os
import sys


def train(steps: int, lr: float) -> dict:
    """Train this worker's part of a model that tells points inside a circle; all workers return the same model.

    The function is pickled by value, so it imports what it uses.
    """
    import torch
    from torch import nn

    import hvd_slowmo.torch as slowmo

    slowmo.init()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    points = torch.randn(4096, 2)
    inside = (points.norm(dim=1, keepdim=True) < 1).float()
    mine = slice(slowmo.rank(), 3072, slowmo.size())  # the last 1024 points are for the test

    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), model, tau=12, beta=0.5)
    generator = torch.Generator().manual_seed(slowmo.rank())
    for _ in range(steps):
        batch = torch.randint(len(points[mine]), (32,), generator=generator)
        loss = nn.functional.binary_cross_entropy_with_logits(model(points[mine][batch]), inside[mine][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.join()
    with torch.no_grad():
        accuracy = 100 * ((model(points[3072:]) > 0) == (inside[3072:] > 0)).float().mean().item()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return {"rank": slowmo.rank(), "size": slowmo.size(), "accuracy": accuracy, "weights": weights}


def with_horovod(workers: int, options: dict) -> list[dict]:
    """Start the function on this machine."""
    import horovod

    return horovod.run(train, kwargs=options, num_proc=workers)


def with_ray(workers: int, options: dict) -> list[dict]:
    """Start the function on a Ray cluster; here one of this machine's cores."""
    import ray
    from horovod.ray import RayExecutor

    ray.init(num_cpus=workers, include_dashboard=False)
    executor = RayExecutor(RayExecutor.create_settings(timeout_s=120), num_workers=workers)
    executor.start()
    try:
        return executor.run(train, kwargs=options)
    finally:
        executor.shutdown()
        ray.shutdown()


def with_spark(workers: int, options: dict) -> list[dict]:
    """Start the function in a Spark job, one worker per task; here on this machine's cores."""
    import horovod.spark
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else Spark takes the first python3 of the PATH
    spark = SparkSession.builder.master(f"local[{workers}]").appName("slowmo").getOrCreate()
    try:
        return horovod.spark.run(train, kwargs=options, num_proc=workers)
    finally:
        spark.stop()


STARTS = {"horovod": with_horovod, "ray": with_ray, "spark": with_spark}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="start", choices=STARTS, help="start the workers (default: be one of them)")
    parser.add_argument("--workers", type=int, default=2, help="number of workers to start (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of each worker (default: %(default)s)")
    args = parser.parse_args()
    options = {"steps": args.steps, "lr": 0.1}
    results = STARTS[args.start](args.workers, options) if args.start else [train(**options)]
    for result in results:
        digest = hashlib.sha256(b"".join(value.tobytes() for value in result["weights"].values())).hexdigest()
        place = f"rank {result['rank']} of {result['size']}"
        print(f"{place}: test accuracy {result['accuracy']:.1f} %, weights {digest[:16]}")


if __name__ == "__main__":
    main()
