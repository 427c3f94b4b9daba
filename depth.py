"""The length that counts as one, where it follows from depth: a disparity network and its fit.

In: views (b, 3, h, w) in [-1, 1] and their sparse depth (b, h, w), 0 where it is not known. Out:
`viewer_scale` (b,), the 20% quantile of each view's dense depth, and `pose_vector` (b, 4 or 19), T
of a batch of pairs. Read these two first, then `dense_depth`.

`DPT` is MiDaS 3.1's DPT_SwinV2_T_256 (github.com/isl-org/MiDaS): a Swin Transformer V2 tiny encoder
(arXiv:2111.09883: attention inside of windows, which every second block shifts) under the DPT
decoder (arXiv:2103.13413). It answers disparity, that is inverse depth up to scale and shift, which
sparse depth tells, known at some pixels: so depth becomes dense, known at all.

b batch, c channels, h w image or feature grid, m windows, n pixels of a window, d head width.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import camera

DEPTH_RANGE = (1e-3, 1e3)  # disparities and depths are clipped to it: reference behaviour
HOLES = ("the depth of the conditioning view has holes, and mode 7dof_quantile_scale needs all of "
         "it: give --depth_weights=dpt_swin2_tiny_256.pt, which fills them, or choose --mode=7dof, "
         "which takes the scale from the cameras")
SINGULAR = 8  # a disparity that varies by less than this many units of rounding is constant

PATCH = 4  # pixels along each side of an encoder token
MLP_RATIO = 4
BIAS_WIDTH = 512  # hidden width of the position bias network, Swin V2 section 3.3
BIAS_MAX = 16  # the sigmoid's multiple in it: the bias is between 0 and 16
BIAS_EXTENT = 8  # relative positions are scaled to +-8 before their logarithm is taken
MAX_LOGIT_SCALE = math.log(100)  # Swin V2 section 3.2: the temperature is 0.01 or more
MASKED = -100.0  # what is added to the score of two pixels that are no neighbours
HEAD_WIDTH = 32  # before the decoder's last convolution
STAGES = 1, 2, 3, 4  # of the encoder, fine to coarse
# Beginnings of names that files hold and that disparity does not depend on
UNUSED = "pretrained.model.norm.", "pretrained.model.head.", "scratch.refinenet4.resConfUnit1."


# ---- the scale

def pose_vector(batch, mode, depth_net=None, blend=True):
    """The pose vectors T (b, d) float32 of a batch of pairs, as data.py delivers them; depth_net: a
    DPT for views whose depth has holes. ValueError names the pair whose depth is not known."""
    scale = scale_of(batch, mode, depth_net, blend).to(batch["cond_c2w"].device)
    return camera.conditioning(mode, batch["cond_c2w"], batch["target_c2w"], batch["fov"],
                               scale).float()


def scale_of(batch, mode, depth_net=None, blend=True):
    """The length (b,) that a mode takes as one in each pair of a batch; see `pose_vector`."""
    unit = camera.mode_named(mode).unit
    if "scale" in batch:        # encoded shards hold the viewer's
        return batch["scale"]
    if unit == "metric":
        raise ValueError(camera.NO_METRIC_DEPTH)
    if unit == "nearplane":
        return camera.stereomag_scale(batch["nearplane"])
    if unit != "viewer":        # unscaled modes ignore it
        return batch["radius"]
    scale = viewer_scale(batch["depth_cond"], batch["image_cond"], depth_net, blend)
    if scale.isnan().any():
        raise ValueError(f"{batch['uid'][scale.isnan().int().argmax()]}: {HOLES}")
    return scale


def viewer_scale(sparse_depth, image, depth_net=None, blend=True):
    """20% quantiles (b,) of the depths of views, in their unit; nan where there are holes.

    sparse_depth: (b, h, w), 0 where unknown; depth_net: a DPT that fills the holes from image
    (b, 3, h, w) in [-1, 1]; blend: known depths replace the network's.
    """
    if depth_net is None and not blend:
        raise ValueError("quantile_blend=False takes scales from the depth network alone, and there"
                         " is none: --depth_weights=dpt_swin2_tiny_256.pt brings it")
    holes = (sparse_depth <= 0).flatten(1).any(1)
    if depth_net is None or blend and not holes.any():
        return camera.quantile_scale(sparse_depth).where(~holes, torch.nan)
    with torch.autocast(image.device.type, enabled=False):      # bf16 is off by up to 1%
        disparity = depth_net(image)
    return camera.quantile_scale(dense_depth(disparity, sparse_depth.to(disparity.device), blend))


def dense_depth(disparity, sparse_depth, blend):
    """Depth at every pixel (b, h, w): 1 / (scale * disparity + shift), fitted to the sparse depth.

    disparity: (b, h, w) of `DPT`; sparse_depth: (b, h, w), 0 where unknown; blend: known depths
    replace fitted ones. The fit is to 1 / depth; both are clipped to DEPTH_RANGE.
    """
    # quirk: no line is fitted to one disparity alone (a view with no known depth, or one): scale
    # and shift are then 0, and the view is 1000 away everywhere
    # [test_every_view_s_fit_to_known_depth_is_the_reference_s]
    valid = sparse_depth > 0
    scale, shift = scale_and_shift(disparity, 1 / sparse_depth.clamp(*DEPTH_RANGE), valid)
    fitted = scale[:, None, None] * disparity + shift[:, None, None]
    fitted = 1 / fitted.clamp(*DEPTH_RANGE)
    return sparse_depth.where(valid, fitted) if blend else fitted


def scale_and_shift(disparity, target, mask):
    """Least squares (scale (b,), shift (b,)) of scale * disparity + shift against target, all
    (b, h, w), over the pixels of mask. Solved about the means: MiDaS's normal equations have the
    same solution, but cancel in float32."""
    # departs: disparities that differ by rounding alone count as one, to which no line is fitted;
    # the reference's is noise [test_a_disparity_that_varies_by_rounding_alone_counts_as_constant]
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


# ---- the network

class DPT(nn.Module):
    """Image to disparity. The defaults are DPT_SwinV2_T_256; state dict names are MiDaS's.

    image: (b, 3, h, w) in [-1, 1], which goes in as it is. Returns (b, h, w), 0 or more.
    """
    # departs: images of another size than the depth network's are resized to it, and the disparity
    # back; the reference refuses them [test_images_of_another_size_get_disparity_of_their_size]
    def __init__(self, image_size=256, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
                 window_size=16, features=256):
        super().__init__()
        self.image_size = image_size
        encoder = SwinV2(image_size, embed_dim, depths, num_heads, window_size)
        self.pretrained = nn.ModuleDict({"model": encoder})
        self.scratch = Decoder(embed_dim, features)

    def forward(self, image):
        x = resize(image, (self.image_size, self.image_size))  # (b, 3, image_size, image_size)
        disparity = self.scratch(*self.pretrained.model(x))  # (b, 1, image_size, image_size)
        return resize(disparity, image.shape[2:]).squeeze(1)  # (b, h, w)


def resize(x, size):
    """x (b, c, *size), by bilinear interpolation that averages where it shrinks."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


class SwinV2(nn.Module):
    """Swin Transformer V2: x (b, 3, s, s), s = image_size, to what each stage ends with:
    (b, c, s/4, s/4), (b, 2c, s/8, s/8), (b, 4c, s/16, s/16), (b, 8c, s/32, s/32); c = embed_dim."""
    def __init__(self, image_size, embed_dim, depths, num_heads, window_size):
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, size = embed_dim * 2**i, image_size // (PATCH * 2**i)
            window = min(window_size, size)
            assert size % window == 0, f"windows of {window} do not tile a grid of {size}"
            shift = window // 2 if window < size else 0  # of every second block
            self.layers.append(nn.ModuleDict({
                "blocks": nn.ModuleList(Block(dim, size, heads, window, shift if j % 2 else 0)
                                        for j in range(depth)),
                "downsample": PatchMerging(dim) if i < len(depths) - 1 else nn.Identity()}))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)  # of ImageNet

    def forward(self, x):
        x = self.patch_embed(x)  # (b, s/4, s/4, c)
        features = []
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x)
            features.append(x.permute(0, 3, 1, 2))
            x = layer.downsample(x)  # (b, h/2, w/2, 2c), but for the last stage
        return features


class PatchEmbed(nn.Module):
    """Image (b, 3, h, w) -> tokens (b, h/4, w/4, c)."""
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # (b, h/4, w/4, c)


class PatchMerging(nn.Module):
    """Tokens (b, h, w, c) -> (b, h/2, w/2, 2c): four neighbours, column by column, become one."""
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (b, h/2, 2, w/2, 2, c)
        return self.norm(self.reduction(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Block(nn.Module):
    """Attention and MLP, each normalised after itself (Swin V2 section 3.2). x: (b, h, w, c)."""
    def __init__(self, dim, size, heads, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.attn = WindowAttention(dim, heads, window)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, MLP_RATIO * dim), act=nn.GELU(),
                                             fc2=nn.Linear(MLP_RATIO * dim, dim)))
        self.norm2 = nn.LayerNorm(dim)
        self.register_buffer("attn_mask", shift_mask(size, window, shift) if shift else None)

    def forward(self, x):
        y = x.roll((-self.shift, -self.shift), (1, 2))
        y = y.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window)).transpose(2, 3)
        grid = y.shape  # (b, rows, columns, window, window, c), rows and columns of windows
        y = self.attn(y.flatten(3, 4).flatten(1, 2), self.attn_mask)  # (b, m, n, c)
        y = y.view(grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (b, h, w, c)
        x = x + self.norm1(y.roll((self.shift, self.shift), (1, 2)))
        return x + self.norm2(self.mlp(x))


class WindowAttention(nn.Module):
    """Cosine attention within windows: softmax(cos(q, k) * scale + position bias + mask) v.

    x: (b, m, n, c), mask: (m, n, n) or None. Swin V2 eq. 2, bias of section 3.3.
    """
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, BIAS_WIDTH), nn.ReLU(),
                                     nn.Linear(BIAS_WIDTH, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        table, index = relative_positions(window)
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x, mask):
        b, m, n, c = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).view(b, m, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (b, m, heads, n, d)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        k = F.normalize(k, dim=-1)
        bias = BIAS_MAX * self.cpb_mlp(self.relative_coords_table).sigmoid()
        bias = bias[self.relative_position_index].permute(2, 0, 1)  # (heads, n, n)
        bias = bias.expand(m, -1, -1, -1)  # (m, heads, n, n)
        if mask is not None:
            bias = bias + mask[:, None]
        # windows count as heads, so that one bias serves the whole batch
        q, k, v, bias = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias.flatten(0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.proj(y.unflatten(1, (m, self.heads)).transpose(2, 3).flatten(3))  # (b, m, n, c)


def relative_positions(window):
    """Offsets between a window's pixels: their log-spaced coordinates (p, 2), p = (2 window - 1)^2,
    Swin V2 eq. 4, and which of them each pair of pixels has, query first: (n, n) int64."""
    offset = torch.arange(1 - window, window) / max(window - 1, 1) * BIAS_EXTENT
    offset = offset.sign() * (offset.abs() + 1).log2() / math.log2(BIAS_EXTENT)
    table = torch.cartesian_prod(offset, offset)  # (p, 2)
    row, column = torch.cartesian_prod(torch.arange(window), torch.arange(window)).unbind(1)
    rows, columns = (i[:, None] - i + window - 1 for i in (row, column))  # (n, n)
    return table, rows * (2 * window - 1) + columns


def shift_mask(size, window, shift):
    """Scores' mask (m, n, n): it parts what the roll by `shift` brings into one window."""
    i = torch.arange(size)
    side = (i >= size - window).int() + (i >= size - shift).int()
    region = 3 * side[:, None] + side  # (size, size), 0 to 8
    region = region.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1)
    return torch.where(region[:, :, None] == region[:, None], 0.0, MASKED)  # (m, n, n)


class Decoder(nn.Module):
    """DPT's fusion of `SwinV2`'s four stages, coarse to fine. Returns (b, 1, s, s), 0 or more."""
    def __init__(self, embed_dim, features):
        super().__init__()
        for i in STAGES:
            conv = nn.Conv2d(2**(i - 1) * embed_dim, features, 3, padding=1, bias=False)
            self.add_module(f"layer{i}_rn", conv)
        for i in STAGES:
            self.add_module(f"refinenet{i}", Fusion(features))
        self.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, HEAD_WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(HEAD_WIDTH, 1, 1), nn.ReLU())

    def forward(self, layer_1, layer_2, layer_3, layer_4):
        path = self.refinenet4(self.layer4_rn(layer_4))  # (b, features, s/16, s/16)
        path = self.refinenet3(path, self.layer3_rn(layer_3))  # (b, features, s/8, s/8)
        path = self.refinenet2(path, self.layer2_rn(layer_2))  # (b, features, s/4, s/4)
        path = self.refinenet1(path, self.layer1_rn(layer_1))  # (b, features, s/2, s/2)
        return self.output_conv(path)  # (b, 1, s, s)


class Fusion(nn.Module):
    """Adds a stage to what comes from the coarser ones, doubles the size. x, skip: (b, c, h, w)."""
    def __init__(self, features):
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualConv(features)
        self.resConfUnit2 = ResidualConv(features)

    def forward(self, x, skip=None):
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)  # (b, c, 2h, 2w)


class ResidualConv(nn.Module):
    """Two 3x3 convs, each behind a ReLU, and the input added. x: (b, c, h, w)."""
    def __init__(self, features):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))
