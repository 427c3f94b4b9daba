"""Diffusion: random numbers, the noise schedule, and samplers from pure noise to a clean latent.

    draw:    seed, numbers of pairs (b,), latent's shape -> Draws: t (b,), noise (b, c, h, w), ...
    sample:  eps(z_t, t), z_T (b, c, h, w) -> z_0 (b, c, h, w)
    novel_views: a ZeroNVS, a photo (1, 3, h, w), poses T (b, d) -> views (b, 3, h, w)

Training is in model.py (ZeroNVS.forward). Read first: uniform, why any batch can be drawn again;
schedule_buffers; guided; ddim. In eps(z_t, t) the timestep is a python number.
DDIM: arXiv:2010.02502. DPM-Solver++(2M): arXiv:2211.01095. UniPC: arXiv:2302.04867. Classifier-free
guidance: arXiv:2207.12598. `abar` is the schedule's alpha-bar at timesteps 0 .. n-1, the share of
a latent's variance that is signal; `eps` is the noise that a network finds in it.
Letters: `b` batch, `c` channels, `h w` latent grid, `d` pose width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

BETA_START, BETA_END = 0.00085, 0.0120
SAMPLERS = ("ddim", "reference", "dpm++", "unipc")
SPACINGS = ("auto", "leading", "trailing", "logsnr")
TIMESTEPS = 1000                    # of the schedule that the published models were trained with
EVERYWHERE = (0, TIMESTEPS)         # guidance interval: the timesteps at which guidance acts
AHEAD = 50                          # steps whose noise is drawn at once
DECODED = 8                         # views that are decoded at once, for memory's sake

# Streams: what is drawn for a number. A sampler draws its first latent from SAMPLE, and the noise
# of its step k, counted from 0, from SAMPLE + 1 + k.
TIMESTEP, DROP, POSTERIOR, NOISE, SAMPLE = range(5)
PHILOX_M, PHILOX_W = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS, WORD = 10, 0xFFFFFFFF


# ---- randomness

def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words of counter, two of key -> four random words.

    A generator without a state: the same counter and key give the same words. Words are int64
    tensors holding 0..2**32-1, of shapes that broadcast.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]     # 64 bits; the sign bit is masked off below
        high0, high1 = p0 >> 32 & WORD, p1 >> 32 & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & WORD, high0 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + PHILOX_W[0]) & WORD, (k1 + PHILOX_W[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed, stream, numbers, count):
    """Uniform float32 (b, count) in (0, 1), row i a function of (seed, stream, numbers[i]) alone.

    seed: int from 0. stream: int from 0, or (b,) int64. numbers: (b,) int64, of pairs or views.
    """
    # departs: noise, timesteps and dropped conditions are functions of the seed and the number of
    # a pair or view; the reference draws from a generator, whose state depends on all before it
    # [test_draws_of_a_pair_do_not_depend_on_its_batch]
    block = torch.arange(-(-count // 4), device=numbers.device)[None]
    number = numbers[:, None]
    stream = (stream[:, None] if isinstance(stream, torch.Tensor)
              else torch.full_like(block, stream))
    counter = block, stream, number & WORD, number >> 32 & WORD
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1)  # (b, blocks, 4)
    # 23 bits and a half: exact in float32, never 0 or 1
    return ((words.flatten(1)[:, :count] >> 9).float() + 0.5) * 2.0**-23


def normal(seed, stream, numbers, shape, uniform=uniform):
    """Standard normal float32 (b, *shape) by Box and Muller's transform of `uniform`."""
    count = math.prod(shape)
    u, v = uniform(seed, stream, numbers, count + count % 2).chunk(2, dim=1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].unflatten(1, shape)


# ---- noise schedule

def schedule_buffers():
    """The twelve float32 tables (1000,) of DDPM (arXiv:2006.11239), by their checkpoint names.
    `posterior`: of a step back from z_t, were the clean latent known (not the autoencoder's)."""
    # the CPU's under torch.device("meta") too: arithmetic there imports PyTorch's compiler, 4 s
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64,
                           device="cpu")**2
    abar = (1 - betas).cumprod(0)
    abar_prev = torch.cat([betas.new_ones(1), abar[:-1]])
    variance = betas * (1 - abar_prev) / (1 - abar)                 # eq. 7
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),  # of step 0 it is 0
        "posterior_mean_coef1": betas * abar_prev.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - abar_prev) * (1 - betas).sqrt() / (1 - abar),
    }
    return {name: table.float() for name, table in tables.items()}


# ---- the random numbers of training

@dataclass
class Draws:
    """The random numbers of a training batch."""
    t: torch.Tensor                 # (b,) int64
    u: torch.Tensor                 # (b,) decides which conditions are dropped
    posterior_noise: torch.Tensor   # (b, c, h, w)
    noise: torch.Tensor             # (b, c, h, w), the diffusion's


def draw(seed, numbers, shape, uniform=uniform):
    """Draws for the pairs `numbers` (b,) of latents of `shape` (c, h, w)."""
    return Draws(t=(uniform(seed, TIMESTEP, numbers, 1)[:, 0] * TIMESTEPS).long(),
                 u=uniform(seed, DROP, numbers, 1)[:, 0],
                 posterior_noise=normal(seed, POSTERIOR, numbers, shape, uniform),
                 noise=normal(seed, NOISE, numbers, shape, uniform))


# ---- timesteps of a sampler

def plan(abar, sampler, steps, spacing="auto"):
    """(t, levels) of `grid` for a sampler. Raises ValueError for what no sampler can do."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not known, it is one of {', '.join(SAMPLERS)}")
    if sampler == "reference" and spacing != "auto":
        raise ValueError(f"spacing {spacing!r} does not apply to the reference's own schedule")
    if spacing == "auto":
        # departs: timesteps trail by default, so that the first is the noisiest; the reference's
        # lead, and of few steps its first is far from the pure noise that it is given
        # [test_few_steps_that_begin_at_the_noise_keep_the_brightness]
        spacing = "reference" if sampler == "reference" else "trailing"
    return grid(abar, steps, spacing)


def grid(abar, steps, spacing):
    """(t, levels): timesteps to evaluate at, noisiest first; abar at each of them and at the end.

    trailing: equal steps from the noisiest timestep (arXiv:2305.08891). leading: equal steps that
    end at the cleanest, DDIM's own. logsnr: equal steps of log(sqrt(abar / (1 - abar))), t
    fractional. reference: leading, exactly as the reference runs it.
    """
    abar = abar.detach().double().cpu()
    n = len(abar)
    if not 1 <= steps <= n:
        raise ValueError(f"{steps} sampling steps: there can be 1 to {n}")
    # departs: samplers end at abar 1, a clean latent; the reference ends at abar[0], with noise
    # left in it, and so does our sampler "reference"
    # [test_a_network_that_knows_the_clean_latent_ends_exactly_there]
    end = 1.0
    if spacing == "leading":
        t = ddim_timesteps(steps, n)[::-1]
    elif spacing == "trailing":
        t = [round(n - k * n / steps) - 1 for k in range(steps)]
    elif spacing == "reference":
        t, end = reference_timesteps(steps, n)[::-1], abar[0].item()
    elif spacing == "logsnr":
        table = (abar / (1 - abar)).log().div(2).flip(0).numpy()        # ascending, t = n-1 .. 0
        lam = np.linspace(table[0], table[-1], steps)
        t = np.interp(lam, table, np.arange(n - 1, -1, -1)).tolist()
        return t, [*(1 / (1 + np.exp(-2 * lam))).tolist(), end]
    else:
        raise ValueError(f"spacing {spacing!r} is not known, it is one of {', '.join(SPACINGS)}")
    return t, [*abar[t].tolist(), end]


def ddim_timesteps(steps, n=TIMESTEPS):
    """`steps` timesteps of leading DDIM, ascending: 1, 21, ..., 981 for 50 of 1000."""
    # departs: leading DDIM runs exactly the steps asked for; the reference runs more where 1000 is
    # no multiple of them, and fails at 1000 [test_ddim_runs_exactly_the_steps_that_were_asked_for]
    first = 1 if steps < n else 0
    return [k * n // steps + first for k in range(steps)]


def reference_timesteps(steps, n=TIMESTEPS):
    """The timesteps that the reference's DDIM runs, ascending: 1, 21, ..., 961 for 50 of 1000."""
    # quirk: the sampler "reference" never runs the noisiest timestep of its table, so that 50 steps
    # are 49 evaluations [test_reference_sampler_follows_every_golden_trajectory]
    if not 2 <= steps <= n // 2:
        raise ValueError(f"{steps} sampling steps: the reference's schedule can have 2 to {n // 2}")
    return [t + 1 for t in range(0, n, n // steps)][:-1]


# ---- samplers

def guided(eps, z_cond, context, guidance=3.0, interval=EVERYWHERE):
    """The function (z_t, t) that samplers follow, of a network eps(z_t, t, z_cond, context).

    Classifier-free guidance (arXiv:2207.12598): from the prediction without conditions through the
    one with them, `guidance` times as far. In the unconditional branch, the first half of a batch,
    z_cond (b, c, h, w) and context (b, n, d) are zeros. Guidance 1, or a timestep outside
    `interval` (arXiv:2404.07724), evaluates the conditional branch alone.
    """
    low, high = interval
    zeros_first = [torch.cat([torch.zeros_like(x), x]) for x in (z_cond, context)]

    def follow(z_t, t):
        t_b = torch.full((len(z_t),), float(t), device=z_t.device)
        if guidance == 1 or not low <= t <= high:
            return eps(z_t.to(z_cond.dtype), t_b, z_cond, context).to(z_t.dtype)
        both = eps(torch.cat([z_t, z_t]).to(z_cond.dtype), torch.cat([t_b, t_b]), *zeros_first)
        unconditional, conditional = both.to(z_t.dtype).chunk(2)
        return unconditional + guidance * (conditional - unconditional)
    return follow


@torch.no_grad()
def sample(eps, z_T, abar, sampler="ddim", steps=50, eta=1.0, noise=None, spacing="auto",
           watch=None):
    """Clean latent z_0 of the noise z_T (b, c, h, w), in `steps` evaluations of eps(z_t, t).

    eta: DDIM's noise, 0 none, 1 as much as DDPM; noise(k) gives that of step k = 0, 1, ...
    watch(k, t, z_t, z_0) sees each step's result and the clean latent that it predicted.
    Raises ValueError for an unknown name, an impossible number of steps, or noise that is missing.
    """
    t, levels = plan(abar, sampler, steps, spacing)
    if sampler in ("ddim", "reference") and eta > 0 and noise is None:
        raise ValueError(f"eta {eta:g} adds noise at every step: give noise, or eta 0")
    watch = watch or (lambda k, t, z_t, z_0: None)
    if sampler == "dpm++":
        return solve(eps, z_T, t, levels, watch, correct=False)
    if sampler == "unipc":
        return solve(eps, z_T, t, levels, watch, correct=True)
    return ddim(eps, z_T, t, levels, eta, noise, watch)


def ddim_sigma(abar, abar_prev, eta):
    """Standard deviation of the noise that a DDIM step adds (arXiv:2010.02502, eq. 16)."""
    return eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))


def ddim(eps, z_t, t, levels, eta, noise, watch):
    """DDIM, eq. 12 of arXiv:2010.02502, over the timesteps t and the values of abar `levels`."""
    for k, abar, abar_prev in zip(range(len(t)), levels, levels[1:]):
        eps_t = eps(z_t, t[k])
        z_0 = z_t.sub(eps_t, alpha=math.sqrt(1 - abar)) / math.sqrt(abar)
        sigma = ddim_sigma(abar, abar_prev, eta)
        # rounding may leave the root's argument a little below 0 in the last step
        rest = math.sqrt(max(1 - abar_prev - sigma**2, 0))
        z_t = (math.sqrt(abar_prev) * z_0).add(eps_t, alpha=rest)
        if sigma > 0:
            z_t = z_t.add(noise(k), alpha=sigma)
        watch(k, t[k], z_t, z_0)
    return z_t


def solve(eps, z_t, t, levels, watch, correct):
    """DPM-Solver++(2M), and with `correct` UniPC of order 2 (bh2), whose predictor is the same.

    Both are multistep solvers for the clean latent over lambda = log(alpha / sigma), whose first
    and last step are of order 1. The corrector needs no evaluation of its own.
    """
    alpha = [math.sqrt(abar) for abar in levels]
    sigma = [math.sqrt(1 - abar) for abar in levels]
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma)]
    z_0, start = [], z_t        # predictions so far; the latent at the start of the last step
    for k in range(len(t)):
        z_0.append((z_t - sigma[k] * eps(z_t, t[k])) / alpha[k])
        if correct and k > 0:
            z_t = corrected(start, z_0, alpha, sigma, lam, k)
        start = z_t
        h = lam[k + 1] - lam[k]
        towards = z_0[k]
        if 0 < k < len(t) - 1:
            r = (lam[k] - lam[k - 1]) / h
            towards = z_0[k] + (z_0[k] - z_0[k - 1]) / (2 * r)
        z_t = sigma[k + 1] / sigma[k] * start - alpha[k + 1] * math.expm1(-h) * towards
        watch(k, t[k], z_t, z_0[k])
    return z_t


def corrected(start, z_0, alpha, sigma, lam, k):
    """The latent at step k again, now that z_0[k] is known: UniC, arXiv:2302.04867, with bh2."""
    h = lam[k] - lam[k - 1]
    phi_1 = math.expm1(-h)
    change = 0.5 * (z_0[k] - z_0[k - 1])
    if k > 1:
        # weights (for z_0[k-2], z_0[k]) that make the quadrature exact for polynomials of degree 2
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 0.5
        r = (lam[k - 2] - lam[k - 1]) / h
        first = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
        change = (first * (z_0[k - 2] - z_0[k - 1]) / r
                  + (phi_2 / phi_1 - first) * (z_0[k] - z_0[k - 1]))
    return sigma[k] / sigma[k - 1] * start - alpha[k] * phi_1 * (z_0[k - 1] + change)


# ---- views

@torch.no_grad()
def novel_views(model, image_cond, T, numbers, seed=0, sampler="ddim", steps=50, eta=1.0,
                guidance=3.0, interval=EVERYWHERE, spacing="auto", watch=None):
    """Views of what `image_cond` shows, as the camera conditioning T asks: (b, 3, h, w) in [-1, 1].

    image_cond (b or 1, 3, h, w) in [-1, 1]; T (b, d). The noise of row i is a function of
    (seed, numbers[i]) alone, whatever the batch. The rest is as in `guided` and `sample`.
    """
    z_cond, embedding = model.encode(image_cond)[0], model.embed(image_cond)
    return encoded_views(model, z_cond, embedding, T, numbers, seed, sampler, steps, eta, guidance,
                         interval, spacing, watch)


@torch.no_grad()
def encoded_views(model, z_cond, embedding, T, numbers, seed=0, sampler="ddim", steps=50, eta=1.0,
                  guidance=3.0, interval=EVERYWHERE, spacing="auto", watch=None, fast=None):
    """`novel_views` of an image whose latent (posterior's mode) and embedding are known.

    z_cond (b or 1, c, h, w), embedding (b or 1, e). fast: an engine.Sampler of the model.
    """
    dtype = next(model.model.parameters()).dtype
    z_cond = z_cond.to(dtype).expand(len(T), -1, -1, -1)
    context = model.context(embedding.expand(len(T), -1), T.to(z_cond.device)).to(dtype)
    shape, numbers = z_cond.shape[1:], torch.as_tensor(numbers, device=z_cond.device)
    t, _ = plan(model.alphas_cumprod, sampler, steps, spacing)
    follow = (fast.guided(z_cond, context, guidance, interval, t) if fast
              else guided(model.eps, z_cond, context, guidance, interval))
    draw_uniform, decode = (fast.uniform, fast.decode) if fast else (uniform, model.decode)
    z_T = normal(seed, SAMPLE, numbers, shape, draw_uniform)
    z_0 = sample(follow, z_T, model.alphas_cumprod, sampler, steps, eta,
                 step_noise(seed, numbers, shape, draw_uniform), spacing, watch)
    return torch.cat([decode(part).float().clamp(-1, 1) for part in z_0.split(DECODED)])


def step_noise(seed, numbers, shape, uniform=uniform):
    """The function k -> noise (b, *shape) of a sampler's step k, for the views `numbers` (b,).

    It draws AHEAD steps at once: one step's few numbers would keep an accelerator waiting.
    """
    drawn = {}

    def noise(k):
        if k not in drawn:
            drawn.clear()
            ahead = torch.arange(k, k + AHEAD, device=numbers.device)    # a row: a step and a view
            rows = normal(seed, SAMPLE + 1 + ahead.repeat_interleave(len(numbers)),
                          numbers.repeat(AHEAD), shape, uniform)
            drawn.update(zip(range(k, k + AHEAD), rows.unflatten(0, (AHEAD, -1))))
        return drawn[k]
    return noise
