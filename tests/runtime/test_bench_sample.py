"""bench.py sample and encode, on networks of a few kilobytes; variants that fail or hang."""

import json
import time

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import encode, sample, variants


def rows_of(capsys, tmp_path, *argv):
    file = tmp_path / "rows.json"
    bench.main([*argv, "--tiny", "--json", str(file)])
    return {row["name"]: row for row in json.loads(file.read_text())}, capsys.readouterr().out


def test_views_are_timed_beside_the_references_way(tmp_path, capsys):
    rows, said = rows_of(capsys, tmp_path, "sample", "--views", "1", "2", "--variants", "ceiling",
                         "graph", "reference")
    here = rows["sample: here, 1 view"]
    assert here["unit"] == "s/view" and here["value"] > 0 and here["ceiling_share"] > 0
    assert here["peer"] == "sample: the reference's way, 1 view"
    assert here["ratio"] == pytest.approx(here["value"] / here["peer_value"])
    assert "sample: here, 2 views at once" in rows
    assert rows["sample: here, DPM-Solver++ 20 steps"]["peer"] == "sample: here, 1 view"
    # printed when they are measured, and once more in the table
    assert said.count("sample: here, 2 views at once  ") == 2


def test_encoders_are_timed_alone_and_together(tmp_path, capsys):
    rows, _ = rows_of(capsys, tmp_path, "encode", "--variants", "ceiling", "eager", "autocast")
    rates = [rows[f"encode: {part}, eager"]["value"] for part in ("VAE", "CLIP")]
    together = rows["encode: both, eager"]["value"]
    assert together == pytest.approx(1 / sum(1 / rate for rate in rates))
    assert rows["encode: VAE, eager, autocast"]["ceiling_share"] > 0


def test_a_variant_that_fails_or_hangs_costs_the_others_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variants, "ROOT", tmp_path)
    (tmp_path / "some.py").write_text(
        "import json, sys, time\n"
        "job = json.loads(sys.argv[1])\n"
        "print('ROW', json.dumps({'name': job['name'], 'value': 1.0, 'unit': 's'}), flush=True)\n"
        "if job['name'] == 'hangs': time.sleep(60)\n"
        "if job['name'] == 'fails': raise ValueError('why it failed')\n")
    started = time.monotonic()
    jobs = [{"name": name, "limit": 5.5} for name in ("fails", "hangs", "works")]
    assert list(variants.collect("some", jobs, 60)) == ["fails", "hangs", "works"]
    assert time.monotonic() - started < 30
    said = capsys.readouterr().out
    assert "why it failed" in said and "hangs: stopped after 6 s" in said
    assert variants.collect("some", jobs, 1) == {}
    assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["sample", "--views", "0"], ["sample", "--seconds-limit", "0"],
                                  ["encode", "--batch", "0"]])
def test_senseless_options_are_refused(argv):
    with pytest.raises(ValueError, match="positive"):
        bench.main(argv)


@pytest.mark.parametrize("tiny", [True, False])
def test_the_peers_have_as_many_parameters(tiny):
    pytest.importorskip("diffusers", reason="a peer: pip install --no-deps diffusers")
    pytest.importorskip("transformers", reason="a peer: pip install transformers")

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        ours, theirs = (count(sample.unet_of(tiny, peer)) for peer in (False, True))
        assert ours == theirs and (tiny or ours == 859_532_484)
        ours, theirs = (count(sample.autoencoder_of(tiny, peer).decoder) for peer in (False, True))
        assert ours == theirs
        ours, theirs = (table["VAE"](tiny)[0] for table in (encode.OURS, encode.PEERS))
        assert count(ours) == count(theirs)
        ours, theirs = (table["CLIP"](tiny)[0] for table in (encode.OURS, encode.PEERS))
        assert count(ours.visual) == count(theirs) - count(theirs.before)
