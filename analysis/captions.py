"""Captions: which of a few texts does CLIP see in a photo. It checks weights by eye.

    python -m analysis.captions chair.jpg --text "a chair" "a dog" --weights ViT-L-14.pt

zero123 checkpoints hold the image tower and a few parameters of the text side, but not the text
transformer: `--weights zero123-xl.ckpt ViT-L-14.pt` takes from the second what the first lacks.

b batch, n tokens, c channels of the text tower, d width of the embedding.
"""

from runtime import command

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"      # its first lines after the header are the merges


def parser():
    p = command.Parser("python -m analysis.captions", description=__doc__.splitlines()[0])
    p.add_argument("image", help="an image file")
    p.add_argument("--text", nargs="+", required=True, help="what may be in it")
    p.add_argument("--weights", nargs="+", required=True,
                   help="OpenAI's ViT-L-14.pt; or a zero123 checkpoint, then OpenAI's")
    p.add_argument("--vocabulary", help=f"{VOCABULARY}; found in open_clip or clip by itself")
    return p


# answered before torch, which takes seconds, is imported
ARGS = parser().parse_args() if __name__ == "__main__" else None

import gzip
import html
import sys
import zlib
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F

import clip
from runtime.networks import load_clip
from views import photos, pictures

MERGES = 48894                                   # of them; the vocabulary is 2 * 256 + MERGES + 2
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CROP = 256                                       # pixels: what the model is conditioned on


class CLIP(clip.CLIP):
    """Image tower and text tower. The defaults are ViT-L/14."""
    LEFT_OUT = ()

    def __init__(self, transformer_width=768, transformer_heads=12, transformer_layers=12,
                 **of_image_tower):
        super().__init__(transformer_width=transformer_width, **of_image_tower)
        self.transformer = clip.Transformer(transformer_width, transformer_layers,
                                            transformer_heads, causal=True)

    def forward(self, image, tokens):
        """Cosine similarities times exp(logit_scale), (images, texts), of images (b, 3, h, w) in
        [-1, 1] and tokens (texts, context_length) of `Tokenizer.tokenize`."""
        text = F.normalize(self.encode_text(tokens), dim=-1)
        return self.logit_scale.exp() * F.normalize(self.encode_image(image), dim=-1) @ text.T

    def encode_text(self, tokens):
        """Token numbers to the embedding of the text, not normalised. (b, n) -> (b, d)."""
        x = self.token_embedding(tokens) + self.positional_embedding          # (b, n, c)
        x = self.ln_final(self.transformer(x))
        # the end-of-text token has the largest number of all, so argmax finds it
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]   # (b, c)
        return x @ self.text_projection

    @classmethod
    def sizes_of(cls, state):
        sizes, layers = super().sizes_of(state), clip.layers_of(state, "transformer.")
        if not layers:
            raise ValueError("this CLIP has no text transformer: zero123 checkpoints leave it out; "
                             "texts need OpenAI's whole ViT-L-14.pt")
        return sizes | dict(transformer_heads=sizes["transformer_width"] // clip.HEAD_WIDTH,
                            transformer_layers=layers)


class Tokenizer:
    """CLIP's byte-pair encoding, of lower-cased text. `path` is the vocabulary file.

    Words are cut into bytes, each byte written as one printable character, the last with "</w>"
    behind it; then neighbours are merged, always the pair that comes first in the vocabulary file.
    """
    def __init__(self, path):
        # the vocabulary lists the bytes that print as themselves before the others
        self.characters = {b: chr(b) for b in range(256)
                           if ord("!") <= b <= ord("~") or b >= ord("¡") and b != ord("\xad")}
        for i, b in enumerate(sorted(set(range(256)) - self.characters.keys())):
            self.characters[b] = chr(256 + i)
        characters, merges = [*self.characters.values()], read_merges(path)
        tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), START, END]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def tokenize(self, texts, context_length=77):
        """Texts to token numbers, zeros behind the end-of-text token: (b, context_length) int64.
        ValueError for a text that does not fit."""
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.ids[START], *self.encode(text), self.ids[END]]
            if len(ids) > context_length:
                raise ValueError(f"text {text[:40]!r}: {len(ids) - 2} tokens, "
                                 f"at most {context_length - 2} fit")
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text):
        """The token numbers of a text, without start and end."""
        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        return [i for word in regex.findall(WORD, text, regex.IGNORECASE)
                for i in self.encode_word(word)]

    def encode_word(self, word):
        """The token numbers of one word, merged as the vocabulary says."""
        if word in (START, END):
            return [self.ids[word]]
        parts = [self.characters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, MERGES), i)
                          for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == MERGES:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]


def read_merges(path):
    """The pairs of the vocabulary file, the one to merge first at the front."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1:MERGES + 1]]
        if len(merges) < MERGES or any(len(pair) != 2 for pair in merges):
            raise ValueError(f"found {len(merges)} lines, not {MERGES} pairs")
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as err:
        raise ValueError(f"{path}: not {VOCABULARY}: {err}") from err
    return merges


def find_vocabulary():
    """The vocabulary file of an installed open_clip or clip, which are not imported."""
    for path in (Path(folder, package, VOCABULARY)
                 for folder in sys.path for package in ("open_clip", "clip")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{VOCABULARY} is in no installed open_clip or clip: --vocabulary "
                            "names it, or: pip install --no-deps open_clip_torch")


def read_image(path):
    """An image file's central square as the model sees it: (1, 3, 256, 256) in [-1, 1]."""
    return pictures.tensor(photos.read(path).resize((CROP, CROP), photos.Image.Resampling.BICUBIC))


def main(args):
    """Prints how sure CLIP is of every text. Raises ValueError or OSError with one line."""
    tokens = Tokenizer(args.vocabulary or find_vocabulary()).tokenize(args.text)
    image = read_image(args.image)
    with torch.inference_mode():
        logits = load_clip(args.weights, CLIP)(image, tokens)
    for probability, text in zip(logits[0].softmax(dim=0).tolist(), args.text):
        print(f"{probability:6.1%}  {text}")


if __name__ == "__main__":
    command.run("analysis.captions", main, ARGS)
