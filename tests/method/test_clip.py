"""clip.py, the image tower, against the reference's numbers."""

import golden
import numpy as np
import pytest
import torch

import clip
from runtime.networks import clip_of

KEYS, _ = golden.case("zero123_keys")
TINY = dict(embed_dim=32, image_resolution=64, vision_layers=2, vision_width=128,
            vision_patch_size=16, transformer_width=64)
OF_TEXT = ("transformer_heads", "transformer_layers")   # sizes of what the image tower has not


def golden_state(**sizes):
    """The golden weights of a CLIP by their names."""
    with torch.device("meta"):
        model = clip.CLIP(**sizes)
    return {name: golden.weight(name, p.shape) for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=["clip_tiny", "clip_full"])
def tower(request):
    """(case, CLIP, description, expected) with the golden weights."""
    description, expected = golden.case(request.param)
    sizes = {name: size for name, size in description["config"].items() if name not in OF_TEXT}
    return request.param, clip_of(golden_state(**sizes)), description, expected


# ---- the network

def test_names_shapes_and_order_are_the_checkpoints():
    with torch.device("meta"):
        state = clip.CLIP().state_dict()
    prefix = "cond_stage_model.model."
    expected = [(name.removeprefix(prefix), shape) for name, (shape, _) in KEYS["keys"].items()
                if name.startswith(prefix)]
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == expected


def test_preprocessing_equals_the_reference():
    description, expected = golden.case("clip_preprocess")
    model = clip.CLIP(vision_layers=0, vocab_size=1)
    slices = {"out[..., ::8, ::8]": np.s_[..., ::8, ::8], "out[:, :, :3, :5]": np.s_[:, :, :3, :5],
              "out[:, :, -2:, -5:]": np.s_[:, :, -2:, -5:]}
    for name, of in description["inputs"].items():
        out = model.preprocess(golden.network_input(name, of["shape"], of["tanh"]))
        assert list(out.shape) == description["stats"][name]["shape"]
        for stored, part in slices.items():
            golden.assert_close(out[part], expected[f"{name.split('/')[1]}/{stored}"])


@torch.no_grad()
def test_image_embedding_equals_the_reference(tower):
    case, model, description, expected = tower
    x = golden.network_input(f"{case}/image", (2, 3, 256, 256), tanh=True)
    found = model.encode_image(x)
    (observed, _) = description["tolerance_observed"].values()
    golden.assert_close(found, expected["encode_image"], observed["encode_image"])
    golden.assert_close(found[:, None], expected["embedder_encode"], observed["encode_image"])


def test_mean_and_std_are_there_after_building_on_meta():
    model = clip_of(golden_state(**TINY))
    assert model.mean.flatten().tolist() == pytest.approx(clip.MEAN)
    assert model.std.flatten().tolist() == pytest.approx(clip.STD)
    assert not {"mean", "std"} & model.state_dict().keys()


def test_bfloat16_weights_take_float_images():
    model = clip_of(golden_state(**TINY))
    x = golden.network_input("bf16/image", (1, 3, 80, 80), tanh=True)
    exact, rough = model.encode_image(x), model.bfloat16().encode_image(x)
    assert rough.dtype == torch.bfloat16
    golden.assert_close(rough, exact, relative=0.05)     # 8 bits, some ten layers


# ---- weights

def test_size_is_read_off_the_shapes():
    for config in (TINY, {}):
        with torch.device("meta"):
            model = clip.CLIP(**config)
            again = clip.CLIP(**clip.CLIP.sizes_of(model.state_dict()))
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
        assert shapes[0] == shapes[1]
        assert again.image_resolution == model.image_resolution
        assert [m.heads for m in model.modules() if isinstance(m, clip.Attention)] == \
               [m.heads for m in again.modules() if isinstance(m, clip.Attention)]


def test_half_precision_weights_become_float():
    state = {name: tensor.half() for name, tensor in golden_state(**TINY).items()}
    model = clip_of(state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual.proj, state["visual.proj"].float())


@pytest.mark.parametrize("change, message", [
    ({"visual.conv1.weight": None}, "tensor 'visual.conv1.weight' is missing"),
    ({"visual.ln_post.bias": None}, "1 missing (visual.ln_post.bias)"),
    ({"ln_final.bias": torch.zeros(3)}, "1 misshapen (ln_final.bias [3] instead of [64])"),
    ({"optimizer": torch.zeros(1)}, "1 unexpected (optimizer)"),
])
def test_weights_that_do_not_fit_are_refused(change, message):
    state = golden_state(**TINY) | change
    with pytest.raises(ValueError) as error:
        clip_of({name: tensor for name, tensor in state.items() if tensor is not None})
    assert message in str(error.value) and "\n" not in str(error.value)
