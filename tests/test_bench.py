"""bench.py: rows, their table, and the file that loading is measured on."""

import json

import pytest
import torch

import bench
import benchmarks
import checkpoint
import configs
import model
from benchmarks import data as bench_data
from benchmarks import load


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
    rows = [benchmarks.row("a", 1.0, "s"), benchmarks.row("longer name", 123.456, "s", "peer", 61.728)]
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
    assert {"data: PNG, one process", "data: JPEG, loader of 1", "data: encoded shards, one process",
            "data: index build, one thread"} <= set(rows)
    assert rows["data: members of a large set"]["value"] == pytest.approx(0.072)
    assert 0 < rows["data: its indexes on disk, mapped"]["value"] < 40
    assert rows["data: PNG, read a pair"]["ratio"] < 1.1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "shards are left behind"
