"""Many workers in one process: the same training as on as many threads, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.outer_update import scaled_sum
from hvd_slowmo.torch import DPSGD, SGP, Simulation, SlowMo, SlowMoConfig
from hvd_slowmo_torch.simulator.shares import Shares
from hvd_slowmo_torch.simulator.stack import StackCodec, StackComm, mean_of, scaled_sum_
from hvd_slowmo_torch.tensors import outer_update

WORKERS, STEPS, BATCH = 4, 13, 8

Snapshot = dict[str, torch.Tensor]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    # No bias in front of BatchNorm: its gradient is rounding alone, which Adam would enlarge.
    layers = nn.Linear(6, 20, bias=False), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 2)
    model = nn.Sequential(*layers).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def batch(worker: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :2] * (1 + worker)).to(dtype)


def batches(step: int, workers: int = WORKERS, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    pairs = [batch(worker, step, dtype) for worker in range(workers)]
    return [torch.stack(part) for part in zip(*pairs, strict=True)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def values(model: nn.Module) -> Snapshot:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def on_threads(
    config: SlowMoConfig, inner: Callable[[Any], Any], dtype: torch.dtype = torch.float64, workers: int = WORKERS
) -> list[tuple[list[Snapshot], Snapshot]]:
    """Return each worker's values after every step, and the workers' mean after the last."""

    def work(comm: Any) -> tuple[list[Snapshot], Snapshot]:
        model, history = network(dtype), []
        optimizer = SlowMo(inner(model.parameters()), model, config, comm=comm)
        for step in range(STEPS):
            x, y = batch(comm.rank, step, dtype)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            history.append(values(model))
        with optimizer.averaged_parameters():
            return history, values(model)

    return ThreadWorld(workers).run(work)


def differences(a: Snapshot, b: Snapshot) -> torch.Tensor:
    assert a.keys() == b.keys()
    return torch.cat([(a[name].double() - b[name].double()).abs().flatten() for name in a])


def distance(a: Snapshot, b: Snapshot) -> float:
    return float(differences(a, b).max())


BASES: dict[str, tuple[SlowMoConfig, Callable[[Any], Any]]] = {
    "Local SGD": (SlowMoConfig.local_sgd(4), sgd),
    "SlowMo": (SlowMoConfig(tau=4, alpha=0.9), sgd),
    "SlowMo over Adam, inner state reset": (SlowMoConfig(tau=3, inner_state="reset"), adam),
    "SlowMo over Adam, inner state averaged": (SlowMoConfig(tau=3, inner_state="average"), adam),
    "DiLoCo": (SlowMoConfig.diloco(tau=4), adam),
    "AR-SGD": (SlowMoConfig.ar_sgd(), sgd),
    "Lookahead over averaged gradients": (SlowMoConfig.lookahead(tau=3, gradients="all"), sgd),
    "warm-up": (SlowMoConfig(tau=3, warmup_steps=4, inner_state="reset"), sgd),
    "SGP": (SlowMoConfig.sgp(), sgd),
    "SGP on a star, whose weights leave 1, under SlowMo": (SlowMoConfig.sgp(topology="star", tau=5), sgd),
    "OSGP": (SlowMoConfig.osgp(topology="star"), sgd),
    "OSGP under SlowMo": (SlowMoConfig.osgp(tau=5, inner_state="reset"), sgd),
    "OSGP with warm-up": (SlowMoConfig.osgp(tau=4, warmup_steps=3), sgd),
    "D-PSGD": (SlowMoConfig.dpsgd(topology="ring"), sgd),
    "D-PSGD under SlowMo": (SlowMoConfig(gossip=DPSGD(), tau=4), adam),
    "noaverage": (SlowMoConfig(gossip=SGP(topology="star"), average=False, tau=4), sgd),
    "noaverage with overlap": (SlowMoConfig(gossip=SGP(topology="star", overlap=True), average=False, tau=3), sgd),
    "noaverage, Nesterov": (SlowMoConfig(gossip=SGP(), average=False, tau=3, nesterov=True), sgd),
    "fragments": (SlowMoConfig(tau=5, fragments=3), sgd),
    "a late exchange": (SlowMoConfig(tau=4, delay=2, warmup_steps=2), sgd),
    "streaming with a delay": (SlowMoConfig(tau=4, fragments=4, delay=3), adam),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.slow
@pytest.mark.sample("SlowMo", "warm-up", "OSGP under SlowMo", "D-PSGD", "noaverage", "streaming with a delay")
def test_a_simulation_trains_as_threads_do_at_every_step(name: str) -> None:
    config, inner = BASES[name]
    threads = on_threads(config, inner)
    simulation = Simulation(network(), inner, nn.functional.mse_loss, WORKERS, config)
    for step in range(STEPS):
        simulation.step(*batches(step))
        for worker in range(WORKERS):
            assert distance(values(simulation.model(worker)), threads[worker][0][step]) < 1e-11, (step, worker)
    assert simulation.steps == STEPS
    assert distance(values(simulation.mean_model()), threads[0][1]) < 1e-11


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4}, {"bits": 16}, {"bits": 8, "fragments": 4, "delay": 1}])
@pytest.mark.slow
@pytest.mark.sample("settings2")
def test_few_bits_withhold_the_same_as_on_threads(settings: dict[str, Any]) -> None:
    config = SlowMoConfig(tau=4, **settings)
    threads = on_threads(config, sgd, torch.float32)
    simulation = Simulation(network(torch.float32), sgd, nn.functional.mse_loss, WORKERS, config)
    exact = Simulation(network(torch.float32), sgd, nn.functional.mse_loss, WORKERS, SlowMoConfig(tau=4))
    for step in range(STEPS):
        simulation.step(*batches(step, dtype=torch.float32))
        exact.step(*batches(step, dtype=torch.float32))
        for worker in range(WORKERS):
            away = differences(values(simulation.model(worker)), threads[worker][0][step])
            # Rounding of the mean may tip a value to the next code, and error feedback makes up for it later.
            assert float((away > 1e-5).double().mean()) < 0.01, (step, worker)
            assert float(away.max()) < 1e-4, (step, worker)
    assert distance(values(simulation.model(0)), values(exact.model(0))) > 3e-4  # so that few bits are seen at all


def test_batch_norm_is_per_replica_and_averaged_at_an_outer_step() -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, 3, SlowMoConfig(tau=2))
    x, y = batches(0, 3)
    simulation.step(x, y)
    expected = []
    for worker in range(3):
        model = network()
        model(x[worker])
        expected.append(model[1].running_mean)
        torch.testing.assert_close(simulation.model(worker)[1].running_mean, expected[worker])
    assert not torch.allclose(expected[0], expected[1])
    torch.testing.assert_close(simulation.mean_model()[1].running_mean, sum(expected) / 3)
    simulation.step(*batches(1, 3))
    assert torch.equal(simulation.model(0)[1].running_mean, simulation.model(2)[1].running_mean)
    assert simulation.model(1)[1].num_batches_tracked == 2


@torch.no_grad()
def flat(simulation: Simulation) -> torch.Tensor:
    return torch.stack([nn.utils.parameters_to_vector(simulation.model(w).parameters()) for w in range(WORKERS)])


def test_drift_is_the_distance_of_the_workers_from_their_mean() -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, WORKERS, SlowMoConfig(tau=3))
    assert simulation.drift() == 0
    simulation.step(*batches(0))
    own = flat(simulation)
    mean = own.mean(dim=0)
    expected = ((own - mean).square().sum(dim=1).mean() / mean.square().sum()).sqrt()
    assert simulation.drift() == pytest.approx(float(expected), rel=1e-12)
    for step in (1, 2):
        simulation.step(*batches(step))
    assert simulation.drift() == 0  # an outer step


def test_losses_and_a_metric_are_those_of_the_models() -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, WORKERS, SlowMoConfig(tau=3))
    x, y = batches(0)
    losses = simulation.step(x, y)
    for worker in range(WORKERS):
        expected = float(nn.functional.mse_loss(network()(x[worker]), y[worker]).detach())
        assert float(losses[worker]) == pytest.approx(expected)
    mean = simulation.mean_model()
    assert not mean.training
    expected = float(nn.functional.mse_loss(mean(x[0]), y[0]).detach())
    assert simulation.evaluate(x[0], y[0], nn.functional.mse_loss) == pytest.approx(expected)


def test_a_scheduler_of_the_inner_optimizer_sets_the_rates() -> None:
    config, factor = SlowMoConfig(tau=2, beta=0.6), 0.7

    def work(comm: Any) -> Snapshot:
        model = network()
        optimizer = SlowMo(sgd(model.parameters()), model, config, comm=comm)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
        for step in range(6):
            x, y = batch(comm.rank, step)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
        return values(model)

    simulation = Simulation(network(), sgd, nn.functional.mse_loss, WORKERS, config)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(simulation.inner_optimizer, factor)
    for step in range(6):
        simulation.step(*batches(step))
        scheduler.step()
    assert distance(values(simulation.model(1)), ThreadWorld(WORKERS).run(work)[1]) < 1e-11


def test_two_parameter_groups_keep_their_rates() -> None:
    def groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": others, "lr": 0.02}, {"params": [first], "lr": 0.1}], momentum=0.9)

    config = SlowMoConfig(tau=3)
    threads = on_threads(config, groups)
    simulation = Simulation(network(), groups, nn.functional.mse_loss, WORKERS, config)
    for step in range(STEPS):
        simulation.step(*batches(step))
    assert distance(values(simulation.model(2)), threads[2][0][-1]) < 1e-11


def test_a_function_makes_the_model_with_the_seed_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def first_weights(seed: int) -> torch.Tensor:
        made = Simulation(lambda: nn.Linear(3, 2), sgd, nn.functional.mse_loss, 2, seed=seed)
        return made.model(0).weight

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_parameter_is_common_and_stays() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    simulation = Simulation(model, sgd, nn.functional.mse_loss, 2, SlowMoConfig(tau=2))
    for step in range(3):
        simulation.step(*batches(step, 2))
    assert torch.equal(simulation.model(1)[0].weight, model[0].weight)
    assert not torch.equal(simulation.model(1)[3].weight, model[3].weight)


def test_one_worker_is_the_inner_optimizer_alone() -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, 1, SlowMoConfig.local_sgd(1))
    model = network()
    optimizer = sgd(model.parameters())
    for step in range(4):
        x, y = batch(0, step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        simulation.step(x[None], y[None])
    assert distance(values(simulation.model(0)), values(model)) < 1e-12


@pytest.mark.parametrize("settings", [{}, {"delay": 1}])
def test_values_that_are_not_finite_name_their_workers(settings: dict[str, Any]) -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, WORKERS, SlowMoConfig(tau=2, **settings))
    x, y = batches(0)
    y[2] = np.nan
    for _ in range(1 + settings.get("delay", 0)):
        simulation.step(x, y)
    with pytest.raises(ValueError, match=r"not finite .* on 1 of 4 workers \(2\) after step [23]"):
        simulation.step(*batches(1))


def test_a_mean_of_values_that_are_not_finite_names_their_workers() -> None:
    simulation = Simulation(network(), sgd, nn.functional.mse_loss, WORKERS, SlowMoConfig(tau=8))
    x, y = batches(0)
    y[1:3] = np.inf
    simulation.step(x, y)
    with pytest.raises(ValueError, match=r"on 2 of 4 workers \(1, 2\) after step 1\. A lower learning rate"):
        simulation.mean_model()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"gradients": "node"}, "gradients='node' .* batches of its workers"),
        ({"shard": True}, "shard=True .* changes no result"),
        ({"slow_state": "host"}, "slow_state='host' .* changes no result"),
        ({"nonfinite": "exclude"}, "nonfinite='exclude' .* one weight"),
    ],
)
def test_settings_that_cannot_be_simulated_are_refused_with_the_reason(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Simulation(network(), sgd, nn.functional.mse_loss, 4, SlowMoConfig(**settings))


class LARS(torch.optim.SGD):
    """Stands for an optimizer with a norm per parameter."""


def test_optimizers_that_would_mix_the_replicas_are_refused() -> None:
    for made in (LARS, torch.optim.LBFGS):
        with pytest.raises(ValueError, match=f"{made.__name__} .* would mix the replicas"):
            Simulation(network(), lambda p, made=made: made(p, lr=0.1), nn.functional.mse_loss, 2)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`workers` must be a positive integer\. Received: workers=0"):
        Simulation(network(), sgd, nn.functional.mse_loss, 0)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        Simulation(network(), lambda parameters: None, nn.functional.mse_loss, 2)
    normalized = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="spectral normalization"):
        Simulation(normalized, sgd, nn.functional.mse_loss, 2)


@pytest.mark.parametrize("messages", [0, 1, 3, 4, 5])
def test_a_push_sends_each_worker_its_shares_and_nothing_else(messages: int) -> None:
    """Up to four messages are picked, more are a product of matrices."""
    rng = np.random.default_rng(messages)
    shares = np.zeros((7, 7))
    for receiver in range(7):
        others = rng.permutation(7)[: messages if receiver else messages // 2]  # not all receive as many
        shares[receiver, others] = rng.random(len(others))
    x = torch.from_numpy(rng.normal(size=(5, 7)))
    comm = StackComm(StackCodec(), 32)
    for _ in range(2):  # in the same memory
        found = comm.start_push("gossip.0", x, Shares(shares))
        torch.testing.assert_close(found, x @ torch.from_numpy(shares).T)
    weights = rng.random((7, 1))
    np.testing.assert_allclose(Shares(shares) @ weights, shares @ weights, rtol=1e-14)
    broken = int(np.argmin(shares.sum(axis=0)))
    x[:, broken] = torch.inf
    if 0 < messages <= 4:  # infinity arrives where it is sent to
        finite = comm.start_push("gossip.0", x, Shares(shares)).isfinite().all(dim=0).numpy()
        elsewhere = np.arange(7) != broken
        assert np.array_equal(finite[elsewhere], shares[elsewhere, broken] == 0)


@pytest.mark.parametrize("into", ["x", "y", "other"])
def test_the_scaled_sum_in_place_is_the_pure_one(into: str) -> None:
    x, y, other = torch.randn(3, 6, 4, dtype=torch.float64)
    for factor, in_place in ((1.5, outer_update.scaled_sum_), (torch.randn(4, dtype=torch.float64), scaled_sum_)):
        memory = {"x": x.clone(), "y": y.clone(), "other": other.clone()}
        found = in_place(memory["x"], factor, memory["y"], partial(memory.__getitem__, into))
        torch.testing.assert_close(found, scaled_sum(x, factor, y, lambda: None), rtol=0, atol=1e-14)
        assert found.data_ptr() == memory[into].data_ptr()


def test_a_mean_of_many_workers_is_taken_in_parts() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(100_000, 5)))
    torch.testing.assert_close(mean_of(x), x.mean(dim=1, keepdim=True))
    alike = x[:, :1].expand(-1, 3)
    assert torch.equal(mean_of(alike), x[:, :1])


class Odd(nn.Module):
    """A sum of two parameters, whose gradients are one tensor, a bare mean, whose gradient is expanded, and a rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.mean, self.rest = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))

    def forward(self, x: Any) -> torch.Tensor:
        return (self.first + self.second) * x + self.mean.mean()


class InPlace(torch.optim.SGD):
    """Doubles the gradients, and then takes a step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(2)
        super().step(closure)


def test_gradients_are_those_of_backward_also_where_it_shares_expands_or_has_none() -> None:
    def inner(parameters: Any) -> torch.optim.Optimizer:
        return InPlace(list(parameters), lr=0.1, momentum=0.9, weight_decay=0.1)  # decay: none is not 0

    simulation = Simulation(Odd, inner, nn.functional.mse_loss, 2, SlowMoConfig.local_sgd(3))
    models = [Odd(), Odd()]
    optimizers = [inner(model.parameters()) for model in models]
    x, y = torch.rand(2, 8, 3), torch.rand(2, 8, 3)
    for _ in range(2):
        simulation.step(x, y)
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[worker]), y[worker]).backward()
            optimizer.step()
            assert distance(values(simulation.model(worker)), values(model)) < 1e-6
    assert torch.equal(simulation.model(0).rest, torch.ones(2))


def test_what_torch_func_has_no_rule_for_trains_as_by_backward() -> None:
    """LayerNorm's forward and backward under autocast; statistics and dropout see the first step once."""
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 2)

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output.float(), y)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    model = nn.Sequential(*layers)
    simulation = Simulation(model, sgd, loss, 1, SlowMoConfig.local_sgd(3))
    optimizer = sgd(model.parameters())
    x, y = torch.rand(1, 8, 6), torch.rand(1, 8, 2)
    for seed in range(3):
        for alone in (True, False):
            torch.manual_seed(seed)
            with autocast():
                if not alone:
                    simulation.step(x, y)
                    continue
                optimizer.zero_grad()
                loss(model(x[0]), y[0]).backward()
                optimizer.step()
        assert distance(values(simulation.model(0)), values(model)) < 0.02  # bfloat16 has 8 bits
    assert int(simulation.model(0)[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, y: output.detach().square().mean(), "depends on no parameter"),
        (lambda output, y: (output - y).square().mean(dim=1), r"one number for a worker's batch.*shape \(8,\)"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, words: str) -> None:
    simulation = Simulation(network(), sgd, loss, 2)
    with pytest.raises(ValueError, match=words):
        simulation.step(*batches(0, 2))
    one = Simulation(network(), sgd, lambda output, y: (output - y).square().mean().reshape(1), 2)
    assert one.step(*batches(0, 2)).shape == (2,)
