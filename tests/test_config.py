"""Settings: what is refused, what warns, what the presets are."""

import dataclasses
import warnings

import numpy as np
import pytest

from hvd_slowmo import SlowMoConfig


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
