"""Loader processes: how they begin and end, and how batches leave them."""

import os
import signal
import threading
import time

import numpy as np
import torch

DEAD_WORKER = "a loader process was killed, for want of memory or by somebody"
ORPHANED = 2.0                      # seconds after which a process looks for its parent
SMALL = 1 << 17                     # bytes up to which a tensor is sent between processes as bytes


def start_worker(ending, worker):
    """In a new loader process: a signal to stop is for the parent, which saves first and then ends
    its workers. `ending` is set when the parent itself ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: ending.is_set() and os._exit(0))
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    """Ends this process when its parent is gone: batches that nobody takes would keep it for ever,
    and with it the parent's memory on a GPU."""
    while os.getppid() == parent:
        time.sleep(ORPHANED)
    os._exit(1)


def packed(batch):
    """A batch for its way out of a worker: small tensors as arrays, which are sent as bytes. Every
    tensor would be a piece of shared memory of its own, which costs more than a copy."""
    def small(value):       # arrays that are not contiguous would come out in another layout
        return (isinstance(value, torch.Tensor) and value.nbytes < SMALL and value.is_contiguous())

    return {name: value.numpy() if small(value) else value for name, value in batch.items()}


def unpacked(batch):
    """The inverse of `packed`."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in batch.items()}


def is_dead_worker(err):
    """Whether a RuntimeError is torch's, of a loader process that has died."""
    return "DataLoader worker" in str(err)
