"""engine/unet.py: the network whose norms add up the sums is model.UNet, by PyTorch and by kernels.
Without a GPU these run in Triton's interpreter (conftest.py); without Triton they are skipped."""

import pytest
import torch

import model
from engine import kernels, norm
from engine import unet as fused

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer_and_parts(c, dtype=torch.float32):
    """A LayerNorm, and x, h (r, n, c), row (r, c) in dtype, and room for the sum in longer rows."""
    torch.manual_seed(0)
    layer = torch.nn.LayerNorm(c).to(DEVICE)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    parts = [torch.randn(*shape, device=DEVICE).to(dtype)
             for shape in ((3, 7, c), (3, 7, c), (3, c), (3, 7, 2 * c))]
    return layer, [5 + parts[0], *parts[1:3], parts[3][..., :c]]


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("c", [16, 320, 1280])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_sum_and_its_layer_norm_are_those_of_float64(kernel, c):
    layer, parts = layer_and_parts(c)
    x, h, row, _ = [part.double() for part in parts]
    beyond = parts[3]._base[..., c:].clone()
    if kernel:
        found = fused.kernel_layer_norm(*parts, layer.weight, layer.bias, layer.eps)
    else:
        found = fused.layer_norm(layer, *parts)
    total = x + h + row[:, None]
    torch.testing.assert_close(found.double(), layer.double()(total), rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[3].double(), total, rtol=0, atol=1e-5)
    assert torch.equal(parts[3]._base[..., c:], beyond) and torch.equal(parts[0].double(), x)


@needs_triton
@torch.no_grad()
def test_a_layer_norm_of_nothing_more_leaves_its_input():
    layer, (x, *_) = layer_and_parts(320, torch.bfloat16)
    before = x.clone()
    found = fused.kernel_layer_norm(x, None, None, None, layer.weight, layer.bias, layer.eps)
    wanted = layer.double()(before.double())
    assert torch.equal(x, before) and found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 4e-3 * wanted.abs().max()


def networks(channels_last):
    """(model.UNet with transformers at its upper level, the same taken by fused.UNet, inputs)."""
    torch.manual_seed(0)
    unet = model.UNet(8, 4, 32, (1, 2, 2), 2, (1, 2), 2, 8, norm_groups=8).to(DEVICE)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    x, context = torch.randn(4, 8, 8, 8, device=DEVICE), torch.randn(4, 1, 8, device=DEVICE)
    return unet, x, context


def fuse(unet, t, context):
    """fused.UNet with its tables filled for a timestep t (1,) and contexts of all rows."""
    fast = fused.UNet(unet)
    steps = model.timestep_embedding(t, unet.model_channels)
    emb = unet.time_embed(steps.to(unet.time_embed[0].weight.dtype))
    for module in fast.modules():
        if isinstance(module, fused.Block):
            module.at_time = module.projected(emb)
        elif isinstance(module, fused.Transformer):
            module.at_view = module.projected(context)
    return fast


@torch.no_grad()
@pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_network_is_the_plain_one(channels_last, by_kernels, monkeypatch):
    unet, x, context = networks(channels_last)
    t = torch.tensor([500], device=DEVICE)
    wanted = unet(x, t.expand(len(x)), context)
    used, kernel = [], norm.kernel_sum_norm

    def sum_norm(x, h, bias, skip, *rest):
        used.append((h is not None, bias is not None, skip is not None))
        return kernel(x, h, bias, skip, *rest)

    monkeypatch.setattr(norm, "kernel_sum_norm", sum_norm)
    monkeypatch.setattr(kernels, "usable", lambda file, x, types=kernels.TYPES: by_kernels
                        and x.dtype in types)
    found = fuse(unet, t, context)(x, None, None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    # sums of two grids, of one with the bias that its conv has left, each alone or joined
    assert not by_kernels or set(used) == {(True, True, False), (False, True, False),
                                           (False, True, True), (False, False, True),
                                           (True, True, True)}
    last = fuse(unet, t, context)(x[2:], None, None)        # the last rows of the tables
    torch.testing.assert_close(last, wanted[2:], rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 is what GPUs sample in")
@torch.no_grad()
def test_in_bf16_it_is_as_near_to_float32_as_the_plain_network():
    unet, x, context = networks(channels_last=True)
    t = torch.tensor([500], device=DEVICE)
    wanted = unet(x, t.expand(len(x)), context)
    unet, x, context = unet.bfloat16(), x.bfloat16(), context.bfloat16()
    plain = (unet(x, t.expand(len(x)), context) - wanted).norm()
    found = (fuse(unet, t, context)(x, None, None) - wanted).norm()
    assert found < 1.2 * plain < 0.1 * wanted.norm()


@needs_triton
@torch.no_grad()
def test_torch_library_finds_nothing_wrong_with_the_operators():
    layer, parts = layer_and_parts(16)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(fused.kernel_layer_norm, (*parts, layer.weight, layer.bias, layer.eps),
                          test_utils=checks)
    x, h, skip = (torch.randn(2, c, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
                  for c in (16, 16, 8))
    bias, weight, beta = (torch.randn(c, device=DEVICE) for c in (16, 24, 24))
    for given in ((x, h, bias, skip), (x, None, None, skip)):
        torch.library.opcheck(norm.kernel_sum_norm, (*given, None, weight, beta, 8, 1e-5, True),
                              test_utils=checks)
