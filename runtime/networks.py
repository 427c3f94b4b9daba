"""Frozen networks out of the weight files that their authors publish: DPT's depth, and CLIP."""

import torch

import clip
import depth
from runtime import checkpoint
from runtime.tensors import misfit

# Buffers that some versions of timm store and others do not; they follow from the sizes alone.
DERIVED = (".attn_mask", ".relative_coords_table", ".relative_position_index", ".k_bias")
PREFIXES = ("", "cond_stage_model.model.")      # of CLIP's names: in its own files, in zero123's
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")      # integers in OpenAI's files


def load_depth(path, device="cpu"):
    """The frozen depth.DPT of MiDaS's `dpt_swin2_tiny_256.pt`, or None where path is "". ValueError
    of another file."""
    if not path:
        return None
    tensors, model = checkpoint.read(path), depth.DPT()
    found, wanted = ({name: w for name, w in side.items() if not name.endswith(DERIVED)}
                     for side in (tensors.entries, model.state_dict()))
    if problem := misfit(found, wanted):
        raise ValueError(f"{path}: not DPT_SwinV2_T_256 (dpt_swin2_tiny_256.pt): {problem}")
    model.load_state_dict({name: tensors[name] for name in found}, strict=False)
    return model.to(device).eval().requires_grad_(False)


def load_clip(paths, build=clip.CLIP):
    """The CLIP in one or more weight files, an earlier file's tensors before a later one's; fp32.

    Files: OpenAI's ViT-L-14.pt as published (TorchScript) or its state dict, and zero123
    checkpoints, in every form that checkpoint.py reads. build: clip.CLIP, or a subclass of it with
    the text transformer.
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
    state = {name: w for name, w in state.items() if not name.startswith(build.LEFT_OUT)}
    with torch.device("meta"):
        network = build(**build.sizes_of(state))
    if problem := misfit(state, network.state_dict()):
        raise ValueError(f"not CLIP's tensors: {problem}")
    # OpenAI's files hold most of it in half precision
    network.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    return network.eval()
