"""Where shards come from. Here is what prepare.py says of it before torch.

synth.py      synthetic scenes of solids.py, rendered with exact cameras and depth
datasets.py   CO3D, RealEstate10K and ACID as they are published
own.py        COLMAP models with their images, folders with a transforms.json
photos.py     photos and videos, whose cameras structure from motion finds
resample.py   photos of any camera made those of one pinhole camera
writer.py     raw scenes as members of tars
make.py       shards of captures, in several processes
encode.py     raw shards to encoded ones
"""

import functools

from runtime.command import numbers_of

COMMANDS = {"synth": "ray-cast synthetic scenes, with exact cameras and depth",
            "co3d": "CO3D v2, as downloaded",
            "re10k": "RealEstate10K: camera texts, and frames or videos",
            "acid": "ACID: camera texts, and frames or videos",
            "photos": "your own photos or videos: their cameras are found, which needs pycolmap",
            "colmap": "your own captures: COLMAP models with their images",
            "nerfstudio": "your own captures: folders with a transforms.json",
            "encode": "what the frozen networks make of raw shards, computed once"}
SMALLEST = 8                    # pixels a side
count = functools.partial(numbers_of, int)      # whole numbers, from its argument on


def add_synth_options(add):
    """Adds the options of `prepare.py synth`."""
    add("--out", default="data/synth", help="folder: shards go into OUT/co3d and OUT/re10k")
    add("--scenes", type=count(2), default=500, help="training scenes, half in each layout")
    add("--held-out", type=count(2), default=100, help="further scenes, kept from training")
    add("--views", type=count(2), default=6, help="views a scene")
    add("--size", type=count(SMALLEST), default=64, help="pixels a side")
    add("--motion", type=numbers_of(float, 1e-6, 1), default=0.4,
        help="share of its path that a camera goes, up to 1: arcs are of 60 to 120 degrees")
    add("--turn", type=numbers_of(float, 0, 45), default=8.0, help="degrees that every "
        "camera looks aside at most, to the left or right and up or down: else they follow their "
        "gaze, and none turns on the spot")
    add("--seed", type=count(0), default=0, help="scenes are a function of it and their number")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to render")
    add("--scenes-per-shard", type=count(1), default=100, help="scenes in a shard, at most")


def add_capture_options(parser, name):
    """Adds the options of a sub-command for captures."""
    add = parser.add_argument
    if name == "co3d":
        add("folder", help="holds CATEGORY/frame_annotations.jgz")
        add("--categories", nargs="+", default=[], metavar="NAME", help="only these")
        add("--quality", type=float, default=0.5, help="least viewpoint_quality_score")
    elif name in ("re10k", "acid"):
        add("--cameras", required=True, help="folder of CLIP.txt")
        group = parser.add_mutually_exclusive_group(required=True)
        group.add_argument("--frames", default="", help="folder of CLIP/TIMESTAMP.png or .jpg")
        group.add_argument("--videos", default="", help="folder of VIDEO.mp4, .webm, ...")
        add("--colmap", default="", help="folder of COLMAP models CLIP/, for depth")
    else:
        add("folders", nargs="+", metavar="folder", help="one a scene, whose name it has")
    if name == "colmap":
        add("--images", default="images", help="name of the folder of images in each")
    if name == "photos":
        add("--video-frames", type=count(2), default=100, help="photos taken of a video, evenly")
    if name not in ("re10k", "acid"):
        add("--no-depth", dest="depth", action="store_false", help="leave depth out")
    add("--out", default=f"data/{name}", help="folder of the shards")
    add("--size", type=count(SMALLEST), default=256, help="pixels a side")
    add("--views", type=count(0), default=0, help="of a scene at most, evenly chosen; 0: all")
    add("--scenes", type=count(0), default=0, help="training scenes at most; 0: all")
    add("--held-out", type=count(-1), default=-1,
        help="scenes kept from training; -1: 5%% of them, at most 100, but of fewer than 10 scenes "
        "a tenth of the views of each")
    add("--seed", type=count(0), default=0, help="decides which scenes are held out or chosen")
    add("--shard-size", type=numbers_of(float, 0, above=True), default=1.0, help="about, in GB")


def add_encode_options(add):
    """Adds the options of `prepare.py encode`."""
    add("shards", nargs="+", help="raw shards: files, globs, {000..012} patterns")
    add("--weights", required=True, help="zero123-xl.ckpt, or another file with the autoencoder "
        "and CLIP")
    add("--depth-weights", default="", help="dpt_swin2_tiny_256.pt, which fills holes of depth")
    add("--no-quantile-blend", dest="quantile_blend", action="store_false",
        help="the scale is that of the depth network alone, known depths or not")
    add("--out", default="data/encoded", help="folder of the encoded shards")
    add("--format", default="", choices=("", "co3d", "re10k", "acid"),
        help="of the raw shards; else it is detected")
    add("--batch", type=count(1), default=64, help="views at once")
    add("--precision", choices=("bf16", "fp32"), default="", help="of the networks; bf16 on a GPU, "
        "fp32 on a CPU, unless told")
    add("--compile", action="store_true", help="torch.compile the networks: for many views")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to encode")
    add("--loaders", type=count(0), help="processes a rank that decode images; on a "
        "GPU as many as there are cores for, up to 16, unless told")


def add_options(parser, name):
    """Adds the options of the sub-command `name` of prepare.py."""
    add = parser.add_argument
    if name == "synth":
        add_synth_options(add)
    elif name == "encode":
        add_encode_options(add)
    else:
        add_capture_options(parser, name)
    if name != "encode":
        add("--image-format", choices=("png", "jpg", "webp"), default="png",
            help="of colour images")
        add("--workers", type=count(0), default=0,
            help="processes; 0: one a core, on a GPU at most 6")
    if name not in ("synth", "encode"):
        add("--dry-run", action="store_true", help="say what would be made, and stop")
    add("--overwrite", action="store_true", help="replace shards made with other arguments")
