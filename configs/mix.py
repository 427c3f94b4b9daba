"""The published run: zero123-xl fine-tuned on CO3D, RealEstate10K and ACID
(arXiv:2310.17994, section 4).

    torchrun --nproc_per_node 8 train.py configs/mix.py

Weights: zero123-xl.ckpt and dpt_swin2_tiny_256.pt in weights/. Data: shards of the three sets in
data/. Hardware: 8 GPUs of 80 GB; 1536 pairs a step are 192 on each. Of less memory: the original's
4 micro-steps, --micro_batch=48, take half (--dry-run estimates it). The UNet is compiled, which
needs a C compiler: --compile=false does without. Time and result: not measured yet.
"""

from configs import Config, Source

config = Config(
    sources=(
        Source("co3d", "co3d", "co3d/train-*.tar", 0.34, "co3d/held-out-*.tar"),
        Source("re10k", "re10k", "re10k/train-*.tar", 0.33, "re10k/held-out-*.tar"),
        Source("acid", "acid", "acid/train-*.tar", 0.33, "acid/held-out-*.tar"),
    ),
    data="data",
    out="out/mix",
    init="weights/zero123-xl.ckpt",
    depth_weights="weights/dpt_swin2_tiny_256.pt",
    mode="7dof_quantile_scale",     # published as 7dof_qs, see camera.ALIASES
    micro_batch=192,
    compile=True,
)
