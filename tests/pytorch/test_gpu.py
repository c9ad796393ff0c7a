"""Tests that need a CUDA device. Over gloo two workers can share one device; NCCL wants one each."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import PROBLEMS, distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: there is no CUDA device here"),
]

TOLERANCE = 1e-12  # float64, values of size 1


@pytest.mark.workers
@pytest.mark.parametrize("devices", [["cuda"], ["cpu", "cuda"], ["cuda", "cpu"]])
@pytest.mark.parametrize("name", PROBLEMS)
def test_workers_on_a_device_equal_the_reference(workers, name, devices):
    problem = PROBLEMS[name]
    histories = workers(2).run("support.trainings.pytorch:run", problem=problem, chunk_bytes=40, devices=devices)
    assert distance(histories, problem) < TOLERANCE
    for step, snapshot in enumerate(problem.reference(2)):
        if snapshot.outer:
            assert np.array_equal(histories[0][step]["x"], histories[1][step]["x"])


@pytest.mark.workers
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: NCCL needs a device per worker")
@pytest.mark.parametrize("name", PROBLEMS)
def test_nccl_with_a_device_per_worker_equals_the_reference(nccl_workers, name):
    problem = PROBLEMS[name]
    histories = nccl_workers(2).run("support.jobs.pytorch:run_on_own_device", problem=problem)
    assert distance(histories, problem) < TOLERANCE


@pytest.mark.workers
def test_chunks_of_full_length_and_averaged_gradients(workers):
    """Several messages in flight, whose copies overlap with each other and with backward."""
    first, second = workers(2).run("support.jobs.pytorch:on_device", width=3000)
    assert first == second


@pytest.mark.workers
@pytest.mark.parametrize("gradients", ["local", "all"])
def test_an_inner_step_never_waits_for_the_device(workers, gradients):
    for said in workers(2).run("support.jobs.pytorch:without_synchronisation", gradients=gradients):
        assert said == "no synchronisation"


def test_an_outer_step_waits_for_the_device_once():
    model = nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 2)).cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SlowMo(base, model, SlowMoConfig(tau=1), comm=SoloComm())
    model(torch.randn(8, 30, device="cuda")).square().mean().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1  # True if all parameters are finite


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_outer_update_is_that_of_the_cpu(dtype, nesterov):
    start = nn.Linear(70, 30)
    for number, p in enumerate(start.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(number))

    def training(device):
        def work(comm):
            model = copy.deepcopy(start).to(device, dtype)
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            config = SlowMoConfig(tau=2, alpha=0.9, nesterov=nesterov)
            optimizer = SlowMo(base, model, config, comm=comm)
            for k in range(8):
                for number, p in enumerate(model.parameters()):
                    noise = torch.Generator().manual_seed(100 * comm.rank + 2 * k + number)
                    p.grad = torch.randn(p.shape, generator=noise).to(device, dtype)
                optimizer.step()
            return [p.detach().cpu() for p in model.parameters()]

        return ThreadWorld(2).run(work)

    for ours, theirs in zip(training("cuda"), training("cpu"), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler(fused):
    torch.manual_seed(1)
    ours = nn.Linear(3, 2).cuda()
    theirs = copy.deepcopy(ours)
    wrapped = SlowMo(
        torch.optim.Adam(ours.parameters(), lr=0.01, fused=fused), ours, SlowMoConfig.local_sgd(2), comm=SoloComm()
    )
    bare = torch.optim.Adam(theirs.parameters(), lr=0.01, fused=fused)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    for k in range(9):
        x = torch.randn(4, 3, device="cuda")
        for model, optimizer, scaler in ((ours, wrapped, scalers[0]), (theirs, bare, scalers[1])):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(x).square().mean()
            scaler.scale(loss * (float("inf") if k in (2, 5) else 1.0)).backward()
            if k % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert wrapped.steps == 9


@pytest.mark.workers
def test_join_and_averaged_parameters(workers):
    for own, inside, joined in workers(2).run("support.jobs.pytorch:uneven_on_device"):
        assert inside != own
        assert joined == pytest.approx(inside)


def test_a_device_has_its_own_copies_and_streams():
    """The staging alone equals a plain copy, while the stream is busy."""
    from hvd_slowmo_torch.comm.host_staging import CudaCopies, Outbox

    def submit(name, x):
        assert x.is_pinned()
        x.mul_(2)
        return name

    outbox = Outbox(submit, CudaCopies())
    x = torch.zeros(2**22, device="cuda")
    for number in range(20):
        torch.cuda._sleep(1_000_000)
        x.fill_(number)
        begun = outbox.put(str(number), x)
        while begun.handle is None:
            outbox.advance()
        assert bool((outbox.take(begun) == 2 * number).all())


@pytest.mark.parametrize("settings", [{}, {"delay": 1, "fragments": 2}, {"bits": 8}, {"shard": True}], ids=str)
def test_outer_state_in_host_memory_computes_the_same(settings):
    """A message at a time is copied to the device, on the stream of the work that reads it."""

    def work(comm, place):
        torch.manual_seed(0)
        model = nn.Linear(3000, 40).cuda()
        config = SlowMoConfig(tau=2, slow_state=place, **settings)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
        for k in range(9):
            for p in model.parameters():
                p.grad = p.detach() - float(k + comm.rank)
            optimizer.step()
        optimizer.join()
        kept = optimizer.worker.store
        flats = [t for parts in kept.vectors.values() for t in parts if t is not None]
        flats += [t for by_chunk in kept.slices.values() for t in by_chunk.values()]
        assert {t.device.type for t in flats} == {"cpu" if place == "host" else "cuda"}
        return copy.deepcopy(model.cpu().state_dict())

    device, host = (ThreadWorld(2).run(lambda comm, p=p: work(comm, p)) for p in ("device", "host"))
    for a, b in zip(device, host, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
