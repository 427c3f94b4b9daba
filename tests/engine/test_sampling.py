"""engine.Sampler: what it computes beforehand changes no number, for any sampler, batch or view."""

import golden
import pytest
import torch
from test_sample import golden_model

import diffusion
import engine
import model


@pytest.fixture(scope="module")
def networks():
    """(a small whole model, an engine.Sampler of the same)."""
    about, _ = golden.case("sample_zero123")
    return golden_model(about), engine.Sampler(golden_model(about))


def conditions(name, views):
    """Latent (1, c, h, w) and embedding (1, e) of a photo, and pose vectors (views, 19)."""
    return (golden.network_input(f"{name}/z_cond", (1, 4, 4, 4)),
            golden.network_input(f"{name}/embedding", (1, 768)),
            golden.network_input(f"{name}/T", (views, 19)))


def assert_same_views(networks, name, views, **options):
    """The fast network's views are the plain one's, but for the order of float32 sums."""
    plain, fast = networks
    given = *conditions(name, views), list(range(views))
    options = {"steps": 3, "eta": 0.5, **options}
    expected = diffusion.encoded_views(plain, *given, **options)
    found = diffusion.encoded_views(fast.net, *given, fast=fast, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    return found


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_every_sampler_makes_the_views_of_the_plain_network(networks, sampler, spacing):
    assert_same_views(networks, "view", 2, sampler=sampler, spacing=spacing)


def test_the_references_schedule_makes_the_views_of_the_plain_network(networks):
    assert_same_views(networks, "view", 2, sampler="reference", steps=4)


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"guidance": 0.0}, {"guidance": 5.0},
                                     {"interval": (300, 700)}, {"interval": (1000, 1000)}])
def test_guidance_and_its_interval_are_those_of_the_plain_network(networks, options):
    assert_same_views(networks, "view", 2, **options)


def test_a_network_that_predicts_the_clean_latent_is_told_the_timestep(networks, monkeypatch):
    for net in (networks[0], networks[1].net):
        monkeypatch.setattr(net, "prediction", "z")
    assert_same_views(networks, "view", 2)


def test_tables_follow_the_view_the_batch_and_the_steps(networks):
    first = assert_same_views(networks, "view", 2)
    other = assert_same_views(networks, "other", 2)
    assert (first - other).abs().max() > 0.1
    assert_same_views(networks, "other", 3)
    assert_same_views(networks, "other", 3, steps=5)
    again = assert_same_views(networks, "view", 2)
    assert torch.equal(first, again)


def test_step_noise_is_that_of_its_step_and_view_in_any_order():
    numbers, shape = torch.tensor([7, 0, 7]), (2, 3, 3)
    noise = diffusion.step_noise(5, numbers, shape)
    for k in (0, 1, diffusion.AHEAD, diffusion.AHEAD + 2, 0, 3 * diffusion.AHEAD + 1):
        expected = diffusion.normal(5, diffusion.SAMPLE + 1 + k, numbers, shape)
        assert torch.equal(noise(k), expected)


def test_modules_that_are_not_evaluated_are_not_asked_again(networks):
    """A step runs neither cross-attention nor the timestep's projections."""
    _, fast = networks
    assert len(fast.by_time) > 0 and len(fast.by_view) > 0
    assert not any(isinstance(module, model.Attention) for module in fast.unet.modules())
    z_cond, embedding, T = conditions("view", 1)
    follow = fast.guided(z_cond, fast.net.context(embedding, T), 3.0, (0, 1000), [9, 5])
    asked = []
    handles = [module.register_forward_hook(lambda *_: asked.append(1))
               for module in [fast.unet.time_embed, *(m.emb_layers for m in fast.by_time)]]
    with torch.no_grad():
        follow(torch.zeros(1, 4, 4, 4), 5)
    for handle in handles:
        handle.remove()
    assert not asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_graphs_replay_the_views_of_the_plain_network():
    about, _ = golden.case("sample_zero123")
    plain, fast = golden_model(about).cuda(), engine.Sampler(golden_model(about).cuda())
    for name, views, guidance in (("view", 2, 3.0), ("other", 2, 5.0), ("view", 3, 1.0)):
        given = *(x.cuda() for x in conditions(name, views)), list(range(views))
        options = {"steps": 4, "eta": 0.5, "guidance": guidance}
        expected = diffusion.encoded_views(plain, *given, **options)
        found = diffusion.encoded_views(fast.net, *given, fast=fast, **options)
        # TensorFloat-32 convolutions, whose kernels may differ
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
        assert fast.preparing > 0
