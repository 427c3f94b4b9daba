"""engine/forms.py: every form computes what its class does, and no module is forgotten."""

import copy

import golden
import pytest
import torch
from torch import nn

import clip
import engine
import model
import vae
from engine import kernels
from golden import assert_close

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY_KERNELS = pytest.mark.parametrize("by_kernels", [False, pytest.param(True, marks=needs_triton)])


@pytest.fixture
def switch(monkeypatch):
    """Lets the kernels run, or not, on any device; convolutions' are for half precision alone."""
    def switch(on):
        monkeypatch.setattr(kernels, "usable",
                            lambda file, x, types=kernels.TYPES: on and x.dtype in types)
    return switch


def test_convert_counts_the_modules_of_the_full_network():
    with torch.device("meta"):
        net = model.ZeroNVS(model.UNet(), vae.AutoencoderKL(), clip.CLIP(),
                            "7dof", vae.SCALE_FACTOR, 768, 768)
    before = {name: p for name, p in net.named_parameters()}
    keys = list(net.state_dict())
    counts = engine.convert(net)
    # 2 ResBlocks at 4 levels down, 3 up, 2 in the middle; transformers at 3 levels and the middle
    assert counts == {"ResBlock": 22, "NormSequential": 2 * 22 + 1, "SpatialTransformer": 16,
                      "TransformerBlock": 16, "GEGLU": 16, "Upsample": 3 + 3, "Encoder": 1,
                      "Decoder": 1, "EncoderDownsample": 3, "AutoencoderBlock": 10 + 14,
                      "AutoencoderAttention": 2, "PatchConv": 1, "Transformer": 1}
    assert engine.convert(net) == counts and list(net.state_dict()) == keys
    assert all(p is before[name] for name, p in net.named_parameters())
    bare = model.ZeroNVS(model.UNet(2, 1, 32, (1,), 1, (), 1, 8), model.Pixels(),
                         model.NoEmbedding(), "3dof", 1.0, 0, 8)
    assert set(engine.convert(bare)) == {"ResBlock", "NormSequential", "SpatialTransformer",
                                         "TransformerBlock", "GEGLU"}


def results(function, parameters, *inputs):
    """[outputs, gradients] of a function of inputs and parameters, for one and the same loss."""
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(1)
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum((y * torch.randn(y.shape, device=DEVICE, dtype=y.dtype)).sum() for y in outs)
    wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
    return [*outs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_same(plain, fast, relative):
    # a gradient that is zero but for rounding, as that of attention's key bias, has no own scale
    top = max(x.abs().max().item() for x in plain if x is not None)
    for wanted, found in zip(plain, fast, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_close(found, wanted, 1e-3 * relative * top, relative)


def small_unet(**options):
    unet = model.UNet(8, 4, 32, (1, 2), 1, (1, 2), 2, 16, norm_groups=8, **options)
    return golden.fill(unet).to(DEVICE)


@pytest.mark.parametrize("tokens, heads, by_kernels", [
    (1, {}, False), (2, {}, False), (1, {"num_head_channels": 24}, False),
    pytest.param(1, {}, True, marks=needs_triton)])
def test_the_unet_s_forms_equal_the_text_in_outputs_and_gradients(tokens, heads, by_kernels,
                                                                  switch):
    unet = small_unet(**heads)
    inputs = [torch.randn(2, 8, 4, 4, device=DEVICE), torch.tensor([3, 500], device=DEVICE),
              torch.randn(2, tokens, 16, device=DEVICE)]
    plain = results(unet, unet.parameters(), *inputs)
    engine.convert(unet)
    switch(by_kernels)
    # rounding of float32 through some twenty layers
    assert_same(plain, results(unet, unet.parameters(), *inputs), 1e-5)


def test_recomputed_activations_give_the_same_gradients():
    unet = small_unet().train()
    inputs = [torch.randn(1, 8, 4, 4, device=DEVICE), torch.tensor([3], device=DEVICE),
              torch.randn(1, 1, 16, device=DEVICE)]
    engine.convert(unet)
    kept = results(unet, unet.parameters(), *inputs)
    for module in unet.modules():
        if isinstance(module, model.Stage):
            module.recompute = True
    assert_same(kept, results(unet, unet.parameters(), *inputs), 1e-6)


def autoencoders():
    """(the text's autoencoder, the same converted, {method: input})."""
    net = golden.fill(vae.AutoencoderKL(32, (1, 2, 2), attn_resolutions=(128,))).to(DEVICE)
    fast = copy.deepcopy(net)
    engine.convert(fast)
    return net, fast, {"encode": torch.randn(1, 3, 12, 8, device=DEVICE),
                       "decode": torch.randn(1, 4, 3, 2, device=DEVICE)}


@torch.no_grad()
@BY_KERNELS
def test_the_autoencoder_s_forms_equal_the_text(by_kernels, switch):
    net, fast, inputs = autoencoders()
    for name, x in inputs.items():
        plain = getattr(net, name)(x)
        switch(by_kernels)
        assert_same([*plain], [*getattr(fast, name)(x)], 1e-5)
        switch(False)


def test_the_autoencoder_s_forms_have_the_gradients_of_the_text():
    """In float64: float32's rounding of so long a chain is as large as the bound."""
    net, fast, inputs = autoencoders()
    for name, x in inputs.items():
        plain, found = (results(getattr(one.double(), name), one.parameters(), x.double())
                        for one in (net, fast))
        assert_same(plain, found, 1e-10)


@torch.no_grad()
def test_clip_s_patches_are_a_product_and_its_last_block_makes_one_token():
    tower = golden.fill(clip.CLIP(32, 32, 2, 128, 16, 8, 16, 64)).to(DEVICE)
    image = torch.randn(2, 3, 40, 40, device=DEVICE)
    wanted = tower.encode_image(image)
    assert engine.convert(tower) == {"PatchConv": 1, "Transformer": 1}
    assert_close(tower.encode_image(image), wanted, relative=1e-5)


def test_a_class_that_wraps_a_module_of_the_method_keeps_its_own_forward():
    class Wrapped(model.GEGLU):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Wrapped(4, 4), model.GEGLU(4, 4))
    assert engine.convert(net) == {"GEGLU": 1} and type(net[0]) is Wrapped
