"""eval_linear.py: each protocol against an oracle, then the program as a user meets it.

A probe is judged by another solver's figures and by what may not matter (scale, offset, test
labels); few-shot classifiers by slow loops and closed forms; random draws by their statistics.
"""
import copy
import json
import math
import os
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import common
import eval_linear
import mae_tc2
from conftest import ROOT, each_script, tiny

close = torch.testing.assert_close
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test has a folder of its own."""
    monkeypatch.chdir(tmp_path)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=common.rng("test", seed), dtype=torch.float64).to(dtype)


def orthonormal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def interleaved(*sizes, unlabelled=0, seed=0):
    """Labels of classes of these sizes, shuffled; -1 = none."""
    labels = [torch.full((n,), c) for c, n in enumerate(sizes)]
    labels = torch.cat([*labels, torch.full((unlabelled,), -1)])
    return labels[torch.randperm(len(labels), generator=common.rng(seed))]


def make_run(out="r", arch="resnet_tiny", size=20, seed=0):
    """A folder with a backbone of random weights."""
    torch.manual_seed(seed)
    os.makedirs(out)
    if arch == "vit_micro":
        backbone = mae_tc2.Encoder(size, 5, *mae_tc2.ARCHS[arch])
    else:
        backbone, _ = common.make_backbone(arch, size)
    common.save(f"{out}/backbone.pt",
                {"arch": arch, "image_size": size, "small_images": size <= common.SMALL,
                 "mean": (0.5,) * 3, "std": (0.25,) * 3, "state_dict": backbone.state_dict()})
    return out


def grey_images(path, levels, n=8):
    """Class folders {name: grey level} of n images with a little noise."""
    for name, level in levels.items():
        os.makedirs(f"{path}/{name}")
        for i in range(n):
            noise = torch.randint(-5, 5, (3, 20, 20), generator=common.rng(name, i))
            image = (noise + level).clamp(0, 255).byte().permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(f"{path}/{name}/{i}.png")


def data_folder(path="d", train=None, test=None, n=8):
    grey_images(f"{path}/train", train or {"x": 150, "y": 110}, n)
    grey_images(f"{path}/test", test or train or {"x": 150, "y": 110}, n)
    return path


def evaluate(*argv):
    eval_linear.main([*argv, "--device", "cpu", "--workers", "0"])


def results(out="r"):
    with open(f"{out}/eval.json") as file:
        return json.load(file)


def values(protocol, out="r"):
    return {row["metric"]: row["value"] for row in results(out) if row["protocol"] == protocol}


def stops(capsys, *argv):
    """The one sentence with which the program refuses."""
    with pytest.raises(SystemExit) as stopped:
        evaluate(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def fake_job(train, test, **flags):
    """What a protocol asks for: features and labels (and which images they are of)."""
    known = {"train": (*train, torch.arange(len(train[0]))),
             "test": (*test, torch.arange(len(test[0])))}
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    flags = {"seed": 0, "probe_epochs": 500, "k": [5, 200], **flags}
    return types.SimpleNamespace(features=known.get, args=types.SimpleNamespace(**flags),
                                 classes=classes, writable=False, device=CPU)


# ---- linear --------------------------------------------------------------------------------------
# LogisticRegression(C=1, tol=1e-8) of scikit-learn 1.9 on features that StandardScaler has seen.
SCIKIT_LEARN = {500: 64.08, 2000: 74.20, 10000: 78.28}


def synthetic(n, seed):
    """Ten overlapping classes: correlated features of very different scales and offsets."""
    fixed = np.random.default_rng(0)
    centres = 0.55 * fixed.normal(size=(10, 64))
    mix = fixed.normal(size=(64, 64)) / 8
    scale = np.exp(fixed.normal(size=64))

    g = np.random.default_rng(seed)
    y = np.arange(n) % 10
    noise = g.normal(size=(n, 64)) @ mix + 0.8 * g.normal(size=(n, 64))
    x = (0.6 * centres[y] + noise) * scale + 2 * scale
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


@pytest.mark.parametrize("n", SCIKIT_LEARN)
def test_linear_has_scikit_learns_accuracy_at_every_scale_and_offset(n):
    x, y = synthetic(n, n)
    test_x, test_y = synthetic(5000, 99)
    for scale, offset in ((1, 0), (0.05, 0), (20, 0), (1, 30)):
        job = fake_job((x * scale + offset, y), (test_x * scale + offset, test_y))
        found = eval_linear.linear(job)
        assert abs(found["top1"] - SCIKIT_LEARN[n]) < 0.2
        assert found["top1"] < found["top5"] and found["top1"] < found["train_top1"]


@pytest.mark.parametrize("n", SCIKIT_LEARN)
def test_the_figures_are_scikit_learns(n):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = synthetic(n, n)
    test_x, test_y = synthetic(5000, 99)
    mean = x.double().mean(0)
    std = x.double().std(0, correction=0)
    model = linear_model.LogisticRegression(C=1, tol=1e-8, max_iter=10000)
    model.fit(((x - mean) / std).numpy(), y.numpy())
    accuracy = 100 * model.score(((test_x - mean) / std).numpy(), test_y.numpy())
    assert abs(accuracy - SCIKIT_LEARN[n]) < 0.1


@pytest.mark.parametrize("penalty", [1, 30])
def test_logistic_regression_is_at_its_minimum_whatever_the_chunks(penalty, monkeypatch):
    """The gradient of sum CE + c ||W||^2 / 2 is (pi - Y)^T x + c W; sum (pi - Y) for the bias."""
    x = randn(90, 5) + 1
    y = (2 * x[:, 0] + randn(90, seed=1)).round().long() % 3
    for chunk in (7, 16384):
        monkeypatch.setattr(eval_linear, "CHUNK", chunk)
        W, b = eval_linear.fit_logistic(x, y, 3, penalty)
        error = (x @ W.T + b).softmax(1) - F.one_hot(y, 3)
        size = (F.one_hot(y, 3).double().T @ x).norm()
        assert (error.T @ x + penalty * W).norm() < 1e-3 * size
        assert error.sum(0).norm() < 1e-3 * size


def test_logistic_regression_goes_on_until_it_is_at_the_minimum():
    """Features that are nearly the same take many iterations. Newton's method has the minimum."""
    x = 20 * randn(300, 1) + randn(300, 30, seed=1) * 10 ** torch.linspace(-2, 1, 30)
    y = (x @ randn(30, seed=2) + 5 * randn(300, seed=3) > 0).long()
    flat = torch.zeros(62, dtype=torch.float64)

    def objective(flat):
        W = flat.view(2, 31)
        logits = F.pad(x, (0, 1), value=1) @ W.T
        return F.cross_entropy(logits, y, reduction="sum") + W[:, :-1].square().sum() / 2

    for _ in range(20):
        hessian = torch.autograd.functional.hessian(objective, flat)
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
    assert torch.autograd.functional.jacobian(objective, flat).norm() < 1e-6
    W, b = eval_linear.fit_logistic(x, y, 2)
    found = objective(torch.cat([W, b[:, None]], 1).flatten())
    assert 0 <= found / objective(flat) - 1 < 1e-5


def wide_features(n, seed):
    """Ten classes that 100 features in sum tell apart, each alone badly."""
    centres = torch.randn(10, 100, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 10
    return 0.25 * centres[y] + randn(n, 100, seed=seed, dtype=torch.float32), y


def test_the_penalty_is_chosen_on_images_that_the_probe_has_not_seen(capsys):
    """50 images of a class for 100 features: a weak penalty fits all of them, and loses."""
    x, y = wide_features(500, 1)
    test = wide_features(5000, 2)
    weak = eval_linear.linear(fake_job((x, y), test))
    assert "50 images of a class for 100 features" in capsys.readouterr().out
    tuned = eval_linear.linear_tuned(fake_job((x, y), test))
    assert not capsys.readouterr().out
    assert weak["train_top1"] == 100 and tuned["penalty"] >= 100
    assert tuned["top1"] > weak["top1"] + 4 and tuned["train_top1"] < 100

    # Written out: the same tenth, every penalty.
    held = torch.zeros(500, dtype=torch.bool)
    held[eval_linear.balanced_subset(y, 0.1, 0)] = True
    z = (x - x.mean(0)) / x.std(0, correction=0)
    scores = {}
    for penalty in eval_linear.PENALTIES:
        W, b = eval_linear.fit_logistic(z[~held], y[~held], 10, penalty)
        scores[penalty] = ((z[held] @ W.T + b).argmax(1) == y[held]).float().mean().item()
    assert held.sum() == 50 and scores[tuned["penalty"]] == max(scores.values())

    x, y = wide_features(20_000, 3)                 # enough images: nothing is said
    eval_linear.linear(fake_job((x, y), test))
    assert not capsys.readouterr().out


def test_a_feature_that_does_not_vary_changes_nothing():
    x, y = synthetic(300, 1)
    test_x, test_y = synthetic(300, 2)
    without = eval_linear.linear(fake_job((x, y), (test_x, test_y)))
    constant = torch.full((300, 1), 0.1)
    noisy = constant * (1 + 1e-7 * randn(300, 1, dtype=torch.float32))
    wide = torch.cat([x, noisy, constant], 1)
    test_wide = torch.cat([test_x, constant, noisy], 1)
    assert eval_linear.linear(fake_job((wide, y), (test_wide, test_y))) == without


def adam_written_out(x, y, classes, epochs, seed, batch):
    """Cross-entropy with weight decay 5e-6, the rate falls from 1e-2 to 1e-6 over the epochs."""
    torch.manual_seed(seed)
    first = nn.Linear(x.shape[1], classes)
    theta = torch.cat([first.weight, first.bias[:, None]], 1).detach().double()
    m = torch.zeros_like(theta)
    v = torch.zeros_like(theta)
    t = 0
    x = F.pad(x, (0, 1), value=1)
    for epoch in range(epochs):
        lr = 10 ** (-2 - 4 * epoch / max(1, epochs - 1))
        order = torch.randperm(len(x), generator=common.rng(seed, epoch))
        for start in range(0, len(x), batch):
            rows = order[start:start + batch]
            theta.requires_grad_()
            loss = F.cross_entropy(x[rows] @ theta.T, y[rows]) + 2.5e-6 * theta.square().sum()
            gradient, = torch.autograd.grad(loss, theta)
            theta = theta.detach()
            t += 1
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient ** 2
            m_hat = m / (1 - 0.9 ** t)
            v_hat = v / (1 - 0.999 ** t)
            theta = theta - lr * m_hat / (v_hat.sqrt() + 1e-8)
    return theta[:, :-1], theta[:, -1]


@pytest.mark.parametrize("n, epochs, batch", [(21, 6, 8), (21, 1, 8), (1100, 2, 1000)])
def test_linear_adam_is_the_papers_protocol_written_out(n, epochs, batch):
    x = randn(n, 6) + 1
    y = torch.arange(n) % 4
    found = eval_linear.fit_adam(x, y, 4, epochs, 3, batch)
    close(found, adam_written_out(x, y, 4, epochs, 3, batch), rtol=1e-7, atol=1e-9)
    if batch == 1000:
        close(eval_linear.fit_adam(x, y, 4, epochs, 3), found)


def clusters(n, spread=0.3, seed=0):
    y = torch.arange(n) % 6
    x = 4 * torch.eye(6, 12)[y] + spread * randn(n, 12, seed=seed, dtype=torch.float32)
    return x, y


def test_linear_judges_an_image_whatever_other_images_are_tested():
    """A test set of one class: standardised by itself, its images would be spread over all."""
    x, y = clusters(600)
    test_x, test_y = clusters(300, seed=1)
    one = test_y == 0
    job = fake_job((x, y), (test_x[one], test_y[one]))
    assert job.classes == 6
    assert eval_linear.linear(job)["top1"] == 100


def test_linear_adam_sees_the_features_as_they_are(monkeypatch):
    x, y = clusters(60)
    x = 7 * x + 3
    seen = []
    fit_adam = eval_linear.fit_adam

    def spy(features, *others):
        seen.append(features.clone())
        return fit_adam(features, *others)

    monkeypatch.setattr(eval_linear, "fit_adam", spy)
    eval_linear.linear_adam(fake_job((x, y), (x, y), probe_epochs=1))
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("probe", [eval_linear.linear, eval_linear.linear_adam])
def test_a_probe_is_full_on_separable_classes_and_chance_on_random_labels(probe):
    x, y = clusters(600)
    test_x, test_y = clusters(300, seed=1)
    found = probe(fake_job((x, y), (test_x, test_y)))
    assert found == {"top1": 100, "top5": 100, "train_top1": 100}
    y = interleaved(*[100] * 6)
    test_y = interleaved(*[50] * 6, seed=1)
    chance = probe(fake_job((x, y), (test_x, test_y)))
    assert abs(chance["top1"] - 100 / 6) < 4 * 100 * (5 / 36 / 300) ** 0.5


@pytest.mark.parametrize("probe", [eval_linear.linear, eval_linear.linear_adam])
def test_test_labels_change_the_score_and_nothing_else(probe):
    train = clusters(300, spread=2.0)
    x, y = clusters(200, spread=2.0, seed=1)
    a = probe(fake_job(train, (x, y), probe_epochs=20))
    b = probe(fake_job(train, (x, y.flip(0)), probe_epochs=20))
    assert a["top1"] != b["top1"]
    assert a["train_top1"] == b["train_top1"]


@pytest.mark.parametrize("classes", [3, 5, 6, 9])
def test_accuracies_by_sorting(classes):
    logits = randn(200, classes)
    y = torch.arange(200) % classes
    order = logits.argsort(1, descending=True).tolist()
    rank = [classes_by_logit.index(c) for classes_by_logit, c in zip(order, y.tolist())]
    found = eval_linear.accuracies(logits, y)
    assert found["top1"] == pytest.approx(sum(r < 1 for r in rank) / 2)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        assert found["top5"] == pytest.approx(sum(r < 5 for r in rank) / 2)


# ---- nearest neighbours --------------------------------------------------------------------------
def test_knn_is_both_protocols_of_the_monitor_for_every_k(capsys):
    centres = 0.5 * randn(3, 5)
    y = torch.arange(60) % 3
    test_y = torch.arange(90) % 3
    x = (centres[y] + randn(60, 5, seed=1).exp()).float()
    test_x = (centres[test_y] + randn(90, 5, seed=2).exp()).float()
    found = eval_linear.knn(fake_job((x, y), (test_x, test_y), k=[1, 7, 200]))
    want = {}
    for metric in ("euclidean", "cosine"):
        for k in (1, 7):
            want[f"k{k}_{metric}"] = common.knn_accuracy(x, y, test_x, test_y, k, metric)
    assert found == pytest.approx(want)
    assert len(set(want.values())) == 4
    assert "only k = [1, 7], there are only 60" in capsys.readouterr().out


def test_neighbours_are_drawn_in_order_and_framed_by_their_class(monkeypatch):
    make_run()
    data_folder(train={"x": 150, "y": 110}, test={"x": 140, "y": 120}, n=3)
    drawn = {}

    def keep(path, rows, title):
        assert title == "d"
        drawn.update(rows)

    monkeypatch.setattr(eval_linear, "draw_grid", keep)
    evaluate("r", "--data", "d", "--protocol", "knn", "--k", "1")
    job = eval_linear.Job(parsed("r", "--data", "d"))
    x, y, _ = job.features("train")
    queries, test_y, _ = job.features("test")
    green = (0.1, 0.75, 0.1)
    red = (0.9, 0.1, 0.1)
    assert list(drawn) == ["x", "y"]
    for c, pictures in enumerate(drawn.values()):
        i = test_y.tolist().index(c)
        order = (x - queries[i]).norm(dim=1).argsort()[:5].tolist()
        assert torch.equal(pictures[0, :, 1:-1, 1:-1], job.test.images[i] / 255)
        assert torch.equal(pictures[1:, :, 1:-1, 1:-1], job.train.images[order] / 255)
        frames = [(1, 1, 1), *(green if y[j] == c else red for j in order)]
        close(pictures[:, :, 0, 0], torch.tensor(frames))
        assert {y[j].item() for j in order} == {0, 1}


def parsed(*argv):
    return eval_linear.parse_args([*argv, "--device", "cpu", "--workers", "0"])


# ---- few-shot episodes ---------------------------------------------------------------------------
@pytest.mark.parametrize("way, shot, queries", [(5, 1, 15), (3, 5, 4), (6, 2, 14)])
def test_an_episode_has_different_classes_and_disjoint_images(way, shot, queries):
    labels = interleaved(16, 20, 40, 16, 15, 3, 17, 30)     # classes 4 and 5 may be too small
    support, query = eval_linear.few_shot_episodes(labels, way, shot, queries, 40, 0)
    assert support.shape == (40, way, shot) and query.shape == (40, way, queries)
    for s, q in zip(support, query):
        images = torch.cat([s, q], 1).flatten().tolist()
        assert len(set(images)) == way * (shot + queries)
        classes = labels[s[:, :1]]
        assert (labels[s] == classes).all() and (labels[q] == classes).all()
        assert len(set(classes.flatten().tolist())) == way
    usable = [c for c, n in enumerate(labels.bincount()) if n >= shot + queries]
    assert labels[support].unique().tolist() == usable


def test_episodes_are_a_function_of_the_seed_alone():
    labels = interleaved(20, 20, 20, 20)
    first = eval_linear.few_shot_episodes(labels, 3, 1, 5, 8, 0)
    torch.manual_seed(99)
    close(eval_linear.few_shot_episodes(labels, 3, 1, 5, 8, 0), first)
    other = eval_linear.few_shot_episodes(labels, 3, 1, 5, 8, 1)
    assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])
    assert len({tuple(episode.flatten().tolist()) for episode in first[1]}) == 8


def test_episodes_draw_every_class_and_every_image_equally_often():
    labels = interleaved(6, 12, 30, 4, 12, 12)                  # class 3 has too few images
    support, query = eval_linear.few_shot_episodes(labels, 3, 1, 4, 1500, 0)
    drawn = labels[support].flatten().bincount(minlength=6)
    per_class = 1500 * 3 / 5
    assert drawn[3] == 0
    for c in (0, 1, 2, 4, 5):
        assert abs(drawn[c] / per_class - 1) < 0.12             # deviation of a fair draw: 2 %
        for index, each in ((support, 1), (query, 4)):
            counts = index.flatten().bincount(minlength=len(labels))[labels == c]
            mean = per_class * each / len(counts)
            assert (counts - mean).abs().max() < 5.5 * mean ** 0.5 + 0.05 * mean


def test_too_few_usable_classes_are_refused_and_just_enough_are_not(capsys):
    labels = interleaved(10, 10, 9, 30)
    assert eval_linear.few_shot_episodes(labels, 3, 4, 6, 2, 0)[0].shape == (2, 3, 4)
    with pytest.raises(SystemExit):
        eval_linear.few_shot_episodes(labels, 4, 4, 6, 2, 0)
    assert "--way 4: only 3 classes have 4 + 6 test images" in capsys.readouterr().err


@pytest.mark.parametrize("way", [2, 5])
def test_features_without_information_give_chance(way):
    """A query among the support would lift it."""
    x = F.normalize(randn(2400, 16), dim=1)
    labels = interleaved(*[60] * 40)
    episodes = eval_linear.few_shot_episodes(labels, way, 3, 5, 800, 0)
    support, query = (x[index] for index in episodes)
    logistic, _ = eval_linear.logistic_regression(support, query, 30)
    for accuracy in (eval_linear.nearest_centroid(support, query), logistic):
        assert abs(accuracy.mean() - 100 / way) < 3


def test_the_interval_covers_the_mean_in_about_95_of_100_repeats():
    labels = torch.arange(400) % 10
    x = 0.8 * randn(10, 4, seed=1)[labels] + randn(400, 4)
    parts = []
    for seed in range(160):
        s, q = eval_linear.few_shot_episodes(labels, 3, 1, 3, 40, seed)
        parts.append(eval_linear.nearest_centroid(x[s], x[q]))
    truth = torch.cat(parts).mean().item()
    intervals = [eval_linear.interval(part) for part in parts]
    covered = sum(abs(mean - truth) <= half for mean, half in intervals) / len(parts)
    assert 40 < truth < 90 and 0.89 <= covered <= 0.993


@pytest.mark.parametrize("numbers, mean, half", [
    ([1.0, 2.0, 3.0, 4.0], 2.5, 1.96 * (5 / 3) ** 0.5 / 2), ([40.0, 60.0], 50, 19.6)])
def test_an_interval_by_hand(numbers, mean, half):
    assert eval_linear.interval(torch.tensor(numbers)) == pytest.approx((mean, half), rel=1e-6)


def slow_centroid(support, query):
    """Percent of the queries whose nearest class mean is their own."""
    way = len(support)
    right = 0
    for c in range(way):
        for q in query[c]:
            distances = [((q - support[k].mean(0)) ** 2).sum().item() for k in range(way)]
            right += distances.index(min(distances)) == c
    return 100 * right / (way * query.shape[1])


@pytest.mark.parametrize("way, shot, queries", [(5, 1, 3), (3, 4, 6)])
def test_nearest_centroid_equals_a_loop(way, shot, queries):
    centres = 0.8 * randn(5, way, 1, 4)
    support = centres + randn(5, way, shot, 4, seed=1)
    query = centres + randn(5, way, queries, 4, seed=2)
    slow = [slow_centroid(s, q) for s, q in zip(support, query)]
    assert eval_linear.nearest_centroid(support, query).tolist() == pytest.approx(slow)
    assert 30 < sum(slow) / 5 < 95


def newton(support, query):
    """Logits of the minimum of sum CE + ||W||^2 / 2 of one episode, by Newton's method."""
    way, shot, _ = support.shape
    x = F.pad(support.flatten(0, 1), (0, 1), value=1)
    q = F.pad(query.flatten(0, 1), (0, 1), value=1)
    y = torch.arange(way).repeat_interleave(shot)

    def objective(W):
        W = W.view(way, -1)
        return F.cross_entropy(x @ W.T, y, reduction="sum") + W.square().sum() / 2

    W = torch.zeros(way * x.shape[1], dtype=torch.float64)
    for _ in range(7):
        hessian = torch.autograd.functional.hessian(objective, W)
        W = W - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(objective, W))
    assert torch.autograd.functional.jacobian(objective, W).norm() < 1e-9
    return q @ W.view(way, -1).T


def positive(*shape, seed=0):
    """Unit rows with a common mean, as after a ReLU: the bias matters."""
    return F.normalize(randn(*shape, seed=seed).abs() + 0.5, dim=-1)


@pytest.mark.parametrize("way, shot", [(2, 1), (3, 2), (5, 5)])
def test_few_shot_regression_reaches_newtons_minimum(way, shot):
    centres = randn(2, way, 1, 6).abs()
    support = F.normalize(centres + positive(2, way, shot, 6, seed=1), dim=-1)
    query = F.normalize(centres + positive(2, way, 3, 6, seed=2), dim=-1)
    want = torch.stack([newton(s, q) for s, q in zip(support, query)])
    truth = torch.arange(way).repeat_interleave(3)
    right = 100 * (want.argmax(2) == truth).double().mean(1)

    accuracy, logits = eval_linear.logistic_regression(support, query, iterations=2000)
    close(logits, want, rtol=0, atol=1e-6)
    close(accuracy.double(), right, rtol=1e-5, atol=0)
    _, logits = eval_linear.logistic_regression(support.float(), query.float())
    close(logits, want.float(), rtol=0, atol=2e-3)


def test_few_shot_regression_permutes_with_classes_and_ignores_other_queries():
    support = positive(3, 4, 2, 5)
    query = positive(3, 4, 3, 5, seed=1)
    order = [2, 0, 3, 1]
    accuracy, logits = eval_linear.logistic_regression(support, query)
    turn = orthonormal(5, seed=3)
    turned = eval_linear.logistic_regression(support @ turn, query @ turn)[1]
    close(turned, logits, rtol=0, atol=1e-3)

    logits = logits.view(3, 4, 3, 4)
    same, other = eval_linear.logistic_regression(support[:, order], query[:, order])
    close(same, accuracy, rtol=0, atol=1e-3)
    close(other.view(3, 4, 3, 4), logits[:, order][..., order], rtol=0, atol=1e-3)
    alone = eval_linear.logistic_regression(support[1:2], query[1:2, :, :1])[1]
    close(alone, logits[1:2, :, 0], rtol=0, atol=1e-3)


def test_fewshot_is_judged_on_normalised_test_features_under_the_right_names():
    y = torch.arange(60) % 5
    x = (randn(60, 5) + 0.8 * F.one_hot(y, 5)) * randn(60, 1, seed=1).exp()
    job = fake_job((x, y), (x, y), shot=[2], way=3, queries=4, episodes=230, seed=1)
    found = eval_linear.fewshot(job)
    support, query = eval_linear.few_shot_episodes(y, 3, 2, 4, 230, 1)
    x = F.normalize(x, dim=1)
    centroid = [slow_centroid(x[s], x[q]) for s, q in zip(support, query)]
    assert found["3way_2shot_centroid"] == pytest.approx(np.mean(centroid), abs=1e-3)
    half = 1.96 * np.std(centroid, ddof=1) / 230 ** 0.5
    assert found["3way_2shot_centroid_pm"] == pytest.approx(half, rel=1e-3)
    logistic, _ = eval_linear.logistic_regression(x[support], x[query])
    assert found["3way_2shot_logistic"] == pytest.approx(logistic.mean().item(), abs=1e-3)
    assert found["3way_2shot_logistic"] != found["3way_2shot_centroid"]


# ---- spectrum ------------------------------------------------------------------------------------
def test_eigenvalues_of_a_known_covariance():
    x = randn(100_000, 3) * torch.tensor([3.0, 1, 0])
    found = eval_linear.eigenvalues(x @ orthonormal(3, seed=1) + 5)
    close(found, torch.tensor([9.0, 1, 0]).double(), rtol=0.03, atol=1e-9)


def test_spectrum_is_of_the_test_features_and_draws_other_runs(monkeypatch, capsys):
    make_run()
    make_run("q", seed=1)
    data_folder(test={"x": 30, "y": 250}, n=30)
    drawn = {}

    def keep(path, panels):
        drawn.update(panels)

    monkeypatch.setattr(eval_linear, "draw_spectra", keep)
    evaluate("r", "--data", "d", "--protocol", "spectrum", "--overlay", "q")
    assert "60 images have at most 59 eigenvalues above zero, of 64" in capsys.readouterr().out
    curves = drawn["representation, d"]
    assert list(curves) == ["r", "q"]
    for run, found in curves.items():
        x, _, _ = eval_linear.Job(parsed(run, "--data", "d")).features("test")
        singular = torch.linalg.svdvals((x - x.mean(0)).double())
        close(found[:60], singular[:60] ** 2 / 59, rtol=1e-3, atol=1e-6 * found[0].item())
        if run == "r":
            p = singular / singular.sum()
            rank = math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0))
            assert values("spectrum")["rank"] == pytest.approx(rank, rel=1e-3)
            many = (found > 1e-6 * found[0]).sum().item()
            assert values("spectrum")["above_1e-6"] == many


# ---- fine-tuning ---------------------------------------------------------------------------------
def members_chosen(labels, chosen, c):
    """Which of class c's images, counted within the class, are chosen."""
    chosen = set(chosen.tolist())
    rows = (labels == c).nonzero().flatten().tolist()
    return [rank for rank, i in enumerate(rows) if i in chosen]


@pytest.mark.parametrize("n, fraction, expected", [(5, 0.5, 2), (7, 0.5, 4), (15, 0.1, 2),
                                                   (4, 0.01, 1), (50, 0.3, 15)])
def test_a_share_of_the_labels_is_pythons_round_but_at_least_one_of_every_class(n, fraction,
                                                                                expected):
    labels = interleaved(n, 3 * n, 40)
    chosen = eval_linear.balanced_subset(labels, fraction, 0)
    assert (chosen.diff() > 0).all()
    want = [expected, max(1, round(fraction * (3 * n))), max(1, round(fraction * 40))]
    assert labels[chosen].bincount().tolist() == want


def test_a_smaller_share_lies_in_a_larger_one_and_all_is_all():
    labels = interleaved(3, 17, 60, 101)
    smaller = set()
    for fraction in (0.01, 0.02, 0.1, 0.25, 0.5, 0.9, 1.0):
        chosen = set(eval_linear.balanced_subset(labels, fraction, 3).tolist())
        assert smaller <= chosen
        smaller = chosen
    assert chosen == set(range(181))


def test_the_choice_in_a_class_ignores_other_classes_and_the_global_generator():
    alone = torch.full((40,), 2)
    mixed = interleaved(30, 9, 40, 25)
    want = members_chosen(alone, eval_linear.balanced_subset(alone, 0.25, 5), 2)
    torch.manual_seed(99)
    found = eval_linear.balanced_subset(mixed, 0.25, 5)
    assert len(want) == 10 and members_chosen(mixed, found, 2) == want
    other = eval_linear.balanced_subset(mixed, 0.25, 6)
    assert members_chosen(mixed, other, 2) != want


def test_the_choice_is_a_fair_draw():
    labels = interleaved(20, 20, 20)
    counts = torch.zeros(60)
    for seed in range(500):
        counts[eval_linear.balanced_subset(labels, 0.3, seed)] += 1
    assert counts.min() > 100 and counts.max() < 200        # mean 150, deviation 10
    first = eval_linear.balanced_subset(labels, 0.3, 0)
    assert members_chosen(labels, first, 0) != members_chosen(labels, first, 1)


@pytest.mark.parametrize("depth, decay", [(3, 0.5), (1, 0.75), (2, 1.0)])
def test_rates_of_a_vit_decay_from_the_head_down_and_vectors_are_spared(depth, decay):
    torch.manual_seed(0)
    vit = mae_tc2.Encoder(16, 4, 48, depth, 3)
    head = nn.Linear(48, 5)
    names = {id(p): name for name, p in vit.named_parameters()}
    names |= {id(p): f"head.{name}" for name, p in head.named_parameters()}
    found = set()
    for group in eval_linear.layer_groups(vit, head, 0.1, 0.05, decay):
        for p in group["params"]:
            name = names[id(p)]
            layer = depth + 1
            if name.startswith("blocks."):
                layer = int(name.split(".")[1]) + 1
            elif name.startswith(("patch_embed", "class_token")):
                layer = 0
            assert group["lr"] == pytest.approx(0.1 * decay ** (depth + 1 - layer)), name
            is_matrix = name.endswith("weight") and "norm" not in name
            assert group["weight_decay"] == (0.05 if is_matrix else 0), name
            found.add(name)
    assert found == set(names.values())


class Recorded:
    """Stands before an optimiser's class and writes down its rates at every step."""
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, groups, **flags):
        opt = self.kind(groups, **flags)
        self.flags = flags
        self.sizes = [sum(p.numel() for p in group["params"]) for group in opt.param_groups]
        self.rates = []
        opt.register_step_pre_hook(self.note)
        return opt

    def note(self, opt, *_):
        self.rates.append([group["lr"] for group in opt.param_groups])
        self.decays = {group["weight_decay"] for group in opt.param_groups}


@pytest.mark.parametrize("fraction, backbone, head", [(0.01, 1e-4, 0.05), (0.1, 0.01, 1.0),
                                                      (1.0, 0.01, 0.05), (0.05, 0.01, 1.0)])
def test_a_resnet_is_tuned_at_the_papers_rates_which_fall_to_zero(fraction, backbone, head,
                                                                  monkeypatch):
    make_run()
    data_folder(n=64)
    sgd = Recorded(torch.optim.SGD)
    monkeypatch.setattr(torch.optim, "SGD", sgd)
    job = eval_linear.Job(parsed("r", "--data", "d", "--tune-epochs", "8"))
    eval_linear.tune(job, job.train.images, job.train.labels, fraction)
    assert sgd.flags == {"momentum": 0.9} and sgd.decays == {0}
    assert sgd.sizes[0] > 10000 and sgd.sizes[1] == 2 * 64 + 2
    half = 128 / 256                                            # the batch beside the papers' 256
    assert len(sgd.rates) == 8
    assert sgd.rates[0] == pytest.approx([backbone * half, head * half])
    assert sgd.rates[4] == pytest.approx([backbone * half / 2, head * half / 2])
    assert max(sgd.rates[-1]) < 0.04 * max(sgd.rates[0])


def test_a_vit_warms_up_to_its_rate_and_decays_by_layers(monkeypatch):
    make_run(arch="vit_micro")
    data_folder(n=4)
    adamw = Recorded(torch.optim.AdamW)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    job = eval_linear.Job(parsed("r", "--data", "d", "--tune-epochs", "30"))
    eval_linear.tune(job, job.train.images, job.train.labels, 1.0)
    tops = [max(rates) for rates in adamw.rates]                # norm and head
    assert len(tops) == 30 and max(tops) == pytest.approx(1e-3)
    assert tops[0] == pytest.approx(1e-3 / 3) and tops[1] < tops[2]
    assert tops[-1] < 0.01 * tops[3]
    depth = mae_tc2.ARCHS["vit_micro"][1]
    for rates in adamw.rates:
        assert min(rates) == pytest.approx(0.75 ** (depth + 1) * max(rates))
    assert adamw.decays == {0, 0.05}


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro"])
def test_fine_tuning_trains_every_weight_of_a_copy_and_none_of_the_run(arch):
    make_run(arch=arch)
    data_folder(n=16)
    job = eval_linear.Job(parsed("r", "--data", "d", "--tune-epochs", "2"))
    before = {name: value.clone() for name, value in job.backbone.state_dict().items()}
    net, _ = eval_linear.tune(job, job.train.images, job.train.labels, 1.0)
    for name, p in job.backbone.named_parameters():
        assert not torch.equal(net[0].get_parameter(name), p), f"{name} stays as it was"
        assert not p.requires_grad
    for name, value in job.backbone.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the run has changed"


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro"])
def test_fine_tuning_learns_and_is_judged_on_the_test_images(arch):
    make_run(arch=arch)
    data_folder(test={"x": 110, "y": 150}, n=32)                # the classes change places
    evaluate("r", "--data", "d", "--protocol", "finetune", "--label-fraction", "0.5",
             "--tune-epochs", "60")
    assert values("finetune") == {"50%_top1": 0, "50%_train_top1": 100, "50%_images": 32}


def test_the_labels_of_fine_tuning_are_the_same_for_every_seed(monkeypatch):
    make_run()
    data_folder(n=20)
    taken = []

    def tune(job, images, labels, fraction):
        taken.append((images, labels))
        return nn.Sequential(job.backbone, nn.Linear(64, 2)), 0.0

    monkeypatch.setattr(eval_linear, "tune", tune)
    for seed in ("0", "1"):
        evaluate("r", "--data", "d", "--protocol", "finetune", "--label-fraction", "0.25",
                 "--seed", seed)
    (a, y), (b, _) = taken
    assert torch.equal(a, b) and y.tolist() == [0] * 5 + [1] * 5
    assert (a[:5].float().mean() - 150).abs() < 5 and (a[5:].float().mean() - 110).abs() < 5


@pytest.mark.parametrize("n, batch", [(200, 200), (257, 128), (500, 250), (512, 256), (5000, 250)])
def test_an_epoch_of_fine_tuning_sees_nearly_all_labels(n, batch, monkeypatch):
    make_run()
    data_folder(n=1)
    asked = []

    def batches(data, recipes, settings, rank, world, device, start, stop):
        asked.append((settings.images_per_step, start, stop))
        (recipe,) = recipes
        assert recipe["flip"] == 0.5 and recipe["crop"] == (0.2, 1.0)
        assert recipe["mean"] == (0.5,) * 3 and recipe["jitter_p"] == 0
        yield torch.rand(1, 2, 3, 20, 20), [0, 1]

    def cross_entropy(logits, y):
        assert torch.equal(logits[0], logits[1])        # the classifier starts at zero
        return logits.sum()

    monkeypatch.setattr(eval_linear, "training_batches", batches)
    monkeypatch.setattr(eval_linear.F, "cross_entropy", cross_entropy)
    job = eval_linear.Job(parsed("r", "--data", "d", "--tune-epochs", "1"))
    labels = torch.arange(n) % 2
    eval_linear.tune(job, torch.zeros(n, 3, 20, 20, dtype=torch.uint8), labels, 0.1)
    assert asked == [(batch, 0, n // batch)]
    assert n % batch <= 2


def test_fine_tuning_has_the_seed_and_for_large_images_the_wide_crops(monkeypatch):
    asked = []

    def batches(data, recipes, settings, *others):
        asked.append((recipes[0]["crop"], settings.seed))
        yield torch.rand(1, 2, 3, settings.image_size, settings.image_size), [0, 1]

    monkeypatch.setattr(eval_linear, "training_batches", batches)
    data_folder(n=1)
    for size in (96, 112):
        make_run(f"r{size}", size=size)
        flags = ("--data", "d", "--tune-epochs", "1", "--seed", "3")
        job = eval_linear.Job(parsed(f"r{size}", *flags))
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        eval_linear.tune(job, images, torch.tensor([0, 1]), 0.1)
    assert asked == [((0.2, 1.0), 3), ((0.08, 1.0), 3)]


def test_rows_are_of_these_weights_and_this_preprocessing():
    net = nn.Linear(2, 2)
    state = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    first = eval_linear.weights_hash(net, state)
    assert first == eval_linear.weights_hash(copy.deepcopy(net), dict(state))
    for change in ({"image_size": 33}, {"mean": (0.4,) * 3}, {"std": (0.2,) * 3}):
        assert eval_linear.weights_hash(net, {**state, **change}) != first
    with torch.no_grad():
        net.bias += 1e-6
    assert eval_linear.weights_hash(net, state) != first


def test_labels_go_with_their_images_whatever_the_bad_files(monkeypatch):
    """A net that reads the brightness; one file is broken and the next, of the other class."""
    monkeypatch.setattr(common, "BAD_FRACTION", 1)
    make_run()
    grey_images("a", {"x": 250, "y": 5}, n=6)
    with open("a/x/5.png", "wb") as file:
        file.write(b"no")
    grey_images("b", {"x": 250, "y": 5}, n=2)
    seen = []

    class Bright(nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            bright = x.mean((1, 2, 3)) > 0
            return torch.stack([bright, ~bright], 1) + self.weight

    def cross_entropy(logits, y):
        seen.extend(zip(logits.argmax(1).tolist(), y.tolist()))
        return logits.sum()

    job = eval_linear.Job(parsed("r", "--train-data", "a", "--test-data", "b",
                                 "--tune-epochs", "3"))
    monkeypatch.setattr(eval_linear.nn, "Sequential", Bright)
    monkeypatch.setattr(eval_linear.F, "cross_entropy", cross_entropy)
    _, accuracy = eval_linear.tune(job, job.train.images, job.train.labels, 1.0)
    assert accuracy == 100 and len(seen) == 36
    assert set(seen) == {(0, 0), (1, 1)}


# ---- data from several places --------------------------------------------------------------------
def test_transfer_trains_on_train_and_tests_on_test():
    make_run()
    data_folder("a", train={"x": 220, "y": 30}, test={"x": 30, "y": 220})
    data_folder("b", train={"x": 30, "y": 40}, test={"x": 200, "y": 50}, n=5)
    evaluate("r", "--train-data", "a", "--test-data", "b", "--k", "1", "--probe-epochs", "9")
    assert values("knn")["k1_euclidean"] == values("linear")["top1"] == 100
    assert {row["data"] for row in results()} == {"a -> b"}
    evaluate("r", "--train-data", "a", "--test-data", "a", "--protocol", "knn", "--k", "1")
    assert {row["value"] for row in results() if row["data"] == "a"} == {0}


def test_one_domain_is_left_out_of_several_that_are_joined():
    make_run()
    grey_images("pacs/photo", {"x": 220, "y": 30})
    grey_images("pacs/sketch", {"x": 130, "y": 100})
    grey_images("pacs/art", {"x": 200, "y": 98}, n=5)
    evaluate("r", "--train-data", "pacs/photo", "pacs/sketch", "--test-data", "pacs/art",
             "--protocol", "knn", "--k", "1")
    assert values("knn")["k1_euclidean"] == 100         # x is near one domain, y near the other
    assert results()[0]["data"] == "pacs/photo + pacs/sketch -> pacs/art"


def test_unlabelled_images_are_left_out_of_both_parts(monkeypatch):
    make_run()
    data = common.load_data("fake")
    train_labels = data.train_labels.masked_fill(data.train_labels == 3, -1)
    test_labels = data.test_labels.masked_fill(data.test_labels == 5, -1)

    def load(*_):
        return data._replace(train_labels=train_labels, test_labels=test_labels)

    monkeypatch.setattr(eval_linear, "load_data", load)
    job = eval_linear.Job(parsed("r", "--data", "fake"))
    assert 3 not in job.train.labels and 5 not in job.test.labels
    assert torch.equal(job.train.images, data.train[data.train_labels != 3])
    assert job.classes == 10


def test_features_are_of_the_runs_own_size_and_preprocessing():
    make_run(size=48)
    data_folder()
    job = eval_linear.Job(parsed("r", "--data", "d"))
    x, y, kept = job.features("train")
    images = common.central_square(common.load_data("d").train, 48).float() / 255
    close(x, job.backbone((images - 0.5) / 0.25))
    assert y.tolist() == [0] * 8 + [1] * 8 and kept.tolist() == list(range(16))


def test_features_of_a_vit_are_the_mean_over_its_patch_tokens():
    make_run(arch="vit_micro")
    data_folder()
    job = eval_linear.Job(parsed("r", "--data", "d"))
    x, _, _ = job.features("test")
    tokens = job.backbone.tokens((job.test.images / 255 - 0.5) / 0.25)
    close(x, tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def test_features_are_computed_once_and_only_those_that_are_asked_for(monkeypatch):
    make_run()
    data_folder(n=20)
    computed = []
    real = eval_linear.extract_features

    def extract(*args):
        computed.append(len(args[2]))
        return real(*args)

    monkeypatch.setattr(eval_linear, "extract_features", extract)
    flags = ("--data", "d", "--probe-epochs", "1", "--k", "1", "--way", "2", "--episodes", "2")
    evaluate("r", *flags, "--protocol", "spectrum", "fewshot")
    assert computed == [40]
    evaluate("r", *flags, "--protocol", "linear", "knn", "spectrum")
    assert computed == [40, 40, 40]


@pytest.mark.parametrize("argv, words", [
    ("--train-data a --test-data b", ("a and b", "same classes", "y, z")),
    ("--train-data a b --test-data t", ("a and b", "y, z")),
    ("--train-data a --test-data t", ("a and t", "one of them has a, b, x, y")),
    ("--train-data a fake --test-data a", ("a and fake",)),
    ("--train-data a", ("--test-data", "both")),
    ("--data t --train-data a --test-data a", ("choose one",)),
    ("--train-data a --test-data ./a", ("images are the same",)),
    ("--train-data a --test-data alias", ("images are the same",)),
    ("--data a", ("error: a: training", "images are the same")),
    ("--train-data t --test-data t/train", ("t and t/train", "images are the same")),
    ("--data none", ("none", "no such folder")),
    ("--train-data none --test-data a", ("none", "no such folder")),
    ("--data empty", ("empty", "no image")),
    ("--data bare", ("bare", "no labels")),
    ("", ("--data", "not given")),
    ("--data t --protocol fewshot", ("--way 5", "2 classes")),
    ("--data t --protocol svm", ("svm",)),
    ("--data t --label-fraction 2", ("--label-fraction", "'2'")),
    ("--data t --probe-epochs 0", ("--probe-epochs", "'0'")),
    ("--data t --k 99 --protocol knn", ("--k [99]", "32 training images")),
    ("--data t --overlay nowhere", ("--overlay nowhere",)),
    ("--data t --sweep", ("--sweep",))])
def test_bad_input_ends_in_one_sentence_and_writes_nothing(argv, words, capsys):
    make_run()
    grey_images("a", {"x": 220, "y": 30}, n=2)
    grey_images("b", {"x": 220, "z": 30}, n=2)
    data_folder("t", train={"a": 220, "b": 30}, n=16)
    shutil.copytree("a/x", "bare")
    os.symlink("a", "alias")
    os.makedirs("empty/x")
    error = stops(capsys, "r", *argv.split())
    assert all(word in error for word in words), error
    assert os.listdir("r") == ["backbone.pt"]


@pytest.mark.parametrize("settings, words", [
    ({"data": "photos", "classes": 0}, "r was trained without labels; name a folder with train/"),
    ({"data": "gone", "classes": 2}, "the run's own, gone, is not found from here; name it")])
def test_a_run_whose_data_have_no_labels_or_are_elsewhere_asks_for_data(settings, words, capsys):
    make_run()
    grey_images("photos", {"x": 220, "y": 30}, n=2)
    with open("r/log.jsonl", "w") as file:
        file.write(json.dumps({"settings": settings}) + "\n")
    assert words in stops(capsys, "r")


def test_folders_are_compared_by_what_is_read_from_them():
    """Not file by file: to resolve every one of ImageNet's takes a minute."""
    grey_images("a", {"x": 220, "y": 30}, n=2)
    data_folder("d", n=1)
    os.symlink("a", "alias")
    os.symlink("../a", "d/link")
    real = os.path.realpath
    for name, train, test in (("a", real("a"), real("a")), ("alias", real("a"), real("a")),
                              ("d/link", real("a"), real("a")),
                              ("d", real("d/train"), real("d/test")),
                              ("d/train", real("d/train"), real("d/train"))):
        assert eval_linear.real_folder(name, "train") == train
        assert eval_linear.real_folder(name, "test") == test
    assert eval_linear.real_folder("fake", "train") != eval_linear.real_folder("fake", "test")


@pytest.mark.parametrize("spoil", ["missing", "no arch", "arch", "other weights", "vit"])
def test_a_foreign_run_ends_in_one_sentence(spoil, capsys):
    make_run()
    state = torch.load("r/backbone.pt")
    if spoil == "missing":
        os.remove("r/backbone.pt")
    elif spoil == "no arch":
        torch.save({}, "r/backbone.pt")
    else:
        arch = {"arch": "resnet34", "other weights": "resnet18", "vit": "vit_b_16"}[spoil]
        torch.save({**state, "arch": arch}, "r/backbone.pt")
    assert "RUN r" in stops(capsys, "r", "--data", "fake", "--protocol", "knn")


def test_flags_refuse_nonsense_in_one_sentence(capsys):
    names = ("k", "probe_epochs", "label_fraction", "tune_epochs", "way", "shot", "queries",
             "episodes", "workers", "seed", "device", "protocol")
    assert set(names) < set(vars(parsed("r")))
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        for value in ([f"{flag}=nonsense"], [f"{flag}=nan"], [f"{flag}=-1e9"], [flag]):
            assert flag in stops(capsys, "r", *value)


# ---- results -------------------------------------------------------------------------------------
def test_the_table_the_markdown_row_and_the_file_hold_the_same_numbers(capsys):
    make_run()
    data_folder(train={c: 25 * i for i, c in enumerate("abcdefg")}, n=20)
    evaluate("r", "--data", "d", "--probe-epochs", "3", "--episodes", "9", "--protocol", "linear",
             "fewshot")
    out = capsys.readouterr().out
    head, line, row = out.splitlines()[-3:]
    assert head.count("|") == line.count("|") == row.count("|")
    assert row.startswith("| r | d |") and "±" in row and "_pm" not in out
    for result in results():
        text = eval_linear.as_text(result["value"])
        assert text in row and text in out.split("| run |")[0]
        assert result["protocol"] in head
    assert {row["protocol"] for row in results()} == {"linear", "linear_adam", "fewshot"}


def test_a_home_folder_may_be_written_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    make_run()
    data_folder()
    evaluate("~/r", "--data", "~/d", "--protocol", "knn", "--k", "1")
    assert {row["data"] for row in results()} == {"d"}


def test_a_row_says_how_it_was_made_and_replaces_that_of_the_same_key():
    make_run()
    data_folder()
    for flags in ("knn --k 1", "linear", "linear --seed 1", "linear --seed 1", "knn --k 2"):
        evaluate("r", "--data", "d", "--probe-epochs", "2", "--protocol", *flags.split())
    found = {}
    for row in results():
        assert set(row) == {"protocol", "metric", "value", "settings", "data", "command",
                            "weights"}
        found[row["protocol"], row["metric"], row["settings"].get("seed")] = row
    assert len(found) == len(results())
    assert {metric for protocol, metric, _ in found if protocol == "knn"} == {
        "k1_euclidean", "k1_cosine", "k2_euclidean", "k2_cosine"}
    assert ("linear_adam", "top1", 0) in found
    row = found["linear_adam", "top1", 1]
    assert row["settings"] == {"probe_epochs": 2, "seed": 1}
    assert "--protocol linear --seed 1" in row["command"]
    assert row["command"].startswith("eval_linear.py r --data d")
    assert found["linear", "top1", None]["settings"] == {}


def test_one_folder_under_several_names_is_one():
    make_run()
    data_folder()
    for name in ("d", "./d", "d/", os.path.abspath("d")):
        evaluate("r", "--data", name, "--protocol", "knn", "--k", "1")
    assert len(results()) == 2 and {row["data"] for row in results()} == {"d"}


def test_rows_of_other_weights_go_and_of_other_data_stay():
    make_run()
    data_folder("d")
    data_folder("e", train={"x": 20, "y": 60})
    for name in "de":
        evaluate("r", "--data", name, "--protocol", "knn", "--k", "1", "2")
    assert len(results()) == 8
    make_run("q", seed=1)
    shutil.copy("q/backbone.pt", "r/backbone.pt")               # the run went on
    evaluate("r", "--data", "d", "--protocol", "knn", "--k", "1")
    assert [row["metric"] for row in results()] == ["k1_euclidean", "k1_cosine"]


@pytest.mark.parametrize("text", ["{", '{"results": []}', "3", "[3]", '[{"protocol": "knn"}]'])
def test_a_damaged_or_foreign_file_is_refused_before_anything_is_measured(text, capsys):
    make_run()
    data_folder()
    with open("r/eval.json", "w") as file:
        file.write(text)
    assert "r/eval.json" in stops(capsys, "r", "--data", "d", "--protocol", "knn", "--k", "1")
    assert open("r/eval.json").read() == text and len(os.listdir("r")) == 2


def test_labels_go_by_the_names_of_classes_whatever_their_order():
    """A label is a place in a list of names, and two lists may differ in their order."""
    first = eval_linear.Part(torch.zeros(3, 3, 8, 8), torch.tensor([2, 0, 1]), ["disc", "box", "b"])
    part = eval_linear.Part(torch.zeros(4, 3, 8, 8), torch.tensor([0, 2, -1, 1]),
                            ["b", "box", "disc"])
    found = eval_linear.in_order_of(first, part, "d and e")
    assert found.classes == first.classes
    assert [found.classes[i] for i in found.labels[[0, 1, 3]]] == ["b", "disc", "box"]
    assert found.labels[2] == -1 and found.images is part.images

    # The drawn shapes are not in alphabetical order, folders are.
    x, y = common.draw_shapes(40, 5)
    for i, (image, label) in enumerate(zip(x, y)):
        folder = f"shp/{common.SHAPES[label]}"
        os.makedirs(folder, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{i}.png")
    args = types.SimpleNamespace(train_data=["shapes"], test_data=["shp"], data=None, workers=0)
    train, test, _ = eval_linear.load_parts(args, 32)
    assert train.classes == test.classes == common.SHAPES
    names = [os.path.basename(os.path.dirname(path)) for path in test.images]
    assert [test.classes[label] for label in test.labels] == names

    args = types.SimpleNamespace(train_data=["shp", "shp2"], test_data=["shapes"], data=None,
                                 workers=0)
    os.rename("shp/moon", "moon")
    os.makedirs("shp2")
    for name in common.SHAPES:
        if name != "moon":
            os.symlink(f"../shp/{name}", f"shp2/{name}")
    os.symlink("../moon", "shp2/moon")
    os.symlink("../moon", "shp/moon")
    _, test, _ = eval_linear.load_parts(args, 32)
    assert test.classes == sorted(common.SHAPES)
    wanted = common.load_data("shapes")
    assert [test.classes[i] for i in test.labels] == [common.SHAPES[i] for i in wanted.test_labels]


def test_class_names_of_any_bytes_and_with_dollars_stand_in_the_picture():
    make_run()
    names = (os.fsdecode(b"\xfe"), "a$\\frac$")
    data_folder("d", train=dict(zip(names, (150, 110))))
    evaluate("r", "--data", "d", "--protocol", "knn", "spectrum", "--k", "1")
    assert {row["protocol"] for row in results()} == {"knn", "spectrum"}
    assert os.path.exists("r/neighbours.png")


def test_one_test_image_has_no_spectrum(capsys):
    x = torch.rand(1, 4)
    job = fake_job((x, torch.tensor([0])), (x, torch.tensor([0])), overlay=[])
    with pytest.raises(SystemExit):
        eval_linear.spectrum(job)
    assert "at least two test images" in capsys.readouterr().err


def test_a_protocol_that_fails_costs_none_of_those_before_it(monkeypatch, capsys):
    def failing(job):
        common.fail("out of luck")

    make_run()
    data_folder()
    monkeypatch.setitem(eval_linear.PROTOCOLS, "spectrum", failing)
    stops(capsys, "r", "--data", "d", "--protocol", "knn", "spectrum", "--k", "1")
    assert {row["protocol"] for row in results()} == {"knn"}


def test_what_another_evaluation_has_written_meanwhile_is_kept(monkeypatch):
    """Fine-tuning takes hours: k-NN is measured beside it, on another GPU."""
    make_run()
    data_folder()

    def long_protocol(job):
        evaluate("r", "--data", "d", "--protocol", "knn", "--k", "1")
        return {"number": 1}

    monkeypatch.setitem(eval_linear.PROTOCOLS, "spectrum", long_protocol)
    evaluate("r", "--data", "d", "--protocol", "spectrum")
    assert {row["protocol"] for row in results()} == {"knn", "spectrum"}


def test_a_share_of_labels_is_kept_before_the_next_one_is_tuned(monkeypatch):
    make_run()
    data_folder()
    tune = eval_linear.tune
    kept = []

    def fails_on_the_second(job, images, labels, fraction):
        if fraction == 1:
            kept.extend(results())
            raise KeyError
        return tune(job, images, labels, fraction)

    monkeypatch.setattr(eval_linear, "tune", fails_on_the_second)
    with pytest.raises(KeyError):
        evaluate("r", "--data", "d", "--protocol", "finetune", "--label-fraction", "0.5", "1",
                 "--tune-epochs", "1")
    assert {row["metric"].split("_")[0] for row in kept} == {"50%"} and kept == results()


def test_several_processes_are_refused(monkeypatch, capsys):
    make_run()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "start it without torchrun" in stops(capsys, "r", "--data", "d")


def test_too_few_images_for_episodes_are_found_before_anything_is_measured(capsys):
    make_run()
    data_folder()
    sentence = stops(capsys, "r", "--data", "d", "--protocol", "knn", "fewshot", "--k", "1")
    assert "--way 5" in sentence and "lower --way, --shot or --queries" in sentence
    assert not os.path.exists("r/eval.json")


def test_a_read_only_run_is_shown_and_not_kept(monkeypatch, capsys):
    make_run()
    data_folder()

    def access(path, mode):
        return path != "r"

    monkeypatch.setattr(os, "access", access)
    evaluate("r", "--data", "d", "--protocol", "knn", "spectrum", "--k", "1")
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "nothing is kept: r is read-only"
    assert "k1_euclidean" in out and "neighbours.png" not in out
    assert os.listdir("r") == ["backbone.pt"]


@pytest.mark.parametrize("name", ["0.1.running_mean", "1.conv1.weight"])
def test_a_protocol_that_changes_the_backbone_ends_the_evaluation(name, monkeypatch):
    make_run()
    data_folder()

    def spoil(job):
        job.backbone.state_dict()[name].add_(1e-6)
        return {"x": 1}

    monkeypatch.setitem(eval_linear.PROTOCOLS, "knn", spoil)
    with pytest.raises(AssertionError, match="knn has changed the backbone"):
        evaluate("r", "--data", "d", "--protocol", "knn")
    assert not os.path.exists("r/eval.json")


# ---- runs ----------------------------------------------------------------------------------------
@each_script
def test_every_protocol_on_a_run_of_every_script(name):
    """It leaves pictures and results, and the run's files as they were."""
    __import__(name).main(tiny(name, "--out", "r", "--max-steps", "1", "--device", "cpu"))
    kept = {}
    for file in ("backbone.pt", "last.pt", "log.jsonl"):
        with open(f"r/{file}", "rb") as opened:
            kept[file] = opened.read()
    evaluate("r", "--protocol", *eval_linear.PROTOCOLS, "--probe-epochs", "2", "--tune-epochs", "1",
             "--label-fraction", "0.1", "1", "--episodes", "20", "--shot", "1", "--queries", "3")
    assert {row["protocol"] for row in results()} == set(eval_linear.PROTOCOLS)
    assert {row["data"] for row in results()} == {"fake"}
    labels = common.load_data("fake").train_labels
    tenth = sum(round(0.1 * n) for n in labels.bincount().tolist())
    found = values("finetune")
    assert (found["10%_images"], found["100%_images"]) == (tenth, 512)
    for picture in ("neighbours", "spectrum"):
        assert np.asarray(Image.open(f"r/{picture}.png")).std() > 10
    for file, content in kept.items():
        with open(f"r/{file}", "rb") as opened:
            assert opened.read() == content


def test_a_detector_trains_with_the_recipe_of_the_page():
    """results/scale.md's own text, on a saved ResNet-50, with small images to be quick."""
    with open(f"{ROOT}/results/scale.md") as file:
        blocks = re.findall(r"```python\n(.*?)```", file.read(), re.S)
    (recipe,) = [block for block in blocks if "detection" in block]
    net = torchvision.models.resnet50()
    net.fc = nn.Identity()
    os.makedirs("runs/simclr_tc2")
    torch.save({"arch": "resnet50", "mean": (0.48, 0.46, 0.41), "std": (0.23, 0.22, 0.23),
                "state_dict": net.state_dict()}, "runs/simclr_tc2/backbone.pt")
    boxes = torch.tensor([[4.0, 6, 40, 50], [20, 8, 60, 40]])
    targets = [{"boxes": boxes[:1], "labels": torch.tensor([1])},
               {"boxes": boxes, "labels": torch.tensor([2, 1])}]
    scope = {"torch": torch, "torchvision": torchvision, "targets": targets,
             "images": [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]}
    recipe = recipe.replace("min_size=800", "min_size=64").replace("max_size=1333", "max_size=96")
    exec(recipe, scope)

    body = scope["model"].backbone.body
    assert not torch.equal(body.layer4[2].conv3.weight, net.layer4[2].conv3.weight)     # trained
    assert torch.equal(body.conv1.weight, net.conv1.weight)                 # loaded, and frozen
    close(body.layer2[0].bn1.running_var, net.layer2[0].bn1.running_var)
