"""The contract of keras.optimizers: the other adapter: what one has the other has too, or it is here."""

import inspect

import pytest

import hvd_slowmo.tf
import hvd_slowmo.torch
from hvd_slowmo.tf import SlowMo

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


ONLY_PYTORCH = {
    # PyTorch's optimizer contract
    "__getstate__": "pickling is refused; Keras optimizers are serialized by get_config",
    "add_param_group": "Keras has one group of parameters",
    "param_groups": "Keras has one group of parameters",
    "state": "all state is in `variables`",
    "defaults": "see get_config",
    "state_dict": "Keras saves `variables`, and the settings by get_config",
    "load_state_dict": "Keras loads them",
    "step": "apply, apply_gradients",
    "zero_grad": "Keras has no gradients to clear",
    # ours
    "no_sync": "gradient_accumulation_steps of the inner optimizer",
    "grad_scale": "a LossScaleOptimizer within",
}
ONLY_KERAS = {
    # Keras' optimizer contract
    "apply": "step",
    "build": "PyTorch's optimizers have their parameters from the start",
    "variables": "state_dict",
    "loss_scale_factor": "GradScaler is PyTorch's way",
    "scale_loss": "GradScaler is PyTorch's way",
    "exclude_from_weight_decay": "parameter groups",
    "finalize_variable_values": "torch.optim.swa_utils",
    "save_own_variables": "state_dict",
    "load_own_variables": "load_state_dict",
    "get_config": "state_dict",
    "from_config": "state_dict",
    # ours
    "broadcast": "construction is a collective in PyTorch",
}
SETTINGS_OF_ONE = {
    "model": "broadcast and apply take variables",
    "process_group": "torch.distributed carries PyTorch's tensors only",
    "transport": "likewise",
}


def test_the_adapters_have_the_same_settings_and_methods_but_for_a_table():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_") and name != "__getstate__"}

    here, there = public(SlowMo), public(hvd_slowmo.torch.SlowMo)
    assert here - there == ONLY_KERAS.keys()
    assert there - here == ONLY_PYTORCH.keys() & (there - here)
    assert not (there - here) - ONLY_PYTORCH.keys()
    ours = dict(inspect.signature(SlowMo.__init__).parameters)
    theirs = dict(inspect.signature(hvd_slowmo.torch.SlowMo.__init__).parameters)
    assert not ours.keys() - theirs.keys()
    assert theirs.keys() - ours.keys() == SETTINGS_OF_ONE.keys()
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name
    for name in here & there:
        mine, other = getattr(SlowMo, name), getattr(hvd_slowmo.torch.SlowMo, name)
        if callable(mine):
            extra = inspect.signature(mine).parameters.keys() ^ inspect.signature(other).parameters.keys()
            # GradScaler is PyTorch's way; its optimizer knows the model.
            assert extra <= {"variables", "scaler", *(("model",) if name in ("save", "load") else ())}, name
    doors = set(hvd_slowmo.tf.__all__) ^ set(hvd_slowmo.torch.__all__)
    # A script for PyTorch runs on either transport; Keras has Horovod's own rank and size.
    only_pytorch = {"rank", "size", "local_rank", "Simulation", "SimulationTask"}
    assert doors == {"SlowMoCallback", *only_pytorch}
