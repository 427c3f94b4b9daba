"""CUDA graphs, and the forward and backward pass of training as one.

Of a small network, or of few pairs at once, kernels take microseconds each, and to launch them
takes the processor longer than the GPU needs to run them. A graph is launched at once: it is what
the GPU was asked for while the passes were recorded, on the same addresses, every time.
See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

import torch

WARM_UPS = 3            # calls before the recording, in which libraries choose their kernels


def can_capture(config, ranks, device):
    """Whether a run records its passes: it is asked to, and nothing is sent between processes."""
    return config.graph and device.type == "cuda" and ranks.world == 1


def capture_graph(function, device=None, pool=None):
    """(replay, result) of a function without arguments: every replay() writes the result anew.
    pool: of memory, shared by graphs that never run at once."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()        # the graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result


class Recorded:
    """Stands for `passes(*tensors) -> losses (b,)`, which adds to the gradients of parameters.

    The first call records: shapes, and whatever is not a tensor, stay as they are then. Where
    gradients are None before a call they are the graph's own tensors after it, the same every time.
    """
    def __init__(self, passes, parameters):
        self.passes, self.parameters = passes, [p for p in parameters if p.requires_grad]
        self.replay = None

    def __call__(self, *tensors):
        if self.replay is None:
            self.capture(tensors)
        # the replay writes over the graph's own
        earlier = [p.grad.clone() if p.grad is grad else p.grad
                   for p, grad in zip(self.used, self.gradients) if p.grad is not None]
        torch._foreach_copy_(self.inputs, list(tensors))
        self.replay()
        if earlier:
            torch._foreach_add_(earlier, self.gradients)
        for p, grad in zip(self.used, earlier or self.gradients):
            p.grad = grad
        return self.losses.clone()

    def capture(self, tensors):
        self.inputs = [tensor.clone() for tensor in tensors]
        self.replay, self.losses = capture_graph(self.new_gradients)
        self.used = [p for p in self.parameters if p.grad is not None]
        self.gradients = [p.grad for p in self.used]
        for p in self.used:
            p.grad = None

    def new_gradients(self):
        """Runs the passes so that they make the gradients as new tensors."""
        for p in self.parameters:
            p.grad = None
        return self.passes(*self.inputs)
