"""engine/adamw.py: steps of the kernel against the two passes of PyTorch in float64. Without a GPU it runs
in Triton's interpreter (conftest.py); without Triton those tests are skipped."""

import copy
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import adamw
import configs
from engine import kernels
from runtime.ranks import ALONE, Alone
from runtime.optimizer import Ema, Optimizer

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = replace(configs.Config((configs.Source("co3d", "co3d", "train.tar", 1.0),)), lr=1e-2,
                 lr_projection=3e-2, warmup_steps=2, weight_decay=0.1)
# float32 keeps values below 8 to 2.4e-7 a rounding: some in each of a few steps
BOUND = 2e-6


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.ParameterList(torch.randn(n) for n in (1, 3, 4, 4097))
        self.conv, self.wide = nn.Conv2d(4, 6, 3), nn.Conv2d(8, 16, 1)
        self.norm2 = nn.Linear(5, 5).requires_grad_(False)      # idle
        self.conv.weight.data = self.conv.weight.contiguous(memory_format=torch.channels_last)

    def idle_parameters(self):
        return dict(self.norm2.named_parameters())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model, self.cc_projection = Unet(), nn.Linear(7, 9)
        self.register_buffer("betas", torch.zeros(1))


class Run:
    """A network with its optimizer and average; together: both take their step in one call."""
    def __init__(self, net, config=CONFIG, together=True, averaged=True, ranks=ALONE):
        self.net, self.together = net, together
        self.optimizer = Optimizer(net, config, ranks)
        self.ema = Ema(net.model.diffusion_model, config.ema_decay, ranks,
                       config.divide_optimizer) if averaged else None

    def step(self, gradients):
        for name, p in self.optimizer.trained.items():
            p.grad = gradients[name].to(p.dtype) if name in gradients else None
        if self.together:
            return self.optimizer.step(self.optimizer.count, self.ema)
        norm = self.optimizer.step(self.optimizer.count)
        if self.ema:
            self.ema.update()
        return norm

    def kept(self):
        """All that a checkpoint holds, by name."""
        return {**self.net.state_dict(), **dict(self.optimizer.tensors()),
                **({f"average {name}": a for name, a in self.ema.tensors()} if self.ema else {})}


def pair(config=CONFIG, averaged=True):
    """A run in float32, and its like in float64, whose steps are PyTorch's, call by call."""
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    exact = Run(copy.deepcopy(net).double(), config, together=False, averaged=averaged)
    return Run(net, config, averaged=averaged), exact


def drawn(run):
    """Gradients that vary in size, down to where eps matters; none of one parameter."""
    return {name: torch.randn_like(p) * 10 ** torch.empty_like(p).uniform_(-9, 1)
            for name, p in run.optimizer.trained.items() if not name.endswith("odd.2")}


def near(run, exact):
    found, wanted = run.kept(), exact.kept()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # gradients reach 40, so moments are as large as a few: rounding of those is relative
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=BOUND,
                                   msg=lambda text: f"{name}: {text}")


@pytest.fixture
def switch(monkeypatch):
    """`on`: whether float32 parameters take the kernel, on a CPU too."""
    switch, usable = types.SimpleNamespace(on=True), adamw.usable
    monkeypatch.setattr(adamw, "usable", lambda optimizer: switch.on and (
        usable(optimizer) if DEVICE == "cuda" else
        all(p.dtype == torch.float32 for p in optimizer.param_groups[0]["params"])))
    return switch


@needs_triton
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0, "grad_clip": 1.0}])
def test_the_kernels_steps_equal_adamw_and_then_the_average_in_float64(changes, averaged, switch):
    run, exact = pair(replace(CONFIG, **changes), averaged)
    for _ in range(4):
        gradients = drawn(run)
        norms = [exact.step(gradients), run.step(gradients)]
        assert run.optimizer.behind and not exact.optimizer.behind
        assert norms == [None, None] or norms[1].item() == pytest.approx(norms[0].item(), rel=1e-5)
    near(run, exact)
    weight = run.net.model.diffusion_model.conv.weight
    assert not weight.is_contiguous() and all(
        run.optimizer.adamw.state[weight][key].stride() == weight.stride()
        for key in ("exp_avg", "exp_avg_sq"))


@needs_triton
@pytest.mark.parametrize("moved", [True, False])
def test_the_table_is_made_anew_only_where_an_address_changes(moved, switch):
    run, exact = pair()
    buffers = {name: torch.zeros_like(p) for name, p in run.optimizer.trained.items()}
    tables, held = [], []
    for _ in range(3):
        for name, values in drawn(run).items():
            buffers[name] = values if moved else buffers[name].copy_(values)
        held.append(dict(buffers))                      # so that no address is used twice
        exact.step(buffers)
        run.step(buffers)
        tables.append([launch.table for launch in run.optimizer.one_pass.launches])
    for before, after in zip(tables, tables[1:]):
        assert [a is b for a, b in zip(before, after)] == [not moved] * 2
    near(run, exact)


@needs_triton
def test_steps_follow_weights_and_averages_that_were_exchanged(switch):
    run, exact = pair()
    for swaps in (0, 2, 1, 1):      # the third step is one of the average, in the weights' place
        for one in (run, exact):
            for _ in range(swaps):
                one.ema.swap()
        gradients = drawn(run)
        exact.step(gradients)
        run.step(gradients)
        assert run.optimizer.behind
    near(run, exact)


@needs_triton
def test_an_unaligned_gradient_leaves_the_step_to_pytorch_which_goes_on_counting(switch):
    run, exact = pair()
    for step in range(4):
        gradients = drawn(run)
        exact.step(gradients)
        if step in (0, 2):
            name, whole = "cc_projection.weight", gradients["cc_projection.weight"]
            shifted = torch.empty(whole.numel() + 1, device=DEVICE)[1:].view_as(whole)
            gradients[name] = shifted.copy_(whole)
        run.step(gradients)
        assert run.optimizer.behind == (step in (1, 3))
    near(run, exact)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's fused AdamW refuses it")
def test_a_parameter_with_gaps_leaves_all_steps_to_pytorch(switch):
    run, exact = pair()
    weight = run.net.cc_projection.weight
    weight.data = torch.stack([weight.data, weight.data], 2)[..., 0]
    gradients = drawn(run)
    exact.step(gradients)
    run.step(gradients)
    assert not run.optimizer.behind
    near(run, exact)


@needs_triton
def test_other_strides_are_made_those_of_the_parameter(switch):
    run, exact = pair()
    name, weight = "conv.weight", run.net.model.diffusion_model.conv.weight
    for step in range(3):
        gradients = drawn(run)
        full = f"model.diffusion_model.{name}"
        gradients[full] = gradients[full].contiguous()
        exact.step(gradients)
        run.step(gradients)
        state = run.optimizer.adamw.state[weight]
        assert weight.stride() == state["exp_avg"].stride() == run.ema.average[name].stride()
        if step == 0:
            state["exp_avg"] = state["exp_avg"].contiguous()
            run.ema.average[name] = run.ema.average[name].contiguous()
    near(run, exact)


@needs_triton
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_either_way_goes_on_in_the_other(first, switch):
    run, exact = pair()
    for on in (first, first, not first, not first, first):
        if run.optimizer.count == 2:
            saved = {name: tensor.clone() for name, tensor in run.optimizer.tensors()}
            again = Run(run.net)
            again.optimizer.restore(saved)
            again.ema.average, again.ema.updates = run.ema.average, run.ema.updates
            run = again
        switch.on = on
        gradients = drawn(run)
        exact.step(gradients)
        run.step(gradients)
        assert run.optimizer.behind == on
    near(run, exact)


@needs_triton
def test_autograd_notices_that_the_kernel_wrote_a_weight(switch):
    run, _ = pair()
    weight = run.net.cc_projection.weight
    loss = weight.square().sum()
    run.step(drawn(run))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_triton
def test_divided_ranks_leave_the_step_to_pytorch(switch):
    class Half(Alone):
        world = 2
    torch.manual_seed(0)
    run = Run(Net().to(DEVICE), replace(CONFIG, divide_optimizer=True), ranks=Half())
    run.step(drawn(run))
    assert not run.optimizer.behind


def test_the_kernel_is_for_float32_on_a_gpu_outside_of_graphs(monkeypatch):
    def usable(capturable=False, **changes):
        p = types.SimpleNamespace(**{"is_cuda": True, "dtype": torch.float32, **changes})
        group = {"capturable": capturable, "params": [p]}
        return adamw.usable(types.SimpleNamespace(param_groups=[group]))

    monkeypatch.setitem(kernels.enabled, "adamw", True)
    assert usable() and not usable(capturable=True)
    assert not usable(is_cuda=False) and not usable(dtype=torch.bfloat16)
    monkeypatch.setitem(kernels.enabled, "adamw", False)
    assert not usable()


def test_one_call_for_both_equals_two_bit_for_bit():
    torch.manual_seed(0)
    net = Net()
    runs = [Run(copy.deepcopy(net), together=together) for together in (True, False)]
    for _ in range(3):
        gradients = drawn(runs[0])
        for run in runs:
            run.step({name: values.clone() for name, values in gradients.items()})
    found, wanted = (run.kept() for run in runs)
    assert found.keys() == wanted.keys() and runs[0].ema.updates == runs[1].ema.updates == 3
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert runs[0].ema.pull() == 1 - (1 + 4) / (10 + 4)         # of the fourth update
    # the parameters that nothing trains are decayed first, and averaged after
    before, after = net.model.diffusion_model.norm2, runs[0].net.model.diffusion_model.norm2
    average = runs[0].ema.average["norm2.weight"]
    assert (after.weight.abs() < before.weight.abs()).all()
    assert ((average.abs() > after.weight.abs()) & (average.abs() < before.weight.abs())).all()
