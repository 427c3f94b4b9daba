"""Compiled training on several ranks, and weights laid out for GPUs."""

import copy
import os
import socket
import sys
import threading

import pytest
import torch
import torch.nn as nn
from runs import logged, run, tiny
from torch._dynamo.utils import counters

from runtime import checkpoint
from runtime import resume
import clip
import configs
import diffusion
from runtime import ranks as distributed
import engine
import model
import vae
from benchmarks import networks
from made import TINY_CLIP, tiny_config
from runtime.ranks import ALONE
from runtime.optimizer import Ema, Optimizer


def made(batch, **changes):
    """(Config, network without layers of zeros, pairs) of a tiny size."""
    step = networks.Step(tiny_config(batch, **changes), compiled=False)
    recompute = changes.get("checkpoint_activations", False)
    for stage in step.net.modules():
        if isinstance(stage, model.Stage):
            stage.recompute = recompute
    return step.config, step.net, (*step.tensors[:5], diffusion.Draws(*step.tensors[5:]))


def test_a_rank_that_leaves_lets_waiting_threads_have_the_interpreter(monkeypatch):
    """Gloo's wait for it to let go of tensors, and abort a process that ends before."""
    gate, done = threading.Lock(), []
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    gate.acquire()
    thread = threading.Thread(target=lambda: gate.acquire() and done.append(1))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)         # nobody gets it unless it is given away
    try:
        gate.release()
        distributed.leave()
        assert done
    finally:
        sys.setswitchinterval(interval)
        thread.join()


# ---- compiled, on two ranks

def logging_backend(events):
    """A backend that computes as uncompiled code does and notes when a backward graph is done."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def backward(graph, inputs):
        def call(*given):
            found = graph(*given)
            events.append("graph")
            return found
        return make_boxed_func(call)

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
                        bw_compiler=backward)


# compiled within seconds; of transformers the middle has one
ONE_LEVEL = {"model_channels": 96, "channel_mult": (1,), "attention_resolutions": (), "image_size": 8}


def compiled_rank(rank, port, box):
    """Puts, with activations kept and recomputed, the order in which graphs end and gradients go,
    and how much was compiled."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.BUCKET = 1
    ranks, _ = distributed.join(torch.device("cpu"))
    # as weights lie on a GPU, as others do, and as nothing does
    lies = (torch.zeros(4, 3, 3, 3).to(memory_format=torch.channels_last), torch.zeros(4, 3),
            torch.zeros(4, 3).T, torch.zeros(2, 3, 4, 5).permute(1, 0, 3, 2))
    for values in lies:
        truth = torch.arange(float(values.numel())).view(values.shape)
        if rank == 1:
            values.copy_(truth)
        assert ranks.broadcast(values, 1) is values and torch.equal(values, truth)
    box.put([compiled_steps(rank, ranks, recompute) for recompute in (False, True)])
    box.close()
    ranks.close()


def compiled_steps(rank, ranks, recompute):
    """(Order of what happens in the second step, how much was compiled) of a compiled network,
    whose gradients must be those of one that is not."""
    torch._dynamo.reset()
    counters.clear()
    _, net, _ = made(1, checkpoint_activations=recompute, **ONE_LEVEL)
    engine.channels_last(net)
    twin, events = copy.deepcopy(net), []
    torch.manual_seed(rank)
    _, _, given = made(1, **ONE_LEVEL)
    given = [values + rank for values in given[:-1]] + [given[-1]]
    net.model.diffusion_model.compile(backend=logging_backend(events))
    wrapped, plain = ranks.wrap(net), ranks.wrap(twin)

    def averages(state, bucket):
        events.append("sent")
        # waited for: a callback of Python may meet the group's end on gloo's thread, and hang
        done = torch.futures.Future()
        done.set_result(ranks.all_reduce(bucket.buffer().div_(2)))
        return done
    wrapped.register_comm_hook(None, averages)
    order = []
    for _ in range(2):
        for parameter in (*net.parameters(), *twin.parameters()):
            parameter.grad = None
        for module in (wrapped, plain):
            with module.no_sync():
                module(*given).mean().backward()
            events.clear()
            module(*given).mean().backward()
            order += [list(events)] if module is wrapped else []
    for (name, p), q in zip(net.named_parameters(), twin.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text: f"{name}: {text}")
    return order[-1], dict(counters["stats"])


def test_a_compiled_network_sends_gradients_while_the_rest_of_its_backward_pass_runs():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    box = torch.multiprocessing.get_context("fork").SimpleQueue()
    torch.multiprocessing.start_processes(compiled_rank, (port, box), 2, start_method="fork")
    for order, stats in (*box.get(), *box.get()):
        # buckets of 1 MB, and cc_projection's outside of the graphs
        assert order.count("graph") >= 3 and order.count("sent") >= 3
        last = len(order) - 1 - order[::-1].index("graph")
        assert order[:last].count("sent") >= 2, order
        assert stats["unique_graphs"] == 1, "a micro-step without sending was compiled anew"


def test_a_compiled_run_compiles_its_step_and_nothing_else(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "check_compiler", lambda device, without: None)
    monkeypatch.setattr(engine, "compiled", lambda net: net.model.diffusion_model.compile(
        backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    options = {"steps": 4, "micro_batch": 4, "validate_every": 2, "validate_pairs": 6,
               "eval_pairs": 6}
    said = run(tiny(shards, tmp_path / "compiled", compile=True, **options))
    assert counters["stats"]["unique_graphs"] == 1 and "compiled" in said
    run(tiny(shards, tmp_path / "plain", **options))
    # float32, in another order
    assert logged(tmp_path / "compiled") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)


def test_a_machine_that_cannot_compile_is_told_so_at_start(shards, tmp_path, monkeypatch):
    def compile(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS")
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ValueError) as refused:
        run(tiny(shards, tmp_path / "out", compile=True))
    assert "No working C++ compiler found); --compile=false does without it" in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_the_published_run_is_compiled():
    for name in ("mix", "mix_encoded"):
        assert configs.load([f"configs/{name}.py"]).compile


# ---- weights laid out for GPUs

def test_the_layout_of_weights_is_not_seen_in_checkpoints_and_a_resume_keeps_it(tmp_path):
    config, net, given = made(1)
    engine.channels_last(net)
    ema, optimizer = Ema(net.model.diffusion_model, 0.9), Optimizer(net, config)
    net(*given).mean().backward()
    optimizer.step(1000)
    ema.update()
    writer, folders = checkpoint.Writer(), [tmp_path / "laid out", tmp_path / "plain"]
    for folder in folders:
        parts = [net.state_dict(), dict(ema.tensors()), dict(optimizer.tensors())]
        if folder.name == "plain":
            parts = [{name: t.contiguous() for name, t in part.items()} for part in parts]
        writer.save(folder, 1, *(part.items() for part in parts), {"ema_updates": 1})
        writer.wait()
    folders = [folder / "step_00000001" for folder in folders]
    for name in checkpoint.FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    fresh = networks.network(config)
    engine.channels_last(fresh)
    ema, optimizer = resume.restore_or_init(
        config, fresh, checkpoint.load_run(folders[0]), ALONE, torch.device("cpu"))
    strided = 0
    for name, p in optimizer.trained.items():
        state = optimizer.adamw.state[p]
        assert p.stride() == state["exp_avg"].stride() == state["exp_avg_sq"].stride()
        strided += not p.is_contiguous()
    assert strided and all(average.stride() == ema.live[name].stride()
                           for name, average in ema.average.items())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(),
                                                 net.state_dict().values()))


@pytest.mark.parametrize("encoders, wanted", [
    ((model.Pixels, model.NoEmbedding), ["UNet"]),      # nothing is frozen
    ((lambda: vae.AutoencoderKL(32, (1,)), lambda: clip.CLIP(**TINY_CLIP)),
     ["UNet", "encode", "encode_image"])])
def test_the_unet_and_the_frozen_encoders_are_compiled_not_the_decoder(encoders, wanted,
                                                                       monkeypatch):
    compiled, net = [], nn.Module()
    net.model, net.cond_stage_model = nn.Module(), nn.Module()
    net.model.diffusion_model = nn.Identity()
    net.first_stage_model, net.cond_stage_model.model = (build() for build in encoders)
    monkeypatch.setattr(net.model.diffusion_model, "compile", lambda: compiled.append("UNet"))
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or f.__name__)
    engine.compiled(net)
    assert compiled == wanted
    assert all(name in (net.first_stage_model.encode, net.cond_stage_model.model.encode_image)
               for name in wanted[1:])
