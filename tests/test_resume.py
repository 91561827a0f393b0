"""A run as a program: what it leaves, how it goes on after any end, and what it refuses.

The rule: all randomness is a function of (seed, epoch, step, image), so a run that was cut and goes
on is, to the bit, the run that was not. Most tests call `main` in this process; those that need a
signal or a kill start the script as a `Program`.
"""
import contextlib
import errno
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import matplotlib
import pytest
import torch
import torch._dynamo.testing
import torchvision
from PIL import Image
from torch import nn

import common
import mae_tc2
import simclr_tc2
from conftest import (ROOT, SCRIPTS, Program, both, checkpoint, each_script, last_step, losses,
                      rows, same, tiny)

CPU = torch.device("cpu")
CTRL_C = "stopped by Ctrl-C\n"
FINISHING = "\nfinishing what is under way, then saving; Ctrl-C again ends at once\n"
BASELINE = tiny("simclr_tc2", "--out", "r", baseline=True)


def always(value):
    """A function that returns it, whatever it is given."""
    def function(*_):
        return value
    return function


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    """A folder of its own. No pictures, which take longer than the training, but where named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if "picture" not in request.node.name:
        monkeypatch.setattr(common, "plot_curves", always({}))
        monkeypatch.setattr(common, "draw_grid", always({}))
        monkeypatch.setattr(mae_tc2, "draw_grid", always({}))


def image_folder(path, classes="ab", n=8, size=(20, 24)):
    """A folder with train/ and test/, with n images of each class."""
    for split in ("train", "test"):
        for label in classes:
            where = f"{path}/{split}/{label}"
            os.makedirs(where)
            for i in range(n):
                g = common.rng(split, label, i)
                image = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=g)
                kind = "png" if i % 2 else "jpg"
                Image.fromarray(image.numpy()).save(f"{where}/{i}.{kind}")


def refused(capsys, main, argv):
    """The sentence with which main(argv) ends: one line on stderr, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2, argv
    assert err.startswith("error: ") and err.count("\n") == 1, (argv, err)
    return err


def interrupted(function, call, act):
    """The function, which does act() before that call."""
    calls = []

    def replacement(*args, **options):
        calls.append(1)
        if len(calls) == call:
            act()
        return function(*args, **options)
    return replacement


def accepted(*_):
    raise AssertionError("the input is accepted")


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


# ---- what a run leaves ---------------------------------------------------------------------------
@each_script
def test_a_run_leaves_log_checkpoint_backbone_and_pictures(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    watched = {term: (-1e9, f"{term} is watched") for term in script.LIMITS}
    monkeypatch.setattr(script, "LIMITS", watched)
    argv = tiny(name, "--out", "r", "--max-steps", "4")
    script.main(argv)
    shown = capsys.readouterr().out

    header, *events = rows("r")
    settings = header["settings"]
    assert header["argv"] == argv and header["processes"] == 1
    assert settings["script"] == name and settings["max_steps"] == 4
    assert settings["images"] == 512 and settings["classes"] == 10

    # The settings in the log build the networks, whose weights the checkpoint has.
    nets = script.build_nets(types.SimpleNamespace(**settings))
    nets.load_state_dict(checkpoint("r")["nets"])
    for part, net in nets.items():
        assert header["parameters"][part] == sum(p.numel() for p in net.parameters())
    backbone = torch.load("r/backbone.pt", weights_only=True)
    assert same(backbone["state_dict"], nets["backbone"].state_dict())
    assert backbone["arch"] == settings["arch"] and backbone["image_size"] == 8

    steps = [row["step"] for row in events if "lr" in row]
    evaluated = [row for row in events if "knn5" in row]
    assert steps == [3, 4] and [row["step"] for row in evaluated] == [0, 4]
    assert {"knn200_cosine", "rank_h"} <= evaluated[0].keys() & evaluated[1].keys()
    assert "raw_pixels_knn5" in evaluated[0] and "raw_pixels_knn5" not in evaluated[1]
    for row in events:
        for value in row.values():
            assert isinstance(value, str) or abs(value) < 1e9

    # Half a cosine from the first of the eight steps to the end of the last.
    trained = [row for row in events if "lr" in row]
    for row in trained:
        scale = 0.5 + 0.5 * math.cos(math.pi * (row["step"] - 1) / 8)
        assert row["lr"] == pytest.approx(settings["lr"] * scale)

    # A term above its limit warns once, on the screen and in the log.
    warnings = [row["warning"] for row in events if "warning" in row]
    for term in watched.keys() & trained[0].keys():
        assert sum(warning.startswith(f"{term} ") for warning in warnings) == 1
        assert shown.count(f": {term} is watched") == 1

    # Piped, the progress is plain lines.
    assert "\r" not in shown and "\033" not in shown
    assert "\nstep 3/4  " in shown and "\ndone: r/backbone.pt" in shown

    pictures = {"curves.png", "views.png"}
    if name == "mae_tc2":
        pictures.add("reconstructions.png")
    assert {*os.listdir("r")} == {"backbone.pt", "last.pt", "log.jsonl", *pictures}
    for picture in pictures:
        assert torchvision.io.read_image(f"r/{picture}").float().std() > 10


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "mae_tc2"])
def test_backbone_loads_strictly_into_torchvision(name):
    script = importlib.import_module(name)
    args = script.parse_args(["--data", "fake", "--arch", "resnet18", "--out", "r"])
    script.fill_defaults(args, common.load_data("fake", 8), CPU)
    nets = script.build_nets(args).eval()
    recipe = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    os.makedirs("r")
    common.save_run(args, 1, nets, {}, recipe, {})

    saved = torch.load("r/backbone.pt", weights_only=True)
    net = torchvision.models.resnet18().eval()
    net.fc = nn.Identity()
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.load_state_dict(saved["state_dict"], strict=True)
    assert saved["small_images"] and saved["mean"] == recipe["mean"]
    x = torch.rand(2, 3, 8, 8, generator=common.rng(0))
    with torch.no_grad():
        torch.testing.assert_close(net(x), nets["backbone"](x))


@each_script
def test_baseline_starts_from_the_same_weights_and_sees_the_same_views(name):
    script = importlib.import_module(name)
    data = common.load_data("fake", 8)
    weights = []
    views = []
    for baseline in (False, True):
        args = script.parse_args(tiny(name, baseline=baseline))
        script.fill_defaults(args, data, CPU)
        recipes = script.view_augmentations(args, data)
        torch.manual_seed(args.seed)
        weights.append(script.build_nets(args).state_dict())
        batches = common.training_batches(data, recipes, args, 0, 1, CPU, 0, 1)
        views.append(next(batches)[0])
    for key, value in weights[1].items():
        assert torch.equal(value, weights[0][key])
    assert views[0].shape[1:] == (64, 3, 8, 8)
    assert torch.equal(views[1], views[0][:len(views[1])])


def test_a_compiled_backbone_takes_the_same_steps(monkeypatch):
    """But for the code generator, which takes a minute: torch's own kernels run the graphs.

    The evaluation, where a graph is gone through backward twice, is part of it."""
    capture = nn.Module.compile
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def without_generator(net):
        capture(net, backend=counter)

    monkeypatch.setattr(nn.Module, "compile", without_generator)
    monkeypatch.setattr(simclr_tc2, "monitor", always({}))
    for out, flags in (("plain", []), ("compiled", ["--compile"])):
        simclr_tc2.main(tiny("simclr_tc2", "--max-steps", "2", "--out", out, *flags))
    torch._dynamo.reset()
    plain = checkpoint("plain")["nets"]
    compiled = checkpoint("compiled")["nets"]
    assert counter.frame_count and plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)
    (before,), (after,) = [[row for row in common.read_log(out) if "adapted_after" in row]
                           for out in ("plain", "compiled")]
    assert before == pytest.approx(after, rel=1e-3, abs=1e-3)


def test_pictures_are_drawn_while_a_run_goes_on_and_before_it_ends_badly(monkeypatch, capsys):
    now = [0.0]
    drawn = []

    def clock():
        return now[0]

    monkeypatch.setattr(common.time, "perf_counter", clock)
    monkeypatch.setattr(common, "plot_curves", drawn.append)
    os.makedirs("r")
    limits = {"loss_ssl": (0.5, "is high")}
    args = types.SimpleNamespace(out="r", device="cpu", images_per_step=8)
    log = common.Log(args, 0, 20000, limits)
    for now[0] in (10.0, 61.0, 70.0, 122.0):
        log.event(12800, knn5=50.0)
    assert len(drawn) == 2 and "step 12800  knn5 50" in capsys.readouterr().out

    # Two steps of 8 images in 4 s; evaluations and what is written do not count.
    for step in (12801, 12802):
        log.add(step, {"loss_ssl": torch.tensor(1.0)})
    now[0] += 4
    log.write(nn.Linear(1, 1), 0.1)
    assert rows("r")[-1]["images_per_s"] == 4 and rows("r")[-2]["warning"].endswith("is high")
    assert "  4.0 img/s  3:59:56 left" in capsys.readouterr().out

    # What an evaluation finds may be above its limit too.
    log.limits["alpha"] = (1, "is long")
    log.event(12802, alpha=0.9)
    assert "warning" not in rows("r")[-1]
    log.event(12802, alpha=1.1)
    assert [row.get("warning") for row in rows("r")[-2:]] == ["alpha 1.1 > 1: is long", None]

    log.add(12803, {"loss_ssl": torch.tensor(torch.nan)})
    with pytest.raises(SystemExit):
        log.write(nn.Linear(1, 1), 0.1)
    assert len(drawn) == 3


def test_the_end_says_that_other_programs_used_the_cores(monkeypatch, capsys):
    """On a CPU, where several threads shared the cores with others for a minute: no one else."""
    def last_words(threads, load, device="cpu"):
        monkeypatch.setattr(torch, "get_num_threads", always(threads))
        monkeypatch.setattr(os, "getloadavg", always((load, 9.0, 9.0)))
        args = types.SimpleNamespace(out="r", device=device, images_per_step=8)
        common.Log(args, 0, 1, {}).end("done")
        done, *hint = capsys.readouterr().out.splitlines()
        assert done == "done"
        return hint

    assert "OMP_NUM_THREADS=1" in last_words(2, 2.9)[0]
    assert not last_words(2, 2.1) and not last_words(1, 2.9) and not last_words(2, 2.9, "cuda")
    monkeypatch.delattr(os, "getloadavg")
    assert not common.others_use_the_cores()


def test_a_complete_run_says_so_and_a_refusal_names_other_data(capsys):
    simclr_tc2.main([*BASELINE, "--max-steps", "1"])
    assert "nothing is left to train" not in capsys.readouterr().out
    simclr_tc2.main([*BASELINE, "--max-steps", "1"])
    assert "complete at step 1: nothing is left to train" in capsys.readouterr().out

    image_folder("d", size=(32, 32), n=64)
    sentence = refused(capsys, simclr_tc2.main, [*BASELINE, "--data", "d", "--max-steps", "1"])
    assert "(data fake -> d; " in sentence


def test_a_number_out_of_range_and_a_batch_too_large_say_what_would_do(capsys):
    sentence = refused(capsys, simclr_tc2.main, [*BASELINE, "--epochs", "-3"])
    assert "'-3' is not a whole number of at least 1" in sentence
    sentence = refused(capsys, simclr_tc2.main, [*BASELINE, "--batch-size", "9999"])
    assert sentence.endswith("training images; lower it\n")
    gessl = tiny("byol_gessl", "--out", "r", "--batch-size", "512", "--tasks", "2")
    byol_gessl = importlib.import_module("byol_gessl")
    assert refused(capsys, byol_gessl.main, gessl).endswith("lower it or --tasks\n")


def test_no_label_of_a_picture_is_cut_off():
    labels = ("original", "masked", "reconstruction", "calibrated")
    common.draw_grid("grid.png", {label: torch.rand(8, 3, 32, 32) for label in labels})
    picture = common.decode("grid.png")
    for border in (picture[:, :, 0], picture[:, :, -1], picture[:, 0], picture[:, -1]):
        assert (border == 255).all()


def test_the_log_of_a_run_whose_data_have_moved_names_the_new_place():
    common.open_log("r", ["first"], {"data": "old"}, {}, 0)
    common.open_log("r", ["again"], {"data": "new"}, {}, 1)
    header, = common.read_log("r")
    assert header["settings"] == {"data": "new"} and header["argv"] == ["first"]


@pytest.mark.parametrize("in_files", [False, True])
def test_views_that_are_drawn_are_those_that_the_network_sees(in_files, monkeypatch):
    recipe = {**simclr_tc2.AUGMENTATION["imagenet"], "crop": (1, 1), "ratio": (1, 1), "flip": 0,
              "jitter_p": 0, "gray_p": 0, "blur_p": 0}
    dark = {**recipe, "solarize_p": 1.0}
    data = common.load_data("fake", 8)
    if in_files:
        names = [f"{i}.png" for i in range(12)]
        for name, image in zip(names, data.train):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(name)
        data = data._replace(train=names)
    args = types.SimpleNamespace(images_per_step=12, seed=3, image_size=8, workers=0, out=".")
    drawn = {}

    def keep(path, rows):
        drawn.update(rows)

    monkeypatch.setattr(common, "draw_grid", keep)
    batches = common.training_batches(data, [recipe, dark], args, 0, 1, CPU, 0, 1)
    views, index = next(batches)
    common.draw_views(args, data, views, index, [recipe, dark])

    assert list(drawn) == ["image", "view 1", "view 2"]
    image = drawn["image"]
    assert image.shape == (8, 3, 8, 8)
    expected = torch.where(image >= 0.5, 1 - image, image)
    torch.testing.assert_close(drawn["view 1"], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn["view 2"], expected, rtol=0, atol=1e-5)


def test_a_grid_of_pictures_shows_each_where_its_row_is():
    colours = torch.eye(3)[:, None, :, None, None].expand(3, 2, 3, 8, 8)
    common.draw_grid("x.png", {"red": colours[0], "green": colours[1], "blue": colours[2]})
    found = torchvision.io.read_image("x.png")[:3].float() / 255
    centres = []
    for colour in torch.eye(3):
        there = (found - colour[:, None, None]).abs().amax(0) < 0.1
        assert there.float().mean() > 0.1
        centres.append(there.nonzero()[:, 0].float().mean())
    assert centres == sorted(centres)


# ---- going on ------------------------------------------------------------------------------------
@both
@each_script
def test_sigterm_in_mid_epoch_then_resume_equals_uninterrupted(name, baseline, monkeypatch):
    script = importlib.import_module(name)
    argv = tiny(name, baseline=baseline)
    script.main([*argv, "--out", "whole"])
    cut = interrupted(script.train_step, 5, send_sigterm)
    monkeypatch.setattr(script, "train_step", cut)
    with pytest.raises(SystemExit) as stopped:
        script.main([*argv, "--out", "parts"])
    assert stopped.value.code == 128 + signal.SIGTERM and checkpoint("parts")["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    script.main([*argv, "--out", "parts"])
    assert same(checkpoint("parts"), checkpoint("whole"))
    assert torch.load("parts/last.pt")["step"] == 8
    rest = [row for row in losses("parts") if row["step"] != 5]
    assert rest == losses("whole")


def test_a_signal_saves_before_the_evaluation_that_is_due(monkeypatch):
    """torchrun kills half a minute after it has asked; an evaluation may take longer."""
    argv = tiny("simclr_tc2", "--epochs", "3", "--out", "r", baseline=True)
    cut = interrupted(simclr_tc2.train_step, 16, send_sigterm)
    monkeypatch.setattr(simclr_tc2, "train_step", cut)
    saved = []

    def evaluation(*_):
        saved.append(checkpoint("r")["step"] if os.path.exists("r/last.pt") else 0)
        return {"knn5": 1.0}

    monkeypatch.setattr(simclr_tc2, "monitor", evaluation)
    with pytest.raises(SystemExit):
        simclr_tc2.main(argv)
    assert saved == [0, 0, 0, 16]           # network and raw pixels, after eight steps, after 16


def test_out_may_not_be_the_folder_of_the_images(capsys):
    image_folder("photos", n=40)
    argv = tiny("simclr_tc2", "--data", "photos", "--out", "./photos")
    assert "--out ./photos: is the folder of the images" in refused(capsys, simclr_tc2.main, argv)
    assert sorted(os.listdir("photos")) == ["test", "train"]
    simclr_tc2.main(tiny("simclr_tc2", "--out", "fake", "--max-steps", "1"))    # built-in data


def test_small_images_are_copied_out_of_the_workers_shared_memory():
    image_folder("d", n=3)
    paths = [f"d/train/a/{name}" for name in sorted(os.listdir("d/train/a"))]
    images, kept = common.decode_all("d", paths, 20, workers=1)
    assert kept == [0, 1, 2] and not images.is_shared()
    chunks = []

    def square_batches(*_):
        chunks.append(torch.zeros(2, 3, 4, 4).share_memory_())
        yield chunks[0], [0, 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "square_batches", square_batches)
        images, _ = common.decode_all("d", paths, 4, workers=1)
    assert images.data_ptr() != chunks[0].data_ptr() and not images.is_shared()


def test_values_are_compared_over_processes(monkeypatch):
    """Three processes: what the others have is what `all_gather_object` puts in."""
    assert common.alike_on_all_processes([1, "a"])
    monkeypatch.setattr(common, "world_size", always(3))
    for theirs, alike in (([1, "a"], True), ([1, "b"], False), ([2, "a"], False)):
        def all_gather_object(values, value):
            values[:] = [value, [1, "a"], theirs]

        monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
        assert common.alike_on_all_processes([1, "a"]) == alike


def test_a_stream_without_reconfigure_is_no_obstacle():
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        common.run(lambda: print("in a notebook"))
    assert stream.getvalue() == "in a notebook\n"


def die_after_step_12():
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)
    common.Log.add = interrupted(common.Log.add, 12, kill)


def test_kill_9_between_checkpoints_then_resume_equals_uninterrupted(capsys):
    argv = tiny("simclr_tc2", "--epochs", "3", "--log-every", "1", baseline=True)
    simclr_tc2.main([*argv, "--out", "whole"])
    program = Program("simclr_tc2", *argv, "--out", "parts", before=die_after_step_12)
    assert program.end()[0] == -signal.SIGKILL
    assert checkpoint("parts")["step"] == 8 and last_step("parts") == 11
    simclr_tc2.main([*argv, "--out", "parts"])
    assert "goes on from step" in capsys.readouterr().out
    assert same(checkpoint("parts"), checkpoint("whole"))
    assert losses("parts") == losses("whole")


def test_a_run_killed_between_its_two_files_does_the_epoch_again(monkeypatch):
    argv = tiny("simclr_tc2", "--epochs", "2", baseline=True)
    simclr_tc2.main([*argv, "--out", "whole"])

    def kill():
        raise KeyboardInterrupt

    # The log is written once, then two files an epoch.
    cut = interrupted(common.save, 5, kill)
    monkeypatch.setattr(common, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        simclr_tc2.main([*argv, "--out", "parts"])
    newest = torch.load("whole/backbone.pt")["state_dict"]
    assert same(torch.load("parts/backbone.pt")["state_dict"], newest)
    assert checkpoint("parts")["step"] == 8
    simclr_tc2.main([*argv, "--out", "parts"])
    assert same(checkpoint("parts"), checkpoint("whole"))
    assert losses("parts") == losses("whole")


def test_a_notebook_calls_main_in_a_thread_and_again_and_pictures_leave_its_backend(monkeypatch):
    matplotlib.use("svg")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = signal.getsignal(signal.SIGINT)
    argv = [*BASELINE, "--max-steps", "1"]
    thread = threading.Thread(target=simclr_tc2.main, args=(argv,))
    thread.start()
    thread.join()
    simclr_tc2.main([*BASELINE, "--max-steps", "2"])
    assert rows("r")[0]["argv"] == argv and checkpoint("r")["step"] == 2
    assert matplotlib.get_backend() == "svg" and signal.getsignal(signal.SIGINT) == before


def test_a_lost_or_damaged_log_is_no_end():
    def go_on(stop):
        simclr_tc2.main([*BASELINE, "--log-every", "1", "--max-steps", str(stop)])

    go_on(1)
    os.remove("r/log.jsonl")
    go_on(2)
    assert rows("r")[0]["settings"]["images"] == 512
    with open("r/log.jsonl", "ab") as file:
        file.write(b'\n[1, 2]\n{"step": 2, "lo\n\xff\xfe\0\n"step"\n{"step": 3, "lr"')
    go_on(3)
    assert [row.get("step") for row in rows("r")] == [None, 2, 2, 3, 3]


# ---- signals and kills ---------------------------------------------------------------------------
def started():
    return last_step("r") >= 3


def test_sigterm_to_the_whole_group_leaves_the_workers_to_the_program():
    image_folder("d", size=(120, 110), n=30)
    program = Program("simclr_tc2", "--data", "d", "--image-size", "20", "--arch", "resnet_tiny",
                      "--batch-size", "8", "--epochs", "500", "--workers", "1", "--baseline",
                      "--log-every", "1", "--eval-every", "500", "--out", "r")
    program.wait_for(started)
    os.killpg(program.pid, signal.SIGTERM)          # as torchrun, timeout and systemd do
    status, out, err = program.end()
    assert status == 128 + signal.SIGTERM and err == FINISHING
    assert "same command goes on" in out
    assert checkpoint("r")["step"] == last_step("r") >= 3


def load_for_a_minute():
    def load(*_):
        print("loading", flush=True)
        time.sleep(60)
    common.load_data = load


def test_ctrl_c_ends_a_program_with_a_checkpoint_and_its_start_with_one_line():
    argv = tiny("simclr_tc2", "--epochs", "500", "--out", "r")
    program = Program("simclr_tc2", *argv)
    start = Program("simclr_tc2", *argv, before=load_for_a_minute)
    start.wait_for(start.has_spoken)
    os.kill(start.pid, signal.SIGINT)
    assert start.end() == (130, "loading\n", CTRL_C)

    program.wait_for(started)
    os.kill(program.pid, signal.SIGINT)
    status, out, err = program.end()
    assert status == 128 + signal.SIGINT and err == FINISHING
    assert "same command goes on" in out and checkpoint("r")["step"] >= 3


def test_a_second_ctrl_c_ends_a_step_that_hangs():
    found = []
    with pytest.raises(KeyboardInterrupt), common.graceful_stop() as stop_signal:
        found.append(stop_signal())
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)             # torchrun's echo of the first
        found.append(stop_signal())
        time.sleep(1.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert found == [0, signal.SIGINT]


def test_a_scheduler_s_second_sigterm_lets_the_step_finish():
    with common.graceful_stop() as stop_signal:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):              # a person may still end it
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def speak_ascii():
    sys.stdout = open(1, "w", encoding="ascii")
    sys.stderr = open(2, "w", encoding="ascii")


def test_names_that_are_not_utf8_in_ascii_until_the_pipe_closes():
    folder = os.fsdecode(b"d\xe9")
    out = os.fsdecode(b"r\xff")
    image_folder(folder, classes=["a", os.fsdecode(b"\xe9")])
    argv = ["--data", folder, "--out", out, "--arch", "resnet_tiny", "--batch-size", "8",
            "--epochs", "100", "--eval-every", "100", "--log-every", "1", "--workers", "0",
            "--baseline"]
    os.mkfifo("pipe")
    program = Program("simclr_tc2", *argv, before=speak_ascii, stdout="pipe")
    with open("pipe") as pipe:
        for line in pipe:
            if line.startswith("step 3/"):
                break
    assert program.end() == (141, "", "")
    simclr_tc2.main([*argv, "--max-steps", "9"])
    assert checkpoint(out)["step"] == 9


@pytest.mark.parametrize("name", [*SCRIPTS, "eval_linear"])
def test_python_without_docstrings(name, capsys):
    """As python -OO compiles the files."""
    with open(f"{ROOT}/{name}.py") as file:
        code = compile(file.read(), name, "exec", optimize=2)
    module = vars(types.ModuleType(name))
    exec(code, module)
    with pytest.raises(SystemExit) as stopped:
        module["parse_args"](["--help"])
    assert stopped.value.code == 0 and "--device" in capsys.readouterr().out


def test_every_script_is_run_by_the_frame_that_ends_in_sentences():
    for name in (*SCRIPTS, "eval_linear"):
        with open(f"{ROOT}/{name}.py") as file:
            last = file.read().split('\nif __name__ == "__main__":\n')[1]
        assert re.fullmatch(r'    run\(main(, advice="[^"]+")?\)\n', last), name


FULL_GPU = ["CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has a total capacity of 4 GiB",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "MPS backend out of memory (MPS allocated: 18 GB)"]


def test_lines_of_both_streams_keep_their_order_in_a_file():
    program = ("import common, sys; common.run(lambda: [print('first'), common.fail('second')])")
    environment = {**os.environ, "PYTHONPATH": ROOT}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.stdout == "first\nerror: second\n"


def test_memory_or_disk_that_runs_out_ends_in_a_sentence_and_a_mistake_does_not(
        monkeypatch, capsys):
    def call(error):
        def main():
            raise error
        common.run(main)

    for text in FULL_GPU:
        sentence = refused(capsys, call, RuntimeError(text))
        assert text.split(". ")[0] in sentence and "--batch-size" in sentence
    host = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 GB"
    for error in (torch.OutOfMemoryError(FULL_GPU[0]), RuntimeError(host)):
        assert "memory ran out" in refused(capsys, call, error)
    closed = RuntimeError("[gloo/transport] Connection closed by peer [127.0.0.1]:4242")
    with pytest.raises(RuntimeError, match="closed by peer"):
        call(closed)                                # one process has no peer
    monkeypatch.setattr(common, "world_size", always(2))
    killed = RuntimeError("[gloo/transport] Read error [127.0.0.1]:42: Connection reset by peer")
    for error in (closed, killed):
        assert "another process has ended" in refused(capsys, call, error)
    full = OSError(errno.ENOSPC, "No space left on device", "r/log.jsonl")
    assert "r/log.jsonl" in refused(capsys, call, full)
    for mistake in (RuntimeError("a mistake"), FileNotFoundError(errno.ENOENT, "a mistake")):
        with pytest.raises(type(mistake), match="a mistake"):
            call(mistake)


# ---- a checkpoint is good, or it is not written --------------------------------------------------
@pytest.mark.parametrize("what", ["term", "weight"])
def test_what_is_not_finite_ends_the_run_with_step_name_and_checkpoint(what, monkeypatch, capsys):
    step = simclr_tc2.train_step
    calls = []

    def poisoned(nets, opts, views, args, progress):
        calls.append(1)
        if what == "term" and len(calls) == 11:
            views = views * torch.nan
        terms = step(nets, opts, views, args, progress)
        if what == "weight" and len(calls) == 16:
            nets["projector"].bias.data[3] = torch.inf
        return terms

    monkeypatch.setattr(simclr_tc2, "train_step", poisoned)
    with pytest.raises(SystemExit) as stopped:
        simclr_tc2.main([*BASELINE, "--epochs", "2"])
    expected = {"term": "loss_ssl is not finite at step 11",
                "weight": "projector.bias is not finite at step 16"}
    err = capsys.readouterr().err
    assert stopped.value.code == 1
    assert err.startswith(f"error: {expected[what]}; ") and err.count("\n") == 1
    assert "the last checkpoint in r" in err
    saved = checkpoint("r")
    assert saved["step"] == 8 and all(value.isfinite().all() for value in saved["nets"].values())


def test_a_full_disk_costs_neither_the_previous_file_nor_a_traceback(capsys):
    def save(path):
        common.save(path, {"a": torch.zeros(100000)})

    common.save("x.pt", {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        sentence = refused(capsys, save, "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write x.pt" in sentence and torch.load("x.pt") == {"a": 1}
    assert os.listdir() == ["x.pt"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_resume_refuses_other_settings_foreign_files_and_code(capsys):
    argv = [*BASELINE, "--max-steps", "1"]
    simclr_tc2.main(argv)
    with open("r/last.pt", "rb") as file:
        before = file.read()
    for flags, word in ((["--lr", "0.5"], "lr 0.003 -> 0.5"), (["--seed", "1"], "seed 0 -> 1"),
                        (["--views", "3", "--seed", "1"], "seed 0 -> 1; views 2 -> 3")):
        assert word in refused(capsys, simclr_tc2.main, [*argv, *flags])
        with open("r/last.pt", "rb") as file:
            assert file.read() == before

    # These change nothing of what is computed.
    simclr_tc2.main([*argv, "--log-every", "1", "--eval-every", "5", "--workers", "0"])

    state = torch.load("r/last.pt")
    foreign = {"device elsewhere -> cpu":
                   {**state, "settings": {**state["settings"], "device": "elsewhere"}},
               "has no step, settings": {"epoch": 1},
               "cannot be read": {**state, "step": Bomb()}}
    for word, content in foreign.items():
        torch.save(content, "r/last.pt")
        sentence = refused(capsys, simclr_tc2.main, argv)
        assert "--out r: " in sentence and word in sentence
    for content in (b"", b"no checkpoint", before[:1000]):
        with open("r/last.pt", "wb") as file:
            file.write(content)
        assert "r/last.pt" in refused(capsys, simclr_tc2.main, argv)
    assert not os.path.exists("exploded")


def test_resume_compares_the_images_and_not_how_their_folder_was_typed(capsys):
    image_folder("d3")
    shutil.copytree("d3", "elsewhere/copy")
    argv = ["--arch", "resnet_tiny", "--batch-size", "8", "--epochs", "5", "--eval-every", "9",
            "--workers", "0", "--baseline", "--out", "~/r"]

    def go_on(data):
        simclr_tc2.main([*argv, "--data", data, "--max-steps", str(max(last_step("r"), 0) + 1)])

    names = ["d3", "d3/", "./d3", os.path.abspath("d3"), "elsewhere/copy", "~/d3"]
    for steps, data in enumerate(names, 1):
        go_on(data)
        assert checkpoint("r")["step"] == steps

    one = "d3/train/a/0.jpg"
    shutil.copy(one, "d3/train/a/more.jpg")
    assert "images 16 -> 17" in refused(capsys, go_on, "d3")
    os.rename("d3/train/a/more.jpg", "d3/test/a/more.jpg")
    assert "file_names" in refused(capsys, go_on, "d3")
    os.remove("d3/test/a/more.jpg")
    os.rename(one, "d3/train/a/renamed.jpg")
    assert "file_names" in refused(capsys, go_on, "d3")
    os.remove("d3/train/a/renamed.jpg")
    assert "images 16 -> 15" in refused(capsys, go_on, "d3")
    image_folder("d3", classes="c")
    assert "classes 2 -> 3" in refused(capsys, go_on, "d3")
    go_on("elsewhere/copy")


# ---- bad input: one sentence that names the flag and the value, nothing written ------------------
BAD = {
    "every": ["--epochs 0", "--lr nan", "--lr -1", "--seed x", f"--seed 1{400 * '0'}",
              f"--seed {10 ** 20}", "--batch-size 1", "--batch-size 8000", "--data missing",
              "--image-size 4", "--workers -1", "--unknown 1", "--batch 64", "--arch resnet19",
              "--warmup-epochs 4 --epochs 3", "--device tpu"],
    "simclr_tc2": ["--batch-size 30", "--batch-size 4", "--views 3", "--views 1", "--tasks 3",
                   "--temperature 0", "--query-loss l2", "--inner-lr inf",
                   "--second-order --compile", "--without z"],
    "byol_gessl": ["--tasks 0", "--inner-steps 0", "--batch-size 32 --tasks 200",
                   "--target-steps -1",
                   "--inner-lr 0", "--hypergrad full", "--outer-loss l1", "--ssl-weight -1",
                   "--ema-decay 1.1", "--hypergrad exact --compile", "--views 2"],
    "barlow_sparsehead": ["--penalty l1", "--head conv", "--lambda-sparse -1", "--dim 1",
                          "--hidden 0", "--lambda-offdiag x", "--lambda-sparse 1 --baseline",
                          "--head none"],
    "mae_tc2": ["--patch-size 5", "--mask-ratio 0.99", "--mask-ratio 0.75 --patch-size 32",
                "--masks 1", "--batch-size 16 --tasks 3", "--without norm",
                "--second-order --compile"],
}


@each_script
def test_bad_input_gives_one_sentence_status_2_and_writes_nothing(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "open_run", accepted)
    for flags in BAD["every"] + BAD[name]:
        flag, *value = flags.split()
        sentence = refused(capsys, script.main, ["--data", "fake", *flags.split()])
        assert flag in sentence and value[0][:40] in sentence, (flags, sentence)
    assert os.listdir() == []


@each_script
def test_every_flag_refuses_nonsense_in_one_sentence(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "open_run", accepted)
    tried = 0
    for key, default in vars(script.parse_args([])).items():
        flag = "--" + key.replace("_", "-")
        values = [f"{flag}={value}" for value in ("nonsense", "nan", "-1e9", "")] + [flag]
        if isinstance(default, bool):
            values = [f"{flag}=3", f"{flag}s"]
        if key in ("bf16", "norm_pixels"):
            values = [f"{flag}=3", f"{flag}s", f"--no{flag[1:]}=3"]
        if key in ("data", "out"):
            values = [flag]
        for value in values:
            sentence = refused(capsys, script.main, [value])
            assert flag.removeprefix("--") in sentence, (value, sentence)
            tried += 1
    assert tried > 80 and os.listdir() == []


@pytest.mark.parametrize("name, flags", [
    ("simclr_tc2", "--baseline"), ("simclr_tc2", "--tasks 2"), ("byol_gessl", "--baseline"),
    ("barlow_sparsehead", ""), ("barlow_sparsehead", "--baseline")])
def test_one_image_per_process_or_task_has_no_statistics(name, flags, capsys):
    script = importlib.import_module(name)
    args = script.parse_args([*flags.split(), "--batch-size", "2"])
    data = common.load_data("fake", 8)
    script.fill_defaults(args, data, CPU)

    def check(world):
        script.check_args(args, data, world)

    assert "--batch-size 2: " in refused(capsys, check, 2)


@each_script
def test_a_warm_up_longer_than_the_run_becomes_a_tenth_of_it(name):
    script = importlib.import_module(name)
    for flags, warmup in (("--epochs 3", 0.3), ("--epochs 500", None),
                          ("--epochs 3 --warmup-epochs 3", 3), ("--epochs 3 --warmup-epochs 0", 0)):
        args = script.parse_args(["--data", "fake", *flags.split()])
        script.fill_defaults(args, common.load_data("fake"), CPU)
        if warmup is None:
            warmup = script.RECIPES["small"]["warmup_epochs"]
        assert args.warmup_epochs == pytest.approx(warmup)


@each_script
def test_a_device_that_is_not_there_is_refused(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, "device_count", always(0))
    monkeypatch.setattr(script, "open_run", accepted)
    for device in ("cuda", "mps"):
        argv = ["--data", "fake", "--device", device]
        assert f"--device {device}: " in refused(capsys, script.main, argv)
    argv = ["--data", "fake", "--device", "cpu", "--sync-bn", "--baseline"]
    assert "--sync-bn: " in refused(capsys, script.main, argv)
    assert os.listdir() == []


def test_workers_by_default_share_the_cores_that_the_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", always(range(24)))
    for processes, workers in (("1", 16), ("4", 6), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert simclr_tc2.parse_args([]).workers == workers


# ---- what two runs with the same mistake would not show ------------------------------------------
@pytest.mark.parametrize("name", ["simclr_tc2", "mae_tc2"])
def test_every_rate_warms_up_over_its_epochs(name):
    """Half an epoch of eight steps: a quarter of the rate after the first one."""
    flags = ("--warmup-epochs", "0.5", "--log-every", "1", "--max-steps", "3", "--lr", "0.02",
             "--weight-decay", "0.1", "--out", "r")
    importlib.import_module(name).main(tiny(name, *flags))
    rates = [row["lr"] for row in rows("r") if "lr" in row]
    assert rates == pytest.approx([0.005, 0.01, 0.015])
    group, = checkpoint("r")["opts"]["factors"]["param_groups"]
    assert group["lr"] == pytest.approx(0.75 * 3e-3) and group["weight_decay"] == 0


@each_script
def test_main_seeds_the_weights_counts_progress_and_evaluates_every(name, monkeypatch):
    script = importlib.import_module(name)
    progress_seen = []
    weights = []

    def step(nets, opts, views, args, progress):
        progress_seen.append(progress)
        weights.append({key: value.clone() for key, value in nets.state_dict().items()})
        return {"loss_ssl": torch.zeros(())}

    monkeypatch.setattr(script, "train_step", step)
    monkeypatch.setattr(script, "diagnose", always({}))
    monkeypatch.setattr(script, "monitor", always({"knn5": 1.0}))
    flags = ("--epochs", "5", "--eval-every", "2", "--seed", "7", "--max-steps", "39", "--out", "r")
    script.main(tiny(name, *flags))
    assert progress_seen == [i / 40 for i in range(39)]
    assert [row["step"] for row in rows("r") if "knn5" in row] == [0, 16, 32, 39]

    torch.manual_seed(7)
    settings = types.SimpleNamespace(**rows("r")[0]["settings"])
    for key, value in script.build_nets(settings).state_dict().items():
        assert torch.equal(value, weights[0][key]), key


def test_a_logged_term_is_the_mean_over_processes(monkeypatch):
    os.makedirs("r")
    of_the_other = torch.tensor([[3.0], [7.0]])
    monkeypatch.setattr(common, "world_size", always(2))
    monkeypatch.setattr(common, "all_reduce_sum", lambda x: x + of_the_other)
    args = types.SimpleNamespace(out="r", device="cpu", images_per_step=8)
    log = common.Log(args, 0, 9, {})
    for step, value in ((1, 1.0), (2, 5.0)):
        log.add(step, {"loss_ssl": torch.tensor(value)})
    log.write(nn.Linear(1, 1), 0.1)
    assert rows("r")[-1]["loss_ssl"] == 6


@pytest.mark.parametrize("size, small", [(32, True), (96, True), (97, False)])
def test_backbone_pt_says_its_stem_and_its_preprocessing(size, small):
    recipe = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.1, 0.25)}
    os.makedirs("r")
    backbone, _ = common.make_backbone("resnet18", size)
    args = types.SimpleNamespace(out="r", arch="resnet18", image_size=size)
    common.save_run(args, 1, nn.ModuleDict({"backbone": backbone}), {}, recipe, {})
    saved = torch.load("r/backbone.pt", weights_only=True)
    assert saved["mean"] == recipe["mean"] and saved["std"] == recipe["std"]
    kernel = saved["state_dict"]["conv1.weight"].shape[-1]
    assert saved["small_images"] == small == (kernel == 3)


def test_every_setting_but_seven_is_compared(capsys):
    simclr_tc2.main(tiny("simclr_tc2", "--out", "r", "--max-steps", "1"))
    settings = torch.load("r/last.pt", weights_only=True)["settings"]
    free = {"data", "out", "workers", "log_every", "eval_every", "max_steps", "compile"}
    assert len(settings) > 25

    def resume(changed):
        common.resume("r", changed, nn.ModuleDict(), {})

    for name in settings.keys() - free:
        assert f"{name} " in refused(capsys, resume, {**settings, name: "other"})


def test_the_picture_of_curves_shows_values_over_steps(monkeypatch):
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, *_, **__: kept.append(self))
    os.makedirs("r")
    lines = [{"settings": {}}, {"step": 0, "knn5": 1, "knn9": 2, "raw_pixels_knn9": 7},
             {"step": 3, "loss_a": 0.5}, {"step": 9, "loss_a": 0.25, "knn5": 3, "knn9": 4}]
    common.save("r/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    common.plot_curves("r")
    losses, accuracies = kept[0].axes[:2]
    line, = losses.lines
    assert list(line.get_xdata()) == [3, 9] and list(line.get_ydata()) == [0.5, 0.25]

    # The pixels' accuracy has the colour of the curve that has to beat it.
    colour = {line.get_label(): line.get_color() for line in accuracies.lines}
    assert colour["raw_pixels_knn9"] == colour["knn9"] != colour["knn5"]

    # Of a long log two thousand points are drawn.
    lines = [{"settings": {}}, *({"step": step, "loss_a": step} for step in range(50_000))]
    common.save("r/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    common.plot_curves("r")
    line, = kept[1].axes[0].lines
    assert list(line.get_xdata()) == list(line.get_ydata()) == list(range(0, 50_000, 25))


def test_curves_are_drawn_once_a_minute_and_for_a_hundredth_of_the_time(monkeypatch):
    """Two minutes of a clock that moves by a second per line; a picture takes 0, then 10 s."""
    now, drawn = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    args = types.SimpleNamespace(out="r", device="cpu", images_per_step=8)
    os.makedirs("r")
    for seconds, expected in ((0, 39), (10, 3)):
        def draw(out):
            drawn.append(now[0])
            now[0] += seconds

        monkeypatch.setattr(common, "plot_curves", draw)
        log = common.Log(args, 0, 9, {})
        start = now[0]
        drawn.clear()
        while now[0] < start + 2400:
            now[0] += 1
            log.append(step=1)
        assert drawn[0] == start + 61 and len(drawn) == expected


def test_processes_agree_on_the_images_and_settings_but_not_on_where_they_lie(monkeypatch, capsys):
    asked = []

    def other_process_differs(value):
        asked.append(value)
        return False

    monkeypatch.setattr(common, "alike_on_all_processes", other_process_differs)
    sentence = refused(capsys, simclr_tc2.main, tiny("simclr_tc2", "--out", "r"))
    assert "the processes do not see the same files" in sentence and not os.path.exists("r")
    (step, settings), = asked
    names = dict(settings)
    assert step == 0 and names["images"] == 512 and names["file_names"] == "fake"
    assert {"epochs", "seed", "batch_size"} <= names.keys()
    assert not {"out", "data", "workers"} & names.keys()


def test_no_process_leaves_while_another_one_still_writes(monkeypatch):
    called = []
    monkeypatch.setattr(torch.distributed, "is_initialized", always(True))
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda name=name: called.append(name))
    args = types.SimpleNamespace(out="r", device="cuda", images_per_step=8)
    common.Log(args, 1, 9, {}).end("done")
    assert called == ["barrier", "destroy_process_group"]


def test_the_first_step_gives_a_sign_of_life(capsys):
    args = types.SimpleNamespace(out="r", device="cpu", images_per_step=8)
    log = common.Log(args, 0, 9, {})
    for step in (4, 5):
        log.add(step, {"loss_ssl": torch.tensor(1.0)})
    assert capsys.readouterr().out == "step 4/9  is done\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers start as Python has it")
def test_workers_are_forked(monkeypatch):
    """Python 3.14 would start them anew, and a signal would meet them unprepared."""
    image_folder("d", n=2)
    asked = []
    loader = torch.utils.data.DataLoader

    def spy(*args, **options):
        asked.append(options["multiprocessing_context"])
        return loader(*args, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", spy)
    for workers in (0, 1):
        common.load_folder("d", None, workers)
    assert asked == [None, None, "fork", "fork"]                # train and test
