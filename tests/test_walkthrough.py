"""docs/walkthrough.md: every name in it exists, every block runs, every exercise ends as it says.

Blocks of Python run in order, those of a section in one namespace. What stands behind `<!-- long -->` runs with
`--long`."""

import code
import importlib
import json
import os
import re
import subprocess
from functools import reduce
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "walkthrough.md").read_text()
SECTIONS = re.findall(r"^## (\d+\. [^\n]*)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
BLOCK = re.compile(r"(<!-- long -->\n)?```(python|bash)\n(.*?)```", re.S)
PROSE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"analysis", "configs", "engine"}


def resolved(name):
    """What `file.thing.part` or `folder.file.thing` names. Raises AttributeError, ImportError."""
    parts = name.split(".")
    folder = (ROOT / parts[0]).is_dir() and (ROOT / parts[0] / f"{parts[1]}.py").exists()
    module = importlib.import_module(".".join(parts[:1 + folder]))
    thing = reduce(getattr, parts[1 + folder:-1], module)
    # a field without a default is no attribute of its class
    return True if parts[-1] in getattr(thing, "__dataclass_fields__", ()) else getattr(thing, parts[-1])


def test_every_section_ends_with_an_exercise_that_runs():
    assert [title.split(".")[0] for title, _ in SECTIONS] == list("123456789") + ["10"]
    for title, text in SECTIONS:
        before, exercise = text.rsplit("**Exercise.**", 1)
        assert BLOCK.search(exercise) and "xpected" in exercise, title


def test_every_name_exists():
    boxes = re.findall(r"<br/>([\w.]+)", TEXT)
    names = [name for name in PROSE if re.fullmatch(r"[a-z_]+(\.\w+)+", name) and name.split(".")[0] in MODULES
             and not name.endswith((".py", ".md"))]
    assert len(names) > 40 and len(boxes) == 9
    for name in names + boxes:
        resolved(name)
    with pytest.raises(AttributeError):
        resolved("camera.no_such_thing")


def test_every_file_and_line_exists():
    files = [name for name in PROSE if re.fullmatch(r"[\w/]+\.(py|md)|[\w/]+/\w+\.\w+", name)]
    lines = [name.split(": ", 1) for name in PROSE if re.match(r"[\w/]+\.py: ", name)]
    pictures = re.findall(r"\]\(([^):#]+)\)", TEXT)
    assert len(lines) > 6 and len(pictures) > 6
    for name in [*files, *(f"docs/{path}" for path in pictures)]:
        assert (ROOT / name).exists(), name
    for file, line in lines:
        assert line in (ROOT / file).read_text(), f"{file}: {line}"


class Pasted(code.InteractiveConsole):
    """What `python` does with lines that are pasted into it, but that errors are errors."""
    def showtraceback(self):
        raise

    def showsyntaxerror(self, *args, **options):
        raise


@pytest.mark.parametrize("title, text", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_every_block_runs(title, text, request, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    console = Pasted()
    for long, language, block in BLOCK.findall(text):
        if long and not request.config.getoption("--long"):
            continue
        if language == "python":
            for line in [*block.splitlines(), ""]:
                more = console.push(line)
            assert not more, block
        else:
            subprocess.run(["bash", "-ec", block], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_lines_that_break_a_run_are_lines_of_the_code():
    from docs import broken

    for name, (change, _) in broken.BREAKS.items():
        if change:
            file, line, instead = change
            text = (ROOT / file).read_text()
            assert line in text, name
            compile(text.replace(line, instead), file, "exec")
    measured = json.loads(broken.MEASURED.read_text())
    assert measured.keys() == broken.BREAKS.keys()
    for name, run in measured.items():      # and the table holds what was measured
        for figure in ("psnr", "camera_margin", "camera_found"):
            assert re.search(rf"\| {name} \|.* {run['scored']['1.5'][figure]:.2f} ", TEXT), (name, figure)


def test_small_figures_can_be_drawn():
    pytest.importorskip("matplotlib")
    from docs import figures

    for name in ("cameras.svg", "modes.png"):
        assert figures.FIGURES[name]().axes
    assert all(path.stat().st_size < 100_000 for path in figures.OUT.iterdir())
