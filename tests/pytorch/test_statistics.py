"""Tensors that are not trained: vectors of length 1, buffers that stay a worker's own, parameters that are averaged."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld


def optimizer_of(model, comm=None, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    return slowmo.SlowMo(
        torch.optim.SGD(trained, lr=0.1), model, slowmo.SlowMoConfig(tau=2), comm=comm or SoloComm(), **options
    )


@pytest.mark.parametrize("form", [old_spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("chunk_bytes", [8, 2**20])
def test_spectral_norms_vectors_keep_their_length(form, chunk_bytes, monkeypatch):
    """In the mean each worker's vector has its share: (1, 0) and (0, 1) become (1, 1) / sqrt(2)."""
    monkeypatch.setattr(slowmo.SlowMo, "_chunk_bytes", chunk_bytes)

    def work(comm):
        model = form(nn.Linear(2, 2))
        optimizer = optimizer_of(model, comm)
        vectors = dict(model.named_buffers())
        for vector in vectors.values():
            vector.copy_(torch.eye(2)[comm.rank])
        with optimizer.averaged_parameters():
            inside = [vector.clone() for vector in vectors.values()]
        optimizer.step()
        optimizer.step()
        return [*inside, *vectors.values()]

    for vectors in ThreadWorld(2).run(work):
        for vector in vectors:
            torch.testing.assert_close(vector, torch.full([2], 0.5**0.5))


@pytest.mark.parametrize("form", [old_spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("chunk_bytes", [12, 2**20])
def test_spectral_norms_vectors_of_opposite_signs_do_not_end_as_noise(form, chunk_bytes, monkeypatch):
    """Both u, v and -u, -v are a pair of singular vectors: their mean is no direction at all."""
    monkeypatch.setattr(slowmo.SlowMo, "_chunk_bytes", chunk_bytes)

    def work(comm):
        linear = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.arange(12.0).reshape(4, 3) - 4)
        model = form(linear)
        optimizer = optimizer_of(model, comm)
        for vector in model.buffers():
            vector.mul_(1 - 2 * comm.rank).add_(1e-6 * comm.rank)
        optimizer.step()
        optimizer.join()
        model.eval()
        return torch.linalg.matrix_norm(model(torch.eye(3)), ord=2).item(), [v.clone() for v in model.buffers()]

    (norm, vectors), (_, others) = ThreadWorld(2).run(work)
    assert norm == pytest.approx(1.0, abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(vectors, others, strict=True))


class WithTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("statistics", "queue", "teacher"),
    [(None, 0.5, None), ({"queue": False}, None, None), ({"teacher.*": True, "queue": False}, None, 0.5)],
)
def test_named_tensors_are_averaged_or_left_alone(statistics, queue, teacher, tmp_path):
    def work(comm):
        model = WithTeacher()
        optimizer = optimizer_of(model, comm, statistics=statistics)
        for tensor in (model.queue, model.teacher.weight, model.teacher.bias):
            tensor.fill_(comm.rank)
        optimizer.step()
        optimizer.join()
        optimizer.save(tmp_path / "x")
        found = [model.queue[0].item(), model.teacher.weight.item()]
        model.teacher.weight.fill_(7)
        optimizer.load(tmp_path / "x")
        return [*found, model.teacher.weight.item()]

    for rank, found in enumerate(ThreadWorld(2).run(work)):
        each = rank if teacher is None else teacher
        assert found == [rank if queue is None else queue, each, each]


def test_nonsense_is_refused():
    model = WithTeacher()
    with pytest.raises(ValueError, match=r"has 'student.weight', and no tensor .* teacher.weight, teacher.bias"):
        optimizer_of(model, statistics={"student.weight": True})
    with pytest.raises(TypeError, match=r"averages count, which has type torch.int64"):
        optimizer_of(model, statistics={"count": True})
    for wrong in (["queue"], {"queue": "own"}, {3: True}):
        with pytest.raises(TypeError, match="must map patterns of names to bools"):
            optimizer_of(model, statistics=wrong)
    with pytest.raises(ValueError, match="give no `statistics`"):
        optimizer_of(model, statistics={"queue": False}, parameter_map=slowmo.ParameterMap())


def test_a_buffer_that_appears_later_is_left_alone_by_choice(caplog):
    """The caches of rotary embeddings come with the first batch, and grow with the longest one."""

    def work(comm):
        model = nn.Linear(1, 1)
        optimizer = optimizer_of(model, comm, statistics={"*cache": False})
        for length in (2, 3 + comm.rank):
            model.register_buffer("cos_cache", torch.full([length], float(comm.rank)), persistent=False)
            optimizer.step()
        optimizer.join()
        model.register_buffer("mean", torch.zeros(1))
        with pytest.raises(ValueError, match="there is a new buffer mean"):
            optimizer.join()
        return model.cos_cache.tolist()

    with caplog.at_level("WARNING", logger="hvd_slowmo"):
        assert ThreadWorld(2).run(work) == [[0.0] * 3, [1.0] * 4]
    assert "'*cache', and no tensor of that name is there" in caplog.text


def test_a_teacher_that_is_trained_from_now_on_is_no_statistic_any_more():
    def work(comm):
        model = WithTeacher()
        optimizer = optimizer_of(model, comm, statistics={"teacher.*": True})
        nn.init.constant_(model.teacher.weight, 3.0 * comm.rank)
        optimizer.step()
        optimizer.join()
        assert model.teacher.weight.item() == 1.5
        model.teacher.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.teacher.parameters()), "lr": 1.0})
        layout = optimizer.worker.assembly.layout
        names = [ref.spec.name for ref in layout.refs_of("parameter", "statistic")]
        assert sorted(names) == ["queue", "student.bias", "student.weight", "teacher.bias", "teacher.weight"]
        optimizer.zero_grad()
        (model.teacher.weight * (1.0 + 2 * comm.rank)).sum().backward()
        optimizer.step()
        return model.teacher.weight.item()

    assert ThreadWorld(2).run(work) == [-0.5, -0.5]
