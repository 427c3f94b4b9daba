"""runtime/lora.py: low-rank updates train as the weights would, are saved alone, and are merged exactly."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from runs import SOURCES, assert_same_state, logged, run, saved, tiny

import configs
import engine
import model
from runtime import checkpoint, lora
from runtime.tensors import LazyTensor
from views import render

LOW = {"lora_rank": 4, "lora_convs": True, "lr": 1e-2}
UP = "model.diffusion_model.time_embed.0." + lora.UP


@pytest.mark.parametrize("converts_first", [True, False])
def test_an_update_of_full_rank_has_the_gradient_of_its_weight(converts_first):
    config = replace(configs.Config(SOURCES), latent="pixels", prediction="z", image_size=16, norm_groups=8,
                     model_channels=16, channel_mult=(1, 2), num_res_blocks=1, context_dim=32,
                     attention_resolutions=(2,), num_heads=1, lora_rank=1024, lora_convs=True)
    torch.manual_seed(0)
    net, grid = model.build(config).train(), (2, *model.latent_shape(config))
    for p in net.parameters():
        p.data = torch.randn(p.shape) * 0.1         # so that no layer of zeros hides another
    inputs = torch.randn(grid), torch.tensor([3, 700]), torch.randn(grid), torch.randn(2, 1, 32)
    plain = copy.deepcopy(net)
    plain.predict(*inputs).square().mean().backward()
    for change in (engine.convert, lambda net: lora.add(net, config))[::1 if converts_first else -1]:
        change(net)
    factors, whole = lora.updates(net), 0
    for name, p in factors.items():
        if name.endswith(lora.DOWN):
            p.data = torch.eye(*p.shape)
    net.predict(*inputs).square().mean().backward()
    for name, p in plain.named_parameters():
        up = factors.get(name.removesuffix("weight") + lora.UP)
        if up is not None and p.grad is not None:
            whole += up.shape[1] == p[0].numel()    # else the rank is that of the rows, which are fewer
            torch.testing.assert_close(up.grad, p.grad.flatten(1)[:, :up.shape[1]], rtol=1e-3, atol=1e-6)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {*factors, "cc_projection.weight", "cc_projection.bias"} and whole > 15


@pytest.fixture(scope="module")
def low_run(shards, whole_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("low") / "run"
    said = run(tiny(shards, out, init=whole_run[0], **LOW))
    return out, said


def test_a_run_saves_updates_and_projection_alone_and_goes_on_bit_for_bit(
        shards, whole_run, low_run, tmp_path):
    run(tiny(shards, tmp_path / "halves", init=whole_run[0], steps=3, **LOW))
    run(tiny(shards, tmp_path / "halves", init=whole_run[0], **LOW))
    assert logged(tmp_path / "halves") == logged(low_run[0])
    assert_same_state(tmp_path / "halves", low_run[0], 6)
    names = set(saved(low_run[0], 6))
    assert all(lora.is_update(name) or name.startswith("cc_projection.") for name in names)
    assert {name for name in names if lora.is_update(name)} == set(saved(low_run[0], 6, "ema"))
    assert any(saved(low_run[0], 6)[name].any() for name in names if name.endswith(lora.UP))


def test_merged_weights_are_those_that_were_trained_and_their_views_the_same(
        whole_run, low_run, tmp_path):
    out, base = low_run[0], str(whole_run[0])
    for ema in (False, True):
        checkpoint.convert(out, tmp_path / f"merged{ema}.safetensors", ema=ema, init=base)
    read, weights = checkpoint.read(out, base), saved(whole_run[0], 6, "ema")
    updates, averages = saved(out, 6), saved(out, 6, "ema")
    for merged, factors in (("mergedFalse", updates), ("mergedTrue", averages)):
        found, name = load_file(tmp_path / f"{merged}.safetensors"), "model.diffusion_model.time_embed.0."
        wanted = lora.summed(weights[name + "weight"], factors[name + lora.UP], factors[name + lora.DOWN])
        assert torch.equal(found[name + "weight"], wanted) and not torch.equal(wanted, weights[name + "weight"])
        assert not any(map(lora.is_update, found))
    nets = [render.load(source, "cpu", "fp32")[0].state_dict()
            for source in (read, tmp_path / "mergedTrue.safetensors")]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_updates_are_opened_with_the_file_that_they_were_trained_on_and_no_other(
        shards, whole_run, low_run, tmp_path):
    with pytest.raises(ValueError, match="holds low-rank updates .* name it with --init=.*whole"):
        checkpoint.read(low_run[0])
    assert "step 6" in checkpoint.info(low_run[0])
    run(tiny(shards, tmp_path / "other", steps=1))
    says = r"other is not what the updates in .*step_00000006 were trained on: its .* is \w{8}, theirs is \w{8}"
    for open_it in (lambda: checkpoint.read(low_run[0], tmp_path / "other"),
                    lambda: run(tiny(shards, low_run[0], init=tmp_path / "other", steps=9, **LOW))):
        with pytest.raises(ValueError, match=says) as refused:
            open_it()
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="--init=FILE"):
        run(tiny(shards, tmp_path / "none", **LOW))


def test_updates_that_fit_no_weight_are_refused(whole_run, low_run):
    found = checkpoint.read_any(low_run[0])
    for name in (UP, UP.replace(lora.UP, lora.DOWN)):
        for change in (lambda entries, name=name: entries.pop(name), lambda entries, name=name: entries.update(
                {name: replace(LazyTensor(torch.float32, (3, 5), None))})):
            entries = dict(found.entries)
            change(entries)
            with pytest.raises(ValueError, match="is no update of a weight"):
                checkpoint.read(checkpoint.StateDict(found.path, entries, found.meta), whole_run[0])
