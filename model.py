"""The network that ZeroNVS trains: a UNet that sees noisy latents, the photo and the pose.

    UNet:    x (b, 8, h, w), noisy latent and the photo's; t (b,); context (b, 1, e) -> (b, 4, h, w)
    ZeroNVS: posteriors, image embedding, pose T (b, d) and Draws -> the loss of each pair (b,)

Read first: ZeroNVS.forward, the loss in twelve lines; then UNet.forward, ResBlock, Attention.
UNet: Stable Diffusion 1's (arXiv:2112.10752). Conditioning: zero123's (arXiv:2303.11328). Module
names are the checkpoint's, in its order. Letters: `b` batch, `c` channels, `h w` latent grid, `n`
tokens, `d` head or pose width, `e` embedding width.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import camera
import vae
from clip import CLIP
from diffusion import schedule_buffers
from vae import FOLD, Pixels, Upsample

# quirk: GroupNorm's eps is 1e-5 in residual blocks and at the UNet's end, 1e-6 before transformers
# [test_unet_output_equals_the_reference]
RES_EPS, TRANSFORMER_EPS = 1e-5, 1e-6
LARGEST_PERIOD = 10_000                     # of the timestep embedding
FEED_FORWARD = 4                            # hidden width of a feed-forward, in channels
EMBEDDING = 768                             # width of CLIP's embedding


# ---- UNet

def zero(module):
    """The module with its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t, width):
    """Timesteps t (b,) -> (b, width): waves of `width // 2` frequencies (arXiv:1706.03762)."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(LARGEST_PERIOD) * index / half)
    angle = t.float()[:, None] * frequency
    # quirk: the timestep embedding has cosines first [test_schedule_tables_equal_the_reference]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


class ResBlock(nn.Module):
    """Two 3x3 convs, the timestep embedding added between them. x: (b, c, h, w), emb: (b, e)."""
    def __init__(self, c_in, c_out, c_emb, groups):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in, RES_EPS), nn.SiLU(),
                                       nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out))
        # Identity stands where CompVis has dropout, so that the conv keeps its key out_layers.3
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, c_out, RES_EPS), nn.SiLU(),
                                        nn.Identity(), zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]      # (b, c_out, h, w)
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Softmax attention of x (b, n, c) over context (b, m, c_context) -> (b, n, c).

    Theorem: over one token it is to_out(to_v(token)), whatever x, to_q and to_k are; (b, 1, c).
    Proof: an x mixes the values by weights softmax(q k^T / sqrt(d)), whose sum is 1. Of one token
    there is one weight, so it is 1, and its derivatives by q and k are 0.
    """
    def __init__(self, c, c_context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Identity())         # dropout's place

    def forward(self, x, context):
        if context.shape[1] == 1:
            return self.to_out(self.to_v(context))                          # (b, 1, c)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (b, heads, n, d)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))                  # (b, n, c)


class GEGLU(nn.Module):
    """Linear layer whose second half gates the first by the exact GELU (arXiv:2002.05202)."""
    def __init__(self, c, c_hidden):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)                             # (b, n, c_hidden)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each with a LayerNorm and a skip."""
    def __init__(self, c, c_context, heads):
        super().__init__()
        self.attn1 = Attention(c, c, heads)
        layers = GEGLU(c, FEED_FORWARD * c), nn.Identity(), nn.Linear(FEED_FORWARD * c, c)
        self.ff = nn.Sequential(OrderedDict(net=nn.Sequential(*layers)))
        self.attn2 = Attention(c, c_context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the grid's positions. x: (b, c, h, w), context: (b, m, e)."""
    def __init__(self, c, c_inner, c_context, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, TRANSFORMER_EPS)
        self.proj_in = nn.Conv2d(c, c_inner, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c_inner, c_context, heads)])
        self.proj_out = zero(nn.Conv2d(c_inner, c, 1))

    def forward(self, x, context):
        tokens = self.proj_in(self.norm(x)).flatten(2).mT                   # (b, hw, c_inner)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.mT.unflatten(2, x.shape[2:]))       # (b, c, h, w)


class Downsample(nn.Module):
    """Half the grid: a strided 3x3 conv."""
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Stage(nn.Sequential):
    """Layers in a row: a ResBlock takes the time too, a SpatialTransformer the context."""
    recompute = False       # activations in the backward pass, instead of keeping them

    def forward(self, x, emb, context):
        for layer in self:
            inputs = ((x, emb) if isinstance(layer, ResBlock) else
                      (x, context) if isinstance(layer, SpatialTransformer) else (x,))
            x = (checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
                 if self.recompute and self.training and len(inputs) > 1 else layer(*inputs))
        return x


class UNet(nn.Module):
    """Noise prediction: down through the levels and up again, each level's features joined to what
    comes up. x (b, c_in, h, w), t (b,) timesteps, context (b, m, e) -> (b, c_out, h, w).

    h and w: multiples of 2 ** (levels - 1). Heads: `num_heads` at every width, or of
    `num_head_channels` each where that is not 0. norm_groups: of every GroupNorm.
    """
    def __init__(self, in_channels=8, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4),
                 num_res_blocks=2, attention_resolutions=(4, 2, 1), num_heads=8, context_dim=768,
                 num_head_channels=0, norm_groups=32):
        super().__init__()
        self.model_channels = model_channels
        c, c_emb = model_channels, FEED_FORWARD * model_channels
        widths = [mult * c for mult in channel_mult]

        def transformer(c):
            heads = c // num_head_channels if num_head_channels else num_heads
            c_inner = heads * (num_head_channels or c // num_heads)
            return SpatialTransformer(c, c_inner, context_dim, heads, norm_groups)

        def layers(c_in, level):
            block = ResBlock(c_in, widths[level], c_emb, norm_groups)
            attends = 2**level in attention_resolutions
            return [block, transformer(widths[level])] if attends else [block]

        self.time_embed = nn.Sequential(nn.Linear(c, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, c, 3, padding=1))])
        skips = [c]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(*layers(c, level)))
                skips.append(c := width)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(Downsample(c)))
                skips.append(c)
        self.middle_block = Stage(ResBlock(c, c, c_emb, norm_groups), transformer(c),
                                  ResBlock(c, c, c_emb, norm_groups))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                stage = Stage(*layers(c + skips.pop(), level))
                c = width
                if level > 0 and i == num_res_blocks:
                    stage.append(Upsample(c))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(nn.GroupNorm(norm_groups, c, RES_EPS), nn.SiLU(),
                                 zero(nn.Conv2d(c, out_channels, 3, padding=1)))

    def forward(self, x, t, context):
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    def idle_parameters(self):
        """{name: parameter} that one context token leaves without a gradient (see Attention)."""
        idle = ("attn2.to_q.", "attn2.to_k.", ".norm2.")
        return {name: p for name, p in self.named_parameters() if any(i in name for i in idle)}


# ---- the whole model

class NoEmbedding(nn.Module):
    """Stands where CLIP does when there are no weights for it: an embedding of width 0."""
    def encode_image(self, x):
        return x.new_zeros(len(x), 0)


class ZeroNVS(nn.Module):
    """UNet, autoencoder, image embedding and pose projection, under the checkpoint's names.

    scale_factor: of the target's latent; prediction: the UNet's, "eps" noise, "z" clean latent.
    """
    def __init__(self, unet, first_stage_model, clip, mode, scale_factor, embedding_dim,
                 context_dim, prediction="eps"):
        super().__init__()
        for name, table in schedule_buffers().items():
            self.register_buffer(name, table)
        self.mode, self.scale_factor, self.prediction = mode, scale_factor, prediction
        self.model = nn.Module()
        self.model.diffusion_model = unet
        self.first_stage_model = first_stage_model.eval().requires_grad_(False)
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.model = clip.eval().requires_grad_(False)
        self.cc_projection = pose_projection(embedding_dim, camera.MODES[mode].width, context_dim)
        for parameter in unet.idle_parameters().values():
            parameter.requires_grad_(False)

    def train(self, mode=True):
        """Only the UNet and the projection train; the frozen networks stay as they are."""
        self.model.train(mode)
        self.cc_projection.train(mode)
        self.training = mode
        return self

    @torch.no_grad()
    def encode(self, image):
        """Image (b, 3, h, w) in [-1, 1] -> posterior (mean, logvar) of its latent, not scaled."""
        return self.first_stage_model.encode(image)

    @torch.no_grad()
    def embed(self, image):
        """Image (b, 3, h, w) in [-1, 1] -> CLIP embedding (b, e)."""
        return self.cond_stage_model.model.encode_image(image)

    def context(self, embedding, T):
        """Image embedding (b, e) and pose vector T (b, d) -> the one context token (b, 1, n).

        Never by autocast: bf16 does not tell small turns apart.
        """
        weight = self.cc_projection.weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.cc_projection(torch.cat([embedding, T], dim=-1).to(weight.dtype))[:, None]

    def levels(self, t):
        """(signal, sigma), each (b, 1, 1, 1), of z_t = signal * z + sigma * noise at t (b,)."""
        return (table[t.round().long()][:, None, None, None] for table in
                (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod))

    def predict(self, z_t, t, z_cond, context):
        """The UNet's own output (b, c, h, w): the noise, or the clean latent."""
        return self.model.diffusion_model(torch.cat([z_t, z_cond], dim=1), t, context)

    def eps(self, z_t, t, z_cond, context):
        """The noise in z_t (b, c, h, w) at timesteps t (b,), as the network sees it."""
        out = self.predict(z_t, t, z_cond, context)
        if self.prediction == "eps":
            return out
        signal, sigma = self.levels(t)
        return (z_t - signal * out) / sigma

    @torch.no_grad()
    def decode(self, z):
        """Latent (b, c, h, w) -> image (b, 3, h, w), not clamped."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def forward(self, mean, logvar, z_cond, embedding, T, draws, drop=(0.05, 0.05, 0.05)):
        """Mean squared error of the prediction, per sample (b,), in float32.

        mean, logvar: the target's posterior; z_cond: the mean of the conditioning view's. drop:
        shares of samples that lose the embedding, both, the conditioning latent.
        """
        # quirk: the target's latent is a sample of the posterior, times the scale factor; the
        # conditioning latent is the posterior's mode, not times the scale factor
        # [test_three_training_steps_equal_the_reference]
        z = self.scale_factor * vae.sample(mean, logvar, draws.posterior_noise)
        only_embedding, lost, only_latent = drop[0], drop[0] + drop[1], drop[2]
        # a dropped embedding is zeros before the projection, so that the pose stays
        embedding = embedding * (draws.u >= lost)[:, None]
        keeps_latent = (draws.u < only_embedding) | (draws.u >= lost + only_latent)
        z_cond = z_cond * keeps_latent[:, None, None, None]
        signal, sigma = self.levels(draws.t)
        z_t = signal * z + sigma * draws.noise
        out = self.predict(z_t, draws.t, z_cond, self.context(embedding, T))
        target = draws.noise if self.prediction == "eps" else z
        return F.mse_loss(out.float(), target, reduction="none").mean(dim=(1, 2, 3))


def pose_projection(embedding_dim, pose_dim, context_dim):
    """cc_projection: identity on the embedding, random on the pose, no bias yet."""
    projection = nn.Linear(embedding_dim + pose_dim, context_dim)
    with torch.no_grad():
        # the CPU's, as in schedule_buffers
        projection.weight[:, :embedding_dim] = torch.eye(context_dim, embedding_dim, device="cpu")
        projection.bias.zero_()
    return projection


def build(config):
    """The ZeroNVS that a Config describes, with random weights."""
    channels = latent_shape(config)[0]
    unet = UNet(2 * channels, channels, config.model_channels, config.channel_mult,
                config.num_res_blocks, config.attention_resolutions, config.num_heads,
                config.context_dim, norm_groups=config.norm_groups)
    for module in unet.modules():
        if isinstance(module, Stage):
            module.recompute = config.checkpoint_activations
    frozen = ((Pixels(), NoEmbedding(), config.mode, 1.0, 0) if config.latent == "pixels" else
              (vae.AutoencoderKL(), CLIP(), config.mode, vae.SCALE_FACTOR, EMBEDDING))
    return ZeroNVS(unet, *frozen, config.context_dim, config.prediction)


def latent_shape(config):
    """(c, h, w) of the latents of a Config."""
    channels, shrink = (3 * FOLD**2, FOLD) if config.latent == "pixels" else (4, 8)
    return channels, config.image_size // shrink, config.image_size // shrink
