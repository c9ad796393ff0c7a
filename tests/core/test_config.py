"""Settings: what is refused, what warns, what the presets are."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.config import TOPOLOGIES
from hvd_slowmo.graphs import NAMED, ring


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"tau": 0}, ValueError, "`tau` must be a positive integer or None. Received: tau=0"),
        ({"tau": -3}, ValueError, "tau=-3"),
        ({"tau": 2.5}, TypeError, "tau=2.5"),
        ({"tau": True}, TypeError, "tau=True"),
        ({"alpha": 0}, ValueError, "`alpha` must be a finite number > 0"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan"),
        ({"alpha": "1"}, TypeError, "alpha='1'"),
        ({"beta": 1.0}, ValueError, r"`beta` must be a number in \[0, 1\)"),
        ({"beta": -0.1}, ValueError, "beta=-0.1"),
        ({"beta": None}, TypeError, "beta=None"),
        ({"nesterov": 1}, TypeError, "`nesterov` must be True or False"),
        ({"scale_by_lr": "no"}, TypeError, "scale_by_lr='no'"),
        ({"buffers": "keep"}, ValueError, "'maintain', 'reset', 'average'. Received: buffers='keep'"),
        ({"gradients": None}, TypeError, "gradients=None"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"base": "gossip"}, ValueError, "'local', 'sgp', 'dpsgd'. Received: base='gossip'"),
        ({"overlap": 1}, TypeError, "`overlap` must be True or False. Received: overlap=1"),
        ({"average": None}, TypeError, "`average` must be True or False. Received: average=None"),
        ({"topology": "ring"}, ValueError, "`topology` is for a gossip base. Received: base='local', topology='ring'"),
        ({"overlap": True}, ValueError, "`overlap` is for a gossip base. Received: base='local', overlap=True"),
        ({"average": False}, ValueError, "`average` is for a gossip base. Received: base='local', average=False"),
        ({"base": "dpsgd", "overlap": True}, ValueError, r"`overlap` is for base='sgp' \(OSGP\)"),
        ({"base": "sgp", "gradients": "all"}, ValueError, "there is nothing to gossip. Received: base='sgp'"),
        ({"base": "dpsgd", "nonfinite": "exclude"}, ValueError, "'exclude' can't work over base='dpsgd'"),
        ({"base": "sgp", "average": False, "buffers": "average"}, ValueError, "use buffers='maintain' or 'reset'"),
        ({"base": "sgp", "topology": 3}, TypeError, "an array of numbers or a function .* Received: topology=3"),
        ({"base": "sgp", "topology": [["a"]]}, TypeError, "`topology` must be None, a name"),
        ({"base": "sgp", "topology": "rings"}, ValueError, "'ring', 'full', 'star'.* Received: topology='rings'"),
        ({"base": "sgp", "topology": "function f"}, ValueError, "that is a function f, and only its name was"),
    ],
)
def test_invalid_settings_say_what_was_received(settings, error, words):
    with pytest.raises(error, match=words):
        SlowMoConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0, "nesterov": True}, "nesterov=True"),
        ({"beta": 0, "scale_by_lr": False}, "scale_by_lr=False"),
        ({"tau": None, "gradients": "all", "alpha": 0.7}, "alpha=0.7"),
        ({"tau": None, "gradients": "all", "buffers": "reset"}, "buffers='reset'"),
        ({"tau": None, "gradients": "all", "warmup_steps": 5}, "warmup_steps=5"),
        ({"tau": None}, "the workers never meet"),
        ({"tau": None, "gradients": "node"}, "the nodes never meet"),
        ({"tau": None, "base": "sgp", "beta": 0, "average": False}, "average=False"),
        ({"tau": None, "base": "dpsgd", "beta": 0.7}, "beta=0.7"),
    ],
)
def test_settings_without_effect_warn(settings, words):
    with pytest.warns(UserWarning, match=words):
        SlowMoConfig(**settings)


def test_presets_are_the_published_methods():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no preset has a setting without effect
        assert SlowMoConfig.local_sgd(8) == SlowMoConfig(tau=8, alpha=1, beta=0)
        assert SlowMoConfig.bmuf(8, 0.9, 0.6) == SlowMoConfig(tau=8, alpha=0.9, beta=0.6, scale_by_lr=False)
        assert SlowMoConfig.bmuf(8, block_momentum=0) == SlowMoConfig.local_sgd(8)
        assert SlowMoConfig.bmuf(8, nesterov=True).nesterov
        assert SlowMoConfig.lookahead(5, 0.3) == SlowMoConfig(tau=5, alpha=0.3, beta=0)
        assert SlowMoConfig.diloco(50) == SlowMoConfig(tau=50, alpha=0.7, beta=0.9, nesterov=True, scale_by_lr=False)
        assert SlowMoConfig.ar_sgd() == SlowMoConfig(tau=None, alpha=1, beta=0, gradients="all")
        assert SlowMoConfig.local_sgd(8, warmup_steps=3).warmup_steps == 3


def test_presets_of_gossip_are_the_bases_alone_or_below_slowmo():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SlowMoConfig.sgp() == SlowMoConfig(base="sgp", tau=None, alpha=1, beta=0)
        assert SlowMoConfig.osgp() == SlowMoConfig(base="sgp", overlap=True, tau=None, alpha=1, beta=0)
        assert SlowMoConfig.dpsgd() == SlowMoConfig(base="dpsgd", tau=None, alpha=1, beta=0)
        assert SlowMoConfig.sgp(tau=48) == SlowMoConfig(base="sgp", tau=48)
        assert SlowMoConfig.osgp(tau=48, beta=0.6, average=False, topology="star") == SlowMoConfig(
            base="sgp", overlap=True, tau=48, beta=0.6, average=False, topology="star"
        )
        assert SlowMoConfig.dpsgd(tau=None, topology="ring") == SlowMoConfig.dpsgd(topology="ring")


def test_the_names_of_topologies_are_those_that_there_are():
    assert tuple(NAMED) == TOPOLOGIES


def test_facts_make_the_same_config_again():
    """Through JSON, as Keras stores them."""
    for topology in (None, "star", np.full((2, 2), 0.5), [[[0.5, 0.5], [0.5, 0.5]]]):
        config = SlowMoConfig(base="sgp", topology=topology, overlap=True, average=False)
        assert SlowMoConfig(**json.loads(json.dumps(config.facts()))) == config
    assert hash(SlowMoConfig(base="sgp", topology=np.eye(2)))


def test_facts_have_the_name_of_a_function():
    facts = SlowMoConfig(base="sgp", topology=ring).facts()
    assert facts["topology"] == "function ring"
    with pytest.raises(ValueError, match="compile=False"):
        SlowMoConfig(**facts)


def test_a_config_is_frozen_keyword_only_and_normalised():
    config = SlowMoConfig(tau=np.int64(4), alpha=1, beta=np.float32(0.5))
    assert type(config.tau) is int
    assert type(config.alpha) is float
    assert type(config.beta) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tau = 3
    with pytest.raises(TypeError):
        SlowMoConfig(4)


def test_the_vectors_that_a_method_needs():
    assert SlowMoConfig.local_sgd(4).vectors == ()
    assert SlowMoConfig.ar_sgd().vectors == ()
    assert SlowMoConfig.lookahead(4).vectors == ("anchor",)
    assert SlowMoConfig().vectors == ("anchor", "v")
