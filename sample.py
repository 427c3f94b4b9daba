"""Novel views from one photo, along a camera path.

    python sample.py                                     the model in out/synth, a view it never saw
    python sample.py photo.jpg --checkpoint zeronvs.ckpt --swing --by 20
    python sample.py --help

Samplers are in samplers.py, camera paths in paths.py, the photo in photos.py, what is written in
pictures.py.
Letters: `b` batch, `n` views, `s` side of the square images in pixels.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import camera
import checkpoint
import configs
import model
import paths
import photos
import pictures
from distributed import device_of
from fast import Fast
from kernels import check_compiler
from samplers import EVERYWHERE, SAMPLERS, SPACINGS, TIMESTEPS, encoded_views, plan
from shards import scenes

VIEWS = 16                              # along a path, unless told
SWEEP = (0.3, 0.5, 0.7, 1.0, 1.4)       # of --scale-sweep
SWEEP_VIEWS, TRUE_VIEWS, PROGRESS_VIEWS = 6, 6, 8
SHEET_COLUMNS = 6
VIEW = re.compile(r"\d{3,}\.png")
OPTIONAL = ("truth.png", "progress.png", "scale-sweep.png", "orbit.mp4")    # not in every run
DEFAULT_MOTION = "swing"        # small turns are what every model does best
CLIP_WIDTH = 768
MODE_OF_WIDTH = {4: "3dof", 19: "7dof_quantile_scale"}      # of the published checkpoints
MEGABYTE = 2**20

UNITS = """One unit of length is the distance from the photo's camera to what it looks at, the
centre of every orbit. --scale says how many units the model takes as one; a smaller one makes every
movement larger. In a --path FILE lengths are in the file's unit, and its first camera is the
photo's."""


# ---- the model

def load(path, device, precision):
    """(ZeroNVS, Config) of a run's folder, or of a published zero123 or ZeroNVS checkpoint.

    The UNet has its averaged weights where the file has them; `place` says what `precision` does.
    Raises FileNotFoundError or ValueError, one line, for what is no such checkpoint.
    """
    tensors = checkpoint.read(path)
    config = config_of(tensors)
    ema = any(name.startswith(checkpoint.EMA) for name in tensors)
    frozen = any(name.startswith("first_stage_model.") for name in tensors)
    if config.latent == "vae" and "config" in tensors.meta and not frozen:
        # a run saves what it trains; the frozen networks are those of the file it started from
        if not config.init:
            raise ValueError(f"{path} has no autoencoder, and its run names no init that has one")
        net = model.build(config)
        checkpoint.load_model(net, config.init, finetune=True)
        stored = {name: checkpoint.ema_name(name) for name in net.state_dict()}
        net.load_state_dict({name: tensors[average if average in tensors else name]
                             for name, average in stored.items()
                             if name in tensors or average in tensors}, strict=False)
    else:
        with torch.device("meta"):
            net = model.build(config)
        fresh = checkpoint.load_model(net, path, ema=ema).fresh
        schedule = model.schedule_buffers()
        for name in fresh:
            setattr(net, name, schedule[name])
    return place(net, device, precision), config


def place(net, device, precision):
    """The ZeroNVS on its device: UNet and image decoder in `precision`, fp32, bf16 or fp16.

    The photo is encoded in fp32, once. No more than what stays there is on the device at any time.
    """
    net.eval().requires_grad_(False)
    autoencoder = dict(net.first_stage_model.named_children())      # none, of pixels
    decoding = [autoencoder[name] for name in ("decoder", "post_quant_conv") if name in autoencoder]
    for part in (net.model, *decoding):
        part.to(device, checkpoint.PRECISIONS[precision], memory_format=torch.channels_last)
    net.to(device)
    # convolutions of one view are small, and which kernel is best for them is not to be guessed
    torch.backends.cudnn.benchmark = torch.device(device).type == "cuda"
    return net


def config_of(tensors):
    """The Config of a checkpoint: the run's own, or that of a published file, by its pose width."""
    if "config" in tensors.meta:
        return configs.from_dict(tensors.meta["config"])
    if checkpoint.POSE not in tensors:
        raise ValueError(f"{tensors.path} is no zero123 or ZeroNVS checkpoint: it has no "
                         f"{checkpoint.POSE}")
    given = tensors.entries[checkpoint.POSE].shape[-1] - CLIP_WIDTH
    if given not in MODE_OF_WIDTH:
        theirs = " or ".join(str(CLIP_WIDTH + width) for width in MODE_OF_WIDTH)
        raise ValueError(f"{tensors.path} does not tell its configuration, and is not as zero123 "
                         f"or ZeroNVS: {checkpoint.POSE} takes {CLIP_WIDTH + given} numbers, "
                         f"theirs {theirs}")
    nowhere = configs.Source("none", "co3d", "none", 1.0)
    return configs.Config(sources=(nowhere,), mode=MODE_OF_WIDTH[given])


def pose_vectors(mode, cond_c2w, c2w, fov, scale):
    """Pose vectors (n, d) float32 of cameras c2w (n, 4, 4), fov (n,); `scale` counts as one."""
    cond_c2w, c2w = cond_c2w.repeat(len(c2w), 1, 1), c2w.clone()
    if mode in camera.UNSCALED:     # so that --scale, where it is given, means the same everywhere
        cond_c2w[:, :3, 3] /= scale
        c2w[:, :3, 3] /= scale
    return camera.conditioning(mode, cond_c2w, c2w, fov, torch.full_like(fov, scale)).float()


# ---- views

class Render:
    """Views of a Photo by one model, `batch` at a time; `options` are those of `encoded_views`.

    Changes the model: see fast.Fast.
    """
    def __init__(self, net, mode, photo, options, batch, same_noise, compile=False):
        self.net, self.mode, self.photo, self.options = net, mode, photo, options
        self.batch, self.same_noise, self.fast = batch, same_noise, Fast(net, compile)
        self.seconds, self.views, self.evaluations = 0.0, 0, 0
        self.encoded = {}           # share of the photo's side: its latent and embedding

    def encode(self, share):
        """(z_cond, embedding) of the middle of the photo, `share` of its side."""
        if share not in self.encoded:
            image = pictures.tensor(self.photo.closer(share)).to(self.net.betas.device)
            self.encoded[share] = self.net.encode(image)[0], self.net.embed(image)
        return self.encoded[share]

    def __call__(self, cameras, scale, label, keep):
        """Images of n paths.Cameras. keep: a list that gets (t, z_0) after every step of the view
        in the middle of the path, z_0 the clean latent that it promises.

        Models have learnt of pairs with one field of view. A narrower view is therefore made from
        the part of the photo that has its field of view; a wider one from all of it.
        """
        T = pose_vectors(self.mode, cameras.cond_c2w, cameras.c2w, cameras.fov, scale)
        encoded = [self.encode(min(share, 1.0)) for share in cameras.shares()]
        n, views, started = len(T), [], time.perf_counter()
        before = self.fast.preparing
        # batches of one size, for which things are prepared once; the last repeats its last view
        size = math.ceil(n / math.ceil(n / self.batch))
        with tqdm(total=n, unit="view", desc=label, leave=False) as bar:
            for start in range(0, n, size):
                rows = [min(i, n - 1) for i in range(start, start + size)]
                numbers = [0] * size if self.same_noise else rows
                done = []

                def watch(k, t, z_t, z_0):
                    done.append(t)
                    bar.set_postfix_str(f"step {len(done)} of {self.options['steps']}")
                    if n // 2 in rows:
                        keep.append((t, z_0[n // 2 - start, None]))

                z_cond, embedding = map(torch.cat, zip(*(encoded[i] for i in rows)))
                images = encoded_views(self.net, z_cond, embedding, T[rows], numbers, watch=watch,
                                       fast=self.fast, **self.options)
                views += [pictures.image(image) for image in images[:n - start]]
                bar.update(min(size, n - start))
                self.evaluations = len(done)
        self.seconds += time.perf_counter() - started - (self.fast.preparing - before)
        self.views += n
        return views

    def report(self):
        """Time, steps and memory, as one line."""
        where = self.net.betas.device
        options = self.options
        line = (f"{self.seconds / self.views:.3g} s a view ({self.views} views, {self.evaluations} "
                f"steps of {options['sampler']}, guidance {options['guidance']:g}, {where})")
        if self.fast.preparing:
            line += f", {self.fast.preparing:.1f} s of preparation"
        if where.type == "cuda":
            return line + f", {torch.cuda.max_memory_allocated() / MEGABYTE:,.0f} MB of GPU memory"
        try:
            import resource
        except ImportError:         # Windows has no such figure
            return line
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return line + f", {peak / MEGABYTE:,.0f} MB of memory at most"


def true_views(render, photo):
    """A sheet of a HeldOut scene: the photo; true views over the model's, at the true cameras."""
    reader, number, view = photo.reader, photo.number, photo.view
    scene = reader.scene(number)
    others = pictures.spread([i for i in range(len(scene.c2w)) if i != view], TRUE_VIEWS)
    fov = torch.full((len(others),), scene.fov, dtype=torch.float64)
    cameras = paths.Cameras(scene.c2w[view], scene.c2w[others], fov, scene.fov)
    views = render(cameras, photo.scene_scale, "true cameras", [])
    truth = [pictures.image(scenes.images(reader.image(number, i))) for i in others]
    empty = pictures.blank(photo.picture)
    return pictures.sheet([
        [("photo", photo.picture), *((f"truth {i}", x) for i, x in zip(others, truth))],
        [("", empty), *((f"model {i}", x) for i, x in zip(others, views))]])


# ---- the command

class Parser(argparse.ArgumentParser):
    """Errors in one line."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def numbers_of(kind, low, high=math.inf, above=False):
    """A parser of numbers of one kind in [low, high], or (low, high) with `above`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from err
        inside = low < value < high if above else low <= value <= high
        if not inside or not math.isfinite(value):
            bounds = (f"between {low} and {high}" if math.isfinite(high) else
                      "that are finite" if not math.isfinite(low) else
                      f"above {low}" if above else f"from {low} on")
            raise argparse.ArgumentTypeError(f"{text} is not possible, only numbers {bounds}")
        return value
    return parse


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def interval(text):
    """LOW,HIGH timesteps."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers are needed, LOW,HIGH") from err
    if not 0 <= low <= high <= TIMESTEPS:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 <= LOW <= HIGH <= {TIMESTEPS} is needed")
    return low, high


def scale_or_auto(text):
    return text if text == "auto" else numbers_of(float, 0, above=True)(text)


def parser():
    """The command line; every option has a line that a newcomer understands."""
    p = Parser("sample.py", allow_abbrev=False, description=__doc__.splitlines()[0], epilog=UNITS)
    p.add_argument("image", nargs="?", metavar="IMAGE", default="",
                   help="the photo; without one, a held-out view of the run's own data")
    p.add_argument("--checkpoint", default="out/synth", metavar="PATH",
                   help="a run's folder (its newest step), or a zero123 or ZeroNVS file "
                        "(%(default)s)")
    p.add_argument("--out", default="out/sample", metavar="FOLDER",
                   help="where to write (%(default)s)")

    path = p.add_argument_group(f"camera path, one of (--{DEFAULT_MOTION})")
    path = path.add_mutually_exclusive_group()
    for name, (_, line) in paths.MOTIONS.items():
        path.add_argument(f"--{name}", dest="motion", action="store_const", const=name, help=line)
    path.add_argument("--grid", action="store_true",
                      help="a sheet of views up to 40 degrees to the sides of the photo's and 20 "
                           "above and below it")
    path.add_argument("--pose", action="append", default=[], metavar="AZIMUTH,ELEVATION,RADIUS",
                      help="one view, so many degrees to the right of and above the photo's, at "
                           "so many times its distance; may be repeated; --pose=-30,0,1 with an "
                           "equals sign where it begins with a minus")
    path.add_argument("--path", default="", metavar="FILE",
                      help="cameras from a file: a JSON list of c2w matrices (OpenGL), "
                           "nerfstudio's transforms.json, RealEstate10K text, COLMAP images.txt")
    p.add_argument("--by", type=numbers_of(float, -math.inf), metavar="X",
                   help="how far the path goes instead, in its degrees, lengths or (zoom) times; "
                        "the other way: a negative number, or (zoom) one below 1")
    p.add_argument("--views", type=numbers_of(int, 1), metavar="N",
                   help=f"views along the path ({VIEWS})")

    photo = p.add_argument_group("the photo")
    photo.add_argument("--crop", default="", metavar="LEFT,TOP,SIDE",
                       help="the square of it that is used, in pixels (the largest in the middle)")
    photo.add_argument("--object", action="store_true",
                       help="centre an object on white or transparent ground, as zero123 expects")
    photo.add_argument("--fov", type=numbers_of(float, 0, 180, above=True), metavar="DEGREES",
                       help=f"field of view of the used square ({photos.FOV}; "
                            "a held-out view's own)")
    photo.add_argument("--elevation", type=numbers_of(float, -paths.STEEPEST, paths.STEEPEST),
                       metavar="DEGREES", help="how far above the horizontal its camera stood, "
                       "looking down at its subject (0; a held-out view's own)")
    photo.add_argument("--scale", type=scale_or_auto, metavar="S",
                       help=f"units that the model takes as one, see below ({photos.SCALE}, or 1 "
                            "for 3DoF models such as zero123; from the depth of a held-out view), "
                            "or auto: from the depth network")
    photo.add_argument("--scale-sweep", action="store_true",
                       help="only a sheet, a row for each of several scales, to choose by eye")
    photo.add_argument("--depth-weights", default="", metavar="FILE",
                       help="dpt_swin2_tiny_256.pt, for --scale auto")
    photo.add_argument("--scene", type=numbers_of(int, 0), metavar="N",
                       help="which held-out scene, where IMAGE is left out (0)")

    how = p.add_argument_group("sampling (the run's own choices, and for published models ddim, 50 "
                               "steps, guidance 3, eta 1)")
    how.add_argument("--sampler", choices=SAMPLERS,
                     help="dpm++ and unipc need 10 to 20 steps where ddim needs 50; reference: "
                          "exactly the steps of the original code")
    how.add_argument("--steps", type=numbers_of(int, 1), metavar="N",
                     help="evaluations of the network a view")
    how.add_argument("--guidance", type=numbers_of(float, 0), metavar="G",
                     help="how hard the photo and the camera are followed: 1 plain, 3 usual")
    how.add_argument("--guidance-interval", type=interval, default=EVERYWHERE, metavar="LOW,HIGH",
                     help="guide only at these timesteps, 0 is clean and 1000 noise (0,1000)")
    how.add_argument("--eta", type=numbers_of(float, 0, 1), metavar="E",
                     help="noise that ddim adds at every step: 0 none, 1 as much as was taken away")
    how.add_argument("--spacing", choices=SPACINGS, default="auto",
                     help="how the steps lie between noise and image: trailing begins at pure "
                          "noise, leading just below, logsnr dwells near the image (trailing)")
    how.add_argument("--seed", type=numbers_of(int, 0), default=0, metavar="N",
                     help="another seed gives other views (%(default)s)")
    how.add_argument("--same-noise", action=argparse.BooleanOptionalAction, default=True,
                     help="all views from the same noise, which is steadier, or each from its own "
                          "(same)")
    how.add_argument("--progress", action="store_true",
                     help="also a strip that shows how one view comes out of the noise")

    machine = p.add_argument_group("machine")
    machine.add_argument("--device", choices=configs.CHOICES["device"], default="auto",
                         help="auto: cuda, then mps, then cpu")
    machine.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"),
                         default="auto", help="of the network (auto: bf16 on cuda, else fp32)")
    machine.add_argument("--compile", action="store_true",
                         help="torch.compile it: a minute, kept for later runs; then faster")
    machine.add_argument("--batch", type=numbers_of(int, 1), default=16, metavar="N",
                         help="views made together; fewer need less memory (%(default)s)")
    return p


def say_ignored(args, sampler, cameras):
    """Says on standard error which of the options that are given nothing looks at."""
    told = args.path and args.fov is not None and cameras.fov.rad2deg().sub(args.fov).abs().max()
    own, these = args.grid or args.pose or args.path, "--grid, --pose and --path tell all cameras"
    for name, given, idle, why in (
            ("--by", args.by is not None, own, these), ("--views", args.views, own, these),
            ("--crop", args.crop, not args.image, "a held-out view is square already"),
            ("--object", args.object, not args.image, "a held-out view is taken as it is"),
            ("--crop", args.crop, args.object, "--object finds the square itself"),
            ("--scene", args.scene is not None, args.image, "the views start from IMAGE"),
            ("--depth-weights", args.depth_weights, args.scale != "auto", "--scale auto reads it"),
            ("--elevation", args.elevation is not None, args.path, these),
            ("--fov", args.fov is not None, told and told > 1e-6, "those of --path have their own"),
            ("--scale", args.scale, args.scale_sweep, "--scale-sweep tries several"),
            ("--progress", args.progress, args.scale_sweep, "--scale-sweep makes one sheet alone"),
            ("--eta", args.eta is not None, sampler in ("dpm++", "unipc"), "it is for ddim")):
        if given and idle:
            print(f"sample.py: {name} has no effect here: {why}", file=sys.stderr)
    if max(cameras.shares()) > 1 + paths.RIGID:
        print("sample.py: some views are wider than the photo: models have learnt of none such, and "
              "may show no more than the photo does", file=sys.stderr)


def cameras_of(args, fov, elevation):
    """The paths.Cameras that the command line asks for. Raises ValueError."""
    if args.path:
        return paths.read(args.path, fov)
    if args.pose:
        return paths.poses(args.pose, fov, elevation)
    if args.grid:
        return paths.grid(fov, elevation)
    name = args.motion or DEFAULT_MOTION
    by = paths.MOTIONS[name][0] if args.by is None else args.by
    return paths.motion(name, args.views or VIEWS, by, fov, elevation)


def check_centred(cameras):
    """Raises ValueError for cameras that a 3DoF model cannot be told of."""
    c2w = torch.cat([cameras.cond_c2w[None], cameras.c2w])
    centred = camera.look_at(c2w[:, :3, 3], torch.zeros_like(c2w[:, :3, 3]))
    if (not torch.allclose(c2w, centred, rtol=0, atol=paths.RIGID)
            or not torch.allclose(cameras.fov, cameras.fov[:1])):
        raise ValueError("a 3DoF model knows of azimuth, elevation and distance alone: its cameras "
                         "look at the centre with one field of view, as those of --orbit, --swing, "
                         "--spiral, --dolly, --grid and --pose do")


def photo_of(args, config):
    """The Photo that the command line asks for. Raises ValueError, FileNotFoundError."""
    if args.image:
        if args.motion and not Path(args.image).exists() and is_number(args.image):
            raise ValueError(f"{args.image} is no image: how far a path goes is told by --by")
        photo = photos.from_file(args.image, config.image_size, args.crop, args.object)
        if config.mode in camera.UNSCALED:
            photo.scale = 1.0
    else:
        photo = photos.held_out(config, args.scene or 0)
        scene = photo.reader.scene(photo.number).name
        print(f"no IMAGE given: view {photo.view} of the held-out scene {scene}")
    if args.fov is not None:
        photo.fov = math.radians(args.fov)
    if args.elevation is not None:
        photo.elevation = args.elevation
    if args.scale == "auto":
        photo.scale = photos.scale_of(photo.picture, args.depth_weights)
        print(f"the scale is {photo.scale:.3g}")
    elif args.scale:
        photo.scale = args.scale
    return photo


def sampling_of(args, config):
    """The options of `novel_views`: the command line's, else the run's. Raises ValueError."""
    def chosen(name, default):
        return default if getattr(args, name) is None else getattr(args, name)

    options = {"seed": args.seed, "spacing": args.spacing, "interval": args.guidance_interval,
               "sampler": chosen("sampler", config.sampler), "eta": chosen("eta", config.eta),
               "steps": chosen("steps", config.sample_steps),
               "guidance": chosen("guidance", config.guidance)}
    plan(model.schedule_buffers()["alphas_cumprod"], options["sampler"], options["steps"],
         options["spacing"])
    return options


def sweep(render, cameras, photo):
    """A sheet with a row of views for every scale of SWEEP."""
    places = pictures.spread(range(len(cameras)), SWEEP_VIEWS)
    rows = []
    for scale in SWEEP:
        views = render(cameras[places], scale, f"scale {scale:g}", [])
        rows.append([(f"scale {scale:g}", photo.picture)]
                    + [(f"view {i}", view) for i, view in zip(places, views)])
    return pictures.sheet(rows)


def folder_for(path):
    """The output folder, made and tried. Raises ValueError where nothing can be written."""
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as err:
        raise ValueError(f"--out {out} cannot be written: {err.strerror}") from err
    return out


def write(out, photo, cameras, views, labels, columns):
    """Writes a path's views, sheet, animation, cameras and map. Returns the names of the files."""
    (out / "views").mkdir(exist_ok=True)
    # what an earlier run left would look like a part of this one
    for old in [*(out / name for name in OPTIONAL), *(out / "views").iterdir()]:
        if old.parent == out or VIEW.fullmatch(old.name):
            old.unlink(missing_ok=True)
    files = [f"views/{i:03d}.png" for i in range(len(views))]
    for file, view in zip(files, views):
        view.save(out / file)
    photo.picture.save(out / "cond.png")
    paths.write(out / "cameras.json", cameras, photo.picture.width, files, "cond.png")
    pictures.path_picture(cameras).save(out / "path.png")
    labelled = list(zip(labels, views))
    rows = [labelled[i:i + columns] for i in range(0, len(labelled), columns)]
    pictures.sheet([[("photo", photo.picture)], *rows]).save(out / "sheet.png")
    films = pictures.animate(views, cameras.closed, out / "orbit")
    return ["sheet.png", *films, "views/", "path.png", "cameras.json", "cond.png"]


def run(args):
    """The command, options parsed. Raises ValueError or OSError with one line."""
    if not Path(args.checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint {args.checkpoint}: --checkpoint names another, and "
                                "`python train.py configs/synth.py` makes out/synth")
    config = config_of(checkpoint.read(args.checkpoint))
    photo = photo_of(args, config)
    cameras = cameras_of(args, photo.fov, photo.elevation)
    if config.mode == "3dof":
        check_centred(cameras)
    options = sampling_of(args, config)
    say_ignored(args, options["sampler"], cameras)
    device = device_of(args.device)
    if args.compile:
        check_compiler(device, "leaving --compile out")
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    net, out = load(args.checkpoint, device, precision)[0], folder_for(args.out)
    render = Render(net, config.mode, photo, options, args.batch, args.same_noise, args.compile)
    if args.scale_sweep:
        sweep(render, cameras, photo).save(out / "scale-sweep.png")
        written = ["scale-sweep.png"]
    else:
        promised = []
        views = render(cameras, photo.scale, "views", promised)
        columns, labels = SHEET_COLUMNS, [f"view {i}" for i in range(len(views))]
        if args.grid:
            columns = len(paths.GRID_AZIMUTHS)
            labels = [f"{azimuth:+g}, {rise:+g}" for rise in paths.GRID_ELEVATIONS
                      for azimuth in paths.GRID_AZIMUTHS]
        written = write(out, photo, cameras, views, labels, columns)
        if args.progress:
            strip = [(f"t {t:.0f}", pictures.image(net.decode(z_0)[0]))
                     for t, z_0 in pictures.spread(promised, PROGRESS_VIEWS)]
            pictures.sheet([strip]).save(out / "progress.png")
            written.append("progress.png")
        if isinstance(photo, photos.HeldOut):
            true_views(render, photo).save(out / "truth.png")
            written.append("truth.png")
    print(render.report())
    print(f"in {out}: {', '.join(written)}")


def main(argv):
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        parser().error(f"unrecognized arguments: {' '.join(unknown)}" + any(
            map(is_number, unknown)) * "; how far a path goes is told by --by")
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as err:
        reason = err
        if isinstance(err, torch.OutOfMemoryError):
            reason = f"{str(err).splitlines()[0]} --batch {max(args.batch // 2, 1)} needs less"
        elif getattr(err, "strerror", None):        # a write that fails does not say where
            reason = f"{err.filename or args.out}: {err.strerror}"
        print(f"sample.py: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
