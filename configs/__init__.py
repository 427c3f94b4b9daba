"""What a run is made of: `Config`, `Source`, and `load(argv)` that reads a file and its overrides.

    python train.py configs/mix.py --lr=3e-5 --batch-size 768

A config file is plain python that ends in `config = Config(...)`. Everything is checked in
`__post_init__`, so a file, a command line and a resumed run pass the same gate. torch is imported
when a Config is made, no sooner: a typo on the command line is answered at once.
"""

import argparse
import functools
import logging
import re
import reprlib
import runpy
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

from runtime import command

TIMESTEPS, STEPS_OF_REFERENCE = 1000, (2, 500)      # see diffusion.py
FORMATS = "co3d", "re10k", "acid", "encoded"
MOST = 2**31 - 1
# What a number, or every number of a tuple, may be: (lowest, highest) by field
BOUNDS = {name: (low, high) for low, high, names in (
    (1, 2**14, "image_size model_channels channel_mult num_res_blocks attention_resolutions "
               "num_heads norm_groups context_dim"),
    (1, MOST, "steps batch_size micro_batch log_every save_every keep keep_every sample_every "
              "sample_steps validate_pairs validate_steps pairs_per_shard"),
    (0, MOST, "warmup_steps eval_pairs validate_every patience"),
    (0, 2**63 - 1, "seed"),
    (1, 1024, "window"),
    (0, 1024, "workers threads lora_rank"),
    (0, 1, "betas ema_decay drop_clip drop_both drop_latent max_damaged probability"),
    (0, 1e6, "lr lr_projection eps weight_decay grad_clip guidance eta web_patience"),
) for name in names.split()}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# Fields of a checkpoint's configuration that name files: never opened, see `stored`
NAME_FILES = "sources", "data", "out", "init", "depth_weights"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture."""
    name: str
    format: Literal[FORMATS]
    shards: str                      # training shards: glob or {000..126} pattern from Config.data,
                                     # http(s)://, pipe:COMMAND or -; see shards/files.py
    probability: float               # share of the pairs of a step; the sources' shares sum to 1
    held_out: str = ""               # shards of scenes kept from training, for pictures and scores
    held_out_format: Literal[("", *FORMATS)] = ""   # if another: encoded sources have raw ones
    window: int = 8                  # shards open at a time, of `pipe:` shards alone
    pairs_per_shard: int = 2000      # pairs drawn from each of these before another takes its place

    def __post_init__(self):
        where = f"source {reprlib.repr(self.name)}: "
        check_fields(self, where)
        if self.held_out and (self.held_out_format or self.format) == "encoded":
            raise ValueError(f"{where}held-out shards must be raw, for pictures and scores: say "
                             "held_out_format, co3d, re10k or acid")
        if not self.probability:
            raise ValueError(f"{where}probability is 0, it must be more")


@dataclass(frozen=True)
class Config:
    """A run. Lengths are in a scene's own unit, angles in radians, images in [-1, 1]."""
    sources: tuple[Source, ...]
    data: str = "data"                      # folder that the sources' shard patterns start from
    out: str = "out/run"                    # folder of the run: checkpoints, log.jsonl, grids

    # the network: the defaults are zero123-xl's
    latent: Literal["vae", "pixels"] = "vae"        # 8 x smaller latents, or the image itself
    image_size: int = 256                   # pixels a side of the square images
    prediction: Literal["eps", "z"] = "eps"         # the UNet's output: noise, or the clean latent
    model_channels: int = 320               # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)    # width of each level, in model_channels
    num_res_blocks: int = 2                 # residual blocks a level
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # shrinkages of the latent whose grids
                                            # have transformers; the smallest always has one
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
    lr_schedule: Literal["constant", "cosine"] = "constant"     # after the warm-up
    warmup_steps: int = 100                 # steps over which the rate rises, from 1e-6 of it
    betas: tuple[float, ...] = (0.9, 0.999)     # AdamW
    eps: float = 1e-8                       # AdamW
    weight_decay: float = 0.01              # AdamW
    grad_clip: float = 0.0                  # largest gradient norm; 0 does not clip
    ema_decay: float = 0.9999               # of the average of the UNet's weights
    lora_rank: int = 0                      # of low-rank updates that train instead of the UNet's
                                            # weights, see runtime/lora.py; 0 trains the weights
    lora_convs: bool = False                # updates of 3x3 convolutions too
    ema_per: Literal["step", "micro_step"] = "step"     # micro_step is the reference's
    drop_clip: float = 0.05                 # share of samples that lose the image embedding, alone
    drop_both: float = 0.05                 # share of samples that lose embedding and latent
    drop_latent: float = 0.05               # share of samples that lose the cond latent, alone
    seed: int = 42                          # pairs, noise, timesteps and dropouts follow from it

    # the machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, then mps, then cpu
    precision: Literal["fp32", "bf16"] = "bf16"     # of products and convs; weights stay fp32
    compile: bool = False                   # torch.compile the UNet
    graph: bool = False                     # on one GPU, replay a CUDA graph: for small steps
    checkpoint_activations: bool = False    # recompute in the backward pass: less memory, slower
    divide_optimizer: bool = False          # ranks share moments and average (ZeRO-1): less memory
    workers: int = 4                        # loader processes a rank
    threads: int = 0                        # that a rank computes with; 0: its share of them
    max_damaged: float = 0.05               # share of damaged pairs at which a run stops
    web_patience: float = 300.0             # seconds without an answer that stop web shards

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
    patience: int = 0                       # validations without a lower loss that end a run; 0
                                            # goes on to the last step
    sampler: Literal["ddim", "reference", "dpm++", "unipc"] = "ddim"
    sample_steps: int = 50                  # network evaluations a sample
    guidance: float = 3.0                   # classifier-free guidance scale; 1 has none
    eta: float = 1.0                        # DDIM's noise: 0 deterministic, 1 as much as DDPM

    @property
    def drop(self):
        """Shares of samples that lose the embedding, embedding and latent, the latent."""
        return self.drop_clip, self.drop_both, self.drop_latent

    def __post_init__(self):
        import camera       # and with it torch, which nothing above needs

        check_fields(self)
        camera.mode_named(self.mode)
        object.__setattr__(self, "mode", camera.ALIASES.get(self.mode, self.mode))
        for wrong, says in self.contradictions():
            if wrong:
                raise ValueError(says)

    def contradictions(self):
        """Yields (whether it is so, a line) of what fields can be together and must not."""
        total = sum(source.probability for source in self.sources)
        yield abs(total - 1) > 1e-6, f"the probabilities of the sources sum to {total:g}, not 1"
        yield (self.drop_clip + self.drop_both + self.drop_latent > 1,
               "drop_clip + drop_both + drop_latent is more than 1")
        yield (len(self.betas) != 2 or max(self.betas) == 1,
               f"betas is {self.betas}, it must be two numbers in [0, 1)")
        yield not self.out.strip(), "out is empty, it must name the folder of the run"
        low, high = STEPS_OF_REFERENCE if self.sampler == "reference" else (1, TIMESTEPS)
        yield (not low <= self.sample_steps <= high,
               f"sample_steps is {self.sample_steps}, with sampler={self.sampler!r} it must be "
               f"{low} to {high}")
        yield not self.channel_mult, "channel_mult is (), it must be one number or more"
        for times in self.attention_resolutions:
            yield (times & times - 1, f"attention_resolutions is {self.attention_resolutions}: "
                   f"{times} is no power of 2, and grids are halved from level to level")
        deepest = len(self.channel_mult) - 1
        for level, times in enumerate(self.channel_mult):
            attends = level == deepest or 2**level in self.attention_resolutions
            yield (attends and self.model_channels * times % self.num_heads,
                   f"num_heads {self.num_heads} does not divide the {self.model_channels * times} "
                   f"channels of level {level + 1}")
        stride = 2**deepest * (8 if self.latent == "vae" else 2)
        yield (self.image_size % stride, f"image_size {self.image_size} is not a multiple of "
               f"{stride}, which {deepest + 1} levels of latent={self.latent!r} need")
        yield (self.model_channels % self.norm_groups, f"model_channels {self.model_channels} is "
               f"not a multiple of norm_groups {self.norm_groups}")

    def check_trainable(self):
        """Raises ValueError for what cannot be trained, before anything is read."""
        import camera

        mode = camera.MODES[self.mode]
        if mode.unit == "metric":
            raise ValueError(camera.NO_METRIC_DEPTH)
        raw = any(source.format != "encoded" for source in self.sources)
        if mode.needs_depth and raw and not (self.quantile_blend or self.depth_weights):
            raise ValueError("quantile_blend=false takes scales from the depth network alone, and "
                             "there is none: --depth_weights=dpt_swin2_tiny_256.pt brings it")
        if self.latent == "vae" and not self.init:
            raise ValueError("latent='vae' needs --init=FILE, a checkpoint that brings the "
                             "autoencoder and CLIP, such as zero123-xl.ckpt")
        if self.lora_rank and not self.init:
            raise ValueError("lora_rank trains updates of the weights of a file: --init=FILE")
        for source in self.sources:
            if "pipe:" in source.held_out:
                raise ValueError(f"source {source.name!r}: a command has no fixed order: held_out "
                                 f"must be files or web addresses, not {source.held_out!r}")


# ---- checks

def check_fields(record, where=""):
    """Raises ValueError where a field of a Config or Source is of another type, choice or size.
    Lists become tuples."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(record, field.name, value)
        if not fits(value, field.type, *BOUNDS.get(field.name, ())):
            raise ValueError(f"{where}{field.name} is {reprlib.repr(value)}, it must be "
                             f"{allowed(field)}")


def fits(value, kind, *bounds):
    """Whether a value is of a field's type and within its bounds, if there are any; whole numbers
    are numbers too, truths are not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return isinstance(value, tuple) and all(fits(each, item, *bounds) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return (isinstance(value, (int, float) if kind is float else kind)
            and (not bounds or bounds[0] <= value <= bounds[1]))


def allowed(field):
    """What a field may hold, in words."""
    kind, several = field.type, get_origin(field.type) is tuple
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    text = WORDS.get(get_args(kind)[0] if several else kind, "a Source")
    if field.name in BOUNDS:
        text += " from {:,} to {:,}".format(*BOUNDS[field.name])
    return f"a tuple, of which each is {text}" if several else text


# ---- the command line and the file

class Options(command.Parser):
    """`--name=value` and `--name value` of every field of Config but the sources. Raises ValueError
    with the nearest option."""
    def __init__(self):
        super().__init__("", add_help=False, argument_default=argparse.SUPPRESS)
        for field in fields(Config):
            if field.name != "sources":
                self.add_argument(f"--{field.name}", type=functools.partial(parse, field.type))

    def error(self, message):
        raise ValueError(message)


def parse_with_fields(parser, argv=None):
    """(the options of a parser, the rest) of a command line on which fields of Config may follow.
    An option that is neither ends the process, with the nearest of both."""
    found, rest = parser.parse_known_args(argv)
    names = Options()._option_string_actions
    for name in (text.partition("=")[0] for text in rest if text.startswith("--")):
        if "--" + name[2:].replace("-", "_") not in names:
            parser.error(command.unknown("option", name, [*parser._option_string_actions, *names]))
    return found, rest


def parse(kind, text):
    """What a text means for a field of that type; or the text, which `check_fields` refuses."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            return tuple(item(part) for part in text.strip("()").split(",") if part.strip())
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def override(config, arguments):
    """A copy of `config` with `--name=value` put in. Raises ValueError with the nearest option."""
    return replace(config, **vars(Options().parse_args(arguments)))


def load(argv):
    """The Config of `[file, --name=value, ...]`. One-line ValueError, FileNotFoundError."""
    if not argv or argv[0].startswith("--"):
        raise ValueError("a config file comes first, for example: "
                         "python train.py configs/synth.py --steps=200")
    changes = vars(Options().parse_args(argv[1:]))      # a typo is found before torch is
    path = Path(argv[0])
    if not path.is_file():
        there = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("[!_]*.py")))
        raise FileNotFoundError(f"no config file {path}; there are {there}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as err:        # whatever a user's python does wrong
        lines = [frame.lineno for frame in traceback.extract_tb(err.__traceback__)
                 if frame.filename == str(path)] or [getattr(err, "lineno", "?")]
        reason = str(err) if isinstance(err, ValueError) else f"{type(err).__name__}: {err}"
        raise ValueError(f"{path}, line {lines[-1]}: {' '.join(reason.split())}") from err
    if not isinstance(config, Config):
        raise ValueError(f"{path} does not end in `config = Config(...)`")
    return replace(config, **changes)


# ---- the configurations of checkpoints

def from_dict(values):
    """The Config that `asdict` made, to compare, not to open: its sources name what they named.
    Fields that are gone are told in a line, new ones have their defaults. One-line ValueError."""
    return Config(**{**own_fields(Config, values), "sources": sources_of(values)})


def stored(values, data="", config=None):
    """The Config of a checkpoint, in which every name of a file is the user's own.

    `values`, the stored dict, has the network, its scale and how it is sampled. NAME_FILES are
    those of `config`, the user's --config FILE; without it, sources are the stored held-out
    patterns inside of `data`, the user's --data FOLDER; with neither they are NOWHERE, and who
    then asks for data is told `no_data`. Raises ValueError with one line.
    """
    own = {name: value for name, value in own_fields(Config, values).items()
           if name not in NAME_FILES}
    own["sources"] = NOWHERE
    if config is not None:
        own.update({name: getattr(config, name) for name in NAME_FILES})
    elif data:
        own["sources"] = tuple(replace(source, shards="") for source in sources_of(values))
        for source in own["sources"]:
            if not is_inside(source.held_out):
                raise ValueError(f"the checkpoint names held-out shards {source.held_out!r}, not "
                                 "inside of --data FOLDER: name them in a --config FILE of yours")
    return Config(**{**own, **({"data": data} if data else {})})


def no_data(values):
    """The line for who asks for data of which a stored configuration alone knows."""
    return (f"the checkpoint names data in {reprlib.repr(values.get('data'))}, but nothing that a "
            "file names is opened: name them yourself, with --data FOLDER or --config FILE")


def is_inside(pattern):
    """Whether a shard pattern means nothing but files inside of the folder that it is joined to."""
    names = [name.strip() for name in re.sub(r"\{\d+\.\.\d+\}", "", pattern).split(" ; ")]
    return not any(name == "-" or name.startswith(("/", "~")) or set(name) & set(":\\\0")
                   or ".." in name.split("/") for name in names)


def sources_of(values):
    """The Sources of a stored configuration. Raises ValueError."""
    try:
        return tuple(Source(**own_fields(Source, source)) for source in values.get("sources"))
    except TypeError as err:        # no list, or one lacks a field
        raise ValueError(f"the stored sources are not those of a run: {err}") from err


def own_fields(kind, values):
    """The fields that a stored Config or Source has of ours. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"the stored configuration has {reprlib.repr(values)} where the fields of "
                         f"a {kind.__name__} belong")
    names = {field.name for field in fields(kind)}
    gone = [reprlib.repr(name) for name in values if name not in names]
    if gone:
        log.warning("the stored configuration has %d fields that this version has not, which are "
                    "ignored: %s", len(gone), ", ".join(gone[:5]))
    return {name: value for name, value in values.items() if name in names}


NOWHERE = (Source("nowhere", "co3d", "", 1.0),)     # of a checkpoint whose data nobody has named
