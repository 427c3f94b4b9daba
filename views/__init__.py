"""Photos in, camera paths, pictures out. Here is what a command line says of them before torch."""

import argparse

from runtime.command import numbers_of, words

RUN, CONFIG = "out/synth", "configs/synth.py"       # where the command line names neither

# name: (how far it goes unless told, what it does, with that default)
MOTIONS = {
    "orbit": (360.0, "circle around the scene, by 360 degrees"),
    "swing": (20.0, "circle to and fro, by 20 degrees to each side"),
    "spiral": (0.25, "two turns in front of the scene, out to 0.25 and back"),
    "dolly": (0.4, "forwards by 0.4"),
    "truck": (0.4, "to the right by 0.4"),
    "pedestal": (0.3, "upwards by 0.3"),
    "pan": (30.0, "turn to the right on the spot, by 30 degrees"),
    "tilt": (20.0, "turn upwards on the spot, by 20 degrees"),
    "zoom": (1.5, "stay, and narrow the field of view until things look 1.5 times as large"),
}
DEFAULT_MOTION, VIEWS, MOST_VIEWS = "swing", 16, 10_000
FAR = 1_000_000                 # the most that a length may be, in whatever unit
TIMESTEPS = 1000
STEEPEST = 89.0                 # degrees of elevation; straight above, no direction is "up"
FOV = 52.55                     # degrees; what ZeroNVS's own inference takes a photo to have
SCALE = 0.7                     # ZeroNVS's own inference


def add_data_options(parser):
    """Adds the options that name what `views.render.open_run` may open beside a checkpoint."""
    for name, metavar, text in (
            ("--config", "FILE", "whose held-out scenes are used"),
            ("--data", "FOLDER", "where they lie instead; without --config by the run's patterns"),
            ("--init", "FILE", "what a run started from, for the networks that it did not train")):
        parser.add_argument(name, type=words, metavar=metavar, help=text)


def add_model_options(parser):
    """Adds the options of a model, its data and its machine, as `views.render` takes them."""
    add = parser.add_argument
    add("--checkpoint", type=words, default=RUN, metavar="PATH",
        help="a run's folder (its newest step), or a zero123 or ZeroNVS file (%(default)s, with "
             f"--config {CONFIG})")
    add_data_options(parser)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, then mps, then cpu")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the network (auto: bf16 on cuda, else fp32)")


def interval(text):
    """LOW,HIGH timesteps."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers are needed, LOW,HIGH") from err
    if not 0 <= low <= high <= TIMESTEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 <= LOW <= HIGH <= {TIMESTEPS} is needed")
    return low, high


def places(text):
    """Numbers of photos: 3,17,25."""
    return [numbers_of(int, 0)(part) for part in text.split(",")]


def scale_or_auto(text):
    return text if text == "auto" else numbers_of(float, 1 / FAR, FAR)(text)


def add_path_options(parser):
    """Adds the options of where the camera goes, see `views.paths.asked_for`."""
    group = parser.add_argument_group(f"camera path, one of (--{DEFAULT_MOTION})")
    add = group.add_mutually_exclusive_group().add_argument
    for name, (_, line) in MOTIONS.items():
        add(f"--{name}", dest="motion", action="store_const", const=name, help=line)
    add("--grid", action="store_true", help="a sheet of views up to 40 degrees to the sides of the "
        "photo's and 20 above and below it")
    add("--pose", action="append", default=[], metavar="AZIMUTH,ELEVATION,RADIUS",
        help="one view, so many degrees to the right of and above the photo's, at so many times "
             "its distance; may be repeated")
    add("--path", default="", metavar="FILE",
        help="cameras from a file: a JSON list of c2w matrices (OpenGL), nerfstudio's "
             "transforms.json, RealEstate10K text, COLMAP images.txt")
    add = parser.add_argument
    add("--by", type=numbers_of(float, -FAR, FAR), metavar="X",
        help="how far the path goes instead, in its degrees, lengths or (zoom) times; the other "
             "way: a negative number, or (zoom) one below 1")
    add("--views", type=numbers_of(int, 1, MOST_VIEWS), default=VIEWS, metavar="N",
        help="views along the path (%(default)s)")


def add_photo_options(parser):
    """Adds the options of what the views start from."""
    add = parser.add_argument_group("the photo").add_argument
    add("--capture", type=words, metavar="FOLDER",
        help="instead of IMAGE, photos with cameras: a transforms.json, or a folder with one or "
             "with COLMAP's model; a --path is then one of its world")
    add("--photos", type=places, default=[], metavar="N,N,...",
        help="which of a capture's photos, from 0, the first of them as IMAGE: each view starts "
             "from those nearest to it, mixed by their nearness (the middle one)")
    add("--crop", default="", metavar="LEFT,TOP,SIDE",
        help="the square of it that is used, in pixels (the largest in the middle)")
    add("--object", action="store_true",
        help="centre an object on white or transparent ground, as zero123 expects")
    add("--fov", type=numbers_of(float, 0, 180, above=True), metavar="DEGREES",
        help=f"field of view of the used square ({FOV}; a held-out view's own)")
    add("--elevation", type=numbers_of(float, -STEEPEST, STEEPEST), metavar="DEGREES",
        help="how far above the horizontal its camera stood, looking down at its subject (0; a "
             "held-out view's own)")
    add("--scale", type=scale_or_auto, metavar="S",
        help=f"units that the model takes as one, see below ({SCALE}, or 1 for 3DoF models such as "
             "zero123; from the depth of a held-out view), or auto: from the depth network")
    add("--scale-sweep", action="store_true",
        help="only a sheet, a row for each of several scales, to choose by eye")
    add("--depth-weights", default="", metavar="FILE",
        help="dpt_swin2_tiny_256.pt, for --scale auto, and for held-out depth that has holes")
    add("--scene", type=numbers_of(int, 0), default=0, metavar="N",
        help="which held-out scene, where IMAGE is left out (%(default)s)")


def add_sampling_options(parser):
    """Adds the options of how a view comes out of the noise."""
    add = parser.add_argument_group(
        "sampling (the run's own choices; of published models guidance 3 and dpm++ of 15 steps by "
        "logsnr, and with --sampler, --steps, --eta or --spacing ddim, 50, 1)").add_argument
    add("--sampler", choices=("ddim", "reference", "dpm++", "unipc"),
        help="dpm++ and unipc need 10 to 20 steps where ddim needs 50; reference: exactly the "
             "steps of the original code")
    add("--steps", type=numbers_of(int, 1, TIMESTEPS), metavar="N",
        help="evaluations of the network a view")
    add("--guidance", type=numbers_of(float, 0, TIMESTEPS), metavar="G",
        help="how hard the photo and the camera are followed: 1 plain, 3 usual")
    add("--guidance-interval", dest="interval", type=interval, default=(0, TIMESTEPS),
        metavar="LOW,HIGH",
        help="guide only at these timesteps, 0 is clean and 1000 noise (0,1000)")
    add("--eta", type=numbers_of(float, 0, 1), metavar="E",
        help="noise that ddim adds at every step: 0 none, 1 as much as was taken away")
    add("--spacing", choices=("auto", "leading", "trailing", "logsnr"), default="auto",
        help="how the steps lie between noise and image: trailing begins at pure noise, leading "
             "just below, logsnr dwells near the image (trailing)")
    add("--seed", type=numbers_of(int, 0, 2**63 - 1), default=0, metavar="N",
        help="another seed gives other views (%(default)s)")
    add("--same-noise", action=argparse.BooleanOptionalAction, default=True,
        help="all views from the same noise, or each from its own (same)")
    add("--progress", action="store_true",
        help="also a strip that shows how one view comes out of the noise")
