"""runtime/optimizer.py: in which order the optimizer's step and the average's reach a weight."""

from dataclasses import replace

import torch
from torch import nn

import configs
from runtime.optimizer import Ema, Optimizer


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained, self.norm2 = nn.Linear(3, 3), nn.Linear(5, 5).requires_grad_(False)

    def idle_parameters(self):
        return dict(self.norm2.named_parameters())


def test_weights_that_nothing_trains_are_decayed_first_and_averaged_then():
    torch.manual_seed(0)
    net = nn.Module()
    net.model, net.betas = nn.Module(), torch.zeros(1)
    net.model.diffusion_model, net.cc_projection = Unet(), nn.Linear(7, 9)
    config = replace(configs.Config(configs.NOWHERE), lr=1e-2, weight_decay=0.1, warmup_steps=0)
    before = net.model.diffusion_model.norm2.weight.clone()
    optimizer, ema = Optimizer(net, config), Ema(net.model.diffusion_model, 0.9999)
    for step in range(3):
        optimizer.step(step, ema)
    weight, average = net.model.diffusion_model.norm2.weight, ema.average["model.diffusion_model.norm2.weight"]
    torch.testing.assert_close(weight, before * (1 - 1e-3)**3)
    assert ((average.abs() > weight.abs()) & (average.abs() < before.abs())).all()
    assert ema.updates == 3 and ema.pull() == 1 - (1 + 4) / (10 + 4)        # of the fourth update
