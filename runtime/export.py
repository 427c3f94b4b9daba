"""Hugging Face diffusers folders of zero123 (`unet/`, `vae/`, ...), under checkpoint names.

zero123-xl is published in two such layouts, which differ in the pose projection's folder and name:
both are read, and written beside each other, so that zero123-hf and threestudio open one folder.
A network's two naming schemes are one table, which is used both ways. What differs in more than its
name: CLIP's q, k and v are one matrix in a checkpoint, its projection is transposed, and the
autoencoder's attention is made of 1x1 convolutions.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from clip import HEAD_WIDTH
from runtime.files import read_json
from runtime.foreign import read_file
from runtime.tensors import StateDict, lazy, write_safetensors

CONFIG_FILE = "zeronvs_config.json"     # a run's configuration, which diffusers' files do not tell
WEIGHTS = [stem + ending for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
           for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
PREDICTIONS = {"eps": "epsilon", "z": "sample"}         # a run's name for what is predicted: theirs
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor"}       # its defaults are CLIP's

# ------------------------------------------------------------------------------ names

# Modules of checkpoints and of diffusers. For each level i and block j of it: `down` and `up`
# number the UNet's blocks on its way in and out, `last` and `end` are a level's last ones, `conv`
# follows the attention that is there or not, `back` counts levels from the other end.
UNET_RULES = (
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
    ("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"),
    ("middle_block.2", "mid_block.resnets.1"),
    ("input_blocks.{down}.0", "down_blocks.{i}.resnets.{j}"),
    ("input_blocks.{down}.1", "down_blocks.{i}.attentions.{j}"),
    ("input_blocks.{last}.0.op", "down_blocks.{i}.downsamplers.0.conv"),
    ("output_blocks.{up}.0", "up_blocks.{i}.resnets.{j}"),
    ("output_blocks.{up}.1", "up_blocks.{i}.attentions.{j}"),
    ("output_blocks.{end}.{conv}.conv", "up_blocks.{i}.upsamplers.0.conv"))
VAE_RULES = (
    ("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"),
    *((half + ours, half + theirs) for half in ("encoder.", "decoder.") for ours, theirs in (
        ("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"),
        ("mid.block_1", "mid_block.resnets.0"), ("mid.attn_1", "mid_block.attentions.0"),
        ("mid.block_2", "mid_block.resnets.1"))),
    ("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    ("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    ("decoder.up.{i}.block.{j}", "decoder.up_blocks.{back}.resnets.{j}"),
    ("decoder.up.{i}.upsample.conv", "decoder.up_blocks.{back}.upsamplers.0.conv"))
CLIP_RULES = (
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("conv1", "vision_model.embeddings.patch_embedding"),
    ("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("ln_pre", "vision_model.pre_layrnorm"), ("ln_post", "vision_model.post_layernorm"),
    ("transformer.resblocks.{i}", "vision_model.encoder.layers.{i}"),
    ("proj", "visual_projection.weight"))
# and the modules inside of these
UNET_INSIDE = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
               "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
VAE_INSIDE = {"nin_shortcut": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k",
              "v": "to_v", "proj_out": "to_out.0"}
CLIP_INSIDE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
               "mlp.c_proj": "mlp.fc2", "attn": "self_attn"}
OLD_ATTENTION = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
# what there is one of a level, but for the last, in either scheme; CLIP's levels are its layers
LEVEL_ENDS = (".op.weight", ".downsample.conv.weight", ".downsamplers.0.conv.weight",
              ".ln_1.weight", ".layer_norm1.weight")
FIRST_LEVELS = "down_blocks.0.resnets.", "encoder.down.0.block.", "encoder.down_blocks.0.resnets."


def table_of(rules, names):
    """{checkpoint's module: diffusers'} of a network whose tensors have these names, in either
    scheme."""
    levels, table = 1 + sum(name.endswith(LEVEL_ENDS) for name in names), {}
    blocks = max(count(names, "input_blocks.") // levels - 1,
                 *(count(names, start) for start in FIRST_LEVELS))
    for i, j in itertools.product(range(levels), range(blocks + 1)):
        first = i * (blocks + 1)
        attends = (f"output_blocks.{first}.1.norm.weight" in names
                   or f"up_blocks.{i}.attentions.0.norm.weight" in names)
        at = {"i": i, "j": j, "back": levels - 1 - i, "up": first + j, "down": first + j + 1,
              "end": first + blocks, "last": first + blocks + 1, "conv": 2 if attends else 1}
        table |= {ours.format(**at): theirs.format(**at) for ours, theirs in rules}
    return table


def count(names, before):
    """How many different numbers follow `before` in the names."""
    return len({name[len(before):].split(".")[0] for name in names if name.startswith(before)})


def rename(name, table, *inside):
    """A tensor's name with its longest module in `table` renamed, and what follows by the tables
    `inside`; None where the table has no module of it."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if (module := ".".join(parts[:i])) in table:
            rest = ".".join(parts[i:])
            return ".".join(filter(None, (table[module], inside and rename(rest, *inside) or rest)))
    return None


# ------------------------------------------------------------------------------ networks

def unet_config(found):
    """What diffusers' config.json says of a UNet, by its tensors under diffusers' names."""
    levels, width = count(found, "down_blocks."), found["conv_in.weight"].shape[0]
    widths = [found[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(levels)]
    if widths[0] != width:
        raise ValueError(f"diffusers has no such UNet: its first level is {widths[0]} wide, the "
                         f"convolution before it {width}")

    def kinds(way):
        return ["CrossAttn" * (count(found, f"{way.lower()}_blocks.{i}.attentions.") > 0)
                + f"{way}Block2D" for i in range(levels)]
    cross = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return {"in_channels": found["conv_in.weight"].shape[1],
            "out_channels": found["conv_out.weight"].shape[0], "block_out_channels": widths,
            "layers_per_block": count(found, "down_blocks.0.resnets."),
            "cross_attention_dim": found[cross].shape[1],
            "down_block_types": kinds("Down"), "up_block_types": kinds("Up")}


def vae_config(found):
    levels = count(found, "encoder.down_blocks.")
    return {"in_channels": found["encoder.conv_in.weight"].shape[1],
            "out_channels": found["decoder.conv_out.weight"].shape[0],
            "latent_channels": found["decoder.conv_in.weight"].shape[1],
            "block_out_channels": [found[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"].shape[0]
                                   for i in range(levels)],
            "layers_per_block": count(found, "encoder.down_blocks.0.resnets."),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels}


def clip_config(found):
    width, _, patch, _ = found["vision_model.embeddings.patch_embedding.weight"].shape
    places = found["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
            "hidden_size": width, "image_size": round(places**0.5) * patch, "patch_size": patch,
            "intermediate_size": found["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_attention_heads": width // HEAD_WIDTH,
            "num_hidden_layers": count(found, "vision_model.encoder.layers."),
            "projection_dim": found["visual_projection.weight"].shape[0]}


def projection_config(found):
    """As threestudio's class and as zero123-hf's take it."""
    if "proj.weight" in found:
        width, inputs = found["proj.weight"].shape
        return {"embedding_dim": width, "additional_embeddings": inputs - width}
    width, inputs = found["projection.weight"].shape
    return {"in_channel": inputs, "out_channel": width}


class Network(NamedTuple):
    """A network in a folder: where it is in checkpoints, its names, its class and configuration."""
    prefix: str
    rules: tuple
    inside: dict
    library: str
    kind: str
    config: Callable


NETWORKS = {
    "unet": Network("model.diffusion_model.", UNET_RULES, UNET_INSIDE, "diffusers",
                    "UNet2DConditionModel", unet_config),
    "vae": Network("first_stage_model.", VAE_RULES, VAE_INSIDE, "diffusers", "AutoencoderKL",
                   vae_config),
    "image_encoder": Network("cond_stage_model.model.visual.", CLIP_RULES, CLIP_INSIDE,
                             "transformers", "CLIPVisionModelWithProjection", clip_config),
    "clip_camera_projection": Network(
        "cc_projection.", (("weight", "proj.weight"), ("bias", "proj.bias")), {}, "zero123",
        "CLIPCameraProjection", projection_config),
    "cc_projection": Network(
        "cc_projection.", (("weight", "projection.weight"), ("bias", "projection.bias")), {},
        "pipeline_zero1to3", "CCProjection", projection_config)}


def from_diffusers(network, found):
    """Entries by checkpoint names; a name that no table knows stays under its part."""
    back = {theirs: ours for ours, theirs in table_of(network.rules, found).items()}
    inside = {theirs: ours for ours, theirs in network.inside.items()} | OLD_ATTENTION
    entries = {rename(name, back, inside) or name: entry for name, entry in found.items()
               if not name.endswith("position_ids")}
    for name, entry in list(entries.items()):
        qkv = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        if ".attn.q_proj." in name and all(part in entries for part in qkv):
            entries[name.replace("q_proj.", "in_proj_")] = lazy(
                lambda *parts: torch.cat(parts), *map(entries.pop, qkv))
        elif ".mid.attn_1." in name and len(entry.shape) == 2:
            entries[name] = lazy(lambda w: w[:, :, None, None], entry)
        elif name == "proj":
            entries[name] = lazy(torch.t, entry)
    return {network.prefix + name: entry for name, entry in entries.items()}


def to_diffusers(network, found):
    """Entries by diffusers' names, of entries by checkpoint names without their prefix. Raises
    ValueError for a module that has no place there."""
    table, entries, unknown = table_of(network.rules, found), {}, []
    for name, entry in found.items():
        parts = {name: entry}
        if ".attn.in_proj_" in name:
            parts = {name.replace("in_proj_", f"{x}_proj."): lazy(
                lambda w, j=j: w.chunk(3)[j], entry) for j, x in enumerate("qkv")}
        elif ".mid.attn_1." in name and len(entry.shape) == 4:
            parts = {name: lazy(lambda w: w[:, :, 0, 0], entry)}
        elif name == "proj":
            parts = {name: lazy(torch.t, entry)}
        names = [rename(part, table, network.inside) for part in parts]
        unknown += [name] * (None in names)
        entries |= zip(names, parts.values())
    if unknown:
        raise ValueError(f"{len(unknown)} tensors have no place in diffusers' network, for example "
                         f"{unknown[0]}")
    return entries


# ------------------------------------------------------------------------------ folders

def read_diffusers(folder):
    """The StateDict of a diffusers folder under checkpoint names; of the parts that are there."""
    entries = {}
    for part, network in NETWORKS.items():
        if (folder / part).is_dir():
            found = read_part(folder / part)
            try:
                entries |= from_diffusers(network, found)
            except ValueError as err:
                raise ValueError(f"{folder / part}: {err}") from err
    config = folder / CONFIG_FILE
    return StateDict(folder, entries, read_json(config) if config.is_file() else {})


def read_part(folder):
    """The entries of one network: of its file, or of the shards that its index lists."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_file(folder / name).entries
    # of half precision last: model.safetensors.index.json, model.safetensors.index.fp16.json
    for index in sorted(folder.glob("*.index*.json"), key=lambda path: ("fp16" in path.name, path)):
        places, entries = read_json(index).get("weight_map"), {}
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in sorted({str(file) for file in places.values()}):
            if Path(file).name != file:
                raise ValueError(f"{index} names {file[:100]!r}, which is no file beside it")
            entries |= read_file(folder / file).entries
        missing = [name for name in places if name not in entries]
        if missing:
            raise ValueError(f"{index} lists {missing[0][:100]}, which is in none of its files")
        return entries
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"{folder} holds {found}, but none of {', '.join(WEIGHTS)}, and no "
                            "*.index.json")


def write_diffusers(folder, tensors):
    """Writes the parts that there are. Returns the names left out.

    tensors: StateDict under checkpoint names; what weights do not tell is taken from the run's
    configuration, if they are of one, else Stable Diffusion's. That configuration is kept beside
    them, so that the folder of a small run opens here again.
    """
    folder, run, written = Path(folder), tensors.meta.get("config", {}), set()
    size = run.get("image_size", 256)
    more = {"vae": {"sample_size": size}, "unet": {
        "attention_head_dim": run.get("num_heads", 8),      # diffusers' name for their number
        "norm_num_groups": run.get("norm_groups", 32),
        "sample_size": size // 8 if run.get("latent", "vae") == "vae" else size}}
    index = {"_class_name": "Zero1to3StableDiffusionPipeline", "requires_safety_checker": False,
             "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
             "feature_extractor": ["transformers", PREPROCESSOR["image_processor_type"]]}
    for part, network in NETWORKS.items():
        found = {name.removeprefix(network.prefix): entry for name, entry in tensors.entries.items()
                 if name.startswith(network.prefix)}
        if found:
            entries = to_diffusers(network, found)
            write_json(folder / part / "config.json", {
                "_class_name": network.kind, **network.config(entries), **more.get(part, {})})
            write_safetensors(folder / part / WEIGHTS[network.library == "transformers"],
                              StateDict(folder, entries))
            index[part] = [network.library, network.kind]
            written |= {network.prefix + name for name in found}
    write_json(folder / "scheduler/scheduler_config.json",
               SCHEDULER | {"prediction_type": PREDICTIONS[run.get("prediction", "eps")]})
    write_json(folder / "feature_extractor/preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "model_index.json", index)
    if run or tensors.step:
        write_json(folder / CONFIG_FILE,
                   {"global_step": tensors.step} | ({"config": run} if run else {}))
    return [name for name in tensors if name not in written]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
