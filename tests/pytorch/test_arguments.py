"""The constructor's arguments: settings as keywords, several modules, and habits from Horovod."""

import re

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.start.arguments import HOROVODS_ARGUMENTS
from hvd_slowmo.torch import SlowMo, SlowMoConfig


def sgd(*modules):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def test_settings_are_optional_and_may_be_keywords():
    model = nn.Linear(2, 1)
    assert SlowMo(sgd(model), model).config == SlowMoConfig()
    assert SlowMo(sgd(model), model, tau=3, beta=0.25, metrics=True).config == SlowMoConfig(tau=3, beta=0.25)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"config": SlowMoConfig(), "tau": 3}, TypeError, "not both. Received: a config and tau"),
        ({"tau": 0}, ValueError, "`tau` must be a positive integer or None. Received: tau=0"),
        ({"bta": 0.5}, TypeError, "SlowMo has no setting `bta`. Did you mean `beta`? It takes: tau, alpha,"),
        ({"metric": True}, TypeError, "SlowMo has no setting `metric`. Did you mean `metrics`?"),
        ({"period": 4}, TypeError, "SlowMo has no setting `period`. Use tau."),
        ({"name": "a/b"}, ValueError, "`name` may have letters, digits"),
        *(({name: 1}, TypeError, f"no setting `{name}`. {here}") for name, here in HOROVODS_ARGUMENTS.items()),
    ],
)
def test_wrong_keywords_say_what_takes_their_place(options, error, words):
    model = nn.Linear(2, 1)
    with pytest.raises(error, match=re.escape(words)):
        SlowMo(sgd(model), model, **options)


def test_horovods_arguments_are_explained_where_the_model_is_missing():
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"`named_parameters`. The model itself brings the names"):
        SlowMo(sgd(model), named_parameters=model.named_parameters())
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        SlowMo(sgd(model))


def test_a_wrong_keyword_on_one_rank_raises_on_every_rank():
    def work(comm):
        model = nn.Linear(2, 1)
        with pytest.raises((TypeError, ValueError), match=r"no setting `bta`. Did you mean `beta`"):
            SlowMo(sgd(model), model, comm=comm, **({"bta": 0.5} if comm.rank else {}))
        return SlowMo(sgd(model), model, comm=comm).steps

    assert ThreadWorld(2).run(work) == [0, 0]


@pytest.mark.parametrize("several", [list, tuple])
def test_several_modules_belong_in_one(several):
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(TypeError, match=rf"a {several.__name__} of 2. .*nn.ModuleList\(\[encoder, decoder\]\)"):
        SlowMo(sgd(encoder, decoder), several([encoder, decoder]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)\) is not a parameter .*nn.ModuleList\(\[encoder, decoder\]"):
        SlowMo(sgd(encoder, decoder), encoder)
    assert SlowMo(sgd(encoder, decoder), nn.ModuleList([encoder, decoder])).steps == 0


def test_horovods_optimizer_can_not_be_put_around_slowmo():
    hvd = pytest.importorskip("horovod.torch")
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"can't be put around SlowMo.* give SlowMo gradients='all'"):
        hvd.DistributedOptimizer(SlowMo(sgd(model), model), named_parameters=model.named_parameters())
