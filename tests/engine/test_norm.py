"""engine/norm.py: the kernels against PyTorch's GroupNorm in float64. Without a GPU they run in Triton's
interpreter (conftest.py); without Triton these tests are skipped."""

import pytest
import torch
import torch.nn.functional as F

from engine import forms, kernels, norm

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def drawn(b, c, h, w, dtype=torch.float32, mean=0.0):
    """[x, weight, bias, shift] and a gradient."""
    torch.manual_seed(0)
    x = (torch.randn(b, c, h, w, device=DEVICE) + mean).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    weight, bias, shift = (torch.randn(*shape, device=DEVICE) for shape in ((c,), (c,), (b, c)))
    return [x, 1 + 0.1 * weight, bias, shift], torch.randn_like(x)


def forward_and_gradients(function, inputs, dy, *options):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    x, weight, bias, *shift = inputs
    y = function(x, weight, bias, *options, *shift)
    return [y, *torch.autograd.grad(y, inputs, dy)]


def by_kernels(x, weight, bias, groups, silu, shift=None):
    return norm.kernel_forward(x, weight, bias, shift, groups, EPS, silu)[0]


def exact(x, weight, bias, groups, silu, shift=None):
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, EPS)
    return y * y.sigmoid() if silu else y


def worst(found, inputs, dy, *options):
    """Largest difference from float64, of each result in its largest value."""
    wanted = forward_and_gradients(exact, [i.double() for i in inputs], dy.double(), *options)
    return max(((a.double() - b).abs().max() / b.abs().max()).item()
               for a, b in zip(found, wanted, strict=True))


PATHS = {"small": {}, "blocks": {"SMALL": 0},
         "long blocks": {"SMALL": 0, "MOMENTS": (2, 16, 512, 1),
                         "WRITTEN": (4, 4, 512, 1), "SUMS": (2, 16, 128, 1)}}


@needs_triton
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape, groups", [
    ((2, 32, 3, 3), 8), ((2, 320, 5, 7), 32), ((1, 640, 4, 4), 32), ((1, 960, 12, 12), 32),
    ((1, 1280, 2, 2), 32), ((1, 1920, 2, 3), 32), ((1, 2560, 4, 4), 32), ((1, 32, 50, 43), 8)])
@pytest.mark.parametrize("silu", [True, False])
def test_kernels_equal_float64_forward_and_backward(shape, groups, silu, path, monkeypatch):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(norm, name, value)
    inputs, dy = drawn(*shape)
    found = forward_and_gradients(by_kernels, inputs, dy, groups, silu)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert worst(found, inputs, dy, groups, silu) < 3e-6    # float32 has 6e-8, sums of up to 2150


@needs_triton
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_kernels_round_to_the_input_s_type_only_at_the_end(dtype, bound):
    inputs, dy = drawn(2, 64, 9, 9, dtype)
    found = forward_and_gradients(by_kernels, inputs, dy, 32, True)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    assert worst(found, inputs, dy, 32, True) < bound       # twice the type's own rounding
    wanted = forward_and_gradients(exact, [i.double() for i in inputs], dy.double(), 32, True)
    for sums, expected in zip(found[2:], wanted[2:]):       # float32 sums of what is not rounded
        assert (sums - expected).abs().max() < 1e-5 * expected.abs().max()


@needs_triton
@pytest.mark.parametrize("path", PATHS)
def test_a_mean_far_from_zero_leaves_the_deviations_exact(path, monkeypatch):
    """Sums of squares would lose all of them: 1e3 squared is 1e6, and float32 has seven digits."""
    for name, value in PATHS[path].items():
        monkeypatch.setattr(norm, name, value)
    inputs, dy = drawn(1, 64, 13, 11, mean=1e3)
    found = forward_and_gradients(by_kernels, inputs, dy, 8, True)
    assert worst(found, inputs, dy, 8, True) < 2e-4         # of x itself float32 knows 6e-5


@needs_triton
def test_without_shift_there_is_none_and_other_strides_are_taken():
    (x, weight, bias, _), dy = drawn(2, 64, 6, 5)
    inputs = [x.contiguous(), weight, bias]
    found = forward_and_gradients(by_kernels, inputs, dy.contiguous(), 8, True)
    assert worst(found, inputs, dy, 8, True) < 3e-6


@needs_triton
def test_the_same_input_gives_the_same_bits():
    inputs, dy = drawn(2, 96, 12, 12)
    first, second = (forward_and_gradients(by_kernels, inputs, dy, 32, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_triton
def test_torch_library_finds_nothing_wrong_with_the_operators():
    (x, weight, bias, shift), dy = drawn(2, 32, 4, 4)
    x, weight, bias, shift = (t.requires_grad_() for t in (x, weight, bias, shift))
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(norm.kernel_forward, (x, weight, bias, shift, 8, EPS, True),
                          test_utils=checks)
    moments = norm.kernel_forward(x, weight, bias, shift, 8, EPS, True)[1].detach()
    torch.library.opcheck(norm.kernel_backward, (dy, x.detach(), weight.detach(), bias.detach(),
                                                 moments, 8, True), test_utils=checks)


def test_the_plain_form_is_group_norm_and_silu_bit_for_bit():
    x, weight, bias, shift = (tensor.cpu() for tensor in drawn(2, 32, 5, 4)[0])
    layer = layer_of(weight, bias, 8)
    moved = x + shift[:, :, None, None]
    assert torch.equal(norm.group_norm(layer, x, True, shift), F.silu(layer(moved)))
    assert torch.equal(norm.group_norm(layer, x), layer(x))


def layer_of(weight, bias, groups):
    layer = torch.nn.GroupNorm(groups, len(weight), EPS).to(weight.device, weight.dtype)
    layer.weight.data, layer.bias.data = weight, bias
    return layer


@pytest.mark.parametrize("with_h", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_plain_sum_is_added_up_once_and_leaves_its_parts(with_h, with_bias):
    x, h = torch.randn(2, 2, 8, 3, 4)
    before, bias = (x.clone(), h.clone()), torch.arange(8.0) if with_bias else None
    grid = forms.Sum(x, h if with_h else None, bias)
    wanted = x + with_h * h + with_bias * torch.arange(8.0)[:, None, None]
    assert torch.equal(grid.total(), wanted) and torch.equal(grid.total(), wanted)
    assert torch.equal(x, before[0]) and torch.equal(h, before[1])


def parts_of(kind, dtype=torch.float32):
    """(x, h, bias, skip, shift) of a sum, some of them None, and a norm for it."""
    c, c_skip = (96, 64) if kind != "skip of other groups" else (64, 96)
    (x, _, bias, shift), h = drawn(2, c, 9, 7, dtype, mean=3.0)
    skip = drawn(2, c_skip, 9, 7, dtype)[0][0].flip(0)
    h, bias = (h, bias) if kind != "skip alone" else (None, None)
    skip, shift = (None, shift) if kind == "sum" else (skip, None)
    layer = torch.nn.GroupNorm(32, c + (0 if skip is None else c_skip), EPS).to(DEVICE)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    return (x, h, bias, skip, shift), layer


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["sum", "sum and skip", "skip alone", "skip of other groups"])
def test_a_sum_and_its_norm_are_those_of_float64(kind, path, monkeypatch):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(norm, name, value)
    given, layer = parts_of(kind)
    found = norm.kernel_sum_norm(*given, layer.weight, layer.bias, 32, EPS, True)
    x, h, bias, skip, shift = (None if part is None else part.double() for part in given)
    wanted = forms.Sum(x, h, bias).normed(layer.double(), True, skip, shift)
    for grid, exact_grid in zip(found, wanted, strict=True):
        assert grid.is_contiguous(memory_format=torch.channels_last)
        assert (grid - exact_grid).abs().max() < 3e-6 * exact_grid.abs().max()


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_one_shift_for_all_samples_need_not_be_copied(path, monkeypatch):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(norm, name, value)
    (x, h, bias, _, shift), layer = parts_of("sum")
    found = [norm.kernel_sum_norm(x, h, bias, None, one, layer.weight, layer.bias, 32, EPS, True)[1]
             for one in (shift[:1].expand(2, -1), shift[:1].expand(2, -1).contiguous())]
    assert torch.equal(*found)
    other = norm.kernel_sum_norm(x, h, bias, None, shift, layer.weight, layer.bias, 32, EPS, True)
    assert (found[0] - other[1])[1].abs().max() > 0.1


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_a_norm_of_a_sum_in_bf16_is_that_of_the_sum_as_it_is_written(path, monkeypatch):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(norm, name, value)
    given, layer = parts_of("sum and skip", torch.bfloat16)
    total, y = norm.kernel_sum_norm(*given, layer.weight, layer.bias, 32, EPS, True)
    wanted = F.silu(layer.double()(total.double()))
    assert total.dtype == y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() < 4e-3 * wanted.abs().max()     # its own rounding, once
