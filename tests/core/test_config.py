"""Settings: errors, warnings and presets."""

import dataclasses
import json
import warnings
from typing import get_args

import numpy as np
import pytest

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.gossip import DPSGD, SGP, TopologyName
from hvd_slowmo.settings import SlowMoSettings
from hvd_slowmo.topology.graphs import NAMED, ring


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
        ({"inner_state": "keep"}, ValueError, "'maintain', 'reset', 'average'. Received: inner_state='keep'"),
        ({"gradients": None}, TypeError, "gradients=None"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"gossip": "sgp"}, TypeError, r"`gossip` must be None, SGP\(...\) or DPSGD\(...\). Received: gossip='sgp'"),
        ({"fragments": 0}, ValueError, "`fragments` must be an integer from 1 to tau. Received: fragments=0"),
        ({"tau": 4, "fragments": 5}, ValueError, "can't be greater than tau=4. Received: fragments=5, delay=0"),
        ({"delay": -1}, ValueError, "delay=-1"),
        ({"delay": 1.5}, TypeError, "delay=1.5"),
        ({"tau": 4, "delay": 5}, ValueError, "can't be greater than tau=4. Received: fragments=1, delay=5"),
        ({"gossip": SGP(), "fragments": 2}, ValueError, "can't work with gossip"),
        ({"gossip": SGP(), "average": False, "delay": 1}, ValueError, "can't work with gossip"),
        ({"inner_state": "reset", "delay": 1}, ValueError, "needs fragments=1 and delay=0.*Use inner_state='maintain'"),
        ({"average": None}, TypeError, "`average` must be True or False. Received: average=None"),
        ({"average": False}, ValueError, "needs gossip between the outer steps. Received: gossip=None, average=False"),
        (
            {"gossip": SGP(), "gradients": "all"},
            ValueError,
            r"leaves nothing to gossip. Received: gossip=SGP\(topology=None",
        ),
        (
            {"gossip": DPSGD(), "nonfinite": "exclude"},
            ValueError,
            r"'exclude' can't work with gossip=DPSGD\(topology=None",
        ),
        (
            {"gossip": SGP(), "average": False, "inner_state": "average"},
            ValueError,
            "use inner_state='maintain' or 'reset'",
        ),
    ],
)
def test_invalid_settings_say_what_was_received(settings, error, words):
    with pytest.raises(error, match=words):
        SlowMoConfig(**settings)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SGP(overlap=1), TypeError, "`overlap` must be True or False. Received: overlap=1"),
        (lambda: DPSGD(overlap=True), TypeError, r"DPSGD has no setting `overlap`.* Use SGP\(overlap=True\)"),
        (lambda: SGP(topology=3), TypeError, "an array of numbers or a function .* Received: topology=3"),
        (lambda: DPSGD(topology=[["a"]]), TypeError, "`topology` must be None, a name"),
        (lambda: SGP(topology="rings"), ValueError, "'ring', 'full', 'star'.* Received: topology='rings'"),
        (lambda: SGP(topology="function f"), ValueError, "that is a function f, and only its name was"),
    ],
)
def test_invalid_gossip_says_what_was_received(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"topology": "ring"}, r"Use gossip=SGP\(topology=...\) or gossip=DPSGD"),
        ({"overlap": True}, r"Use gossip=SGP\(overlap=True\)"),
        ({"base": "sgp"}, r"no setting `base`. Use gossip=SGP"),
        ({"buffers": "reset"}, "Use inner_state."),
        ({"slowmo_frequency": 12}, "Use tau."),
        ({"momentum": 0.5}, "Use beta."),
        ({"lr": 1.0}, "Use alpha."),
    ],
)
def test_names_of_other_libraries_are_told_the_name_here(settings, words):
    with pytest.raises(TypeError, match=words):
        SlowMoConfig(**settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SlowMoConfig(bta=0.5), r"SlowMoConfig has no setting `bta`. Did you mean `beta`\? It takes: tau,"),
        (lambda: SlowMoConfig.local_sgd(4, warmup=3), r"SlowMoConfig.local_sgd has no .*Did you mean `warmup_steps`\?"),
        (lambda: SlowMoConfig.lookahead(4, zzz=1), "lookahead has no setting `zzz`. It takes: tau, alpha,"),
        (lambda: SlowMoConfig.lookahead(k=4), "SlowMoConfig.lookahead has no setting `k`. Use tau."),
        (lambda: SlowMoConfig.bmuf(4, block_rate=1), r"SlowMoConfig.bmuf has no .*`block_lr`.* tau, block_lr"),
        (lambda: SlowMoConfig.diloco(4, lr=1), "SlowMoConfig.diloco has no setting `lr`. Use alpha."),
        (lambda: SlowMoConfig.sgp(overlaps=1), "SlowMoConfig.sgp has no setting `overlaps`. It takes: topology, tau,"),
        (lambda: SlowMoConfig.osgp(graph=1), "SlowMoConfig.osgp has no setting `graph`"),
        (lambda: SlowMoConfig.dpsgd(graph=1), "SlowMoConfig.dpsgd has no setting `graph`"),
        (lambda: SlowMoConfig.ar_sgd(warmup=1), "SlowMoConfig.ar_sgd has no setting `warmup`"),
        (lambda: SGP(overlay=True), r"SGP has no setting `overlay`. Did you mean `overlap`\?"),
        (lambda: DPSGD(topolgy="ring"), r"DPSGD has no setting `topolgy`. Did you mean `topology`\?"),
    ],
)
def test_an_unknown_keyword_is_told_who_takes_what(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_settings_as_keywords_have_the_types_of_the_fields():
    fields = {field.name: field.type for field in dataclasses.fields(SlowMoConfig)}
    assert {name: of.__forward_arg__ for name, of in SlowMoSettings.__annotations__.items()} == fields


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0, "nesterov": True}, "nesterov=True"),
        ({"beta": 0, "scale_by_lr": False}, "scale_by_lr=False"),
        ({"tau": None, "gradients": "all", "alpha": 0.7}, "alpha=0.7"),
        ({"tau": None, "gradients": "all", "inner_state": "reset"}, "inner_state='reset'"),
        ({"tau": None, "gradients": "all", "warmup_steps": 5}, "warmup_steps=5"),
        ({"tau": None}, "the workers never meet"),
        ({"tau": None, "gradients": "node"}, "the nodes never meet"),
        ({"tau": None, "gossip": SGP(), "beta": 0, "average": False}, "average=False"),
        ({"tau": None, "gossip": DPSGD(), "beta": 0.7}, "beta=0.7"),
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


def test_presets_of_gossip_are_the_methods_alone_or_below_slowmo():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SlowMoConfig.sgp() == SlowMoConfig(gossip=SGP(), tau=None, alpha=1, beta=0)
        assert SlowMoConfig.osgp() == SlowMoConfig(gossip=SGP(overlap=True), tau=None, alpha=1, beta=0)
        assert SlowMoConfig.dpsgd() == SlowMoConfig(gossip=DPSGD(), tau=None, alpha=1, beta=0)
        assert SlowMoConfig.sgp(tau=48) == SlowMoConfig(gossip=SGP(), tau=48)
        assert SlowMoConfig.osgp(tau=48, beta=0.6, average=False, topology="star") == SlowMoConfig(
            gossip=SGP(topology="star", overlap=True), tau=48, beta=0.6, average=False
        )
        assert SlowMoConfig.dpsgd(tau=None, topology="ring") == SlowMoConfig.dpsgd(topology="ring")


def test_the_names_of_topologies_are_those_that_there_are():
    assert tuple(NAMED) == get_args(TopologyName)


def test_facts_make_the_same_config_again():
    """Through JSON, as Keras stores them."""
    for topology in (None, "star", np.full((2, 2), 0.5), [[[0.5, 0.5], [0.5, 0.5]]]):
        config = SlowMoConfig(gossip=SGP(topology=topology, overlap=True), average=False)
        assert SlowMoConfig.from_facts(json.loads(json.dumps(config.facts()))) == config
    assert hash(SlowMoConfig(gossip=SGP(topology=np.eye(2))))


def test_facts_have_the_name_of_a_function():
    facts = SlowMoConfig(gossip=SGP(topology=ring)).facts()
    assert facts["gossip"]["topology"] == "function ring"
    with pytest.raises(ValueError, match="compile=False"):
        SlowMoConfig.from_facts(facts)


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


def test_workers_and_checkpoints_may_differ_in_where_the_outer_state_lies():
    here, there = SlowMoConfig(slow_state="host"), SlowMoConfig()
    assert here.facts() != there.facts()
    assert here.common_facts() == there.common_facts()
    assert SlowMoConfig(tau=3).common_facts() != there.common_facts()
