"""AdamW's step (arXiv:1711.05101) and the moving average's behind it, in one pass over memory.

A kernel reads weight, gradient, both moments and the average once, and writes all but the gradient:
36 bytes a parameter. PyTorch's two passes take 28 and 12. One launch covers hundreds of tensors: a
table in device memory says where they are, and another which of them is every program's.
"""

import itertools
from array import array

import torch

from engine import kernels
from engine.kernels import tl, triton

BLOCK, WARPS = 2048, 8      # elements of a program, and what holds them
ALIGNED = 16                # bytes that an instruction reads or writes at a time


def usable(optimizer):
    """Whether the kernel can take the steps of a torch.optim.AdamW. Those of a CUDA graph it cannot
    ("capturable"): bias corrections are arguments of its launch."""
    groups = optimizer.param_groups
    return (kernels.enabled["adamw"] and not any(group["capturable"] for group in groups)
            and all(p.is_cuda and p.dtype == torch.float32
                    for group in groups for p in group["params"]))


if triton is not None:
    BYTES = tl.constexpr(ALIGNED)

    @triton.jit
    def pointer(row, i):
        """That to float32 values, of the table's row."""
        return tl.multiple_of(tl.load(row + i).to(tl.pointer_type(tl.float32)), BYTES)

    @triton.jit
    def advance(row, offsets, exist, decayed, rate, share1, beta2, share2, scale2, eps, pull,
                AVERAGED: tl.constexpr):
        # all that is read comes first: nothing is read ahead of what is written before it
        at_g, at_p, at_m, at_v = pointer(row, 2), pointer(row, 3), pointer(row, 4), pointer(row, 5)
        if AVERAGED:
            at_a = pointer(row, 6)
            a = tl.load(at_a + offsets, exist)
        p, g = tl.load(at_p + offsets, exist), tl.load(at_g + offsets, exist)
        m, v = tl.load(at_m + offsets, exist), tl.load(at_v + offsets, exist)
        m += share1 * (g - m)
        v = beta2 * v + share2 * g * g
        p -= decayed * p
        p -= tl.div_rn(rate * m, tl.sqrt_rn(v) * scale2 + eps)
        tl.store(at_p + offsets, p, exist)
        tl.store(at_m + offsets, m, exist)
        tl.store(at_v + offsets, v, exist)
        if AVERAGED:
            tl.store(at_a + offsets, a + pull * (p - a), exist)

    @triton.jit
    def adamw_kernel(table, owner, decayed, rate, share1, beta2, share2, scale2, eps, pull,
                     AVERAGED: tl.constexpr, BLOCK: tl.constexpr):
        """owner: the row of the table that is a program's tensor. Rows: elements, first program,
        pointers to gradient, weight, first and second moment, and, if AVERAGED, the average."""
        program = tl.program_id(0).to(tl.int64)
        row = table + tl.load(owner + program) * (6 + AVERAGED)
        elements, first = tl.load(row), (program - tl.load(row + 1)) * BLOCK
        offsets = first + tl.arange(0, BLOCK)
        # apart, as values under a mask are read and written one by one
        if first + BLOCK <= elements:
            advance(row, offsets, None, decayed, rate, share1, beta2, share2, scale2, eps, pull,
                    AVERAGED)
        else:
            advance(row, offsets, offsets < elements, decayed, rate, share1, beta2, share2, scale2,
                    eps, pull, AVERAGED)


class Launch:
    """Parameters of one group of torch.optim.AdamW, and the `names` of their averages, if any.

    Its table (parameters, 6 or 7) is made anew when an address changes: gradients may have new ones
    at every step, and Ema.swap exchanges weights and averages.
    """
    def __init__(self, group, parameters, names):
        self.group, self.parameters, self.names = group, parameters, names
        self.kept = self.addresses = None
        elements = torch.tensor([p.numel() for p in parameters])
        blocks = (elements + BLOCK - 1) // BLOCK
        self.sizes = torch.stack([elements, blocks.cumsum(0) - blocks], 1)
        owner = torch.arange(len(parameters), dtype=torch.int32).repeat_interleave(blocks)
        self.owner = owner.to(parameters[0].device)

    def places(self, state, averages):
        """(dictionary, key) of first moments, second moments and averages, each in our order."""
        moments = [state[p] for p in self.parameters]
        return ([(kept, key) for key in ("exp_avg", "exp_avg_sq") for kept in moments]
                + [(averages, name) for name in self.names])

    def locate(self, places):
        """Addresses of parameters, moments and averages."""
        tensors = [kept[key] for kept, key in places]
        return [tensor.data_ptr() for tensor in (*self.parameters, *tensors)]

    def lay_out(self, places):
        """Gives moments and averages the strides of their parameters."""
        self.strides = [p.stride() for p in self.parameters]
        # what is made like a tensor has its strides where that has no gaps, and only there
        self.dense = all(torch.empty_like(p, device="meta").stride() == p.stride()
                         for p in self.parameters)
        for (kept, key), p in zip(places, itertools.cycle(self.parameters)):
            if kept[key].stride() != p.stride():
                kept[key] = torch.empty_like(p).copy_(kept[key])

    def ready(self, state, averages):
        """Brings the table up to date. False where the kernel cannot be used: a parameter has gaps,
        or something begins where 16 bytes cannot be read at once."""
        places = self.places(state, averages)
        if self.locate(places) != self.kept:
            self.lay_out(places)
            self.kept = self.locate(places)
        for p, strides in zip(self.parameters, self.strides):
            if p.grad.stride() != strides:
                p.grad = torch.empty_like(p).copy_(p.grad)
        addresses = [p.grad.data_ptr() for p in self.parameters] + self.kept
        if addresses != self.addresses:
            columns = torch.frombuffer(array("q", addresses), dtype=torch.int64)
            self.aligned = not (columns % ALIGNED).any()
            self.host = torch.cat([self.sizes, columns.view(-1, len(self.parameters)).T], 1)
            if self.owner.is_cuda:
                self.host = self.host.pin_memory()
            self.table = self.host.to(self.owner.device, non_blocking=True)
            self.addresses = addresses
        return self.dense and self.aligned

    def __call__(self, count, pull):
        """Step `count`, from 1, and the averages' by `pull`, the weights' share in them."""
        lr, decay, eps = (self.group[key] for key in ("lr", "weight_decay", "eps"))
        beta1, beta2 = self.group["betas"]
        numbers = (lr * decay, lr / (1 - beta1**count), 1 - beta1, beta2, 1 - beta2,
                   (1 - beta2**count)**-0.5, eps, pull)
        adamw_kernel[len(self.owner),](self.table, self.owner, *map(float, numbers),
                                       bool(self.names), BLOCK, num_warps=WARPS)


class OnePassAdamW:
    """Takes steps for a torch.optim.AdamW, whose state stays where and as it is, and behind them
    those of an average."""
    def __init__(self, optimizer):
        self.optimizer, self.launches, self.ema = optimizer, [], None

    def plan(self, ema):
        """One launch for the parameters of a group that have an average, one for the others."""
        names = {} if ema is None else {id(p): name for name, p in ema.live.items()}
        self.launches, self.ema, state = [], ema, self.optimizer.state
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not state[p]:
                    state[p].update(step=p.new_zeros(()), exp_avg=torch.zeros_like(p),
                                    exp_avg_sq=torch.zeros_like(p))
            for averaged in (True, False):
                chosen = [p for p in group["params"] if (id(p) in names) == averaged]
                if chosen:
                    averages = [names[id(p)] for p in chosen] if averaged else []
                    self.launches.append(Launch(group, chosen, averages))
        self.averaged = {name for launch in self.launches for name in launch.names}

    def step(self, count, ema=None):
        """Step `count`, from 1, and the next one of an Ema. Returns the names of the averages that
        are done, or None where nothing is: torch.optim.AdamW has to take this step."""
        if not usable(self.optimizer):
            return None
        if ema is not self.ema or not self.launches:
            self.plan(ema)
        averages, pull = ({}, 0.0) if ema is None else (ema.average, ema.pull())
        if not all([launch.ready(self.optimizer.state, averages) for launch in self.launches]):
            return None
        for launch in self.launches:
            launch(count, pull)
            torch.autograd.graph.increment_version(launch.parameters)   # as PyTorch's own would
        return self.averaged
