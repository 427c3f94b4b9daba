"""CLIP ViT (arXiv:2103.00020): an image, or a text, to one embedding. OpenAI's names and numbers.

The model is conditioned by the image tower alone; the text tower and the tokenizer are here so that
weights can be checked by eye, with images and captions:

    python clip.py chair.jpg --text "a chair" "a dog" --weights ViT-L-14.pt

zero123 checkpoints hold the image tower and a few parameters of the text side, but not the text
transformer: `--weights zero123-xl.ckpt ViT-L-14.pt` takes from the second what the first lacks.

b batch, n tokens, c channels of a tower, d width of the embedding.
"""

import argparse
import gzip
import html
import math
import sys
import zlib
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

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"      # its first lines after the header are the merges
MERGES = 48894                                   # of them; the vocabulary is 2 * 256 + MERGES + 2
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

PREFIXES = ("", "cond_stage_model.model.")       # of CLIP's names: in its own files, in zero123's
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")    # integers in OpenAI's files
CROP = 256                                       # pixels: what the model is conditioned on


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
        text = F.normalize(self.encode_text(tokens), dim=-1)
        image = F.normalize(self.encode_image(image), dim=-1)
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

        OpenAI's own preprocessing crops, and does none of this.
        """
        # quirk: resized as kornia 0.6 does, bicubic (a = -0.75) with align_corners and no
        # antialias, stretched rather than cropped, overshoot kept
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
        x = self.transformer(self.ln_pre(x), asked=1)
        return self.ln_post(x[:, 0]) @ self.proj                              # (b, d)


class Transformer(nn.Module):
    """A stack of blocks. (b, n, c) -> same, or the first `asked` tokens of it alone."""
    def __init__(self, c, layers, heads, causal):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(c, heads, causal) for _ in range(layers)))

    def forward(self, x, asked=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x)
        return last(x, asked)       # whose other tokens nobody would read


class Block(nn.Module):
    """Attention and MLP, each after its norm and around a skip connection. (b, n, c) -> same, or
    the first `asked` tokens of it alone."""
    def __init__(self, c, heads, causal):
        super().__init__()
        self.attn = Attention(c, heads, causal)
        self.ln_1 = nn.LayerNorm(c)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(c, MLP_RATIO * c), gelu=QuickGELU(),
                                             c_proj=nn.Linear(MLP_RATIO * c, c)))
        self.ln_2 = nn.LayerNorm(c)

    def forward(self, x, asked=None):
        x = x[:, :asked] + self.attn(self.ln_1(x), asked)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Self-attention under nn.MultiheadAttention's names, q, k and v in one matrix."""
    def __init__(self, c, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * c, c) / math.sqrt(c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = nn.Linear(c, c)

    def forward(self, x, asked=None):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)             # (b, n, 3c)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q[:, :, :asked], k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (b, n, c)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; the exact one gives other embeddings."""
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Tokenizer:
    """CLIP's byte-pair encoding, of lower-cased text. `path` is the vocabulary file.

    Words are cut into bytes, each byte written as one printable character, the last with "</w>"
    behind it; then neighbours are merged, always the pair that comes first in the vocabulary file.
    """
    def __init__(self, path):
        # imported here because the image tower alone needs neither
        import ftfy
        import regex
        self.fix, self.words = ftfy.fix_text, regex.compile(WORD, regex.IGNORECASE)
        merges = read_merges(path)
        self.byte_characters = byte_characters()
        # the vocabulary lists the bytes that print as themselves before the others
        characters = sorted(self.byte_characters.values())
        self.vocabulary = (characters + [c + "</w>" for c in characters]
                           + ["".join(pair) for pair in merges] + [START, END])
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.known = {START: [self.ids[START]], END: [self.ids[END]]}    # word -> its token numbers

    def tokenize(self, texts, context_length=77, truncate=False):
        """Texts to token numbers, zeros behind the end-of-text token: (b, context_length) int64.

        A text that does not fit is a ValueError, or with `truncate` is cut short.
        """
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.ids[START], *self.encode(text), self.ids[END]]
            if len(ids) > context_length and not truncate:
                raise ValueError(f"text {text[:40]!r}: {len(ids) - 2} tokens, "
                                 f"at most {context_length - 2} fit")
            ids[context_length - 1:] = ids[context_length - 1:][-1:]     # when cut, END stays last
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text):
        """The token numbers of a text, without start and end."""
        text = html.unescape(html.unescape(self.fix(text)))
        text = " ".join(text.split()).lower()
        return [i for word in self.words.findall(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """The text of token numbers, a space behind every word."""
        codes = {character: byte for byte, character in self.byte_characters.items()}
        text = bytes(codes[c] for i in ids for c in self.vocabulary[i])
        return text.decode("utf-8", errors="replace").replace("</w>", " ")

    def encode_word(self, word):
        if word not in self.known:
            parts = [self.byte_characters[byte] for byte in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pair = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, MERGES))
                if pair not in self.ranks:
                    break
                parts = merge(parts, pair)
            self.known[word] = [self.ids[part] for part in parts]
        return self.known[word]


def merge(parts, pair):
    """`parts` with every occurrence of `pair`, from the left, joined into one."""
    merged = []
    for part in parts:
        # a joined pair is longer than its first half, so it is not joined again
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def byte_characters():
    """A printable character for each byte: its own where it has one, else one from 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_merges(path):
    """The pairs of the vocabulary file, the one to merge first at the front."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as err:
        raise ValueError(f"{path}: not {VOCABULARY}: {err}") from err
    merges = [tuple(line.split()) for line in lines[1:MERGES + 1]]
    if len(merges) < MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not {VOCABULARY}: found {len(merges)} lines, not {MERGES} pairs")
    return merges


def find_vocabulary(beside="."):
    """Path of the vocabulary file: in the folder `beside`, or in an installed open_clip or clip.

    It looks for the packages' folders and imports nothing: OpenAI's package has this file's name.
    """
    folders = [Path(beside), *(Path(entry) / package for entry in sys.path
                               for package in ("open_clip", "clip"))]
    for folder in folders:
        if (folder / VOCABULARY).is_file():
            return folder / VOCABULARY
    raise FileNotFoundError(f"{VOCABULARY} is neither in {Path(beside)} nor in an installed "
                            "open_clip or clip; try: pip install --no-deps open_clip_torch")


def config_from(state):
    """CLIP's constructor arguments, read off the shapes of its tensors (name -> tensor)."""
    def layers(tower):
        return sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in state)

    try:
        vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
        vocab_size, text_width = state["token_embedding.weight"].shape
        grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
        return dict(
            embed_dim=state["visual.proj"].shape[1], image_resolution=grid * patch_size,
            vision_layers=layers("visual.transformer."), vision_width=vision_width,
            vision_patch_size=patch_size, context_length=len(state["positional_embedding"]),
            vocab_size=vocab_size, transformer_width=text_width,
            transformer_heads=text_width // HEAD_WIDTH, transformer_layers=layers("transformer."))
    except KeyError as err:
        raise ValueError(f"not a whole CLIP: tensor {err} is missing") from err


def from_state(state):
    """The CLIP, of whatever size, that these tensors (name -> tensor) are; in fp32."""
    with torch.device("meta"):
        clip = CLIP(**config_from(state))
    for name, parameter in clip.named_parameters():
        if name not in state or state[name].shape != parameter.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise ValueError(f"tensor {name} {found}, expected {tuple(parameter.shape)}")
    unknown = sorted(set(state) - set(clip.state_dict()))
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are not CLIP's, the first is {unknown[0]}")
    # OpenAI's files hold most of it in half precision
    clip.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return clip.eval()


def load(paths):
    """The CLIP in one or more weight files, an earlier file's tensors before a later one's.

    OpenAI's ViT-L-14.pt as published (TorchScript) or its state dict, and zero123 checkpoints, in
    every container that checkpoint.py reads.
    """
    from runtime import checkpoint
    state = {}
    for path in paths:
        file = checkpoint.read(path)
        prefix = next((p for p in PREFIXES if p + "visual.proj" in file), None)
        if prefix is None:
            raise ValueError(f"{path}: found {len(file)} tensors but no CLIP image tower, neither "
                             + " nor ".join(p + "visual.proj" for p in PREFIXES))
        names = [name for name in file if name.startswith(prefix)]
        state = {name[len(prefix):]: file[name] for name in names} | state
    return from_state({name: state[name] for name in state if name not in NOT_WEIGHTS})


def read_image(path):
    """An image file's central square as the model sees it: (1, 3, 256, 256) in [-1, 1]."""
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (CROP, CROP), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def main(argv=None):
    parser = argparse.ArgumentParser(description="Which of the texts does CLIP see in the image?")
    parser.add_argument("image", help="an image file")
    parser.add_argument("--text", nargs="+", required=True, help="what may be in it")
    parser.add_argument("--weights", nargs="+", required=True,
                        help="OpenAI's ViT-L-14.pt; or a zero123 checkpoint, then OpenAI's")
    parser.add_argument("--vocabulary", help=f"{VOCABULARY}; found in open_clip or clip by itself")
    args = parser.parse_args(argv)
    try:
        tokens = Tokenizer(args.vocabulary or find_vocabulary()).tokenize(args.text)
        image = read_image(args.image)
        with torch.inference_mode():
            logits, _ = load(args.weights)(image, tokens)
    except (ValueError, OSError) as err:
        print(f"clip.py: {err}", file=sys.stderr)
        sys.exit(2)
    for probability, text in zip(logits[0].softmax(dim=0).tolist(), args.text):
        print(f"{probability:6.1%}  {text}")


if __name__ == "__main__":
    main()
