"""configs: what a file, a command line and a checkpoint may say, and what is answered."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import configs
from configs import Config, Source

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))
SYNTH = str(ROOT / "configs" / "synth.py")
SOURCES = (Source("co3d", "co3d", "co3d/train-*.tar", 0.5, "co3d/held-out-*.tar"),
           Source("re10k", "re10k", "re10k/train-*.tar", 0.5, "re10k/held-out-*.tar"))


def refusal(function, *arguments):
    """The one line with which a function refuses its arguments."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def stored(**changes):
    """A Config as a checkpoint stores it."""
    return json.loads(json.dumps(asdict(Config(SOURCES)))) | changes


# ---- files

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_config_file_loads_and_survives_being_stored(path):
    config = configs.load([str(path)])
    config.check_trainable()
    assert configs.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("body, says", [
    ("config = Config(SOURCES, stepz=3)",
     "line 3: Config's field stepz is not known, did you mean steps?"),
    ("config = Config((Source('a', 'co3d', 'x', 1.0, held='y'),))",
     "line 3: Source's field held is not known, did you mean held_out?"),
    ("config = Config()", "line 3: TypeError: "),
    ("config = Config(SOURCES, steps='many')",
     "line 3: steps is 'many', it must be a whole number from 1 to 2,147,483,647"),
    ("config = Config(SOURCES, compile=1)", "line 3: compile is 1, it must be true or false"),
    ("config = Config(SOURCES, steps=True)", "line 3: steps is True, it must be a whole number"),
    ("config = Config('co3d')", "line 3: sources is 'co3d', it must be a tuple"),
    ("config = Config(SOURCES, channel_mult=(1, 2.5))", "line 3: channel_mult is (1, 2.5)"),
    ("config = Config((Source('a', 'co3d', 'x', 1.0, held_out_format='zip'),))",
     "line 3: source 'a': held_out_format 'zip' is not known"),
    ("config = Config(SOURCES[:1])", "line 3: the probabilities of the sources sum to 0.5, not 1"),
    ("config = Config(SOURCES", "is no python config file: line 3"),
    ("import nothing_of_this_name", "line 3: ModuleNotFoundError: No module named"),
    ("config = 3", "does not end in `config = Config(...)`"),
])
def test_a_wrong_file_is_answered_in_one_line(tmp_path, body, says):
    path = tmp_path / "wrong.py"
    path.write_text(f"from configs import Config, Source\nSOURCES = {SOURCES!r}\n{body}\n")
    assert says in refusal(configs.load, [str(path)])
    assert str(path) in refusal(configs.load, [str(path)])


def test_a_missing_file_is_answered_with_those_that_there_are():
    assert "configs/synth.py" in refusal(configs.load, ["configs/sinth.py"])


# ---- the command line

def test_options_have_an_equals_sign_or_a_blank_and_dashes_or_underscores():
    wanted = replace(configs.load([SYNTH]), batch_size=8, channel_mult=(1, 2), compile=True)
    for arguments in (["--batch_size=8", "--channel_mult=1,2", "--compile=true"],
                      ["--batch-size", "8", "--channel-mult", "(1, 2)", "--compile", "1"]):
        assert configs.load([SYNTH, *arguments]) == wanted


@pytest.mark.parametrize("options, says", [
    (["--stepz=3"], "option --stepz is not known, did you mean --steps?"),
    (["--sources=x"], "option --sources is not known"),
    (["steps=3"], "'steps=3' is one argument too many"),
    (["--steps"], "--steps needs a value, a whole number from 1"),
    (["--steps", "--lr=3"], "--steps needs a value"),
    (["--steps=1e400"], "--steps=1e400: it must be a whole number from 1 to 2,147,483,647"),
    (["--steps=" + "9" * 5000], "it must be a whole number from 1 to 2,147,483,647"),
    (["--image_size=999999999999"], "it must be a whole number from 1 to 16,384"),
    (["--workers=100000"], "workers is 100000, it must be a whole number from 0 to 1,024"),
    (["--lr=1e400"], "lr is inf, it must be a number from 0"),
    (["--lr=nan"], "lr is nan, it must be a number from 0"),
    (["--compile=yes"], "--compile=yes: it must be true or false"),
    (["--seed=-1"], "seed is -1, it must be a whole number from 0"),
    (["--max_damaged=-1"], "it must be a number from 0 to 1"),
    (["--betas=0.9"], "two numbers in [0, 1)"), (["--betas=0,1"], "two numbers in [0, 1)"),
    (["--betas=2,3"], "each is a number from 0 to 1"),
    (["--channel_mult="], "channel_mult is ()"), (["--channel_mult=1,0"], "number from 1 to"),
    (["--attention_resolutions=1,3"], "3 is no power of 2"),
    (["--num_heads=3"], "num_heads 3 does not divide the 64 channels of level 2"),
    (["--image_size=31"], "image_size 31 is not a multiple of 16"),
    (["--model_channels=36"], "is not a multiple of norm_groups 8"),
    (["--sample_steps=2000"], "it must be 1 to 1000"),
    (["--sampler=reference", "--sample_steps=501"], "must be 2 to 500"),
    (["--latent=pixel"], "latent 'pixel' is not known, did you mean pixels?; it is one of 'vae'"),
    (["--mode=8dof"], "mode '8dof' is not known, it is one of 3dof, "),
    (["--out="], "out is empty"),
    (["--drop_clip=0.9", "--drop_both=0.9"], "is more than 1"),
])
def test_what_no_run_can_have_is_refused_at_the_gate(options, says):
    assert says in refusal(configs.load, [SYNTH, *options])


def test_the_published_name_of_the_mode_is_an_alias():
    assert configs.load([SYNTH, "--mode=7dof_qs"]).mode == "7dof_quantile_scale"


@pytest.mark.parametrize("changes, says", [
    ({"mode": "7dof_metric_scale"}, "needs a metric depth network"),
    ({"quantile_blend": False}, "--depth_weights=dpt_swin2_tiny_256.pt brings it"),
    ({"latent": "vae"}, "needs --init=FILE"),
    ({"sources": (replace(SOURCES[0], probability=1.0, held_out="pipe:cat x.tar"),)},
     "a command has no fixed order"),
])
def test_what_cannot_be_trained_is_refused_before_anything_is_read(changes, says):
    config = replace(configs.load([SYNTH]), **changes)
    assert says in refusal(config.check_trainable)


def test_a_typo_is_answered_without_torch():
    code = ("import sys, configs\n"
            "try:\n    configs.load(['configs/synth.py', '--stepz', '3'])\n"
            "except ValueError as err:\n    print(err, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "option --stepz is not known, did you mean --steps? False\n"


# ---- what checkpoints store

def test_fields_of_earlier_versions_are_told_and_ignored_and_new_ones_have_defaults(caplog):
    values = stored(cooldown_steps=5, warmup_start=0.5)
    del values["threads"]
    with caplog.at_level(logging.WARNING):
        assert configs.from_dict(values) == Config(SOURCES)
    assert [record.getMessage() for record in caplog.records] == [
        "the stored configuration has 2 fields that this version has not, which are ignored: "
        "'cooldown_steps', 'warmup_start'"]


def deep(levels=100_000):
    """A list in a list in a list."""
    inner = []
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.mark.parametrize("values", [
    None, 3, "text", [], {}, deep(), {"sources": None}, {"sources": deep()}, {"sources": [3]},
    {"sources": []}, {"sources": [{}]}, stored(steps="6"), stored(steps=None), stored(lr=deep()),
    stored(channel_mult=deep()), stored(channel_mult=[1, None]), stored(seed=10**400),
    stored(lr=10**400), stored(mode=3), stored(mode=[]), stored(latent={}), stored(betas=3),
    stored(out=0)], ids=lambda values: type(values).__name__)
def test_a_configuration_of_other_kinds_is_refused_in_one_line(values):
    refusal(configs.from_dict, values)


def test_no_name_of_a_file_is_taken_from_a_checkpoint():
    values = stored(data="/theirs", out="/their/out", init="/their.ckpt", depth_weights="/their.pt",
                    mode="7dof", image_size=128)
    values["sources"][0]["held_out"] = "pipe:touch /tmp/owned"
    config = configs.stored(values)
    assert (config.mode, config.image_size) == ("7dof", 128)
    assert config.sources == configs.NOWHERE and not config.sources[0].held_out
    assert "their" not in repr(config) and "pipe" not in repr(config)
    assert "'/theirs'" in configs.no_data(values) and "--config FILE" in configs.no_data(values)
    mine = replace(configs.load([SYNTH]), data="mine", depth_weights="mine.pt")
    config = configs.stored(values, config=mine)
    assert (config.sources, config.data, config.depth_weights) == (mine.sources, "mine", "mine.pt")
    assert config.image_size == 128 and "their" not in repr(config)
    assert configs.stored(values, data="elsewhere", config=mine).data == "elsewhere"


def test_a_folder_on_the_command_line_holds_the_stored_held_out_patterns():
    config = configs.stored(stored(data="/theirs"), data="mine")
    assert config.data == "mine" and [s.held_out for s in config.sources] == [
        "co3d/held-out-*.tar", "re10k/held-out-*.tar"]
    assert not any(source.shards for source in config.sources)


@pytest.mark.parametrize("pattern", [
    "pipe:touch owned", "a.tar ; pipe:touch owned", "http://there/a.tar", "https://there/a.tar",
    "/etc/passwd", "a.tar ; /etc/passwd", "../a.tar", "a/../../b.tar", "a/..", "-", "a.tar ; -",
    "~/a.tar", "C:\\a.tar", "a\\..\\..\\b.tar", "a{0..1}.tar ; ../{0..1}.tar"])
def test_patterns_that_leave_the_folder_are_refused(pattern):
    values = stored()
    values["sources"][1]["held_out"] = pattern
    assert "--config FILE" in refusal(configs.stored, values, "mine")


def test_numbered_shards_and_globs_lie_inside():
    for pattern in ("", "a.tar", "a/b-{000..126}.tar", "**/*.tar", "a..b.tar ; c{0..9}{0..9}.tar"):
        assert configs.is_inside(pattern), pattern
