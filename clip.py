"""CLIP's ViT-L/14 (arXiv:2103.00020): what the conditioning view is about, as one embedding.

In: images (b, 3, h, w) in [-1, 1], of any size. Out: `encode_image` gives (b, 768), not normalised.
Read `VisionTransformer.forward` first, then `CLIP.preprocess`. CLIP was trained so that a photo and
its caption, each through a network (tower) of its own, get embeddings of one direction.

The names and numbers are OpenAI's. Of the text side zero123 checkpoints hold a few parameters but
not the transformer: they stay here so that every name has its place, and nothing reads them.

b batch, n tokens, c channels of the tower, d width of the embedding, r pixels of its input's side.
"""

import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_WIDTH = 64                                  # of every head in every published CLIP ViT
MEAN = (0.48145466, 0.4578275, 0.40821073)       # of CLIP's training images, in [0, 1], R G B
STD = (0.26862954, 0.26130258, 0.27577711)
MLP_RATIO = 4
TEMPERATURE = 0.07                               # where logit_scale starts (section 2.5)
QUICK_GELU = 1.702                               # OpenAI's approximation of GELU


class CLIP(nn.Module):
    """The image tower, and what checkpoints hold of the text side. The defaults are ViT-L/14."""
    LEFT_OUT = ("transformer.",)    # OpenAI's text transformer, in files that have it

    def __init__(self, embed_dim=768, image_resolution=224, vision_layers=24, vision_width=1024,
                 vision_patch_size=14, context_length=77, vocab_size=49408, transformer_width=768):
        super().__init__()
        self.image_resolution = image_resolution
        c = transformer_width
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, c))
        self.text_projection = nn.Parameter(torch.randn(c, embed_dim) / math.sqrt(c))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                        vision_layers, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, c)
        self.ln_final = nn.LayerNorm(c)
        # device="cpu" holds under torch.device("meta") too: these are not in a checkpoint, so
        # nothing would fill them in again
        for name, values in (("mean", MEAN), ("std", STD)):
            values = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode_image(self, x):
        """Image in [-1, 1] of any size to its embedding, not normalised. (b, 3, h, w) -> (b, d)."""
        return self.visual(self.preprocess(x))

    def preprocess(self, x):
        """Image in [-1, 1] of any size to the image tower's input. (b, 3, h, w) -> (b, 3, r, r)."""
        # quirk: CLIP's input is resized as kornia 0.6 does, bicubic (a = -0.75) with align_corners
        # and without antialiasing, stretched rather than cropped, its overshoot kept; OpenAI's own
        # preprocessing crops, and does none of this [test_preprocessing_equals_the_reference]
        size = (self.image_resolution, self.image_resolution)
        x = F.interpolate(x, size, mode="bicubic", align_corners=True, antialias=False)
        return ((x + 1) / 2 - self.mean) / self.std

    @classmethod
    def sizes_of(cls, state):
        """The constructor's arguments, read off the shapes of a CLIP's tensors; or ValueError."""
        try:
            vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
            vocab_size, text_width = state["token_embedding.weight"].shape
            grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
            return dict(
                embed_dim=state["visual.proj"].shape[1], image_resolution=grid * patch_size,
                vision_layers=layers_of(state, "visual.transformer."), vision_width=vision_width,
                vision_patch_size=patch_size, context_length=len(state["positional_embedding"]),
                vocab_size=vocab_size, transformer_width=text_width)
        except KeyError as err:
            raise ValueError(f"not a whole CLIP: tensor {err} is missing") from err


def layers_of(state, tower):
    """How many blocks a tower has, by the names of its tensors."""
    return sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in state)


class VisionTransformer(nn.Module):
    """Square image (b, 3, r, r), cut into patches, to its embedding (b, d): a token a patch, and
    one before them, the class's, which ends as the embedding."""
    def __init__(self, resolution, patch_size, c, layers, d):
        super().__init__()
        n = (resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.randn(c) / math.sqrt(c))
        self.positional_embedding = nn.Parameter(torch.randn(n, c) / math.sqrt(c))
        self.proj = nn.Parameter(torch.randn(c, d) / math.sqrt(c))
        self.conv1 = nn.Conv2d(3, c, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(c)
        self.transformer = Transformer(c, layers, c // HEAD_WIDTH)
        self.ln_post = nn.LayerNorm(c)

    def forward(self, x):
        x = self.conv1(x.to(self.conv1.weight.dtype))                         # (b, c, g, g)
        x = x.flatten(2).transpose(1, 2)                                      # (b, n - 1, c)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding          # (b, n, c)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                              # (b, d)


class Transformer(nn.Module):
    """A stack of blocks. (b, n, c) -> same."""
    def __init__(self, c, layers, heads, causal=False):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(c, heads, causal) for _ in range(layers)))

    def forward(self, x):
        return self.resblocks(x)


class Block(nn.Module):
    """Attention and MLP, each after its norm and around a skip connection. (b, n, c) -> same."""
    def __init__(self, c, heads, causal):
        super().__init__()
        self.attn = Attention(c, heads, causal)
        self.ln_1 = nn.LayerNorm(c)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(c, MLP_RATIO * c), gelu=QuickGELU(),
                                             c_proj=nn.Linear(MLP_RATIO * c, c)))
        self.ln_2 = nn.LayerNorm(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Self-attention under nn.MultiheadAttention's names, q, k and v in one matrix."""
    def __init__(self, c, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * c, c) / math.sqrt(c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = nn.Linear(c, c)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)             # (b, n, 3c)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (b, n, c)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; the exact one gives other embeddings."""
    def forward(self, x):
        return x * torch.sigmoid(QUICK_GELU * x)
