"""bench.py: rows, their table, and the file that loading is measured on."""

import argparse
import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as bench
import benchmarks
from runtime import checkpoint
import configs
import model
import vae
from benchmarks import data as bench_data
from benchmarks import load
from benchmarks import train as bench_train
from benchmarks import variants


@pytest.fixture
def small(monkeypatch):
    """Benchmarks run on a network of a few kilobytes."""
    def tiny(channels):
        source = configs.Source("s", "co3d", "*.tar", 1.0)
        config = configs.Config((source,), mode="3dof", latent="pixels", image_size=16,
                                model_channels=32, channel_mult=(1,), num_res_blocks=1,
                                attention_resolutions=(1,), num_heads=2, context_dim=8)
        with torch.device("meta"):
            return model.build(config)
    monkeypatch.setattr(load, "zero123", tiny)
    monkeypatch.setattr(load, "in_fresh_process", lambda function, *given: function(*given))


def test_a_row_leaves_out_what_does_not_apply():
    found = benchmarks.row("speed", 6.0, "pairs/s", "theirs", 4.0)
    assert found["ratio"] == 1.5 and "ceiling_share" not in found
    assert found["torch"] == torch.__version__ and found["hardware"]
    assert "peer" not in benchmarks.row("speed", 6.0, "pairs/s")


def test_the_table_is_aligned_and_names_every_row():
    rows = [benchmarks.row("a", 1.0, "s"),
            benchmarks.row("longer name", 123.456, "s", "peer", 61.728)]
    lines = benchmarks.table(rows).splitlines()
    assert [line.index(" s") for line in lines[1:]] == [lines[0].index("unit") - 1] * 2
    assert "2.00" in lines[2] and "123.5" in lines[2]


def test_the_synthetic_file_has_weights_average_and_moments_of_random_bytes(tmp_path, small):
    path = tmp_path / "x.ckpt"
    load.synthetic_checkpoint(path, 32)
    assert path.stat().st_size == pytest.approx(load.file_bytes(32), rel=0.3)
    file = torch.load(path, weights_only=True)
    names = set(load.zero123(32).state_dict())
    unet = {name for name in names if name.startswith(checkpoint.UNET)}
    assert set(file["state_dict"]) == names | {checkpoint.ema_name(name) for name in unet}
    moments = file["optimizer_states"][0]["state"]
    assert len(moments) == len(unet) + 2 and len({"exp_avg", "exp_avg_sq"} & set(moments[0])) == 2
    largest = max(file["state_dict"].values(), key=torch.numel)
    assert largest.view(torch.uint8).unique().numel() > 200


def test_loading_is_measured_and_its_rows_written(tmp_path, small, capsys):
    bench.main(["load", "--folder", str(tmp_path), "--repeat", "1",
                "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {"load: time, from the cache", "load: peak memory"} <= {row["name"] for row in rows}
    assert all(row["value"] > 0 and row["unit"] in ("s", "GB") for row in rows)
    assert "torch.load(mmap=True)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "the file is left behind"


def test_the_benchmarks_refuse_senseless_options(tmp_path, small):
    with pytest.raises(ValueError, match="repeat"):
        bench.main(["load", "--folder", str(tmp_path), "--repeat", "0"])


def test_pairs_are_measured_beside_decoding_and_within_the_bytes_of_their_members(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "in_fresh_process", lambda function, *given: function(*given))
    threads = torch.get_num_threads()
    bench.main(["data", "--folder", str(tmp_path), "--scenes", "2", "--views", "4", "--pairs", "16",
                "--formats", "PNG", "JPEG", "--workers", "1", "--many", "400", "--json",
                str(tmp_path / "rows.json")])
    torch.set_num_threads(threads)
    rows = {}
    for row in json.loads((tmp_path / "rows.json").read_text()):
        rows.setdefault(row["name"], row)
    assert {"data: PNG, one process", "data: JPEG, loader of 1",
            "data: encoded shards, one process", "data: index build, one thread"} <= set(rows)
    assert rows["data: members of a large set"]["value"] == pytest.approx(0.072)
    assert 0 < rows["data: its indexes on disk, mapped"]["value"] < 40
    assert rows["data: PNG, read a pair"]["ratio"] < 1.1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "shards are left behind"


# ---- bench.py train

def test_steps_are_measured_each_variant_in_its_process_and_a_failure_costs_the_others_nothing(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench_train.VARIANTS, "diffusers-eager",
                        replace(bench_train.VARIANTS["diffusers-eager"], seconds=0))
    bench.main(["train", "--tiny", "--batch", "1", "--variants", "diffusers-eager", "eager",
                "reference", "--json", str(tmp_path / "rows.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    speeds = [name for name, row in rows.items() if row["unit"] == "pairs/s"]
    assert speeds == ["train: eager, batch 1", "train: the reference's way, batch 1"]
    assert all(row["value"] > 0 for row in rows.values())
    assert "diffusers-eager at batch 1: no time left" in capsys.readouterr().out


def test_the_first_variant_is_measured_at_every_batch_before_the_others():
    given = argparse.Namespace(where="", batch=[192, 48], tiny=False,
                               variants=["compiled", "ceilings", "eager"])
    assert [(job["variant"], job["batch"]) for job in bench_train.jobs(given)] == [
        ("ceilings", 192), ("compiled", 192), ("compiled", 48), ("eager", 192), ("eager", 48)]


def test_a_variant_that_fails_or_hangs_says_so(capsys):
    job = {"name": "it", "variant": "none such", "batch": 1, "tiny": True, "where": False}
    assert list(variants.ask("benchmarks.train", job, 60)) == []
    assert "it failed:\nTraceback" in capsys.readouterr().out
    job["variant"] = "reference"
    assert list(variants.ask("benchmarks.train", {**job, "batch": 10**6}, variants.SHORTEST)) == []
    assert "it: stopped after 5 s" in capsys.readouterr().out


def test_a_step_from_images_has_the_frozen_networks_in_it(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    variant, calls = replace(bench_train.VARIANTS["images"], compiled=""), []
    encode = vae.AutoencoderKL.encode
    monkeypatch.setattr(vae.AutoencoderKL, "encode",
                        lambda self, x: (calls.append(len(x)), encode(self, x))[1])
    bench_train.training(variant, torch.device("cpu"), 3, True, False)
    said = capsys.readouterr().out
    assert set(calls) == {3} and len(calls) >= 4        # two encodings a step
    assert "train: compiled, from images, batch 3" in said and "pairs/s" in said


def test_where_the_time_goes_adds_up_to_a_step(tmp_path, capsys):
    bench.main(["train", "--tiny", "--batch", "1", "--where", "eager", "--json",
                str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    found = {row["name"].partition("batch 1: ")[2]: row["value"] for row in rows}
    assert {"convolutions and products", "norms", "attention", "gaps"} <= set(found)
    assert "aten::native_group_norm" in capsys.readouterr().out


@pytest.mark.parametrize("kernel, kind", [
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolutions and products"),
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "convolutions and products"),
    ("triton_poi_fused__to_copy_12", "copies and layouts"),
    ("triton_poi_fused_add_mul_silu_3", "pointwise"),
    ("triton_red_fused_native_layer_norm_backward_7", "norms"), ("moments_kernel", "norms"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>",
     "optimizer and average"),
    ("triton_per_fused_sum_4", "reductions"), ("Memcpy DtoD (Device -> Device)",
                                               "copies and layouts")])
def test_kernels_are_counted_by_kind(kernel, kind):
    assert variants.kind(kernel) == kind


def test_halves_train_as_autocast_does():
    """Two micro-steps of weights in bf16 beside their masters: the same gradients, in fp32."""
    torch.manual_seed(0)
    config = bench_train.made_config(True, 2)
    net = bench_train.network(config)
    for parameter in net.parameters():      # numbers of bf16, whose sums as taps are then the same
        torch.nn.init.normal_(parameter, std=0.05)
        parameter.data = parameter.data.bfloat16().float()
    twin = copy.deepcopy(net)
    masters = dict(net.named_parameters())
    halves = bench_train.Halves(net.model.diffusion_model)
    given = bench_train.pairs(config, 2, torch.device("cpu"))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            net(*given).mean().backward()
            twin(*given).mean().backward()
        halves.collect()
    for name, parameter in twin.named_parameters():
        assert masters[name].dtype == torch.float32
        if parameter.requires_grad and parameter.grad is not None:
            # gradients of taps after an upsampling are summed, then rounded to the weights' type
            rounded = {"rtol": 2**-7, "atol": 1e-5} if name.endswith(".conv.weight") else {}
            torch.testing.assert_close(masters[name].grad, parameter.grad, **rounded)
    with torch.no_grad():
        halves.masters[0].add_(1)
    halves.refresh()
    assert torch.equal(halves.halves[0], halves.masters[0].bfloat16())
