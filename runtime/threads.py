"""How many threads a process computes with. It imports no torch: what they do while they wait has
to be said before.

Threads that spin for each other are good on an idle machine alone: on a busy one every piece of
work waits for the thread that the system runs last, and the others burn processors meanwhile.
"""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")      # of a container: microseconds, of how many


def wait_passively():
    """Lets threads sleep while they wait for each other; a user's own choice stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def processors():
    """How many processors this process may use, as its container and its affinity allow."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):           # no container, or one without a limit ("max")
        return count


def choose(config):
    """(number of threads, why so many) of a rank: as the configuration or the environment says, or
    its share of the processors."""
    if config.threads:
        return config.threads, "--threads"
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"])), "OMP_NUM_THREADS"
    count, ranks = processors(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, count // ranks), f"of {count} processors"
