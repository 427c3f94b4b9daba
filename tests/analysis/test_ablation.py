"""compare.py and curves.py: one command that can be cut short, and ends in one table."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from analysis import compare, curves
from runtime import command

ROOT = Path(__file__).parents[2]
TINY = ["--scenes", "4", "--held-out", "4", "--pairs", "8", "--modes", "3dof,7dof",
        "--image_size=16", "--model_channels=16", "--channel_mult=1,1", "--num_res_blocks=1",
        "--norm_groups=8", "--attention_resolutions=2", "--num_heads=1", "--context_dim=16",
        "--steps=4", "--batch_size=4", "--micro_batch=4", "--validate_every=2",
        "--validate_pairs=4",
        "--eval_pairs=0", "--device=cpu", "--compile=false", "--precision=fp32", "--workers=0",
        "--log_every=1", "--save_every=2", "--sample_every=100", "--sample_steps=2"]


def run(folder, *more):
    """The command as a finished process; the scripts that it runs are forks of this one."""
    with (contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch,
          contextlib.redirect_stderr(io.StringIO()) as err):
        patch.setattr(compare, "start", forked.Popen)
        forked.quick(patch)
        try:
            command.run("compare.py", compare.main, *compare.parser().parse_known_args(
                [str(ROOT / "configs" / "ablation.py"), f"--data={folder / 'data'}",
                 f"--out={folder / 'out'}", *TINY, *more]))
            code = 0
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(more, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An ablation that was cut short at once, and then went to its end."""
    folder = tmp_path_factory.mktemp("ablation")
    return folder, run(folder, "--minutes", "0.001"), run(folder)


def test_an_ablation_that_was_cut_short_goes_on_to_its_table(finished):
    folder, first, second = finished
    assert first.returncode == 0 and "the same command goes on from here" in first.stdout
    assert not (folder / "out" / "ablation.json").exists() or second.returncode == 0
    assert second.returncode == 0, second.stderr
    assert "3DoF (3dof)" in second.stdout and "6DoF+1, norm. (7dof)" in second.stdout
    assert "6DoF+1, norm. - 3DoF:" in second.stdout
    found = json.loads((folder / "out" / "ablation.json").read_text())
    assert found["pairs_seen"] == 16 and list(found["modes"]) == ["3dof", "7dof"]
    assert {"warp by depth", "repeat the view"} < set(found["baselines"])
    assert [step["n"] for step in found["differences"]] == [8]
    assert (folder / "out" / "table.txt").stat().st_size > 0
    if importlib.util.find_spec("matplotlib"):      # which is optional
        assert (folder / "out" / "curves.svg").stat().st_size > 0
    else:
        assert "pip install matplotlib" in second.stdout


def test_what_is_done_is_not_done_again(finished):
    folder = finished[0]
    said = [(folder / "out" / f"{mode}.log").read_bytes() for mode in ("3dof", "7dof")]
    scores = [(folder / "out" / mode / "eval" / "metrics.json").stat().st_mtime_ns
              for mode in ("3dof", "7dof")]
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert said == [(folder / "out" / f"{mode}.log").read_bytes() for mode in ("3dof", "7dof")]
    assert scores == [(folder / "out" / mode / "eval" / "metrics.json").stat().st_mtime_ns
                      for mode in ("3dof", "7dof")]
    assert (folder / "out" / "table.txt").read_text().splitlines()[0] in again.stdout


def test_a_run_that_fails_is_named_with_its_reason(finished):
    # the folder holds a run of another learning rate
    failed = run(finished[0], "--lr=0.25", "--steps=9")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    said = failed.stderr.strip().splitlines()[-1]
    assert said.startswith("compare.py: the run of 3dof ended with code 2") and "lr was" in said


@pytest.mark.parametrize("arguments, message", [
    (["--modes", "3dof,8dof"], "mode 8dof is not known"),
    (["--modes", "7dof"], "at least two"),
    (["--pairs", "5000"], "5000 held-out pairs are asked for"),
    (["--stepz=3"], "did you mean --steps?"),
])
def test_bad_input_is_one_clear_line(finished, arguments, message):
    refused = run(finished[0], f"--out={finished[0] / 'bad'}", *arguments)
    assert refused.returncode == 2 and message in refused.stderr.strip().splitlines()[-1]


def test_scripts_that_it_runs_are_the_projects_and_one_that_fails_ends_it(capfd):
    compare.run_script("no", "prepare.py", "--help")
    assert "usage: prepare.py" in capfd.readouterr().out
    with pytest.raises(ValueError, match="no scenes, see above"):
        compare.run_script("no scenes", "prepare.py", "nothing")


def rows(psnr):
    return [{"number": k, "uid": f"a:b/{k}:0->1", "source": "s", "scene": f"s: a:b/{k}",
             "distance": 1.0,
             "scores": {"this model": {"psnr": p}, "repeat the view": {"psnr": 9.0}}}
            for k, p in enumerate(psnr)]


def test_modes_are_compared_pair_by_pair():
    # pairs differ by far more than modes do
    worst = [10.0 * k for k in range(10)]
    better = [p + 0.5 + 0.01 * (-1)**k for k, p in enumerate(worst)]
    lines, found = compare.compare({"3dof": rows(worst), "7dof": rows(better),
                                     "7dof_quantile_scale": rows(better[::-1])})
    assert any("norm. - 3DoF: +0.50 +- 0.00  (better)" in line for line in lines)
    assert any("viewer - 6DoF+1, norm.: -0.00" in line or "viewer - 6DoF+1, norm.: +0.00" in line
               for line in lines)
    assert "equal, within noise" in lines[-1]
    assert found["differences"][0]["psnr_mean"] == pytest.approx(0.5)


# ---- curves

def logged(folder, lines, batch_size=8):
    (folder / "step_00000002").mkdir(parents=True)
    meta = json.dumps({"config": {"batch_size": batch_size}})
    (folder / "step_00000002" / "meta.json").write_text(meta)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_curve_is_over_pairs_seen_and_what_was_repeated_counts_once(tmp_path):
    folder = logged(tmp_path / "a", [{"step": 2, "loss": 1.0}, {"step": 4, "val_psnr": 15.0},
                                     {"step": 6, "val_psnr": 16.0}, {"step": 4, "val_psnr": 15.5}])
    assert curves.read(folder, "val_psnr") == [(32, 15.5), (48, 16.0)]
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 6, "loss_by_timestep": {"0-249": 1.0}}) + "\n")
    with pytest.raises(ValueError, match="no 'loss_by_timestep', it has loss, val_psnr"):
        curves.read(folder, "loss_by_timestep")
    with pytest.raises(ValueError, match="no 'ssim', it has loss, val_psnr"):
        curves.read(folder, "ssim")
    with pytest.raises(FileNotFoundError, match="no run of train.py"):
        curves.read(tmp_path, "ssim")


def draw(*arguments):
    command.run("curves.py", curves.main, curves.parser().parse_args([*map(str, arguments)]))


def test_the_picture_names_every_curve_and_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    a = logged(tmp_path / "a", [{"step": k, "val_psnr": 14 + k / 3} for k in range(2, 9)])
    b = logged(tmp_path / "b", [{"step": 5, "val_psnr": 0.0}])
    for name in ("c.svg", "c.png"):
        draw(a, b, "--out", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "c.svg").read_text()
    assert "<!-- a -->" in text and "<!-- b -->" in text and "<!-- pairs seen -->" in text
    for arguments, message in (([tmp_path / "none"], "no run of train.py"),
                               ([b, "--log"], "--log needs values above 0, the lowest is 0"),
                               ([a, "--out", tmp_path / "c.txt"], "must end in .svg")):
        with pytest.raises(SystemExit) as end:
            draw(*arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and said.count("\n") == 1


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        curves.draw({"a": [(0, 1.0)]}, "loss", tmp_path / "c.svg")
