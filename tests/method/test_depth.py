"""depth.py against the reference's numbers: the fit to known depths, and the depth network."""

import camera
import depth
import golden
import pytest
import torch

from runtime.networks import load_depth

NETWORK = "midas_dpt_swin2_tiny_256"
STAGES = (1, 2, 3, 4)
# every part of the full network in small: shifted windows at two sizes, one window for all at two
SMALL = {"image_size": 64, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8),
         "window_size": 4, "features": 16}


@pytest.fixture(scope="module")
def cameras():
    """Disparity, sparse depth and what the reference made of them, for 18 views: arrays by name."""
    return golden.case("camera_conditioning")[1]


@pytest.fixture(scope="module")
def network():
    """The full network with the golden weights, frozen."""
    return golden.fill(depth.DPT()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image():
    return golden.network_input(f"{NETWORK}/image", (1, 3, 256, 256), tanh=True)


@pytest.fixture(scope="module")
def outputs(network, image):
    """Output of every stage of the network on the golden image: tensors by the fixture's names."""
    encoder, decoder, found = network.pretrained.model, network.scratch, {}

    def keep(name, module):
        hooks.append(module.register_forward_hook(lambda _, x, y: found.update({name: y})))

    hooks = []
    for i in STAGES:
        keep(f"layer_{i}", encoder.layers[i - 1].blocks[-1])
        keep(f"layer_{i}_rn", getattr(decoder, f"layer{i}_rn"))
        keep(f"path_{i}", getattr(decoder, f"refinenet{i}"))
        for j, block in enumerate(encoder.layers[i - 1].blocks):
            keep(f"layers.{i - 1}.blocks.{j}", block)
    keep("patch_embed", encoder.patch_embed)
    keep("before_last_relu", decoder.output_conv[-2])
    found["out"] = network(image)
    for hook in hooks:
        hook.remove()
    for i in STAGES:
        found[f"layer_{i}"] = found[f"layer_{i}"].permute(0, 3, 1, 2)
    found["patch_embed"] = found["patch_embed"].flatten(1, 2)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_and_shift_are_the_reference_s_least_squares(cameras, dtype):
    """Row 0 is regular; rows 1 to 3 have no pixel, one pixel, one disparity: scale = shift = 0."""
    disparity, target = cameras["css/in_prediction"].to(dtype), cameras["css/in_target"].to(dtype)
    scale, shift = depth.scale_and_shift(disparity, target, cameras["css/in_mask"])
    assert scale.dtype == shift.dtype == dtype
    golden.assert_close(scale, cameras["css/scale"])
    golden.assert_close(shift, cameras["css/shift"])
    assert scale[1:].eq(0).all() and shift[1:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_view_s_fit_to_known_depth_is_the_reference_s(cameras, dtype):
    disparity = cameras["in/depth_model_disparity"].to(dtype)
    known = cameras["in/depth_cond"][..., 0].to(dtype)
    target = 1 / known.clamp(*depth.DEPTH_RANGE)
    scale, shift = depth.scale_and_shift(disparity, target, known > 0)
    for row in range(len(disparity)):
        expected = cameras["compute_scale_and_shift/scale"][row]
        golden.assert_close(scale[row], expected)
        # the reference takes the shift from the difference of two numbers as large as this one
        terms = (expected * disparity[row].mean()).abs().item()
        golden.assert_close(shift[row], cameras["compute_scale_and_shift/shift"][row], 1e-6 * terms)
    # compared as disparities: the reference's rounding of a disparity near 0 is all of its depth
    found = depth.dense_depth(disparity, known, blend=False)[:, ::2, ::2]
    for row, expected in zip(found, cameras["aligned_monodepth[:, ::2, ::2]"], strict=True):
        golden.assert_close(1 / row, 1 / expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blend", [True, False])
def test_quantile_scale_of_dense_depth_is_the_reference_s(cameras, dtype, blend):
    disparity = cameras["in/depth_model_disparity"].to(dtype)
    known = cameras["in/depth_cond"][..., 0].to(dtype)
    scales = camera.quantile_scale(depth.dense_depth(disparity, known, blend))
    expected = cameras[f"quantile_scale_{'blend' if blend else 'noblend'}/scales"]
    for i in range(len(scales)):
        golden.assert_close(scales[i], expected[i])


def test_a_disparity_that_varies_by_rounding_alone_counts_as_constant():
    """0.1 is no float32 number: sums over 65536 of it are not exact, and no slope either."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 256, 256, generator=generator)
    scale, shift = depth.scale_and_shift(torch.full_like(target, 0.1), target, target > 0)
    assert scale.item() == shift.item() == 0


def test_a_small_slope_on_a_large_disparity_is_found_in_float32():
    """The normal equations' determinant loses all digits here: 1000^2 against a spread of 1."""
    generator = torch.Generator().manual_seed(0)
    disparity = 1000 + torch.rand(1, 256, 256, generator=generator)
    target = 2 * (disparity - 1000) + 3
    scale, shift = depth.scale_and_shift(disparity, target, torch.ones_like(target))
    # a float32 near 1000 is known to 6e-5, and averages over 65536 of them to less
    assert scale.item() == pytest.approx(2, rel=1e-4)
    assert (scale * 1000 + shift).item() == pytest.approx(3, rel=1e-3)


def test_a_depth_that_is_nan_counts_as_unknown():
    generator = torch.Generator().manual_seed(0)
    disparity = 1 + torch.rand(1, 16, 16, generator=generator)
    known = 1 / disparity
    known[0, :2] = 0
    expected = depth.dense_depth(disparity, known, blend=True)
    known[0, 0] = torch.nan
    torch.testing.assert_close(depth.dense_depth(disparity, known, blend=True), expected)


def test_state_dict_has_the_checkpoint_s_names_shapes_and_order(network):
    expected, _ = golden.case("midas_keys")
    found = {name: [list(w.shape), str(w.dtype).removeprefix("torch.")]
             for name, w in network.state_dict().items()}
    assert found == expected["keys"]
    assert list(found) == list(expected["keys"])
    assert sum(w.numel() for w in network.parameters()) == expected["parameters"]
    buffers = [name for name, _ in network.named_buffers() if name in found]
    assert buffers == expected["buffers_in_state_dict"]


def test_every_stage_of_the_network_equals_the_reference(outputs):
    description, arrays = golden.case(NETWORK)
    (observed,) = description["tolerance_observed"].values()
    for name, expected in arrays.items():
        stage, _, index = name.partition("[")
        shape = description["shapes"].get(stage, description["out_shape"])
        assert list(outputs[stage].shape) == shape
        # an index is a channel ("0"), all (":") or every n-th ("::n")
        index = [int(part) if part.isdigit() else slice(None, None, int(part.lstrip(":") or 1))
                 for part in index.rstrip("]").split(", ")]
        golden.assert_close(outputs[stage][tuple(index)], expected, observed[stage])


def test_statistics_of_all_outputs_equal_the_reference_s(outputs):
    """All the pixels that the slices leave out, and every transformer block."""
    description, _ = golden.case(NETWORK)
    rows = {**description["stats"], **description["stats_of_transformer_blocks"],
            "out": description["stats_out"]}
    for name, row in rows.items():
        x = outputs[name].double()
        # sums of signed numbers cancel: a mean is compared on the scale of the standard deviation
        assert x.mean().item() == pytest.approx(row["mean"], abs=1e-5 * row["std"]), name
        assert x.std(correction=0).item() == pytest.approx(row["std"], rel=1e-5), name
        assert x.abs().sum().item() == pytest.approx(row["abs_sum"], rel=1e-5), name
        largest = max(-row["min"], row["max"])
        assert x.min().item() == pytest.approx(row["min"], abs=1e-5 * largest), name
        assert x.max().item() == pytest.approx(row["max"], abs=1e-5 * largest), name


def transformers_model(network, settings):
    """transformers' DPT over Swin V2, of the same sizes and with the same weights."""
    oracle = pytest.importorskip("transformers", reason="transformers is not installed")
    dim, depths = settings["embed_dim"], settings["depths"]
    encoder = oracle.Swinv2Config(
        image_size=settings["image_size"], embed_dim=dim, depths=list(depths),
        num_heads=list(settings["num_heads"]), window_size=settings["window_size"],
        out_features=[f"stage{i}" for i in STAGES])
    model = oracle.DPTForDepthEstimation(oracle.DPTConfig(
        backbone_config=encoder, neck_hidden_sizes=[dim, 2 * dim, 4 * dim, 8 * dim],
        fusion_hidden_size=settings["features"], use_bias_in_fusion_residual=True))
    renames = [
        ("pretrained.model.patch_embed.proj", "backbone.embeddings.patch_embeddings.projection"),
        ("pretrained.model.patch_embed", "backbone.embeddings"),
        ("pretrained.model", "backbone.encoder"),
        ("attn.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
        ("attn.logit_scale", "attention.self.logit_scale"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        *((f"scratch.layer{i}_rn", f"neck.convs.{i - 1}") for i in STAGES),
        *((f"scratch.refinenet{i}", f"neck.fusion_stage.layers.{4 - i}") for i in STAGES),
        ("out_conv", "projection"), ("resConfUnit", "residual_layer"),
        (".conv1", ".convolution1"), (".conv2", ".convolution2"),
        ("scratch.output_conv", "head.head")]
    weights = {}
    for name, w in network.named_parameters():
        if name.startswith(("pretrained.model.norm.", "pretrained.model.head.")):
            continue
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), w.chunk(3), strict=True):
                weights[name.replace("attn.qkv", f"attention.self.{part}")] = rows
        else:
            name = name.replace("attn.q_bias", "attention.self.query.bias")
            weights[name.replace("attn.v_bias", "attention.self.value.bias")] = w
    model.to(next(network.parameters())).load_state_dict(weights)
    return model.eval()


def test_small_network_equals_transformers_in_float64():
    """Two images, other widths and windows than the golden case's, temperatures at the limit."""
    network = golden.fill(depth.DPT(**SMALL)).double().eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("logit_scale"):
            parameter += 4  # e^4.05 for some heads, and for some above the limit of 100
            parameter[::2] += 1
    network.scratch.output_conv[-2].bias += 3  # so that most of the disparity is above 0
    image = golden.network_input("oracle", (2, 3, 64, 64), tanh=True).double()
    for name, buffer in network.named_buffers():
        if name.endswith("attn_mask"):
            buffer *= 2  # transformers adds its mask twice, which shows when scores reach 100
    expected = transformers_model(network, SMALL)(image).predicted_depth
    assert (expected > 0).float().mean() > 0.5
    torch.testing.assert_close(network(image), expected, rtol=1e-11, atol=1e-11)


def test_full_network_equals_transformers(network, image):
    settings = {"image_size": 256, "embed_dim": 96, "depths": (2, 2, 6, 2),
                "num_heads": (3, 6, 12, 24), "window_size": 16, "features": 256}
    with torch.no_grad():
        expected = transformers_model(network, settings)(image).predicted_depth
    golden.assert_close(network(image), expected)


def test_exactly_the_parameters_listed_as_unused_have_no_influence():
    network = golden.fill(depth.DPT(**SMALL))
    network.scratch.output_conv[-1] = torch.nn.Identity()  # no pixel may be dark by chance
    network(golden.network_input("unused", (1, 3, 64, 64))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(depth.UNUSED)), name


def test_images_of_another_size_get_disparity_of_their_size():
    """A smooth picture, sampled at three sizes: its disparity is nearly the same smooth picture."""
    network = golden.fill(depth.DPT(**SMALL)).eval()
    network.scratch.output_conv[-1] = torch.nn.Identity()

    def disparity(h, w):
        y, x = ((torch.arange(n) + 0.5) / n for n in (h, w))
        y, x = torch.meshgrid(y, x, indexing="ij")
        picture = torch.stack([torch.sin(3 * x), torch.cos(4 * y), x * y])[None]
        with torch.no_grad():
            return network(picture)

    expected = disparity(64, 64)
    for h, w in ((128, 128), (64, 192)):
        found = disparity(h, w)
        assert found.shape == (1, h, w)
        found = torch.nn.functional.adaptive_avg_pool2d(found, 64)
        # resampling the picture and averaging the answer are not exact; a shift by a pixel is more
        assert (found - expected).abs().mean() < 0.05 * expected.std()


def test_depth_is_not_estimated_in_bf16():
    network = torch.nn.Conv2d(3, 1, 3, padding=1)
    image, sparse_depth = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    sparse_depth[:, :2] = torch.rand(2, 2, 16) + 1

    def disparity(image):
        return network(image)[:, 0] + 2
    wanted = depth.viewer_scale(sparse_depth, image, disparity)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(depth.viewer_scale(sparse_depth, image, disparity), wanted)
    with pytest.raises(ValueError, match="depth network alone, and there is none: --depth_weights"):
        depth.viewer_scale(sparse_depth, image, None, blend=False)


def test_every_mode_takes_its_own_length_from_a_batch():
    near = torch.full((1, 8, 8), 3.0, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)[None]
    batch = {"cond_c2w": pose, "target_c2w": pose.clone(), "fov": torch.ones(1, dtype=pose.dtype),
             "radius": torch.tensor([5.0]), "nearplane": torch.tensor([4.0]), "depth_cond": near,
             "image_cond": torch.zeros(1, 3, 8, 8), "uid": ["shard.tar:bowl/70:0->1"]}
    batch["target_c2w"][:, 0, 3] = 1
    found = {name: depth.scale_of(batch, name).item() for name, mode in camera.MODES.items()
             if not mode.unscaled and mode.unit != "metric"}
    assert found == {"7dof": 5, "7dof_stereomag_scale": 4, "7dof_quantile_scale": 3}
    assert depth.pose_vector(batch, "7dof")[0, 3].item() == pytest.approx(1 / 5)
    assert depth.pose_vector(batch, "7dof_unscaled")[0, 3].item() == 1
    assert depth.scale_of({**batch, "scale": torch.tensor([2.0])}, "7dof_quantile_scale") == 2
    near[:, 0, 0] = 0
    with pytest.raises(ValueError, match="shard.tar:bowl/70:0->1: the depth .* has holes"):
        depth.pose_vector(batch, "7dof_quantile_scale")
    with pytest.raises(ValueError, match="needs a metric depth network"):
        depth.pose_vector(batch, "7dof_metric_scale")


def save(path, tensors):
    """A weight file as MiDaS's is: a pickled state dict. Returns its path."""
    torch.save(tensors, path)
    return path


def test_loaded_network_is_frozen_and_has_the_file_s_weights(tmp_path, network):
    loaded = load_depth(save(tmp_path / "dpt_swin2_tiny_256.pt", network.state_dict()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, w in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w), name


def test_buffers_that_timm_versions_store_or_not_do_not_matter(tmp_path, network):
    attn = "pretrained.model.layers.0.blocks.1.attn"
    tensors = network.state_dict()
    expected = tensors.pop(f"{attn}_mask")
    tensors[f"{attn}.relative_position_index"] = torch.zeros(1)
    loaded = load_depth(save(tmp_path / "newer_timm.pt", tensors))
    assert torch.equal(loaded.get_buffer(f"{attn}_mask"), expected)


def test_weights_of_another_network_are_refused_with_the_names_that_misfit(tmp_path, network):
    norms = [f"pretrained.model.layers.2.blocks.{i}.norm1.bias" for i in range(4)]
    cases = {
        f"4 missing ({', '.join(norms)})": lambda tensors: [tensors.pop(n) for n in norms],
        "1 unexpected (pretrained.model.cls_token)":
            lambda tensors: tensors.update({"pretrained.model.cls_token": torch.zeros(1)}),
        "1 misshapen (scratch.output_conv.4.bias [2] instead of [1])":
            lambda tensors: tensors.update({"scratch.output_conv.4.bias": torch.zeros(2)}),
    }
    for message, change in cases.items():
        # one number for each tensor, so that the file is small
        tensors = {name: torch.zeros(()).expand(w.shape)
                   for name, w in network.state_dict().items()}
        change(tensors)
        path = save(tmp_path / "other.pt", tensors)
        with pytest.raises(ValueError) as error:
            load_depth(path)
        assert str(error.value) == (
            f"{path}: not DPT_SwinV2_T_256 (dpt_swin2_tiny_256.pt): {message}")
