"""depth.py against the reference's numbers: the fit to known depths, and the depth network."""

import sys
import types

import camera
import depth
import golden
import pytest
import torch

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


def test_disparity_and_depth_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(1, 4, 8\).*same size"):
        depth.dense_depth(torch.ones(1, 4, 4), torch.ones(1, 4, 8), blend=True)


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


def test_images_that_are_not_rgb_batches_are_refused():
    network = depth.DPT(**SMALL)
    for shape in ((3, 64, 64), (1, 64, 64, 3)):
        with pytest.raises(ValueError, match=r"must be \(b, 3, h, w\)"):
            network(torch.zeros(shape))


@pytest.fixture
def file(monkeypatch, network):
    """What a weight file holds, as the checkpoint reader hands it over; tests may change it."""
    tensors = dict(network.state_dict())
    reader = types.SimpleNamespace(read=lambda path: tensors)
    monkeypatch.setitem(sys.modules, "checkpoint", reader)
    return tensors


def test_loaded_network_is_frozen_and_has_the_file_s_weights(file):
    network = depth.load("dpt_swin2_tiny_256.pt")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    for name, w in network.state_dict().items():
        assert torch.equal(w, file[name]), name


def test_buffers_that_timm_versions_store_or_not_do_not_matter(file):
    attn = "pretrained.model.layers.0.blocks.1.attn"
    del file[f"{attn}_mask"]
    file[f"{attn}.relative_position_index"] = torch.zeros(1)
    network = depth.load("dpt_swin2_tiny_256.pt")
    assert network.get_buffer(f"{attn}_mask").unique().tolist() == [-100, 0]


def test_weights_of_another_network_are_refused_with_the_names_that_misfit(file):
    file["scratch.layer1_rn.weight"] = torch.zeros(256, 128, 3, 3)
    del file["pretrained.model.norm.bias"]
    file["pretrained.model.cls_token"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        depth.load("other.pt")
    message = str(error.value)
    assert message.startswith("other.pt: not DPT_SwinV2_T_256")
    assert "1 missing: pretrained.model.norm.bias" in message
    assert "1 unexpected: pretrained.model.cls_token" in message
    assert "layer1_rn.weight (256, 128, 3, 3), not (256, 96, 3, 3)" in message
    assert "\n" not in message
