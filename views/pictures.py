"""Pictures out: views to sheets, films and a map of their path.

Images are Pillow's, square RGB, outside of `tensor` and `image`.
"""

import math
import shutil
import subprocess

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from camera import look_at, relative_pose
from runtime.command import say
from shards.scenes import images

WHITE, GREY, BLACK, RED = (255, 255, 255), (200, 200, 200), (30, 30, 30), (214, 40, 40)
FIRST, LAST = (33, 102, 172), (120, 198, 121)       # colours of a path's first and last camera
SMALLEST_CELL = 128             # pixels a side; smaller views are enlarged by an integer
SMALLEST_FRAME = 256            # the same, of a film
LABEL, GAP = 16, 4              # pixels: height of a label, space between pictures
FRAMES_PER_SECOND = 12          # at most: a film of few frames is slower
SHORTEST_FILM = 2.0             # seconds
LEGEND = "red: the photo; blue to green: first view to last; cross: what the photo looks at"


def evenly_spaced(things, count):
    """At most `count` of a sequence, evenly apart, the first and the last among them."""
    places = np.linspace(0, len(things) - 1, min(count, len(things))).round().astype(int)
    return [things[i] for i in places]


def tensor(picture):
    """RGB image -> float32 (1, 3, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return images(pixels).permute(2, 0, 1)[None]


def image(x):
    """Tensor (3, h, w) in [-1, 1] -> RGB image."""
    values = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2 * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def enlarged(picture, side=SMALLEST_CELL):
    """The image, times the smallest integer that makes it `side` pixels wide; pixels stay sharp."""
    times = math.ceil(side / picture.width)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def blank(picture):
    """A white image of the same size, to leave a place of a sheet empty."""
    return Image.new("RGB", picture.size, WHITE)


def stacked(strips):
    """Pictures one above the other."""
    canvas = Image.new("RGB", (max(strip.width for strip in strips),
                               sum(strip.height for strip in strips)), WHITE)
    for i, strip in enumerate(strips):
        canvas.paste(strip, (0, sum(each.height for each in strips[:i])))
    return canvas


def sheet(rows, title="", side=SMALLEST_CELL):
    """One picture of rows of (label, image) pairs, all images of one size, labels above them, and
    a line on top that says what they are."""
    cell = enlarged(rows[0][0][1], side).width
    columns = max(len(row) for row in rows)
    top = LABEL * bool(title)
    size = columns * (cell + GAP) + GAP, len(rows) * (cell + LABEL + GAP) + GAP + top
    canvas = Image.new("RGB", size, WHITE)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    pen.text((GAP + 1, 1), title, fill=BLACK, font=font)
    for i, row in enumerate(rows):
        for j, (label, picture) in enumerate(row):
            x, y = GAP + j * (cell + GAP), top + GAP + i * (cell + LABEL + GAP)
            pen.text((x + 1, y), label, fill=BLACK, font=font)
            canvas.paste(enlarged(picture, side), (x, y + LABEL))
    return canvas


def film(views, closed, stem):
    """Writes images as `stem`.gif, and as `stem`.mp4 if ffmpeg is on the path. Returns their names.

    An open path is played there and back, so that the film has no jump. It lasts SHORTEST_FILM at
    least, and its frames have SMALLEST_FRAME pixels a side at least.
    """
    frames = [enlarged(view, SMALLEST_FRAME) for view in views]
    if not closed:
        frames += frames[-2:0:-1]
    rate = min(FRAMES_PER_SECOND, len(frames) / SHORTEST_FILM)
    gif, mp4 = stem.with_suffix(".gif"), stem.with_suffix(".mp4")
    frames[0].save(gif, save_all=True, append_images=frames[1:], loop=0,
                   duration=math.ceil(100 / rate) * 10)     # GIF counts hundredths of a second
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        return [gif.name]
    width, height = frames[0].size
    command = [ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{width}x{height}", "-r", str(rate), "-i", "-",
               # yuv420p, which every player knows, needs even sides
               "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", str(mp4)]
    done = subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames),
                          capture_output=True, check=False)
    if done.returncode:
        mp4.unlink(missing_ok=True)
        say(f"no {mp4.name}: ffmpeg says {done.stderr.decode(errors='replace').strip()[-200:]}")
        return [gif.name]
    return [gif.name, mp4.name]


def standing(c2w):
    """A camera turned upright about its own x axis, if that is level and its up is near the z axis;
    else the camera itself: files of cameras have their own idea of where up is."""
    slant, upright = 0.05, 0.5
    if c2w[2, 0].abs() > slant or c2w[2, 1] < upright:
        return c2w
    return look_at(c2w[:3, 3], c2w[:3, 3] - c2w[:3, 2] * c2w.new_tensor([1.0, 1.0, 0.0]))


def path_picture(cameras, size=320):
    """Two maps of a paths.Cameras: from above, the photo's camera looking up the page; from right.

    The photo's camera is red, the others go from blue to green; their wings open as the view does.
    A line below says so.
    """
    frame = standing(cameras.cond_c2w)
    everything = relative_pose(frame, torch.cat([cameras.cond_c2w[None], cameras.c2w]))
    poses = everything[1:]
    target = everything[0, :3, 3] - everything[0, :3, 2]    # one unit ahead of the photo
    points = torch.cat([everything[:, :3, 3], target[None]])
    low, high = points.amin(0), points.amax(0)
    middle, reach = (low + high) / 2, max((high - low).max().item(), 1e-6)
    canvas = Image.new("RGB", (2 * size + GAP, size + 2 * LABEL), WHITE)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    # panel: (label, the axis to the right of the page, the axis up the page), as (index, sign)
    panels = [("from above", (0, 1), (2, -1)), ("from the right", (2, -1), (1, 1))]
    for panel, (label, across, up) in enumerate(panels):
        left = panel * (size + GAP)

        def place(point):
            margin = 1.5            # of the page to the path, so that the wings fit
            x, y = (sign * (point[axis] - middle[axis]).item() / reach / margin + 0.5
                    for axis, sign in (across, up))
            return left + x * size, LABEL + (1 - y) * size

        pen.rectangle((left, LABEL, left + size - 1, LABEL + size - 1), outline=GREY)
        pen.text((left + 2, 1), label, fill=BLACK, font=font)
        x, y = place(target)
        pen.line((x - 5, y, x + 5, y), fill=BLACK)
        pen.line((x, y - 5, x, y + 5), fill=BLACK)
        pen.line([place(pose[:3, 3]) for pose in poses] + [place(poses[0, :3, 3])] * cameras.closed,
                 fill=GREY)
        for i in range(len(everything) - 1, -1, -1):            # the photo's camera on top
            share = (i - 1) / max(len(poses) - 1, 1)
            color = tuple(round(a + share * (b - a)) for a, b in zip(FIRST, LAST)) if i else RED
            wing = math.tan(cameras.fov[max(i - 1, 0)].item() / 2)
            length = 0.12 * reach
            eye = everything[i, :3, 3]
            ends = [eye + everything[i, :3, :3] @ (length * eye.new_tensor(corner)) for corner in
                    [(-wing, 0, -1), (wing, 0, -1), (0, -wing, -1), (0, wing, -1)]]
            sides = ends[:2] if panel == 0 else ends[2:]
            pen.line([place(sides[0]), place(eye), place(sides[1])], fill=color, width=2 + (i == 0))
    pen.text((2, LABEL + size + 1), LEGEND, fill=BLACK, font=font)
    return canvas
