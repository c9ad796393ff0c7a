"""The map between a PyTorch model and its Keras version: equal descriptions, values, outputs and gradients."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
from keras import layers as kl

from hvd_slowmo import ParameterMap
from hvd_slowmo.interop.compare import compare
from hvd_slowmo.interop.copy import copy_to_keras, copy_to_torch
from hvd_slowmo.wire.parameter_map import pair
from hvd_slowmo.wire.tensors import describe
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_tf.interop.weights import read_keras, variables_of
from hvd_slowmo_torch.interop.layers import entries_torch
from hvd_slowmo_torch.interop.weights import read_torch
from support.models.pairs import MODELS, First, attention, differences, lstm, sequential

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
@pytest.mark.sample(every=2)
def test_both_describe_the_same_and_train_the_same(name):
    make_torch, make_keras, shape = MODELS[name]
    ours, theirs = make_torch().double(), make_keras()
    a, b = entries_torch(ours), entries_keras(theirs)
    assert describe(a) == describe(b)
    assert sum(e.size for e in a if e.role == "parameter") == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )
    assert all(e.view.offset is not None for e in a), "PyTorch permutes nothing"
    copy_to_keras(ours, theirs)
    output, gradients = differences(ours, theirs, shape)
    for each in (output, *gradients):
        assert each.largest <= 1e-12 * max(1, each.scale), each
    assert output.scale > 0
    assert any(each.scale > 0 for each in gradients)
    start = {key: value.clone() for key, value in ours.state_dict().items()}
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_()
    copy_to_torch(theirs, ours)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, start[key]), key
    for e, f in pair(a, b):
        flat = read_keras(variables_of(theirs), b)[e.name].reshape(-1)
        own = np.asarray({v.path: v for v in theirs.variables}[f.own].value)
        assert np.array_equal(flat, read_torch(ours, a)[e.name].reshape(-1))
        assert np.array_equal(f.view.read(own, 1, f.size), flat[1:])


def block(number):
    return keras.Sequential([keras.Input((3,)), kl.Dense(3, name="fc")], name=f"block_{number}")


class Blocks(nn.Module):
    """The layers stand in another order than they are used in."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(3, 3)}) for _ in range(11))

    def forward(self, x):
        for each in self.blocks:
            x = torch.tanh(each["fc"](x))
        return self.head(x)


def blocks_keras():
    parts = [layer for n in range(11) for layer in (block(n), kl.Activation("tanh"))]
    return sequential((3,), *parts, kl.Dense(2, name="head"))


@pytest.mark.slow
def test_patterns_pair_layers_and_tensors():
    ours, theirs = Blocks().double(), blocks_keras()
    path = theirs.get_layer("block_3").layers[0].kernel.path.replace("block_3", "block_*")
    for pairs in (
        {"blocks.*.fc": path.removesuffix("/kernel")},
        {"blocks.*.fc.weight": path, "blocks.*.fc.bias": path.replace("kernel", "bias")},
    ):
        chosen = pickle.loads(pickle.dumps(ParameterMap(pairs)))
        assert chosen == ParameterMap(pairs)
        a, b = entries_torch(ours, chosen), entries_keras(theirs, chosen)
        assert describe(a) == describe(b)
        assert a[0].name == "0.linear.weight", "what is not paired comes first"
        assert [e.name for e in a if e.name.startswith("blocks.1") and "weight" in e.name] == [
            "blocks.1.fc.weight",
            "blocks.10.fc.weight",
        ]
        assert [e.own for e in a].index("blocks.9.fc.weight") < [e.own for e in a].index("blocks.10.fc.weight")
        copy_to_keras(ours, theirs, chosen)
        output, gradients = differences(ours, theirs, (3,), chosen)
        assert not any(each.more_than_rounding for each in (output, *gradients))
    with pytest.raises(ValueError, match=r"0.linear.weight \(head.weight and .* has shape"):
        list(pair(entries_torch(ours), entries_keras(theirs)))


class Scaled(nn.Module):
    def __init__(self, shape=(3,)):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))


class ScaledKeras(kl.Layer):
    def __init__(self, shape=(3,), **kwargs):
        super().__init__(**kwargs)
        self.size = shape

    def build(self, shape):
        self.scale = self.add_weight(shape=self.size, name="scale")

    def call(self, x):
        return x


def test_unknown_layers_are_paired_tensor_by_tensor():
    ours, theirs = Scaled().double(), sequential((3,), ScaledKeras(name="s"))
    path = theirs.variables[0].path
    with pytest.raises(ValueError, match=r"PyTorch's scale .*Scaled is not a layer .*Pair it: ParameterMap\(\{"):
        entries_torch(ours)
    with pytest.raises(ValueError, match=r"Keras' .*s/scale .*is not a layer .*its PyTorch name"):
        entries_keras(theirs)
    chosen = ParameterMap({"scale": path})
    assert describe(entries_torch(ours, chosen)) == describe(entries_keras(theirs, chosen))
    ours, theirs = Scaled((2, 3)).double(), sequential((3,), ScaledKeras((3, 2), name="s"))
    path = theirs.variables[0].path
    with pytest.raises(ValueError, match='or "transpose", or a View'):
        entries_keras(theirs, ParameterMap({"scale": path}))
    for orientation in ("transpose", View.permute((3, 2), (1, 0))):
        chosen = ParameterMap({"scale": path}, orient={path: orientation})
        assert describe(entries_torch(ours, chosen)) == describe(entries_keras(theirs, chosen))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv, self.flat, self.out = kl.Conv2D(4, 2), kl.Flatten(), kl.Dense(5, name="out")

    def call(self, x):
        return self.out(self.flat(self.conv(x)))


def test_a_flattened_map_that_cannot_be_followed_is_refused_until_it_is_said():
    theirs = Subclassed()
    theirs(np.zeros((1, 5, 6, 3)))
    with pytest.raises(ValueError, match=r"order of its features can't be known.*orient=\{.*out/kernel"):
        entries_keras(theirs)
    path = next(v.path for v in theirs.variables if v.path.endswith("out/kernel"))
    chosen = ParameterMap(orient={path: (4, 5, 4)})
    ours = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(80, 5)).double()
    a, b = entries_torch(ours, chosen), entries_keras(theirs, chosen)
    copy_to_keras(ours, theirs, chosen)
    output, _ = compare(ours, a, theirs, b, [np.random.default_rng(0).standard_normal((2, 5, 6, 3))])
    assert not output.more_than_rounding
    wrong = ParameterMap(orient={path: ()})
    copy_to_keras(ours, theirs, wrong)
    output, _ = compare(ours, a, theirs, b, [np.random.default_rng(0).standard_normal((2, 5, 6, 3))])
    assert output.more_than_rounding, "this is the trap"


def test_a_lambda_on_the_way_is_refused():
    lost = sequential((5, 6, 3), kl.Permute((3, 1, 2)), kl.Flatten(), kl.Dense(5))
    with pytest.raises(ValueError, match=r"Permute 'permute.*' comes before"):
        entries_keras(lost)
    unclear = sequential((5, 3), kl.Flatten(), kl.Dense(5))
    with pytest.raises(ValueError, match="may be a sequence or a feature map"):
        entries_keras(unclear)


def test_units_of_which_a_reshape_makes_a_map_are_refused():
    """As in a generator: Keras' units are (height, width, channels), PyTorch's (channels, height, width)."""
    inside = (kl.Dense(36, name="made"), kl.BatchNormalization(), kl.ReLU(), kl.Reshape((3, 3, 4), name="shape"))
    with pytest.raises(ValueError, match=r"made/.*Reshape 'shape' makes a feature map of its outputs"):
        entries_keras(sequential((5,), *inside, kl.Activation("relu"), kl.Conv2DTranspose(2, 2)))
    with pytest.raises(ValueError, match=r"Reshape .* makes a feature map of its outputs"):
        entries_keras(sequential((5,), kl.Dense(36), kl.Reshape((3, 3, 4)), kl.MaxPooling2D(2), kl.Flatten()))
    for allowed in (
        sequential((5,), kl.Dense(36), kl.Reshape((9, 4)), kl.LSTM(3)),  # a sequence, alike in both
        sequential((5,), kl.Dense(36), kl.Reshape((6, 6, -1)), kl.Conv2D(2, 2)),  # of one channel
        sequential((5,), kl.Dense(4), kl.Reshape((1, 1, 4)), kl.Conv2DTranspose(2, 3)),  # of one place
        sequential((36,), kl.Reshape((3, 3, 4)), kl.Conv2D(2, 2)),  # of data, which each framework has in its own way
    ):
        assert entries_keras(allowed)


def test_groups_of_a_flattened_map_are_refused():
    """Keras' are spans of its order, with the channels last; PyTorch's are other features."""
    with pytest.raises(ValueError, match="its groups are other features"):
        entries_keras(sequential((5, 6, 3), kl.Conv2D(4, 2), kl.Flatten(), kl.GroupNormalization(2), kl.Dense(5)))
    assert entries_keras(sequential((5, 6, 3), kl.Conv2D(4, 2), kl.GroupNormalization(2), kl.Flatten(), kl.Dense(5)))


class Head(kl.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.out = kl.Dense(5)

    def build(self, shape):
        self.out.build(shape)

    def call(self, x):
        return self.out(x)


class WithHead(keras.Model):
    """A graph within a model without one."""

    def __init__(self):
        super().__init__()
        self.body = sequential((5, 6, 3), kl.Conv2D(4, 2), kl.Flatten())
        self.head = sequential((80,), kl.Dense(5))

    def call(self, x):
        return self.head(self.body(x))


def test_layers_that_hide_what_they_do_with_a_feature_map_are_refused():
    within = sequential((5, 6, 3), kl.Conv2D(4, 2), kl.Flatten(), Head())
    with pytest.raises(ValueError, match="order of its features can't be known"):
        entries_keras(within)
    assert entries_keras(sequential((5,), kl.Dense(4), Head()))
    around = WithHead()
    around(np.zeros((1, 5, 6, 3)))
    with pytest.raises(ValueError, match="order of its features can't be known"):
        entries_keras(around)


class Twice(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = kl.Dense(3, name="d"), kl.Dense(3, name="d")

    def call(self, x):
        return self.b(self.a(x))


def test_two_variables_of_one_path_are_refused():
    theirs = Twice()
    theirs(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="two variables have the path"):
        entries_keras(theirs)


REFUSED_TORCH = {
    "two bias vectors": (lambda: lstm(3, 4, frozen=False), "moves their sum at twice the"),
    "projection": (lambda: First(nn.LSTM(3, 4, proj_size=2, bias=False)), "no projection"),
    "bias_k": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "no add_bias_kv"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "is not a layer whose Keras form"),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), "Bilinear is not a layer"),
    "lazy": (lambda: nn.LazyLinear(3), "has no shape yet"),
}


@pytest.mark.parametrize("name", REFUSED_TORCH)
def test_what_keras_has_not_is_refused(name):
    make, message = REFUSED_TORCH[name]
    with pytest.raises(ValueError, match=message):
        entries_torch(make())


REFUSED_KERAS = {
    "reset_after": (lambda: sequential((5, 3), kl.GRU(4, reset_after=False)), "Build this one with reset_after=True"),
    "activation": (lambda: sequential((5, 3), kl.LSTM(4, activation="relu")), "this one has relu and sigmoid"),
    "merge": (lambda: sequential((5, 3), kl.Bidirectional(kl.GRU(4), merge_mode="sum")), "merge_mode='sum'"),
    "einsum": (
        lambda: sequential((5, 3), kl.EinsumDense("abc,bcd->ad", (4,))),
        "must be a Dense on the last axis",
    ),
    "axes": (lambda: sequential((5, 3), kl.LayerNormalization(axis=(1, 2))), "normalises over several axes"),
    "renorm": (lambda: sequential((3,), kl.BatchNormalization(renorm=True)), "no batch renormalization"),
    "unknown": (lambda: sequential((3,), kl.PReLU()), "PReLU is not a layer whose PyTorch form is known"),
    "not built": (lambda: keras.Sequential([kl.Dense(3)]), "is not built"),
    "normalization": (lambda: sequential((3,), kl.Normalization(axis=-1)), "stay each worker's own"),
}


@pytest.mark.parametrize("name", REFUSED_KERAS)
def test_what_pytorch_has_not_is_refused(name):
    make, message = REFUSED_KERAS[name]
    with pytest.raises(ValueError, match=message):
        entries_keras(make())


def matched(ours, theirs, parameter_map=None):
    return list(pair(entries_torch(ours.double(), parameter_map), entries_keras(theirs, parameter_map)))


@pytest.mark.parametrize(
    ("make_torch", "make_keras", "message"),
    [
        (lambda: nn.Linear(3, 4), lambda: sequential((3,), kl.Dense(5)),
         r"0.linear.weight \(weight and .*kernel\) has shape \(4, 3\) in PyTorch and \(5, 3\) in Keras"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), lambda: sequential((3,), kl.Dense(4)),
         r"PyTorch's 1.weight \(1.linear.weight, 3x4\) has no partner. Keras' model ends before it"),
        (lambda: nn.Linear(3, 4), lambda: sequential((3,), kl.Dense(4), kl.Dense(3)),
         r"Keras' .*/kernel \(1.linear.weight, 3x4\) has no partner"),
        (lambda: nn.LayerNorm(3), lambda: sequential((3,), kl.Dense(3)), "In its place Keras has"),
        (lambda: nn.LayerNorm(3), lambda: sequential((3,), kl.LayerNormalization()),
         "has note eps 1e-05 in PyTorch and eps 0.001 in Keras"),
        (lambda: nn.Linear(3, 4).requires_grad_(False), lambda: sequential((3,), kl.Dense(4)),
         "has role frozen in PyTorch and parameter in Keras"),
        (lambda: nn.Linear(3, 4), lambda: sequential((3,), kl.Dense(4, dtype="float32")),
         "has type float64 in PyTorch and float32 in Keras"),
        (lambda: nn.MultiheadAttention(8, 4), lambda: attention(8, 2), "has note heads 4 in PyTorch and heads 2"),
    ],
)  # fmt: skip
def test_models_that_differ_say_where(make_torch, make_keras, message):
    with pytest.raises(ValueError, match=message):
        matched(make_torch(), make_keras())


def test_slips_in_a_map_name_the_nearest():
    ours = nn.Sequential(nn.Linear(3, 4)).double()
    with pytest.raises(ValueError, match=r"'0.wieght' .* matches nothing of the PyTorch model. Nearest: 0.weight"):
        entries_torch(ours, ParameterMap({"0.wieght": "x"}))
    with pytest.raises(ValueError, match="two partners"):
        entries_torch(ours, ParameterMap({"0.weight": "x", "*.weight": "y_*"}))
    with pytest.raises(ValueError, match="is trained, so it can't be ignored"):
        entries_torch(ours, ParameterMap(ignore=["0.weight"]))
    theirs = sequential((3,), kl.Dense(4))
    with pytest.raises(ValueError, match="is not a flattened feature map"):
        entries_keras(theirs, ParameterMap(orient={theirs.variables[0].path: (2, 2, 2)}))
    with pytest.raises(ValueError, match="no axis that could be a feature map"):
        entries_keras(theirs, ParameterMap(orient={theirs.variables[1].path: (2, 2, 1)}))
    with pytest.raises(ValueError, match="as many"):
        ParameterMap({"a.*": "b"})
    with pytest.raises(ValueError, match="'same', 'transpose'"):
        ParameterMap(orient={"a": "up"})
    with pytest.raises(TypeError, match="mapping"):
        ParameterMap(["a"])
    with pytest.raises(TypeError, match="sequence"):
        ParameterMap(ignore="a")


def test_buffers_travel_only_where_it_is_said():
    ours = nn.Linear(3, 4).double()
    ours.register_buffer("constant", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match="Linear is not a layer"):
        entries_torch(ours)
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity()).double()
    model[1].register_buffer("table", torch.ones(2))
    with pytest.raises(ValueError, match=r"PyTorch's 1.table .*ignore"):
        entries_torch(model)
    assert len(entries_torch(model, ParameterMap(ignore=["*.table"]))) == 2


def test_frozen_batch_norm_keeps_its_statistics():
    ours = nn.BatchNorm1d(3).requires_grad_(False)
    theirs = sequential((3,), kl.BatchNormalization(epsilon=1e-5, trainable=False))
    assert {a.role for a, _ in matched(ours, theirs)} == {"frozen"}
    rules = [a.role for a, _ in matched(nn.BatchNorm1d(3), sequential((3,), kl.BatchNormalization(epsilon=1e-5)))]
    assert rules == ["parameter", "parameter", "statistic", "statistic"]
