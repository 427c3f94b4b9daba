"""Trains a ZeroNVS model, on one process or under torchrun. Running the same command again goes on.

    python train.py configs/synth.py
    torchrun --nproc_per_node 8 train.py configs/mix.py
    python train.py configs/mix.py --dry-run        what would run, and the memory it needs
    python train.py configs/mix.py --profile 5      also a trace of five steps

What a run starts from: the newest checkpoint in its own folder, else `init`, else random weights.
Pairs, noise, timesteps and dropped conditions are functions of (seed, number of the pair), so no
state of a generator or loader is saved, and the number of ranks or micro-steps changes nothing.

Read `train` first: it is the loop. `inputs` and `forward_backward` are what a step does, `Run` is
what comes before the first.
"""

import argparse
import inspect

import configs
from runtime import command, threads


def options(argv):
    """(Config, steps to trace, whether to say only what would run, GB of a GPU to say it of) of the
    command line."""
    parser = command.Parser(
        "train.py", description=__doc__,
        usage="train.py CONFIG [--name=value ...] [--profile N] [--dry-run [--gpu-memory GB]]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of Config, which may follow as --name=value (but for `sources`):\n\n"
               + inspect.getsource(configs.Config).partition('"""\n')[2].partition("@property")[0])
    add = parser.add_argument
    add("--profile", type=command.numbers_of(int, 0), default=0, metavar="N",
        help="write a trace of N steps to the folder of the run")
    add("--dry-run", action="store_true",
        help="print what would run and the memory it needs; the run's folder is not touched")
    add("--gpu-memory", type=command.numbers_of(float, 0), default=0.0, metavar="GB",
        help="with --dry-run: say what fits a GPU of so many GB, without data or that GPU, and "
             "stop")
    found, rest = configs.parse_with_fields(parser, argv)
    config = configs.load(rest)
    config.check_trainable()
    return config, found.profile, found.dry_run, found.gpu_memory


# answered before torch, which takes seconds, is imported
threads.wait_passively()
OPTIONS = command.begin("train.py", options) if __name__ == "__main__" else None

import functools
import signal
from contextlib import ExitStack, nullcontext

import torch

import data
import depth
import diffusion
import engine
import model
from analysis import inspect as inspector
from analysis import score
from runtime import checkpoint, cost, files, networks, resume
from runtime import ranks as group
from runtime.log import Log, Meter, check_finite, peak_memory, revision, summary
from runtime.optimizer import learning_rate

# Save and end; sent again they change nothing.
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ---- the loop

def train(run):
    """Trains from the step that the run starts from to the last one, or to a signal to stop."""
    config, ranks, net, log = run.config, run.ranks, run.net, run.log
    batches, shape, meter = iter(run.loader), model.latent_shape(config), Meter()
    done = logged = saved = run.first_step
    if run.scores and config.init and not done:
        averaged(run, score.begin, run.log)
    stopped, norm, worse = False, None, ranks.any_rank(log.is_worse(config.patience))
    meter.start_clock()
    while done < config.steps and not stopped and not worse:
        for micro_step in range(run.micro_steps):
            with meter.waiting():
                batch = next(batches)
            stopped = ranks.any_rank(run.signals)       # all ranks meet here, and stop together
            if stopped:
                break
            numbers = batch["number"].to(run.device, non_blocking=True)
            draws = engine.draw(config.seed, numbers, shape)
            with run.autocast:
                given = inputs(net, batch, config, run.depth_net, run.device)
            last = micro_step == run.micro_steps - 1
            with nullcontext() if last or ranks.world == 1 else run.wrapped.no_sync():
                losses = run.forward_backward(*given, *vars(draws).values())
            meter.add(losses, draws.t)
        else:
            # departs: the average moves once a step; ema_per="micro_step" is the reference's rule
            # [test_the_average_moves_once_a_step_or_once_a_micro_step]
            for _ in range(run.micro_steps - 1 if config.ema_per == "micro_step" else 0):
                run.ema.update()
            norm = run.optimizer.step(done, run.ema)
            done += 1
            log.stepped()

        final = stopped or done == config.steps
        validates = run.validates and not stopped and done % config.validate_every == 0
        if done > logged and (final or validates or any(done % every == 0 for every in (
                config.log_every, config.save_every, config.sample_every))):
            report(run, meter, logged, done, norm, validates)
            logged = done
            worse = validates and ranks.any_rank(log.is_worse(config.patience))
        saves = done > saved and (final or worse or done % config.save_every == 0)
        shows = run.pictures and not stopped and (
            final or worse or done % config.sample_every == 0)
        if saves:
            resume.save(run.writer, config, done, net, run.ema, run.optimizer, ranks)
            saved = done
        if shows:
            averaged(run, score.show, log, done)
        if saves or shows or validates:
            meter.start_clock()         # the rate is that of training
    end(run, done, stopped)


def inputs(net, batch, config, depth_net, device):
    """A batch of pairs, as the loader gives it, to what `ZeroNVS.forward` takes before `draws`."""
    if "moments_target" in batch:       # of encoded shards: what the frozen networks said once
        moments, z_cond, embedding = (batch[name].to(device, non_blocking=True).float()
                                      for name in ("moments_target", "mean_cond", "clip_cond"))
        T = depth.pose_vector(batch, config.mode, depth_net, config.quantile_blend)
        return *moments.chunk(2, dim=1), z_cond, embedding, T.to(device)
    image_cond, image_target = (data.images(batch[name].to(device, non_blocking=True))
                                for name in ("image_cond", "image_target"))
    T = depth.pose_vector({**batch, "image_cond": image_cond}, config.mode, depth_net,
                          config.quantile_blend)
    mean, logvar = net.encode(image_target)
    return mean, logvar, net.encode(image_cond)[0], net.embed(image_cond), T.to(device)


def forward_backward(net, autocast, micro_steps, drop, mean, logvar, z_cond, embedding, T, *draws):
    """The losses (b,) of pairs, whose mean adds its share of the step to the gradients."""
    with autocast:
        loss = net(mean, logvar, z_cond, embedding, T, diffusion.Draws(*draws), drop)
        (loss.mean() / micro_steps).backward()
    return loss.detach()


# ---- what is due behind a step

def report(run, meter, logged, done, norm, validates):
    """Logs the steps since `logged`, and what a validation finds. Stops all ranks together where a
    loss is not finite or too much is damaged."""
    config, ranks = run.config, run.ranks
    numbers, losses, bad, (drawn, damaged) = meter.read(
        ranks, done - logged, run.micro_steps, norm, run.loader.counts())
    check_finite(bad, losses, logged, run.pairs, config, ranks)
    data.check_damage(drawn, damaged, config.max_damaged, "log.jsonl names them")
    if damaged:
        numbers["damaged"] = damaged
    if validates:
        numbers |= averaged(run, score.validate) or {}
    flops = (1 + cost.BACKWARD) * run.needs.flops * numbers["pairs_per_s"] / ranks.world
    run.log(done, **numbers, lr=learning_rate(done - 1, config) * config.lr,
            ceiling_share=flops / run.peak, memory_gb=peak_memory(run.device),
            remaining_s=(config.steps - done) * config.batch_size / numbers["pairs_per_s"])
    meter.restart()


def averaged(run, function, *arguments):
    """What a function of score.py gives for the averaged weights on rank 0; None on other ranks."""
    with run.ema.in_place(run.net):
        return (function(run.net, run.held_out, run.config, run.depth_net, *arguments)
                if run.ranks.rank == 0 else None)


def end(run, done, stopped):
    """Scores the model on the held-out pairs, or says where a signal stopped it."""
    if stopped:
        run.writer.wait()
        run.log.say(f"stopped by signal after step {done}, {'not ' * bool(run.writer.problem)}"
                    "saved; the same command goes on from the newest checkpoint")
    elif run.scores:
        averaged(run, score.conclude, run.log)
    run.writer.wait()
    run.ranks.any_rank(False)        # nobody leaves while rank 0 still writes


# ---- before the first step

class Run:
    """What a run trains with, from its first step to its end. To make one checks whatever can be
    wrong, from the cheapest to the most expensive; `build` makes what a dry run does without."""
    def __init__(self, config, ranks, device, log, dry_run):
        self.config, self.ranks, self.device, self.log = config, ranks, device, log
        self.writer = checkpoint.Writer(log.say)
        micro_batch, self.micro_steps = cost.split(config, ranks.world)
        resume.check_files(config, dry_run)
        self.needs = cost.of(config, ranks, micro_batch)
        log.say(summary(config, ranks, device, self.needs, micro_batch, self.micro_steps))
        cost.check(self.needs, device, log.say)
        if config.compile:
            engine.check_compiler(device, "--compile=false")
        self.pairs, self.held_out = open_data(config, log)
        self.pictures = "image_cond" in self.held_out[0]    # encoded shards have none
        self.scores = self.pictures and config.eval_pairs > 0
        self.validates = self.pictures and config.validate_every > 0
        resume.compare_ranks(config, ranks, revision(), resume.contents_of(self.pairs, config))

    def build(self, saved, stack):
        """Network, average, optimizer and loader. `stack` has what is to be put back at the end."""
        config, ranks, device, log = self.config, self.ranks, self.device, self.log
        self.first_step = saved.step if saved else 0        # steps that are done already
        self.net = net = resume.build(config, device)
        forms = engine.convert(net)
        if forms:
            log.say("fast     " + ", ".join(f"{count} {form}" for form, count in forms.items()))
        self.depth_net = networks.load_depth(config.depth_weights, device)    # or None
        self.ema, self.optimizer = resume.restore_or_init(config, net, saved, ranks, device)
        # tries out kernels at the first step; a GPU's sums differ from run to run in any case
        torch.backends.cudnn.benchmark = device.type == "cuda"
        if config.compile:
            engine.compiled(net)
            log.say("compile  the first step takes minutes, in later runs seconds")
        self.wrapped = ranks.wrap(net)      # its backward pass averages over the ranks
        self.autocast = (torch.autocast(device.type, torch.bfloat16)
                         if config.precision == "bf16" else nullcontext())
        self.forward_backward = functools.partial(forward_backward, self.wrapped, self.autocast,
                                                  self.micro_steps, config.drop)
        if engine.can_capture(config, ranks, device):
            self.forward_backward = engine.Recorded(self.forward_backward, net.parameters())
        self.signals = []                   # that asked to stop
        for signum in STOP:
            before = signal.signal(signum, lambda number, frame: self.signals.append(number))
            stack.callback(signal.signal, signum, before)
        batches = data.Batches(self.first_step, config.steps, config.batch_size,
                               config.micro_batch, ranks.rank, ranks.world)
        self.loader = data.Loader(self.pairs, batches, config.workers, device, config.max_damaged,
                                  log.note)
        self.peak = cost.ceiling(device, config.precision) if ranks.rank == 0 else 1.0  # FLOP/s
        stack.callback(self.writer.wait)


def open_data(config, log):
    """(pairs, held-out pairs) of a run."""
    readers = [data.open_source(s, config.data, config.image_size, patience=config.web_patience)
               for s in config.sources]
    pairs = data.Pairs(readers, [s.probability for s in config.sources], config.seed,
                       config.image_size, config.mode)
    log.say("\n".join(f"data     {reader.summary()}" for reader in readers))
    held_out = score.held_out_pairs(config, max(config.eval_pairs, score.GRID_PAIRS), fewer=True)
    raw = [each for each in (*readers, *held_out.dataset.readers) if hasattr(each, "pixels")]
    for line in sum(map(inspector.contradictions, raw[:len(readers)] if log.main else []), []):
        log.say(f"{line} (python data.py verify looks at all)")
    if len(held_out) < config.eval_pairs:
        log.say(f"held out are {len(held_out)} pairs, of the {config.eval_pairs} of --eval_pairs")
    if "image_cond" not in held_out[0]:
        log.say("the held-out shards are encoded, so there are neither pictures nor scores")
    return pairs, held_out


# ---- from the command line to the end of the process

def main(argv):
    run(*options(argv))


def run(config, traced=0, dry_run=False, gpu_memory=0.0):
    """A run, as the command line asks for it. Raises ValueError or OSError with one line."""
    if gpu_memory:
        command.say(cost.fits(config, gpu_memory))
        return
    torch.set_num_threads(threads.choose(config)[0])
    ranks, device = group.join(group.device_of(config.device), config.compile)
    log, stack, stuck = Log(config, ranks), ExitStack(), False
    try:
        ready = Run(config, ranks, device, log, dry_run)
        if not dry_run:
            ranks.on_rank_0(stack.enter_context, files.locked(config.out))
        saved = resume.find_start(config, ranks, log.say, dry_run)
        if dry_run:
            return
        ready.build(saved, stack)
        del saved               # and its mapped files: they may be removed
        log.start(ready.first_step, traced)
        ranks.any_rank(False)   # rank 0 may have written log.jsonl anew: from here on all do
        train(ready)
    except torch.OutOfMemoryError as err:
        stuck = True
        raise ValueError(f"out of memory on {device}, see the estimate above; {cost.LESS}") from err
    except RuntimeError as err:
        stuck = group.is_loss_of_a_rank(err)
        if stuck:
            raise ChildProcessError("a rank is gone, so the others stop; the same command goes on "
                                    "from the newest checkpoint") from err
        if data.is_dead_worker(err):        # raised wherever this thread happened to be
            raise ChildProcessError(f"{data.DEAD_WORKER}: {str(err).splitlines()[0]}") from err
        raise
    finally:
        stack.close()
        log.close()
        ranks.close(stuck)
    if ready.writer.problem:
        raise OSError(f"the end of the run could not be saved: {ready.writer.problem}")


if __name__ == "__main__":
    command.run("train.py", run, *OPTIONS)
