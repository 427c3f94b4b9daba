"""Python in a fork of the process of the tests, which has imported torch already: that takes 3 s."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo      # for the forks, which import it where they use tensors without values

from analysis import inspect
from runtime import cost

ROOT = Path(__file__).parents[1]


def quick(patch):
    """Leaves out what takes longest in a run of train.py this small, here and in forks: the count of what
    it needs, the speed of the machine, the check of its shards, other processes."""
    patch.setattr(os, "cpu_count", lambda: 1)
    patch.setattr(cost, "of", lambda *_: cost.Cost(*[1] * 8))
    patch.setattr(cost, "ceiling", lambda *_: 1e12)
    patch.setattr(inspect, "contradictions", lambda source: [])


def run_code(code, run_name):
    exec(code, {"__name__": run_name})


class Popen:
    """What tests use of subprocess.Popen([sys.executable, *arguments]), in the project's folder;
    arguments: FILE, -m MODULE or -c CODE, and its own. Its threads are gone, so it computes with one."""

    def __init__(self, *arguments, stdout=None, stderr=None, env=None):
        self.returncode, self.pid = None, os.fork()
        if self.pid:
            return
        status = 1
        try:
            for number, file in ((1, stdout), (2, stderr)):
                if file:
                    os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
            os.environ.update(env or {})
            os.chdir(ROOT)
            torch.set_num_threads(1)
            start = {"-m": runpy.run_module, "-c": run_code}.get(arguments[0], runpy.run_path)
            sys.argv = [str(text) for text in arguments if text not in ("-m", "-c")]
            start(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, timeout=600):
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def run(*arguments, **options):
    """subprocess.run([sys.executable, *arguments], capture_output=True, text=True)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Popen(*arguments, stdout=out, stderr=err, **options).wait()
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())
