"""What the Triton kernels of this project share: whether they run, for what, and their sizes.

Every one of them has PyTorch's own form beside it, which runs where Triton is not installed, where
there is no GPU, and everywhere if `enabled` is set to False.
"""

import functools
import subprocess

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq
except ImportError:         # no wheel for this system
    triton = tl = begin = None

TYPES = torch.float32, torch.bfloat16, torch.float16
HALF_TYPES = TYPES[1:]              # whose products tensor cores take as they are
MOST_WARPS = 16                     # groups of 32 threads, of one program

enabled = triton is not None
disabled = set()            # parts of the engine that a benchmark leaves out, by name


def usable(x, types=TYPES):
    """Whether kernels take the place of PyTorch's operations on a tensor like x."""
    return enabled and x.is_cuda and x.dtype in types


def check_compiler(device, without):
    """Compiles a line, so that what torch.compile lacks is known at start. ValueError says what.
    without: the option that does without it."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as err:
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        raise ValueError(f"torch.compile does not work here ({reason}); {without} does without it, "
                         "slower") from err


if triton is not None:
    @triton.jit
    def begin():
        """First of all, a kernel lets the one after it be launched, and waits for the one before
        it: both mean nothing if they were not launched `early`."""
        if cuda_capability_geq(9):
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()


@functools.cache
def early():
    """Options of a kernel that is launched before the one before it ends, see `begin`: launching
    takes as long as a small kernel does. GPUs from Hopper on can do it."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"launch_pdl": True} if hopper else {}


def warps(values, each):
    """How many groups of 32 threads hold so many values, if each group holds `each`."""
    return max(1, min(MOST_WARPS, values // each))


def power_of_2(count):
    """The next one, as sizes of tiles must be."""
    return triton.next_power_of_2(count)


def channels_last(x):
    """The grid x (b, c, h, w), with its channels together in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def blank_grid(shape, like):
    """A channels-last grid of `shape` with nothing in it yet, of the type and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last)
