"""Samplers against golden trajectories, diffusers' solvers, and their own order of convergence."""

import math

import pytest
import torch

import diffusion
from golden import assert_close, case, network_input


def analytic(name):
    """(network, its conditions z_cond and context, z_T, noise(k), abar) of a golden ddim case."""
    about, _ = case(name)
    _, schedule = case("schedule")
    shape = (about["batch"], *about["shape"])

    def eps(z_t, t, z_cond, context):
        pooled = context.tanh().mean(-1)[:, :, None, None]
        return (0.1 * z_t + 0.05 * z_cond.tanh() + 0.02 * pooled
                + t.to(z_t.dtype)[:, None, None, None] / 1000)

    z_cond = network_input(f"{name}/c_concat", shape)
    context = network_input(f"{name}/c_crossattn", about["inputs"][f"{name}/c_crossattn"])
    return (eps, z_cond, context, network_input(f"{name}/x_T", shape),
            lambda k: network_input(f"{name}/noise_{k}", shape), schedule["alphas_cumprod"])


GOLDEN = ["ddim_S10_eta0", "ddim_S10_eta1", "ddim_S50_eta0", "ddim_S50_eta1"]


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_sampler_follows_every_golden_trajectory(name):
    about, golden = case(name)
    eps, z_cond, context, z_T, noise, abar = analytic(name)
    seen, batches = [], set()

    def counted(z_t, t, z_cond, context):
        batches.add(len(z_t))
        return eps(z_t, t, z_cond, context)

    follow = diffusion.guided(counted, z_cond, context, about["unconditional_guidance_scale"])
    final = diffusion.sample(follow, z_T, abar, "reference", about["S"], about["eta"], noise,
                            watch=lambda *step: seen.append(step))
    assert [t for _, t, _, _ in seen] == about["timesteps_run_in_order"]
    assert batches == {about["batch_seen_by_model"]}
    every = 1 if about["S"] == 10 else 7
    suffix = "after_each_step" if every == 1 else "after_every_7th_step"
    assert_close(final, golden["final"])
    assert_close(torch.stack([z_t for _, _, z_t, _ in seen][::every]), golden[f"x_{suffix}"])
    assert_close(torch.stack([z_0 for _, _, _, z_0 in seen][::every]), golden[f"pred_x0_{suffix}"])


@pytest.mark.parametrize("steps", [10, 50, 100, 200])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_tables_are_the_golden_ones(steps, eta):
    _, golden = case("schedule")
    abar = golden["alphas_cumprod"].double()
    prefix = f"ddim/S{steps}_eta{eta}/"
    t = diffusion.ddim_timesteps(steps)
    assert t == golden[prefix + "timesteps"].tolist()
    prev = torch.cat([abar[:1], abar[t][:-1]])
    assert_close(abar[t], golden[prefix + "alphas"], relative=1e-7)
    assert_close(prev, golden[prefix + "alphas_prev"], relative=1e-12)
    pairs = zip(abar[t].tolist(), prev.tolist())
    sigmas = [diffusion.ddim_sigma(a, a_prev, eta) for a, a_prev in pairs]
    assert_close(torch.tensor(sigmas), golden[prefix + "sigmas"], relative=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 49, 501, 999, 1000])
@pytest.mark.parametrize("spacing", ["auto", "leading", "logsnr"])
def test_ddim_runs_exactly_the_steps_that_were_asked_for(steps, spacing):
    _, _, _, z_T, _, abar = analytic("ddim_S10_eta0")
    asked = []

    def eps(z_t, t):
        asked.append(t)
        return 0.1 * z_t

    diffusion.sample(eps, z_T, abar, "ddim", steps, eta=0, spacing=spacing)
    assert len(asked) == len(set(asked)) == steps
    assert asked == sorted(asked, reverse=True) and 0 <= asked[-1] and asked[0] <= 999
    assert asked[0] == 999 or spacing == "leading"


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS[:1] + diffusion.SAMPLERS[2:])
@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
def test_a_network_that_knows_the_clean_latent_ends_exactly_there(sampler, spacing):
    _, _, _, z_T, _, abar = analytic("ddim_S10_eta0")
    clean = network_input("clean", z_T.shape)
    table = abar.double()

    def eps(z_t, t):
        log_snr = (table / (1 - table)).log()
        low, share = int(t), t - int(t)
        at_t = log_snr[low] if share == 0 else (1 - share) * log_snr[low] + share * log_snr[low + 1]
        a = torch.sigmoid(at_t)
        return ((z_t - a.sqrt() * clean) / (1 - a).sqrt()).float()

    found = diffusion.sample(eps, z_T, abar, sampler, 12, 0, spacing=spacing)
    assert_close(found, clean)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 20, 37])
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_solvers_equal_those_of_diffusers(sampler, spacing, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")
    eps, z_cond, context, z_T, _, abar = analytic("ddim_S10_eta0")
    follow = diffusion.guided(eps, z_cond, context, 3.0)
    common = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                  solver_order=2, final_sigmas_type="zero", timestep_spacing="trailing")
    if sampler == "dpm++":
        oracle = diffusers.DPMSolverMultistepScheduler(
            **common, solver_type="midpoint", use_lu_lambdas=spacing == "logsnr")
    else:
        oracle = diffusers.UniPCMultistepScheduler(
            **common, solver_type="bh2", use_exponential_sigmas=spacing == "logsnr")
    oracle.set_timesteps(steps)
    # diffusers rounds the timestep that goes into the network (to the nearest, or down); ours is
    # fractional where the noise level lies between two, so that is what both solvers are given
    t, _ = diffusion.grid(abar, steps, spacing)
    assert (torch.tensor(t) - oracle.timesteps).abs().max() <= 1
    z_t = z_T
    for ours, theirs in zip(t, oracle.timesteps):
        z_t = oracle.step(follow(z_t, ours), theirs, z_t).prev_sample
    assert_close(diffusion.sample(follow, z_T, abar, sampler, steps, spacing=spacing), z_t)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_equals_that_of_diffusers(spacing, eta):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")
    eps, z_cond, context, z_T, noise, abar = analytic("ddim_S10_eta1")
    follow = diffusion.guided(eps, z_cond, context, 3.0)
    oracle = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085,
                                     beta_end=0.012, clip_sample=False, set_alpha_to_one=True,
                                     timestep_spacing=spacing,
                                     steps_offset=int(spacing == "leading"))
    oracle.set_timesteps(8)
    t, levels = diffusion.grid(abar, 8, spacing)
    assert t == oracle.timesteps.tolist()
    # its step goes to t - 125, ours to the next timestep of the list: one and the same here, but
    # for the last of the leading ones, where both end at a clean latent
    z_t = z_T
    for k, step in enumerate(oracle.timesteps):
        z_t = oracle.step(follow(z_t, int(step)), step, z_t, eta=eta,
                          variance_noise=noise(k)).prev_sample
    assert_close(diffusion.sample(follow, z_T, abar, "ddim", 8, eta, noise, spacing), z_t)


# Halving the step divides the error by 2 to the method's order, here from 8 steps to 128. UniPC's
# corrector makes it better than its predictor's order 2 by up to one.
ORDERS = {"ddim": (0.8, 1.3), "dpm++": (1.8, 2.4), "unipc": (1.8, 3.3)}


@pytest.mark.parametrize("sampler", ORDERS)
def test_error_falls_with_the_order_of_the_method(sampler):
    eps, z_cond, context, z_T, _, abar = analytic("ddim_S10_eta0")
    double = [x.double() for x in (z_cond, context, z_T)]
    follow = diffusion.guided(eps, *double[:2], 3.0)

    def solution(sampler, steps):
        return diffusion.sample(follow, double[2], abar, sampler, steps, 0, spacing="logsnr")

    exact = solution("unipc", 1000)
    errors = [(solution(sampler, steps) - exact).norm().item() for steps in (8, 16, 32, 64, 128)]
    low, high = ORDERS[sampler]
    assert low < math.log2(errors[0] / errors[-1]) / 4 < high
    assert errors == sorted(errors, reverse=True)


def test_guidance_acts_in_its_interval_alone_and_guidance_1_asks_once():
    eps, z_cond, context, z_T, _, abar = analytic("ddim_S10_eta0")
    asked = []

    def counted(z_t, t, z_cond, context):
        asked.append((t[0].item(), len(z_t)))
        return eps(z_t, t, z_cond, context)

    for guidance, interval, doubled in ((3.0, (0, 1000), range(10)), (1.0, (0, 1000), ()),
                                        (3.0, (301, 501), (3, 4, 5)), (0.0, (901, 901), (9,))):
        follow = diffusion.guided(counted, z_cond, context, guidance, interval)
        diffusion.sample(follow, z_T, abar, "ddim", 10, 0, spacing="leading")
        assert asked == [(100 * i + 1, 4 if i in doubled else 2) for i in range(9, -1, -1)]
        asked.clear()


def test_names_and_noise_that_are_missing_are_one_line_errors():
    _, _, _, z_T, noise, abar = analytic("ddim_S10_eta0")

    def eps(z_t, t):
        return z_t

    for options in ({"sampler": "euler"}, {"spacing": "cubic"}, {"eta": 1.0},
                    {"sampler": "reference", "spacing": "leading"}, {"steps": 0}, {"steps": 1001},
                    {"sampler": "reference", "steps": 501}, {"sampler": "unipc", "steps": 1001}):
        with pytest.raises(ValueError) as error:
            diffusion.sample(eps, z_T, abar, **{"eta": 0, **options})
        assert "\n" not in str(error.value)
    diffusion.sample(eps, z_T, abar, "unipc", 3, 1.0)    # the solvers have no use for noise


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_few_steps_that_begin_at_the_noise_keep_the_brightness(sampler):
    """Data with mean 1 and deviation 0.3, whose exact network is known: the mean must come out."""
    abar = case("schedule")[1]["alphas_cumprod"].double()
    mean, deviation = 1.0, 0.3
    z_T = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)).double()
    z_T -= z_T.mean()

    def eps(z_t, t):
        a = abar[t]
        return (1 - a).sqrt() * (z_t - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    found = {spacing: diffusion.sample(eps, z_T, abar, sampler, 4, 0, spacing=spacing)
             for spacing in ("trailing", "leading", "auto")}
    off = {spacing: abs(z_0.mean() - mean) for spacing, z_0 in found.items()}
    assert off["trailing"] < 0.03 < off["leading"]
    assert torch.equal(found["auto"], found["trailing"])
