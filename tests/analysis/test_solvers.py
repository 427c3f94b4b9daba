"""solvers.py: distances of solvers to the limit of many steps."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import default_collate

from analysis import metrics, score, solvers
from views import render
from test_sample import SCENES, small_run

__all__ = ["small_run"]      # the fixture `run`


def test_a_distance_is_that_of_the_pictures_that_a_solver_and_the_limit_make(run, capsys, monkeypatch):
    monkeypatch.setattr(solvers, "LIMIT", 4)
    monkeypatch.setattr(solvers, "SOLVERS", {("ddim", "trailing"): (4, 2), ("unipc", "logsnr"): (3,)})
    monkeypatch.setattr(solvers, "CHEAPER", ("dpm++", "trailing", 3))
    solvers.main(solvers.parser().parse_args([str(run), "--data", str(SCENES["data"]), "--pairs", "2"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["guidance", *3 * ["1"], *5 * ["3"]]
    tensors, config = render.open_run(run, str(SCENES["data"]))
    net, pairs = render.load(tensors, "cpu", "fp32")[0], score.held_out_pairs(config, 2)
    limit, few = (score.views_of(net, default_collate([pairs[0], pairs[1]]),
                                 replace(config, sampler="ddim", sample_steps=steps, eta=0.0, guidance=3.0))
                  for steps in (4, 2))
    wanted = metrics.psnr(few[0], limit[0]).mean().item(), metrics.psnr(few[0], few[2]).mean().item()
    found = next(line for line in lines if line.startswith("3        ddim, trailing") and " 2 " in line).split()
    assert (float(found[-4]), float(found[-1])) == pytest.approx(wanted, abs=0.02)


def test_a_reused_difference_is_evaluated_at_every_second_step():
    asked = []
    follow = solvers.reused(lambda z_t, t: z_t, lambda z_t, t: asked.append(t) or 3 * z_t)
    found = [follow(torch.tensor(float(k)), k) for k in (1, 2, 3, 4)]
    assert asked == [1, 3] and found == [3, 2 + 2, 9, 4 + 6]
