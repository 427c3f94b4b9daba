"""Small shards for tests, and readers of them."""

import io
import json
import math
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

import data
from shards import scenes
from configs import Config, Source

SIDE = 8                        # pixels of the images made here


def encoded(pixels, **options):
    """An image file of an array or Pillow image; PNG unless format= says otherwise."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def depth_png(depth):
    return encoded(np.asarray(depth, np.float16).view(np.uint16))


def co3d_metadata(view=0, **changes):
    angle = 0.3 * view
    R = [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    return {"R": R, "T": [0.1 * view, 0.2, 3.0 + view], "focal_length": [2.0, 2.5],
            "principal_point": [0.0, 0.0], "scale_adjustment": 0.5, **changes}


def re10k_metadata(view=0, **changes):
    extrinsics = np.eye(4)
    extrinsics[:3, 3] = view, 0.5, 2 * view
    intrinsics = np.linalg.inv([[300.0, 0, 128], [0, 300, 128], [0, 0, 1]])
    return {"extrinsics": extrinsics.tolist(), "intrinsics": intrinsics.tolist(), **changes}


def scene_members(scene, views=3, side=SIDE, metadata=co3d_metadata):
    """{member name: bytes} of a sound scene; every image is of another colour."""
    members = {}
    for view in range(views):
        digest = zlib.crc32(f"{scene} {view}".encode()).to_bytes(4, "big")
        colour = np.frombuffer(digest[:3], np.uint8)
        frame = f"{scene}/frame{view + 1:06}"
        members[frame + ".png"] = encoded(np.broadcast_to(colour, (side, side, 3)).copy())
        members[frame + "_depth.png"] = depth_png(np.full((side, side), 1.0 + view))
        members[frame + "_metadata.json"] = json.dumps(metadata(view)).encode()
    return members


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    opened = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode="w", format=format, **opened) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_source(folder, name, scenes, shards=1, **options):
    """Shards NAME-000000.tar ... of `scenes` scenes each; returns a reader of them."""
    for shard in range(shards):
        members = {}
        for scene in range(scenes):
            members |= scene_members(f"{name}/scene_{shard}_{scene}", **options)
        write_tar(folder / f"{name}-{shard:06}.tar", members)
    return read_source(folder, f"{name}-*.tar", name=name)


def read_source(folder, pattern, name="here", format="co3d", side=SIDE):
    return scenes.open_source(Source(name, format, pattern, 1.0), folder, side)


def all_pairs(reader, mode="7dof", seed=0, **options):
    return data.Pairs([reader], [1.0], seed, reader.image_size, mode, **options)


def encoded_scene(seed, views=4, latent=(8, 4, 4), width=6):
    """Arrays of an encoded scene, as encode.member takes them, random but for the cameras."""
    random = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    c2w[:, :3, 3] = torch.randn(views, 3, generator=random, dtype=torch.float64)
    return {"moments": torch.randn(views, *latent, generator=random).half(),
            "clip": torch.randn(views, width, generator=random).half(), "c2w": c2w,
            "fov": torch.full((views,), 0.9, dtype=torch.float64),
            "scale": torch.rand(views, generator=random, dtype=torch.float64) + 0.5,
            "radius": 1.25 + seed, "nearplane": 0.75}


def rewritten(path, target, change):
    """A copy of a shard whose members went through change(name, bytes)."""
    with tarfile.open(path) as tar:
        members = {info.name: change(info.name, tar.extractfile(info).read()) for info in tar}
    return write_tar(target, members)


def tiny_config(batch=1, **changes):
    """A Config of a network of a few kilobytes, of encoded pairs."""
    tiny = {"latent": "pixels", "image_size": 32, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
            "attention_resolutions": (1,), "num_heads": 2, "context_dim": 16, "norm_groups": 8}
    return Config((Source("none", "encoded", "none", 1.0),), **{
        "batch_size": batch, "micro_batch": batch, "mode": "7dof", **tiny, **changes})


TINY_CLIP = {"embed_dim": 32, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
