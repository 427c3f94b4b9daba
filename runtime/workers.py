"""Loader processes: how they begin and end, and how batches leave them."""

import atexit
import functools
import io
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

DEAD_WORKER = "a loader process was killed, for want of memory or by somebody"
FULL = ("shared memory (/dev/shm) is full, so batches come through pipes, slower: fewer --workers, "
        "a smaller --micro_batch or a container's larger --shm-size make room")
ORPHANED = 2.0          # seconds after which a process looks whether its parent is there
SMALL = 1 << 17         # bytes up to which a tensor is sent between processes as bytes


class Loader(DataLoader):
    """Batches (dicts) of a Dataset by lists of its numbers, from processes that end with this one.
    Memory is pinned for CUDA. A worker's ValueError is raised in the loop. When a worker dies,
    ChildProcessError in the loop, or a RuntimeError wherever the main thread is: is_dead_worker."""

    def __init__(self, dataset, batches, workers, device, say):
        try:
            ending = multiprocessing.get_context("spawn").Event()      # works under fork too
        except OSError as err:          # of a semaphore, which lies there
            raise OSError(err.errno, err.strerror, "/dev/shm") from err
        atexit.register(ending.set)     # runs before multiprocessing ends and awaits its children
        super().__init__(dataset, batch_sampler=batches, num_workers=workers, collate_fn=packed,
                         persistent_workers=workers > 0,
                         worker_init_fn=functools.partial(start_worker, ending),
                         pin_memory=torch.device(device).type == "cuda")
        self.say = say

    def __iter__(self):
        batches, say_once = super().__iter__(), functools.cache(self.say)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except ValueError as err:       # a worker's ends in its traceback: keep our line
                line = str(err).strip().splitlines()[-1]
                raise ValueError(line.removeprefix("ValueError: ")) from err
            except (EOFError, ConnectionError) as err:      # it died while it sent a batch
                raise ChildProcessError(DEAD_WORKER) from err
            yield unpacked(batch, say_once)


def start_worker(ending, worker):
    """In a new loader process: a signal to stop is for the parent, which saves first and then ends
    its workers. `ending` is set when the parent itself ends."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: ending.is_set() and os._exit(0))
    end_with_parent()


def end_with_parent():
    """Ends this process, from a thread, when the one that started it is gone: a worker's batch that
    nobody takes would keep it for ever, and a rank would train on beside the next run."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(ORPHANED)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def packed(batch):
    """A batch for its way out of a worker: small tensors as arrays, which are sent as bytes. Every
    tensor would be a piece of shared memory of its own, which costs more than a copy."""
    def sent(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.nbytes < SMALL and value.is_contiguous():  # others would come out laid out anew
            return value.numpy()
        try:    # here: an error in the thread that sends would lose the batch, and hang the run
            return value.share_memory_()
        except RuntimeError:
            file = io.BytesIO()
            torch.save(value, file)
            return file.getvalue()

    in_worker = torch.utils.data.get_worker_info() is not None
    return {name: sent(value) for name, value in batch.items()} if in_worker else batch


def unpacked(batch, say=lambda line: None):
    """The inverse of `packed`; `say` hears of shared memory that is full."""
    def received(value):
        if isinstance(value, bytes):
            say(FULL)
            return torch.load(io.BytesIO(value), weights_only=True)
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return {name: received(value) for name, value in batch.items()}


def is_dead_worker(err):
    """Whether a RuntimeError is torch's, of a loader process that has died."""
    return "DataLoader worker" in str(err)
