"""Encoded shards: what the frozen networks make of every view, computed once.

A member `category/scene.safetensors` a scene, with arrays over its n views:

    moments   float16 (n, 2c, h, w)  the autoencoder's posterior, mean over log-variance
    clip      float16 (n, d)         CLIP's image embedding
    c2w       float64 (n, 4, 4)      OpenGL camera-to-world
    fov       float64 (n,)           radians
    scale     float64 (n,)           20% quantile of the view's dense depth; nan where not known

and the scene's `radius` and `nearplane` as metadata. index.py reads them.
"""

from safetensors.torch import save


def member(moments, clip, c2w, fov, scale, radius, nearplane):
    """The bytes of one scene's member, from tensors as listed above and two numbers."""
    n = len(moments)
    arrays = {"moments": moments.half(), "clip": clip.half(), "c2w": c2w.double(),
              "fov": fov.double(), "scale": scale.double()}
    for name, array in arrays.items():
        assert len(array) == n, f"{name} is not of {n} views"
    told = {"radius": repr(float(radius)), "nearplane": repr(float(nearplane))}
    return save({name: array.contiguous().cpu() for name, array in arrays.items()}, told)
