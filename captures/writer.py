"""Writes raw scenes: images, depths and cameras as the members of tars, in ZeroNVS's layouts.

A raw scene is, for every view, `category/scene/frame000001.png`, `..._depth.png` (16-bit PNG whose
words are float16 bits, 0 where unknown) and `..._metadata.json`. `make` writes many tars in several
processes; `check_out` lets a run go on where it stopped. Letters: `v` views, `h w` pixels.
"""

import io
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PARTIAL = ".partial"            # suffix of a file that is being written
POLL = 0.1                      # seconds between looks at the processes
# from OpenGL camera axes (right, up, back) to pytorch3d's (left, up, forward)
PYTORCH3D = np.diag([-1.0, 1.0, -1.0])
LOSSY = {"jpg": dict(format="JPEG", quality=95), "webp": dict(format="WEBP", quality=92)}
IMAGE_FORMATS = ("png", *LOSSY)
HALF_INFINITY = 0x7C00          # its float16 bits; those of NaN, and of less than 0, are larger


def write_shard(path, scenes):
    """Writes scenes, each a list of (member name, bytes), as a tar at `path`; returns its size.

    `scenes` may be a generator. The tar's bytes depend on the members alone: ustar, no times, no
    owners. The file appears under its name when it is complete; nothing is left of one that fails.
    Raises OSError with the file's name, as of a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        for scene in scenes:
            for name, content in scene:
                member = tarfile.TarInfo(name)          # time, owner and group are 0
                member.size = len(content)
                try:
                    header = member.tobuf(tarfile.USTAR_FORMAT)
                except ValueError as err:               # as of 200 characters
                    raise ValueError(f"{path}: no member of it can be {name!r}: {err}") from err
                file.write(header + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))        # the end
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


@contextmanager
def replacing(path):
    """The path of a file to write, which is `path` in the end, or nothing if that fails. Raises
    OSError with the file's name: a write that fails does not say where."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as err:
        if err.errno is None or err.filename is not None:
            raise
        raise OSError(err.errno, err.strerror, str(path)) from err
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


# ---- members

def png_bytes(samples):
    """The PNG file of samples (h, w, 3) uint8 or (h, w) uint16.

    Every row is stored as its difference to the one above, and packed by one call of zlib: half the
    time of a coder that chooses among filters, for a few per cent more bytes.
    """
    depth, color = (8, 2) if samples.ndim == 3 else (16, 0)         # bits, RGB or grey
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").view(np.uint8) if depth == 16 else samples
    rows = rows.reshape(height, -1)
    lines = np.full((height, rows.shape[1] + 1), 2, np.uint8)       # a leading 2: "up"
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data
        file += struct.pack(">I", zlib.crc32(kind + data))
    return file


def image_bytes(image, image_format):
    """The file of an RGB image (h, w, 3) uint8; `image_format` is one of IMAGE_FORMATS."""
    if image_format == "png":
        return png_bytes(image)
    file = io.BytesIO()
    Image.fromarray(image).save(file, **LOSSY[image_format])
    return file.getvalue()


def depth_bytes(depth):
    """The 16-bit PNG of a depth (h, w) float32: float16 bits; what is unknown or too large is 0."""
    # torch rounds as numpy does, in a twentieth of the time
    words = torch.from_numpy(depth).half().view(torch.uint16).numpy()
    words[words >= HALF_INFINITY] = 0
    return png_bytes(words)


def co3d_metadata(c2w, fov, scale_adjustment):
    """Metadata of a square view in the co3d layout: OpenGL c2w (4, 4) float64, fov in radians.

    pytorch3d multiplies rows, x_cam = x_world R + T; focal lengths are in half image sides.
    """
    w2c = np.linalg.inv(c2w)
    focal = 1 / math.tan(fov / 2)
    return {"R": (PYTORCH3D @ w2c[:3, :3]).T.tolist(), "T": (PYTORCH3D @ w2c[:3, 3]).tolist(),
            "focal_length": [focal, focal], "principal_point": [0.0, 0.0],
            "scale_adjustment": scale_adjustment}


def re10k_metadata(c2w, fov, size):
    """Metadata of a square view, `size` pixels, in the re10k layout: OpenGL c2w, fov in radians.

    The image is stored as square as readers crop it, so 2 atan(cx / fx), their field of view, is
    that of what they see.
    """
    slope = 2 * math.tan(fov / 2) / size            # of the ray, a pixel
    corner = -math.tan(fov / 2)
    return {"extrinsics": c2w.tolist(),
            "intrinsics": [[slope, 0.0, corner], [0.0, slope, corner], [0.0, 0.0, 1.0]]}


def raw_scene(layout, name, images, depths, c2w, fov, image_format="png", scale_adjustment=1.0):
    """The members of a raw scene `name` (category/scene): a list of (member name, bytes).

    images (v, h, h, 3) uint8, depths (v, h, h) with 0 for unknown, or None for a scene without,
    OpenGL c2w (v, 4, 4) float64 in the same unit, fov in radians, numpy arrays all. Readers
    multiply the stored depth by `scale_adjustment`, which only co3d has.
    """
    members = []
    for i, (image, pose) in enumerate(zip(images, c2w)):
        frame = f"{name}/frame{i + 1:06d}"
        if layout == "co3d":
            metadata = co3d_metadata(pose, fov, scale_adjustment)
        else:
            metadata = re10k_metadata(pose, fov, image.shape[1])
        members.append((f"{frame}.{image_format}", image_bytes(image, image_format)))
        if depths is not None:
            depth = depths[i] / scale_adjustment if layout == "co3d" else depths[i]
            members.append((f"{frame}_depth.png", depth_bytes(depth)))
        members.append((f"{frame}_metadata.json", json.dumps(metadata).encode()))
    return members


# ---- shards by the dozen

def ahead(function, items, threads, count):
    """Yields function(item) of the items in order, worked out by threads up to `count` ahead."""
    pool, results = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > count:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_shards(todo, scenes_of, report):
    """Makes shards one after the other; torch takes one core.

    todo: (path, content)s, perhaps a generator. scenes_of(path, content, report) yields the members
    of each scene, and calls report(views) as they get done.
    """
    torch.set_num_threads(1)
    for path, content in todo:
        write_shard(path, scenes_of(path, content, report))


def worker(todo, scenes_of, taken, views, errors):
    """One of several processes: makes the shards that no other has taken; dies with its parent, or
    when it is terminated, and leaves nothing of a shard that is not complete."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent gets it too, and terminates all
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def shards():
        while True:
            with taken.get_lock():
                k, taken.value = taken.value, taken.value + 1
            if k >= len(todo):
                return
            yield todo[k]

    def report(more):
        with views.get_lock():
            views.value += more
        if not multiprocessing.parent_process().is_alive():
            os._exit(1)

    try:
        make_shards(shards(), scenes_of, report)
    except (ValueError, OSError) as err:
        errors.put(str(err))


def make_shards_together(todo, scenes_of, workers, report):
    """Makes shards in several processes. OSError where one of them fails.

    Processes, not threads: most calls into torch are so short that threads would queue up for them.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["prepare"])     # all that it imports, once for all processes
    taken, views, errors = context.Value("q", 0), context.Value("q", 0), context.SimpleQueue()
    shared = (todo, scenes_of, taken, views, errors)
    processes = [context.Process(target=worker, args=shared, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    reported, running = 0, True
    try:
        while running:
            time.sleep(POLL)
            running = any(process.is_alive() for process in processes)
            now = views.value
            report(now - reported)
            reported = now
            if not errors.empty():
                raise OSError(errors.get())
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise OSError(f"one of the processes ended with code {codes[0]}: the same command "
                              "goes on from here, perhaps with fewer --workers")
    finally:        # the next run may write what they were writing
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def check_out(note, arguments, shards, overwrite):
    """Writes the arguments to the file `note`, or compares them with those in it: ValueError if
    shards were made with others.

    shards: those in the output folder, the note's. With `overwrite` they are deleted.
    """
    out = note.parent
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except ValueError as err:
            raise ValueError(f"{note} is no JSON; choose another --out") from err
        differing = [f"{name.replace('_', '-')} {found.get(name)} there, {value} now"
                     for name, value in arguments.items() if found.get(name) != value]
        if differing and shards and not overwrite:
            raise ValueError(f"{out} was made with other arguments ({'; '.join(differing)}): "
                             "choose another --out, or --overwrite")
        if overwrite:
            for path in shards:
                path.unlink()
    elif shards:
        raise ValueError(f"{out} holds shards that this command did not make: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(arguments, indent=1) + "\n")


def make(todo, scenes_of, workers, bar):
    """Makes shards in as many processes as there are workers; returns the views a second since the
    first were done, which leaves out what processes and device took to start."""
    first = None            # (time, views) when some were done

    def report(more):
        nonlocal first
        bar.update(more)
        if more and not first:
            first = time.perf_counter(), bar.n

    if workers == 1:
        make_shards(todo, scenes_of, report)
    else:
        make_shards_together(todo, scenes_of, workers, report)
    return (bar.n - first[1]) / (time.perf_counter() - first[0]) if first else 0.0
