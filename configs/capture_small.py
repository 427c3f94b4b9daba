"""configs/capture.py with the small weights, on a CPU: to see all of docs/finetune.md work.

    python prepare.py photos walk.mp4 --out data/capture --size 64
    python train.py configs/capture_small.py

The scale is the cameras' (mode 7dof), as nothing here fills the holes of sparse depth.
"""

from dataclasses import replace

from configs.capture import tuning
from configs.synth import config as synth

config = replace(synth, **tuning, out="out/capture_small", lr=1e-3, lr_projection=1e-3,
                 mode="7dof", validate_pairs=64, eval_pairs=128)
