"""What a run is made of: `Config`, `Source`, and `load(argv)` that reads a file and its overrides.

    python train.py configs/mix.py --lr=3e-5 --batch_size=768

A config file is plain python that ends in `config = Config(...)`. Every number is checked in
`__post_init__`, so a file, a command line and a resumed run pass the same gate.
"""

import difflib
import math
import runpy
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import camera

MODES = tuple(camera.T_WIDTH)
TIMESTEPS, STEPS_OF_REFERENCE = 1000, (2, 500)      # see samplers.py
FORMATS = ("co3d", "re10k", "acid", "encoded")
CHOICES = {
    "latent": ("vae", "pixels"),
    "prediction": ("eps", "z"),
    "mode": MODES,
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("fp32", "bf16"),
    "lr_schedule": ("constant", "cosine"),
    "ema_per": ("step", "micro_step"),
    "sampler": ("ddim", "reference", "dpm++", "unipc"),
}


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture."""
    name: str
    format: str                      # co3d | re10k | acid | encoded
    shards: str                      # training shards: glob or {000..126} pattern from Config.data,
                                     # http(s)://, pipe:COMMAND or -; see shards/files.py
    probability: float               # share of the pairs of a step; the sources' shares sum to 1
    held_out: str = ""               # shards of scenes kept from training, for pictures and scores
    held_out_format: str = ""        # of these, if another: encoded sources have raw ones
    window: int = 8                  # shards open at a time, of `pipe:` shards alone
    pairs_per_shard: int = 2000      # pairs drawn from each of these before another takes its place

    def __post_init__(self):
        for name in ("window", "pairs_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"source {self.name!r}: {name} {getattr(self, name)} is not "
                                 "positive")
        if self.format not in FORMATS:
            raise ValueError(f"source {self.name!r}: {unknown('format', self.format, FORMATS)}")
        if self.held_out_format and self.held_out_format not in FORMATS:
            raise ValueError(f"source {self.name!r}: "
                             f"{unknown('held_out_format', self.held_out_format, FORMATS)}")
        if self.held_out and (self.held_out_format or self.format) == "encoded":
            raise ValueError(f"source {self.name!r}: held-out shards must be raw, for pictures and "
                             "scores: say held_out_format, co3d, re10k or acid")
        if not 0 < self.probability <= 1:
            raise ValueError(f"source {self.name!r}: probability {self.probability} "
                             "is not in (0, 1]")


@dataclass(frozen=True)
class Config:
    """A run. Lengths are in a scene's own unit, angles in radians, images in [-1, 1]."""
    sources: tuple[Source, ...]
    data: str = "data"                      # folder that the sources' shard patterns start from
    out: str = "out/run"                    # folder of the run: checkpoints, log.jsonl, grids

    # the network: the defaults are zero123-xl's
    latent: str = "vae"                     # vae: 8 x smaller latents | pixels: the image itself
    image_size: int = 256                   # pixels a side of the square images
    prediction: str = "eps"                 # the UNet's output: eps, noise | z, the clean latent
    model_channels: int = 320               # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)    # width of each level, in model_channels
    num_res_blocks: int = 2                 # residual blocks a level
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # grids with transformers, by how many times
                                            # smaller than the latent; the smallest always has one
    num_heads: int = 8                      # attention heads at every width
    norm_groups: int = 32                   # groups of every GroupNorm
    context_dim: int = 768                  # width of the one context token
    mode: str = "7dof_quantile_scale"       # conditioning mode, see camera.py
    quantile_blend: bool = True             # known depths replace DPT's before the quantile; of
                                            # encoded shards it was decided when they were encoded
    init: str = ""                          # checkpoint to start from; "" has random weights
    depth_weights: str = ""                 # dpt_swin2_tiny_256.pt, if depth has holes; "" has none

    # the step
    steps: int = 60_000                     # optimizer steps
    batch_size: int = 1536                  # pairs a step, over all ranks and micro-steps
    micro_batch: int = 48                   # pairs a rank holds in memory at once, at most
    lr: float = 1e-4                        # of the UNet
    lr_projection: float = 1e-3             # of cc_projection
    lr_schedule: str = "constant"           # after the warm-up: constant | cosine (to 0 at `steps`)
    warmup_steps: int = 100                 # steps over which the rate rises
    betas: tuple[float, ...] = (0.9, 0.999)     # AdamW
    eps: float = 1e-8                       # AdamW
    weight_decay: float = 0.01              # AdamW
    grad_clip: float = 0.0                  # largest gradient norm; 0 does not clip
    ema_decay: float = 0.9999               # of the average of the UNet's weights
    ema_per: str = "step"                   # step | micro_step (the reference's)
    drop_clip: float = 0.05                 # share of samples that lose the image embedding, alone
    drop_both: float = 0.05                 # share of samples that lose embedding and latent
    drop_latent: float = 0.05               # share of samples that lose the cond latent, alone
    seed: int = 42                          # pairs, noise, timesteps and dropouts follow from it

    # the machine
    device: str = "auto"                    # auto: cuda, then mps, then cpu
    precision: str = "bf16"                 # of matrix products and convolutions; weights stay fp32
    compile: bool = False                   # torch.compile the UNet
    graph: bool = False                     # on one GPU, replay a CUDA graph: for small steps
    checkpoint_activations: bool = False    # recompute in the backward pass: less memory, slower
    divide_optimizer: bool = False          # ranks share moments and average (ZeRO-1): less memory
    workers: int = 4                        # loader processes a rank
    threads: int = 0                        # that a rank computes with; 0: its share of processors
    max_damaged: float = 0.05               # share of damaged pairs at which a run stops

    # what is written
    log_every: int = 10                     # steps between log lines
    save_every: int = 1000                  # steps between checkpoints
    keep: int = 2                           # newest checkpoints kept
    keep_every: int = 5000                  # and every checkpoint whose step is a multiple of this
    sample_every: int = 1000                # steps between image grids
    eval_pairs: int = 128                   # held-out pairs that are scored at the end
    validate_every: int = 1000              # steps between validations; 0 has none
    validate_pairs: int = 64                # held-out pairs of each validation, of the eval_pairs
    validate_steps: int = 8                 # network evaluations a sample of it, at most
    sampler: str = "ddim"                   # ddim | reference | dpm++ | unipc
    sample_steps: int = 50                  # network evaluations a sample
    guidance: float = 3.0                   # classifier-free guidance scale; 1 has none
    eta: float = 1.0                        # DDIM's noise: 0 deterministic, 1 as much as DDPM

    @property
    def drop(self):
        """Shares of samples that lose the embedding, embedding and latent, the latent."""
        return self.drop_clip, self.drop_both, self.drop_latent

    def __post_init__(self):
        object.__setattr__(self, "mode", camera.ALIASES.get(self.mode, self.mode))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(unknown(name, getattr(self, name), choices))
        for name in ("image_size", "model_channels", "num_res_blocks", "num_heads", "context_dim",
                     "steps", "norm_groups", "batch_size", "micro_batch", "log_every", "save_every",
                     "keep", "keep_every", "sample_every", "sample_steps", "validate_pairs",
                     "validate_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("warmup_steps", "workers", "threads", "eval_pairs", "validate_every",
                     "lr", "lr_projection", "weight_decay", "grad_clip", "guidance", "eta", "seed",
                     "eps"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}, it must be 0 or more")
        for name in ("ema_decay", "drop_clip", "drop_both", "drop_latent",
                     "max_damaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must lie in [0, 1]")
        if self.drop_clip + self.drop_both + self.drop_latent > 1:
            raise ValueError("drop_clip + drop_both + drop_latent is more than 1")
        if not self.sources:
            raise ValueError("sources is empty: a run needs at least one Source")
        total = sum(source.probability for source in self.sources)
        if abs(total - 1) > 1e-6:
            shares = " + ".join(f"{s.name} {s.probability:g}" for s in self.sources)
            raise ValueError(f"the probabilities of the sources sum to {total:g}, not 1: {shares}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, it must be two numbers in [0, 1)")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult is {self.channel_mult}, it must be one number or more, "
                             "each at least 1")
        for times in self.attention_resolutions:
            if times < 1 or times & times - 1:
                raise ValueError(f"attention_resolutions is {self.attention_resolutions}: {times} "
                                 "is no power of 2, and grids are halved from level to level")
        if self.num_heads > self.model_channels * min(self.channel_mult):
            raise ValueError(f"num_heads {self.num_heads} is more than there are channels")
        fewest, most = STEPS_OF_REFERENCE if self.sampler == "reference" else (1, TIMESTEPS)
        if not fewest <= self.sample_steps <= most:
            raise ValueError(f"sample_steps is {self.sample_steps}, with sampler={self.sampler!r} "
                             f"it must be {fewest} to {most}")
        halvings = len(self.channel_mult) - 1
        stride = 2 ** halvings * (8 if self.latent == "vae" else 2)
        if self.image_size % stride:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {stride}, which "
                             f"{len(self.channel_mult)} levels of latent={self.latent!r} need")
        if self.model_channels % self.norm_groups:
            raise ValueError(f"model_channels {self.model_channels} is not a multiple of "
                             f"norm_groups {self.norm_groups}")


def unknown(name, value, choices):
    """The message for a choice that is not known, with the nearest known one."""
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name} {value!r} is not known, it is one of {', '.join(choices)}.{hint}"


def parse(name, text, kind):
    """The value that `--name=text` means for a field of type `kind`."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in text.strip("()").split(",") if part.strip())
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (KeyError, ValueError) as err:
        raise ValueError(f"--{name}={text}: a value of type {getattr(kind, '__name__', kind)} "
                         "is needed") from err


def override(config, arguments):
    """A copy of `config` with `--name=value` put in. Raises ValueError with the nearest option."""
    kinds = {field.name: field.type for field in fields(config) if field.name != "sources"}
    changes = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"{argument!r} is not of the form --name=value, with an equals sign")
        if name not in kinds:
            raise ValueError(unknown("option", name, tuple(kinds)))
        changes[name] = parse(name, text, kinds[name])
    return replace(config, **changes)


def load(argv):
    """The Config of `[file, --name=value, ...]`. Raises one-line ValueError, FileNotFoundError."""
    if not argv or argv[0].startswith("--"):
        raise ValueError("a config file comes first, for example: "
                         "python train.py configs/synth.py --steps=200")
    path = Path(argv[0])
    if not path.is_file():
        known = sorted(str(p) for p in Path(__file__).parent.glob("*.py")
                       if p.name != "__init__.py")
        raise FileNotFoundError(f"no config file {path}; there are {', '.join(known) or 'none'}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as err:
        raise ValueError(f"{path} is no python config file: line {err.lineno}, {err.msg}") from err
    if not isinstance(config, Config):
        raise ValueError(f"{path} does not end in `config = Config(...)`")
    return override(config, argv[1:])


def from_dict(values):
    """The Config that `asdict` made, as a checkpoint's meta.json stores it."""
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in values.items()}
    return Config(**{**values, "sources": tuple(Source(**source) for source in values["sources"])})
