"""One manner for every command line: spelling, the nearest name, bounds, progress, what ends it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import command

ROOT = Path(__file__).parents[2]


def parser():
    p = command.Parser("thing.py", "numbers go elsewhere")
    p.add_argument("file", nargs="?")
    p.add_argument("--same-noise", action="store_true")
    p.add_argument("--image_size", type=command.numbers_of(int, 1, 4096), default=8)
    p.add_argument("--pose", default="")
    p.add_argument("--out", type=command.words, default="out")
    return p


def refused(capsys, *words, of=parser):
    with pytest.raises(SystemExit) as stop:
        of().parse_args(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("thing.py: ")
    return said


def test_dashes_and_underscores_spaces_and_equals_signs_are_the_same():
    for words in (["--image-size", "32"], ["--image_size=32"], ["--image-size=32"]):
        assert parser().parse_args([*words, "--same_noise"]).image_size == 32
    assert parser().parse_args(["--same_noise"]).same_noise
    assert parser().parse_args(["--pose", "-30,0,1"]).pose == "-30,0,1"
    assert parser().parse_args(["--pose", "a_b=c"]).pose == "a_b=c"


def test_a_wrong_option_is_answered_with_the_nearest_one(capsys):
    assert "did you mean --image_size?" in refused(capsys, "--imagesize=3")
    assert "did you mean --same-noise?" in refused(capsys, "--samenoise")
    assert "'b.png' is one argument too many (" in refused(capsys, "a.png", "b.png")
    assert "numbers go elsewhere" in refused(capsys, "a.png", "-3.5")
    # no part of a name stands for it: another option may begin so tomorrow
    assert "--image is not known" in refused(capsys, "--image", "3")


def test_an_option_of_a_command_is_answered_with_that_commands_names(capsys):
    def with_commands():
        p = command.Parser("thing.py")
        p.add_subparsers(dest="which").add_parser("synth").add_argument("--held-out")
        return p
    assert with_commands().parse_args(["synth", "--held_out=3"]).held_out == "3"
    assert "did you mean --held-out?" in refused(capsys, "synth", "--heldout=3", of=with_commands)


def test_numbers_out_of_bounds_and_empty_names_are_refused(capsys):
    for text in ("0", "4097", "1e3", "nan", "9" * 5000, "x", ""):
        said = refused(capsys, "--image-size", text)
        assert "--image_size" in said and len(said) < 200
    assert "from 1 to 4,096" in refused(capsys, "--image-size", "0")
    assert "empty" in refused(capsys, "--out=")


def test_errors_are_one_line_and_an_exit_status(capsys):
    def fails(err):
        raise err
    for err, status, says in ((ValueError("two\nlines"), 2, "x.py: two lines"),
                              (OSError(28, "No space left", "f.png"), 2, "x.py: f.png: No space"),
                              (FileNotFoundError("no image a"), 2, "x.py: no image a"),
                              (KeyboardInterrupt(), 130, "x.py: stopped")):
        with pytest.raises(SystemExit) as stop:
            command.run("x.py", fails, err)
        assert stop.value.code == status
        said = capsys.readouterr().err
        assert said.startswith(says) and said.count("\n") == 1
    command.run("x.py", lambda: None)


def test_a_screen_that_takes_no_more_ends_nothing():
    code = "from runtime import command\nfor i in range(9): command.say('line')\nprint('x' * 99999)"
    with open("/dev/full", "w", encoding="utf-8") as full:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, timeout=60,
                              check=False).returncode == 0
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write, timeout=60,
                          stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 0 and not done.stderr


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert list(command.progress("abcdefg", "views", "steps")) == list("abcdefg")
    assert list(command.progress("abc", "views", "steps", quiet=True)) == list("abc")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("views: ") and " of 7 steps" in lines[0] and 1 <= len(lines) < 7


@pytest.mark.parametrize("words", [["--help"], ["--obrit"]])
def test_help_and_a_typo_need_no_torch(words):
    """The CPU time of the process, on a machine that others may use too; torch alone takes 2 s."""
    code = f"""
import runpy, sys
sys.argv = ["sample.py", *{words}]
try:
    runpy.run_path("sample.py", run_name="__main__")
except SystemExit:
    pass
import time
heavy = {{"torch", "numpy", "PIL"}} & set(sys.modules)
sys.exit(10 if heavy else 0 if time.process_time() < 0.5 else 11)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_one_line_during_imports_too():
    code = """
import signal, sys
from runtime import command
sys.argv = ["x.py"]
signal.signal(signal.SIGINT, signal.default_int_handler)
command.parse(command.Parser("x.py"))
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True,
                          check=False)
    assert done.returncode != 0 and done.stderr == b"x.py: stopped\n"
