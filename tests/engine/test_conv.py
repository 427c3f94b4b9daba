"""engine/conv.py: the kernels against PyTorch in float64. Without a GPU they run in Triton's interpreter
(conftest.py); without Triton they are skipped."""

import pytest
import torch
import torch.nn.functional as F

import engine
from engine import conv, kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies bfloat16's bits as integers
TYPES = [torch.float16, torch.bfloat16][:2 if torch.cuda.is_available() else 1]


def image(shape, dtype):
    """An image (b, c, h, w), weight (d, c, 3, 3) and bias (d,) of these sizes."""
    torch.manual_seed(0)
    b, c, h, w, d = shape
    return [torch.randn(size, device=DEVICE).to(dtype)
            for size in ((b, c, h, w), (d, c, 3, 3), (d,))]


def conv_in_float64(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 16, 24, 40), (1, 3, 5, 3, 128), (3, 4, 37, 31, 24),
                                   (2, 5, 9, 9, 72), (5, 1, 1, 1, 8)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_first_convolution_rounds_once(shape, last, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda file, x, types: x.dtype in types)
    x, weight, bias = image(shape, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    found = conv.first_conv(x, weight.float(), bias.float())
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), conv_in_float64(x, weight, bias),
                               rtol=torch.finfo(dtype).eps, atol=1e-4)
    x, taps, bias = (torch.randn(size, device=DEVICE).to(dtype)
                     for size in ((2, 7, 9, 4), (3, 16, 24), (24,)))
    torch.library.opcheck(conv.kernel_first, (x, taps, bias),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(2, 3, 16, 24, 40), (1, 1, 1, 1, 8)])
def test_elsewhere_the_first_convolution_is_a_product(shape):
    given = image(shape, torch.float64)
    torch.testing.assert_close(conv.first_conv(*given), conv_in_float64(*given), rtol=1e-12,
                               atol=1e-12)
    x, weight, bias = image(shape, torch.float32)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert conv.first_conv(x, weight, bias).dtype == torch.bfloat16


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("tile", [tile for _, tile in conv.TILES] + [(16, 32, 32, 4, 2)])
@pytest.mark.parametrize("shape", [(2, 64, 4, 4, 32), (1, 40, 3, 5, 136), (3, 24, 7, 6, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_few_positions_rounds_once(tile, shape, stride, monkeypatch):
    monkeypatch.setattr(conv, "TILES", ((2**31, tile),))
    torch.manual_seed(0)
    r, c, h, w, d = shape
    x = torch.randn(r, c, h, w, device=DEVICE).half()
    weight = (torch.randn(d, c, 3, 3, device=DEVICE) / (9 * c)**0.5).half()
    found = conv.kernel_conv(x, weight, stride)
    wanted = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    assert found.dtype == torch.float16 and found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    torch.library.opcheck(conv.kernel_conv, (x, weight, stride),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("stride", [1, 2])
def test_elsewhere_it_is_pytorchs(stride):
    x, weight = torch.randn(2, 5, 4, 3, device=DEVICE), torch.randn(7, 5, 3, 3, device=DEVICE)
    assert torch.equal(conv.conv3x3(x, weight, stride),
                       F.conv2d(x, weight, stride=stride, padding=1))


@pytest.mark.parametrize("shape", [(2, 5, 4, 3, 7), (1, 8, 1, 1, 8), (3, 4, 2, 6, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_taps_summed_beforehand_give_the_convolution_of_the_upsampled_grid(shape, bias):
    r, c, h, w, d = shape
    x, weight, bias = (torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True)
                       if size else None for size in ((r, c, h, w), (d, c, 3, 3), bias * (d,)))
    wanted = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    found = conv.upsample_conv(x, conv.upsample_taps(weight), bias)
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    back = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, given, back),
                               torch.autograd.grad(wanted, given, back), rtol=1e-12, atol=1e-12)


def test_a_1x1_convolution_and_one_of_patches_are_products():
    given = torch.randn(2, 5, 6, 9, dtype=torch.float64, device=DEVICE)
    layer = torch.nn.Conv2d(5, 7, 1).double().to(DEVICE)
    torch.testing.assert_close(conv.conv1x1(layer, given), layer(given), rtol=1e-12, atol=1e-12)
    tokens = conv.conv1x1(layer, given.flatten(2).mT)
    torch.testing.assert_close(tokens, layer(given).flatten(2).mT, rtol=1e-12, atol=1e-12)
    patches = torch.nn.Conv2d(5, 7, 3, stride=3).double().to(DEVICE)
    wanted = patches(given)
    assert engine.convert(patches) == {"PatchConv": 1}
    torch.testing.assert_close(patches(given), wanted, rtol=1e-12, atol=1e-12)
