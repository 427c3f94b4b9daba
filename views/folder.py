"""The folder that sample.py leaves: views, sheets, films, cameras."""

import re
import tempfile
from pathlib import Path

from views import MOTIONS, paths, pictures

SWEEP = (0.3, 0.5, 0.7, 1.0, 1.4)       # of --scale-sweep
SWEEP_VIEWS, TRUE_VIEWS, PROGRESS_VIEWS = 6, 6, 8
SHEET_COLUMNS = 6
VIEW = re.compile(r"\d{3,}\.png")
FILMS = [f"{name}.{end}" for name in (*MOTIONS, "grid", "poses", "path", "truth")
         for end in ("gif", "mp4")]
OPTIONAL = ("truth.png", "progress.png", "scale-sweep.png", *FILMS)     # not in every run
CAMERAS = "cameras.json", "transforms.json"         # one file: nerfstudio wants it by this name
WRITTEN = ("cond.png", *CAMERAS, "path.png", "sheet.png", *OPTIONAL)


class Folder:
    """An output folder. `written`: names of the files in it, as far as it is.

    given: files that views start from, which must not be written over. Raises ValueError where
    something cannot be written, before anything is.
    """
    def __init__(self, path, given=(), sweep=False):
        self.path, self.written = Path(path), []
        views = (self.path / "views").resolve()
        for name in filter(None, given):
            file = Path(name).resolve()
            if (file.parent == self.path.resolve() and file.name in WRITTEN
                    or file.parent == views and VIEW.fullmatch(file.name)):
                raise ValueError(f"{name} would be written over: --out names another folder")
        try:
            (self.path if sweep else self.path / "views").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as err:
            raise ValueError(f"--out {path} cannot be written: {err.strerror}") from err
        for name in WRITTEN:
            if (self.path / name).is_dir():
                raise ValueError(f"--out {path} cannot be written: {name} in it is a folder")

    def save(self, picture, name):
        picture.save(self.path / name)
        self.written.append(name)

    def follow(self, render, cameras, name, progress):
        """Writes the views of a path called `name`, as they are drawn, and all that shows them."""
        # what an earlier run left would look like a part of this one
        for old in [*(self.path / file for file in OPTIONAL), *(self.path / "views").iterdir()]:
            if old.parent == self.path or VIEW.fullmatch(old.name):
                old.unlink(missing_ok=True)
        middle, promised, views = len(cameras) // 2, [], []

        def watch(first, t, z_0):
            if progress and first <= middle < first + len(z_0):
                promised.append((t, z_0[middle - first, None]))

        for view in render(cameras, watch=watch):
            view.save(self.path / f"views/{len(views):03d}.png")
            views.append(view)
        photo, columns = render.photo.picture, SHEET_COLUMNS
        labels = [f"view {i}" for i in range(len(views))]
        title = f"the photo, and views along {name}, in their order"
        if name == "grid":
            columns, title = len(paths.GRID_AZIMUTHS), "degrees to the right, degrees above"
            labels = [f"{azimuth:+g}, {rise:+g}" for rise in paths.GRID_ELEVATIONS
                      for azimuth in paths.GRID_AZIMUTHS]
        labelled = list(zip(labels, views))
        self.save(pictures.sheet([[("photo", photo)], *(
            labelled[i:i + columns] for i in range(0, len(labelled), columns))], title),
                  "sheet.png")
        self.written += pictures.film(views, cameras.closed, self.path / name)
        self.written.append("views/")
        self.save(pictures.path_picture(cameras), "path.png")
        self.save(photo, "cond.png")
        for file in CAMERAS:
            paths.write(self.path / file, cameras, photo.width,
                        [f"views/{i:03d}.png" for i in range(len(views))], "cond.png")
        self.written += CAMERAS
        if progress:
            strip = [(f"t {t:.0f}", pictures.image(render.net.decode(z_0)[0]))
                     for t, z_0 in pictures.evenly_spaced(promised, PROGRESS_VIEWS)]
            self.save(pictures.sheet([strip], f"what view {middle} promises to become, from noise "
                                     "(t 1000) on"), "progress.png")

    def truth(self, render):
        """Writes a sheet and a film of a HeldOut photo's true views and the model's beside them."""
        photo = render.photo
        numbers, cameras, truth = photo.others(TRUE_VIEWS)
        views = list(render(cameras, photo.scene_scale, "true cameras"))
        self.save(pictures.sheet(
            [[("photo", photo.picture), *((f"truth {i}", x) for i, x in zip(numbers, truth))],
             [("", pictures.blank(photo.picture)),
              *((f"model {i}", x) for i, x in zip(numbers, views))]],
            "above: true views; below: the model's, of the photo alone, at the same cameras"),
            "truth.png")
        self.written += pictures.film(
            [pictures.sheet([[("photo", photo.picture), ("truth", true), ("model", view)]],
                            side=pictures.SMALLEST_FRAME) for true, view in zip(truth, views)],
            False, self.path / "truth")

    def sweep(self, render, cameras):
        """Writes a sheet with a row of views for every scale of SWEEP."""
        places, photo = pictures.evenly_spaced(range(len(cameras)), SWEEP_VIEWS), render.photo
        rows = [[(f"scale {scale:g}", photo.picture),
                 *zip((f"view {i}" for i in places), render(cameras[places], scale))]
                for scale in SWEEP]
        self.save(pictures.sheet(rows, "the photo, and views with a scale a row: choose the one in "
                                 "which things move as they should"), "scale-sweep.png")
