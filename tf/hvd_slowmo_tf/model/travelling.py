"""The variables of a Keras model that take part in exchanges, and their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import keras
import tensorflow as tf

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import ParameterGroups, lay_out
from hvd_slowmo.core.parts.slices import travels_in_slices
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import KerasLayout, VariableRef, mapped_refs, refs_of


class TravellingVariables:
    """Find the variables that take part, and lay them out.

    Args:
        optimizer: SlowMo.
        inner: the optimizer that it wraps.
        config: the settings.
        parameter_map: of the job; None in a job of one framework.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        inner: InnerOptimizer,
        config: SlowMoConfig,
        parameter_map: ParameterMap | None,
    ) -> None:
        self._optimizer = optimizer
        self._inner = inner
        self._config = config
        self._parameter_map = parameter_map

    def refs(self, statistics: Sequence[keras.Variable] = (), model: keras.Model | None = None) -> list[VariableRef]:
        """Return the model's tensors that take part, once the optimizer is built.

        Args:
            statistics: variables among which the floating-point ones are averaged.
            model: needed with a map.
        """
        optimizer, trained = self._optimizer, self._optimizer._trainable_variables
        if self._parameter_map is not None and model is not None:
            return mapped_refs(model, self._parameter_map, trained)
        ids, one_device = {id(v) for v in trained}, self._parameter_map is not None
        averaged = [v for v in statistics if id(v) not in ids and tf.as_dtype(v.dtype).is_floating]
        averaged += optimizer._model_variables_moving_average if optimizer.use_ema else []
        return [*refs_of("parameter", trained, one_device), *refs_of("statistic", averaged, one_device)]

    def layout_of(self, refs: Sequence[VariableRef]) -> KerasLayout:
        """Lay out these tensors, and the inner optimizer's state where it is averaged."""
        averages = self._config.inner_state == "average" and self._config.tau is not None
        state = self._inner.floating_state if averages else []
        return self._lay_out([*refs, *refs_of("optimizer_state", state, self._parameter_map is not None)])

    def layout_of_parameters(self, trained: list[keras.Variable], model: keras.Model | None) -> KerasLayout:
        """Lay out the parameters alone, in any order and form that gives messages the lengths that they will have.

        With a map the tensors have another order and other shapes. That changes no length but that of few bits, in
        which tensors of one dimension do not travel.
        """
        if self._parameter_map is None or model is None or self._config.bits == 32:
            return self._lay_out(refs_of("parameter", trained, self._parameter_map is not None))
        refs = mapped_refs(model, self._parameter_map, trained)
        return self._lay_out([ref for ref in refs if ref.spec.role == "parameter"])

    def _lay_out(self, refs: Sequence[VariableRef]) -> KerasLayout:
        groups = ParameterGroups.single(sum(ref.spec.role == "parameter" for ref in refs))
        sliced = partial(travels_in_slices, self._config)
        return lay_out(refs, groups, self._optimizer._chunk_bytes, self._config.fragments, sliced)
