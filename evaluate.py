"""How good a model is on scenes it never saw, beside baselines, and whether it follows the camera.

    python evaluate.py out/synth --config configs/synth.py --pairs 512
    torchrun --nproc_per_node 8 evaluate.py out/mix --config configs/mix.py --lpips alex alexnet.pth
    python evaluate.py zeronvs.ckpt --config configs/mix.py --data data

Writes metrics.json, pairs.jsonl (every pair's figures) and cases.png (pairs from the best to the
worst) into the folder eval/ of the run. The loop is in analysis/score.py.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import configs
from runtime import command
from runtime.files import unfinished, write_text
from views import add_data_options

# Fields of the run that an evaluation may change; the network's own are those it was trained with.
FIELDS = ("device", "micro_batch", "sampler", "sample_steps", "guidance", "eta", "depth_weights",
          "quantile_blend")


def parser():
    """The command line; fields of the run's Config may follow as --name=value."""
    p = command.Parser("evaluate.py", description=__doc__.splitlines()[0],
                       epilog=f"Fields of the run may follow as --name=value: {', '.join(FIELDS)}")
    p.add_argument("checkpoint", metavar="PATH",
                   help="a run's folder (its newest step), one step, or a published checkpoint")
    add_data_options(p)
    p.add_argument("--pairs", type=command.numbers_of(int, 2), metavar="N",
                   help="held-out pairs, spread over the scenes (the run's eval_pairs)")
    p.add_argument("--seed", type=command.numbers_of(int, 0), metavar="N",
                   help="which pairs, and the noise of their views (the run's)")
    p.add_argument("--lpips", nargs=2, action="append", default=[], metavar=("NET", "FILE"),
                   help="alex or vgg, and torchvision's file of AlexNet or VGG-16; may be repeated")
    p.add_argument("--clip", nargs="+", default=[], metavar="FILE",
                   help="CLIP's ViT-L-14.pt, for the similarity of its embeddings")
    p.add_argument("--out", default="", metavar="FOLDER",
                   help="where to write (eval/ in the run's folder)")
    return p


# answered before torch, which takes seconds, is imported
ARGS = configs.parse_with_fields(parser()) if __name__ == "__main__" else None

from analysis import score
from runtime.networks import load_depth
from runtime.ranks import device_of, join, own_device
from views import render


def main(args, overrides):
    """Scores a checkpoint. Raises ValueError or OSError with one line."""
    for name in (text.removeprefix("--").partition("=")[0] for text in overrides):
        if name in {field.name for field in fields(configs.Config)} - set(FIELDS):
            raise ValueError(f"--{name} belongs to the training of the run and cannot be changed "
                             f"here; what can is {', '.join(FIELDS)}")
    tensors, config = render.open_run(args.checkpoint, args.data, args.config, args.init)
    config = configs.override(config, overrides)
    config = replace(config, eval_pairs=args.pairs or config.eval_pairs,
                     seed=config.seed if args.seed is None else args.seed)
    device = own_device(device_of(config.device))
    pairs = score.held_out_pairs(config, config.eval_pairs)     # before anything large is read
    path = Path(args.checkpoint)
    folder = path.parent if path.name.startswith("step_") or path.is_file() else path
    out = Path(args.out or folder / "eval")
    out.mkdir(parents=True, exist_ok=True)                      # or the command ends here
    net = render.load(tensors, device, "fp32")[0]
    depth_net = load_depth(config.depth_weights, device)
    judges, notes = score.judges_of(net, config, args.lpips, args.clip)
    ranks, _ = join(device)         # only rows of numbers travel
    found = ranks.gather(score.score(net, pairs, config, judges, depth_net, True, ranks.rank,
                                     ranks.world))
    ranks.close()
    rows = sorted(sum(found, []), key=lambda row: row["number"])
    if ranks.rank == 0:
        write(net, pairs, config, rows, depth_net, str(tensors.path), notes, out)


def write(net, pairs, config, rows, depth_net, checkpoint, notes, out):
    """Writes what was found into the folder `out`, and prints its tables."""
    if not any("reprojection" in row["scores"][score.MODEL] for row in rows):
        notes.append("no depth is known, so neither the warp nor the camera figures are there")
    found, scenes = score.summarize(rows), len({row["scene"] for row in rows})
    about = {"checkpoint": checkpoint, "pairs": len(rows), "notes": notes, "scenes": scenes,
             **{name: getattr(config, name) for name in
                ("seed", "mode", "sampler", "sample_steps", "guidance", "eta")}}
    write_text(out / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with unfinished(out / "cases.png") as partial:
        score.cases_sheet(net, pairs, config, rows, depth_net).save(partial, "png")
    write_text(out / "metrics.json", json.dumps({**about, **found}, indent=1) + "\n")
    print(f"{checkpoint}: {len(rows)} pairs of views never seen in training, of {scenes} scenes, "
          f"seed {config.seed}, {config.sample_steps} steps of {config.sampler}\n")
    print("\n".join([*score.report(rows), *notes]))
    print(f"in {out}: metrics.json, pairs.jsonl, cases.png")


if __name__ == "__main__":
    command.run("evaluate.py", main, *ARGS)
