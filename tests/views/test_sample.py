"""sample.py end to end: the golden small model, photos, pictures, files written, and bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import camera
from runtime import checkpoint
import clip
import configs
import data
import golden
import depth
import model
import views
from views import folder
from views import paths
from views import photos
from views import pictures
import prepare
from views import render
import sample
import diffusion
import vae
from shards import scenes

SIZE = 16                   # pixels a side of the small run's images
SCENES = {}                 # "data": the folder of the small run's shards, as a user names it


# ---- the golden small model

def golden_model(about):
    """The small whole model of the golden sampling cases, its UNet with the averaged weights."""
    u = about["config"]["unet_config"]["params"]
    v = about["config"]["first_stage_config"]["params"]["ddconfig"]
    unet = model.UNet(u["in_channels"], u["out_channels"], u["model_channels"], u["channel_mult"],
                      u["num_res_blocks"], u["attention_resolutions"], u["num_heads"],
                      u["context_dim"])
    autoencoder = vae.AutoencoderKL(v["ch"], v["ch_mult"], v["num_res_blocks"])
    tower = clip.CLIP(**{name: size for name, size in about["clip_config"].items()
                         if name not in ("transformer_heads", "transformer_layers")})
    net = model.ZeroNVS(unet, autoencoder, tower, "7dof_quantile_scale", vae.SCALE_FACTOR, 768, 768)
    golden.fill(net.eval())
    return golden.fill(net.model, "model.", golden.SALT + "ema/") and net


@pytest.mark.parametrize("name", ["sample_zero123", "sample_zero123_n_samples"])
def test_the_whole_small_model_samples_the_golden_images(name):
    about, expected = golden.case(name)
    observed = {key: value["max_abs_difference_between_two_reference_runs_on_different_cpu_kernels"]
                for key, value in about["tolerance_observed"].items()}
    net, n = golden_model(about), about["n_samples"]
    shapes = about["inputs"]
    image = golden.network_input(f"{name}/input_im", shapes[f"{name}/input_im"]["shape"], tanh=True)
    T = golden.network_input(f"{name}/T", shapes[f"{name}/T"]["shape"]) * 0.5
    z_T = golden.network_input(f"{name}/x_T", shapes[f"{name}/x_T"])
    z_cond, context = net.encode(image)[0], net.context(net.embed(image), T)
    z_cond, context = z_cond.repeat(n, 1, 1, 1), context.repeat(n, 1, 1)
    golden.assert_close(z_cond, expected["c_concat"], observed["c_concat"])
    golden.assert_close(context, expected["c_crossattn"], observed["c_crossattn"])
    follow = diffusion.guided(net.eps, z_cond, context, about["scale"])
    latents = diffusion.sample(
        follow, z_T, net.alphas_cumprod, "reference", about["S"], about["eta"],
        lambda k: golden.network_input(f"{name}/noise_{k}", z_T.shape))
    golden.assert_close(latents, expected["latents"], observed["latents"])
    decoded = net.decode(latents)
    key = "decoded_unclamped[..., ::4, ::4]"
    golden.assert_close(decoded[..., ::4, ::4], expected[key], observed[key])
    key = "image[..., ::4, ::4]"
    shown = (decoded.clamp(-1, 1) + 1) / 2
    golden.assert_close(shown[..., ::4, ::4], expected[key], observed[key])


def test_views_depend_on_seed_and_number_and_not_on_the_batch():
    about, _ = golden.case("sample_zero123")
    net = golden_model(about)
    image = golden.network_input("image", (1, 3, 32, 32), tanh=True)
    T = golden.network_input("T", (3, 19))
    common = {"sampler": "ddim", "steps": 2, "eta": 1.0, "guidance": 2.0}
    together = diffusion.novel_views(net, image, T, [5, 6, 5], 7, **common)
    alone = diffusion.novel_views(net, image, T[1:2], [6], 7, **common)
    # another batch size is another order of the same float32 sums
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-3)
    repeated = diffusion.novel_views(net, image.expand(3, -1, -1, -1), T, [5, 6, 5], 7, **common)
    torch.testing.assert_close(together, repeated, rtol=0, atol=1e-3)
    other_seed = diffusion.novel_views(net, image, T[1:2], [6], 8, **common)
    assert (other_seed - alone).abs().max() > 0.1
    same_pose = T[:1].expand(3, -1)
    views = diffusion.novel_views(net, image, same_pose, [5, 6, 5], 7, **common)
    torch.testing.assert_close(views[0], views[2], rtol=0, atol=1e-3)
    assert (views[0] - views[1]).abs().max() > 0.1
    assert views.abs().max() <= 1


# ---- a small run to sample from

def run_config(run):
    """The Config of a run, as its own file has it, its data too."""
    return configs.from_dict(checkpoint.read(run).meta["config"])


@pytest.fixture(scope="module", name="run")
def small_run(tmp_path_factory):
    """A folder like out/synth, of a small random network, with scenes of its own."""
    folder = tmp_path_factory.mktemp("run")
    prepare.main(["synth", "--out", str(folder / "data"), "--scenes", "2", "--held-out", "4",
                  "--views", "5", "--size", str(SIZE), "--workers", "1", "--device", "cpu"])
    sources = tuple(configs.Source(name, name, f"{name}/train-*.tar", 0.5, f"{name}/held-out-*.tar")
                    for name in ("co3d", "re10k"))
    config = configs.Config(
        sources=sources, data=str(folder / "data"), out=str(folder / "out"), latent="pixels",
        image_size=SIZE, model_channels=32, channel_mult=(1,), num_res_blocks=1, mode="7dof",
        attention_resolutions=(), num_heads=1, context_dim=8, sample_steps=2)
    save(config, golden.fill(model.build(config)))
    SCENES["data"] = folder / "data"
    return folder / "out"


def save(config, net, **more):
    """Writes a step whose averaged weights are twice its raw ones."""
    weights = dict(net.state_dict())
    average = {name: 2 * w for name, w in weights.items() if name.startswith(checkpoint.UNET)}
    meta = {"step": 5, "ema_updates": 1, "config": asdict(config)}
    checkpoint.save(config.out, 5, {**weights, **more}, average, {}, meta)


def sampled(run, out, *options):
    """Runs sample.py for the small run; the files that it leaves, by name."""
    sample.main(["--checkpoint", str(run), "--out", str(out), "--device", "cpu",
                 "--data", str(SCENES["data"]), *options])
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def refused(capsys, *options):
    """The one line on which sample.py gives up, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        sample.main(["--data", str(SCENES["data"]), *map(str, options)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sample.py: "), lines
    return lines[0]


def test_a_bare_command_makes_views_of_a_scene_that_was_held_out(run, tmp_path, capsys):
    files = sampled(run, tmp_path, "--views", "3")
    assert files == {"sheet.png", "swing.gif", "truth.gif", "path.png", "cameras.json", "cond.png",
                     "transforms.json", "truth.png", "views/000.png",
                     "views/001.png", "views/002.png"} | mp4()
    said = capsys.readouterr().out
    assert "held-out scene" in said and "s a view" in said and str(tmp_path) in said
    assert all(name.split("/")[0] in said for name in files)
    views = [Image.open(tmp_path / f"views/00{i}.png") for i in range(3)]
    assert all(view.size == (SIZE, SIZE) for view in views)
    assert Image.open(tmp_path / "swing.gif").size == (256, 256)
    # photo, truth and model, side by side
    assert Image.open(tmp_path / "truth.gif").width == 3 * 256 + 4 * pictures.GAP
    cameras = paths.read(tmp_path / "cameras.json", 1.0)
    assert len(cameras) == 4
    # the conditioning view is a stored image of the shards, and truth.png shows others
    reader = scenes.open_source(run_config(run).sources[0],
                                run.parent / "data", SIZE, held_out=True)
    cond = torch.from_numpy(np.array(Image.open(tmp_path / "cond.png"))).permute(2, 0, 1)
    assert torch.equal(cond, torch.as_tensor(reader.image(0, 2)))
    assert cameras.fov[0].item() == pytest.approx(reader.scene(0).fov)


def mp4():
    return {"swing.mp4", "truth.mp4"} if pictures.shutil.which("ffmpeg") else set()


def test_a_damaged_newest_step_is_told_of_once_and_the_one_before_is_used(run, tmp_path):
    shutil.copytree(run, tmp_path / "out")
    shutil.copytree(run / "step_00000005", tmp_path / "out/step_00000006")
    with open(tmp_path / "out/step_00000006/model.safetensors", "r+b") as file:
        file.truncate(1000)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sampled(tmp_path / "out", tmp_path / "made", "--views", "1")
    assert sum("step_00000006 is damaged" in str(one.message) for one in said) == 1
    sampled(run, tmp_path / "wanted", "--views", "1")
    found, wanted = (Image.open(tmp_path / each / "views/000.png") for each in ("made", "wanted"))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_sampling_runs_with_the_averaged_weights(run):
    net, config = render.load(run, "cpu", "fp32")
    raw = golden.fill(model.build(config)).state_dict()
    for name, w in net.state_dict().items():
        times = 2 if name.startswith(checkpoint.UNET) else 1
        torch.testing.assert_close(w, times * raw[name])


@pytest.mark.parametrize("option", ["--swing", "--zoom", "--grid", "--pose=-30,10,1"])
def test_every_kind_of_path_is_written(run, tmp_path, option):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (9, 99, 199)).save(photo)
    files = sampled(run, tmp_path / "out", str(photo), option, "--views", "2", "--steps", "1")
    count = {"--grid": 15, "--pose=-30,10,1": 1}.get(option, 2)
    assert sum(name.startswith("views/") for name in files) == count
    assert "truth.png" not in files
    stored = json.loads((tmp_path / "out/cameras.json").read_text())
    assert len(stored["frames"]) == count + 1


def test_a_written_path_can_be_walked_again(run, tmp_path):
    sampled(run, tmp_path / "a", "--truck", "--views", "2", "--steps", "1")
    files = sampled(run, tmp_path / "b", "--path", str(tmp_path / "a/cameras.json"), "--steps", "1")
    assert sum(name.startswith("views/") for name in files) == 3
    same = [np.asarray(Image.open(tmp_path / place)).astype(int) for place in
            ("a/views/001.png", "b/views/002.png")]
    assert abs(same[0] - same[1]).max() <= 1


def test_scale_sweep_is_a_sheet_with_a_row_for_each_scale(run, tmp_path):
    files = sampled(run, tmp_path, "--scale-sweep", "--views", "2", "--steps", "1")
    assert files == {"scale-sweep.png"}
    cell = 128 + pictures.LABEL + pictures.GAP
    height = Image.open(tmp_path / "scale-sweep.png").height
    assert height == len(folder.SWEEP) * cell + pictures.GAP + pictures.LABEL


def test_progress_is_a_strip_that_ends_in_the_view(run, tmp_path):
    sampled(run, tmp_path, "--progress", "--views", "3", "--steps", "4", "--batch", "2")
    strip = np.asarray(Image.open(tmp_path / "progress.png"))
    view = np.asarray(pictures.enlarged(Image.open(tmp_path / "views/001.png")))
    assert strip.shape[1] == 4 * (128 + pictures.GAP) + pictures.GAP
    last = strip[2 * pictures.LABEL + pictures.GAP:][:128, -128 - pictures.GAP:-pictures.GAP]
    # the last promise is the view but for rounding, which the enlargement spreads
    assert abs(last.astype(int) - view).max() <= 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_makes_nearly_the_same_views(run, tmp_path, precision):
    for name in ("fp32", precision):
        sampled(run, tmp_path / name, "--views", "2", "--precision", name, "--guidance", "1")
    exact, rough = (np.asarray(Image.open(tmp_path / name / "views/001.png")).astype(int)
                    for name in ("fp32", precision))
    assert 0 < abs(exact - rough).max() and abs(exact - rough).mean() < 8


def test_views_are_the_same_in_batches_that_do_not_divide_them(run, tmp_path):
    """Batches of one size, the last of them filled up: no view is lost, doubled or shifted."""
    for batch in ("16", "2"):
        files = sampled(run, tmp_path / batch, "--views", "5", "--no-same-noise", "--batch", batch)
        assert sum(name.startswith("views/") for name in files) == 5
    for i in range(5):
        together, apart = (np.asarray(Image.open(tmp_path / batch / f"views/00{i}.png")).astype(int)
                           for batch in ("16", "2"))
        assert abs(together - apart).max() <= 1      # float32 rounding may turn a byte


def test_fresh_noise_makes_views_of_the_same_camera_differ(run, tmp_path):
    still = ["--pan", "--by", "0", "--views", "2", "--steps", "1"]
    for out, options in (("same", still), ("fresh", [*still, "--no-same-noise"])):
        sampled(run, tmp_path / out, *options)
    same, fresh = (
        abs(np.subtract(*(np.asarray(Image.open(tmp_path / out / f"views/00{i}.png"), dtype=int)
                          for i in (0, 1)))).max() for out in ("same", "fresh"))
    # rows of a batch differ by float32 rounding, which may turn a byte to the next
    assert same <= 1 and fresh > 50


def test_a_second_run_leaves_nothing_of_the_first_and_all_that_is_not_its_own(run, tmp_path):
    sampled(run, tmp_path, "--views", "5", "--steps", "1", "--progress")
    mine = {"photo.png", "views/holiday.png", "notes.gif", "views/2024-01.png", "views/100_a.png"}
    for name in mine:
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    files = sampled(run, tmp_path, str(tmp_path / "photo.png"), "--views", "2", "--steps", "1")
    assert {name for name in files if name.startswith("views/0")} == {"views/000.png",
                                                                      "views/001.png"}
    assert mine <= files and not {"truth.png", "progress.png"} & files


def test_an_mp4_is_made_where_ffmpeg_is_found(run, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "bin/ffmpeg"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nfor last; do :; done\nwc -c > \"$last\"\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    files = sampled(run, tmp_path / "out", "--dolly", "--views", "3", "--steps", "1")
    assert "dolly.mp4" in files and "dolly.mp4" in capsys.readouterr().out
    # an open path goes forth and back: views 0, 1, 2, 1
    assert int((tmp_path / "out/dolly.mp4").read_text()) == 4 * 256 * 256 * 3
    assert Image.open(tmp_path / "out/dolly.gif").n_frames == 4
    fake.write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    files = sampled(run, tmp_path / "other", "--dolly", "--views", "2", "--steps", "1")
    assert "dolly.mp4" not in files and "no such codec" in capsys.readouterr().out


# ---- several photos

def capture_of(run, path):
    """A folder with transforms.json: the five views of a held-out scene; and that scene's HeldOut view."""
    photo, frames = photos.held_out(run_config(run), 1), []
    path.mkdir()
    for i, c2w in enumerate(photo.reader.scene(photo.number).c2w):
        pictures.image(scenes.images(photo.reader.image(photo.number, i))).save(path / f"{i}.png")
        frames.append({"file_path": f"{i}.png", "transform_matrix": c2w.tolist()})
    focal = SIZE / 2 / math.tan(photo.fov / 2)
    (path / "transforms.json").write_text(json.dumps(
        {"w": SIZE, "h": SIZE, "fl_x": focal, "fl_y": focal, "cx": SIZE / 2, "cy": SIZE / 2, "frames": frames}))
    return path, photo


def test_one_photo_of_a_capture_gives_exactly_the_views_of_that_photo(run, tmp_path):
    folder, photo = capture_of(run, tmp_path / "capture")
    sampled(run, tmp_path / "a", "--capture", str(folder), "--photos", "3", "--dolly", "--views", "2")
    rise = photos.elevation_of(photo.reader.scene(photo.number).c2w, 3)
    sampled(run, tmp_path / "b", str(tmp_path / "a/cond.png"), "--dolly", "--views", "2",
            f"--fov={math.degrees(photo.fov)}", f"--elevation={rise}")
    for name in ("views/000.png", "views/001.png"):
        a, b = (Image.open(tmp_path / each / name) for each in "ab")
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_views_along_a_capture_start_from_the_photos_that_are_near(run, tmp_path):
    folder, _ = capture_of(run, tmp_path / "capture")
    path = ["--capture", str(folder), "--path", str(folder / "transforms.json")]
    for name, options in (("all", ["--photos", "3,0", "--batch", "3"]), ("3", ["--photos", "3"]),
                          ("0", ["--photos", "0"])):
        files = sampled(run, tmp_path / name, *path, *options)
        assert sum(name.startswith("views/") for name in files) == 5
    views = {name: [np.asarray(Image.open(tmp_path / name / f"views/{i:03}.png")).astype(int)
                    for i in range(5)] for name in ("all", "3", "0")}
    for place in (0, 3):        # at a photo's own camera the others count for a millionth
        assert abs(views["all"][place] - views[str(place)][place]).max() <= 1
    assert all(abs(views["all"][1] - views[name][1]).max() > 2 for name in "30")


def test_nearness_is_of_places_and_directions():
    cond = torch.cat([paths.around(0.0, 0.0, 1.0)[None], paths.around(40.0, 0.0, 1.0)[None]])
    found = paths.nearness(cond, paths.around([0.0, 20.0, 30.0], 0.0, 1.0))
    torch.testing.assert_close(found.sum(0), torch.ones(3, dtype=torch.float64))
    assert found[0, 0] > 0.99999 and found[0, 1] == pytest.approx(0.5) and 0.05 < found[0, 2] < 0.15
    turned = paths.motion("pan", 2, 30, 1.0, 0.0).c2w
    assert paths.nearness(turned, turned)[0, 0] > 0.99999


@pytest.mark.parametrize("options, says", [
    (["--photos", "5"], "photo 5 of"), (["photo.png"], "leave out IMAGE"), (["--fov", "50"], "--fov"),
    (["--photos", "1,x"], "'x' is not a number")])
def test_what_does_not_fit_a_capture_is_named(run, tmp_path, capsys, options, says):
    folder, _ = capture_of(run, tmp_path / "capture")
    assert says in refused(capsys, "--checkpoint", run, "--out", tmp_path / "out", "--capture", folder, *options)
    assert "--capture FOLDER" in refused(capsys, "--checkpoint", run, "--photos", "1")


# ---- bad input

@pytest.mark.parametrize("options, says", [
    (["--fov", "180"], "--fov"), (["--fov", "0"], "--fov"), (["--fov", "nan"], "--fov"),
    (["--views", "0"], "--views"), (["--steps", "0"], "--steps"), (["--steps", "1001"], "1001"),
    (["--sampler", "reference", "--steps", "1"], "2 to 500"),
    (["--sampler", "reference", "--spacing", "trailing"], "trailing"),
    (["--sampler", "euler"], "euler"), (["--eta", "2"], "--eta"),
    (["--guidance", "-1"], "--guidance"),
    (["--guidance-interval", "900,100"], "900,100"), (["--scale", "0"], "--scale"),
    (["--scale", "big"], "big"), (["--scale", "auto"], "--depth-weights"), (["--by", "far"], "far"),
    (["--elevation", "90"], "--elevation"), (["--scene", "99"], "scenes 0 to 3"),
    (["--orbit", "--dolly"], "--dolly"), (["--pose", "1,2"], "--pose"), (["--obrit"], "--obrit"),
    (["--path", "nowhere.json"], "nowhere.json"), (["--device", "mps"], "mps"),
    (["--zoom", "--by", "-1"], "zoom"), (["--by", "1e300"], "1e300"),
    (["--views", "10001"], "10,000"), (["--batch", "1" + 99 * "0"], "--batch"),
    (["--seed", str(2**64)], "--seed"), (["--scale", "1e-9"], "--scale"),
    (["--views", 5000 * "9"], "--views"), (["--out="], "--out"), (["--sclae=1"], "--scale"),
    (["--spiral", "--elevation", "80"], "over the pole"), (["nowhere.jpg"], "nowhere.jpg"),
    (["--crop", "0,0,99"], "")])
def test_bad_options_end_in_one_line_before_anything_is_written(run, tmp_path, capsys, options,
                                                                says):
    if "--crop" in options:
        Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
        options, says = [str(tmp_path / "photo.png"), *options], "40x30"
    out = tmp_path / "out"
    line = refused(capsys, "--checkpoint", run, "--out", out, *options)
    assert says in line
    assert not out.exists()


def test_files_that_are_no_image_are_named(run, tmp_path, capsys):
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("hello")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    for file in (text, cut, tmp_path):
        assert str(file) in refused(capsys, file, "--checkpoint", run, "--out", tmp_path / "out")


def test_a_path_that_is_empty_or_not_rigid_is_named(run, tmp_path, capsys):
    file = tmp_path / "path.json"
    for content in ("[]", json.dumps([(2 * np.eye(4)).tolist()])):
        file.write_text(content)
        line = refused(capsys, "--path", file, "--checkpoint", run, "--out", tmp_path / "out")
        assert str(file) in line and "camera" in line


def test_an_output_folder_that_cannot_be_written_is_named(run, tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.write_text("")
    for out in (occupied, occupied / "deeper"):
        assert str(out) in refused(capsys, "--checkpoint", run, "--out", out, "--steps", "1")


def test_what_views_start_from_is_not_written_over(run, tmp_path, capsys):
    """As a run that goes on from a view of the last one would, both in the same folder."""
    out = tmp_path / "out"
    sampled(run, out, "--views", "3")
    for given in ([out / "views/002.png"], [out / "cond.png"], ["--path", out / "cameras.json"]):
        kept = given[-1].read_bytes()
        capsys.readouterr()
        line = refused(capsys, *given, "--checkpoint", run, "--out", out)
        assert str(given[-1]) in line and "--out" in line and given[-1].read_bytes() == kept
        sampled(run, tmp_path / "other", *map(str, given), "--steps", "1")


@pytest.mark.parametrize("name", ["truth.png", "swing.gif", "views"])
def test_what_stands_in_the_way_of_a_file_is_found_before_the_views_are_made(
        run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(sample, "Render", None)
    if name == "views":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    assert "cannot be written" in refused(capsys, "--checkpoint", run, "--out", tmp_path)


def test_held_out_scenes_of_all_sources_are_reached(run):
    config = run_config(run)
    names = [(photo.reader.name, photo.number) for photo in
             (photos.held_out(config, number) for number in range(4))]
    assert names == [("co3d", 0), ("co3d", 1), ("re10k", 0), ("re10k", 1)]
    with pytest.raises(ValueError, match="scene 4: there are scenes 0 to 3"):
        photos.held_out(config, 4)


def test_a_3dof_model_is_asked_for_what_it_knows_alone(run, tmp_path, capsys):
    config = run_config(run)
    config = replace(config, mode="3dof", out=str(tmp_path / "run"))
    save(config, golden.fill(model.build(config)))
    for motion in ("orbit", "swing", "spiral", "dolly", "grid"):
        sampled(config.out, tmp_path / "out", f"--{motion}", "--steps", "1", "--views", "4")
    capsys.readouterr()
    for motion in ("pan", "tilt", "truck", "pedestal", "zoom"):
        line = refused(capsys, "--checkpoint", config.out, "--out", tmp_path / "no",
                       f"--{motion}", "--steps", "1")
        assert "a 3DoF model knows of azimuth, elevation and distance alone" in line
    assert not (tmp_path / "no").exists()


def test_a_distance_without_by_is_explained(run, capsys):
    for words in (["--pan", "10"], ["photo.png", "--pan", "10"]):
        assert sample.BY in refused(capsys, "--checkpoint", run, *words)
    assert "--by" not in refused(capsys, "--checkpoint", run, "photo.png", "more.png")


@pytest.mark.parametrize("err, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "Tried --batch 4 needs less"),
    (OSError(28, "No space left on device"), "out: No space left on device")])
def test_what_ends_a_run_is_one_line(err, says, run, tmp_path, monkeypatch, capsys):
    def fail(*given, **more):
        raise err
    monkeypatch.setattr(sample, "Render", fail)
    assert says in refused(capsys, "--checkpoint", run, "--out", tmp_path / "out", "--batch", "8")


def test_a_checkpoint_of_another_model_leaves_no_folder(run, tmp_path, capsys):
    broken = tmp_path / "m.safetensors"
    safetensors.torch.save_file({checkpoint.POSE: torch.zeros(768, 787)}, broken)
    refused(capsys, "--checkpoint", broken, "--out", tmp_path / "out", gradient_file(tmp_path))
    assert not (tmp_path / "out").exists()


def gradient_file(folder):
    gradient(20, 20).save(folder / "gradient.png")
    return folder / "gradient.png"


def test_pose_vectors_take_the_scale_as_training_does():
    """Golden cases: of a scale below the smallest too; modes without one see a given scale."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    c2w[:, 0, 3] = torch.tensor([0.002, 3.0])
    cond, fov = torch.eye(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for mode in ("7dof", "7dof_quantile_scale", "7dof_stereomag_scale"):
        for scale in (0.001, 0.7):
            wanted = camera.conditioning(mode, cond.repeat(2, 1, 1), c2w, fov,
                                         torch.full((2,), scale))
            torch.testing.assert_close(render.pose_vectors(mode, cond, c2w, fov, scale),
                                       wanted.float())
    for scale in (1.0, 2.0):
        found = render.pose_vectors("7dof_unscaled", cond, c2w, fov, scale)
        assert found[1, 3].item() == pytest.approx(3 / scale)


def test_a_published_file_is_sampled_in_few_steps_unless_told():
    def chosen(*words, published=True):
        return sample.options_of(sample.parser().parse_args(list(words)), published)

    assert sample.PUBLISHED.items() <= chosen("--guidance", "2").items() and chosen()["seed"] == 0
    for words in (["--sampler", "ddim"], ["--steps", "50"], ["--eta", "0"], ["--spacing", "trailing"]):
        assert chosen(*words) == chosen(*words, published=False) != chosen()
    assert "sampler" not in chosen(published=False)


def test_a_photo_for_a_model_without_a_scale_has_none(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    source = configs.Source("none", "co3d", "none", 1.0)
    for mode, scale in (("3dof", 1.0), ("7dof_unscaled", 1.0), ("7dof_quantile_scale", 0.7)):
        config = configs.Config(sources=(source,), mode=mode)
        args = sample.parser().parse_args([str(tmp_path / "photo.png")])
        assert sample.photo_of(args, config).scale == scale


def test_the_scale_of_a_held_out_view_is_that_of_training(monkeypatch):
    """Holes are filled by the run's depth network, and every fourth pixel counts."""
    source = configs.Source("none", "co3d", "none", 1.0)
    config = configs.Config(sources=(source,), depth_weights=__file__)
    far = torch.full((32, 32), 12.0)
    far[12:20, 12:20] = torch.linspace(2, 3, 8)[:, None]
    far[::4, ::4] += 1
    known, image = far.where(far < 5, torch.tensor(0.0)), torch.zeros(3, 32, 32)
    monkeypatch.setattr(photos.networks, "load_depth", lambda path: lambda x: (100 / far)[None])
    for seen in (known, far, torch.zeros(32, 32)):
        wanted = depth.viewer_scale(seen[None], image[None], lambda x: (100 / far)[None]).item()
        assert photos.scale_in_scene(config, None, 0, seen, image) == pytest.approx(wanted)
    without = replace(config, depth_weights="")
    assert photos.scale_in_scene(without, None, 0, known, image) == pytest.approx(
        known[known > 0].quantile(0.2).item())


def test_checkpoints_of_other_models_are_named(run, tmp_path, capsys):
    assert "nowhere" in refused(capsys, "--checkpoint", tmp_path / "nowhere")
    assert str(tmp_path) in refused(capsys, "--checkpoint", tmp_path)
    other = tmp_path / "other.safetensors"
    save_file = pytest.importorskip("safetensors.torch").save_file
    for tensors, says in [({"weight": torch.zeros(3)}, "cc_projection"),
                          ({checkpoint.POSE: torch.zeros(768, 775)}, "775 numbers"),
                          ({checkpoint.POSE: torch.zeros(768, 787)}, "missing")]:
        save_file(tensors, other)
        photo = tmp_path / "photo.png"
        Image.new("RGB", (300, 300)).save(photo)
        line = refused(capsys, photo, "--checkpoint", other, "--out", tmp_path, "--device", "cpu")
        assert str(other) in line and says in line


# ---- models

def test_published_checkpoints_are_told_apart_by_their_pose_width():
    def of_width(width):
        entry = checkpoint.LazyTensor(torch.float32, (768, 768 + width), lambda: None)
        return checkpoint.StateDict("file", {checkpoint.POSE: entry})

    assert render.config_of(of_width(4)).mode == "3dof"
    assert render.config_of(of_width(19)).mode == "7dof_quantile_scale"


def test_a_run_takes_the_frozen_networks_from_the_file_that_the_user_names(tmp_path, monkeypatch):
    about, _ = golden.case("sample_zero123")
    small = golden_model(about)
    frozen = ("first_stage_model.", "cond_stage_model.")
    init = tmp_path / "init.safetensors"
    weights = {name: w.contiguous() for name, w in small.state_dict().items()}
    pytest.importorskip("safetensors.torch").save_file(weights, init)
    source = configs.Source("none", "co3d", "none", 1.0)
    config = configs.Config(sources=(source,), out=str(tmp_path / "run"), init="xl/gone.ckpt")
    trained = {name: 3 * w for name, w in weights.items() if not name.startswith(frozen)}
    average = {name: 2 * w for name, w in trained.items() if name.startswith(checkpoint.UNET)}
    meta = {"step": 5, "ema_updates": 1, "config": asdict(config)}
    checkpoint.save(config.out, 5, trained, average, {}, meta)
    blank = golden.fill(golden_model(about), salt="other/")
    monkeypatch.setattr(model, "build", lambda config: blank)
    with pytest.raises(ValueError, match=r"--init FILE .* \(xl/gone.ckpt, it says\)"):
        render.load(config.out, "cpu", "fp32")
    net, _ = render.load(config.out, "cpu", "fp32", str(init))
    for name, w in net.state_dict().items():
        times = 6 if name.startswith(checkpoint.UNET) else 1 if name.startswith(frozen) else 3
        torch.testing.assert_close(w, times * weights[name])


def test_bf16_is_of_the_network_alone(run):
    net, _ = render.load(run, "cpu", "bf16")
    assert next(net.model.parameters()).dtype == torch.bfloat16
    assert net.alphas_cumprod.dtype == net.cc_projection.weight.dtype == torch.float32
    image = golden.network_input("image", (1, 3, SIZE, SIZE), tanh=True)
    T = golden.network_input("T", (2, 19))
    views = diffusion.novel_views(net, image, T, [0, 1], steps=2)
    assert views.dtype == torch.float32
    net.model.float()
    exact = diffusion.novel_views(net, image, T, [0, 1], steps=2)
    # bf16 keeps 8 bits, and guidance 3 enlarges the rounding
    assert 0 < (views - exact).abs().mean() < 0.05


@pytest.mark.parametrize("mode", camera.MODES)
def test_scale_divides_lengths_in_every_mode(mode):
    cameras = paths.motion("orbit", 5, 90, 1.0, 20.0)
    found = render.pose_vectors(mode, cameras.cond_c2w, cameras.c2w, cameras.fov, 0.5)
    cond = cameras.cond_c2w.repeat(5, 1, 1)
    scale = torch.full((5,), 0.5)
    if mode in ("3dof", "7dof_unscaled"):       # these do not look at a scale
        one = render.pose_vectors(mode, cameras.cond_c2w, cameras.c2w, cameras.fov, 1.0)
        lengths = [3] if mode == "3dof" else [3, 7, 11]
        rest = [i for i in range(one.shape[1]) if i not in lengths]
        torch.testing.assert_close(found[:, lengths], 2 * one[:, lengths], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[:, rest], one[:, rest], rtol=0, atol=1e-6)
    else:
        expected = camera.conditioning(mode, cond, cameras.c2w, cameras.fov, scale).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["3dof", "7dof", "7dof_unscaled", "7dof_stereomag_scale",
                                  "7dof_quantile_scale"])
def test_a_held_out_view_has_the_pose_vectors_of_training(run, mode):
    config = replace(run_config(run), mode=mode)
    photo = next(photo for photo in (photos.held_out(config, number) for number in range(2))
                 if (photo.reader.depth(photo.number, photo.view) > 0).all())
    pairs = data.Pairs([photo.reader], [1.0], 0, SIZE, mode)
    pairs.draw = lambda k, attempt=0: (0, photo.number, photo.view, 4)
    batch = torch.utils.data.default_collate([pairs[0]])
    trained = depth.pose_vector(batch, mode)
    c2w = photo.reader.scene(photo.number).c2w
    fov = torch.tensor([photo.fov], dtype=torch.float64)
    found = render.pose_vectors(mode, c2w[photo.view], c2w[4:5], fov, photo.scene_scale)
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-6)
    # in the unit of the paths, where what is in the middle of the photo is one away
    far = photos.middle(torch.from_numpy(photo.reader.depth(photo.number, photo.view))).median()
    c2w = c2w.clone()
    c2w[:, :3, 3] /= far
    found = render.pose_vectors(mode, c2w[photo.view], c2w[4:5], fov, photo.scale)
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-6)
    upright = paths.motion("orbit", 1, 0, photo.fov, photo.elevation).cond_c2w
    assert upright[2, 2].item() == pytest.approx(c2w[photo.view, 2, 2].item(), abs=1e-6)


# ---- nothing that a checkpoint names is opened

@pytest.mark.parametrize("pattern", ["pipe:touch {}", "pipe:touch {} #.tar", "{}",
                                     "http://127.0.0.1:9/{}.tar", "../{}", "co3d/../../{}", "-"])
def test_shards_that_a_checkpoint_names_are_neither_run_nor_fetched(tmp_path, capsys, monkeypatch,
                                                                    run, pattern):
    mark = tmp_path / "mark"
    source = configs.Source("co3d", "co3d", "none", 1.0, pattern.format(mark))
    config = replace(run_config(run), sources=(source,),
                     out=str(tmp_path / "run"))
    save(config, golden.fill(model.build(config)))
    monkeypatch.setattr(scenes, "open_source", None)
    for options in ([], ["--data", tmp_path]):
        with pytest.raises(SystemExit):
            sample.main(["--checkpoint", config.out, "--out", str(tmp_path / "out"),
                         *map(str, options)])
        said = capsys.readouterr().err
        assert "is opened" in said or "not inside of --data" in said
        assert "--config FILE" in said and said.count("\n") == 1
    assert not mark.exists()


def test_scenes_are_those_of_the_users_own_configuration(run, tmp_path, monkeypatch, capsys):
    """The bare command: both the run and its configuration are the command line's own defaults."""
    file = tmp_path / "own.py"
    file.write_text(f"""
from configs import Config, Source
config = Config(sources=(Source("re10k", "re10k", "x", 1.0, "re10k/held-out-*.tar"),),
                data={str(SCENES["data"])!r})
""")
    for name, value in (("RUN", str(run)), ("CONFIG", str(file))):
        monkeypatch.setattr(views, name, value)
        monkeypatch.setattr(render, name, value)
    wanted = photos.held_out(replace(run_config(run),
                                     sources=configs.load([str(file)]).sources), 0)
    for options in ([], ["--checkpoint", str(run), "--config", str(file)]):
        sample.main(["--out", str(tmp_path / "out"), "--views=1", "--steps=1", *options])
        assert wanted.reader.scene(0).name in capsys.readouterr().out


def test_commands_among_held_out_shards_are_refused(run):
    source = configs.Source("s", "co3d", "none", 1.0, "pipe:cat x.tar")
    config = replace(run_config(run), sources=(source,))
    with pytest.raises(ValueError, match="files, not commands"):
        photos.held_out(config, 0)


# ---- a model that is held

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_loaded_on_meta_is_what_a_built_model_is_filled_with(run, precision):
    tensors = checkpoint.read(run)
    net, config = render.load(tensors, "cpu", precision)
    slow = model.build(config)
    checkpoint.load_model(slow, tensors, ema=True)
    render.place(slow, "cpu", precision)
    for (name, w), (other, wanted) in zip(net.state_dict().items(), slow.state_dict().items(),
                                          strict=True):
        assert name == other and w.dtype == wanted.dtype and torch.equal(w, wanted)
        assert w.stride() == wanted.stride()


def test_loading_a_model_does_not_import_the_compiler(run):
    """It takes four seconds; arithmetic on "meta" tensors would import it."""
    code = ("import sys; from views import render; render.load(sys.argv[1], 'cpu', 'fp32'); "
            "sys.exit('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, run], cwd=Path(sample.__file__).parent,
                          timeout=120, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def held(run, size=32):
    """A Render of the small run, with a photo."""
    found = render.Render(*render.load(run, "cpu", "fp32"), {"eta": 0.0, "steps": 6}, batch=2)
    found.start_from(photos.Photo(gradient(size, size), SIZE, 0.9, 0.0, 1.0))
    return found


def test_a_preview_and_the_result_begin_with_the_same_noise(run):
    drawn, cameras = held(run), paths.motion("orbit", 3, 30, 0.9, 0.0)
    full, few, other = (np.stack([np.asarray(x, dtype=int) for x in drawn(cameras, **options)])
                        for options in ({}, {"steps": 3}, {"seed": 9}))
    assert full.shape == (3, SIZE, SIZE, 3)
    assert abs(few - full).mean() < abs(other - full).mean() / 2
    again = [np.asarray(x) for x in drawn(cameras)]
    assert np.array_equal(full, again)


def test_views_come_as_they_are_drawn_and_a_request_can_be_given_up(run):
    drawn, cameras = held(run), paths.motion("orbit", 4, 30, 0.9, 0.0)
    wanted, seen = [np.asarray(x) for x in drawn(cameras)], []
    views = drawn(cameras, watch=lambda first, t, z_0: seen.append((first, len(z_0))))
    next(views)
    assert seen == 6 * [(0, 2)]
    views.close()

    def give_up(first, t, z_0):
        raise InterruptedError
    with pytest.raises(InterruptedError):
        list(drawn(cameras, watch=give_up))
    assert np.array_equal(wanted, [np.asarray(x) for x in drawn(cameras)])


# ---- photos

def gradient(width, height):
    """A picture whose pixels all differ from their neighbours."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([5 * x, 7 * y, 3 * x + 2 * y], -1).astype(np.uint8))


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    upright, file = gradient(20, 20), tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6                        # the camera was held so that the top is on the right
    upright.rotate(90, expand=True).save(file, exif=exif)
    assert np.array_equal(np.asarray(photos.read(file)), np.asarray(upright))


def png_header(width, height):
    """A PNG file of a few bytes that says how large it is."""
    def chunk(kind, data):
        return (len(data).to_bytes(4, "big") + kind + data
                + zlib.crc32(kind + data).to_bytes(4, "big"))
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))
            + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_a_large_photo_is_reduced_without_a_warning_and_a_larger_one_refused(tmp_path, recwarn):
    """Of 90 megapixels Pillow warns of an attack; a crop of it keeps all its pixels."""
    file, side = tmp_path / "large.png", 9500
    large = Image.new("L", (side, side), 200)
    large.paste(0, (0, 0, 100, side))
    large.save(file, compress_level=1)
    found = photos.read(file)
    assert found.size == (3167, 3167) and found.mode == "RGB"
    assert found.getpixel((31, 0)) == (0, 0, 0) and found.getpixel((35, 0)) == (200, 200, 200)
    crop = photos.read(file, "90,5,20")
    assert crop.size == (20, 20) and crop.getpixel((9, 0)) == (0, 0, 0)
    assert crop.getpixel((10, 0)) == (200, 200, 200)
    assert not recwarn.list
    for source in (file, png_header(20000, 10000)):
        if source is file:
            file.write_bytes(png_header(20000, 10000))
        with pytest.raises(ValueError, match="more than 178 megapixels: make it smaller first"):
            photos.read(source)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="a folder, a pipe or a device"):
            photos.read(path)


def test_bytes_are_read_as_a_file_of_them_is(tmp_path):
    file, exif = tmp_path / "photo.jpg", Image.Exif()
    exif[0x0112] = 6
    gradient(40, 30).save(file, exif=exif)
    wanted = np.asarray(photos.read(file, "2,5,20"))
    assert np.array_equal(np.asarray(photos.read(file.read_bytes(), "2,5,20")), wanted)
    assert photos.from_file(file.read_bytes(), 16).picture.size == (16, 16)
    with pytest.raises(ValueError, match="at most 67,108,864"):
        photos.read(bytes(photos.MOST_BYTES + 1))
    with pytest.raises(ValueError, match="the picture is not an image"):
        photos.read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def test_floats_that_are_not_finite_are_told_and_spoil_nothing(tmp_path, capsys):
    values = np.full((8, 8), 0.4, np.float32)
    values[0, :3] = np.inf, np.nan, -np.inf
    Image.fromarray(values).save(tmp_path / "photo.tiff")
    found = np.asarray(photos.read(tmp_path / "photo.tiff"))[..., 0]
    assert "3 pixels are not finite" in capsys.readouterr().out
    assert found[0, :4].tolist() == [255, 0, 0, 102] and (found[1:] == 102).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "CMYK", "I;16", "F", "F255", "RGB"])
def test_every_kind_of_image_becomes_rgb_over_white(tmp_path, mode):
    file = tmp_path / ("photo.tiff" if mode in ("CMYK", "F", "F255") else "photo.png")
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (8, 8), (0,) * len(mode))
        picture.putalpha(51)
        expected = 204                      # a fifth of black over white
    elif mode == "I;16":
        picture, expected = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), 128
    elif mode.startswith("F"):
        white = 255 if mode == "F255" else 1
        picture, expected = Image.fromarray(np.full((8, 8), 0.4 * white, np.float32)), 102
    else:
        picture, expected = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), 255
    picture.save(file)
    found = np.asarray(photos.read(file))
    assert found.shape == (8, 8, 3) and (found == expected).all()


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 255, np.uint16)).save(tmp_path / "photo.png")
    assert (np.asarray(photos.read(tmp_path / "photo.png")) == 0).all()


def test_the_centre_square_or_the_given_one_is_used(tmp_path):
    picture, file = gradient(30, 20), tmp_path / "photo.png"
    picture.save(file)
    pixels = np.asarray(picture)
    assert np.array_equal(np.asarray(photos.read(file)), pixels[:, 5:25])
    assert np.array_equal(np.asarray(photos.read(file, "20,3,6")), pixels[3:9, 20:26])


@pytest.mark.parametrize("crop", ["1,2", "a,b,c", "0,0,21", "-1,0,5", "26,0,5", "0,0,0", "0,0,1.5"])
def test_an_impossible_crop_is_a_one_line_error(tmp_path, crop):
    gradient(30, 20).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="--crop"):
        photos.read(tmp_path / "photo.png", crop)


@pytest.mark.parametrize("width, size", [(12, 4), (10, 4), (7, 3), (5, 5)])
def test_reduction_is_the_mean_over_exact_areas(width, size):
    picture = gradient(width, width)
    # every pixel repeated `size` times in both directions: then all areas are whole pixels
    fine = np.asarray(picture).astype(float).repeat(size, 0).repeat(size, 1)
    mean = fine.reshape(size, width, size, width, 3).mean((1, 3))
    found = np.asarray(photos.reduce(picture, size))
    assert abs(found - mean).max() <= 0.5 + 1e-4
    assert photos.reduce(picture, 2 * width).size == (2 * width, 2 * width)


@pytest.mark.parametrize("width, share", [(64, 0.5), (60, 0.4), (20, 0.6), (12, 1 / 3)])
def test_the_middle_of_a_photo_is_what_a_crop_of_it_is(width, share):
    picture, side = gradient(width, width), round(share * width)
    box = photos.crop_box(picture.size, f"{(width - side) // 2},{(width - side) // 2},{side}")
    found, crop = (np.asarray(x).astype(int) for x in (
        photos.reduce(picture, 16, share), photos.reduce(picture.crop(box), 16)))
    inside = np.s_[2:-2, 2:-2] if side < 16 else np.s_[:]       # bicubic looks past a crop's edge
    assert abs(found - crop)[inside].max() <= 1
    photo = photos.Photo(picture, 16, 1.0, 0.0, 1.0)
    assert np.array_equal(np.asarray(photo.closer(share)), found)
    assert photo.closer(1.3) == photo.closer(1.0) == photo.picture


def test_a_zoom_starts_from_the_part_of_the_photo_with_its_field_of_view(run, tmp_path, capsys):
    """In all its pixels: a picture of twice the network's size loses nothing at half its side."""
    gradient(2 * SIZE, 2 * SIZE).save(tmp_path / "photo.png")
    gradient(2 * SIZE, 2 * SIZE).crop((SIZE // 2, SIZE // 2, 3 * SIZE // 2, 3 * SIZE // 2)).save(
        tmp_path / "middle.png")
    fov, half = 50.0, 2 * math.degrees(math.atan(math.tan(math.radians(25)) / 2))
    common = "--eta", "0", "--views"
    sampled(run, tmp_path / "zoom", str(tmp_path / "photo.png"), f"--fov={fov}", "--zoom", "--by=2",
            *common, "2")
    sampled(run, tmp_path / "middle", str(tmp_path / "middle.png"), f"--fov={half}", "--orbit",
            *common, "1")
    sampled(run, tmp_path / "still", str(tmp_path / "photo.png"), f"--fov={fov}", "--orbit",
            *common, "1")

    def view(folder, number):
        return np.asarray(Image.open(tmp_path / folder / f"views/00{number}.png")).astype(int)
    assert abs(view("zoom", 1) - view("middle", 0)).max() <= 1
    assert abs(view("zoom", 0) - view("still", 0)).max() <= 1
    assert abs(view("zoom", 1) - view("still", 0)).max() > 9
    assert "wider" not in capsys.readouterr().err
    sampled(run, tmp_path / "wide", str(tmp_path / "photo.png"), "--zoom", "--by=0.8", *common, "2")
    assert "wider than the photo" in capsys.readouterr().err


@pytest.mark.parametrize("transparent", [True, False])
def test_an_object_is_centred_on_white(tmp_path, transparent):
    canvas = Image.new("RGBA", (200, 100), (0, 0, 0, 0) if transparent else (255, 255, 255, 255))
    canvas.paste((200, 0, 0, 255), (10, 20, 60, 45))            # 50 x 25, in a corner
    canvas.save(tmp_path / "photo.png")
    square = photos.read(tmp_path / "photo.png", isolate=True)
    found = np.asarray(photos.reduce(square, 256)).astype(int)
    red = (abs(found - [200, 0, 0]) < 60).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert len(columns) == pytest.approx(200, abs=8) and len(rows) == pytest.approx(100, abs=8)
    assert [columns.mean(), rows.mean()] == pytest.approx([127.5, 127.5], abs=4)
    assert (found[0, 0] == 255).all()
    Image.new("RGB", (9, 9), (255, 255, 255)).save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="white"):
        photos.read(tmp_path / "white.png", isolate=True)


def test_the_elevation_of_a_level_scene_is_read_from_its_cameras():
    level = paths.around([0.0, 40.0, 80.0], [25.0, 30.0, -10.0], [1.0, 2.0, 3.0])
    assert [photos.elevation_of(level, i) for i in range(3)] == pytest.approx([25, 30, -10])
    turned = paths.rotation("x", torch.tensor([1.0], dtype=torch.float64))
    rolled = level.clone()
    rolled[:, :3] = turned @ level[:, :3]
    assert photos.elevation_of(rolled, 0) == 0


def test_depth_network_gives_the_scale_by_the_middle_of_the_picture(monkeypatch):
    disparity = torch.full((1, 256, 256), 0.25)
    disparity[:, 85:-85, 85:-85] = 0.1      # ten away in the middle, four around it
    monkeypatch.setattr(photos.networks, "load_depth", lambda weights: lambda image: disparity)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        photos.scale_of(gradient(64, 64), "nowhere.pt")
    assert photos.scale_of(gradient(64, 64), __file__) == pytest.approx(0.4)


# ---- pictures

def test_images_and_tensors_are_each_others_inverse():
    picture = gradient(20, 20)
    x = pictures.tensor(picture)
    assert x.shape == (1, 3, 20, 20) and x.min() == -1 and x.max() <= 1
    assert np.array_equal(np.asarray(pictures.image(x[0])), np.asarray(picture))


def test_a_film_is_large_sharp_there_and_back_and_lasts_two_seconds(tmp_path):
    views = [gradient(20, 20), Image.new("RGB", (20, 20)), Image.new("RGB", (20, 20), "white")]
    pictures.film(views, False, tmp_path / "pan")
    film = Image.open(tmp_path / "pan.gif")
    assert film.size == (260, 260) and film.n_frames == 4
    lengths = []
    for number in range(4):
        film.seek(number)
        lengths.append(film.info["duration"])
    assert 2000 <= sum(lengths) < 2100
    enlarged = np.asarray(pictures.enlarged(views[0], 256))
    assert np.array_equal(enlarged, np.asarray(views[0]).repeat(13, 0).repeat(13, 1))


def test_a_sheet_holds_every_picture_in_its_place():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    red, green, blue = (("x", Image.new("RGB", (64, 64), colour)) for colour in colours)
    found = pictures.sheet([[red], [green, blue]])
    step = 128 + pictures.GAP
    assert found.size == (2 * step + pictures.GAP, 2 * (step + pictures.LABEL) + pictures.GAP)
    middle = [found.getpixel((x, y)) for x, y in [(64, 80), (64, 230), (200, 230), (200, 80)]]
    assert middle == [*colours, (255, 255, 255)]


def test_the_map_shows_the_photo_below_its_target_and_truck_to_the_right():
    truck = pictures.path_picture(paths.motion("truck", 5, 1.0, 0.8, 30.0), 300)
    pixels = np.asarray(truck)[pictures.LABEL:, :300][:300].astype(int)
    photo = np.argwhere((abs(pixels - pictures.RED) < 9).all(-1)).mean(0)
    last = np.argwhere((abs(pixels - pictures.LAST) < 9).all(-1)).mean(0)
    target = np.argwhere((pixels == pictures.BLACK).all(-1)).mean(0)
    assert photo[0] > target[0] + 50 and abs(photo[1] - target[1]) < 20
    assert last[1] > photo[1] + 50 and abs(last[0] - photo[0]) < 20


