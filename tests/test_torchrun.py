"""Several processes are one: W of them take the step that one takes on the joined batch.

Steps are compared in float64 with smooth activations, where a wrong factor cannot hide in rounding.
Networks have no BatchNorm there, whose statistics are those of one process, but where a test says
so. A step on a pretended device, whose tensors have no values, shows that nothing waits for one.
"""
import contextlib
import copy
import datetime
import importlib
import os
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from conftest import (FORKSERVER, ROOT, Program, checkpoint, last_step, losses, rows,
                      same, tiny)

CPU = torch.device("cpu")
DATA = types.SimpleNamespace(name="fake", size=8, train=range(99))


def start_processes(function, world, *args):
    """function(rank, world, *args) in `world` processes; returns when all have ended well."""
    life = [FORKSERVER.Process(target=function, args=(rank, world, *args)) for rank in range(world)]
    for process in life:
        process.start()
    for process in life:
        process.join(300)
        assert process.exitcode == 0


# ---- one step of each method ---------------------------------------------------------------------
def settings(name, flags, world, n):
    """args of a small step on n images in all."""
    script = importlib.import_module(name)
    args = script.parse_args(flags.split())
    args.image_size = 8
    args.batch_size = n
    args.dim = 6
    args.hidden = 7
    args.temperature = 0.3
    args.arch = "resnet_tiny"
    if name == "mae_tc2":
        args.arch = "vit_micro"
        args.patch_size = 4
    elif name == "byol_gessl" and not args.baseline:
        args.target_steps = 2
        args.batch_size = n // args.tasks
    script.fill_defaults(args, DATA, CPU)
    script.check_args(args, DATA, world)
    assert args.images_per_step == n
    return args


def without_batch_norm(net):
    for name, child in net.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(net, name, nn.Identity())
        elif isinstance(child, nn.ReLU):
            setattr(net, name, nn.Softplus())
        else:
            without_batch_norm(child)


def smooth_nets(name, args, norms):
    """The script's networks in float64, with a small smooth backbone."""
    torch.manual_seed(3)
    nets = importlib.import_module(name).build_nets(args)
    if name != "mae_tc2":
        nets["backbone"] = nn.Sequential(
            nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(),
            nn.Linear(45, 64), nn.BatchNorm1d(64), nn.Tanh())
        if not norms:
            without_batch_norm(nets)
    if "target" in nets:
        online = nn.Sequential(nets["backbone"], nets["projector"])
        nets["target"] = copy.deepcopy(online).requires_grad_(False)
    return nets.double()


def three_steps(name, flags, rank=0, world=1, n=16, norms=False):
    """{name: value} of the loss and of all weights and gradients after three steps."""
    script = importlib.import_module(name)
    args = settings(name, flags, world, n)
    nets = smooth_nets(name, args, norms)
    opts = {}
    for part, opt in script.build_opts(nets, args).items():
        params = sum([group["params"] for group in opt.param_groups], [])
        opts[part] = torch.optim.SGD(params, 0.1 if part == "encoder" else 1e-4)
    count = len(script.view_augmentations(args, DATA))
    share = slice(n // world * rank, n // world * (rank + 1))
    for step in range(3):
        views = torch.randn(count, n, 3, 8, 8, generator=common.rng(step)).double()
        terms = script.train_step(nets, opts, views[:, share], args, step / 3)

    grads = {f"grad.{key}": p.grad for key, p in nets.named_parameters() if p.grad is not None}
    for key, value in {**terms, **grads}.items():
        assert not value.requires_grad, f"{key} keeps a graph until the next log line"
    found = {key: terms[key].clone() for key in ("loss_ssl", "loss_query") if key in terms}
    for loss in found.values():
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
    return {**found, **nets.state_dict(), **grads}


CASES = {
    "simclr_tc2": ["--baseline", "--baseline --tasks 4 --views 3", "", "--second-order",
                   "--tasks 2 --factors 3 --without lv", "--literal",
                   "--without calibration --query-loss nce"],
    "byol_gessl": ["--baseline", "--tasks 4", "--tasks 4 --hypergrad first-order",
                   "--tasks 4 --hypergrad exact --inner-steps 2 --ssl-weight 0",
                   "--tasks 4 --lookahead"],
    "barlow_sparsehead": ["--baseline", "", "--penalty inputs", "--penalty prox",
                          "--penalty bilevel",
                          "--penalty plain --head linear --lambda-sparse 0.1"],
    "mae_tc2": ["--baseline --masks 2", "--tasks 4 --masks 2",
                "--tasks 2 --masks 2 --second-order --factors 5"],
}
CASES_OF_THREE = {"simclr_tc2": ["--baseline", "--tasks 3"],
                  "byol_gessl": ["--baseline", "--tasks 3"],
                  "barlow_sparsehead": ["--baseline", ""],
                  "mae_tc2": ["--baseline --masks 2", "--tasks 3 --masks 2"]}

# With BatchNorm: the statistics of GeSSL's tasks do not cross processes, those of SimCLR do.
NORMS = [("byol_gessl", "--tasks 4 --hypergrad exact"), ("simclr_tc2", "--baseline")]


def listed(cases):
    found = []
    for name, all_flags in cases.items():
        found += [(name, flags) for flags in all_flags]
    return found


def raw_all_reduce(x):
    """The known mistake: the right sum, whose gradient knows this process's share only."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + x - x.detach()


def process_of_steps(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=world, timeout=datetime.timedelta(seconds=120))
    place = {"rank": rank, "world": world}
    if world == 3:
        found = [three_steps(*case, **place, n=18) for case in listed(CASES_OF_THREE)]
        torch.save(found, f"{folder}/{rank}")
        return

    found = {"cases": [three_steps(*case, **place) for case in listed(CASES)],
             "norms": [three_steps(*case, **place, norms=True) for case in NORMS],
             "sums": sums_of(rank)}
    found["right"] = losses_of(rank, world, common.all_reduce_sum)
    found["wrong"] = losses_of(rank, world, raw_all_reduce)
    import barlow_sparsehead
    barlow_sparsehead.all_reduce_sum = raw_all_reduce
    found["mistaken"] = three_steps("barlow_sparsehead", "", **place)
    torch.save(found, f"{folder}/{rank}")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    start_processes(process_of_steps, 2, str(folder))
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


def assert_equal(found, expected, what, leave_out=()):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not key.endswith(leave_out):
            close = torch.allclose(found[key], value, rtol=1e-8, atol=1e-9)
            assert close, (what, key, distance(found, expected, key))


def distance(a, b, key):
    return (a[key] - b[key]).norm() / b[key].norm()


def test_two_processes_equal_one_on_the_joined_batch(two):
    for i, case in enumerate(listed(CASES)):
        first = two[0]["cases"][i]
        second = two[1]["cases"][i]
        assert_equal(first, three_steps(*case), case)
        assert same(first, second), f"{case}: the processes drift apart"


def test_three_processes_equal_one_on_the_joined_batch(tmp_path):
    start_processes(process_of_steps, 3, str(tmp_path))
    found = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    for i, case in enumerate(listed(CASES_OF_THREE)):
        assert_equal(found[0][i], three_steps(*case, n=18), case)
        assert same(found[0][i], found[1][i]) and same(found[0][i], found[2][i])


def test_tasks_keep_the_batchnorm_of_their_batch_and_other_batches_are_split(two):
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    byol, simclr = [three_steps(*case, norms=True) for case in NORMS]
    assert_equal(two[0]["norms"][0], byol, NORMS[0], buffers)
    assert distance(two[0]["norms"][1], simclr, "grad.backbone.0.weight") > 0.01


def test_a_sum_over_processes_that_autograd_does_not_see_would_be_noticed(two):
    right = three_steps("barlow_sparsehead", "")
    assert distance(two[0]["mistaken"], right, "grad.projector.0.weight") > 0.1


def test_views_of_a_batch_do_not_depend_on_the_number_of_processes():
    data = common.load_data("fake", 8)
    recipes = importlib.import_module("simclr_tc2").AUGMENTATION["imagenet"]
    args = types.SimpleNamespace(images_per_step=24, seed=5, image_size=8)

    def batches(rank, world):
        return list(common.training_batches(data, [recipes] * 2, args, rank, world, CPU, 20, 23))

    shares = [batches(rank, 3) for rank in range(3)]
    for step, (views, index) in enumerate(batches(0, 1)):
        joined = torch.cat([share[step][0] for share in shares], dim=1)
        assert sum([share[step][1] for share in shares], []) == index
        torch.testing.assert_close(joined, views, rtol=0, atol=1e-6)


# ---- sums and gradients over processes -----------------------------------------------------------
def sums_of(rank):
    x = torch.arange(24.0).view(2, 4, 3)
    own = torch.full((3,), rank + 1.0)
    return {"rows": common.gather_batch(x.chunk(2, 0)[rank].clone(), 0),
            "columns": common.gather_batch(x.chunk(2, 1)[rank].clone(), 1),
            "sum": common.all_reduce_sum(own), "own": own}


def contrastive(z):
    """z (2, n, d): each row is classified among all others."""
    n = z.shape[1]
    z = F.normalize(z.flatten(0, 1), dim=1)
    itself = torch.eye(2 * n, dtype=torch.bool)
    logits = (z @ z.T / 0.5).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))


def losses_of(rank, world, total):
    """{kind: [loss, gradients]} on a process's share of x (2, 8, 5); total: the sum over them."""
    x = torch.randn(2, 8, 5, generator=common.rng(0)).double().chunk(world, 1)[rank]

    def embed(params):
        return torch.tanh(x @ params[0].T) @ params[1].T

    def gathered(params):
        return contrastive(common.gather_batch(embed(params), 1))

    def moments(params):
        z = embed(params).flatten(0, 1)
        return (total(z.T @ z) - torch.eye(4)).square().mean()

    def bilevel(params):
        """The inner gradient is averaged over processes inside the graph."""
        inner = gathered(params) + moments(params)
        grads = torch.autograd.grad(inner, params, create_graph=True)
        fast = [p - 0.5 * total(g) / world for p, g in zip(params, grads)]
        return gathered(fast)

    found = {}
    for loss_of in (gathered, moments, bilevel):
        params = []
        for shape in ((6, 5), (4, 6)):
            value = torch.randn(shape, generator=common.rng(shape)).double()
            params.append(nn.Parameter(value))
        loss = loss_of(params)
        loss.backward()
        unused = nn.Parameter(torch.zeros(1))
        common.average_gradients([*params, unused])
        assert unused.grad is None
        found[loss_of.__name__] = [loss.detach()] + [p.grad for p in params]
    return found


def same_number(x):
    return x


def test_batches_join_in_rank_order_and_sums_are_out_of_place(two):
    joined = torch.arange(24.0).view(2, 4, 3)
    for rank, found in enumerate(two):
        sums = found["sums"]
        assert torch.equal(sums["rows"], joined) and torch.equal(sums["columns"], joined)
        assert sums["sum"].tolist() == [3.0] * 3 and sums["own"].tolist() == [rank + 1.0] * 3


def test_losses_over_processes_have_the_gradient_of_one_and_a_raw_sum_has_not(two):
    one = losses_of(0, 1, same_number)
    for found in two:
        for kind, expected in one.items():
            torch.testing.assert_close(found["right"][kind], expected, rtol=0, atol=1e-12)
    for kind in ("moments", "bilevel"):
        for value, expected in zip(two[0]["wrong"][kind][1:], one[kind][1:]):
            assert (value - expected).norm() > 0.01 * expected.norm()


# ---- a device without values ---------------------------------------------------------------------
class Crossings(TorchDispatchMode):
    """Notes the operations on tensors of two devices, numbers apart: on a GPU they wait."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = set()
        for leaf in tree_leaves((args, kwargs, out)):
            if torch.is_tensor(leaf) and (leaf.ndim or leaf.device.type != "cpu"):
                devices.add(leaf.device.type)
        if len(devices) > 1:
            self.found.append(str(func))
        return out


ON_A_GPU = {
    "simclr_tc2": ["--baseline", "--tasks 1", "--tasks 1 --second-order --query-loss nce"],
    "byol_gessl": ["--baseline", "--tasks 1", "--tasks 1 --hypergrad neumann",
                   "--tasks 1 --hypergrad cg --outer-loss wasserstein"],
    "barlow_sparsehead": ["--baseline", "", "--penalty prox", "--penalty bilevel"],
    "mae_tc2": ["--baseline", "--tasks 1 --masks 2"],
}


def no_autocast(*args, **options):
    return contextlib.nullcontext()


def steps_on_a_pretended_device(rank, world):
    """Asking for a value, or computing with tensors of two devices, is an error here."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretended")
    torch.set_num_threads(1)
    torch.autocast = no_autocast
    device = torch.device("pretended", 0)

    def like(x, *_):
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    # Masks come from pinned memory: the one crossing that is allowed.
    importlib.import_module("mae_tc2").to_device = like
    importlib.import_module("byol_gessl").SOLVER_TERMS = 1
    for name, flags in listed(ON_A_GPU):
        script = importlib.import_module(name)
        args = settings(name, flags, 1, 16)
        count = len(script.view_augmentations(args, DATA))
        nets = script.build_nets(args)
        crossings = Crossings()
        with FakeTensorMode(), crossings:
            for module in nets.modules():
                for key, p in module._parameters.items():
                    if p is not None:
                        module._parameters[key] = nn.Parameter(like(p), p.requires_grad)
                for key, value in module._buffers.items():
                    if value is not None:
                        module._buffers[key] = like(value)
            opts = script.build_opts(nets, args)
            views = torch.randn(count, 16, 3, 8, 8, device=device)
            terms = script.train_step(nets, opts, views, args, 0.5)
            for value in terms.values():
                assert value.device == device and value.ndim == 0, (name, flags)
            assert not crossings.found, (name, flags, crossings.found)

            # Both mistakes would be noticed.
            with pytest.raises(DataDependentOutputException):
                terms.popitem()[1].item()
            like(torch.ones(3))[torch.zeros(2, dtype=torch.long)]
        assert crossings.found == ["aten.index.Tensor"]


def test_a_step_on_an_accelerator_waits_for_no_value_and_mixes_no_devices():
    setup = "_setup_privateuseone_for_python_backend"
    if not hasattr(torch.utils.backend_registration, setup):
        pytest.skip("this torch cannot pretend a device")
    start_processes(steps_on_a_pretended_device, 1)


# ---- the program ---------------------------------------------------------------------------------
def started():
    return last_step("r") >= 3


RUN = tiny("simclr_tc2", "--epochs", "500", "--log-every", "1", "--eval-every", "500",
           baseline=True)


def start_two(*argv, before=None, folders=(".", ".")):
    """What torchrun starts for --nproc-per-node 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = []
    for rank, folder in zip("01", folders):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        programs.append(Program("simclr_tc2", *argv, env=env, before=before, folder=folder))
    return programs


def run_two(*argv, **options):
    """The (status, stdout, stderr) of both."""
    return [program.end() for program in start_two(*argv, **options)]


def test_torchrun_ends_at_ctrl_c_with_one_checkpoint_and_the_same_command_goes_on(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               f"{ROOT}/simclr_tc2.py", *RUN, "--out", "r"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(command, env=env, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    Program.groups.append(torchrun.pid)
    for line in torchrun.stdout:
        if line.startswith("step 3/"):
            break
    os.killpg(torchrun.pid, signal.SIGINT)          # as a terminal does: to all processes
    out, _ = torchrun.communicate(timeout=60)
    step = checkpoint("r")["step"]
    assert out.count("the same command goes on") == 1 and step == last_step("r") >= 3
    assert rows("r")[0]["processes"] == 2

    stop = str(step + 2)
    for folder in ("r", "whole"):
        first, second = run_two(*RUN, "--out", folder, "--max-steps", stop)
        assert first[0] == second[0] == 0 and first[2] == second[2] == "", (first, second)
        assert second[1] == "" and first[1].count(f"done: {folder}/backbone.pt") == 1
    assert same(checkpoint("r"), checkpoint("whole"))
    trained = [row for row in losses("r") if "lr" in row]
    assert trained == [row for row in losses("whole") if "lr" in row]
    assert [row["step"] for row in trained] == list(range(1, step + 3))

    os.mkdir("elsewhere")
    for status, _, err in run_two(*RUN, "--out", "r", folders=(".", "elsewhere")):
        assert status == 2
        assert "--out r: the processes do not see the same files, last.pt or settings" in err


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = start_two(*RUN, "--out", "r")
    first.wait_for(started)
    os.kill(second.pid, signal.SIGTERM)
    assert first.end()[0] == second.end()[0] == 128 + signal.SIGTERM
    assert checkpoint("r")["step"] == last_step("r") >= 3


def break_a_weight():
    step = common.average_gradients

    def broken(params):
        params = list(params)
        step(params)
        params[0].grad[0] = torch.nan
    common.average_gradients = broken


def break_a_term_of_the_second():
    add = common.Log.add

    def broken(log, step, terms):
        if log.rank == 1:
            terms["std_z"] = torch.tensor(torch.nan)
        add(log, step, terms)
    common.Log.add = broken


@pytest.mark.parametrize("before, name", [(break_a_weight, "backbone.0.0.weight"),
                                          (break_a_term_of_the_second, "std_z")])
def test_what_is_not_finite_ends_all_processes_with_one_sentence(
        before, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = run_two(*RUN, "--out", "r", before=before)
    assert first[0] == second[0] == 1 and second[1:] == ("", "")
    assert first[2].startswith(f"error: {name} is not finite at step 1; ")
    assert first[2].count("\n") == 1 and not os.path.exists("r/last.pt")


@pytest.mark.parametrize("env, words", [
    ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks without RANK"),
    ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ({"LOCAL_RANK": "1"}, "process 1 of this machine has no GPU, there are 1")])
def test_processes_that_cannot_work_together_end_in_a_sentence(env, words, monkeypatch, capsys):
    def one():
        return 1

    monkeypatch.setattr(torch.cuda, "is_available", one)
    monkeypatch.setattr(torch.cuda, "device_count", one)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stopped:
        common.setup_processes(None)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count("\n") == 1


def test_an_evaluation_may_be_a_task_of_several(monkeypatch, capsys):
    """Each writes where it is told; only a training run would be done twice."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    eval_linear = importlib.import_module("eval_linear")
    with pytest.raises(SystemExit):
        eval_linear.main(["no_such_run"])
    assert "no_such_run" in capsys.readouterr().err


def test_one_process_needs_none_of_it(monkeypatch):
    for env in ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "1"},
                {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0"}):
        with monkeypatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            assert common.setup_processes("cpu") == (0, 1, CPU)
    assert not dist.is_initialized()
    p = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    (common.gather_batch(p) * common.all_reduce_sum(p)).sum().backward()
    common.average_gradients([p, nn.Parameter(torch.zeros(1))])
    assert p.grad.tolist() == [[2.0, 4.0]]
