"""Hugging Face diffusers folders of zero123 (`unet/`, `vae/`, ...), under checkpoint names.

zero123-xl is published in two such layouts, which differ in the pose projection's folder and name:
both are read, and written beside each other, so that zero123-hf and threestudio open one folder.
The two naming schemes are one table of (checkpoint, diffusers) pairs of module names; what differs
in more than its name: CLIP's q, k and v are one matrix in a checkpoint, its projection is
transposed, and the autoencoder's attention is made of 1x1 convolutions.
"""

import json
from pathlib import Path

import torch

from runtime.foreign import LazyTensor, StateDict, read_file, write_safetensors

UNET, VAE, CLIP, POSE = ("model.diffusion_model.", "first_stage_model.",
                         "cond_stage_model.model.", "cc_projection.")
POSE_FOLDERS = ("clip_camera_projection", "cc_projection")
CONFIG_FILE = "zeronvs_config.json"     # a run's configuration, which diffusers' files do not tell
WEIGHTS = [stem + ending for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
           for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
IMAGE_SIZE = 256            # of zero123's images
HEADS = 8                   # of Stable Diffusion 1's attention at every width; weights do not tell
NORM_GROUPS = 32            # of its UNet's norms
PREDICTIONS = {"eps": "epsilon", "z": "sample"}         # a run's name for what is predicted: theirs
HEAD_WIDTH = 64             # of CLIP's vision transformers
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
    "do_normalize": True, "resample": 3, "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224}, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711]}


# ------------------------------------------------------------------------------ names

def below(pairs, here, there):
    return [(f"{here}.{a}", f"{there}.{b}") for a, b in pairs]


def unet_names(levels, blocks, attends):
    """(checkpoint, diffusers) pairs. blocks: residual ones a level. attends: per up block."""
    resnet = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
              ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
              ("skip_connection", "conv_shortcut")]
    pairs = [("time_embed.0", "time_embedding.linear_1"),
             ("time_embed.2", "time_embedding.linear_2"), ("input_blocks.0.0", "conv_in"),
             ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
             ("middle_block.1", "mid_block.attentions.0")]
    pairs += below(resnet, "middle_block.0", "mid_block.resnets.0")
    pairs += below(resnet, "middle_block.2", "mid_block.resnets.1")
    for i in range(levels):
        for j in range(blocks):
            here, there = f"input_blocks.{1 + i * (blocks + 1) + j}", f"down_blocks.{i}"
            pairs += below(resnet, f"{here}.0", f"{there}.resnets.{j}")
            pairs += [(f"{here}.1", f"{there}.attentions.{j}")]
        pairs += [(f"input_blocks.{(i + 1) * (blocks + 1)}.0.op",
                   f"down_blocks.{i}.downsamplers.0.conv")]
        for j in range(blocks + 1):
            here, there = f"output_blocks.{i * (blocks + 1) + j}", f"up_blocks.{i}"
            pairs += below(resnet, f"{here}.0", f"{there}.resnets.{j}")
            pairs += [(f"{here}.1", f"{there}.attentions.{j}")]
        pairs += [(f"{here}.{2 if attends[i] else 1}.conv", f"{there}.upsamplers.0.conv")]
    return pairs


def vae_names(levels, blocks):
    """(checkpoint, diffusers) pairs of the autoencoder."""
    resnet = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")]
    resnet += [("nin_shortcut", "conv_shortcut")]
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        ends = [("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
        attention = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"),
                     ("proj_out", "to_out.0")]
        pairs += below(ends, half, half)
        pairs += below(resnet, f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        pairs += below(resnet, f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        pairs += below(attention, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(blocks):
            pairs += below(resnet, f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}")
        for j in range(blocks + 1):
            pairs += below(resnet, f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}")
        pairs += [(f"encoder.down.{i}.downsample.conv", f"{down}.downsamplers.0.conv"),
                  (f"decoder.up.{i}.upsample.conv", f"{up}.upsamplers.0.conv")]
    return pairs


def clip_names(layers):
    """(checkpoint, diffusers) pairs of the image tower, without q, k, v and the projection."""
    embeddings = "vision_model.embeddings"
    pairs = [("visual.class_embedding", f"{embeddings}.class_embedding"),
             ("visual.conv1", f"{embeddings}.patch_embedding"),
             ("visual.positional_embedding", f"{embeddings}.position_embedding.weight"),
             ("visual.ln_pre", "vision_model.pre_layrnorm"),
             ("visual.ln_post", "vision_model.post_layernorm")]
    layer = [("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
             ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")]
    for i in range(layers):
        here, there = f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        pairs += below(layer, here, there)
    return pairs


def rename(name, table):
    """A tensor's name with its module's renamed, or None where the table knows no module of it."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if ".".join(parts[:i]) in table:
            return ".".join([table[".".join(parts[:i])], *parts[i:]])
    return None


def count(names, before):
    """How many different numbers follow `before` in the names."""
    return len({name[len(before):].split(".")[0] for name in names if name.startswith(before)})


def made(entry, shape, change):
    return LazyTensor(entry.dtype, tuple(shape), lambda: change(entry.read()).contiguous())


# ------------------------------------------------------------------------------ reading

def is_diffusers(folder):
    return (Path(folder) / "unet").is_dir()


def read_diffusers(folder):
    """The StateDict of a diffusers folder under checkpoint names; of the parts that are there."""
    folder, entries, others = Path(folder), {}, {}
    parts = {"unet": unet_from, "vae": vae_from, "image_encoder": clip_from,
             **{part: pose_from for part in POSE_FOLDERS}}
    for part, convert in parts.items():
        if (folder / part).is_dir():
            found = read_part(folder / part)
            entries.update(convert(found))
            # a table of numbers 0, 1, 2, ... in files of old versions
            others.update((f"{part}.{name}", entry) for name, entry in found.items()
                          if name.endswith("position_ids"))
    config = folder / CONFIG_FILE
    meta = read_json(config) if config.is_file() else {}
    return StateDict(folder, entries, meta, others)


def read_json(path):
    """The dict in a small JSON file. Raises ValueError with one line."""
    largest = 1 << 24
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"it has more than {largest:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no table of entries")
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} is damaged: {' '.join(str(err).split())[:100]}") from err
    return found


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
    raise FileNotFoundError(f"{folder} holds {found}; its weights must be one file, "
                            f"{', '.join(WEIGHTS[:2])} or a .bin of the older kind, or have an "
                            "index, *.index.json")


def renamed(found, pairs, prefix):
    """Entries by checkpoint names; a name that the table does not know stays under its part."""
    table = {there: here for here, there in pairs}
    return {prefix + (rename(name, table) or name): entry for name, entry in found.items()}


def unet_from(found):
    levels, blocks = count(found, "down_blocks."), count(found, "down_blocks.0.resnets.")
    attends = [count(found, f"up_blocks.{i}.attentions.") > 0 for i in range(levels)]
    return renamed(found, unet_names(levels, blocks, attends), UNET)


def vae_from(found):
    levels = count(found, "encoder.down_blocks.")
    found = {".".join(OLD_ATTENTION.get(part, part) for part in name.split(".")): entry
             for name, entry in found.items()}
    entries = renamed(found, vae_names(levels, count(found, "encoder.down_blocks.0.resnets.")), VAE)
    for name, entry in entries.items():
        if ".mid.attn_1." in name and len(entry.shape) == 2:
            entries[name] = made(entry, (*entry.shape, 1, 1), lambda w: w[:, :, None, None])
    return entries


def clip_from(found):
    layers = count(found, "vision_model.encoder.layers.")
    found = {name: entry for name, entry in found.items() if not name.endswith("position_ids")}
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [found.pop(f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}", None)
                     for x in "qkv"]
            if None not in parts:
                name = f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}"
                shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                found[name] = LazyTensor(parts[0].dtype, shape, lambda parts=parts: torch.cat(
                    [part.read() for part in parts]))
    if "visual_projection.weight" in found:
        entry = found.pop("visual_projection.weight")
        found["visual.proj"] = made(entry, entry.shape[::-1], torch.Tensor.t)
    return renamed(found, clip_names(layers), CLIP)


def pose_from(found):
    return {POSE + name.rpartition(".")[2]: entry for name, entry in found.items()}


# ------------------------------------------------------------------------------ writing

def write_diffusers(folder, tensors):
    """Writes the parts that there are into an existing folder. Returns the names left out.

    tensors: StateDict under checkpoint names; what weights do not tell is taken from the run's
    configuration, if they are of one, else Stable Diffusion's. That configuration is kept beside
    them, so that the folder of a small run opens here again.
    """
    run = tensors.meta.get("config", {})
    folder, index = Path(folder), {"_class_name": "Zero1to3StableDiffusionPipeline",
                                   "requires_safety_checker": False,
                                   "safety_checker": [None, None]}
    size = run.get("image_size", IMAGE_SIZE)
    of_unet = {     # attention_head_dim is diffusers' name for the number of heads
        "attention_head_dim": run.get("num_heads", HEADS),
        "norm_num_groups": run.get("norm_groups", NORM_GROUPS),
        "sample_size": size // 8 if run.get("latent", "vae") == "vae" else size}
    for part, prefix, convert, library, kind, more in (
            ("unet", UNET, unet_to, "diffusers", "UNet2DConditionModel", of_unet),
            ("vae", VAE, vae_to, "diffusers", "AutoencoderKL", {"sample_size": size}),
            ("image_encoder", CLIP + "visual.", clip_to, "transformers",
             "CLIPVisionModelWithProjection", {}),
            (POSE_FOLDERS[0], POSE, threestudio_to, "zero123", "CLIPCameraProjection", {}),
            (POSE_FOLDERS[1], POSE, zero123_hf_to, "pipeline_zero1to3", "CCProjection", {})):
        found = {name[len(prefix):]: entry for name, entry in tensors.entries.items()
                 if name.startswith(prefix)}
        if found:
            entries, config = convert(found)
            (folder / part).mkdir()
            write_safetensors(folder / part / WEIGHTS[library == "transformers"],
                              StateDict(folder, entries))
            write_json(folder / part / "config.json", {"_class_name": kind, **config, **more})
            index[part] = [library, kind]
    for part, file, config, library in (
            ("scheduler", "scheduler_config.json", {**SCHEDULER, "prediction_type":
             PREDICTIONS[run.get("prediction", "eps")]}, "diffusers"),
            ("feature_extractor", "preprocessor_config.json", PREPROCESSOR, "transformers")):
        (folder / part).mkdir()
        write_json(folder / part / file, config)
        index[part] = [library, config.get("_class_name", "CLIPImageProcessor")]
    write_json(folder / "model_index.json", index)
    if run or tensors.step:
        write_json(folder / CONFIG_FILE,
                   {"global_step": tensors.step} | ({"config": run} if run else {}))
    return [name for name in tensors if not name.startswith((UNET, VAE, CLIP + "visual.", POSE))]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def renamed_to(found, pairs):
    """Entries by diffusers names. Raises ValueError for a module that has none."""
    table = dict(pairs)
    names = {name: rename(name, table) for name in found}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise ValueError(f"{len(unknown)} tensors have no place in diffusers' network, for example "
                         f"{unknown[0]}")
    return {names[name]: entry for name, entry in found.items()}


def unet_to(found):
    blocks_in = count(found, "input_blocks.")
    downs = [k for k in range(blocks_in) if f"input_blocks.{k}.0.op.weight" in found]
    period = min(downs, default=blocks_in)
    levels, blocks = blocks_in // period, period - 1
    attends = [f"output_blocks.{i * period}.1.norm.weight" in found for i in range(levels)]
    widths = [found[f"input_blocks.{1 + i * period}.0.out_layers.3.weight"].shape[0]
              for i in range(levels)]
    width = found["input_blocks.0.0.weight"].shape[0]
    if widths[0] != width:
        raise ValueError(f"diffusers has no such UNet: its first level is {widths[0]} wide, the "
                         f"convolution before it {width}")
    cross = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    config = {
        "in_channels": found["input_blocks.0.0.weight"].shape[1],
        "out_channels": found["out.2.weight"].shape[0], "block_out_channels": widths,
        "layers_per_block": blocks, "cross_attention_dim": found[cross].shape[1],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D"
                             for yes in attends[::-1]],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in attends],
        "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "downsample_padding": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-5}
    return renamed_to(found, unet_names(levels, blocks, attends)), config


def vae_to(found):
    levels, blocks = count(found, "encoder.down."), count(found, "encoder.down.0.block.")
    widths = [found[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    config = {
        "in_channels": found["encoder.conv_in.weight"].shape[1],
        "out_channels": found["decoder.conv_out.weight"].shape[0], "block_out_channels": widths,
        "latent_channels": found["decoder.conv_in.weight"].shape[1], "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu", "norm_num_groups": 32, "scaling_factor": 0.18215}
    for name, entry in found.items():
        if ".mid.attn_1." in name and len(entry.shape) == 4:
            found[name] = made(entry, entry.shape[:2], lambda w: w[:, :, 0, 0])
    return renamed_to(found, vae_names(levels, blocks)), config


def clip_to(found):
    found = {"visual." + name: entry for name, entry in found.items()}
    projection, layers = found.pop("visual.proj"), count(found, "visual.transformer.resblocks.")
    split = {"visual_projection.weight": made(projection, projection.shape[::-1], torch.Tensor.t)}
    for i in range(layers):
        for kind in ("weight", "bias"):
            entry = found.pop(f"visual.transformer.resblocks.{i}.attn.in_proj_{kind}")
            for j, x in enumerate("qkv"):
                split[f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.{kind}"] = made(
                    entry, (entry.shape[0] // 3, *entry.shape[1:]), lambda w, j=j: w.chunk(3)[j])
    width, _, patch, _ = found["visual.conv1.weight"].shape
    grid = round((found["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    config = {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu", "hidden_size": width, "image_size": grid * patch,
        "intermediate_size": found["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "layer_norm_eps": 1e-5, "num_attention_heads": width // HEAD_WIDTH, "num_channels": 3,
        "num_hidden_layers": layers, "patch_size": patch, "projection_dim": projection.shape[1]}
    return {**renamed_to(found, clip_names(layers)), **split}, config


def threestudio_to(found):
    width, inputs = found["weight"].shape
    config = {"embedding_dim": width, "additional_embeddings": inputs - width}
    return {"proj." + name: entry for name, entry in found.items()}, config


def zero123_hf_to(found):
    width, inputs = found["weight"].shape
    config = {"in_channel": inputs, "out_channel": width}
    return {"projection." + name: entry for name, entry in found.items()}, config
