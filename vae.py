"""The autoencoder between images and latents: AutoencoderKL of latent diffusion (arXiv:2112.10752).

    encode: image (b, 3, h, w) in [-1, 1] -> posterior (mean, logvar), each (b, 4, h/8, w/8)
    decode: latent (b, 4, h/8, w/8)       -> image (b, 3, h, w), not clamped

The posterior is what the encoder says of an image's latent: a Gaussian, with a mean and the log of
a variance for each number. KL, in the name, is the term of its training that kept it near N(0, 1).
It is frozen: training and sampling only call these two. Read them first, then ResBlock and
Downsample, where the published weights expect an odd padding. Module names are the checkpoint's
(`first_stage_model.*`), in its order.
Letters: `b` batch, `c` channels, `h w` image or feature grid, `z` latent channels.
"""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

SCALE_FACTOR = 0.18215         # Stable Diffusion's: latents times this have a deviation near 1
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
NORM_GROUPS, NORM_EPS = 32, 1e-6
FOLD = 2                        # pixels a side that Pixels folds into channels


class AutoencoderKL(nn.Module):
    """Images to the posterior of their latents, and latents back to images.

    ch: channels of the finest level; ch_mult: multiples of it, one a level, each level half the
    size of the one before; attn_resolutions: grid sizes with attention, counted from `resolution`,
    whatever the image's own size.
    """
    def __init__(self, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, embed_dim=4,
                 attn_resolutions=(), resolution=256):
        super().__init__()
        levels = (ch, ch_mult, num_res_blocks, attn_resolutions, resolution)
        self.encoder = Encoder(*levels, 2 * z_channels)
        self.decoder = Decoder(*levels, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x):
        """Image, of sides that 8 divides, to the posterior's (mean, logvar); neither is multiplied
        by SCALE_FACTOR."""
        return posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latent, already divided by SCALE_FACTOR, to an image, in the weights' precision."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


def posterior(moments):
    """The encoder's moments (b, 2z, h, w) to (mean, logvar), each (b, z, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)


def sample(mean, logvar, noise):
    """A latent from the posterior by standard normal noise; all of one shape. Not yet scaled."""
    return mean + (0.5 * logvar).exp() * noise


class Encoder(nn.Module):
    """(b, 3, h, w) -> (b, c_out, h/8, w/8) for four levels."""
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, c_out):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        widths = [ch * mult for mult in ch_mult]
        for level, (c_in, c) in enumerate(zip([ch, *widths], widths)):
            down = Level(c_in, c, num_res_blocks, resolution >> level in attn_resolutions)
            down.downsample = Downsample(c) if level < len(widths) - 1 else nn.Identity()
            self.down.append(down)
        self.mid = middle(c)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, c, NORM_EPS)
        self.conv_out = nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                                 # (b, ch, h, w)
        for down in self.down:
            h = down.downsample(down(h))                                    # (b, c, h/2, w/2)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(b, z, h, w) -> (b, 3, 8h, 8w) for four levels. `up` counts from the finest, the last."""
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, c_in):
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(c_in, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()
        for level, (c, wider) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            up = Level(wider, c, num_res_blocks + 1, resolution >> level in attn_resolutions)
            up.upsample = Upsample(c) if level > 0 else nn.Identity()
            self.up.append(up)
        self.norm_out = nn.GroupNorm(NORM_GROUPS, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))                                       # (b, c, h, w)
        for up in reversed(self.up):
            h = up.upsample(up(h))                                          # (b, c, 2h, 2w)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks at one grid size, each followed by attention where the level has it.

    (b, c_in, h, w) -> (b, c_out, h, w); the change of size after them is Encoder's or Decoder's.
    """
    def __init__(self, c_in, c_out, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(blocks) if attention)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def middle(c):
    """Block, attention, block at the coarsest grid."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c), attn_1=Attention(c),
                                     block_2=ResBlock(c, c)))


class ResBlock(nn.Module):
    """Two 3x3 convs around a skip connection. (b, c_in, h, w) -> (b, c_out, h, w)."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, c_in, NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, c_out, NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all grid positions. (b, c, h, w) -> same."""
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, c, NORM_EPS)
        self.q, self.k, self.v = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT for f in (self.q, self.k, self.v))    # (b, hw, c)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.unflatten(2, x.shape[2:]))            # (b, c, h, w)


class Downsample(nn.Module):
    """3x3 conv of stride 2. (b, c, h, w) -> (b, c, h // 2, w // 2)."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        # quirk: the autoencoder's strided convolutions pad by one on the right and below only;
        # padding=1 would load every key and give other latents [test_encoding_equals_the_reference]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 conv. (b, c, h, w) -> (b, c, 2h, 2w)."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Pixels(nn.Module):
    """Stands where the autoencoder does when there are no weights for it: the image itself, its
    pixels folded FOLD x FOLD into channels, as a posterior without variance."""
    def encode(self, x):
        z = F.pixel_unshuffle(x, FOLD)                      # (b, 3 FOLD^2, h / FOLD, w / FOLD)
        return z, torch.full_like(z, LOGVAR_MIN)

    def decode(self, z):
        return F.pixel_shuffle(z, FOLD)                     # (b, 3, h, w)
