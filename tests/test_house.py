"""The house: who may import whom, how long a file may be, and whether the README tells the truth."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = ("camera", "diffusion", "vae", "clip", "model", "depth")
# a folder or file imports those before it, the method and itself; those of one line stand beside one another
FLOORS = (METHOD, ("configs",), ("engine", "runtime"), ("shards",), ("data",), ("views",), ("captures",),
          ("analysis",), ("benchmarks", "train", "sample", "evaluate", "prepare", "view", "docs"))
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SCRIPTS = FLOORS[-1]
LONGEST, LONGEST_METHOD, LONGEST_FUNCTION, LONGEST_LOOP = 430, 350, 60, 90
FILES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
               if path.relative_to(ROOT).parts[0] in (*FLOOR, *(f"{name}.py" for name in FLOOR)))


def owner(path):
    return path.parts[0].removesuffix(".py")


def is_main_guard(node):
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


def imports(tree):
    """Yields (module, name) of every import of a file, also inside functions; but what data.py imports for
    its command line alone."""
    for node in ast.iter_child_nodes(tree):
        if is_main_guard(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        else:
            yield from imports(node)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    mine = owner(path)
    for module, name in imports(ast.parse((ROOT / path).read_text())):
        top = module.split(".")[0]
        if mine in METHOD:
            assert top in (*METHOD, "torch", "numpy") or top in sys.stdlib_module_names, module
        if top not in FLOOR or top == mine:
            continue
        downhill = FLOOR[top] < FLOOR[mine] or (FLOOR[top] == FLOOR[mine] == 0)
        # runtime/command.py imports nothing of the project, so that a typo is answered at once
        assert downhill or (mine, top) == ("runtime", "engine") or module == "runtime.command" \
            or (module, name) == ("runtime", "command"), f"{path} imports {module}"
        assert top not in SCRIPTS, f"{path} imports the script {top}"
        if top == "engine":
            assert module == "engine" and not (ROOT / "engine" / f"{name}.py").exists(), \
                f"{path} goes past the engine's door: {module}.{name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_one_concern(path):
    text = (ROOT / path).read_text()
    assert text.count("\n") <= (LONGEST_METHOD if owner(path) in METHOD else LONGEST)
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            most = LONGEST_LOOP if (str(path), node.name) == ("train.py", "train") else LONGEST_FUNCTION
            assert node.end_lineno - node.lineno < most, f"{path}: {node.name}"


def test_the_house_has_twelve_files_at_the_root():
    assert len([path for path in FILES if len(path.parts) == 1]) <= 12


# ---- what the documents say

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text() for path in DOCUMENTS}


def commands():
    """The commands of this project in the documents' blocks of code, as lists of words."""
    for path, text in TEXTS.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|;", line.split("#")[0]):
                    found = re.search(r"\b(?:python3? (?:-m )?|torchrun .*?)((?:\w+\.py|runtime|analysis|"
                                      r"benchmarks)\S*) ?(.*)", part)
                    if found and not found[1].startswith("pytest"):
                        yield f"{path.name}: {part.strip()}", found[1], found[2]


@pytest.mark.parametrize("where, program, rest", list(commands()), ids=lambda text: text[:60])
def test_every_command_and_option_of_the_documents_exists(where, program, rest):
    module = program.removesuffix(".py").replace(".", "/")
    place = ROOT / (module + ".py")
    assert place.exists() or (ROOT / module / "__main__.py").exists(), where
    for word in shlex.split(rest):
        if re.fullmatch(r"configs/\w+\.py", word):
            assert (ROOT / word).exists() or "mine" in word, where
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name:
            known = subprocess.run(["git", "grep", "-lE", f"\\b{name}\\b|{name.replace('_', '-')}", "--",
                                    "*.py", ":!tests"], cwd=ROOT, capture_output=True, text=True).stdout
            assert known, f"{where}: nobody knows --{name}"


def test_every_file_and_picture_that_the_documents_name_exists():
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
        for name in re.findall(r"`([a-z_]+/[\w/]+\.(?:py|md|json|svg|png|jpg))`", text):
            assert (ROOT / name).exists() or name == "configs/mine.py" or name.startswith(("out/", "data/", "sparse/", "category/")), f"{path.name}: {name}"


def test_the_tree_of_the_readme_tells_the_lengths():
    rows = re.findall(r"^(\w+\.py) +(\d+) ", TEXTS[ROOT / "README.md"], re.M)
    assert len(rows) >= 11
    for name, lines in rows:
        assert (ROOT / name).read_text().count("\n") == int(lines), name


# ---- quirks and departures

def test_every_quirk_and_departure_names_its_test_and_stands_in_the_documents():
    printed = subprocess.run([sys.executable, "docs/tags.py"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout
    assert printed.count("\n| ") > 20
    assert printed.strip() in TEXTS[ROOT / "docs" / "fidelity.md"]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("**/*.py"))
    for test in re.findall(r"`(test_\w+)` \|$", printed, re.M):
        assert f"def {test}(" in tests, test
