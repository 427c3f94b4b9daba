"""evaluate.py: fixed pairs, the same figures on any number of processes, broken models told apart,
errors in one line."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import clip
import configs
import data
import depth
import evaluate
import model
import prepare
from analysis import metrics, score
from captures import synth
from runtime import checkpoint, command
from shards import files as shards_file
from shards import scenes

ROOT = Path(__file__).parents[2]
SOURCES = (configs.Source("co3d", "co3d", "co3d/train-*.tar", 0.5, "co3d/held-out-*.tar"),
           configs.Source("re10k", "re10k", "re10k/train-*.tar", 0.5, "re10k/held-out-*.tar"))
SIZE, VIEWS, HELD_OUT = 32, 4, 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    prepare.main(["synth", "--out", str(folder), "--scenes", "2", "--held-out", str(HELD_OUT),
                  "--views", str(VIEWS), "--size", str(SIZE), "--device", "cpu", "--workers", "1",
                  "--motion", "0.6"])
    return folder


def small(folder, **changes):
    return configs.Config(**{**dict(
        sources=SOURCES, data=str(folder), latent="pixels", prediction="z", image_size=SIZE,
        model_channels=16, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,),
        num_heads=1, norm_groups=8, context_dim=16, mode="7dof", device="cpu", micro_batch=8,
        sample_steps=2, guidance=1.0, eta=0.0, eval_pairs=24, batch_size=8), **changes})


def net_of(config):
    """A small model that answers at all: its last convolution does not start at zero."""
    torch.manual_seed(0)
    net = model.build(config).eval()
    torch.nn.init.normal_(net.model.diffusion_model.out[2].weight, std=0.05)
    return net


def saved(folder, config):
    """A run's folder with one checkpoint."""
    weights = net_of(config).state_dict()
    average = {name: t for name, t in weights.items() if name.startswith("model.")}
    checkpoint.save(folder, 5, weights, average, {}, {"config": asdict(config), "ema_updates": 5})
    return folder


@pytest.fixture(scope="module")
def a_run(shards, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run") / "small", small(shards))


def run(checkpoint, *arguments, data=""):
    """The command in this process, on the run's own patterns in the folder `data`."""
    more = ["--data", str(data)] if data else []
    try:
        command.run("evaluate.py", evaluate.main, *evaluate.parser().parse_known_args(
            [str(checkpoint), *more, *map(str, arguments)]))
    except SystemExit as end:
        return end.code
    return 0


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


# ---- the command

@pytest.fixture(scope="module")
def evaluated(a_run, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    assert run(a_run, "--pairs", 24, "--out", out, data=shards) == 0
    return out


def test_an_evaluation_leaves_figures_pairs_and_cases(evaluated, shards, a_run, capsys):
    found, config = metrics_of(evaluated), small(shards)
    methods = {"this model", "repeat the view", "its mean colour", "warp by depth"}
    assert set(found["methods"]) == methods and found["pairs"] == len(rows_of(evaluated)) == 24
    for figures in found["methods"].values():
        assert {"psnr", "ssim", "sharpness", "reprojection", "camera_margin", "camera_found"} == set(figures)
    assert set(found["sources"]) == {"co3d", "re10k"}
    assert sum(row["psnr"]["n"] for row in found["distances"].values()) == 24
    assert any("LPIPS is left out" in note for note in found["notes"])
    assert any("CLIP similarity is left out" in note for note in found["notes"])
    sheet = Image.open(evaluated / "cases.png")
    assert sheet.height > 12 * 128 and sheet.width > 4 * 128
    # the figures of the loop inside training are the same
    net = net_of(config)
    rows = score.score(net, score.held_out_pairs(config, 24), config, score.FAST)
    for method, figures in score.summarize(rows)["methods"].items():
        for name in ("psnr", "ssim"):
            mean = found["methods"][method][name]["mean"]
            assert mean == pytest.approx(figures[name]["mean"], 1e-5)


def test_the_warp_is_better_than_what_knows_no_camera(evaluated):
    mean = {m: figures["psnr"]["mean"] for m, figures in metrics_of(evaluated)["methods"].items()}
    assert mean["warp by depth"] > max(mean["repeat the view"], mean["its mean colour"]) + 1
    assert metrics_of(evaluated)["methods"]["warp by depth"]["camera_found"]["mean"] == 1


def test_two_processes_find_exactly_what_one_does(evaluated, shards, a_run, tmp_path, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [forked.Popen("evaluate.py", a_run, "--pairs", "24", "--out", tmp_path, "--data", shards, env={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port)}) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert capfd.readouterr().out.count("camera distance") == 1
    assert (tmp_path / "pairs.jsonl").read_bytes() == (evaluated / "pairs.jsonl").read_bytes()
    assert (tmp_path / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()


def test_a_seed_gives_its_pairs_and_another_seed_others(a_run, shards, evaluated, tmp_path):
    for seed, name in ((42, "same"), (43, "other")):
        assert run(a_run, "--pairs", 12, "--seed", seed, "--out", tmp_path / name, data=shards) == 0
    uids = [[row["uid"] for row in rows_of(folder)]
            for folder in (evaluated, tmp_path / "same", tmp_path / "other")]
    assert uids[0][:12] == uids[1] and not set(uids[1]) >= set(uids[2])


def test_clip_is_there_when_its_weights_are_given_and_lpips_by_its_judge(a_run, shards, tmp_path,
                                                                         monkeypatch):
    torch.manual_seed(0)
    tower = clip.CLIP(embed_dim=16, image_resolution=32, vision_layers=1, vision_width=64,
                      vision_patch_size=16, context_length=8, vocab_size=32, transformer_width=64)
    torch.save(tower.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(metrics, "load_lpips", lambda net, path, device:
                        lambda view, truth: (view - truth).abs().mean((1, 2, 3)))
    assert run(a_run, "--pairs", 4, "--out", tmp_path, "--lpips", "alex", "file", "--clip",
               tmp_path / "clip.pt", data=shards) == 0
    found = metrics_of(tmp_path)
    assert found["notes"] == []
    assert 0 < found["methods"]["warp by depth"]["lpips_alex"]["mean"] \
        < found["methods"]["its mean colour"]["lpips_alex"]["mean"]
    assert -1 <= found["methods"]["this model"]["clip"]["mean"] <= 1


def test_nothing_that_a_checkpoint_names_is_opened(shards, tmp_path, capsys):
    touched = tmp_path / "touched"
    for pattern in (f"pipe:touch {touched}", "http://127.0.0.1:9/a.tar", str(shards / "co3d/*.tar"),
                    "../x/held-out-*.tar"):
        sources = (configs.Source("co3d", "co3d", "train-*.tar", 1.0, pattern),)
        folder = saved(tmp_path / "run", small(shards, sources=sources))
        assert run(folder, "--pairs", 4) == 2
        assert "--data FOLDER or --config FILE" in capsys.readouterr().err
        assert run(folder, "--pairs", 4, data=shards) == 2
        said = capsys.readouterr().err
        assert "not inside of --data" in said and said.count("\n") == 1
    assert not touched.exists()


def test_data_of_another_configuration_serve_a_checkpoint_without_its_own(shards, tmp_path, capsys):
    nowhere = (configs.Source("none", "co3d", "none", 1.0),)
    folder = saved(tmp_path / "run", small("/nowhere", sources=nowhere))
    assert run(folder, "--pairs", 4, data=shards) == 2
    assert "no source has held_out shards" in capsys.readouterr().err
    path = tmp_path / "there.py"
    path.write_text("from configs import Config, Source\n"
                    f"config = Config(sources={SOURCES!r}, data={str(shards)!r})\n")
    assert run(folder, "--pairs", 4, "--config", path, "--out", tmp_path) == 0
    assert metrics_of(tmp_path)["pairs"] == 4


def test_a_full_disk_is_named_and_leaves_no_half_of_a_file(a_run, shards, tmp_path, capsys,
                                                           monkeypatch):
    import runtime.files

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(runtime.files.os, "fsync", full)
    assert run(a_run, "--pairs", 4, "--out", tmp_path, data=shards) == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl" in said and "No space left" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, message", [
    (["--pairs", "5000"], "5000 held-out pairs are asked for, but there are 384"),
    (["--clip", "/nowhere.pt"], "/nowhere.pt"),
    (["--mode=3dof"], "--mode belongs to the training of the run"),
    (["--sampel_steps=3"], "did you mean --sample_steps?"),
    (["--data=/nowhere"], "no shards at /nowhere"),
    (["--pairs", "1"], "1 is not possible"),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(a_run, shards, capsys, arguments, message):
    assert run(a_run, *arguments, data=shards) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("evaluate.py: ") and message in said


def test_a_missing_checkpoint_and_shards_of_another_size_are_one_line(shards, tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "no checkpoint" in capsys.readouterr().err
    folder = saved(tmp_path / "large", small(shards, image_size=64))
    assert run(folder, "--pairs", 4, data=shards) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "32x32, the short side must be 64" in said


# ---- pairs and figures

def test_what_is_known_of_a_pair_that_replaces_a_damaged_one_is_its_own(shards, monkeypatch):
    config = small(shards, mode="7dof_quantile_scale")      # its pairs bring their depth
    pairs = score.held_out_pairs(config, 8)
    right, fails = scenes.RawScenes.pair, set()

    def pair(reader, mode, *place):
        if len(fails) < 8 and place not in fails:
            fails.add(place)
            raise shards_file.Damaged("here", "damaged")
        return right(reader, mode, *place)

    monkeypatch.setattr(scenes.RawScenes, "pair", pair)
    replaced = 0
    for place in range(8):
        batch = score.batch_of(pairs, [place], depths=True)
        replaced += bool(batch["damage"][0])
        assert torch.equal(batch["depth_cond"], batch["depths"][:, 0])
        source, uid = batch["source"][0], batch["uid"][0]
        assert batch["scene"] == [f"{source}: {uid.rpartition(':')[0]}"]
    assert replaced > 0


def test_the_standard_error_is_the_usual_one_for_one_pair_a_scene_and_not_fooled_by_copies():
    values = np.random.default_rng(0).normal(size=40)
    mean, error, count = score.mean_and_error(values.tolist(), range(40))
    assert mean == pytest.approx(values.mean()) and count == 40
    assert error == pytest.approx(values.std(ddof=1) / 40**0.5)
    copied = score.mean_and_error(values.tolist() * 5, [*range(40)] * 5)
    assert copied[:2] == pytest.approx((mean, error))


def rows_with(**psnr):
    """Rows of one pair a scene, by {method: list of PSNR}."""
    return [{"uid": str(i), "scene": str(i), "source": "s", "distance": 1.0,
             "scores": {method.replace("_", " "): {"psnr": p} for method, p in zip(psnr, each)}}
            for i, each in enumerate(zip(*psnr.values()))]


@pytest.mark.parametrize("lead, verb", [(1.0, "beats"), (-1.0, "loses to"), (0.0, "equals")])
def test_the_verdict_of_the_report_takes_three_standard_errors(lead, verb):
    rows = rows_with(this_model=[20 + lead + 0.1 * (-1)**i for i in range(20)],
                     repeat_the_view=[20.0] * 20, its_mean_colour=[10.0] * 20)
    assert f"the model {verb}" in score.report(rows)[-1]
    assert "(repeat the view)" in score.report(rows)[-1]


def test_the_error_of_one_scene_is_over_the_views_that_are_made_and_told_to_be_its_own():
    rows = [{"uid": f"{j}->{i}", "scene": "a", "source": "s", "distance": 1.0,
             "scores": {method: {"psnr": base + i} for method, base in
                        (("this model", 10.0), ("repeat the view", 12.0))}} for i in range(2) for j in range(3)]
    found = score.summarize(rows)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["methods"]["this model"]["psnr"] == {"mean": 10.5, "se": 0.5, "n": 6}
    lines = "\n".join(score.report(rows))
    assert "loses to the best baseline (repeat the view): -2.00 dB +- 0.00, on one scene" in lines
    assert "nan" not in lines
    alone = rows_with(this_model=[10.0], repeat_the_view=[12.0])
    assert "on one scene" in score.report(alone)[-1] and "nan" not in "".join(score.report(alone))


# ---- a model that is broken on purpose

def oracle(broken):
    """Views of a perfect model that believes what `broken` makes of its pose vectors, mode 7dof."""
    def views_of(net, batch, config, depth_net=None):
        T = broken(depth.pose_vector(batch, config.mode), batch["radius"])
        pose = T[:, :16].view(-1, 4, 4).double()
        views = []
        for i, uid in enumerate(batch["uid"]):
            scene = synth.scene(0, int(uid.split(":")[1].split("/")[1]))
            c2w = batch["cond_c2w"][i] @ pose[i]
            views.append(synth.render(scene, c2w[None], scene.fov, SIZE)[0][0])
        views = torch.nn.functional.avg_pool2d(torch.stack(views), 3, 1, 1, count_include_pad=False)
        return views, data.images(batch["image_cond"]), data.images(batch["image_target"])
    return views_of


def in_unit(T, unit):
    """The pose vectors with translations multiplied by (b,) lengths."""
    T = T.clone()
    T[:, [3, 7, 11]] *= unit.float()[:, None]
    return T


def negated(T, unit):
    T = in_unit(T, unit)
    T[:, :16] = torch.linalg.inv(T[:, :16].view(-1, 4, 4)).flatten(1)
    return T


def test_broken_runs_are_told_apart_by_the_epipolar_figure(shards, monkeypatch):
    config = small(shards)
    pairs = score.held_out_pairs(config, 64)

    def rows(broken):
        monkeypatch.setattr(score, "views_of", oracle(broken))
        return score.score(net_of(config), pairs, config, {"psnr": metrics.psnr}, follows=True)

    right = rows(in_unit)
    assert score.summarize(right)["methods"]["this model"]["camera_found"]["mean"] > 0.9
    ways = {"camera negated": negated, "scale ignored": lambda T, unit: T,
            "conditions shuffled": lambda T, unit: in_unit(T, unit).roll(1, 0)}
    for name, broken in ways.items():
        wrong = rows(broken)
        for figure in ("reprojection", "camera_margin", "camera_found"):
            mean, error, count = score.mean_of(right, "this model", figure, "this model", wrong)
            assert count > 50 and mean > max(5 * error, 0), (name, figure, mean, error)


# ---- validation

def test_the_validation_loss_is_the_mean_square_of_the_latents_for_a_model_that_says_zero(shards):
    config = small(shards)
    net = model.build(config).eval()            # its last convolution starts at zero
    pairs = score.held_out_pairs(config, 12)
    targets = torch.stack([data.images(pairs[k]["image_target"]) for k in range(12)])
    losses = score.validation_loss(net, pairs, config)
    assert list(losses) == ["0-249", "250-499", "500-749", "750-999"]
    for loss in losses.values():
        assert loss == pytest.approx(targets.square().mean().item(), rel=1e-5)


def test_validation_has_fixed_timesteps_and_noise_whatever_the_batches(shards, monkeypatch):
    config = small(shards)
    net, pairs, seen = net_of(config), score.held_out_pairs(config, 12), []
    forward = net.forward

    def spy(*arguments):
        seen.append(arguments[5].t)
        assert arguments[6] == (0, 0, 0)
        return forward(*arguments)

    monkeypatch.setattr(net, "forward", spy)
    first = score.validation_loss(net, pairs, config)
    bands = [torch.cat(seen[band::4]) for band in range(4)]
    for band, t in enumerate(bands):
        assert len(t) == 12 and (t >= 250 * band).all() and (t < 250 * (band + 1)).all()
        assert len(set(t.tolist())) > 6
    again = score.validation_loss(net, pairs, replace(config, micro_batch=5))
    assert_close(list(again.values()), list(first.values()), rtol=1e-5, atol=0)
    other = score.validation_loss(net, pairs, replace(config, seed=1))
    assert other["750-999"] != first["750-999"]


def test_a_validation_takes_few_steps_and_says_what_the_log_needs(shards, monkeypatch):
    config = small(shards, sample_steps=50, validate_steps=3, validate_pairs=12, micro_batch=12)
    net, calls = net_of(config), []
    eps = net.eps
    monkeypatch.setattr(net, "eps", lambda *a: calls.append(1) or eps(*a))
    found = score.validate(net, score.held_out_pairs(config, 24), config)
    assert len(calls) == 3
    assert list(found) == ["val_psnr", "val_ssim", "val_baseline_psnr", "val_loss",
                           "val_loss_0-249", "val_loss_250-499", "val_loss_500-749",
                           "val_loss_750-999"]
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.values())
    repeated = score.summarize(score.score(net, score.held_out_pairs(config, 12), config,
                                           score.FAST))["methods"]
    best = max(repeated[name]["psnr"]["mean"] for name in ("repeat the view", "its mean colour"))
    assert found["val_baseline_psnr"] == pytest.approx(best, rel=1e-5)
