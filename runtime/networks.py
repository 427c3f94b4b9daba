"""Frozen networks out of the weight files that their authors publish: DPT's depth, and CLIP."""

import torch

import clip
import depth
from runtime import checkpoint

# Buffers that some versions of timm store and others do not; they follow from the sizes alone.
DERIVED = (".attn_mask", ".relative_coords_table", ".relative_position_index", ".k_bias")
PREFIXES = ("", "cond_stage_model.model.")      # of CLIP's names: in its own files, in zero123's
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")      # integers in OpenAI's files
NAMES_SHOWN = 3                                 # keys of each kind that an error lists


@torch.no_grad()
def load_depth(path):
    """The frozen depth.DPT of MiDaS's `dpt_swin2_tiny_256.pt`. ValueError of another file."""
    tensors, model = checkpoint.read(path), depth.DPT()
    wanted = {name: w for name, w in model.state_dict().items() if not name.endswith(DERIVED)}
    misfits = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors
                       if name not in wanted and not name.endswith(DERIVED)],
        "misshapen": [],
    }
    for name in wanted.keys() & tensors.keys():
        found = tensors[name]
        if found.shape == wanted[name].shape:
            wanted[name].copy_(found)
        else:
            misfits["misshapen"].append(
                f"{name} {tuple(found.shape)}, not {tuple(wanted[name].shape)}")
    if any(misfits.values()):
        kinds = "; ".join(f"{len(names)} {kind}: {', '.join(sorted(names)[:NAMES_SHOWN])}"
                          + (", ..." if len(names) > NAMES_SHOWN else "")
                          for kind, names in misfits.items() if names)
        raise ValueError(f"{path}: not DPT_SwinV2_T_256 (dpt_swin2_tiny_256.pt): {kinds}")
    return model.eval().requires_grad_(False)


def load_clip(paths, build=clip.CLIP):
    """The CLIP in one or more weight files, an earlier file's tensors before a later one's; fp32.

    Files: OpenAI's ViT-L-14.pt as published (TorchScript) or its state dict, and zero123
    checkpoints, in every container that checkpoint.py reads. build: clip.CLIP, or a subclass of it
    with the text transformer, which clip.CLIP leaves in the file.
    """
    state = {}
    for path in paths:
        tensors = checkpoint.read(path)
        prefix = next((p for p in PREFIXES if p + "visual.proj" in tensors), None)
        if prefix is None:
            raise ValueError(f"{path}: found {len(tensors)} tensors but no CLIP image tower, "
                             f"neither {' nor '.join(p + 'visual.proj' for p in PREFIXES)}")
        names = [name for name in tensors if name.startswith(prefix)]
        state = {name[len(prefix):]: tensors[name] for name in names} | state
    return clip_of({name: state[name] for name in state if name not in NOT_WEIGHTS}, build)


def clip_of(state, build=clip.CLIP):
    """The CLIP, of whatever size, that these tensors (name -> tensor) are; in fp32."""
    with torch.device("meta"):
        network = build(**build.sizes_of(state))
    for name, parameter in network.named_parameters():
        if name not in state or state[name].shape != parameter.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise ValueError(f"tensor {name} {found}, expected {tuple(parameter.shape)}")
    wanted = network.state_dict()
    unknown = sorted(name for name in state
                     if name not in wanted and not name.startswith(build.LEFT_OUT))
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are not CLIP's, the first is {unknown[0]}")
    # OpenAI's files hold most of it in half precision
    network.load_state_dict({name: state[name].float() for name in wanted}, assign=True)
    return network.eval()
