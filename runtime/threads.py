"""How many threads a process computes with. It imports no torch: what they do while they wait has to
be said before.

Threads that spin for each other are good on an idle machine alone. On a busy one each step waits for
the thread that the system runs last, and the others burn their processors meanwhile.
"""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")      # of a container: microseconds, of how many


def wait_passively():
    """Lets threads sleep while they wait for each other; a user's own choice stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def processors():
    """How many processors this process may use, as its container and its affinity allow."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:                  # not Linux
        count = os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):           # no container, or one without a limit ("max")
        return count


def choose(config):
    """(number of threads, why so many) of a rank: the configuration's, the user's environment's, or
    what the loader's workers, other ranks and other programs leave."""
    if config.threads:
        return config.threads, "--threads"
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"])), "OMP_NUM_THREADS"
    share = processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, share - config.workers - busy), (
        f"of {processors()} processors, {config.workers} workers, {busy} busy already")
