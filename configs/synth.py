"""The embedded default: a small UNet in pixel space on scenes that the project renders itself.

    python prepare.py synth && python train.py configs/synth.py

Measured on 2 cores of an AMD EPYC: 5.5 minutes; held-out PSNR 18.95 dB, where repeating the view
has 17.68 and its mean colour 14.03.
"""

from configs import Config, Source

config = Config(
    sources=(
        Source("co3d", "co3d", "co3d/train-*.tar", 0.5, "co3d/held-out-*.tar"),
        Source("re10k", "re10k", "re10k/train-*.tar", 0.5, "re10k/held-out-*.tar"),
    ),
    data="data/synth",
    out="out/synth",
    latent="pixels",
    prediction="z",
    image_size=32,
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 4),
    num_heads=1,
    norm_groups=8,
    context_dim=128,
    mode="7dof_quantile_scale",
    steps=1500,
    batch_size=16,
    micro_batch=16,
    lr=2e-3,
    lr_projection=2e-2,
    lr_schedule="cosine",
    warmup_steps=50,
    drop_clip=0.0, drop_both=0.0, drop_latent=0.0,
    ema_decay=0.99,
    precision="fp32",
    workers=1,
    log_every=20,
    save_every=500,
    sample_every=500,
    sampler="ddim",
    sample_steps=2,
    guidance=1.0,
    eta=0.0,
)
