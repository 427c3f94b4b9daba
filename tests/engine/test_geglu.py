"""engine/geglu.py: the kernels against PyTorch in float64. Without a GPU they run in Triton's interpreter
(conftest.py); without Triton those tests are skipped."""

import pytest
import torch
import torch.nn.functional as F

from engine import geglu, kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(x):
    x, gate = x.chunk(2, dim=-1)
    return x * gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5))


def results(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y, x, dy)]


@needs_triton
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3),
                                          (torch.float16, 1e-3)])
@pytest.mark.parametrize("shape", [(2, 3, 16), (5, 512), (1, 7, 1034)])
def test_kernels_equal_float64_forward_and_backward(shape, dtype, bound):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE).to(dtype)
    for found, wanted in zip(results(geglu.kernel_forward, x, dy),
                             results(exact, x.double(), dy.double()), strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found - wanted).abs().max() < bound * wanted.abs().max()


@needs_triton
def test_gates_far_from_zero_pass_all_or_nothing():
    x = torch.tensor([[2.0, 3.0, 5.0, 40.0, -40.0, 0.0]], device=DEVICE)
    y, dx = results(geglu.kernel_forward, x, torch.ones(1, 3, device=DEVICE))
    assert y.tolist() == [[80.0, 0.0, 0.0]]
    assert dx.tolist() == [[40.0, 0.0, 0.0, 2.0, 0.0, 2.5]]     # Phi(0) = 1/2


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take hours")
def test_more_tokens_than_a_short_axis_of_a_grid_has_programs():
    x = torch.randn(65_536 * geglu.ROWS, 4, device=DEVICE)
    torch.testing.assert_close(geglu.kernel_forward(x), exact(x))


@needs_triton
def test_other_strides_are_taken_and_torch_library_finds_nothing_wrong():
    x = torch.randn(6, 4, device=DEVICE).T.requires_grad_()     # (4, 6), strides (1, 4)
    torch.testing.assert_close(geglu.kernel_forward(x), exact(x))
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(geglu.kernel_forward, (x,), test_utils=checks)
    torch.library.opcheck(geglu.kernel_backward, (torch.randn(4, 3, device=DEVICE), x.detach()),
                          test_utils=checks)


def test_the_plain_form_is_the_first_half_times_gelu_of_the_second():
    x = torch.randn(3, 5, 8)
    assert torch.equal(geglu.geglu(x), x[..., :4] * F.gelu(x[..., 4:]))


@torch.no_grad()
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_rows_may_be_parts_of_longer_ones(kernel):
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 12, device=DEVICE), torch.zeros(2, 5, 9, device=DEVICE)
    (geglu.kernel_into if kernel else geglu.geglu_into)(y[..., 2:8], x)
    torch.testing.assert_close(y[..., 2:8], exact(x))
    assert not y[..., :2].any() and not y[..., 8:].any()
    if kernel:
        torch.library.opcheck(geglu.kernel_into, (y, x), test_utils=("test_schema",
                                                                     "test_faketensor"))
