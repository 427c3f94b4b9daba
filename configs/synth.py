"""The default job: the small weights fine-tuned on scenes that the project renders itself.

    python prepare.py synth && python train.py configs/synth.py

It starts from weights/small.safetensors (configs/small.py), as ZeroNVS starts from zero123-xl. Of
such scenes these have seen 1.2 M pairs, to which a few thousand add nothing (after 400 steps -0.02
dB +- 0.04): it shows all of a run in minutes. Four times the rates, 2e-4 and 2e-3, cost 0.10 dB.
"""

from dataclasses import replace

from configs import Source
from configs.small import config as small

config = replace(
    small,
    sources=(
        Source("co3d", "co3d", "co3d/train-*.tar", 0.25, "co3d/held-out-*.tar"),
        Source("re10k", "re10k", "re10k/train-*.tar", 0.75, "re10k/held-out-*.tar"),
    ),
    data="data/synth",
    out="out/synth",
    init="weights/small.safetensors",
    steps=300,
    batch_size=16,
    micro_batch=16,
    lr=5e-5,
    lr_projection=5e-4,
    warmup_steps=20,
    ema_decay=0.98,
    compile=False,
    graph=False,
    precision="fp32",
    workers=1,
    save_every=100,
    sample_every=300,
    eval_pairs=64,
    validate_every=100,
    validate_pairs=16,
)
