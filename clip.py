"""CLIP ViT (arXiv:2103.00020): an image, or a text, to one embedding. OpenAI's names and numbers.

The model is conditioned by the image tower alone; the text tower and the tokenizer are here so that
weights can be checked by eye, with images and captions:

    python clip.py chair.jpg --text "a chair" "a dog" --weights ViT-L-14.pt

zero123 checkpoints hold the image tower and a few parameters of the text side, but not the text
transformer: `--weights zero123-xl.ckpt ViT-L-14.pt` takes from the second what the first lacks.

b batch, n tokens, c channels of a tower, d width of the embedding.
"""

import argparse
import functools
import gzip
import html
import math
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

HEAD_WIDTH = 64                                  # of every head in every published CLIP ViT
MEAN = (0.48145466, 0.4578275, 0.40821073)       # of CLIP's training images, in [0, 1], R G B
STD = (0.26862954, 0.26130258, 0.27577711)
MLP_RATIO = 4
TEMPERATURE = 0.07                               # where logit_scale starts (section 2.5)


class CLIP(nn.Module):
    """Image tower and text tower. The defaults are ViT-L/14.

    transformer_layers=0 leaves out the text transformer and keeps the text side's other parameters:
    what zero123 checkpoints hold under `cond_stage_model.model`.
    """
    def __init__(self, embed_dim=768, image_resolution=224, vision_layers=24, vision_width=1024,
                 vision_patch_size=14, context_length=77, vocab_size=49408, transformer_width=768,
                 transformer_heads=12, transformer_layers=12):
        super().__init__()
        self.image_resolution = image_resolution
        c = transformer_width
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, c))
        self.text_projection = nn.Parameter(torch.randn(c, embed_dim) / math.sqrt(c))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                        vision_layers, embed_dim)
        if transformer_layers:
            self.transformer = Transformer(c, transformer_layers, transformer_heads, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, c)
        self.ln_final = nn.LayerNorm(c)
        # device="cpu" holds under torch.device("meta") too: these are not in a checkpoint, so
        # nothing would fill them in again
        for name, values in (("mean", MEAN), ("std", STD)):
            values = torch.tensor(values, device="cpu").view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, image, tokens):
        """Cosine similarities times exp(logit_scale): (images, texts) and its transpose.

        image: (b, 3, h, w) in [-1, 1]; tokens: (texts, context_length) of `Tokenizer.tokenize`.
        """
        image = F.normalize(self.encode_image(image), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T

    def encode_image(self, x):
        """Image in [-1, 1] of any size to its embedding, not normalised. (b, 3, h, w) -> (b, d)."""
        return self.visual(self.preprocess(x))

    def encode_text(self, tokens):
        """Token numbers to the embedding of the text, not normalised. (b, n) -> (b, d)."""
        if not hasattr(self, "transformer"):
            raise ValueError("this CLIP has no text transformer: zero123 checkpoints leave it out; "
                             "texts need OpenAI's whole ViT-L-14.pt")
        x = self.token_embedding(tokens) + self.positional_embedding          # (b, n, c)
        x = self.ln_final(self.transformer(x))
        # the end-of-text token has the largest number of all, so argmax finds it
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]   # (b, c)
        return x @ self.text_projection

    def preprocess(self, x):
        """Image in [-1, 1] of any size to the image tower's input. (b, 3, h, w) -> (b, 3, r, r).

        quirk: resized as kornia 0.6 does, bicubic (a = -0.75) with align_corners and no antialias,
        stretched rather than cropped, overshoot kept. OpenAI's own preprocessing does none of that.
        """
        size = (self.image_resolution, self.image_resolution)
        x = F.interpolate(x, size, mode="bicubic", align_corners=True, antialias=False)
        return ((x + 1) / 2 - self.mean) / self.std


class VisionTransformer(nn.Module):
    """Square image of `resolution` pixels to its embedding. (b, 3, r, r) -> (b, d)."""
    def __init__(self, resolution, patch_size, c, layers, d):
        super().__init__()
        n = (resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.randn(c) / math.sqrt(c))
        self.positional_embedding = nn.Parameter(torch.randn(n, c) / math.sqrt(c))
        self.proj = nn.Parameter(torch.randn(c, d) / math.sqrt(c))
        self.conv1 = nn.Conv2d(3, c, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(c)
        self.transformer = Transformer(c, layers, c // HEAD_WIDTH, causal=False)
        self.ln_post = nn.LayerNorm(c)

    def forward(self, x):
        x = self.conv1(x.to(self.conv1.weight.dtype)).flatten(2).mT           # (b, n - 1, c)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding          # (b, n, c)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                              # (b, d)


class Transformer(nn.Module):
    """A stack of blocks. (b, n, c) -> same."""
    def __init__(self, c, layers, heads, causal):
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
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv, is_causal=self.causal)       # (b, heads, n, c/h)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (b, n, c)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; the exact one gives other embeddings."""
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)
