"""configs/mix.py on encoded shards: the same pairs, draws and losses, without the frozen networks.

    for name in co3d re10k acid; do
        torchrun --nproc_per_node 8 prepare.py encode "data/$name/train-*.tar" \\
            --weights weights/zero123-xl.ckpt --depth-weights weights/dpt_swin2_tiny_256.pt \\
            --out data/encoded/$name --compile
    done
    torchrun --nproc_per_node 8 train.py configs/mix_encoded.py

Held-out shards stay raw: pictures and scores need the images. Time and result: not measured yet.
"""

from dataclasses import replace

from configs.mix import config as mix

config = replace(mix, out="out/mix_encoded", sources=tuple(
    replace(source, format="encoded", shards=f"encoded/{source.shards}",
            held_out_format=source.format) for source in mix.sources))
