"""What the Triton kernels share: which of them run, on what, and the sizes of their launches.

Every kernel has PyTorch's own operations beside it, which run where Triton is not installed, where
there is no GPU, and where `enabled` of the kernel's file is False.
"""

import functools

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq
except ImportError:         # no wheel for this system
    triton = tl = wait_for_previous = None

TYPES = torch.float32, torch.bfloat16, torch.float16
HALF_TYPES = TYPES[1:]              # whose products tensor cores take as they are
MOST_WARPS = 16                     # groups of 32 threads, of one program

# file of the engine -> whether its kernels are used; set to False to measure what they bring
enabled = dict.fromkeys(("conv", "geglu", "noise", "norm", "unet"), triton is not None)


def usable(file, x, types=TYPES):
    """Whether the kernels of a file take the place of PyTorch's operations on a tensor like x."""
    return enabled[file] and x.is_cuda and x.dtype in types


if triton is not None:
    @triton.jit
    def wait_for_previous():
        """The first line of a kernel: the next kernel may be launched, and this one waits for the
        end of the one before it. Both mean nothing without `launch_early`."""
        if cuda_capability_geq(9):
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()


@functools.cache
def launch_early():
    """Options of a kernel that is launched before the one before it ends: launching takes as long
    as a small kernel does. GPUs from Hopper on can do it (programmatic dependent launch)."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"launch_pdl": True} if hopper else {}


def warps(values, each):
    """How many groups of 32 threads hold so many values, if each group holds `each`."""
    return max(1, min(MOST_WARPS, values // each))


def power_of_2(count):
    """The next power of 2, as sizes of tiles must be."""
    return triton.next_power_of_2(count)


def channels_last(x):
    """The grid x (b, c, h, w) with its channels together in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_grid(shape, like):
    """An uninitialised channels-last grid of `shape`, of the type and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last)
