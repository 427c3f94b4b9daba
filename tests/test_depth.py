"""depth.py: the alignment to known depths, and the depth network, against the reference's numbers."""

import depth
import golden
import pytest
import torch

CAMERAS, CAMERA_ARRAYS = golden.case("camera_conditioning")
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@BOTH_DTYPES
def test_scale_and_shift_are_the_reference_s_least_squares(dtype):
    """Row 0 regular, 1 without pixels, 2 with one pixel, 3 of constant disparity: zeros but for the first."""
    disparity, target, mask = (CAMERA_ARRAYS[f"css/in_{name}"] for name in ("prediction", "target", "mask"))
    scale, shift = depth.scale_and_shift(disparity.to(dtype), target.to(dtype), mask)
    assert scale.dtype == dtype
    golden.assert_close(scale, CAMERA_ARRAYS["css/scale"])
    golden.assert_close(shift, CAMERA_ARRAYS["css/shift"])
    assert scale[1:].eq(0).all() and shift[1:].eq(0).all()


@BOTH_DTYPES
def test_every_view_s_fit_to_sparse_depth_is_the_reference_s(dtype):
    disparity = CAMERA_ARRAYS["in/depth_model_disparity"].to(dtype)
    sparse = CAMERA_ARRAYS["in/depth_cond"][..., 0].to(dtype)
    scale, shift = depth.scale_and_shift(disparity, 1 / sparse.clamp(*depth.DEPTH_RANGE), sparse > 0)
    fitted = depth.dense_depth(disparity, sparse, blend=False)
    for row in range(len(disparity)):
        expected_scale = CAMERA_ARRAYS["compute_scale_and_shift/scale"][row]
        golden.assert_close(scale[row], expected_scale)
        # a shift near 0 is a difference of larger numbers, so its error is measured against those
        golden.assert_close(shift[row], CAMERA_ARRAYS["compute_scale_and_shift/shift"][row],
                            observed=1e-6 * (expected_scale * disparity[row].mean()).abs().item())
    # compared as disparities: where they are near 0, rounding in the reference's fit is all of its depth
    golden.assert_close(1 / fitted[:, ::2, ::2], 1 / CAMERA_ARRAYS["aligned_monodepth[:, ::2, ::2]"])


@BOTH_DTYPES
@pytest.mark.parametrize("blend", [True, False])
def test_quantile_scales_of_the_dense_depth_are_the_reference_s(dtype, blend):
    disparity = CAMERA_ARRAYS["in/depth_model_disparity"].to(dtype)
    sparse = CAMERA_ARRAYS["in/depth_cond"][..., 0].to(dtype)
    dense = depth.dense_depth(disparity, sparse, blend)
    scales = dense[:, ::4, ::4].flatten(1).quantile(0.2, dim=1)
    expected = CAMERA_ARRAYS[f"quantile_scale_{'' if blend else 'no'}blend/scales"][:, 0]
    for found, known in zip(scales, expected, strict=True):
        golden.assert_close(found, known)
