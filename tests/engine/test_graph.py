"""engine/graph.py: passes that are replayed train as passes that are run."""

import types

import numpy as np
import pytest
import torch
from runs import assert_same_state, logged, run, tiny

import configs
import engine
from engine import graph
from runtime.ranks import ALONE

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def stand_in(parameters):
    """graph.capture_graph without a GPU: a replay runs the function, and writes what it gives where the
    first result and the first gradients lie."""
    def record(function):
        result = function()
        gradients = [p.grad for p in parameters]

        def replay():
            result.copy_(function())
            for grad, p in zip(gradients, parameters):
                grad.copy_(p.grad)
        return replay, result
    return record


def test_gradients_are_written_where_there_are_none_and_added_to_where_there_are(monkeypatch):
    net = torch.nn.Linear(3, 2)
    parameters = list(net.parameters())
    monkeypatch.setattr(graph, "capture_graph", stand_in(parameters))

    def passes(x, scale):
        losses = scale * net(x).pow(2).mean(1)
        losses.mean().backward()
        return losses.detach()

    recorded = graph.Recorded(passes, parameters)
    inputs = [(torch.randn(4, 3), torch.rand(())) for _ in range(4)]
    found = [recorded(*given) for given in inputs[:1]]
    first = [p.grad.clone() for p in parameters]
    found += [recorded(*given) for given in inputs[1:3]]
    three = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    found.append(recorded(*inputs[3]))
    last = [p.grad.clone() for p in parameters]
    for grads, numbers in ((first, [0]), (three, [0, 1, 2]), (last, [3])):
        net.zero_grad(set_to_none=True)
        for k in numbers:
            assert torch.equal(passes(*inputs[k]), found[k])
        for grad, p in zip(grads, parameters):
            torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_run_that_replays_is_the_run_that_does_not(shards, quick_runs, tmp_path, micro_batch,
                                                     monkeypatch):
    run(tiny(shards, tmp_path / "plain", micro_batch=micro_batch))
    monkeypatch.setattr(engine, "can_capture", lambda config, ranks, device: config.graph)
    # what the loop hands over as parameters is what the stand-in writes to
    monkeypatch.setattr(graph.Recorded, "capture", with_stand_in(graph.Recorded.capture))
    run(tiny(shards, tmp_path / "replayed", micro_batch=micro_batch, graph=True))
    assert logged(tmp_path / "plain") == logged(tmp_path / "replayed")
    assert_same_state(tmp_path / "plain", tmp_path / "replayed", 6)


def with_stand_in(capture):
    def changed(self, tensors):
        original, graph.capture_graph = graph.capture_graph, stand_in(self.parameters)
        try:
            capture(self, tensors)
        finally:
            graph.capture_graph = original
    return changed


def test_passes_are_recorded_on_one_gpu_where_it_is_asked_for():
    asked, not_asked = types.SimpleNamespace(graph=True), types.SimpleNamespace(graph=False)
    two = types.SimpleNamespace(world=2)
    assert engine.can_capture(asked, ALONE, CUDA)
    assert not engine.can_capture(asked, ALONE, CPU)
    assert not engine.can_capture(asked, two, CUDA)
    assert not engine.can_capture(not_asked, ALONE, CUDA)
    assert not configs.Config.graph


@needs_gpu
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4}, {"checkpoint_activations": True},
                                     {"compile": True}, {"precision": "bf16"}])
def test_a_graph_trains_as_kernels_that_are_launched(shards, tmp_path, changes):
    losses = []
    for recorded in (False, True):
        said = run(tiny(shards, tmp_path / str(recorded), graph=recorded,
                        **{"device": "cuda", "validate_every": 3, "eval_pairs": 4, **changes}))
        assert ("as a CUDA graph" in said) == recorded
        losses.append(logged(tmp_path / str(recorded)))
    bound = 3e-2 if changes.get("precision") else 1e-3      # cuDNN may choose other kernels
    np.testing.assert_allclose(*losses, rtol=bound)
