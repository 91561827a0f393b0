"""eval_linear.py as a command: every protocol on a run of every script, data from two places, domains, labels, cache, bad input."""
import glob
import json
import os
import re
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
import eval_linear
import barlow_sparsehead
import mae_tc2
import simclr_tc2
from conftest import ROOT
from test_runs import ENHANCED, each_script, elsewhere, image_folder, write_png                          # noqa: F401 (elsewhere is a fixture)

SHORT = ["--probe-epochs", "2", "--tune-epochs", "1", "--label-fraction", "0.1", "1", "--episodes", "20", "--shot", "1", "--queries", "3", "--task-size", "16"]


def make_run(out="r", arch="resnet_tiny", size=20, seed=0):
    torch.manual_seed(seed)
    os.makedirs(out)
    backbone, _ = common.make_backbone(arch, size)
    common.save(f"{out}/backbone.pt", {"arch": arch, "image_size": size, "small_images": True, "mean": (0.5,) * 3, "std": (0.25,) * 3, "state_dict": backbone.state_dict()})
    return out


def results(out="r"):
    with open(f"{out}/eval.json") as file:
        return json.load(file)["results"]


def values(protocol, out="r"):
    return {r["metric"]: r["value"] for r in results(out) if r["protocol"] == protocol}


def plain_folder(path, colours, n=8):
    """Class folders of one colour each, with a little noise: {class: grey level}."""
    for c, level in colours.items():
        os.makedirs(f"{path}/{c}")
        for i in range(n):
            noise = torch.randint(-5, 5, (3, 20, 20), generator=common.rng(c, i))
            write_png((noise + level).clamp(0, 255).byte(), f"{path}/{c}/{i}.png")
    return str(path)


def stops(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_linear.main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err
    return err


@each_script
def test_every_protocol_on_a_run_with_picture(script, capsys, monkeypatch):
    monkeypatch.setattr(eval_linear, "MAX_TASKS", 6)
    script.main(ENHANCED[script] + ["--out", "r", "--max-steps", "1"])
    with open("r/backbone.pt", "rb") as file:
        before = file.read()
    capsys.readouterr()
    eval_linear.main(["r", *SHORT, "--protocol", *eval_linear.PROTOCOLS])
    out, found = capsys.readouterr().out, results()
    assert {r["protocol"] for r in found} == set(eval_linear.PROTOCOLS) and all(r["data"] == "fake" and (r["train_images"], r["test_images"]) == (512, 128) for r in found)
    head, line, row = out.splitlines()[-3:]
    assert head.count("|") == line.count("|") == row.count("|") and row.startswith("| r | fake |") and "±" in row
    assert all(eval_linear.as_text(r["value"]) in row for r in found)
    with_projector = script.__name__ != "mae_tc2"
    assert ("embedding" in values("sigma")) == ("embedding_rank" in values("spectrum")) == ("embedding" in values("distance-ratio")) == with_projector
    assert values("sigma")["log_n"] == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-3)
    images = {k: v for k, v in values("finetune").items() if k.endswith("images")}
    assert images == {"10%_images": sum(round(0.1 * n) for n in common.load_data("fake").train_labels.bincount().tolist()), "100%_images": 512}
    for picture in ("spectrum", "pca", *(["conflict"] if script is simclr_tc2 else [])):
        assert torchvision.io.read_image(f"r/{picture}.png").float().std() > 10
    with open("r/backbone.pt", "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize("spoil", [lambda net: net[0][1].running_mean.add_(1e-3), lambda net: net[1].conv1.weight.mul_(1.001)])
def test_a_protocol_that_changes_the_backbone_ends_the_evaluation(spoil, monkeypatch):
    make_run()
    monkeypatch.setitem(eval_linear.PROTOCOLS, "pca", lambda job: spoil(job.backbone) is None or {"x": 1})
    with pytest.raises(AssertionError, match="pca has changed the backbone"):
        eval_linear.main(["r", "--data", image_folder("d"), "--protocol", "pca"])
    assert not os.path.exists("r/eval.json")


def test_features_are_computed_once_and_again_for_other_weights_or_data(monkeypatch, capsys):
    make_run()
    folder, calls, real = image_folder("d"), [], eval_linear.extract_features
    monkeypatch.setattr(eval_linear, "extract_features", lambda *args: calls.append(1) or real(*args))
    def count(run, *extra):
        calls.clear()
        eval_linear.main([run, "--protocol", "knn", "--k", "1", *extra])
        return len(calls)
    assert count("r", "--data", folder) == 2 and count("r", "--data", folder) == 0 and len(glob.glob("r/features/*.pt")) == 2
    first = values("knn")
    assert count("r", "--data", image_folder("e", seed=5)) == 2 and count("r", "--data", folder) == 0
    assert values("knn")["k1_euclidean"] == first["k1_euclidean"] and {r["data"] for r in results()} == {"d", "e"}       # results of both are kept
    shutil.copytree("r/features", "q/features")
    make_run("s", seed=1)
    shutil.copytree("r/features", "s/features")
    assert count("s", "--data", folder) == 2 and len(glob.glob("s/features/*.pt")) == 2                         # another backbone: another key, the old ones go


def test_a_call_replaces_the_same_measurements_only_and_says_how_each_was_made():
    make_run()
    folder = image_folder("d")
    for protocol in ("knn --k 1", "linear", "linear --seed 1", "linear --seed 1", "knn --k 2 --seed 5", "linear --sweep"):
        eval_linear.main(["r", "--data", folder, "--probe-epochs", "2", "--protocol", *protocol.split()])
    found = {(r["protocol"], r["metric"], r["settings"].get("seed")): r for r in results()}
    assert len(found) == len(results()) and {m for p, m, _ in found if p == "knn"} == {f"k{k}_{m}" for k in (1, 2) for m in ("euclidean", "cosine")}
    assert {s for p, m, s in found if (p, m) == ("linear", "top1")} == {0, 1} and found["linear", "top1", 1]["command"].endswith("--protocol linear --seed 1")
    decay = found["linear (sweep)", "weight_decay", 0]["value"]
    assert decay in [d for _, d in eval_linear.PROBE_GRID] and "--sweep" in found["linear (sweep)", "top1", 0]["command"]


def test_embedding_is_what_the_projector_makes_of_the_features():
    barlow_sparsehead.main(ENHANCED[barlow_sparsehead] + ["--out", "r", "--max-steps", "1", "--dim", "8"])
    eval_linear.main(["r", "--protocol", "knn", "--on", "embedding", "--k", "3"])
    with open("r/log.jsonl") as file:
        nets = barlow_sparsehead.build_nets(types.SimpleNamespace(**json.loads(file.readline())["settings"]))[0].eval()
    nets.load_state_dict(torch.load("r/last.pt", weights_only=True)["nets"])
    data, recipe = common.load_data("fake"), barlow_sparsehead.AUGMENTATION["small"][0]
    with torch.no_grad():
        train, test = (nets["projector"](nets["backbone"](common.normalize(x.float() / 255, recipe["mean"], recipe["std"]))) for x in (data.train, data.test))
    right = common.knn_accuracy(train, data.train_labels, test, data.test_labels, k=3)
    assert values("knn (embedding)")["k3_euclidean"] == pytest.approx(right, abs=0.8)                               # one image of 128


# ---- data from two places -------------------------------------------------------------------------------------------
def test_training_and_test_data_may_be_two_folders():
    make_run()
    light = plain_folder("a", {"bright": 220, "dark": 30})
    plain_folder("b/test", {"bright": 200, "dark": 50})
    eval_linear.main(["r", "--train-data", light, "--test-data", "b/test", "--protocol", "knn", "linear", "--k", "1", "--probe-epochs", "300"])
    assert values("knn")["k1_euclidean"] == values("linear")["top1"] == 100 and results()[0]["data"] == "a -> b/test"


def test_leaving_one_domain_out_gives_every_domain_the_average_and_the_worst():
    make_run()
    for name, colours in (("photo", {"x": 220, "y": 30}), ("sketch", {"x": 200, "y": 50}), ("odd", {"x": 5, "y": 250})):         # in `odd` the classes are swapped
        plain_folder(f"d/{name}", colours)
    eval_linear.main(["r", "--domains", "d", "--protocol", "knn", "--k", "1"])
    found = {k.removeprefix("k1_euclidean_"): v for k, v in values("knn").items() if k.startswith("k1_euclidean_")}
    assert found["odd"] == found["worst"] == 0 and found["average"] == pytest.approx((found["photo"] + found["sketch"]) / 3, abs=1e-3) and set(found) == {
        "photo", "sketch", "odd", "average", "worst"}
    assert found["photo"] + found["sketch"] > 0                                         # the other domain helps, the odd one misleads


def test_bad_data_gives_one_sentence(capsys):
    make_run()
    plain_folder("a", {"x": 220, "y": 30})
    plain_folder("b", {"x": 220, "z": 30})
    plain_folder("d/one", {"x": 220, "y": 30})
    image_folder("t")
    os.makedirs("empty/x")
    shutil.copytree("t/train/a", "bare")
    image_folder("one", n=1)
    open("nothing.txt", "w").close()
    before = sorted(glob.glob("**", recursive=True))
    for argv, words in ((["--train-data", "a", "--test-data", "b"], ("a and b", "y", "z")), (["--train-data", "a"], ("--test-data",)), (["--domains", "d"], ("--domains d", "1 domains")),
                        (["--domains", "none"], ("--domains none",)), (["--domains", "d", "--protocol", "sigma"], ("--domains", "sigma")), (["--data", "t", "--domains", "d"], ("choose one",)),
                        (["--data", "empty"], ("empty",)), (["--data", "bare"], ("bare",)), ([], ("--data",)), (["--data", "t", "--on", "embedding"], ("--on embedding", "projector")),
                        (["--data", "t", "--protocol", "fewshot"], ("--way 5",)), (["--data", "t", "--protocol", "sigma"], ("--task-size 64",)),
                        (["--data", "t", "--protocol", "finetune", "--label-list", "none.txt"], ("--label-list none.txt",)), (["--data", "t", "--label-fraction", "2"], ("'2'",)),
                        (["--data", "t", "--protocol", "adaptation", "--overlay", "q"], ("--overlay q", "eval.json")), (["--data", "a"], ("--data a", "--train-data")),
                        (["--train-data", "a", "--test-data", "a"], ("have images in common",)), (["--domains", "t", "--sweep"], ("--sweep",)), (["--data", "t", "--k", "99", "--protocol", "knn"], ("--k",)),
                        (["--data", "t", "--protocol", "finetune", "--label-list", "nothing.txt"], ("lists no image",)), (["--data", "t", "--protocol", "finetune", "--label-list", "r/backbone.pt"], ("text",)),
                        (["--data", "t", "--protocol", "adaptation", "--task-size", "16"], ("--task-size 16", "two")), (["--data", "one", "--sweep", "--protocol", "linear"], ("--sweep",))):
        err = stops(["r", *argv], capsys)
        assert all(word in err for word in words), err
        shutil.rmtree("r/features", ignore_errors=True)                                 # computed before a protocol refuses
        assert sorted(glob.glob("**", recursive=True)) == before


def test_images_are_brought_to_the_size_of_the_run():
    """A run on larger images is evaluated at its own size, tensors and files alike."""
    make_run(size=48)
    seen = []
    image_folder("d", size=(20, 20))
    backbone = eval_linear.load_run("r")[0]
    backbone.register_forward_hook(lambda net, inputs, out: seen.append(tuple(inputs[0].shape[1:])))
    images = common.load_data("d").train
    x, _ = common.extract_features(backbone, images, 48, (0.5,) * 3, (0.25,) * 3, 0, torch.device("cpu"))
    y, _ = common.extract_features(backbone, common.fit(images, 48), 48, (0.5,) * 3, (0.25,) * 3, 0, torch.device("cpu"))
    assert set(seen) == {(3, 48, 48)} and torch.equal(x, y)


def test_only_the_features_that_a_protocol_needs_are_computed(monkeypatch):
    make_run()
    calls, real = [], eval_linear.extract_features
    monkeypatch.setattr(eval_linear, "extract_features", lambda *args: calls.append(len(args[1])) or real(*args))
    folder = image_folder("d", n=40)
    for protocol, images in (("sigma adaptation conflict", []), ("pca spectrum distance-ratio", [80]), ("knn", [80])):
        calls.clear()
        eval_linear.main(["r", "--data", folder, "--task-size", "16", "--k", "1", "--protocol", *protocol.split()])
        assert calls == images, protocol


def test_overlays_of_other_data_or_settings_are_refused(capsys):
    make_run()
    make_run("q", seed=1)
    for name in ("d", "e"):
        image_folder(name, n=40)
    eval_linear.main(["q", "--data", "d", "--protocol", "adaptation", "spectrum", "--task-size", "16"])
    capsys.readouterr()
    assert "no adaptation of its present weights on d with the same settings" in stops(["r", "--data", "d", "--protocol", "adaptation", "--task-size", "16", "--inner-lr", "0.2", "--overlay", "q"], capsys)
    assert "spectrum.json is of d, not of e" in stops(["r", "--data", "e", "--protocol", "spectrum", "--overlay", "q"], capsys)
    shutil.copy("r/backbone.pt", "q/backbone.pt")                                               # the run went on after its evaluation
    assert "weights that it has no more" in stops(["r", "--data", "d", "--protocol", "spectrum", "--overlay", "q"], capsys)
    assert "present weights" in stops(["r", "--data", "d", "--protocol", "adaptation", "--task-size", "16", "--overlay", "q"], capsys)


def test_rows_of_other_weights_go_and_rows_of_other_classes_stay():
    make_run()
    folder = image_folder("d", classes="abc", n=6)
    with open("list", "w") as file:
        file.write("a\nb")
    evaluate = lambda *extra: eval_linear.main(["r", "--data", folder, "--protocol", "knn", "--k", *extra])
    evaluate("1", "2")
    evaluate("1", "--classes", "list")
    assert sorted((r["metric"], r["train_images"]) for r in results() if "cosine" in r["metric"]) == [("k1_cosine", 12), ("k1_cosine", 18), ("k2_cosine", 18)]
    make_run("q", seed=1)
    shutil.copy("q/backbone.pt", "r/backbone.pt")
    evaluate("1")
    assert {r["metric"] for r in results()} == {"k1_euclidean", "k1_cosine"} and len({r["weights"] for r in results()}) == 1 and len(results()) == 2


def test_classes_of_the_run_hold_for_its_data_however_it_is_written_and_may_be_chosen():
    make_run()
    folder = image_folder("d", classes="abc", n=4)
    with open("list", "w") as file:
        file.write("a\nc")
    eval_linear.main(["r", "--data", folder, "--protocol", "knn", "--k", "1", "--classes", "list"])
    assert {r["train_images"] for r in results()} == {8}
    with open("r/log.jsonl", "w") as file:
        file.write(json.dumps({"settings": {"data": folder, "classes": "list"}}) + "\n")
    eval_linear.main(["r", "--data", "./d/", "--protocol", "knn", "--k", "2"])
    assert {r["train_images"] for r in results() if r["data"] == "./d/"} == {8}


def test_distances_are_of_images_of_every_class_though_files_come_class_by_class(monkeypatch):
    x, seen = torch.arange(12001.0)[:, None].expand(-1, 2).clone(), []
    monkeypatch.setattr(eval_linear, "features", lambda job, part: (x, None))
    monkeypatch.setattr(eval_linear, "distance_ratio", lambda z: seen.append(z) or z[:, 0])
    eval_linear.ratios(types.SimpleNamespace(test=None, projector=None))
    assert len(seen) == 1 and 3000 < len(seen[0]) <= 5000 and seen[0][0, 0] == 0 and seen[0][-1, 0] > 11990


def test_embeddings_are_made_for_those_protocols_only_that_use_them(monkeypatch):
    def projector(h):
        raise AssertionError("the projector was called")
    part = lambda labels: (torch.randn(len(labels), 4, generator=common.rng(0)), labels)
    monkeypatch.setattr(eval_linear, "features", lambda job, part: part)
    args = types.SimpleNamespace(on="representation", k=[1])
    job = types.SimpleNamespace(args=args, domains=None, projector=projector, train=part(torch.arange(20) % 2), test=part(torch.arange(20) % 2))
    assert eval_linear.PROTOCOLS["knn"](job)["k1_euclidean"] == 100
    args.on = "embedding"
    with pytest.raises(AssertionError, match="was called"):
        eval_linear.PROTOCOLS["knn"](job)
    job.projector = lambda h: h.square()
    assert torch.equal(eval_linear.embedding(job, torch.ones(9000, 2) * 3), torch.full((9000, 2), 9.0))


# ---- fine-tuning ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro"])
def test_finetuning_trains_every_weight_of_a_copy(arch, capsys, monkeypatch):
    if arch == "vit_micro":
        torch.manual_seed(0)
        os.makedirs("r")
        common.save("r/backbone.pt", {"arch": arch, "image_size": 20, "small_images": True, "mean": (0.5,) * 3, "std": (0.25,) * 3,
                                      "state_dict": mae_tc2.Encoder(20, 5, *mae_tc2.ARCHS[arch]).state_dict()})
    else:
        make_run()
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 150, "y": 110}, n=32)
    with open("list.txt", "w") as file:
        file.write("\n".join(f"{c}/{i}.png" for c in "xy" for i in range(0, 32, 2)))
    eval_linear.main(["r", "--data", "d", "--protocol", "finetune", "--label-list", "list.txt", "--tune-epochs", "100"])
    assert values("finetune") == {"list_top1": 100, "list_train_top1": 100, "list_images": 32}
    job, extract, tuned = eval_linear.make_job(eval_linear.parse_args(["r", "--data", "d", "--tune-epochs", "2"])), eval_linear.extract_features, {}
    monkeypatch.setattr(eval_linear, "extract_features", lambda net, *rest: tuned.update(net[0].state_dict()) or extract(net, *rest))
    eval_linear.tune(job, job.train.images, job.train.labels, (job.test.images, job.test.labels), 2, 1.0, 1)
    still = [k for k, v in job.backbone.named_parameters() if torch.equal(tuned[k], v)]
    assert len(tuned) > 10 and not still, f"fine-tuning leaves {still} as they were"
    assert all(torch.equal(v, job.frozen[k]) and not v.requires_grad for k, v in job.backbone.state_dict().items())
    eval_linear.main(["r", "--data", "d", "--protocol", "finetune", "--label-fraction", "0.5", "--tune-epochs", "1", "--sweep"])
    assert values("finetune (sweep)")["50%_images"] == 32 and values("finetune (sweep)")["50%_lr_scale"] in eval_linear.TUNE_GRID
    assert capsys.readouterr().out.count("held out") == len(eval_linear.TUNE_GRID)


def test_finetuning_is_judged_on_the_test_folder():
    make_run()
    for split, shades in (("train", {"x": 150, "y": 110}), ("test", {"x": 110, "y": 150})):
        plain_folder(f"d/{split}", shades, n=32)
    eval_linear.main(["r", "--data", "d", "--protocol", "finetune", "--label-fraction", "1", "--tune-epochs", "60"])
    assert values("finetune")["100%_train_top1"] == 100 and values("finetune")["100%_top1"] == 0


@pytest.mark.parametrize("fraction, rates", [(0.01, (1e-4, 0.05)), (0.1, (0.01, 1.0)), (1.0, (0.01, 0.05))])
def test_finetuning_has_the_papers_rates_of_backbone_and_classifier_and_ends_at_zero(fraction, rates, monkeypatch):
    make_run()
    plain_folder("d/train", {"x": 150, "y": 110}, n=64)
    plain_folder("d/test", {"x": 150, "y": 110}, n=4)
    opts, real = [], torch.optim.SGD
    class Recorded(real):
        def __init__(self, groups, **kw):
            super().__init__(groups, **kw)
            self.seen, self.sizes = [], [sum(p.numel() for p in g["params"]) for g in self.param_groups]
            assert kw == {"momentum": 0.9}
            opts.append(self)
        def step(self, *a):
            self.seen.append([g["lr"] for g in self.param_groups])
            return super().step(*a)
    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    job = eval_linear.make_job(eval_linear.parse_args(["r", "--data", "d", "--tune-epochs", "8"]))
    eval_linear.tune(job, job.train.images, job.train.labels, (job.test.images, job.test.labels), 2, fraction, 1)
    (opt,) = opts
    assert opt.sizes[0] > 10000 and opt.sizes[1] == 2 * 64 + 2 and len(opt.seen) == 8
    assert opt.seen[0] == pytest.approx([r * 128 / 256 for r in rates]) and opt.seen[4] == pytest.approx([r / 4 for r in rates]) and max(opt.seen[-1]) < 0.04 * max(opt.seen[0])


def test_finetuning_of_a_vit_warms_up_to_its_rate_and_decays_by_layers(monkeypatch):
    opts, real = [], torch.optim.AdamW
    class Recorded(real):
        def __init__(self, groups, **kw):
            super().__init__(groups, **kw)
            self.seen = []
            opts.append(self)
        def step(self, *a):
            self.seen.append(sorted({g["lr"] for g in self.param_groups}))
            return super().step(*a)
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    backbone, state = mae_tc2.Encoder(20, 4, 96, 2, 3), {"image_size": 20, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    job = types.SimpleNamespace(args=types.SimpleNamespace(seed=0, tune_epochs=30, workers=0), state=state, backbone=backbone, width=96, device=torch.device("cpu"), name="d")
    images, labels = torch.zeros(8, 3, 20, 20, dtype=torch.uint8), torch.arange(8) % 2
    eval_linear.tune(job, images, labels, (images, labels), 2, 1.0, 1)
    tops = [lrs[-1] for lrs in opts[0].seen]                                        # norm and head; the patch embedding has 0.75^3 of it
    assert len(tops) == 30 and max(tops) == pytest.approx(1e-3) and tops[0] == pytest.approx(1e-3 / 3) and tops[1] < tops[2] and tops[-1] < 0.01 * tops[3]
    assert all(lrs[0] == pytest.approx(0.75 ** 3 * lrs[-1]) and len(lrs) == 4 for lrs in opts[0].seen)
    assert {g["weight_decay"] for g in opts[0].param_groups} == {0, 0.05}


def test_the_labels_of_finetuning_are_the_same_for_every_seed_and_the_sweep_fits_all_of_them(monkeypatch):
    make_run()
    plain_folder("d/train", {"x": 150, "y": 110}, n=40)
    plain_folder("d/test", {"x": 150, "y": 110}, n=4)
    taken = []
    def tuned(job, images, labels, test, classes, fraction, scale):
        taken.append(images.float().mean((1, 2, 3)).tolist())
        return (F.one_hot(test[1], 2).float(), test[1]), 0.0
    monkeypatch.setattr(eval_linear, "tune", tuned)
    run = lambda *more: (taken.clear(), eval_linear.main(["r", "--data", "d", "--protocol", "finetune", "--label-fraction", "0.25", *more]), list(taken))[2]
    (one,), (other,), swept = run("--seed", "0"), run("--seed", "1"), run("--sweep")
    assert one == other and len(one) == 20
    assert swept[-1] == one and len(swept) == len(eval_linear.TUNE_GRID) + 1 and all(len(s) == 16 for s in swept[:-1])


def test_the_sweep_of_finetuning_takes_the_factor_that_did_best_on_the_held_out_images(monkeypatch):
    make_run()
    plain_folder("d/train", {"x": 150, "y": 110}, n=20)
    plain_folder("d/test", {"x": 150, "y": 110}, n=4)
    for best in eval_linear.TUNE_GRID:
        def tuned(job, images, labels, test, classes, fraction, scale):
            right = test[1] if scale == best else 1 - test[1]
            return (F.one_hot(right, 2).float(), test[1]), 0.0
        monkeypatch.setattr(eval_linear, "tune", tuned)
        eval_linear.main(["r", "--data", "d", "--protocol", "finetune", "--label-fraction", "1", "--sweep"])
        assert values("finetune (sweep)")["100%_lr_scale"] == best


@pytest.mark.parametrize("n, batch", [(200, 200), (257, 128), (500, 250), (511, 255), (512, 256), (5000, 250)])
def test_an_epoch_of_finetuning_sees_nearly_all_labels(n, batch, monkeypatch):
    seen = []
    def views(data, recipes, size, batch_size, seed, rank, world, device, workers, start, stop, labelled):
        seen.append((batch_size, stop))
        assert [r["flip"] for r in recipes] == [0.5] and recipes[0]["crop"] == (0.2, 1.0)
        return iter(())
    monkeypatch.setattr(eval_linear, "training_views", views)
    monkeypatch.setattr(eval_linear, "extract_features", lambda *args: (torch.zeros(1, 2), torch.tensor([0])))
    make_run()
    backbone, state, _ = eval_linear.load_run("r")
    job = types.SimpleNamespace(args=types.SimpleNamespace(seed=0, tune_epochs=3, workers=0), state=state, backbone=backbone, width=64, device=torch.device("cpu"), name="d")
    eval_linear.tune(job, torch.zeros(n, 3, 20, 20, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), (None, torch.tensor([0])), 2, 0.1, 1)
    assert seen == [(batch, 3 * (n // batch))] and n - n // batch * batch <= 2


def test_labels_go_with_their_images_whatever_the_order_and_the_bad_files(monkeypatch):
    monkeypatch.setattr(common, "BAD_FRACTION", 1)
    files = [f"{c}/{i}.png" for c in "ab" for i in range(6)]
    plain_folder("d", {"a": 250, "b": 5}, n=6)
    with open("d/a/5.png", "wb") as file:                     # its successor is of the other class
        file.write(b"no")
    recipe = dict(simclr_tc2.AUGMENTATION["small"][0], jitter_p=0, mean=(0,) * 3, std=(1,) * 3, gray_p=0)
    labels = torch.arange(12) // 6
    images = torch.stack([torch.full((3, 20, 20), 250 - 245 * int(y), dtype=torch.uint8) for y in labels])
    for source in (images, ["d/" + f for f in files]):
        data, seen = common.Data("d", source, labels, [], None, 20), []
        for (x,), y in common.training_views(data, [recipe], 20, 5, 3, 0, 1, torch.device("cpu"), 0, 0, 6, labelled=True):
            assert torch.equal((x.mean((1, 2, 3)) < 0.5).long(), y)
            seen += y.tolist()
        assert set(seen) == {0, 1} and len(seen) == 30


def test_sigma_pairs_the_views_of_an_image_and_takes_the_temperature_from_other_tasks(monkeypatch):
    make_run()
    folder, given, real = image_folder("d", n=40), [], eval_linear.calibrate_temperature
    def twins(job, part, count):
        for t in range(count):
            x = torch.randn(16, 3, 20, 20, generator=common.rng(t)).to(job.device if job else "cpu")
            yield [x, x]
    monkeypatch.setattr(eval_linear, "task_views", twins)
    monkeypatch.setattr(eval_linear, "calibrate_temperature", lambda tasks: given.extend(tasks) or real(tasks))
    eval_linear.main(["r", "--data", folder, "--protocol", "sigma", "--task-size", "16"])
    assert values("sigma")["representation_accuracy"] == 100
    job = eval_linear.make_job(eval_linear.parse_args(["r", "--data", folder]))
    with torch.no_grad():
        tasks = [job.backbone(torch.cat(views)).unflatten(0, (2, -1)) for views in twins(job, None, 4)]
    assert len(given) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(given, tasks[2:]))


def test_fewshot_is_judged_on_queries_under_the_right_names(monkeypatch):
    args = types.SimpleNamespace(shot=[2], way=3, queries=4, episodes=30, seed=1)
    x, y = torch.randn(60, 5, generator=common.rng(0)), torch.arange(60) % 5
    x = x + 0.8 * F.one_hot(y, 5)
    seen = eval_linear.fewshot((x, y), args)
    support, query = eval_linear.few_shot_episodes(y, 3, 2, 4, 30, 1)
    x = F.normalize(x, dim=1)
    centroid = [[(x[q] - x[s].mean(1)).norm(dim=1).argmin().item() == c for c, row in enumerate(qs) for q in row] for s, qs in zip(support, query)]
    assert seen["3way_2shot_centroid"] == pytest.approx(100 * sum(map(sum, centroid)) / 360, abs=1e-3)
    logistic = eval_linear.logistic_regression(x[support], x[query])[0]
    assert seen["3way_2shot_logistic"] == pytest.approx(logistic.mean().item(), abs=1e-3) and seen["3way_2shot_logistic"] != seen["3way_2shot_centroid"]


# ---- adaptation, conflict -------------------------------------------------------------------------------------------
def test_adaptation_descends_on_its_task_and_compares_two_runs(capsys):
    for name, seed in (("r", 0), ("q", 1)):
        make_run(name, seed=seed)
    folder = image_folder("d", n=40)
    eval_linear.main(["q", "--data", folder, "--protocol", "adaptation", "--task-size", "16", "--inner-lr", "0"])
    still = values("adaptation", "q")
    assert still["before"] == still["after"]
    eval_linear.main(["q", "--data", folder, "--protocol", "adaptation", "--task-size", "16"])
    eval_linear.main(["r", "--data", folder, "--protocol", "adaptation", "--task-size", "16", "--overlay", "q"])
    found = values("adaptation")
    assert found["r_q"] == pytest.approx(values("adaptation", "q")["after"] / found["after"], rel=1e-3) and found["after"] != found["before"]
    assert found["loss_after"] < found["loss_before"] - 1e-4                                    # it descends
    capsys.readouterr()
    eval_linear.main(["r", "--data", folder, "--protocol", "adaptation", "--task-size", "16", "--inner-lr", "30"])
    assert "--inner-lr 30 is too long" in capsys.readouterr().out and values("adaptation")["loss_after"] > found["loss_before"]


def test_conflict_is_one_of_equal_halves(monkeypatch):
    make_run()
    folder = image_folder("d", n=40)
    real = eval_linear.task_views
    monkeypatch.setattr(eval_linear, "task_views", lambda *a: ([torch.cat([v[:8], v[:8]]) for v in views] for views in real(*a)))
    eval_linear.main(["r", "--data", folder, "--protocol", "conflict", "--task-size", "16"])
    found = values("conflict")
    assert found["cosine"] == pytest.approx(1, abs=1e-3) and found["negative_share"] == 0


# ---- other people's tools -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("resnet18", 40), ("resnet50", 112)])
def test_loading_recipe_of_the_readme_gives_the_same_features(arch, size):
    with open(f"{ROOT}/README.md") as file:
        recipe = next(block for block in re.findall(r"```python\n(.*?)```", file.read(), re.S) if "runs/simclr_cifar10" in block)
    make_run("runs/simclr_cifar10", arch, size)
    saved = torch.load("runs/simclr_cifar10/backbone.pt", weights_only=True)
    common.save("runs/simclr_cifar10/backbone.pt", saved | {"small_images": size <= common.SMALL})
    scope, x = {"torch": torch, "torchvision": torchvision}, torch.randn(2, 3, size, size)
    exec(recipe, scope)
    with torch.no_grad():
        assert torch.equal(scope["net"].eval()(x), eval_linear.load_run("runs/simclr_cifar10")[0].eval()(x))


def test_detection_recipe_of_the_readme_trains_a_step(monkeypatch):
    """Run the README's own text on a saved ResNet-50, with small images to be quick."""
    with open(f"{ROOT}/README.md") as file:
        recipe = next(block for block in re.findall(r"```python\n(.*?)```", file.read(), re.S) if "detection" in block)
    net = torchvision.models.resnet50()
    net.fc = nn.Identity()
    os.makedirs("runs/simclr_tc2")
    torch.save({"arch": "resnet50", "image_size": 224, "small_images": False, "mean": (0.48, 0.46, 0.41), "std": (0.23, 0.22, 0.23), "state_dict": net.state_dict()}, "runs/simclr_tc2/backbone.pt")
    scope = {"torch": torch, "torchvision": torchvision, "images": [torch.rand(3, 64, 80), torch.rand(3, 72, 64)],
             "targets": [{"boxes": torch.tensor([[4.0, 6, 40, 50]]), "labels": torch.tensor([1])}, {"boxes": torch.tensor([[1.0, 2, 30, 60], [20.0, 8, 60, 40]]), "labels": torch.tensor([2, 1])}]}
    exec(recipe.replace("min_size=800", "min_size=64").replace("max_size=1333", "max_size=96"), scope)
    model = scope["model"]
    body = dict(model.backbone.body.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in body.items() if n.startswith("layer4"))
    assert not torch.equal(body["layer4.2.conv3.weight"], net.layer4[2].conv3.weight) and torch.equal(body["conv1.weight"], net.conv1.weight)     # trained, frozen stem loaded
    torch.testing.assert_close(model.backbone.body.state_dict()["layer2.0.bn1.running_var"], net.state_dict()["layer2.0.bn1.running_var"])


# ---- what a stranger's folders and files do -------------------------------------------------------------------------
@pytest.mark.parametrize("protocol, split", [("linear", "train"), ("fewshot", "test"), ("spectrum", "test"), ("distance-ratio", "test"),
                                             ("sigma", "test"), ("adaptation", "train"), ("conflict", "train")])
def test_every_protocol_looks_at_the_images_it_is_said_to(protocol, split, monkeypatch):
    class Asked(Exception):
        pass
    def ask(job, part, *_):
        raise Asked(part.split)
    for name in ("features", "task_views"):
        monkeypatch.setattr(eval_linear, name, ask)
    make_run()
    with pytest.raises(Asked, match=split):
        eval_linear.main(["r", "--data", "fake", "--protocol", protocol, "--task-size", "8"])


def test_features_are_taken_anew_when_a_file_or_a_label_has_changed(monkeypatch):
    make_run(size=112)
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 250, "y": 5}, n=3)
    took, real = [], eval_linear.extract_features
    monkeypatch.setattr(eval_linear, "extract_features", lambda *args: took.append(len(args[1])) or real(*args))
    run = lambda: (eval_linear.main(["r", "--train-data", "d/train", "--test-data", "d/test", "--protocol", "knn", "--k", "1"]), list(took), took.clear())[1]
    assert run() == [6, 6] and run() == []
    write_png(torch.full((3, 20, 20), 77, dtype=torch.uint8), "d/train/x/0.png")
    os.utime("d/train/x/0.png", (1, 1))
    assert run() == [6]


def test_features_are_taken_anew_when_the_same_images_have_other_labels():
    make_run()
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 250, "y": 5}, n=3)
    run = lambda: (eval_linear.main(["r", "--data", "d", "--protocol", "knn", "--k", "1"]), values("knn"))[1]
    before = run()
    os.rename("d/test/x/2.png", "d/test/y/-.png")             # the last of x becomes the first of y
    after = run()
    assert all(abs(before[k] - after[k] - 100 / 6) < 1e-3 for k in before)


def test_one_folder_under_two_names_is_one(capsys):
    make_run()
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 250, "y": 5}, n=6)
    os.symlink("train", "d/alias")
    for other in ("./d/train", os.path.abspath("d/train"), "d/alias"):
        assert "images in common" in stops(["r", "--train-data", "d/train", "--test-data", other], capsys)
    for name in ("d", "./d", os.path.abspath("d")):
        eval_linear.main(["r", "--data", name, "--protocol", "knn", "--k", "1"])
    assert len(results()) == len({(r["protocol"], r["metric"]) for r in results()}) and {r["data"] for r in results()} == {os.path.abspath("d")}


def test_a_protocol_that_fails_costs_none_of_those_before_it(capsys):
    make_run()
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 250, "y": 5}, n=6)
    stops(["r", "--data", "d", "--protocol", "knn", "fewshot", "--k", "1", "--way", "5"], capsys)
    assert {r["protocol"] for r in results()} == {"knn"}


@pytest.mark.parametrize("spoil", ["arch", "weights", "vit", "log", "eval"])
def test_a_foreign_run_folder_ends_in_a_sentence(spoil, capsys):
    make_run()
    state = torch.load("r/backbone.pt")
    if spoil in ("log", "eval"):
        with open({"log": "r/log.jsonl", "eval": "r/eval.json"}[spoil], "w") as file:
            file.write("{" if spoil == "eval" else "")
    else:
        state |= {"arch": {"arch": "resnet34", "weights": "resnet18", "vit": "vit_b_16"}[spoil]}
        torch.save(state, "r/backbone.pt")
    assert ("eval.json" if spoil == "eval" else "RUN r") in stops(["r", "--data", "fake", "--protocol", "knn"], capsys)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_linked_into_itself_is_refused_and_hidden_folders_are_no_classes(labelled, capsys):
    for split in ("train", "test"):
        plain_folder(f"d/{split}", {"x": 250, "y": 5}, n=3)
        os.makedirs(f"d/{split}/.ipynb_checkpoints")
    assert common.load_data("d").classes == ["x", "y"]
    name = "d" if labelled else "d/train"
    assert len(common.load_data(name).train) == 6
    os.symlink("../x", "d/train/x/again")
    with pytest.raises(SystemExit):
        common.load_data(name)
    assert "same folder" in capsys.readouterr().err
