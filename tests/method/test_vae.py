"""The autoencoder against the reference's numbers, and against diffusers' with the same weights."""

import golden
import pytest
import torch

import vae

KEYS, _ = golden.case("zero123_keys")


def load(case):
    """The autoencoder of a golden case, with the golden weights."""
    config = golden.case(case)[0]["config"]["ddconfig"]
    with torch.device("meta"):
        model = vae.AutoencoderKL(ch=config["ch"], ch_mult=config["ch_mult"])
    weights = {name: golden.weight(name, p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=["vae_tiny", "vae_full"])
def autoencoder(request):
    case = request.param
    return case, load(case), *golden.case(case)


def observed(description, name):
    (by_name,) = description["tolerance_observed"].values()
    return by_name[name]


def every_fourth(x):
    return x[..., ::4, ::4]


def test_names_shapes_and_order_are_the_checkpoints():
    with torch.device("meta"):
        state = vae.AutoencoderKL().state_dict()
    prefix = "first_stage_model."
    expected = [(name.removeprefix(prefix), shape) for name, (shape, _) in KEYS["keys"].items()
                if name.startswith(prefix)]
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == expected


def test_encoding_equals_the_reference(autoencoder):
    case, model, description, expected = autoencoder
    names = [name for name, of in description["cases"].items() if "image" in of]
    assert names
    for name in names:
        of = description["cases"][name]
        x = golden.network_input(f"{case}/{name}/image", of["image"], tanh=True)
        mean, logvar = model.encode(x)
        noise = golden.network_input(f"{case}/{name}/posterior_noise", mean.shape)
        found = {"mean": mean, "logvar": logvar,
                 "latent_mode_scaled": vae.SCALE_FACTOR * mean,
                 "latent_sampled_scaled": vae.SCALE_FACTOR * vae.sample(mean, logvar, noise)}
        for what, value in found.items():
            golden.assert_close(value, expected[f"{name}/{what}"], observed(description, name))


def test_decoding_equals_the_reference(autoencoder):
    case, model, description, expected = autoencoder
    names = [name for name, of in description["cases"].items() if "latent" in of]
    assert names
    for name in names:
        z = golden.network_input(f"{case}/{name}/latent", description["cases"][name]["latent"])
        for what, value in (("decode", model.decode(z)),
                            ("decode_first_stage", model.decode(z / vae.SCALE_FACTOR))):
            stored = expected.get(f"{name}/{what}")
            if stored is None:
                stored, value = expected[f"{name}/{what}[..., ::4, ::4]"], every_fourth(value)
            golden.assert_close(value, stored, observed(description, name))


@pytest.mark.parametrize("name", ["square", "rect", "odd"])
def test_gradient_of_the_image_equals_the_reference(name):
    """It would not, if an in-place operation overwrote what the backward pass needs."""
    description, expected = golden.case("vae_tiny")
    of = description["cases"][name]
    # in float64: float32's rounding of so long a chain, in the order of the threads, is as large as
    # the bound
    x = golden.network_input(f"vae_tiny/{name}/image", of["image"], tanh=True).double()
    x.requires_grad_()
    model = load("vae_tiny").double().requires_grad_(True)
    loss = model.decode(model.encode(x)[0]).square().mean()
    loss.backward()
    golden.assert_close(loss, of["grad_image"]["loss"])
    gradient = every_fourth(x.grad) if name == "square" else x.grad
    # the loss is a mean over many pixels, so its gradient's rounding is relative to its own size
    golden.assert_close(gradient, expected[f"{name}/grad_image"])


def test_posterior_is_clamped_and_sampled_as_the_reference_does():
    _, expected = golden.case("gaussian_distribution")
    moments = 25 * golden.network_input("gaussian_distribution/moments", (2, 8, 4, 4))
    mean, logvar = vae.posterior(moments)
    noise = golden.network_input("gaussian_distribution/noise", mean.shape)
    assert logvar.min() == vae.LOGVAR_MIN and logvar.max() == vae.LOGVAR_MAX
    golden.assert_close(mean, expected["mean"])
    golden.assert_close(logvar, expected["logvar"])
    golden.assert_close(vae.sample(mean, logvar, noise), expected["sample"])
    # the clamped entries differ by e^25, so each is held to its own size
    std = vae.sample(torch.zeros_like(mean), logvar, torch.ones_like(mean))
    torch.testing.assert_close(std, expected["std"], rtol=1e-5, atol=0)


def test_inputs_are_left_as_they_were():
    model = load("vae_tiny")
    x, z = torch.rand(1, 3, 64, 64), torch.rand(1, 4, 8, 8)
    x_before, z_before = x.clone(), z.clone()
    model.encode(x), model.decode(z)
    assert torch.equal(x, x_before) and torch.equal(z, z_before)


def test_attention_levels_count_from_the_configured_resolution():
    def levels_with_attention(**arguments):
        with torch.device("meta"):
            model = vae.AutoencoderKL(ch=32, ch_mult=(1, 2, 2), **arguments)
        return ([len(level.attn) for level in model.encoder.down],
                [len(level.attn) for level in model.decoder.up])

    assert levels_with_attention() == ([0, 0, 0], [0, 0, 0])
    assert levels_with_attention(attn_resolutions=(128,)) == ([0, 2, 0], [0, 3, 0])
    assert levels_with_attention(attn_resolutions=(64,), resolution=64) == ([2, 0, 0], [3, 0, 0])


# ---------------------------------------------------------------- diffusers

def diffusers_name(name, levels):
    """Our name of a parameter -> diffusers'."""
    side, *rest = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    if rest[0] == "norm_out":
        rest[0] = "conv_norm_out"
    elif rest[0] == "mid":
        parts = {"block_1": ["resnets", "0"], "attn_1": ["attentions", "0"],
                 "block_2": ["resnets", "1"]}
        rest[:2] = ["mid_block", *parts[rest[1]]]
    elif rest[0] in ("down", "up"):
        level = int(rest[1]) if rest[0] == "down" else levels - 1 - int(rest[1])
        parts = {"block": ["resnets"], "attn": ["attentions"],
                 "downsample": ["downsamplers", "0"], "upsample": ["upsamplers", "0"]}
        rest[:3] = [f"{rest[0]}_blocks", str(level), *parts[rest[2]]]
    if "attentions" in rest:
        names = {"norm": ["group_norm"], "q": ["to_q"], "k": ["to_k"], "v": ["to_v"],
                 "proj_out": ["to_out", "0"]}
        rest[-2:-1] = names[rest[-2]]
    return ".".join([side, *rest]).replace("nin_shortcut", "conv_shortcut")


@pytest.mark.parametrize("attn_resolutions", [(), (128,)])
def test_equals_diffusers_autoencoder_in_float64(attn_resolutions):
    pytest.importorskip("diffusers", reason="oracle: pip install --no-deps diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Oracle
    widths = (32, 64, 96)
    kinds = ["Attn" if 256 >> level in attn_resolutions else "" for level in range(len(widths))]
    ours = vae.AutoencoderKL(ch=32, ch_mult=(1, 2, 3), attn_resolutions=attn_resolutions)
    golden.fill(ours).double()
    theirs = Oracle(
        block_out_channels=widths, layers_per_block=2, latent_channels=4,
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)]).double().eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        name = diffusers_name(name, len(widths))
        if "attentions" in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]      # a 1x1 conv here, a linear layer there
        state[name] = tensor
    theirs.load_state_dict(state, strict=True)
    x = golden.network_input("oracle/image", (2, 3, 36, 52), tanh=True).double()
    with torch.no_grad():
        mean, logvar = ours.encode(x)
        posterior = theirs.encode(x).latent_dist
        # float64 rounding over some forty layers
        for found, expected in ((mean, posterior.mean), (logvar, posterior.logvar),
                                (ours.decode(mean), theirs.decode(mean).sample)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
