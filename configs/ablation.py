"""The five ways to tell the network its camera, from scratch, in a small: table 4 of the paper.

    python -m analysis.compare configs/ablation.py --minutes 9      # again, until its table

Every scene has its own arbitrary unit of length, and in half of the scenes the camera goes a
quarter of its path, in the others all of it: neither the unit nor the extent of the cameras tells
how large things are. 31.4 M parameters at 64x64, 512,000 pairs a mode. Hardware: one GPU, which the
five runs share, or several. On one H200: 8.5 minutes. Of two trainings: 17.3, 17.4 and 17.7, 18.4
and 18.5, 19.8, 20.0 and 20.1 dB.
"""

from dataclasses import replace

from configs import Source
from configs.small import config as small

config = replace(
    small,
    sources=tuple(
        Source(f"{extent} {layout}", layout, f"{extent}/{layout}/train-*.tar", 0.25,
               f"{extent}/{layout}/held-out-*.tar")
        for extent in ("near", "far") for layout in ("co3d", "re10k")),
    data="data/ablation",
    out="out/ablation",
    model_channels=64,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=2,
    attention_resolutions=(4, 8),
    norm_groups=16,
    context_dim=256,
    steps=4000,
    batch_size=128,
    micro_batch=128,
    lr=5e-4,
    lr_projection=5e-3,
    grad_clip=0.0,
    drop_clip=0.0, drop_both=0.0, drop_latent=0.0,
    workers=5,
    save_every=500,
    sample_every=1000,
    validate_every=500,
    validate_pairs=256,
    sample_steps=8,
    guidance=1.0,
)
