"""What the tests share: one thread, no GPU, tiny runs, and programs that start quickly."""
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time

# Equality to the bit is a promise on a CPU. A GPU has test_device.py, see there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# Tiny networks; and threads that fight over busy cores wait for each other.
torch.set_num_threads(1)

# Imported once for all the processes that tests start.
multiprocessing.set_forkserver_preload(
    ["pytest", "torchvision.transforms.v2", "matplotlib.figure", "matplotlib.backends.backend_agg"])
FORKSERVER = multiprocessing.get_context("forkserver")

SCRIPTS = ("simclr_tc2", "byol_gessl", "barlow_sparsehead", "mae_tc2")
both = pytest.mark.parametrize("baseline", [False, True], ids=["enhanced", "baseline"])
each_script = pytest.mark.parametrize("name", SCRIPTS)


def pytest_configure(config):
    """torchvision announces at every call that its decoders and encoders will move elsewhere."""
    config.addinivalue_line("filterwarnings", "ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="session")
def root():
    return ROOT


def tiny(name, *flags, baseline=False):
    """Flags of a run of one epoch: eight steps of 64 images of 8 x 8 pixels."""
    argv = ["--data", "fake", "--image-size", "8", "--epochs", "1", "--warmup-epochs", "0",
            "--log-every", "3", "--eval-every", "1"]
    if name == "mae_tc2":
        argv += ["--arch", "vit_micro", "--patch-size", "2"]
    else:
        argv += ["--arch", "resnet_tiny"]
    if baseline:
        return [*argv, "--batch-size", "64", "--baseline", *flags]
    enhanced = {"simclr_tc2": ["--batch-size", "64", "--tasks", "2"],
                "byol_gessl": ["--batch-size", "32", "--tasks", "2", "--target-steps", "1"],
                "barlow_sparsehead": ["--batch-size", "64"],
                "mae_tc2": ["--batch-size", "64", "--tasks", "2", "--masks", "2"]}
    return [*argv, *enhanced[name], *flags]


def rows(out):
    """The rows of log.jsonl; the run may be writing the next one."""
    with open(f"{out}/log.jsonl") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def last_step(out):
    """Of the run in `out`, -1 while it has no log."""
    if not os.path.exists(f"{out}/log.jsonl"):
        return -1
    return rows(out)[-1].get("step", -1)


def losses(out):
    """The rows after the header, without what the clock said."""
    found = rows(out)[1:]
    for row in found:
        row.pop("images_per_s", None)
    return found


def checkpoint(out):
    """What a run goes on from, apart from its settings."""
    state = torch.load(f"{out}/last.pt", weights_only=True)
    return {key: state[key] for key in ("step", "nets", "opts")}


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def text_of(path):
    """Of a file; of a pipe nothing is left."""
    if not os.path.isfile(path):
        return ""
    with open(path) as file:
        return file.read()


def do_nothing(*_):
    pass


def run_script(name, argv, folder, env, before, stdout, stderr):
    """The life of a `Program`."""
    os.chdir(folder)
    os.setsid()
    # A background job of a shell ignores Ctrl-C, a program that someone looks at does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    # Opened anew: the old ones may believe that they can seek in a pipe.
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)          # as in a program
    import common
    common.plot_curves = common.draw_grid = do_nothing          # it takes longer than the training
    if before:
        before()
    sys.argv = [f"{name}.py", *argv]
    runpy.run_path(f"{ROOT}/{name}.py", run_name="__main__")


class Program:
    """A script as a program, in a group of processes of its own.

    env: more of the environment; before: a function that is called first in the new process;
    stdout: the name of a pipe."""
    count = 0
    groups = []

    def __init__(self, name, *argv, env=None, before=None, folder=".", stdout=None):
        Program.count += 1
        names = (stdout or f"stdout{Program.count}", f"stderr{Program.count}")
        self.files = [os.path.abspath(name) for name in names]
        life = (name, argv, os.path.abspath(folder), env or {}, before, *self.files)
        self.process = FORKSERVER.Process(target=run_script, args=life)
        self.process.start()
        self.pid = self.process.pid
        Program.groups.append(self.pid)

    def wait_for(self, ready):
        """Until ready() is true."""
        while not ready():
            assert self.process.is_alive(), self.end()
            time.sleep(0.01)

    def has_spoken(self):
        return os.path.exists(self.files[0]) and os.path.getsize(self.files[0]) > 0

    def end(self):
        """Its (exit status, stdout, stderr), when it has ended."""
        self.process.join(60)
        assert not self.process.is_alive()
        return self.process.exitcode, *map(text_of, self.files)


@pytest.fixture(autouse=True)
def bad_files_are_named_anew():
    import common
    common.named_files.clear()


@pytest.fixture(autouse=True)
def no_program_outlives_its_test():
    yield
    while Program.groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(Program.groups.pop(), signal.SIGKILL)
