"""model.py against the reference: UNet, schedule, conditioning, training step, randomness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch

import clip
import diffusion
import engine
import model
import vae


def unet_of(case):
    """The UNet that a golden case describes, with its weights."""
    c = case["config"]
    heads = max(c["num_heads"], 1)
    with torch.device("meta"):      # to draw 860 M values once is enough
        unet = model.UNet(c["in_channels"], c["out_channels"], c["model_channels"],
                          c["channel_mult"], c["num_res_blocks"], c["attention_resolutions"], heads,
                          c["context_dim"], c.get("num_head_channels", 0))
    unet.load_state_dict({name: golden.weight(name, parameter.shape)
                          for name, parameter in unet.named_parameters()}, assign=True)
    return unet


def unet_inputs(name, case):
    x, context = (golden.network_input(f"{name}/{key}", case["inputs"][f"{name}/{key}"])
                  for key in ("x", "context"))
    return x, torch.tensor(case["timesteps"]), context


@pytest.mark.parametrize("name", ["unet_tiny_a", "unet_tiny_b", "unet_tiny_c", "unet_full"])
def test_unet_output_equals_the_reference(name):
    case, expected = golden.case(name)
    unet = unet_of(case)
    assert sum(p.numel() for p in unet.parameters()) == case["n_parameters"]
    x, t, context = unet_inputs(name, case)
    with torch.no_grad():
        out = unet(x, t, context)
    observed = case["tolerance_observed"]
    golden.assert_close(
        out, expected["out"],
        observed["max_abs_difference_between_two_reference_runs_on_different_cpu_kernels"])


def test_heads_that_do_not_divide_the_width_leave_the_rest_out():
    """Of 32 channels three heads take 10 each, of 64 they take 21, as the reference's do."""
    unet = model.UNet(8, 4, 32, (1, 2), 1, (1, 2), 3, 16).eval()
    layers = [(part.proj_in, part.transformer_blocks[0].attn1.to_q,
               part.transformer_blocks[0].ff.net[0].proj, part.proj_out)
              for part in unet.modules() if isinstance(part, model.SpatialTransformer)]
    widths = [tuple(layer.weight.shape[:2] for layer in some) for some in layers]
    small, large = (((n, c), (n, n), (8 * n, n), (c, n)) for n, c in ((30, 32), (63, 64)))
    assert widths == [small, *[large] * 4, *[small] * 2]
    golden.fill(unet)
    x, t, context = torch.randn(2, 8, 8, 8), torch.tensor([3, 900]), torch.randn(2, 2, 16)
    attention = unet.input_blocks[1][1].transformer_blocks[0].attn2
    tokens = torch.randn(2, 5, 30)
    with torch.no_grad():
        assert unet(x, t, context).shape == (2, 4, 8, 8)
        q, k, v = (layer(y).unflatten(2, (3, 10)) for layer, y in
                   ((attention.to_q, tokens), (attention.to_k, context), (attention.to_v, context)))
        share = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 10**0.5).softmax(-1)
        wanted = attention.to_out(torch.einsum("bhnm,bmhd->bnhd", share, v).flatten(2))
        torch.testing.assert_close(attention(tokens, context), wanted, rtol=1e-4, atol=1e-5)


def test_small_turns_are_told_apart_under_autocast():
    whole = model.ZeroNVS(model.UNet(2, 1, 32, (1,), 1, (), 1, 8), model.Pixels(),
                          model.NoEmbedding(), "7dof", 1.0, 4, 8)
    T = torch.zeros(4, 19)
    T[:, 0] = torch.tensor([0.99939, 1.0, 0.9999, 0.9986])      # cosines of 2, 0, 1 and 3 degrees
    wanted = whole.context(torch.ones(4, 4), T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole.context(torch.ones(4, 4), T), wanted)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["unet_tiny_a", "unet_tiny_b"])
def test_unet_gradients_equal_the_reference(name, recompute):
    case, expected = golden.case(name)
    unet = unet_of(case)
    for module in unet.modules():
        if isinstance(module, model.Stage):
            module.recompute = recompute
    x, t, context = unet_inputs(name, case)
    x.requires_grad_(), context.requires_grad_()
    loss = unet(x, t, context).square().mean()
    loss.backward()
    assert abs(loss.item() - case["loss"]) < 1e-5 * case["loss"]
    parameters = dict(unet.named_parameters())
    found = {"grad_x": x.grad, "grad_context": context.grad}
    for key in expected:
        if key.startswith("grad:"):
            parameter = parameters[key.removeprefix("grad:")]
            # With one token, q and k are never touched: no gradient at all stands for exact zeros.
            found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for key, value in found.items():
        golden.assert_close(value, expected[key], case["tolerance_observed_gradients"][key][0])


def test_one_context_token_gives_what_softmax_attention_gives():
    torch.manual_seed(0)
    attention = model.Attention(32, 24, 4).double()
    x, token = torch.randn(2, 9, 32).double(), torch.randn(2, 1, 24).double()
    twice = attention(x, token.expand(2, 2, 24))     # the token twice: full softmax, same answer
    torch.testing.assert_close(attention(x, token).expand_as(twice), twice)


def test_state_dict_is_the_checkpoints_key_by_key_and_in_order():
    wanted = json.loads((golden.FOLDER / "zero123_keys.json").read_text())
    keys = {k: shape for k, (shape, _) in wanted["keys"].items() if not k.startswith("model_ema.")}
    with torch.device("meta"):
        unet = model.UNet()
        whole = model.ZeroNVS(unet, vae.AutoencoderKL(), clip.CLIP(), "3dof",
                              vae.SCALE_FACTOR, 768, 768)
    found = {name: list(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert found == keys
    assert list(found) == list(keys)


def test_schedule_tables_equal_the_reference():
    case, expected = golden.case("schedule")
    tables = diffusion.schedule_buffers()
    assert len(tables) == 12
    for name, table in tables.items():
        assert table.dtype == torch.float32
        golden.assert_close(table, expected[name], relative=1e-7)
    # An Intel CPU's own float32 exp differs from other CPUs' in some last bits, which 999 timesteps
    # multiply; with MKL's code for all CPUs the frequencies are bit for bit the fixture's.
    code = ("import json, sys, torch, model; t, *widths = json.load(sys.stdin); print(json.dumps("
            "[model.timestep_embedding(torch.tensor(t), width).tolist() for width in widths]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          input=json.dumps([case["timestep_embedding_t"], 320, 33]),
                          cwd=Path(model.__file__).parent, env={**os.environ, "MKL_CBWR": "COMPATIBLE"})
    for found, key in zip(json.loads(done.stdout),
                          ("timestep_embedding_320", "timestep_embedding_33_odd"), strict=True):
        golden.assert_close(found, expected[key], relative=1e-6)


def test_noising_and_its_inverse_equal_the_reference():
    case, expected = golden.case("schedule")
    x0, noise = (golden.network_input(f"schedule/{name}", (4, 4, 6, 6)) for name in ("x0", "noise"))
    t = torch.tensor(case["t"])
    whole = model.ZeroNVS(model.UNet(2, 1, 32, (1,), 1, (), 1, 8), model.Pixels(),
                          model.NoEmbedding(), "3dof", 1.0, 0, 8)
    signal, sigma = whole.levels(t)
    z_t = signal * x0 + sigma * noise
    golden.assert_close(z_t, expected["q_sample"])
    table = {name: value[t][:, None, None, None] for name, value in whole.named_buffers()}
    golden.assert_close(table["sqrt_recip_alphas_cumprod"] * z_t
                        - table["sqrt_recipm1_alphas_cumprod"] * noise,
                        expected["predict_start_from_noise"])
    golden.assert_close(table["posterior_mean_coef1"] * x0 + table["posterior_mean_coef2"] * z_t,
                        expected["q_posterior/mean"])
    golden.assert_close(table["posterior_variance"], expected["q_posterior/variance"])
    golden.assert_close(table["posterior_log_variance_clipped"],
                        expected["q_posterior/log_variance_clipped"])


# ---- training step: the whole small model

def small_model():
    case, _ = golden.case("training_step")
    u = case["config"]["unet_config"]["params"]
    v = case["config"]["first_stage_config"]["params"]["ddconfig"]
    unet = model.UNet(u["in_channels"], u["out_channels"], u["model_channels"], u["channel_mult"],
                      u["num_res_blocks"], u["attention_resolutions"], u["num_heads"],
                      u["context_dim"])
    autoencoder = vae.AutoencoderKL(v["ch"], v["ch_mult"], v["num_res_blocks"])
    tower = clip.CLIP(**{name: size for name, size in case["clip_config"].items()
                         if name not in ("transformer_heads", "transformer_layers")})
    whole = model.ZeroNVS(unet, autoencoder, tower, "7dof_quantile_scale", vae.SCALE_FACTOR,
                          768, 768)
    return golden.fill(whole)


# ---- conditions

def test_conditions_are_dropped_in_the_reference_s_shares():
    """u < .05 drops the embedding, < .10 both, < .15 the latent: seen by what the network gets."""
    seen = {}

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()

        def idle_parameters(self):
            return {}

        def forward(self, x, t, context):
            seen["latent"], seen["context"] = x[:, 12:], context
            return torch.zeros_like(x[:, :12])

    class Ones(torch.nn.Module):
        def encode_image(self, x):
            return x.new_ones(len(x), 2)

    whole = model.ZeroNVS(Spy(), model.Pixels(), Ones(), "3dof", 1.0, 2, 2)
    with torch.no_grad():
        whole.cc_projection.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]))
    image, T = torch.ones(5, 3, 8, 8), torch.ones(5, 4)
    draws = diffusion.draw(0, torch.arange(5), (12, 4, 4))
    draws.u = torch.tensor([0.0, 0.05, 0.10, 0.15, 0.9])
    whole(*whole.encode(image), whole.encode(image)[0], whole.embed(image), T, draws)
    assert seen["latent"].amax((1, 2, 3)).tolist() == [1, 0, 0, 1, 1]
    assert seen["context"][:, 0].tolist() == [[0, 1], [0, 1], [1, 1], [1, 1], [1, 1]]


def test_pixels_fold_into_channels_and_back():
    image = torch.randn(2, 3, 8, 12)
    z, logvar = model.Pixels().encode(image)
    assert z.shape == (2, 12, 4, 6) and torch.equal(model.Pixels().decode(z), image)
    torch.testing.assert_close(vae.sample(z, logvar, torch.randn_like(z)), z, rtol=0, atol=1e-5)


def test_predicting_the_latent_or_the_noise_says_the_same():
    """A network that knows z, read as eps: the noise that was added comes back."""
    class Knows(torch.nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = z

        def idle_parameters(self):
            return {}

        def forward(self, x, t, context):
            return self.z

    z, noise = torch.randn(2, 4, 12, 4, 4).unbind(0)
    whole = model.ZeroNVS(Knows(z), model.Pixels(), model.NoEmbedding(), "3dof", 1.0, 0, 8, "z")
    t = torch.tensor([1, 300, 700, 999])
    signal, sigma = whole.levels(t)
    z_t = signal * z + sigma * noise
    context = whole.context(torch.zeros(4, 0), torch.zeros(4, 4))
    # at t = 1 sigma is 0.04: rounding of z_t is divided by it
    torch.testing.assert_close(whole.eps(z_t, t, z, context), noise, rtol=0, atol=1e-4)
    draws = diffusion.Draws(t, torch.ones(4), torch.zeros_like(z), noise)
    loss = whole(z, torch.zeros_like(z), z, torch.zeros(4, 0), torch.zeros(4, 4), draws)
    assert loss.tolist() == [0, 0, 0, 0]


# ---- compiled

def compiled_graphs(unet, *inputs):
    """The forward and the backward graph that torch.compile makes of a UNet under bf16 autocast."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def keep(module, _):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep,
                           partition_fn=min_cut_rematerialization_partition)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(unet, fullgraph=True, backend=backend)(*inputs)
        out.float().square().mean().backward()
    torch._dynamo.reset()
    return graphs


def test_a_compiled_step_moves_no_layouts_scatters_nothing_and_casts_each_weight_once():
    unet = model.UNet(8, 4, 32, (1, 2), 1, (1,), 2, 16).to(memory_format=torch.channels_last)
    engine.convert(unet)
    for parameter in unet.idle_parameters().values():
        parameter.requires_grad_(False)
    x = torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last)
    calls = [[node for node in graph.nodes if node.op == "call_function"] for graph in
             compiled_graphs(unet, x, torch.tensor([1, 2]), torch.randn(2, 1, 16))]
    convolutions = 0
    for node in sum(calls, []):
        assert "index_put" not in str(node.target), "atomic additions, in any order"
        if "aten.convolution" in str(node.target):
            convolutions += 1
            for value in (argument.meta["val"] for argument in node.args[:2]):
                # a gradient may be a slice of a concatenation's: channels are last, with gaps
                assert value.stride(1) == 1, f"{node.target} of strides {value.stride()}"
    assert convolutions > 20
    shapes = {p.shape for p in unet.parameters() if p.requires_grad and p.ndim > 1}
    casts = [[node.args[0].name for node in nodes if "_to_copy" in str(node.target)
              and node.args[0].op == "placeholder" and node.args[0].meta["val"].shape in shapes
              and node.args[0].meta["val"].dtype == torch.float32] for nodes in calls]
    assert casts[0] and len(set(casts[0])) == len(casts[0]) and not casts[1]
