"""encode.py: encoded shards hold what the networks make of raw ones, and train to the same loss."""

import copy
import json
import multiprocessing
import os
import re
import socket
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from made import all_pairs, read_source, rewritten
from torch.nn import functional as F

from runtime import checkpoint
import clip
import depth
import diffusion
import model
import prepare
import train
import vae
from configs import Config, Source
from captures import encode
from captures import writer

SIDE, MODE = 32, "7dof_quantile_scale"


def small_networks(depth_net=None, blend=True):
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    embedder = clip.CLIP(embed_dim=24, image_resolution=32, vision_layers=1, vision_width=64,
                         vision_patch_size=16)
    return encode.Frozen(autoencoder, embedder, depth_net, blend).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Raw shards of both formats, two of co3d."""
    folder = tmp_path_factory.mktemp("rendered")
    prepare.main(["synth", "--out", str(folder), "--scenes", "6", "--held-out", "2", "--size",
                  str(SIDE), "--views", "3", "--workers", "1", "--device", "cpu",
                  "--scenes-per-shard", "2"])
    return folder


def run(folder, out, pattern="*/train-*.tar", networks=None, **changes):
    options = {"shards": [str(folder / pattern)], "weights": "w.ckpt", "depth_weights": "",
               "quantile_blend": True, "out": str(out), "format": "", "batch": 5,
               "precision": "fp32", "compile": False, "device": "cpu", "loaders": 0,
               "overwrite": False, "dry_run": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "load", lambda *given: networks or small_networks())
        encode.run(Namespace(**{**options, **changes}))
    return out


@pytest.fixture(scope="module")
def encoded(rendered, tmp_path_factory):
    return run(rendered, tmp_path_factory.mktemp("encoded"))


def sources(rendered, encoded, format):
    raw = read_source(rendered, f"{format}/train-*.tar", format=format, side=SIDE)
    return raw, read_source(encoded, f"{format}/train-*.tar", format="encoded", side=SIDE)


@pytest.mark.parametrize("format", ["co3d", "re10k"])
def test_every_view_is_what_the_networks_make_of_it(rendered, encoded, format):
    raw, made = sources(rendered, encoded, format)
    assert made.counts.tolist() == raw.counts.tolist() and len(raw) == 3
    networks = small_networks()
    for scene in range(len(raw)):
        known = raw.scene(scene)
        for view in range(3):
            pair = made.pair(MODE, scene, view, view)
            assert known.name in pair["uid"]
            image = encode.images(raw.image(scene, view))[None]
            sparse_depth = torch.from_numpy(raw.depth(scene, view))[None]
            moments, embedding, scale = networks(image, sparse_depth)
            # rounded to half a unit in the last of float16's eleven bits
            np.testing.assert_allclose(pair["moments_target"][None], moments, rtol=2**-11, atol=1e-6)
            np.testing.assert_allclose(pair["mean_cond"][None], moments[:, :4], rtol=2**-11, atol=1e-6)
            np.testing.assert_allclose(pair["clip_cond"][None], embedding, rtol=2**-11, atol=1e-6)
            assert pair["scale"] == scale.item()
            assert np.array_equal(pair["target_c2w"], known.c2w[view, :3])
            assert pair["fov"] == known.fov and pair["radius"] == known.radius
        assert pair["nearplane"] == raw.nearplane(scene)


@pytest.mark.parametrize("mode", ["7dof_quantile_scale", "7dof", "7dof_stereomag_scale", "3dof"])
def test_training_on_encoded_shards_has_the_loss_of_training_on_raw_ones(rendered, encoded, mode):
    networks = small_networks()
    config = Config((Source("s", "co3d", "*.tar", 1.0),), mode=mode, image_size=SIDE,
                    channel_mult=(1,), context_dim=16)
    torch.manual_seed(1)
    unet = model.UNet(8, 4, 32, (1, 2), 1, (1, 2), 2, 16)
    net = model.ZeroNVS(unet, networks.first_stage_model, networks.cond_stage_model.model, mode,
                        vae.SCALE_FACTOR, 24, 16, "eps").train()
    losses = []
    for source in sources(rendered, encoded, "co3d"):
        batch = all_pairs(source, mode).__getitems__(list(range(12)))
        given = train.inputs(net, batch, config, None, torch.device("cpu"))
        draws = diffusion.draw(config.seed, batch["number"], (4, 4, 4))
        losses.append(net(*given, draws, (0.0, 0.0, 0.0)).detach())
    assert len(losses[0]) == 12 and losses[0].min() > 0.1
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)     # float16's rounding


def test_the_networks_come_out_of_a_whole_checkpoint(tmp_path, monkeypatch):
    networks = small_networks()
    rest = ("cc_projection.weight", checkpoint.INPUT_CONV,
            checkpoint.ema_name(checkpoint.INPUT_CONV))
    torch.save({"state_dict": {**networks.state_dict(), **dict.fromkeys(rest, torch.ones(2))}},
               tmp_path / "w.ckpt")
    autoencoder, embedder = networks.first_stage_model, networks.cond_stage_model.model
    monkeypatch.setattr(encode.vae, "AutoencoderKL", lambda: copy.deepcopy(autoencoder))
    monkeypatch.setattr(encode.clip, "CLIP", lambda: copy.deepcopy(embedder))
    found = encode.load(tmp_path / "w.ckpt", "", True, torch.device("cpu")).state_dict()
    assert all(torch.equal(found[name], value) for name, value in networks.state_dict().items())


def test_every_rank_encodes_on_a_device_of_its_own(rendered, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(encode, "own_device", lambda device: asked.append(device) or device)
    run(rendered, tmp_path)
    assert asked == [torch.device("cpu")]


def test_compiled_networks_see_batches_of_one_size(rendered, encoded, tmp_path, monkeypatch,
                                                   capsys):
    """Else the last views of every shard would be compiled for anew."""
    seen, whole = [], encode.Frozen.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(encode.Frozen, "forward", lambda self, image, known:
                        seen.append(len(image)) or whole(self, image, known))
    run(rendered, tmp_path, compile=True, batch=4)
    assert set(seen) == {4} and len(seen) == 6          # four shards, of 6 and 3 views, twice
    for format in ("co3d", "re10k"):
        _, once = sources(rendered, encoded, format)
        _, compiled = sources(rendered, tmp_path, format)
        a, b = (all_pairs(source, MODE).__getitems__(list(range(12)))
                for source in (once, compiled))
        torch.testing.assert_close(a["moments_target"], b["moments_target"], rtol=0, atol=1e-3)
        assert a["uid"] == b["uid"]
    told = capsys.readouterr().out
    assert re.search(r"rank 0: 4 shards, 18 views in [\d.]+ s: [\d.]+ views/s on cpu\n", told)


def test_a_run_goes_on_where_it_stopped_with_the_same_bytes(rendered, tmp_path, encoded):
    out = run(rendered, tmp_path / "out", pattern="co3d/train-*.tar")
    paths = sorted(out.glob("*.tar"))
    before = [path.read_bytes() for path in paths]
    assert before == [path.read_bytes() for path in sorted((encoded / "co3d").glob("*.tar"))]
    paths[0].unlink()
    times = [path.stat().st_mtime_ns for path in paths[1:]]
    run(rendered, out, pattern="co3d/train-*.tar")
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times


def test_other_arguments_in_the_same_folder_are_refused(rendered, encoded):
    with pytest.raises(ValueError, match=r"weights w.ckpt .*\) there, other.ckpt .*\) now"):
        run(rendered, encoded, weights="other.ckpt")
    other = small_networks()
    other.first_stage_model.quant_conv.weight += 1      # a file of the same name
    with pytest.raises(ValueError, match=r"weights w.ckpt .*\) there, w.ckpt .*\) now"):
        run(rendered, encoded, networks=other)


def damaged_shard(rendered, path, *damaged):
    """A copy of a shard of two scenes without the bytes of those members."""
    with tarfile.open(rendered / "co3d/train-000000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    found = [name for name in members if any(part in name for part in damaged)]
    assert found
    writer.write_shard(path, [[(name, b"" if name in found else content)
                               for name, content in members.items()]])


def test_a_damaged_first_image_costs_no_more_than_its_view(rendered, tmp_path, capsys):
    first = "arc/0000000000"
    damaged_shard(rendered, tmp_path / "raw/a.tar", f"{first}/frame000001.png")
    damaged_shard(rendered, tmp_path / "raw/b.tar", "frame000001.png", "frame000002.png")
    for _ in range(2):          # and again
        run(tmp_path / "raw", tmp_path / "out", "*.tar")
        assert "b.tar: none of its 2 scenes has 2 views" in capsys.readouterr().err
        assert not (tmp_path / "out/b.tar").exists()
    made = read_source(tmp_path / "out", "a.tar", format="encoded", side=SIDE)
    assert made.counts.tolist() == [2, 3]
    left_out = json.loads((tmp_path / "out/a.json").read_text())["left_out"]
    assert len(left_out) == 1 and f"{first}/frame000001: " in left_out[0]


def of_rank(rank, port, rendered, out, box):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    write = encode.write_shard

    def noted(path, members):
        write(path, members)
        box.put((rank, path.name))
    encode.write_shard = noted
    run(rendered, out, overwrite=True)
    box.close()


def test_ranks_divide_the_shards(rendered, encoded, tmp_path):
    """With --overwrite, on other weights' shards: what one rank deletes no other takes as made."""
    run(rendered, tmp_path, weights="other.ckpt", pattern="co3d/train-*.tar")
    (tmp_path / "co3d").mkdir()
    for path in tmp_path.glob("train-*"):
        path.rename(tmp_path / "co3d" / path.name)
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = context.Queue()
    ranks = [context.Process(target=of_rank, args=(rank, port, rendered, tmp_path, box))
             for rank in (0, 1)]
    for process in ranks:
        process.start()
    made = [box.get(timeout=120) for _ in range(4)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert sorted(rank for rank, _ in made) == [0, 0, 1, 1]
    paths = sorted(encoded.rglob("*.tar"))
    assert len(paths) == 4
    for path in paths:
        assert path.read_bytes() == (tmp_path / path.relative_to(encoded)).read_bytes()


def test_shards_of_two_sets_do_not_pass_for_one_another(rendered, tmp_path):
    run(rendered, tmp_path, pattern="co3d/train-*.tar")
    with pytest.raises(ValueError, match="train-000000.tar was made of .*co3d.* choose another"):
        run(rendered, tmp_path, pattern="re10k/train-*.tar")


def test_a_view_that_cannot_be_read_is_left_out_and_named(rendered, tmp_path, capsys):
    def spoil(name, content):
        return b"text" if name.endswith("frame000002.png") else content
    (tmp_path / "raw").mkdir()
    rewritten(rendered / "co3d" / "train-000000.tar", tmp_path / "raw" / "a.tar", spoil)
    run(tmp_path / "raw", tmp_path / "out", pattern="a.tar")
    made = read_source(tmp_path / "out", "a.tar", format="encoded", side=SIDE)
    assert made.counts.tolist() == [2, 2]
    notes = json.loads((tmp_path / "out" / "a.json").read_text())["left_out"]
    assert len(notes) == 2 and "frame000002: image cannot be decoded" in notes[0]
    assert "frame000002: image cannot be decoded" in capsys.readouterr().err


def test_holes_of_depth_need_the_depth_network(rendered, tmp_path, capsys):
    def hole(name, content):
        return with_hole(content) if name.endswith("_depth.png") else content
    (tmp_path / "raw").mkdir()
    rewritten(rendered / "co3d" / "train-000000.tar", tmp_path / "raw" / "a.tar", hole)
    run(tmp_path / "raw", tmp_path / "without", pattern="a.tar")
    assert "6 of the views have no scale" in capsys.readouterr().out
    filled = small_networks(lambda image: F.avg_pool2d(image.mean(1) + 2, 3, 1, 1))
    run(tmp_path / "raw", tmp_path / "with", pattern="a.tar", networks=filled)
    assert "no scale" not in capsys.readouterr().out
    raw = read_source(tmp_path / "raw", "a.tar", side=SIDE)
    made = read_source(tmp_path / "with", "a.tar", format="encoded", side=SIDE)
    image, known = encode.images(raw.image(0, 1))[None], torch.from_numpy(raw.depth(0, 1))[None]
    expected = depth.viewer_scale(known, image, filled.depth_net, True)
    assert (known == 0).any()
    assert made.shards[0].scale[1] == pytest.approx(expected.item(), rel=1e-6)


def with_hole(content):
    """The depth PNG with its first rows unknown."""
    import io

    from PIL import Image
    words = np.array(Image.open(io.BytesIO(content)))
    words[:2] = 0
    file = io.BytesIO()
    Image.fromarray(words.astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


def test_encoded_shards_are_not_encoded_again(encoded, tmp_path):
    with pytest.raises(ValueError, match="is encoded already"):
        run(encoded, tmp_path)
    assert not os.listdir(tmp_path)
