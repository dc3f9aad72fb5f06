"""Networks are the same from the same seed, go to vectors and back, and keep samples apart."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from securefl.config import ConfigurationError, Model, Training
from securefl.models import (
    Layout,
    assign,
    build,
    flatten,
    layout,
    load_callable,
    loss,
    optimiser,
)

SHAPES = {
    "linear": (5,),
    "logistic": (5,),
    "mlp": (5,),
    "cnn": (1, 8, 8),
    "small-cnn": (1, 28, 28),
}

OWN = """
import torch
from torch import nn

def fine(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], 8), nn.GroupNorm(2, 8), nn.Linear(8, outputs))

def _wrapped(layer):
    return lambda shape, outputs: nn.Sequential(
        nn.Linear(shape[0], 8), layer(), nn.Linear(8, outputs))

batch_norm = _wrapped(lambda: nn.BatchNorm1d(8))
instance_norm = _wrapped(lambda: nn.InstanceNorm1d(8, track_running_stats=True))
lazy = _wrapped(lambda: nn.LazyLinear(8))
double = _wrapped(lambda: nn.Linear(8, 8).double())
frozen = _wrapped(lambda: nn.Linear(8, 8).requires_grad_(False))
narrow = _wrapped(lambda: nn.Linear(3, 8))
lstm = _wrapped(lambda: nn.LSTM(8, 8))
gru = _wrapped(lambda: nn.GRU(8, 8))
rnn = _wrapped(lambda: nn.RNN(8, 8))
attention = _wrapped(lambda: nn.TransformerEncoderLayer(8, 2))
spectral = _wrapped(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))

class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        self.seen += len(x)
        return x

counting = _wrapped(Counter)

def wide(shape, outputs):
    return nn.Linear(shape[0], outputs + 1)

def empty(shape, outputs):
    return nn.Flatten()

def nothing(shape, outputs):
    return None

def per_sample(outputs, targets):
    return (outputs[:, 0] - targets).abs()

def mean(outputs, targets):
    return per_sample(outputs, targets).mean()

def no_optimiser(parameters, lr):
    return lr

version = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the site's own, importable as `own_models`."""
    (tmp_path / "own_models.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_models", raising=False)


@pytest.mark.parametrize("name", SHAPES)
def test_the_public_seed_decides_the_weights_and_nothing_else_moves(name):
    shape = SHAPES[name]
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    one = build(Model(name=name), shape, 3, seed=1)
    assert torch.equal(torch.rand(1), untouched)
    same, other = (build(Model(name=name), shape, 3, seed=seed) for seed in (1, 2))
    assert np.array_equal(flatten(one), flatten(same))
    assert not np.array_equal(flatten(one), flatten(other))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 20, 17)])
def test_every_named_network_takes_images(name, shape):
    module = build(Model(name=name), shape, 10, seed=0)
    assert module(torch.zeros(4, *shape)).shape == (4, 10)


def test_the_small_cnn_is_that_of_the_literature():
    assert layout(build(Model(name="small-cnn"), (1, 28, 28), 10, 0)).size == 26_010
    with pytest.raises(ConfigurationError, match='choose "cnn" or "mlp"'):
        build(Model(name="small-cnn"), (1, 15, 16), 10, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_of_a_batch_is_the_sum_of_the_gradients_of_its_samples(name):
    """What DP-SGD rests on: no layer mixes samples."""
    module = build(Model(name=name), SHAPES[name], 3, seed=0)
    per_sample = loss(Model(), "classification")
    features, target = torch.rand(4, *SHAPES[name]), torch.tensor([0, 1, 2, 0])

    def gradient(rows):
        module.zero_grad()
        per_sample(module(features[rows]), target[rows]).sum().backward()
        return torch.cat([p.grad.reshape(-1).clone() for p in module.parameters()])

    apart = sum(gradient(slice(row, row + 1)) for row in range(4))
    assert torch.allclose(gradient(slice(None)), apart, atol=1e-5)


def test_a_linear_network_is_one_layer_and_an_mlp_has_the_hidden_widths():
    assert layout(build(Model(name="linear"), (5,), 2, 0)).shapes == ((2, 5), (2,))
    shapes = layout(build(Model(name="mlp", hidden=(7, 3)), (5,), 2, 0)).shapes
    assert shapes == ((7, 5), (7,), (3, 7), (3,), (2, 3), (2,))


def test_the_digits_cnn_fills_several_ciphertexts():
    assert 15_000 <= layout(build(Model(name="cnn"), (1, 8, 8), 10, 0)).size <= 30_000


def test_a_cnn_needs_images_of_at_least_8_by_8():
    for shape in ((30,), (1, 7, 8)):
        with pytest.raises(ConfigurationError, match='choose "mlp"'):
            build(Model(name="cnn"), shape, 2, 0)


def test_a_callable_builds_its_own_network(own):
    module = build(Model(name="own_models:fine"), (5,), 3, seed=1)
    assert module(torch.zeros(2, 5)).shape == (2, 3)
    assert np.array_equal(
        flatten(module), flatten(build(Model(name="own_models:fine"), (5,), 3, 1))
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "batch_norm",
            "layer '1' is BatchNorm1d, which breaks per-sample gradients: use torch.nn.G",
        ),
        ("instance_norm", "set track_running_stats=False"),
        ("lstm", "use opacus.layers.DPLSTM"),
        ("gru", "use opacus.layers.DPGRU"),
        ("rnn", "use opacus.layers.DPRNN"),
        ("attention", "layer '1.self_attn' is MultiheadAttention"),
        ("lazy", "parameter '1.weight' has no shape yet"),
        ("double", "parameter '1.weight' is torch.float64"),
        ("frozen", "parameter '1.weight' does not require a gradient"),
        ("narrow", "cannot take features of shape [5]"),
        ("spectral", "training changes buffer"),
        ("counting", "training changes buffer '1.seen'"),
        ("wide", "gives [2, 4] for a batch of two: give [2, 3]"),
        ("empty", "has no parameters"),
        ("nothing", "returned NoneType: return a torch.nn.Module"),
        ("absent", "module 'own_models' has no 'absent'"),
        ("version", "holds a value, no callable, as 'version'"),
    ],
)
def test_a_network_that_would_break_training_is_refused(own, name, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        build(Model(name=f"own_models:{name}"), (5,), 3, seed=0)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_installed_is_named():
    with pytest.raises(ConfigurationError, match=r"cannot import 'no_such_module:f'.*PYTHONPATH"):
        load_callable("no_such_module:f")


def test_losses_are_one_value_a_sample(own):
    logits, classes = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    given = loss(Model(), "classification")(logits, classes)
    assert given.tolist() == pytest.approx([np.log(1 + np.exp(-2)), np.log(2)])
    measured, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 5.0])
    assert loss(Model(), "regression")(measured, targets).tolist() == [1, 4]
    absolute = loss(Model(loss="own_models:per_sample"), "regression")
    assert absolute(measured, targets).tolist() == [1, 2]


def test_losses_take_an_empty_batch():
    """A Poisson sample may hold no record."""
    none = loss(Model(), "classification")(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0,)
    assert loss(Model(), "regression")(torch.zeros(0, 1), torch.zeros(0)).shape == (0,)


def test_a_loss_that_does_not_fit_is_refused(own):
    with pytest.raises(ConfigurationError, match='"cross-entropy" is not for regression'):
        loss(Model(loss="cross-entropy"), "regression")
    with pytest.raises(ConfigurationError, match='"squared-error" is not for classification'):
        loss(Model(loss="squared-error"), "classification")
    mean = loss(Model(loss="own_models:mean"), "regression")
    with pytest.raises(ConfigurationError, match="does not give one loss a sample"):
        mean(torch.zeros(2, 1), torch.zeros(2))


def test_an_optimiser_takes_the_configured_values(own):
    parameters = list(nn.Linear(2, 1).parameters())
    sgd = optimiser(Training(learning_rate=0.3, momentum=0.5, weight_decay=0.1), parameters)
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[key] for key in ("lr", "momentum", "weight_decay")] == [0.3, 0.5, 0.1]
    adam = optimiser(Training(optimiser="adam", learning_rate=0.2), parameters)
    assert isinstance(adam, torch.optim.Adam)
    own_choice = optimiser(Training(optimiser="torch.optim:RMSprop", momentum=0.5), parameters)
    assert isinstance(own_choice, torch.optim.RMSprop)
    assert own_choice.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimiser": "adam", "momentum": 0.9}, 'is for "sgd"'),
        ({"optimiser": "torch.optim:AdamW", "momentum": 0.9}, "does not take lr, momentum"),
        ({"optimiser": "own_models:no_optimiser"}, "returned float"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_refused(own, keys, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        optimiser(Training(**keys), nn.Linear(2, 1).parameters())


@given(st.integers(0, 100))
def test_assign_is_the_inverse_of_flatten(seed):
    module = build(Model(name="mlp"), (3,), 2, seed=0)
    vector = np.random.default_rng(seed).normal(size=layout(module).size).astype(np.float32)
    assign(module, vector)
    assert np.array_equal(flatten(module), vector)
    first = next(module.parameters())
    assert first.detach().numpy().reshape(-1).tolist() == vector[: first.numel()].tolist()


def test_flatten_gives_a_copy():
    module = nn.Linear(2, 1)
    vector = flatten(module)
    kept = vector.copy()
    assign(module, vector + 1)
    assert np.array_equal(vector, kept)
    single = nn.Linear(2, 1, bias=False)
    flatten(single)[:] = 7
    assert not (flatten(single) == 7).any()


def test_a_vector_of_another_size_changes_nothing():
    module = nn.Linear(2, 1)
    before = flatten(module)
    for size in (2, 4):
        with pytest.raises(ValueError, match="but the module has 3 parameters"):
            assign(module, np.zeros(size, np.float32))
    assert np.array_equal(flatten(module), before)


def test_a_layout_tells_weights_from_biases():
    where = layout(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    assert where.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert (where.size, where.sizes) == (13, (6, 3, 3, 1))
    assert where.slices()[1] == slice(6, 9)
    assert where.prunable.tolist() == [True] * 6 + [False] * 3 + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("names", "shapes"), [((), ()), (("a",), ()), (("a", "a"), ((1,), (2,))), (("a",), ((0, 2),))]
)
def test_a_layout_that_describes_no_module_cannot_be_made(names, shapes):
    with pytest.raises(ValueError, match=r"name|extent"):
        Layout(names, shapes)
