"""Models that change by other means than steps: frozen layers, loaded values, buffers and types of another form."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import swa_utils

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.threads import ThreadWorld


def one_weight(comm, value=0.0, lr=1.0, **config):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return model, slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(**config), comm=comm)


def step(model, optimizer, gradient):
    model.weight.grad = torch.full_like(model.weight, gradient)
    optimizer.step()


# Averages of the weights


@pytest.mark.slow
def test_an_averaged_model_that_is_updated_after_each_join_is_the_same_on_all_workers():
    """AveragedModel then averages the workers' means: equal values, that of each epoch's end in the average."""

    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.0)
        average, ends = swa_utils.AveragedModel(model), []
        for _ in range(3):
            for _ in range(3):
                step(model, optimizer, -1.0 - comm.rank)
            optimizer.join()
            average.update_parameters(model)
            ends.append(model.weight.item())
        return average.module.weight.item(), ends

    first, second = ThreadWorld(2).run(work)
    assert first == second == (pytest.approx(9.0), [4.5, 9.0, 13.5])


# Frozen parameters


@pytest.mark.parametrize("how", ["join", "averaged_parameters", "outer step"])
def test_a_parameter_that_was_trained_and_then_frozen_is_averaged(how):
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.0)
        step(model, optimizer, -1.0 - comm.rank)
        model.weight.requires_grad_(False)
        if how == "join":
            optimizer.join()
        elif how == "outer step":
            optimizer.step()  # a step without gradients
        else:
            with optimizer.averaged_parameters():
                return model.weight.item()
        return model.weight.item()

    expected = [1.5, 1.5] if how != "outer step" else None
    found = ThreadWorld(2).run(work)
    if expected is None:  # the gradients are still there, and PyTorch's SGD applies them
        assert found == [3.0, 3.0]
    else:
        assert found == expected


def test_a_frozen_parameter_stays_to_the_bit_and_does_not_jump_afterwards():
    """Momentum from before the freeze is forgotten, not applied when it ends."""

    def work(comm):
        model, optimizer = one_weight(comm, value=1 / 3, tau=1, beta=0.5)
        step(model, optimizer, -1.0)
        frozen = model.weight.item()
        model.weight.requires_grad_(False)
        model.weight.grad = None
        for _ in range(3):
            optimizer.step()
        assert model.weight.item() == frozen
        model.weight.requires_grad_(True)
        step(model, optimizer, 0.0)
        return frozen, model.weight.item()

    for before, after in ThreadWorld(3).run(work):
        assert after == before


def test_a_parameter_that_one_worker_has_moved_becomes_equal_on_all():
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.0)
        model.weight.requires_grad_(comm.rank == 1)
        if comm.rank == 1:
            step(model, optimizer, -4.0)
        else:
            optimizer.step()
        optimizer.step()
        return model.weight.item()

    assert len(set(ThreadWorld(2).run(work))) == 1


# Values from outside


@pytest.mark.parametrize("how", ["load", "data", "restart"])
def test_loaded_values_are_no_progress(how, caplog):
    """Zero gradients after loading 1 into a weight of 0 leave 1."""

    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        if how == "data":  # a change that PyTorch does not count
            model.weight.data.fill_(1.0)
        else:
            model.load_state_dict({"weight": torch.ones(1, 1)})
        if how == "restart":
            optimizer.restart()
        for _ in range(6):
            step(model, optimizer, 0.0)
        return model.weight.item()

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        assert ThreadWorld(2).run(work) == [1.0, 1.0]
    assert ("given other values from outside on rank 0, rank 1" in caplog.text) == (how != "restart")


def test_a_frozen_parameter_that_is_written_by_way_of_data_does_not_stay_apart():
    """After a join nobody has moved it; then one worker's teacher, say, follows its student."""

    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        model.weight.requires_grad_(False)
        for _ in range(2):
            optimizer.step()
        optimizer.join()
        if comm.rank == 1:
            model.weight.data.fill_(1.0)
        for _ in range(2):
            optimizer.step()
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [0.5, 0.5]


@pytest.mark.parametrize("how", ["load", "restart"])
def test_values_loaded_where_a_join_had_nothing_to_average(how):
    """The epoch is a multiple of tau: the join writes nothing, and what is loaded after it is noticed all the same."""

    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(2):
            step(model, optimizer, -1.0)
        optimizer.join()
        model.load_state_dict({"weight": torch.full((1, 1), 1.0 + (comm.rank if how == "restart" else 0))})
        if how == "restart":
            optimizer.restart()
        for _ in range(6):
            step(model, optimizer, 0.0)
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [1.0, 1.0]


def test_values_on_one_worker_between_two_joins_do_not_leave_it_apart():
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        optimizer.join()
        if comm.rank == 1:
            model.load_state_dict({"weight": torch.ones(1, 1)})
        optimizer.join()
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [0.5, 0.5]


def test_a_restart_reaches_frozen_parameters():
    def work(comm):
        model, optimizer = one_weight(comm, tau=1, beta=0.5)
        model.weight.requires_grad_(False)
        optimizer.step()  # from here on it is held
        model.load_state_dict({"weight": torch.full((1, 1), 5.0 + comm.rank)})
        optimizer.restart()
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [5.0, 5.0]


def test_values_loaded_after_a_join_are_no_progress_and_end_the_momentum():
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(3):
            step(model, optimizer, -1.0)
        optimizer.join()
        model.load_state_dict({"weight": torch.ones(1, 1)})
        for _ in range(7):
            step(model, optimizer, 0.0)
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [1.0, 1.0]


def test_values_loaded_after_the_join_of_a_single_worker_are_no_progress():
    def work(comm, loaded):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(3):
            step(model, optimizer, -1.0)
        optimizer.join()
        if loaded:
            model.load_state_dict({"weight": torch.ones(1, 1)})
        for _ in range(7):
            step(model, optimizer, 0.0 if loaded else -1.0)
            optimizer.join()
        return model.weight.item()

    def without_joins(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(10):
            step(model, optimizer, -1.0)
        return model.weight.item()

    assert ThreadWorld(1).run(lambda comm: work(comm, True)) == [1.0]
    assert ThreadWorld(1).run(lambda comm: work(comm, False)) == ThreadWorld(1).run(without_joins)


def test_values_loaded_after_a_group_was_added_are_no_progress():
    def work(comm):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        inner = torch.optim.SGD(model[0].parameters(), lr=1.0)
        optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2, beta=0.5), comm=comm)
        optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 1.0})
        for p in model.parameters():
            nn.init.constant_(p, 4.0)
        for _ in range(6):
            optimizer.step()
        return [p.item() for p in model.parameters()]

    assert ThreadWorld(2).run(work) == [[4.0, 4.0]] * 2


AVERAGED = {
    "AR-SGD": slowmo.SlowMoConfig.ar_sgd(),
    "warm-up": slowmo.SlowMoConfig(tau=2, beta=0.5, warmup_steps=20),
    "gradients of all in blocks": slowmo.SlowMoConfig(tau=4, beta=0.5, gradients="all"),
}


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize("when", ["at the start", "after a join", "before a join"])
def test_values_on_one_worker_do_not_leave_it_apart_where_gradients_are_averaged(name, when, caplog):
    """Equal gradients would keep the workers as far apart as they are."""

    def work(comm):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = slowmo.SlowMo(inner, model, AVERAGED[name], comm=comm)

        def train(steps, rate=0.0):
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.full((1, 1), rate)).sum().backward()
                optimizer.step()

        if when == "after a join":
            train(2, 1.0)
            optimizer.join()
        if comm.rank == 1:
            model.load_state_dict({"weight": torch.full((1, 1), 3.0)})
        if when != "before a join":
            train(2)
            return model.weight.item()
        optimizer.join()
        return model.weight.item()

    found = ThreadWorld(2).run(work)
    assert found == [{"at the start": 1.5, "before a join": 1.5, "after a join": 0.5}[when]] * 2
    assert "outside on rank 1 (loaded weights, say)" in caplog.text


def test_values_are_no_progress_of_a_block_with_averaged_gradients():
    def work(comm):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2, beta=0.5, gradients="all"), comm=comm)
        nn.init.ones_(model.weight)
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.zeros(1, 1)).sum().backward()
            optimizer.step()
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [1.0, 1.0]


WORDS = {
    "the workers' mean becomes the new anchor, and slow momentum begins anew": {"tau": 2},
    "the workers' mean becomes the new anchor. To begin": {"tau": 2, "alpha": 0.5, "beta": 0.0},
    "All workers take the mean. To begin": {"tau": 2, "alpha": 1.0, "beta": 0.0},
    "on every worker its own parameters become the new anchor, and slow": {
        "tau": 2,
        "average": False,
        "gossip": slowmo.SGP(),
    },
    "They are mixed with the other workers' like any others. To begin": {
        "tau": None,
        "alpha": 1.0,
        "beta": 0.0,
        "gossip": slowmo.SGP(),
    },
}


@pytest.mark.parametrize("words", WORDS)
def test_the_warning_about_loaded_values_says_what_the_method_does_with_them(words, caplog):
    def work(comm):
        model, optimizer = one_weight(comm, **WORDS[words])
        model.load_state_dict({"weight": torch.ones(1, 1)})
        for _ in range(2):
            step(model, optimizer, 0.0)
        optimizer.join()

    ThreadWorld(2).run(work)
    assert words in caplog.text


def test_the_same_values_again_change_nothing(caplog):
    """Scripts broadcast parameters that are equal already."""

    def work(comm, again):
        model, optimizer = one_weight(comm, value=1 / 3, tau=2, beta=0.5)
        if again:
            model.load_state_dict(model.state_dict())
        for number in range(5):
            step(model, optimizer, float(number))
        return model.weight.item()

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        assert ThreadWorld(2).run(lambda comm: work(comm, True)) == ThreadWorld(2).run(lambda comm: work(comm, False))
    assert not caplog.records


def test_weights_that_are_clipped_between_steps_are_progress(caplog):
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(6):
            step(model, optimizer, -1.0)
            with torch.no_grad():
                model.weight.clamp_(-0.75, 0.75)
        return model.weight.item()

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        assert ThreadWorld(2).run(work) == [0.75, 0.75]
    assert not caplog.records


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resume_is_no_change_from_outside(order, caplog):
    def work(comm):
        model, optimizer = one_weight(comm, tau=2, beta=0.5)
        for _ in range(3):
            step(model, optimizer, -1.0 - comm.rank)
        saved = [(model, {k: v.clone() for k, v in model.state_dict().items()}), (optimizer, optimizer.state_dict())]
        other, again = one_weight(comm, tau=2, beta=0.5)
        pairs = list(zip((other, again), (state for _, state in saved), strict=True))
        for target, state in pairs if order == "model first" else pairs[::-1]:
            target.load_state_dict(state)
        for each in ((model, optimizer), (other, again)):
            for _ in range(3):
                step(*each, -1.0)
        return model.weight.item(), other.weight.item()

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        for whole, resumed in ThreadWorld(2).run(work):
            assert whole == resumed
    assert not caplog.records


# Another form


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(3))


def mask(model):

    prune.l1_unstructured(model.linear, "weight", 1)


CHANGES = {
    "seen has another form": lambda model: model.register_buffer("seen", torch.zeros(4)),
    "seen has another form ": lambda model: delattr(model, "seen"),
    "linear.weight has another form": lambda model: model.double(),
    "there is a new buffer": lambda model: model.register_buffer("later", torch.zeros(1)),
    "there is a new buffer ": mask,
}


@pytest.mark.parametrize("said", CHANGES)
@pytest.mark.parametrize("how", ["join", "outer step"])
def test_a_model_of_another_form_is_refused_on_every_rank_before_anything_is_sent(said, how):
    def work(comm):
        model = WithBuffer()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2), comm=comm)
        optimizer.step()
        if comm.rank == 1:
            CHANGES[said](model)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=f"model on rank 1 is not the one .*: {said.strip()}") as error:
            optimizer.join() if how == "join" else optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        return str(error.value)

    first, second = ThreadWorld(2).run(work)
    assert ("later" in second) == (said == "there is a new buffer")
    assert first.startswith("slowmo: the model on rank 1")


def test_pruning_that_one_rank_makes_permanent_is_refused_on_every_rank():
    def work(comm):
        model = WithBuffer()
        mask(model)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2), comm=comm)
        optimizer.step()
        if comm.rank == 1:
            prune.remove(model.linear, "weight")
        with pytest.raises(ValueError, match=r"model on rank 1 is not the one .*weight_mask has another form"):
            optimizer.join()

    ThreadWorld(2).run(work)


@pytest.mark.parametrize("config", [slowmo.SlowMoConfig.ar_sgd(), slowmo.SlowMoConfig(tau=2, warmup_steps=5)])
@pytest.mark.parametrize("how", ["step", "join"])
def test_averaged_gradients_refuse_a_model_of_another_form_on_every_rank(config, how):
    """The others hear of it in the exchange itself, before a gradient is written."""

    def work(comm):
        model = nn.Linear(2, 2, bias=False)
        optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)

        def backward():
            optimizer.zero_grad()
            model(torch.ones(1, 2 + comm.rank * changed)).sum().backward()

        changed = 0
        backward()
        optimizer.step()
        if comm.rank == 1:
            changed, model.weight.grad = 1, None
            model.weight.data = torch.ones(2, 3)
        before = model.weight.detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"model on rank 1 .*: weight has another form. Nothing was sent"):
                backward() if how == "step" or comm.rank == 0 else optimizer.join()
        assert torch.equal(model.weight, before)

    ThreadWorld(2).run(work)


GOSSIP = {
    "SGP": slowmo.SlowMoConfig.sgp(),
    "OSGP": slowmo.SlowMoConfig.osgp(),
    "D-PSGD": slowmo.SlowMoConfig.dpsgd(),
    "SGP in blocks": slowmo.SlowMoConfig(tau=4, gossip=slowmo.SGP()),
}


@pytest.mark.parametrize("name", GOSSIP)
def test_gossip_with_a_model_of_another_form_goes_on_until_all_meet(name, caplog):
    """A worker that raised alone would leave the others waiting for its messages."""

    def work(comm):
        model = nn.Linear(2, 2, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = slowmo.SlowMo(inner, model, GOSSIP[name], comm=comm)

        def train():
            for number in range(5):
                if number == 1 and comm.rank == 1:
                    model.weight.data = torch.ones(3, 2)
                model.weight.grad = torch.ones_like(model.weight)
                optimizer.step()
            optimizer.join()

        with pytest.raises(ValueError, match=r"rank 1 .*: weight has another form. Others may have mixed zeros"):
            train()

    ThreadWorld(2).run(work)
    assert caplog.text.count("weight has another form than at the construction of SlowMo") == 1
