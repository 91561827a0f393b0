"""What a run does as a program: its files, resume, processes, bad input, and the promises the README makes about the sources."""
import contextlib
import copy
import errno
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional as TF

import common
import barlow_sparsehead
import byol_gessl
import eval_linear
import mae_tc2
import simclr_tc2
from conftest import ROOT

SCRIPTS = [os.path.basename(f) for f in sorted(glob.glob(f"{ROOT}/*.py")) if os.path.basename(f) not in ("common.py", "eval_linear.py")]
FAKE = ["--data", "fake", "--epochs", "2", "--warmup-epochs", "1", "--eval-every", "1", "--log-every", "3"]
TINY = [*FAKE, "--arch", "resnet_tiny"]
QUICK = [*TINY, "--batch-size", "64"]                       # of simclr_tc2
ENHANCED = {simclr_tc2: QUICK, byol_gessl: [*TINY, "--batch-size", "32", "--tasks", "2", "--target-steps", "1"], barlow_sparsehead: QUICK,
            mae_tc2: [*FAKE, "--arch", "vit_micro", "--batch-size", "64", "--tasks", "2", "--patch-size", "8", "--masks", "2"]}         # 8 steps of 64 images per epoch
BASELINE = {simclr_tc2: [*QUICK, "--baseline"], byol_gessl: [*TINY, "--batch-size", "64", "--baseline"], barlow_sparsehead: [*QUICK, "--baseline"],
            mae_tc2: [*FAKE, "--arch", "vit_micro", "--batch-size", "64", "--baseline", "--patch-size", "8"]}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
each_script = pytest.mark.parametrize("script", ENHANCED, ids=lambda m: m.__name__)


@functools.cache
def load_once(name, load=common._load_torchvision):
    return load(name)


draw_once = functools.cache(common.draw_shapes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "picture" not in request.node.name or getattr(request.node, "callspec", None) and request.node.callspec.params.get("extra"):          # drawing takes longer than the training of most tests
        monkeypatch.setattr(common, "plot_curves", lambda out: None)
    monkeypatch.setattr(common, "_load_torchvision", load_once)
    if "shapes" not in request.node.name:
        monkeypatch.setattr(common, "draw_shapes", draw_once)


def rows(out):
    with open(f"{out}/log.jsonl") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]         # the run may be writing the next one


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def state(out):
    found = torch.load(f"{out}/last.pt", weights_only=True)
    return {k: found[k] for k in ("step", "nets", "opts")}


def losses(out):
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in rows(out)[1:]]


def image_folder(path, splits=("train", "test"), classes="ab", n=8, size=(20, 24), seed=0):
    for split in splits:
        for c in classes:
            os.makedirs(f"{path}/{split}/{c}")
            for i in range(n):
                image = torch.randint(0, 255, (3, *size), dtype=torch.uint8, generator=common.rng(seed, i, ord(c), len(split)))
                (write_png if i % 2 else write_jpeg)(image, f"{path}/{split}/{c}/{i}.{'png' if i % 2 else 'jpg'}")
    return str(path)


# ---- a run and its files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, extra", [(simclr_tc2, e.split()) for e in (
    "", "--baseline", "--second-order --calibrate mix --factors 9", "--literal", "--inner-lr 0 --calibrate none --query-loss nce", "--baseline --tasks 2 --views 3")]
    + [(byol_gessl, e.split()) for e in ("", "--baseline", "--hypergrad neumann --outer-loss ce",
                                         "--hypergrad cg --outer-loss wasserstein --ssl-weight 0", "--lookahead")]
    + [(barlow_sparsehead, e.split()) for e in ("", "--baseline", "--penalty prox --head linear --dim 32", "--penalty plain")]
    + [(mae_tc2, e.split()) for e in ("", "--baseline", "--second-order --calibrate mix --factors 9 --masks 3 --mask-ratio 0.5")])
def test_run_leaves_log_checkpoint_backbone_and_picture(script, extra):
    script.main(ENHANCED[script] + ["--out", "r", "--max-steps", "3"] + extra)
    header, *events = rows("r")
    assert header["settings"]["batch_size"] == int(ENHANCED[script][ENHANCED[script].index("--batch-size") + 1]) and header["images"] == 512
    assert header["parameters"]["backbone"] == (242_496 if script is mae_tc2 else 77_392) and events[-1].keys() > {"step", "knn5"}
    events = [e for e in events if "warning" not in e]
    assert [e["step"] for e in events] == [0, 3, 3] and all(abs(v) < 1e9 for e in events for v in e.values())
    assert {"knn5", "knn200_cosine", "rank_h"} <= events[0].keys() & events[-1].keys() and "raw_pixels_knn5" in events[0]
    assert {simclr_tc2: {"conflict_cos_raw", "conflict_negative_raw", "rank_z"}, byol_gessl: {"rank_z", "rank_p", "std_p"},
            barlow_sparsehead: {"rank_r", "rank_z"}, mae_tc2: {"loss_reconstruction", "rank_z"}}[script] <= events[-1].keys()
    assert sorted(os.listdir("r")) == sorted(["backbone.pt", "last.pt", "log.jsonl"] + ["curves.png"] * (not extra) + ["reconstructions.png"] * (script is mae_tc2))
    assert extra or torchvision.io.read_image("r/curves.png").float().std() > 10


@pytest.mark.parametrize("script, arch", [(simclr_tc2, "resnet18"), (byol_gessl, "resnet18"), (barlow_sparsehead, "resnet18")])
def test_backbone_loads_strictly_into_torchvision(script, arch):
    script.main(["--data", image_folder("d"), "--arch", arch, "--batch-size", "4", "--epochs", "1", "--max-steps", "1", "--baseline", "--out", "r"])
    saved = torch.load("r/backbone.pt", weights_only=True)
    net = getattr(torchvision.models, arch)()
    net.fc = nn.Identity()
    assert saved["small_images"] and saved["arch"] == arch and saved["image_size"] == 20
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.load_state_dict(saved["state_dict"], strict=True)


@each_script
def test_evaluation_reads_a_run_and_writes_a_table(script, capsys):
    script.main(ENHANCED[script] + ["--out", "r", "--max-steps", "1"])
    capsys.readouterr()
    eval_linear.main(["r", "--probe-epochs", "3"])
    table, found = capsys.readouterr().out, json.load(open("r/eval.json"))
    assert {(r["protocol"], r["metric"]) for r in found["results"]} >= {("linear", "top1"), ("linear", "top5"), ("knn", "k5_euclidean"), ("knn", "k200_cosine")}
    assert all(f"{r['value']:.2f}" in table and 0 <= r["value"] <= 100 for r in found["results"])


def test_spectrum_is_that_of_the_features_and_keeps_other_results(capsys):
    for out, extra in (("r", []), ("q", ["--head", "linear", "--dim", "16"])):
        barlow_sparsehead.main(ENHANCED[barlow_sparsehead] + ["--out", out, "--max-steps", "1"] + extra)
    eval_linear.main(["q", "--protocol", "knn"])
    eval_linear.main(["r", "--protocol", "spectrum"])
    eval_linear.main(["q", "--protocol", "spectrum", "--overlay", "r"])
    found, spectra = json.load(open("q/eval.json"))["results"], json.load(open("q/spectrum.json"))["eigenvalues"]
    assert {r["protocol"] for r in found} == {"knn", "spectrum"} and torchvision.io.read_image("q/spectrum.png").float().std() > 10
    nets = barlow_sparsehead.build_nets(types.SimpleNamespace(**rows("q")[0]["settings"]))[0].eval()
    nets.load_state_dict(torch.load("q/last.pt", weights_only=True)["nets"])
    recipe, data = barlow_sparsehead.AUGMENTATION["small"][0], common.load_data("fake")
    with torch.no_grad():
        h = nets["backbone"](common.normalize(data.test.float() / 255, recipe["mean"], recipe["std"]))
        for name, x in (("representation", h), ("embedding", nets["projector"](h))):
            x = (x - x.mean(0)).double()
            values = torch.linalg.svdvals(x).square() / (len(x) - 1)
            torch.testing.assert_close(torch.tensor(spectra[name], dtype=torch.float64)[:len(values)], values, rtol=1e-3, atol=1e-5 * values[0].item())
    simclr_tc2.main(QUICK + ["--out", "m", "--max-steps", "1", "--baseline"])
    capsys.readouterr()
    for argv, word in ((["q", "--protocol", "spectrum", "--overlay", "m"], "--overlay m"), (["q", "--protocol", "spectrum", "--overlay", "none"], "--overlay none")):
        with pytest.raises(SystemExit) as stopped:
            eval_linear.main(argv)
        assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_eigenvalues_of_a_known_covariance():
    x = torch.randn(200_000, 3, generator=common.rng(1), dtype=torch.float64) * torch.tensor([3.0, 1, 0])
    values = eval_linear.eigenvalues(x @ torch.linalg.qr(torch.randn(3, 3, generator=common.rng(2), dtype=torch.float64))[0])
    torch.testing.assert_close(values, torch.tensor([9.0, 1, 0], dtype=torch.float64), rtol=0.02, atol=1e-9)


@each_script
def test_baseline_starts_from_the_same_weights_and_sees_the_same_views(script):
    nets = []
    for argv in (ENHANCED[script], BASELINE[script]):
        args = script.parse_args(argv)
        data = common.load_data("fake")
        common.resolve(args, script.RECIPES, data, "x")
        per_step = script.check_args(args, data, 1)
        torch.manual_seed(args.seed)
        nets.append((script.build_nets(args)[0], next(common.training_views(
            data, (script.AUGMENTATION["small"] * args.views)[:args.views], 32, per_step, 0, 0, 1, torch.device("cpu"), 0, 0, 9))))
    (enhanced, views), (base, base_views) = nets
    assert all(torch.equal(p, enhanced.state_dict()[k]) for k, p in base.state_dict().items())
    assert len(base_views) <= len(views) and all(map(torch.equal, base_views, views)) and len(views[0]) == 64


def test_a_term_above_its_limit_warns_once_on_screen_and_in_the_log(capsys):
    for alpha, expected in (("10", 1), ("1e-9", 0)):
        byol_gessl.main(ENHANCED[byol_gessl] + ["--out", alpha, "--max-steps", "2", "--log-every", "1", "--inner-lr", alpha, "--lr", "0"])
        warned = [r for r in rows(alpha) if "warning" in r]
        assert len(warned) == capsys.readouterr().out.count("a Neumann series diverges") == expected and all(r["step"] == 1 for r in warned)
        assert all(r["images_per_s"] > 0 for r in rows(alpha) if "lr" in r)


def test_plain_penalty_says_once_why_it_cannot_sparsify_and_live_columns_are_in_the_checkpoint(capsys):
    for penalty, times in (("plain", 1), ("rownorm", 0)):
        barlow_sparsehead.main(ENHANCED[barlow_sparsehead] + ["--out", penalty, "--max-steps", "1", "--penalty", penalty])
        assert capsys.readouterr().out.count("the loss does not see the scale of a row of W") == times
    saved = state("rownorm")["nets"]
    assert saved["projector.live_columns"].dtype == torch.bool and saved["projector.live_columns"].shape == saved["projector.3.weight"].shape[1:]


# ---- staying alive --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, argv", [*ENHANCED.items(), *BASELINE.items()], ids=lambda x: getattr(x, "__name__", None) or ("baseline" if "--baseline" in x else "enhanced"))
def test_sigterm_in_mid_epoch_then_resume_equals_uninterrupted(script, argv, monkeypatch):
    argv = argv if argv is BASELINE[simclr_tc2] else [*argv, "--epochs", "1", "--warmup-epochs", "0"]              # the loop is the same text
    script.main(argv + ["--out", "whole"])
    step, calls = script.train_step, []
    def interrupted(*a):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*a)
    monkeypatch.setattr(script, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(argv + ["--out", "parts"])
    assert stopped.value.code == 128 + signal.SIGTERM and state("parts")["step"] == 5 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    script.main(argv + ["--out", "parts"])
    assert same(state("parts"), state("whole"))
    extra_row = [r for r in losses("parts") if r["step"] == 5]
    assert [r for r in losses("parts") if r not in extra_row] == losses("whole")


def program(*argv, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kw)


def test_sigterm_to_the_whole_group_leaves_the_workers_to_the_program():
    image_folder("d", size=(120, 110), n=30)
    run = program(f"{ROOT}/simclr_tc2.py", "--data", "d", "--image-size", "20", "--arch", "resnet_tiny", "--batch-size", "8", "--epochs", "500", "--workers", "1", "--baseline",
                  "--log-every", "1", "--out", "r", start_new_session=True)
    while not (os.path.exists("r/log.jsonl") and rows("r")[-1].get("step", 0) >= 3):
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGTERM)                  # as torchrun, timeout and systemd do
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "same command goes on" in out and "Traceback" not in err
    assert state("r")["step"] == rows("r")[-1]["step"] >= 3


def test_kill_9_between_checkpoints_then_resume_equals_uninterrupted(capsys):
    argv = [f"{ROOT}/simclr_tc2.py", *QUICK, "--epochs", "3", "--log-every", "1", "--baseline"]
    simclr_tc2.main(argv[1:] + ["--out", "whole"])
    run = program(*argv, "--out", "parts")
    while not (os.path.exists("parts/last.pt") and rows("parts")[-1]["step"] % 8 == 4):
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    run.kill()
    run.communicate()
    assert 8 <= state("parts")["step"] < 24 and state("parts")["step"] % 8 == 0
    simclr_tc2.main(argv[1:] + ["--out", "parts"])
    assert "goes on from step" in capsys.readouterr().out
    assert same(state("parts"), state("whole")) and losses("parts") == losses("whole")


def test_ctrl_c_ends_a_program_with_a_checkpoint_and_no_traceback():
    run = program(f"{ROOT}/simclr_tc2.py", *QUICK, "--epochs", "500", "--out", "r")
    while not (os.path.exists("r/log.jsonl") and rows("r")[-1].get("step", 0) >= 3):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT and "same command goes on" in out and not err
    assert state("r")["step"] >= 3


def test_resume_refuses_other_settings_and_foreign_files(capsys):
    simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"])
    before = open("r/last.pt", "rb").read()
    for argv, word in ((["--lr", "0.5"], "lr 0.003 -> 0.5"), (["--baseline"], "baseline False -> True")):
        with pytest.raises(SystemExit) as stopped:
            simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"] + argv)
        assert stopped.value.code == 2 and word in capsys.readouterr().err and open("r/last.pt", "rb").read() == before
    for content in (b"", b"no checkpoint", before[:1000]):
        open("r/last.pt", "wb").write(content)
        with pytest.raises(SystemExit) as stopped:
            simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"])
        assert stopped.value.code == 2 and "r/last.pt" in capsys.readouterr().err
    torch.save({"epoch": 1}, "r/last.pt")
    with pytest.raises(SystemExit):
        simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"])
    assert "has no step, settings" in capsys.readouterr().err


def test_a_run_of_another_device_is_not_resumed(monkeypatch, capsys):
    simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"])
    saved = torch.load("r/last.pt")
    saved["settings"]["device"] = "elsewhere"
    torch.save(saved, "r/last.pt")
    with pytest.raises(SystemExit):
        simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "2"])
    assert "device elsewhere -> " in capsys.readouterr().err


def test_workers_by_default_share_the_cores_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24))
    for local, workers in (("1", 16), ("4", 6), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert simclr_tc2.parse_args([]).workers == eval_linear.parse_args(["r"]).workers * 1 == workers


def test_pictures_are_drawn_while_a_run_goes_on_and_before_it_ends_badly(monkeypatch):
    clock, drawn = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(common, "plot_curves", lambda out: drawn.append(clock[0]))
    os.makedirs("r")
    log = common.Log("r", 8, 0, 1, 0, 9, {})
    for clock[0] in (10.0, 61.0, 70.0, 122.0):
        log.event(step=12800, knn5=50.0, rank_h=3.0)
    assert drawn == [61.0, 122.0]
    log.add(3, {"loss_ssl": torch.tensor(float("nan"))})
    with pytest.raises(SystemExit):
        log.write(0.1)
    assert len(drawn) == 3


def test_resume_survives_a_lost_log():
    for stop in ("2", "4"):
        simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", stop])
        first = rows("r")[0]
        os.remove("r/log.jsonl")
    assert first["images"] == 512 and state("r")["step"] == 4


def test_a_run_killed_between_its_two_files_does_the_epoch_again(monkeypatch):
    """backbone.pt is written before last.pt: a run that has a last.pt has the backbone.pt of that step, or of a later one."""
    real, written = common.save, []
    monkeypatch.setattr(common, "save", lambda path, state: written.append(os.path.basename(path)) or real(path, state))
    simclr_tc2.main(QUICK + ["--baseline", "--out", "r"])
    assert [w for w in written if w.endswith(".pt")][:2] == ["backbone.pt", "last.pt"]


def test_a_full_disk_ends_a_run_in_a_sentence(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "r/log.jsonl")
    monkeypatch.setattr(simclr_tc2, "train_step", full)
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main(QUICK + ["--out", "r"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "r/log.jsonl" in err
    def lost(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    monkeypatch.setattr(simclr_tc2, "train_step", lost)                         # which must not be swallowed
    with pytest.raises(FileNotFoundError):
        simclr_tc2.main(QUICK + ["--out", "r"])


def test_a_full_disk_costs_neither_the_previous_file_nor_a_traceback(capsys):
    common.save("x.pt", {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            common.save("x.pt", {"a": torch.zeros(100000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "cannot write x.pt" in err and err.count("\n") == 1 and torch.load("x.pt") == {"a": 1} and not os.path.exists("x.pt.tmp")


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(capsys):
    simclr_tc2.main(QUICK + ["--out", "r", "--max-steps", "1"])
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)
    torch.save({"step": Bomb(), "settings": {}, "nets": {}, "opts": {}}, "r/last.pt")
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main(QUICK + ["--out", "r"])
    assert stopped.value.code == 2 and not os.path.exists("exploded")


def test_a_value_that_is_not_finite_draws_the_picture_and_stops_the_run_with_step_and_checkpoint(monkeypatch, capsys):
    step, calls = simclr_tc2.train_step, []
    def poisoned(nets, opts, views, *rest):
        calls.append(1)
        return step(nets, opts, [v * (float("nan") if len(calls) == 11 else 1) for v in views], *rest)
    monkeypatch.setattr(simclr_tc2, "train_step", poisoned)
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main(QUICK + ["--out", "r", "--baseline"])
    err = capsys.readouterr().err
    assert os.path.getsize("r/curves.png") > 10000 and stopped.value.code == 1 and "not finite at step 11" in err and "loss_ssl nan" in err and "r/last.pt" in err
    assert state("r")["step"] == 8 and all(v.isfinite().all() for v in state("r")["nets"].values())


# ---- processes ------------------------------------------------------------------------------------------------------
def args_for(script, extra, n=16):
    args = script.parse_args([*extra])
    args.dim, args.hidden, args.temperature, args.image_size, args.bf16, args.views = 6, 7, 0.3, 8, False, getattr(args, "views", 2)
    args.arch = "vit_micro" if script is mae_tc2 else "resnet_tiny"
    if script is byol_gessl:
        args.tasks = args.tasks or 4
    args.lr, args.batch_size, args.weight_decay = 0.1, n // args.tasks if script is byol_gessl and not args.baseline else n, 0
    if script is mae_tc2:
        args.patch_size, args.decoder_dim, args.decoder_depth, args.views, args.norm_pixels, args.position_base = 4, 32, 1, 1, True, 30
    for key, value in script.RECIPES["shapes"].items():
        if getattr(args, key, None) is None and key in ("tasks", "target_steps", "ema_decay", "inner_lr", "lambda_offdiag", "tc2_masks", "tc2_tasks"):
            setattr(args, key, value)
    assert script.check_args(args, types.SimpleNamespace(train=range(99)), 1) == n
    return args


def without_batch_norm(net):
    """Its statistics are those of one process."""
    for name, child in net.named_children():
        setattr(net, name, nn.Identity() if isinstance(child, nn.modules.batchnorm._BatchNorm) else nn.Softplus() if isinstance(child, nn.ReLU) else without_batch_norm(child))
    return net


def smooth_nets(script, args, norms=False, dtype=torch.float64):
    torch.manual_seed(3)
    nets = script.build_nets(args)[0]
    if script is mae_tc2:
        return nets.to(dtype)
    nets["backbone"] = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(45, 64), nn.BatchNorm1d(64), nn.Tanh())
    if not norms:
        without_batch_norm(nets)
    if "target" in nets:
        nets["target"] = copy.deepcopy(nn.Sequential(nets["backbone"], nets["projector"])).requires_grad_(False)
    if args.sync_bn:
        common.sync_batch_norms(nets)
    return nets.to(dtype)


def stepped(script, args, rank, world, n=16, norms=False, dtype=torch.float64):
    nets = smooth_nets(script, args, norms or args.sync_bn, dtype)
    opts = {name: torch.optim.SGD([p for group in opt.param_groups for p in group["params"]], 0.1 if name == "encoder" else 1e-4)
            for name, opt in script.build_opts(nets, args).items()}
    share = slice(n // world * rank, n // world * (rank + 1))
    for step in range(3):
        views = [torch.randn(n, 3, 8, 8, generator=common.rng(step, v)).to(dtype)[share] for v in range(args.views)]
        terms = script.train_step(nets, opts, views, args, step / 3)
    held = [k for k, t in [*terms.items(), *((k, p.grad) for k, p in nets.named_parameters() if p.grad is not None)] if t.requires_grad]
    assert not held, f"{script.__name__}: {held} keep a graph, and its memory, until the next log line"
    loss = terms.get("loss_query", terms["loss_ssl"] if "loss_ssl" in terms else None)
    if world > 1:
        torch.distributed.all_reduce(loss)
    return {"loss": loss / world, **nets.state_dict(), **{f"grad.{k}": p.grad for k, p in nets.named_parameters() if p.grad is not None}}


CASES = [(simclr_tc2, e.split()) for e in ("--baseline", "--baseline --tasks 4 --views 3", "", "--second-order --calibrate mix", "--tasks 2 --factors 3",
                                           "--calibrate none --query-loss nce", "--literal")]
CASES += [(byol_gessl, e.split()) for e in ("--baseline", "", "--hypergrad exact --inner-steps 2 --ssl-weight 0", "--hypergrad first-order", "--lookahead")]
CASES += [(barlow_sparsehead, e.split()) for e in ("--baseline", "", "--penalty prox", "--penalty plain --head linear --lambda-sparse 0.1")]
CASES += [(mae_tc2, e.split()) for e in ("--baseline --masks 2", "--tasks 4 --masks 2", "--tasks 2 --second-order --calibrate mix --factors 5")]


NORMS = [(simclr_tc2, e.split()) for e in ("--baseline --sync-bn", "--sync-bn --tasks 2", "--baseline")]
NORMS += [(byol_gessl, e.split()) for e in ("--baseline --sync-bn", "--hypergrad exact")] + [(barlow_sparsehead, ["--sync-bn"])]
EXTRA = {mae_tc2: ["--tasks", "2"]}
FLOAT32 = [(script, extra) for script in (simclr_tc2, byol_gessl, barlow_sparsehead, mae_tc2) for extra in (["--baseline"], EXTRA.get(script, []))]
CASES_OF_3 = [(simclr_tc2, ["--baseline", "--micro-batch", "5"]), (simclr_tc2, ["--tasks", "3"]), (byol_gessl, ["--baseline"]), (byol_gessl, ["--tasks", "3"]),
              (barlow_sparsehead, ["--baseline"]), (barlow_sparsehead, []), (mae_tc2, ["--baseline", "--masks", "2"]), (mae_tc2, ["--tasks", "3", "--masks", "2"])]


def plain_all_reduce(x):
    """The known mistake: the right sum, whose gradient knows only this process's share."""
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total + x - x.detach()


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    if world == 3:
        return torch.save([stepped(script, args_for(script, extra, 18), rank, world, 18) for script, extra in CASES_OF_3], f"{folder}/{rank}")
    found = [stepped(script, args_for(script, extra), rank, world) for script, extra in CASES]
    norms = [stepped(script, args_for(script, extra), rank, world, norms=True) for script, extra in NORMS]
    norms += [stepped(script, args_for(script, extra), rank, world, dtype=torch.float32) for script, extra in FLOAT32]
    views = {name: list(common.training_views(common.load_data("fake"), [simclr_tc2.STRONG] * 2, 32, 20, 5, rank, world, torch.device("cpu"), 0, 24, 27))
             for name in ("fake",)}
    barlow_sparsehead.all_reduce_sum = plain_all_reduce
    found.append(stepped(barlow_sparsehead, args_for(barlow_sparsehead, []), rank, world))
    torch.save((found, views["fake"], norms), f"{folder}/{rank}")


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    mp.start_processes(worker, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    (first, views0, norms0), (second, views1, norms1) = (torch.load(tmp_path / str(r)) for r in (0, 1))
    for (script, extra), a, b in zip(CASES, first, second):
        one = stepped(script, args_for(script, extra), 0, 1)
        for k, v in one.items():
            torch.testing.assert_close(a[k], v, rtol=1e-9, atol=1e-11, msg=lambda m: f"{script.__name__} {extra} {k}: {m}")
            assert torch.equal(a[k], b[k]), f"{script.__name__} {extra}: processes drift apart in {k}"
    right, wrong = stepped(barlow_sparsehead, args_for(barlow_sparsehead, []), 0, 1)["grad.projector.0.weight"], first[-1]["grad.projector.0.weight"]
    assert (wrong - right).norm() > 0.1 * right.norm(), "a collective that autograd does not see goes unnoticed"
    for (script, extra), a, b in zip(NORMS, norms0, norms1):
        one = stepped(script, args_for(script, extra), 0, 1, norms=True)
        if script is simclr_tc2 and "--sync-bn" not in extra:
            assert (a["grad.backbone.0.weight"] - one["grad.backbone.0.weight"]).norm() > 0.01 * one["grad.backbone.0.weight"].norm(), "statistics per process do not matter"
            continue
        for k, v in one.items():
            if "--sync-bn" in extra or not k.endswith(("running_mean", "running_var", "num_batches_tracked")):             # GeSSL: statistics of tasks, which do not cross processes
                torch.testing.assert_close(a[k], v, rtol=1e-9, atol=1e-11, msg=lambda m: f"{script.__name__} {extra} {k}: {m}")
                assert torch.equal(a[k], b[k]), f"{script.__name__} {extra}: processes drift apart in {k}"
    for (script, extra), a in zip(FLOAT32, norms0[len(NORMS):]):
        one, exact = (stepped(script, args_for(script, extra), 0, 1, dtype=dtype) for dtype in (torch.float32, torch.float64))
        for part in ("loss", "grad.", ""):                      # the gradient through TC2's QR has an error of 7e-5 by rounding alone
            x, y, z = (torch.cat([v.flatten().double() for k, v in found.items() if k.startswith(part)]) for found in (a, one, exact))
            assert (x - y).norm() <= max(1e-5 * y.norm(), 3 * (y - z).norm()), f"{script.__name__} {extra} {part}: {(x - y).norm() / y.norm()}"
    whole = common.training_views(common.load_data("fake"), [simclr_tc2.STRONG] * 2, 32, 20, 5, 0, 1, torch.device("cpu"), 0, 24, 27)
    for step, views in enumerate(whole):
        for v, view in enumerate(views):
            assert torch.allclose(torch.cat([views0[step][v], views1[step][v]]), view, atol=1e-6)


def test_three_processes_equal_one_on_the_joined_batch(tmp_path):
    mp.start_processes(worker, (3, str(tmp_path)), nprocs=3, start_method="forkserver")
    found = [torch.load(tmp_path / str(r)) for r in range(3)]
    for (script, extra), *results in zip(CASES_OF_3, *found):
        one = stepped(script, args_for(script, extra, 18), 0, 1, 18)
        for k, v in one.items():
            torch.testing.assert_close(results[0][k], v, rtol=1e-9, atol=1e-11, msg=lambda m: f"{script.__name__} {extra} {k}: {m}")
            assert all(torch.equal(results[0][k], r[k]) for r in results[1:]), f"{script.__name__} {extra}: processes drift apart in {k}"


class Crossings(TorchDispatchMode):
    """Notes every operation on tensors of the host and of another device, numbers aside: on a GPU it waits."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({t.device.type for t in tree_leaves((args, kwargs, out)) if torch.is_tensor(t) and (t.ndim or t.device.type != "cpu")}) > 1:
            self.found.append(str(func))
        return out


FEW = "--tasks 2 --target-steps 1 --inner-steps 1 --hypergrad"
ON_A_GPU = [(simclr_tc2, e.split()) for e in ("--baseline", "--baseline --micro-batch 5", "--tasks 2", "--tasks 2 --second-order --calibrate mix --query-loss nce")]
ON_A_GPU += [(byol_gessl, e.split()) for e in ("--baseline", *(f"{FEW} {kind}" for kind in ("fd", "neumann", "cg --outer-loss wasserstein")))]
ON_A_GPU += [(barlow_sparsehead, []), (barlow_sparsehead, ["--penalty", "prox"]), (mae_tc2, ["--baseline"]), (mae_tc2, ["--tasks", "2", "--masks", "2"])]


def steps_on_a_pretended_device(_):
    """A device without hardware: its tensors have shapes and no values, so that asking for a value, or computing with two devices' tensors, is an error."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretended")
    torch.set_num_threads(1)
    torch.autocast = lambda *a, **kw: contextlib.nullcontext()
    device = torch.device("pretended", 0)
    like = lambda t: torch.empty(t.shape, dtype=t.dtype, device=device)
    mae_tc2.to_device = lambda x, device: like(x)                               # of masks, from pinned memory: the one allowed crossing
    for script, extra in ON_A_GPU:
        args, crossings = args_for(script, extra), Crossings()
        nets = script.build_nets(args)[0]
        with FakeTensorMode(), crossings:
            for module in nets.modules():
                module._parameters.update({k: nn.Parameter(like(p), p.requires_grad) for k, p in module._parameters.items() if p is not None})
                module._buffers.update({k: like(b) for k, b in module._buffers.items() if b is not None})
            terms = script.train_step(nets, script.build_opts(nets, args), [torch.randn(16, 3, 8, 8, device=device) for _ in range(args.views)], args, 0.5)
            assert all(v.device == device and v.ndim == 0 for v in terms.values()), extra
            assert not crossings.found, (script, extra, crossings.found)
            with pytest.raises(DataDependentOutputException):
                terms.popitem()[1].item()
            like(torch.ones(3))[torch.zeros(2, dtype=torch.long)]
        assert crossings.found == ["aten.index.Tensor"]


def test_a_step_on_an_accelerator_waits_for_no_value_and_mixes_no_devices():
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend a device")
    mp.start_processes(steps_on_a_pretended_device, (), nprocs=1, start_method="forkserver")


@pytest.mark.parametrize("script", [simclr_tc2, mae_tc2])
def test_a_compiled_backbone_takes_the_same_steps(script, monkeypatch, tmp_path):
    """But for the code generator, which would take a minute: the graphs are captured and run by PyTorch's own kernels."""
    capture, done = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda net: capture(net, backend=lambda graph, _: done.append(len(graph.graph.nodes)) or graph))
    found = []
    for compiled in (False, True):
        args = args_for(script, ["--tasks", "2", "--out", str(tmp_path / str(compiled)), *["--compile"][:compiled]])
        torch.manual_seed(0)
        nets = script.build_nets(args)[0]
        opts = script.build_opts(nets, args)
        common.open_run(args, nets, opts, 0)
        for step in range(2):
            script.train_step(nets, opts, [torch.randn(16, 3, 8, 8, generator=common.rng(step, v)) for v in range(args.views)], args, step / 3)
        found.append(nets.state_dict())
    assert done and found[0].keys() == found[1].keys()
    for k, v in found[0].items():
        torch.testing.assert_close(found[1][k], v, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [2, 5, 31])
@pytest.mark.parametrize("extra", [[], ["--views", "3", "--tasks", "4"]])
def test_micro_batches_give_the_gradient_of_the_whole_batch(size, extra):
    whole, parts = (stepped(simclr_tc2, args_for(simclr_tc2, ["--baseline", *extra, *more]), 0, 1) for more in ([], ["--micro-batch", str(size)]))
    for k, v in whole.items():
        torch.testing.assert_close(parts[k], v, rtol=1e-9, atol=1e-12)


def test_micro_batches_move_running_statistics_once_per_part_and_hold_one_graph_at_a_time():
    args = simclr_tc2.parse_args([*QUICK, "--baseline", "--micro-batch", "8"])
    common.resolve(args, simclr_tc2.RECIPES, common.load_data("fake"), "simclr_tc2")
    args.views, args.tasks = 2, 1
    nets, rows_seen = simclr_tc2.build_nets(args)[0], []
    nets["backbone"].register_forward_hook(lambda net, inputs, out: rows_seen.append((len(out), out.requires_grad)))
    simclr_tc2.train_step(nets, simclr_tc2.build_opts(nets, args), [torch.randn(10, 3, 32, 32)] * 2, args, 0)
    assert rows_seen == [(n, grad) for grad in (False, True) for n in (8, 8, 4)]
    assert {m.num_batches_tracked.item() for m in nets["backbone"].modules() if isinstance(m, nn.BatchNorm2d)} == {3}


def test_evaluation_while_training_holds_no_more_graph_than_a_micro_batched_step():
    args = simclr_tc2.parse_args([*QUICK, "--baseline", "--micro-batch", "8"])
    common.resolve(args, simclr_tc2.RECIPES, common.load_data("fake"), "simclr_tc2")
    args.views, args.tasks, args.factors = 2, 1, 9
    class Token:
        pass
    nets, views = simclr_tc2.build_nets(args)[0], [torch.randn(64, 3, 32, 32) for _ in range(2)]
    opts, peaks = simclr_tc2.build_opts(nets, args), []
    for f in (lambda: simclr_tc2.train_step(nets, opts, views, args, 0), lambda: simclr_tc2.diagnose(nets, views, args)):
        held = [0, 0]
        def pack(x):
            held[0] += x.numel()
            held[1] = max(held)
            token = Token()
            token.x = x
            weakref.finalize(token, lambda n=x.numel(): held.__setitem__(0, held[0] - n))
            return token
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.x):
            f()
        peaks.append(held[1])
    assert peaks[1] <= 1.2 * peaks[0] and peaks[0] > 1e5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")])
@pytest.mark.parametrize("where", ["train_step", "monitor"])
def test_gpu_memory_that_runs_out_ends_in_a_sentence_that_names_flags(where, error, monkeypatch, capsys):
    def full(*_):
        raise error
    monkeypatch.setattr(simclr_tc2, where, full)
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main(QUICK + ["--out", "r"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "--batch-size" in err and str(error).split(". ")[0] in err
    error = RuntimeError("a mistake in a script")                               # which must not be swallowed
    with pytest.raises(RuntimeError, match="a mistake"):
        simclr_tc2.main(QUICK + ["--out", "r"])


def test_more_processes_than_gpus_end_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        common.setup_distributed()
    assert stopped.value.code == 2 and "process 1 of this machine has no GPU, there are 1" in capsys.readouterr().err


def test_two_processes_of_torchrun_end_at_ctrl_c_with_one_checkpoint_and_the_same_command_goes_on():
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"{ROOT}/simclr_tc2.py", *QUICK, "--baseline", "--epochs", "500", "--log-every", "1", "--out", "r"]
    run = program(*launch, start_new_session=True)
    while not (os.path.exists("r/log.jsonl") and rows("r")[-1].get("step", 0) >= 3):
        assert run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)                   # as a terminal does: to torchrun and to its processes
    out, _ = run.communicate(timeout=60)
    step = state("r")["step"]
    assert out.count("starts in r") == out.count("the same command goes on from there") == 1 and step == rows("r")[-1]["step"] >= 3
    out, err = (run := program(*launch, "--max-steps", str(step + 2))).communicate(timeout=120)
    assert run.returncode == 0 and out.count(f"goes on from step {step}") == 1, err
    assert rows("r")[0]["processes"] == 2 and state("r")["step"] == step + 2
    assert [r["step"] for r in rows("r")[1:] if "lr" in r] == list(range(1, step + 3))


# ---- data -----------------------------------------------------------------------------------------------------------
def test_shapes_are_deterministic_balanced_and_different_in_train_and_test():
    a, b = common.load_data("shapes"), common.load_data("shapes")
    assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test) and not torch.equal(a.train[:1000], a.test)
    assert a.train.dtype == torch.uint8 and a.train_labels.bincount().tolist() == [400] * 10 and a.test_labels.bincount().tolist() == [100] * 10


def test_classes_restricts_a_folder_and_its_hash_does_not_depend_on_the_order(capsys):
    folder = image_folder("d", classes="abcd")
    for name, text in (("list", "d\n\n b \n"), ("same", "b\nd")):
        with open(name, "w") as file:
            file.write(text)
    data = common.load_data(folder, only="list")
    assert data.classes == ["b", "d"] and data.train_labels.tolist() == [0] * 8 + [1] * 8 == data.test_labels.tolist() and len(data.train) == len(data.files) == 16
    assert all(os.path.basename(os.path.dirname(f)) == data.classes[y] for f, y in zip(data.files, data.train_labels))
    assert common.class_hash(["d", "b"]) == common.class_hash(data.classes) == "2, sha256 " + hashlib.sha256(b"b\nd").hexdigest()[:12]
    simclr_tc2.main(["--data", folder, "--classes", "same", "--arch", "resnet_tiny", "--batch-size", "8", "--epochs", "1", "--max-steps", "1", "--baseline", "--out", "r"])
    assert rows("r")[0]["images"] == 16 and rows("r")[0]["class_list"] == common.class_hash(data.classes) and common.class_hash(data.classes) in capsys.readouterr().out
    eval_linear.main(["r", "--protocol", "knn", "--k", "1"])
    with open("r/eval.json") as file:
        assert json.load(file)["results"][0]["train_images"] == 16              # the evaluation keeps to the run's classes


def test_every_monitor_subset_of_a_class_sorted_folder_has_all_classes(monkeypatch):
    data = common.Data("x", torch.zeros(25000, 3, 8, 8, dtype=torch.uint8), torch.arange(25000) // 2500, torch.zeros(12000, 3, 8, 8, dtype=torch.uint8),
                       torch.arange(12000) // 1200, 8)
    seen = []
    monkeypatch.setattr(common, "knn_accuracy", lambda bank, y, query, query_y, **kw: seen.extend([y, query_y]) or 0.0)
    args = simclr_tc2.parse_args([])
    args.image_size = 8
    common.monitor(None, data, args, simclr_tc2.WEAK, torch.device("cpu"))
    assert [len(y) for y in seen[:2]] == [20000, 10000] and all(y.bincount(minlength=10).min() > 800 for y in seen)


def test_order_and_augmentation_are_functions_of_seed_epoch_step_and_view():
    def views(images, recipe, seed, start=0, stop=6):
        data = common.Data("x", images, None, [], None, 8)
        return list(common.training_views(data, [recipe] * 2, 8, 4, seed, 0, 1, torch.device("cpu"), 0, start, stop))
    as_is = dict(simclr_tc2.WEAK, crop=(1, 1), ratio=(1, 1), flip=0, jitter_p=0, gray_p=0, mean=(0.0,) * 3, std=(1.0,) * 3)
    numbered = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 3, 8, 8)
    order = lambda seed: torch.stack([(v[0][:, 0, 0, 0] * 255).round().int() for v in views(numbered, as_is, seed)]).view(2, 12).tolist()
    first, second = order(1)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second and order(1) == [first, second] and order(2)[0] != first
    alike = torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8, generator=common.rng(0)).expand(12, 3, 8, 8)
    drawn = [v for seed in (1, 2) for step in views(alike, simclr_tc2.WEAK, seed, 0, 2) for v in step]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(map(torch.equal, views(alike, simclr_tc2.WEAK, 1, 1, 2)[0], drawn[2:4]))


@pytest.mark.parametrize("size", [(20, 24), (120, 150)])
def test_folder_of_classes_trains_and_views_do_not_depend_on_workers_or_processes(size):
    data = common.load_data(image_folder("d", size=size, n=6))
    assert torch.is_tensor(data.train) == (size[0] < 97) and data.train_labels.tolist() == [0] * 6 + [1] * 6 and len(data.test) == 12
    views = lambda rank, world, workers: list(common.training_views(data, [simclr_tc2.STRONG] * 2, 20, 4, 1, rank, world, torch.device("cpu"), workers, 2, 5))
    one, two = views(0, 1, 0), [views(r, 2, 2) for r in (0, 1)]
    assert len(one) == 3 and one[0][0].shape == (4, 3, 20, 20) and not torch.equal(one[0][0], one[0][1])
    for step in range(3):
        for v in range(2):
            torch.testing.assert_close(torch.cat([two[0][step][v], two[1][step][v]]), one[step][v], rtol=0, atol=1e-5)


def test_folder_without_classes_trains_with_the_monitor_off(capsys):
    image_folder("d")
    simclr_tc2.main(["--data", "d/train", "--arch", "resnet_tiny", "--batch-size", "8", "--epochs", "1", "--out", "r"])
    assert "no labels" in capsys.readouterr().out and not any("knn" in k for r in rows("r") for k in r)


def test_large_photographs_run_end_to_end():
    image_folder("d", size=(110, 140), n=5)
    simclr_tc2.main(["--data", "d", "--arch", "resnet_tiny", "--image-size", "64", "--batch-size", "8", "--epochs", "1", "--out", "r", "--workers", "2"])
    assert rows("r")[0]["settings"]["image_size"] == 64 and "knn5" in rows("r")[-1]


@pytest.mark.parametrize("size", [(20, 24), (120, 150)])
def test_an_undecodable_image_is_named_and_left_out_and_too_many_stop_the_run(size, capsys):
    image_folder("d", size=size, n=6)
    argv = ["--data", "d", "--arch", "resnet_tiny", "--image-size", "20", "--batch-size", "8", "--epochs", "3", "--workers", "0", "--baseline", "--out"]
    open("d/train/a/0.jpg", "wb").write(b"not an image")
    simclr_tc2.main(argv + ["r"])
    assert capsys.readouterr().err.count("d/train/a/0.jpg cannot be decoded") >= 1
    open("d/train/a/2.jpg", "wb").write(b"")
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main(argv + ["q"])
    assert stopped.value.code == 2 and "over 1% of 12 images, cannot be decoded" in capsys.readouterr().err


def test_a_strip_of_one_pixel_by_thousands_is_cut_before_it_is_resized():
    row = torch.arange(9001, dtype=torch.float32).div(40).byte().expand(3, 1, 9001)
    square = common.fit(row, 32, 37)
    assert square.shape == (3, 32, 32) and square.unique().tolist() == [112]                 # the middle pixel and its neighbours
    assert common.fit(row.mT, 32).shape == (3, 32, 32)
    image = torch.randint(0, 255, (3, 40, 110), dtype=torch.uint8, generator=common.rng(0))
    whole = TF.center_crop(TF.resize(image, [36], antialias=True), [32, 32])
    assert torch.equal(common.fit(image, 32, 36), whole)                                    # ordinary images as before
    write_png(row, "strip.png")
    files = common.Files("d", ["strip.png"], 24, None, 0, 2, simclr_tc2.STRONG)
    assert files[0, 0][0].shape == (2, 3, 24, 24)


def test_broken_and_deep_files_of_every_decoder(monkeypatch):
    """A PNG with one wrong bit kills torchvision's decoder, and the process: Pillow looks first."""
    from PIL import Image
    image = torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8, generator=common.rng(0))
    for i in range(6):
        write_png(image, "broken.png")
        with open("broken.png", "r+b") as file:
            file.seek(100 + 300 * i)
            byte = file.read(1)[0]
            file.seek(100 + 300 * i)
            file.write(bytes([byte ^ 4]))
        with pytest.raises(OSError):
            common.decode("broken.png")
    Image.fromarray(np.full((8, 9), 40000, dtype=np.uint16)).save("deep.tif")
    Image.fromarray(np.full((8, 9), 0.5, dtype=np.float32)).save("float.tif")
    assert common.decode("deep.tif").unique().tolist() == [156] and common.decode("deep.tif").shape == (3, 8, 9)
    with pytest.raises(OSError, match="bits"):
        common.decode("float.tif")
    turned = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif)
    assert common.decode_slowly("turned.jpg").shape == common.decode("turned.jpg").shape == (3, 40, 20)
    turned.save("bomb.bmp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)                          # what Pillow takes for an attack is no OSError of its own
    turned.save("bomb.png")
    for name in ("bomb.bmp", "bomb.png"):
        with pytest.raises(OSError):
            common.decode(name)


def test_one_bad_file_in_a_hundred_is_left_out_and_no_more(capsys):
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), "good.png")
    with open("bad0.png", "wb") as file:
        file.write(b"no")
    for i in range(1, 4):
        shutil.copy("bad0.png", f"bad{i}.png")
    names = lambda bad: [f"bad{i}.png" for i in range(bad)] + ["good.png"] * (300 - bad)
    assert len(common.decode_all("d", names(3), 8, 0)[0]) == 297
    with pytest.raises(SystemExit):
        common.decode_all("d", names(4), 8, 0)
    assert "over 1% of 300 images" in capsys.readouterr().err


def test_crops_of_a_file_change_from_epoch_to_epoch_and_views_have_their_own_recipes():
    for size in (20, 128):
        write_png(torch.randint(0, 255, (3, size, size), dtype=torch.uint8, generator=common.rng(0)), "x.png")
        source = ["x.png"] * 2 if size == 128 else torch.stack([common.decode("x.png")] * 2)
        recipes = [dict(simclr_tc2.WEAK, jitter_p=0, gray_p=0, mean=(0,) * 3, std=(1,) * 3, solarize_p=p) for p in (0.0, 1.0)]
        data, device = common.Data("d", source, None, [], None, size), torch.device("cpu")
        steps = list(common.training_views(data, recipes, size, 2, 0, 0, 1, device, 0, 0, 3))
        again = list(common.training_views(data, recipes, size, 2, 0, 0, 1, device, 0, 1, 3))
        for plain, solarized in steps:
            assert plain.amax() > 0.6 and solarized.amax() <= 0.5
        first = [views[0].flatten(1) for views in steps]
        assert min((a[:, None] - b[None]).abs().mean(2).min() for a, b in zip(first, first[1:])) > 0.01
        assert all(torch.equal(a, b) for one, other in zip(steps[1:], again) for a, b in zip(one, other))


def test_exif_turn_gray_and_misnamed_files_are_read():
    from PIL import Image
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save("turned.jpg", exif=exif)
    Image.new("L", (8, 9), 77).save("gray.png")
    Image.new("CMYK", (8, 9)).save("cmyk.jpg")
    Image.new("RGB", (8, 9), (1, 2, 3)).save("bitmap.bmp")
    os.rename("bitmap.bmp", "bitmap.jpg")
    Image.fromarray(np.arange(72, dtype=np.uint16).reshape(8, 9) * 900).save("deep.png")
    Image.new("RGB", (8, 9), (200, 0, 0)).save("moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 9), (0, 0, 200))], duration=9)
    os.rename("moving.gif", "moving.jpg")
    deep, moving = common.decode("deep.png"), common.decode("moving.jpg")
    assert deep.dtype == moving.dtype == torch.uint8 and deep.shape == (3, 8, 9) and moving.shape == (3, 9, 8)
    assert (deep[0].flatten().int() - torch.arange(72) * 900 // 257).abs().max() <= 1 and (moving[:, 0, 0] - torch.tensor([200, 0, 0])).abs().max() <= 2
    assert common.decode("turned.jpg").shape == (3, 40, 20)
    assert common.decode("gray.png").shape == common.decode("cmyk.jpg").shape == (3, 9, 8) and common.decode("gray.png").unique().tolist() == [77]
    assert common.decode("bitmap.jpg")[:, 0, 0].tolist() == [1, 2, 3]


# ---- bad input: one sentence that names flag and value, status 2, nothing written -----------------------------------
BAD = [(["--epochs", "0"], "--epochs", "'0'"), (["--lr", "nan"], "--lr", "'nan'"), (["--lr", "-1"], "--lr", "'-1'"), (["--seed", "x"], "--seed", "'x'"),
       (["--arch", "resnet19"], "--arch", "'resnet19'"), (["--batch-size", "30"], "--batch-size", "30"), (["--batch-size", "4"], "--batch-size", "4"),
       (["--batch-size", "8000"], "--batch-size", "8000"), (["--views", "3"], "--views", "3"), (["--views", "1"], "--views", "'1'"),
       (["--tasks", "3"], "--tasks", "3"), (["--temperature", "0"], "--temperature", "'0'"), (["--query-loss", "l2"], "--query-loss", "'l2'"),
       (["--data", "missing"], "--data", "missing"), (["--data", "empty"], "--data", "empty"), (["--data", "only"], "--data", "val/ nor test/"),
       (["--data", "onlytest"], "--data", "no train/"), (["--data", "classes"], "--data", "only one of them has c"), (["--data", "hollow"], "--data", "hollow"),
       (["--data", "broken"], "--data", "broken"), (["--inner-lr", "inf"], "--inner-lr", "'inf'"), (["--unknown", "1"], "--unknown", "1"),
       (["--batch", "64"], "--batch", "64"), (["--image-size", "4"], "--image-size", "'4'"), (["--workers", "-1"], "--workers", "'-1'"),
       (["--second-order", "--compile"], "--second-order", "--compile")]


@pytest.fixture(scope="module")
def bad_folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    os.makedirs(path / "empty")
    image_folder(path / "only", ["train"])
    image_folder(path / "onlytest", ["test"])
    image_folder(path / "classes")
    image_folder(path / "classes2", classes="c")
    os.rename(path / "classes2/test/c", path / "classes/test/c")
    image_folder(path / "hollow")
    os.makedirs(path / "hollow/train/c")
    os.makedirs(path / "hollow/test/c")
    os.makedirs(path / "broken")
    (path / "broken/x.jpg").write_bytes(b"no")
    (path / "words").write_text("a\nnonsense\n")
    return path


BAD_OF = [(simclr_tc2, *case) for case in BAD] + [
    (simclr_tc2, flags.split(), flag, value) for flags, flag, value in (
        ("--micro-batch 8", "--micro-batch", "8"), (f"--seed 1{400 * '0'}", "--seed", "whole number"), ("--baseline --micro-batch 1", "--micro-batch", "'1'"), ("--baseline --micro-batch 8 --sync-bn", "--micro-batch", "--sync-bn"), ("--classes missing --data classes", "--classes", "missing"),
        ("--classes words --data fake", "--classes", "fake"), ("--classes words --data classes", "--classes", "nonsense"), ("--classes words --data broken", "--classes", "broken"))] + [
    (byol_gessl, flags.split(), flag, value) for flags, flag, value in (
        ("--tasks 0", "--tasks", "'0'"), ("--inner-steps 0", "--inner-steps", "'0'"), ("--batch-size 32 --tasks 200", "--batch-size", "6400"), ("--target-steps -1", "--target-steps", "'-1'"),
        ("--inner-lr 0", "--inner-lr", "'0'"), ("--hypergrad full", "--hypergrad", "'full'"), ("--outer-loss l1", "--outer-loss", "'l1'"), ("--ssl-weight -1", "--ssl-weight", "'-1'"),
        ("--ema-decay 1.1", "--ema-decay", "'1.1'"), ("--baseline --batch-size 9000", "--batch-size", "9000"), ("--hypergrad exact --compile", "--hypergrad", "--compile"),
        ("--sync-bn", "--sync-bn", "--baseline"), ("--data missing", "--data", "missing"), ("--arch vit", "--arch", "'vit'"), ("--views 2", "--views", "2"))] + [
    (barlow_sparsehead, flags.split(), flag, value) for flags, flag, value in (
        ("--penalty l1", "--penalty", "'l1'"), ("--head conv", "--head", "'conv'"), ("--lambda-sparse -1", "--lambda-sparse", "'-1'"), ("--dim 1", "--dim", "'1'"),
        ("--hidden 0", "--hidden", "'0'"), ("--lambda-offdiag x", "--lambda-offdiag", "'x'"), ("--baseline --lambda-sparse 1", "--lambda-sparse", "1.0"),
        ("--batch-size 9000", "--batch-size", "9000"), ("--data missing", "--data", "missing"))] + [
    (mae_tc2, flags.split(), flag, value) for flags, flag, value in (
        ("--patch-size 5", "--patch-size", "5"), ("--mask-ratio 0.99", "--mask-ratio", "'0.99'"), ("--patch-size 32", "--mask-ratio", "0.75"), ("--masks 1", "--masks", "1"),
        ("--tasks 3", "--batch-size", "16"), ("--arch resnet18", "--arch", "'resnet18'"), ("--calibrate all", "--calibrate", "'all'"),
        ("--second-order --compile", "--second-order", "--compile"), ("--sync-bn", "--sync-bn", "BatchNorm"), ("--data missing", "--data", "missing"))]


@pytest.mark.parametrize("script, argv, flag, value", BAD_OF, ids=lambda x: "_".join(x) if isinstance(x, list) else getattr(x, "__name__", ""))
def test_bad_input_gives_one_sentence_status_2_and_writes_nothing(script, argv, flag, value, bad_folders, monkeypatch, capsys):
    monkeypatch.chdir(bad_folders)
    before = sorted(glob.glob("**", recursive=True))
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and flag in err and value in err and "Traceback" not in err
    assert sorted(glob.glob("**", recursive=True)) == before


@pytest.mark.parametrize("argv, word", [(["nowhere"], "nowhere"), (["r", "--protocol", "svm"], "'svm'"), (["r"], "has no arch"), (["r", "--probe-epochs", "0"], "'0'")])
def test_bad_input_of_the_evaluation(argv, word, capsys):
    os.makedirs("r")
    torch.save({}, "r/backbone.pt")
    with pytest.raises(SystemExit) as stopped:
        eval_linear.main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and word in err and os.listdir("r") == ["backbone.pt"]


@pytest.mark.parametrize("script, flags", [(simclr_tc2, "--baseline"), (simclr_tc2, "--tasks 2"), (byol_gessl, "--baseline"), (barlow_sparsehead, "")])
def test_one_image_per_process_or_task_has_no_statistics(script, flags, capsys):
    args, data = script.parse_args([*flags.split(), "--batch-size", "2"]), types.SimpleNamespace(train=range(99))
    common.resolve(args, script.RECIPES, common.load_data("shapes"), "x")
    with pytest.raises(SystemExit):
        script.check_args(args, data, 2)
    assert "--batch-size 2: " in capsys.readouterr().err


def test_every_flag_of_every_script_refuses_nonsense_in_one_sentence(capsys):
    tried = 0
    for module in (*ENHANCED, eval_linear):
        first = ["r"] if module is eval_linear else []
        for key, default in vars(module.parse_args(first)).items():
            flag = "--" + key.replace("_", "-")
            if key in ("run", "data", "out", "classes", "train_data", "test_data", "domains", "overlay", "label_list"):          # names of files: below
                continue
            switch = isinstance(default, bool) or key == "norm_pixels"
            negated = [f"--no{flag[1:]}=3"] if key in ("bf16", "norm_pixels") else []
            for value in [f"{flag}=3", f"{flag}s", *negated] if switch else [f"{flag}={x}" for x in ("nonsense", "nan", "-1e9", "")] + [flag]:
                with pytest.raises(SystemExit) as stopped:
                    module.main([*first, value])
                err = capsys.readouterr().err
                assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and flag.removeprefix("--") in err, (module.__name__, value, err)
                tried += 1
    assert tried > 400 and os.listdir(".") == []


def hopeless_folders():
    """{name: function that makes what --data finds there}, none of which can be trained on with batches of 4."""
    def labelled(spoil):
        return lambda path: (image_folder(path), spoil(path))
    def write(content, *names):
        return lambda path: [(os.makedirs(os.path.dirname(f"{path}/{n}"), exist_ok=True), open(f"{path}/{n}", "wb").write(content)) for n in names]
    def every(split, content):
        return labelled(lambda path: [open(f, "wb").write(content(f)) for f in glob.glob(f"{path}/{split}/*/*")])
    whole = lambda f: open(f, "rb").read()
    spoiled = {"zero-byte": lambda f: b"", "text": lambda f: b"not an image", "truncated": lambda f: whole(f)[:30], "noise": lambda f: bytes(range(256)) * 4, "html": lambda f: b"<html></html>"}
    found = {f"{split}-{name}": every(split, content) for split in ("train", "test") for name, content in spoiled.items()}
    found |= {f"plain-{name}": write(content, *(f"{i}.jpg" for i in range(5))) for name, content in
              (("zero-byte", b""), ("text", b"no"), ("gif", b"GIF89a"), ("jpeg-head", b"\xff\xd8\xff\xe0"), ("png-head", b"\x89PNG\r\n\x1a\n"))}
    found |= {"empty": os.makedirs, "notes": write(b"hello", "a.txt", "b/c.md"), "hidden": write(b"", ".x/.y"), "folders": lambda p: os.makedirs(f"{p}/a/b/c"),
              "train-empty": labelled(lambda p: shutil.rmtree(f"{p}/train/a") or shutil.rmtree(f"{p}/train/b")), "test-empty": labelled(lambda p: shutil.rmtree(f"{p}/test/a") or shutil.rmtree(f"{p}/test/b")),
              "no-test": labelled(lambda p: shutil.rmtree(f"{p}/test")), "no-train": labelled(lambda p: shutil.rmtree(f"{p}/train")), "hollow-class": labelled(lambda p: os.makedirs(f"{p}/train/c")),
              "other-class": labelled(lambda p: os.rename(f"{p}/test/a", f"{p}/test/z")), "missing-class": labelled(lambda p: shutil.rmtree(f"{p}/test/a")),
              "no-class-folders": lambda p: (image_folder(p), [os.rename(f, f"{p}/train/{i}.png") for i, f in enumerate(glob.glob(f"{p}/train/*/*"))], shutil.rmtree(f"{p}/train/a"), shutil.rmtree(f"{p}/train/b")),
              "train-is-a-file": labelled(lambda p: (shutil.rmtree(f"{p}/train"), open(f"{p}/train", "w").close())), "dangling-links": lambda p: (os.makedirs(p), [os.symlink("/nowhere/x", f"{p}/{i}.jpg") for i in range(5)]),
              "folders-named-like-images": lambda p: [os.makedirs(f"{p}/{i}.jpg") for i in range(5)], "too-few": lambda p: image_folder(p, n=1), "one-bad-in-eight": labelled(lambda p: open(f"{p}/train/a/0.jpg", "wb").close() or open(f"{p}/train/b/0.jpg", "wb").close())}
    return found


def test_thirty_hopeless_data_folders_end_in_one_sentence_that_names_them(capsys):
    folders = hopeless_folders()
    assert len(folders) >= 30
    for name, make in folders.items():
        make(name)
        with pytest.raises(SystemExit) as stopped:
            simclr_tc2.main(["--data", name, "--arch", "resnet_tiny", "--batch-size", "4", "--baseline", "--workers", "0", "--epochs", "1", "--out", "r"])
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("left out: ")]
        assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), (name, errors)
        assert name in errors[0] or name == "too-few" and "2 training images" in errors[0], (name, errors)
        assert not os.path.exists("r"), name


# ---- promises about the sources -------------------------------------------------------------------------------------
def source(name):
    with open(f"{ROOT}/{name}") as file:
        return file.read()


@pytest.mark.parametrize("script", SCRIPTS + ["eval_linear.py"])
def test_every_flag_is_read(script):
    module = __import__(script[:-3])
    text = source(script) + source("common.py")
    unread = [k for k in vars(module.parse_args(["r"] if script == "eval_linear.py" else [])) if not re.search(rf"\bargs\.{k}\b(?!\s*=[^=])", text)]
    assert not unread


def test_shared_fences_are_identical_in_all_scripts():
    blocks = {}
    for script in SCRIPTS:
        text = source(script)
        found = re.findall(r"^ *# -- shared: (\w+) --\n(.*?)^ *# -- end shared --$", text, re.S | re.M)
        assert len(found) == text.count("# -- end shared --") == text.count("# -- shared: ") and {"main"} <= {name for name, _ in found}
        for name, block in found:
            assert blocks.setdefault(name, block) == block, f"block {name} of {script} differs"
    assert {"main", "tc2"} <= blocks.keys()


def test_import_has_no_side_effect(capfd):
    code = (f"import sys, os, torch; sys.path.insert(0, {ROOT!r}); before = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
            f"for name in {[s[:-3] for s in SCRIPTS + ['common.py', 'eval_linear.py']]!r}:\n"
            "    __import__(name)\n    assert torch.equal(before[0], torch.random.get_rng_state()), name\n"
            "    assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype()), name\n"
            "    assert not os.listdir() and 'matplotlib' not in sys.modules, name")
    assert subprocess.run([sys.executable, "-B", "-c", code]).returncode == 0 and capfd.readouterr() == ("", "")


def equation_table():
    return re.findall(r"^\| \[((?:SimCLR|TC2|BYOL|GeSSL|Barlow Twins|SparseHead|MAE) [^\]]+)\] \| `(\w+)` \| \[(\w+\.py):(\d+)\]\(\3#L\4\)", source("README.md"), re.M)


def test_readme_table_points_at_the_tagged_definition():
    assert len(equation_table()) >= 10
    for tag, name, script, line in equation_table():
        lines = source(script).splitlines()
        assert re.match(rf"(def|class) {name}\b", lines[int(line) - 1]), f"{name} is not at {script}:{line}"
        member = getattr(__import__(script[:-3]), name)
        assert f"[{tag}" in inspect.getsource(member), f"{name} has no tag [{tag}]"


def test_every_tagged_definition_stands_in_the_readme_table():
    for script in SCRIPTS + ["eval_linear.py"]:
        module, named = __import__(script[:-3]), {(name, s) for _, name, s, _ in equation_table()}
        for name, member in vars(module).items():
            if inspect.isfunction(member) and member.__module__ == module.__name__ and re.search(r"\[(TC2|BYOL|GeSSL|Barlow Twins|SparseHead|MAE) (Eq|Alg|Fig)", inspect.getsource(member)):
                assert (name, script) in named, f"{script}: {name}"


def test_readme_commands_parse_and_flags_exist():
    for script, rest in re.findall(r"^(?:python|torchrun.*?) (\w+\.py)(.*?)(?:\s+#.*)?$", source("README.md"), re.M):
        if os.path.exists(f"{ROOT}/{script}"):
            assert __import__(script[:-3]).parse_args(rest.split())


def test_documented_torchrun_commands_are_accepted_with_their_number_of_processes():
    found = [line for name in ("README.md", *SCRIPTS) for line in source(name).replace("\\\n", " ").splitlines() if re.match(r" *(srun )?torchrun ", line)]
    assert len(found) >= 7
    for line in found:
        machines = 1 if "--nnodes" not in line else 2                                           # "$SLURM_NNODES" of the script is 2
        script, flags = re.search(r"(\w+)\.py((?: --[\w-]+(?: [^-\s]\S*)?)*)", line).groups()
        module = __import__(script)
        args, data = module.parse_args(flags.split()), common.Data("x", range(10 ** 6), None, [], None, 500)
        common.resolve(args, module.RECIPES, data, script)
        assert module.check_args(args, data, machines * int(re.search(r"--nproc-per-node (\d+)", line)[1])) >= 256, line


def results_rows(title):
    """(row, cells) of the table in results/README.md under the heading that begins with `title`."""
    section = source("results/README.md").split(f"\n## {title}")[1].split("\n## ")[0]
    return [(row, [float(c) for c in cells.split("|")]) for row, cells in re.findall(r"^\|[^|]+\| `(\w+)` \|([^\n]+)\|$", section, re.M)]


def logged(folder, row, data=None):
    """(settings, lines of training steps, last evaluation line, {(protocol, metric): value on `data`, if given}) of a kept run."""
    log = rows(f"{ROOT}/results/{folder}/{row}")
    with open(f"{ROOT}/results/{folder}/{row}/eval.json") as file:
        found = {(r["protocol"], r["metric"]): r["value"] for r in json.load(file)["results"] if data is None or r["data"] == data}
    return log[0]["settings"], [r for r in log if "lr" in r], [r for r in log if "rank_h" in r][-1], found


def accuracies(found):
    return [round(found[key], 2) for key in (("linear", "top1"), ("knn", "k5_euclidean"), ("knn", "k200_cosine"))]


def passes_per_image(settings):
    """Forward and backward passes of one view; one without gradient counts a third."""
    if settings.get("script") == "byol_gessl":
        K, further = settings["inner_steps"], settings["target_steps"]
        inner = 1 if settings["baseline"] else K + further + (1 / 3 if settings["lookahead"] else 1 / 3 + 1 + K * (settings["hypergrad"] == "fd"))
        return 2 * (inner + 1 / 3)
    if settings.get("script") == "mae_tc2":                                     # the decoder counts a half: stage 1 passes through it alone
        m = settings["masks"]
        return m if settings["baseline"] else m / 3 + m / 2 + m / 2 * (settings["inner_lr"] > 0) + m / 2 * (settings["calibrate"] != "none")
    return settings["views"] if settings["baseline"] else 4 / 3 + 2 * (settings["inner_lr"] > 0) + 4


def protocol_rows():
    """[((data, protocol, metric), {run: number as printed})] of the table of protocols in results/README.md."""
    section = source("results/README.md").split("\n## Every protocol")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    head, rest = lines[0], lines[1:]
    assert len(rest) >= 30
    return [(tuple(re.fullmatch(r"`(.*?)` `(.*?)` `(.*?)`", cells[0]).groups()), {r.strip("`"): c for r, c in zip(head[1:], cells[1:]) if c}) for cells in rest]


def protocol_value(run, key):
    """What eval.json says, in the form of the table: 12.34, or 12.34 ± 0.56."""
    with open(f"{ROOT}/results/cifar10_cpu_protocols/{run}/eval.json") as file:
        found = {(r["data"], r["protocol"], r["metric"]): r["value"] for r in json.load(file)["results"]}
    data, protocol, metric = key
    half = found.get((data, protocol, metric + "_pm"))
    return eval_linear.as_text(found[key]) + (f" ± {half:.2f}" if half is not None else "")


def test_the_script_of_the_tables_prints_the_lines_of_the_results_page():
    out = subprocess.run([sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, '{ROOT}/results'); import tables\n"
                          "for folder in tables.METHODS:\n    for run in tables.glob.glob(f'{tables.HERE}/{folder}/*/'): print(f'`{tables.os.path.basename(run[:-1])}` | ' + ' | '.join(tables.row(run)[2]))\n"
                          "print('\\n'.join(tables.protocol_lines()))\nfor lines in tables.seed_tables().values(): print('\\n'.join(lines))"], capture_output=True, text=True, check=True).stdout
    page = source("results/README.md")
    assert out.count("\n") > 60 and not [line for line in out.splitlines() if line not in page]


def test_tables_over_seeds_hold_the_means_and_spreads_of_the_logs():
    section, checked = source("results/README.md").split("\n## Over seeds")[1].split("\n## ")[0], 0
    runs, own, mean = {}, {}, lambda c: sum(c) / len(c)
    for path in sorted(glob.glob(f"{ROOT}/results/cifar10_seeds/seed*/*/eval.json")):
        seed, row = path.split("/")[-3:-1]
        settings, steps, _, found = logged(f"cifar10_seeds/{seed}", row, *["runs/unseen"] * row.startswith("seen"))
        assert settings["seed"] == int(seed[4:]) and settings["out"] == f"runs/{seed}/{row}" and settings["data"] == f"runs/{'seen' if row.startswith('seen') else 'subset'}"
        if row.startswith("seen"):
            own.setdefault(row, {})[seed] = accuracies(logged(f"cifar10_seeds/{seed}", row, "runs/seen")[3]), 0
        per_step = settings["tasks"] if settings["script"] == "byol_gessl" and not settings["baseline"] else 1
        runs.setdefault(row, {})[seed] = accuracies(found), steps[-1]["step"] * settings["batch_size"] * per_step / 1e3, float(np.median([r["images_per_s"] for r in steps]))
    for row, n, images, rest in re.findall(r"^\| `([\w.]+)` \| (\d) \| (\d+) \|([^\n]+)\|$", section, re.M):
        (values, seen, rates), cells = zip(*runs[row].values()), rest.split("|")
        assert len(values) == int(n) and {round(s) for s in seen} == {int(images)} and abs(float(cells[1]) - 1e3 * seen[0] / max(rates) / 60) <= 0.0501, row
        for cell, column in zip(cells[2:5], zip(*values)):
            middle, _, spread = cell.partition("±")
            variance = sum((v - mean(column)) ** 2 for v in column) / max(1, len(column) - 1)
            assert abs(float(middle) - mean(column)) <= 0.0501 and (not spread or abs(float(spread) - variance ** 0.5) <= 0.0501), row
        checked += 1
    for row, n, *cells in re.findall(r"^\| `(seen\w+)` \| (\d) \| ([\d.]+) [^|]+\| ([\d.]+) [^|]+\| ([\d.]+) [^|]+\|$", section, re.M):
        assert all(abs(float(cell) - mean(column)) <= 0.0501 for cell, column in zip(cells, zip(*(found for found, _ in own[row].values())))), row
    assert checked == len(runs) >= 45 and len(own) == 3
    pairs = [(own if title.startswith("Seen") else runs, *pair) for title in section.split("\n### ")
             for pair in re.findall(r"^\| `([\w.]+)` - `(\w+)` \| (\d) \| ([^|]+)\|([^|]+)\|([^|]+)\|$", title, re.M)]
    for table, a, b, n, *cells in pairs:
        both = sorted(set(table[a]) & set(table[b]))
        for i, cell in enumerate(cells):
            d, (middle, _, half) = [table[a][s][0][i] - table[b][s][0][i] for s in both], cell.partition("±")
            error = (sum((x - mean(d)) ** 2 for x in d) / max(1, len(d) - 1) / len(d)) ** 0.5
            assert len(both) == int(n) and abs(float(middle) - mean(d)) <= 0.0501 and abs(float(half or 0) - {1: 0, 2: 12.706, 3: 4.303}[len(d)] * error) <= 0.06, (a, b)
        checked += 1
    assert checked >= len(runs) + 15


@pytest.mark.parametrize("script, folder", [("cifar10_seeds", "cifar10_seeds/seed1"), ("cifar10_cpu", "cifar10_cpu"), ("cifar10_cpu_gessl", "cifar10_cpu_gessl"),
                                            ("cifar10_cpu_sparsehead", "cifar10_cpu_sparsehead"), ("cifar10_cpu_mae", "cifar10_cpu_mae")])
def test_the_published_scripts_run_the_commands_of_the_published_logs(script, folder):
    os.makedirs("bin")
    for folder_of, n in (("train/airplane", 2002), ("train/truck", 1002), *((f"{split}/{c}", 1) for split in ("train", "test") for c in CIFAR10)):
        os.makedirs(f".data/cifar10/{folder_of}", exist_ok=True)
        for i in range(n):
            open(f".data/cifar10/{folder_of}/{i:04d}.jpg", "w").close()
    with open("bin/python", "w") as file:
        file.write('#!/bin/sh\necho "$@"\n')
    os.chmod("bin/python", 0o755)
    out = subprocess.run(["bash", f"{ROOT}/results/{script}.sh", ".data/cifar10", "runs", *(["1"] if "seed" in script else [])], capture_output=True, text=True, check=True,
                         env={**os.environ, "PATH": f"{os.getcwd()}/bin:{os.environ['PATH']}"}).stdout.splitlines()
    kept = glob.glob(f"{ROOT}/results/{folder}/*/log.jsonl")
    assert len(kept) >= 5
    for log in kept:
        argv = " ".join(rows(os.path.dirname(log))[0]["argv"])
        assert argv in out or argv in [line.replace(" --lambda-sparse 10", "") for line in out], log           # the default of `prox` when its row was made
    if script == "cifar10_seeds":
        made = {split: {c: sorted(os.listdir(f"runs/{split}/{c}")) for c in os.listdir(f"runs/{split}")} for split in ("subset/train", "subset/test", "seen/train", "unseen/test")}
        names = [f"{i:04d}.jpg" for i in range(2000)]
        assert made["subset/train"].keys() == made["subset/test"].keys() == set(CIFAR10) == made["seen/train"].keys() | made["unseen/test"].keys()
        assert made["subset/train"]["truck"] == names[:1000] and made["seen/train"]["airplane"] == names and made["unseen/test"]["truck"] == names[:1]
        assert len(made["seen/train"]) == len(made["unseen/test"]) == 5 and any("/seen_tc2 --data runs/unseen " in line for line in out)


def test_accuracies_on_the_first_screen_are_those_of_the_results_page():
    screen, page = source("README.md").split("## Start")[0], source("results/README.md")
    quoted, there = re.findall(r"\d+\.\d", screen), {f"{float(x):.1f}" for x in re.findall(r"\d+\.\d+", page)}
    assert len(quoted) >= 8 and not set(quoted) - there


def test_results_tables_hold_what_the_logs_say():
    tables = {"SimCLR": ("cifar10_cpu", 6), "BYOL": ("cifar10_cpu_gessl", 8)}
    for title, (folder, least) in tables.items():
        table = results_rows(title)
        assert len(table) >= least
        for row, (images, passes, *accuracy, std, rank) in table:
            settings, steps, last, found = logged(folder, row)
            seen = steps[-1]["step"] * settings["batch_size"] / 1e3 * (settings["tasks"] if title == "BYOL" and not settings["baseline"] else 1)
            assert accuracy == accuracies(found) and images == round(seen) and passes == round(seen * passes_per_image(settings)), row
            assert std == round(steps[-1]["std_z"], 2) and rank == round(last["rank_h"]), row
    table = results_rows("MAE")
    assert len(table) >= 5
    for row, (images, passes, *accuracy, error, rank) in table:
        settings, steps, last, found = logged("cifar10_cpu_mae", row)
        seen = steps[-1]["step"] * settings["batch_size"] / 1e3
        assert accuracy == accuracies(found) and images == round(seen) and passes == round(seen * passes_per_image(settings)), row
        assert error == round(last["loss_reconstruction"], 3) and rank == round(last["rank_h"]), row
    for row, values in protocol_rows():
        for run, value in values.items():
            assert value == protocol_value(run, row), (row, run)
    table = results_rows("Barlow Twins")
    assert len(table) >= 5
    for row, (images, *accuracy, live, zero, l21, frobenius, rank_r, rank_z) in table:
        settings, steps, last, found = logged("cifar10_cpu_sparsehead", row)
        assert accuracy == accuracies(found) and images == round(steps[-1]["step"] * settings["batch_size"] / 1e3), row
        assert (live, zero) == (round(100 * steps[-1]["live_columns"], 1), round(100 * steps[-1]["zero_columns"], 1)), row
        assert (l21, frobenius) == (round(steps[-1]["l21_normalized"], 3), round(steps[-1]["frobenius"], 2)), row
        assert (rank_r, rank_z) == (round(found["spectrum", "representation_rank"], 1), round(found["spectrum", "embedding_rank"], 1)), row
