"""diffusers_keys.py: diffusers computes the same from our folders, and we from theirs."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from golden import fill
from torch import nn

from runtime import checkpoint
from runtime import export as diffusers_keys
import model
from runtime import foreign as tensorfile
from runtime.tensors import write_safetensors
from clip import CLIP
from vae import AutoencoderKL

UNETS = {       # levels, blocks and places of attention differ; heads as diffusers counts them
    "two levels": dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                       attention_resolutions=(1,), num_heads=4),
    "as zero123": dict(model_channels=32, channel_mult=(1, 2, 2, 2), num_res_blocks=2,
                       attention_resolutions=(4, 2, 1), num_heads=8),
    "one level": dict(model_channels=32, channel_mult=(1,), num_res_blocks=1,
                      attention_resolutions=(1,), num_heads=2),
}


def network(kind="two levels", pose=4):
    """All parts of the model, small, with golden values."""
    root = nn.Module()
    root.model = nn.Module()
    root.model.diffusion_model = model.UNet(8, 4, context_dim=16, **UNETS[kind])
    root.first_stage_model = AutoencoderKL(ch=32, ch_mult=(1, 2))
    root.cond_stage_model = nn.Module()
    root.cond_stage_model.model = CLIP(16, 28, 2, 128, 14, 7, 11, 16)
    root.cc_projection = nn.Linear(16 + pose, 16)
    return fill(root).eval()


def folder_of(tmp_path, module, kind="two levels"):
    path, file = tmp_path / "diffusers", tmp_path / "module.safetensors"
    write_safetensors(file, module.state_dict())
    tensors = tensorfile.read_file(file)
    tensors.meta["config"] = {"num_heads": UNETS[kind]["num_heads"], "prediction": "z"}
    left = diffusers_keys.write_diffusers(path, tensors)
    assert json.loads((path / "scheduler/scheduler_config.json").read_text())[
        "prediction_type"] == "sample"
    assert set(left) == set(checkpoint.LEFTOVERS)
    return path


@pytest.mark.parametrize("kind", UNETS)
def test_a_folder_reads_back_bit_for_bit(tmp_path, kind):
    module, blank = network(kind), network(kind)
    path = folder_of(tmp_path, module, kind)
    with torch.no_grad():
        for name, parameter in blank.named_parameters():
            parameter.mul_(0) if name not in checkpoint.LEFTOVERS else None
    report = checkpoint.load_model(blank, path)
    found = blank.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(found[name], value), name
    assert not report.fresh


def test_a_folder_fills_a_module_on_meta(tmp_path):
    module = network()
    blank = network().to("meta")
    blank.register_buffer("betas", torch.empty(1000, device="meta"))
    report = checkpoint.load_model(blank, folder_of(tmp_path, module))
    assert report.fresh == ["betas"]        # the caller knows the schedule
    found = blank.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(found[name], torch.zeros_like(value) if name in checkpoint.LEFTOVERS
                           else value), name


def test_convert_goes_to_a_diffusers_folder_and_back(tmp_path):
    module = network()
    torch.save({"state_dict": module.state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    assert set(checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b")) == set(checkpoint.LEFTOVERS)
    assert (tmp_path / "b/model_index.json").exists()
    assert checkpoint.convert(tmp_path / "b", tmp_path / "c.safetensors") == []
    found = checkpoint.read(tmp_path / "c.safetensors")
    for name, value in module.state_dict().items():
        assert name in checkpoint.LEFTOVERS or torch.equal(found[name], value)


def test_half_precision_files_of_the_older_kind_read(tmp_path):
    # kxic/zero123-xl: .bin files, a folder cc_projection with `projection.*`, old attention names
    module = network()
    path = folder_of(tmp_path, module)
    shutil.rmtree(path / "clip_camera_projection")
    for part in ("unet", "vae", "image_encoder", "cc_projection"):
        file = next((path / part).glob("*.safetensors"))
        state = dict(tensorfile.read_file(file))
        file.unlink()
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")):
            if part == "vae":
                state = {name.replace(new, old): value for name, value in state.items()}
        state = {name: value.half() for name, value in state.items()}
        if part == "image_encoder":
            state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        stem = "pytorch_model" if part == "image_encoder" else "diffusion_pytorch_model"
        torch.save(state, path / part / f"{stem}.bin")
    blank = network()
    checkpoint.load_model(blank, path)
    found = blank.state_dict()
    for name, value in module.state_dict().items():
        if name not in checkpoint.LEFTOVERS:
            assert torch.equal(found[name], value.half().float()), name


@pytest.mark.parametrize("ending", ["safetensors.index.json", "safetensors.index.fp16.json"])
def test_a_network_in_several_files_reads_by_its_index(tmp_path, ending):
    module, blank = network(), network()
    path = folder_of(tmp_path, module)
    whole = path / "unet/diffusion_pytorch_model.safetensors"
    state, places = dict(tensorfile.read_file(whole)), {}
    for i, names in enumerate((list(state)[::2], list(state)[1::2])):
        part = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(path / "unet" / part, {name: state[name] for name in names})
        places |= dict.fromkeys(names, part)
    whole.unlink()
    index = path / "unet" / f"diffusion_pytorch_model.{ending}"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with torch.no_grad():
        blank.model.diffusion_model.time_embed[0].weight.zero_()
    checkpoint.load_model(blank, path)
    for name, value in module.state_dict().items():
        assert torch.equal(blank.state_dict()[name], value), name
    for bad in ({"x": "../vae/diffusion_pytorch_model.safetensors"}, {"x": "/etc/passwd"},
                {**places, "lost": part}, 3):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match="index"):
            checkpoint.read(path)


def test_a_folder_of_a_small_run_keeps_its_configuration(tmp_path):
    config = {"mode": "7dof", "image_size": 64, "num_heads": 4, "init": "zero123-xl.ckpt"}
    state = {name: value for name, value in network().state_dict().items()
             if not name.startswith(checkpoint.FROZEN)}
    average = {name: value + 1 for name, value in state.items() if name.startswith(checkpoint.UNET)}
    run = checkpoint.save(tmp_path / "out", 7, state, average, {},
                          {"config": config, "ema_updates": 7})
    left = checkpoint.convert(run, tmp_path / "a")
    assert any(name.startswith(checkpoint.EMA) for name in left)
    found = checkpoint.read(tmp_path / "a")
    assert found.meta["config"] == config and found.step == 7
    assert json.loads((tmp_path / "a/unet/config.json").read_text())["sample_size"] == 8
    name = checkpoint.UNET + "out.2.bias"
    assert torch.equal(found[name], state[name])
    checkpoint.convert(run, tmp_path / "b", ema=True)
    assert torch.equal(checkpoint.read(tmp_path / "b")[name], average[name])


def test_a_part_without_one_weight_file_is_refused(tmp_path):
    path = folder_of(tmp_path, network())
    next((path / "vae").glob("*.safetensors")).rename(path / "vae/part-1-of-2.safetensors")
    with pytest.raises(FileNotFoundError, match="part-1-of-2.safetensors"):
        checkpoint.read(path)


def test_a_foreign_network_is_listed_not_half_loaded(tmp_path):
    path = folder_of(tmp_path, network())
    state = dict(tensorfile.read_file(path / "unet/diffusion_pytorch_model.safetensors"))
    state["add_embedding.linear_1.weight"] = torch.zeros(3)
    write_safetensors(path / "unet/diffusion_pytorch_model.safetensors", state)
    with pytest.raises(ValueError, match="1 unexpected .*add_embedding.linear_1.weight"):
        checkpoint.load_model(network(), path)


def test_misshapen_parts_of_a_matrix_are_refused_in_one_line(tmp_path):
    path = folder_of(tmp_path, network())
    file = path / "image_encoder/model.safetensors"
    state = dict(tensorfile.read_file(file))
    state["vision_model.encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(3)
    write_safetensors(file, state)
    with pytest.raises(ValueError, match=r"image_encoder: tensors of shapes .*\[3\].* not what"):
        checkpoint.read(path)


def test_a_network_that_diffusers_lacks_is_refused_in_one_line(tmp_path):
    state = network().state_dict() | {"model.diffusion_model.surprise.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="surprise.weight"):
        checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_first_level_wider_than_the_input_convolution_is_refused(tmp_path):
    # diffusers gives both the same width
    module = network()
    module.model.diffusion_model = model.UNet(8, 4, 32, (2,), 1, (1,), 2, 16)
    torch.save(module.state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="first level is 64 wide"):
        checkpoint.convert(tmp_path / "a.ckpt", tmp_path / "b")


# ---- oracles

@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def assert_close(found, expected):
    # the same float32 weights, other kernels: rounding alone
    error = (found - expected).abs().max().item()
    assert error <= 2e-5 * expected.abs().max().item(), error


@pytest.mark.parametrize("kind", UNETS)
@torch.no_grad()
def test_diffusers_unet_computes_the_same_from_our_folder(tmp_path, diffusers, kind):
    module = network(kind)
    path = folder_of(tmp_path, module, kind)
    oracle = diffusers.UNet2DConditionModel.from_pretrained(path / "unet", low_cpu_mem_usage=False)
    torch.manual_seed(0)
    x, context, t = torch.randn(2, 8, 16, 16), torch.randn(2, 1, 16), torch.tensor([3, 961])
    assert_close(module.model.diffusion_model(x, t, context), oracle.eval()(x, t, context).sample)


@torch.no_grad()
def test_diffusers_vae_computes_the_same_from_our_folder(tmp_path, diffusers):
    module = network().first_stage_model
    path = folder_of(tmp_path, network())
    oracle = diffusers.AutoencoderKL.from_pretrained(path / "vae", low_cpu_mem_usage=False).eval()
    torch.manual_seed(0)
    image, latent = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    posterior = oracle.encode(image).latent_dist
    mean, logvar = module.encode(image)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    assert_close(module.decode(latent), oracle.decode(latent).sample)


@torch.no_grad()
def test_transformers_clip_computes_the_same_from_our_folder(tmp_path, transformers):
    module = network().cond_stage_model.model
    path = folder_of(tmp_path, network()) / "image_encoder"
    oracle = transformers.CLIPVisionModelWithProjection.from_pretrained(path).eval()
    torch.manual_seed(0)
    image = torch.rand(2, 3, 28, 28) * 2 - 1
    assert_close(module.encode_image(image), oracle(module.preprocess(image)).image_embeds)


def pipelines(diffusers):
    """The parts of zero123-hf's and threestudio's pipelines, under their names."""
    from diffusers.configuration_utils import register_to_config

    class CCProjection(diffusers.ModelMixin, diffusers.ConfigMixin):
        @register_to_config
        def __init__(self, in_channel=772, out_channel=768):
            super().__init__()
            self.projection = nn.Linear(in_channel, out_channel)

    class CLIPCameraProjection(diffusers.ModelMixin, diffusers.ConfigMixin):
        @register_to_config
        def __init__(self, embedding_dim=768, additional_embeddings=4):
            super().__init__()
            self.proj = nn.Linear(embedding_dim + additional_embeddings, embedding_dim)

    class Zero1to3StableDiffusionPipeline(diffusers.DiffusionPipeline):
        _optional_components = ["safety_checker", "feature_extractor"]

        def __init__(self, vae, image_encoder, unet, scheduler, safety_checker, feature_extractor,
                     cc_projection, requires_safety_checker: bool = True):
            super().__init__()
            self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet,
                                  cc_projection=cc_projection)
            self.register_to_config(requires_safety_checker=requires_safety_checker)
            self.pose = cc_projection.projection

    class Zero123Pipeline(diffusers.DiffusionPipeline):
        _optional_components = ["safety_checker", "feature_extractor"]

        def __init__(self, vae, image_encoder, unet, scheduler, safety_checker, feature_extractor,
                     clip_camera_projection, requires_safety_checker: bool = True):
            super().__init__()
            self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet,
                                  clip_camera_projection=clip_camera_projection)
            self.register_to_config(requires_safety_checker=requires_safety_checker)
            self.pose = clip_camera_projection.proj

    return {"pipeline_zero1to3": (Zero1to3StableDiffusionPipeline, CCProjection),
            "zero123": (Zero123Pipeline, CLIPCameraProjection)}


@pytest.mark.parametrize("module", ["pipeline_zero1to3", "zero123"])
def test_the_pipelines_of_zero123_hf_and_threestudio_open_our_folder(
        tmp_path, monkeypatch, diffusers, transformers, module):
    pipeline, projection = pipelines(diffusers)[module]
    theirs = types.ModuleType(module)
    theirs.ModelMixin = diffusers.ModelMixin
    setattr(theirs, projection.__name__, projection)
    monkeypatch.setitem(sys.modules, module, theirs)
    ours = network()
    found = pipeline.from_pretrained(folder_of(tmp_path, ours), low_cpu_mem_usage=False)
    assert torch.equal(found.pose.weight, ours.cc_projection.weight)
    assert found.config["requires_safety_checker"] is False


@torch.no_grad()
def test_folders_of_diffusers_give_the_same_results_here(tmp_path, diffusers, transformers):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2).eval()
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, image_size=28, patch_size=14, hidden_act="quick_gelu")).eval()
    for part, theirs in (("unet", unet), ("vae", vae), ("image_encoder", clip)):
        theirs.save_pretrained(tmp_path / part)
    (tmp_path / "cc_projection").mkdir()
    torch.save({"projection.weight": torch.randn(16, 20), "projection.bias": torch.randn(16)},
               tmp_path / "cc_projection/diffusion_pytorch_model.bin")
    module = network()
    checkpoint.load_model(module, tmp_path)
    x, context, t = torch.randn(2, 8, 16, 16), torch.randn(2, 1, 16), torch.tensor([3, 961])
    assert_close(module.model.diffusion_model(x, t, context), unet(x, t, context).sample)
    image = torch.rand(2, 3, 28, 28) * 2 - 1
    assert_close(module.first_stage_model.encode(image)[0], vae.encode(image).latent_dist.mean)
    ours = module.cond_stage_model.model
    assert_close(ours.encode_image(image), clip(ours.preprocess(image)).image_embeds)


def test_written_names_and_shapes_are_those_of_zero123_xl_in_diffusers(tmp_path, diffusers):
    # at full size, on the meta device: names, shapes and configuration alone
    keys = json.loads((Path(__file__).parents[1] / "golden/zero123_keys.json").read_text())
    def written(part):
        network = diffusers_keys.NETWORKS[part]
        found = {name.removeprefix(network.prefix): torch.empty(shape, device="meta")
                 for name, (shape, _) in keys["keys"].items() if name.startswith(network.prefix)}
        entries = diffusers_keys.to_diffusers(network, found)
        return entries, network.config(entries)
    entries, config = written("unet")
    with torch.device("meta"):
        oracle = diffusers.UNet2DConditionModel.from_config({**config, "attention_head_dim": 8})
    shapes = {name: value.shape for name, value in oracle.state_dict().items()}
    assert {name: value.shape for name, value in entries.items()} == shapes
    entries, config = written("vae")
    with torch.device("meta"):
        oracle = diffusers.AutoencoderKL.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in oracle.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in entries.items()} == shapes
