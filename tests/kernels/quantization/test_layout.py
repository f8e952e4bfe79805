"""Scales as kernels read them: made once, followed when loaded, and nowhere in what is saved."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from saml_kernels import quantize
from saml_kernels.quantization import layout


def weight(double_quant=True, format="nf4", shape=(40, 128)):
    return quantize(torch.randn(shape), format, 64, double_quant)


def parts(tensor):
    return [(name, part.clone()) for name, part in tensor.state_dict().items()]


def same(one, other):
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4"])
@pytest.mark.parametrize("shape", [(40, 128), (7, 50), (300, 640)])
def test_they_are_the_scales(format, shape):
    w = weight(format=format, shape=shape)
    assert torch.equal(w.kernel_scales(), w.scales())
    assert w.kernel_scales() is w.kernel_scales() and w.kernel_scales().dtype == torch.float32
    assert w.device_nbytes - w.nbytes == w.kernel_scales().nbytes


def test_plain_scales_are_taken_as_they_are():
    w = weight(double_quant=False)
    assert w.kernel_scales() is w.absmax and w.device_nbytes == w.nbytes


def test_nothing_of_them_is_saved_or_copied():
    w = weight()
    before, bytes_before = parts(w), pickle.dumps(w)
    scales = w.kernel_scales()
    assert same(before, parts(w)) and pickle.dumps(w) == bytes_before
    for other in (copy.deepcopy(w), pickle.loads(bytes_before)):
        assert same(before, parts(other))
        assert other.kernel_scales() is not scales and torch.equal(other.kernel_scales(), scales)


def test_made_when_it_moves_and_gone_when_it_moves_back(monkeypatch):
    w = weight()
    before = parts(w)
    assert w.absmax not in layout._KEPT
    monkeypatch.setattr(layout, "DEVICES", layout.DEVICES | {"cpu"})  # stands for a GPU
    w._apply(torch.Tensor.clone)
    there = weakref.ref(layout._KEPT[w.absmax].scales)
    monkeypatch.undo()
    w._apply(torch.Tensor.clone)
    gc.collect()
    assert there() is None and w.absmax not in layout._KEPT
    assert same(before, parts(w))


def test_a_dropped_weight_takes_them_along():
    w = weight()
    scales = weakref.ref(w.kernel_scales())
    gc.disable()
    try:
        del w
        assert scales() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("inference", [False, True])
def test_a_loaded_file_is_followed_where_they_lie(inference):
    w, other = weight(), weight()
    with torch.inference_mode(inference):
        scales = w.kernel_scales()
        place = scales.data_ptr()
        w.load_state_dict(other.state_dict())
    assert w.kernel_scales() is scales and scales.data_ptr() == place
    assert torch.equal(scales, other.scales())


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "offset"])
def test_what_is_written_by_hand_is_followed(part):
    w = weight()
    scales = w.kernel_scales()
    with torch.no_grad():
        getattr(w, part).add_(1)
    assert w.kernel_scales() is scales and torch.equal(scales, w.scales())
    setattr(w, part, getattr(w, part).clone().add_(1))
    assert torch.equal(w.kernel_scales(), w.scales())


def test_rows_of_several_formats_are_weights_of_their_own():
    """A table in two formats: each group's product, side by side, is the product of the whole."""
    groups = [weight(format="nf4"), weight(format="int8", shape=(24, 128))]
    x = torch.randn(3, 128)
    whole = x @ torch.cat([g.dequantize() for g in groups]).T
    apart = []
    for g in groups:
        codes = g._values(g.codes).reshape(g.shape[0], -1, 64)
        apart.append(x @ (codes * g.kernel_scales().view(g.shape[0], -1, 1)).flatten(1).T)
    torch.testing.assert_close(torch.cat(apart, 1), whole)
