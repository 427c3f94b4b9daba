"""Fine-tuning: what it gained is told, and it ends when held-out pairs get worse."""

import json

from test_train import logged, one_thread, run, shards, tiny, whole_run     # noqa: F401, fixtures

OPTIONS = {"validate_every": 2, "validate_pairs": 8, "eval_pairs": 8, "save_every": 2, "steps": 12}


def test_the_end_tells_what_was_gained_over_the_model_that_a_run_started_from(
        shards, whole_run, tmp_path):                   # noqa: F811
    out = tmp_path / "tuned"
    run(tiny(shards, out, init=whole_run[0], **OPTIONS | {"steps": 4}))
    # going on compares with the model of step 0, not with that of step 4
    said = run(tiny(shards, out, init=whole_run[0], **OPTIONS))
    first = json.loads((out / "begin.json").read_text())["rows"]
    last = json.loads((out / "metrics.json").read_text())["psnr"]["this model"]
    gain = last - sum(row["scores"]["this model"]["psnr"] for row in first) / len(first)
    assert f"the model gained {gain:+.2f} dB +- " in said and gain
    assert logged(out, "step")[0] == 0 and "val_loss" in (out / "log.jsonl").read_text().splitlines()[0]


def test_a_run_ends_when_held_out_pairs_get_worse_and_stays_ended(
        shards, whole_run, tmp_path):                   # noqa: F811
    out, options = tmp_path / "worse", {"lr": 0.3, "lr_projection": 0.3, "patience": 2, "ema_decay": 0.0}
    for _ in range(2):
        said = run(tiny(shards, out, init=whole_run[0], **OPTIONS, **options))
        assert "was least after step 0, and the run ends" in said and "the model gained -" in said
        assert logged(out, "step")[-1] == 4 and (out / "step_00000004").is_dir()
