"""One or a few captures of one's own: low-rank updates of zeronvs.ckpt. docs/finetune.md, from
phone to film.

    python prepare.py photos walk.mp4 --out data/capture
    python train.py configs/capture.py
    python train.py configs/capture.py --lora_rank=0 --lr=1e-5      # all weights: another --out

A capture has no second scene, so `prepare.py` holds out every tenth view of each.

- zeronvs.ckpt: its pose columns are of this mode, and stay, so that the first step is a good one
- dpt_swin2_tiny_256.pt fills the holes of structure from motion's depth; without it: --mode=7dof
- lora_rank 16 at 1e-4: of a file that is to stay what it is, and that fits a card of one's own;
  all weights want a rate ten times lower
- at most 1,000 steps of 16 pairs: 100 photos have 9,900 pairs, which are seen once or twice; after
  four validations without a lower loss of held-out pairs (200 steps) the run ends
- conditions are dropped as ever, as views are sampled with guidance, which needs both
- the average's decay is 0.98, about the last 50 steps; 0.9999 would still be the model of before

Not run at this size yet, and no other rates were compared: the reasons are what speaks for them.
"""

from configs import Config, Source

tuning = {
    "sources": (Source("capture", "co3d", "train-*.tar", 1.0, "held-out-*.tar"),),
    "data": "data/capture",
    "steps": 1000,
    "batch_size": 16,
    "lr_schedule": "constant",
    "warmup_steps": 50,
    "grad_clip": 1.0,
    "ema_decay": 0.98,
    "lora_rank": 16,
    "log_every": 10,
    "save_every": 50,
    "keep": 5,              # among them the best, when the run ends for want of patience
    "keep_every": 1000,
    "sample_every": 250,
    "validate_every": 50,
    "patience": 4,
}

config = Config(**tuning, out="out/capture", init="weights/zeronvs.ckpt", micro_batch=4, lr=1e-4,
                depth_weights="weights/dpt_swin2_tiny_256.pt", lr_projection=1e-4,
                checkpoint_activations=True)
