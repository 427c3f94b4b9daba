"""From photos or a video to cameras: structure from motion by pycolmap (colmap.github.io).

Every folder or video becomes a COLMAP model in OUT/reconstructions/NAME, which `own.read_colmap`
reads, and a contact sheet OUT/NAME.png to look at: the photos, and a map of their cameras.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from captures.datasets import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Capture, found_in
from captures.own import read_colmap
from captures.resample import frame_times, opened, selected
from runtime.files import unfinished, write_text
from views import paths, pictures
from views.colmap import in_order, pycolmap

MOST_EXHAUSTIVE = 300           # photos that are all compared with one another
NAMES = "photos.txt"            # in a model's folder: the photos that it was made of
SHOWN, CELL = 12, 160           # photos on the contact sheet, pixels a side of each
NAMED = 5                       # photos that are named in a message


def find(places, out, depth, frames, dry_run):
    """(Captures of folders of photos and of videos, Counter of those that cannot be used).

    frames: of a video. Raises ValueError, OSError; with dry_run nothing is reconstructed.
    """
    if not pycolmap():
        raise ValueError("structure from motion needs pycolmap, which is not installed: "
                         "pip install pycolmap")

    def find_one(place, _):
        is_video = place.suffix.lower() in VIDEO_SUFFIXES and place.is_file()
        name = place.resolve().stem if is_video else place.resolve().name
        if dry_run:
            return [Capture(f"photos/{name}", frames if is_video else len(photos_in(place)), None)]
        model = Path(out) / "reconstructions" / name
        folder = (video_photos(place, model.with_name(f"{name}_frames"), frames) if is_video else
                  place)
        reconstruct(folder, photos_in(folder), model, is_video)
        views, _ = read_colmap(model, folder, False)
        contact_sheet(views, Path(out) / f"{name}.png")
        return [Capture(f"photos/{name}", len(views),
                        functools.partial(read_colmap, model, folder, depth))]

    return found_in(map(Path, places), find_one)


def photos_in(folder):
    """The paths of the photos of a folder and those below it, from it, in order. Raises OSError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder or video ({', '.join(VIDEO_SUFFIXES)})")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")
             if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} photos ({', '.join(IMAGE_SUFFIXES)}) are there, "
                         "and structure from motion needs more")
    return sorted(names, key=in_order)


def video_photos(video, folder, count):
    """The folder with `count` frames of a video, evenly apart. Raises ValueError, OSError."""
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise ValueError(f"{video}: a video needs ffmpeg, which is not found: install it")
    if not folder.is_dir():
        times = np.array(pictures.evenly_spaced(frame_times(video), count))
        with unfinished(folder) as partial:
            partial.mkdir()
            for i, picture in enumerate(selected(video, times)):
                picture.save(partial / f"{i + 1:06d}.png")
    return folder


def reconstruct(folder, names, model, is_video):
    """Writes the COLMAP model of photos, and says how many found their place. Raises ValueError."""
    listed = "\n".join(names) + "\n"
    if model.is_dir() and (model / NAMES).read_text(encoding="utf-8") == listed:
        return
    shutil.rmtree(model, ignore_errors=True)
    colmap = pycolmap()
    colmap.logging.minloglevel = colmap.logging.ERROR
    sizes = set()
    for name in names:
        with opened(folder / name) as picture:
            sizes.add(picture.size)
    with unfinished(model) as partial, tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / "database.db"
        # photos of one size come from one camera, whose lens is found once
        mode = colmap.CameraMode.SINGLE if len(sizes) == 1 else colmap.CameraMode.AUTO
        colmap.set_random_seed(0)
        colmap.extract_features(database, folder, names, mode)
        if is_video or len(names) > MOST_EXHAUSTIVE:
            colmap.match_sequential(database)
        else:
            colmap.match_exhaustive(database)
        found = colmap.incremental_mapping(database, folder, scratch)
        if not found:
            raise ValueError(f"{folder}: none of its {len(names)} photos found their place: they "
                             "must overlap, be sharp, and be taken from different places")
        best = max(found.values(), key=lambda each: each.num_reg_images())
        partial.mkdir()
        best.write_binary(partial)
        write_text(partial / NAMES, listed)
    lost = sorted({*names} - {image.name for image in best.images.values()}, key=in_order)
    print(f"{folder}: {len(names) - len(lost)} of {len(names)} photos found their place, "
          f"{best.num_points3D()} points, {best.compute_mean_reprojection_error():.2f} pixels off"
          + f"; not {', '.join(lost[:NAMED])}{', ...' * (len(lost) > NAMED)}" * bool(lost))


def contact_sheet(views, path):
    """Writes a picture of the photos of Views and a map of their cameras."""
    if not views:
        return
    c2w = torch.from_numpy(np.array([view.c2w for view in views]))
    fov = torch.tensor([view.lens.fov for view in views], dtype=torch.float64)
    chart = pictures.path_picture(paths.Cameras(c2w[0], c2w, fov, fov[0].item()))
    cells = []
    for view in pictures.evenly_spaced(views, SHOWN):
        with Image.open(view.photo) as photo:
            cells.append((view.photo.name, ImageOps.pad(photo.convert("RGB"), (CELL, CELL),
                                                        color="white")))
    rows = pictures.sheet([cells[i:i + SHOWN // 2] for i in range(0, len(cells), SHOWN // 2)])
    with unfinished(path) as partial:
        pictures.stacked([rows, chart]).save(partial, "PNG")
