"""Dense depth of one view: a disparity network, and its alignment to the view's sparse depth.

`DPT` is MiDaS 3.1's DPT_SwinV2_T_256: a Swin V2 tiny encoder (arXiv:2111.09883) and the DPT
decoder (arXiv:2103.13413). It answers relative disparity, inverse depth up to scale and shift,
which `dense_depth` fits to the depths that are known.

b batch, c channels, h w image or feature grid, n tokens of one window, m windows, k heads, d head width.
"""

import torch

DEPTH_RANGE = (1e-3, 1e3)  # disparities and depths are clipped to it: reference behaviour
SINGULAR = 8  # a disparity that varies by fewer units of rounding than this is constant


def scale_and_shift(disparity, target, mask):
    """Least squares of scale * disparity + shift against target over the pixels of mask.

    disparity, target: (b, h, w); mask: (b, h, w) bool or 0/1. Returns scale (b,), shift (b,). Solved about
    the mean, which in float32 loses far less than MiDaS's normal equations, and is the same solution.
    quirk: without two different disparities there is no line, and scale = shift = 0.
    """
    mask = mask.bool().flatten(1)
    p = disparity.to(target.dtype).flatten(1).where(mask, 0)  # (b, h*w)
    y = target.flatten(1).where(mask, 0)  # (b, h*w)
    count = mask.sum(1).clamp(min=1)
    p_mean, y_mean = p.sum(1) / count, y.sum(1) / count
    p_centred = (p - p_mean[:, None]).where(mask, 0)
    variance = p_centred.square().sum(1)
    rounding = SINGULAR * torch.finfo(p.dtype).eps
    regular = variance > rounding**2 * p.square().sum(1)
    scale = (p_centred * (y - y_mean[:, None])).sum(1) / variance.where(regular, 1)
    shift = y_mean - scale * p_mean
    return scale.where(regular, 0), shift.where(regular, 0)


def dense_depth(disparity, depth, blend):
    """Depth at every pixel (b, h, w): 1 / (scale * disparity + shift), fitted to the known depths.

    disparity: (b, h, w) of `DPT`; depth: (b, h, w), 0 where unknown, whose unit the result has;
    blend: known depths replace fitted ones. The fit is to 1 / depth, both clipped to DEPTH_RANGE.
    quirk: a view with no known depth, or only one, is DEPTH_RANGE[1] away everywhere.
    """
    if disparity.shape != depth.shape or depth.ndim != 3:
        raise ValueError(f"disparity is {tuple(disparity.shape)} and depth {tuple(depth.shape)}: "
                         "both must be (b, h, w), of the same size")
    known = depth > 0
    scale, shift = scale_and_shift(disparity, 1 / depth.clamp(*DEPTH_RANGE), known)
    fitted = scale[:, None, None] * disparity + shift[:, None, None]
    fitted = 1 / fitted.clamp(*DEPTH_RANGE)
    return depth.where(known, fitted) if blend else fitted
