"""The small weights of the default job: a UNet in pixel space on rendered scenes, 64x64.

    python prepare.py synth --out data/small --scenes 30000 --views 6 --motion 0.5
    python train.py configs/small.py
    python -m runtime.checkpoint convert out/small weights/small.safetensors --ema --dtype fp16

4.35 M parameters. weights/small.safetensors was made on one H200 (torch 2.11) in two goes: 1,500
steps while another run shared the GPU, then 3,300 more from there by --init (--lr=8e-4
--lr_projection=4e-3 --warmup_steps=50 --seed=7) at 12,000 pairs/s; 1.23 M pairs in all.
weights/small.jsonl is the log of the second go.
"""

from configs import Config, Source

config = Config(
    sources=tuple(Source(layout, layout, f"{layout}/train-*.tar", 0.5, f"{layout}/held-out-*.tar")
                  for layout in ("co3d", "re10k")),
    data="data/small",
    out="out/small",
    latent="pixels",
    prediction="z",
    image_size=64,
    model_channels=32,
    channel_mult=(1, 2, 3, 3),
    num_res_blocks=1,
    attention_resolutions=(2, 4, 8),
    num_heads=4,
    norm_groups=8,
    context_dim=128,
    mode="7dof_quantile_scale",
    steps=4800,
    batch_size=256,
    micro_batch=256,
    lr=1e-3,
    lr_projection=1e-2,
    lr_schedule="cosine",
    warmup_steps=200,
    grad_clip=1.0,
    ema_decay=0.999,
    compile=True,
    graph=True,
    workers=14,
    log_every=20,
    save_every=2000,
    keep=1,
    keep_every=100_000,
    sample_every=4000,
    eval_pairs=256,
    validate_every=1000,
    sampler="dpm++",
    sample_steps=10,
    guidance=1.5,
    eta=0.0,
)
