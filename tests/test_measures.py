"""results/measures.py: the papers' own measures against slow loops, closed forms and invariances.

A measure that cannot be wrong in a visible way needs an oracle more than a loss does: what it is
under collapse, on a simplex, on equal halves, and after a turn of the features.
"""
import importlib.util
import json
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import simclr_tc2
from conftest import ROOT, each_script, tiny

spec = importlib.util.spec_from_file_location("measures", f"{ROOT}/results/measures.py")
measures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measures)

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test has a folder of its own."""
    monkeypatch.chdir(tmp_path)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=common.rng("test", seed), dtype=torch.float64)


def orthonormal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def task(n, d, noise, count=1, seed=0):
    """Tasks (count, 2, n, d): two noisy views, each with an offset of its own."""
    images = randn(count, 1, n, d, seed=seed)
    offset = 2 + randn(2, 1, d, seed=seed + 2)
    return images + noise * randn(count, 2, n, d, seed=seed + 1) + offset


def measure(*argv):
    measures.main([*argv, "--device", "cpu", "--workers", "0"])


def parsed(*argv):
    return measures.parse_args([*argv, "--device", "cpu", "--workers", "0"])


def values(protocol, out="r"):
    with open(f"{out}/eval.json") as file:
        rows = json.load(file)
    return {row["metric"]: row["value"] for row in rows if row["protocol"] == protocol}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(name, out, seed) leaves a run of one step in `out`; each is made once and copied."""
    made = {}

    def leave(name="simclr_tc2", out="r", seed=0):
        if (name, seed) not in made:
            made[name, seed] = str(tmp_path_factory.mktemp("runs") / f"{name}{seed}")
            argv = tiny(name, "--out", made[name, seed], "--max-steps", "1", "--seed", str(seed))
            __import__(name).main([*argv, "--device", "cpu"])
        shutil.copytree(made[name, seed], out)

    return leave


# ---- sigma ---------------------------------------------------------------------------------------
def slow_logits(h, temperature):
    """Rows: the views; columns: the images of the other view."""
    _, n, d = h.shape
    mean = h.flatten(0, 1).mean(0)
    logits = []
    for v in range(2):
        for i in range(n):
            a = h[v, i] - mean
            row = []
            for j in range(n):
                b = h[1 - v, j] - mean
                row.append((a @ b / (a.norm() * b.norm() * temperature)).item())
            logits.append(row)
    return torch.tensor(logits, dtype=h.dtype)


def slow_sigma(tasks, temperature):
    losses = []
    for h in tasks:
        for i, row in enumerate(slow_logits(h, temperature).tolist()):
            own = row[i % h.shape[1]]
            losses.append(math.log(sum(math.exp(x - own) for x in row)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n, temperature", [(3, 1.0), (5, 0.1)])
def test_sigma_and_accuracy_equal_slow_loops(n, temperature):
    tasks = task(n, 4, 1.0, count=3)
    close(measures.pair_logits(tasks[0], temperature), slow_logits(tasks[0], temperature))
    found = measures.sigma(tasks, temperature).item()
    assert found == pytest.approx(slow_sigma(tasks, temperature))
    right = 0
    for h in tasks:
        nearest = slow_logits(h, temperature).argmax(1).tolist()
        right += sum(j == i % n for i, j in enumerate(nearest))
    accuracy = measures.instance_accuracy(tasks).item()
    assert accuracy == pytest.approx(100 * right / (6 * n), rel=1e-5) and 0 < accuracy < 95


def test_logits_ignore_origin_scale_and_rotation_and_follow_views_and_images():
    h = task(5, 4, 0.5)[0]
    order = [3, 0, 4, 1, 2]
    want = measures.pair_logits(h, 0.2)
    close(measures.pair_logits(3 * h @ orthonormal(4) + randn(4), 0.2), want)
    close(measures.pair_logits(h, 0.4), want / 2)
    close(measures.pair_logits(h.flip(0), 0.2), want.roll(5, 0))
    permuted = measures.pair_logits(h[:, order], 0.2).view(2, 5, 5)
    close(permuted, want.view(2, 5, 5)[:, order][:, :, order])

    # The views have one mean, not one each.
    apart = torch.stack([h[0], h[1] + 10])
    assert (measures.pair_logits(apart, 1.0) < -0.5).all()


def test_logits_of_a_row_at_the_mean_are_zero_and_finite():
    h = torch.tensor([[[0.0, 0], [2, 1]], [[-2, 0], [0, -1]]])
    logits = measures.pair_logits(h, 0.5)
    close(logits[0], torch.zeros(2))
    close(logits[2:, 0], torch.zeros(2))
    assert logits.isfinite().all() and logits[1:, 1].abs().min() > 0


@pytest.mark.parametrize("n", [2, 4, 7])
def test_sigma_of_collapse_is_log_n_and_of_a_simplex_has_a_closed_form(n):
    collapsed = randn(5).expand(3, 2, n, 5)
    assert measures.sigma(collapsed, 0.1).item() == pytest.approx(math.log(n))

    # Centred orthonormal rows have cosines of -1 / (n - 1).
    simplex = (2 * orthonormal(8)[:n] + 1).expand(2, 2, n, 8)
    for temperature in (0.2, 1.0):
        gap = math.exp(-n / (n - 1) / temperature)
        found = measures.sigma(simplex, temperature).item()
        assert found == pytest.approx(math.log1p((n - 1) * gap))
    assert 0 <= measures.sigma(simplex, 0.01).item() < 1e-9
    assert measures.instance_accuracy(simplex) == 100
    swapped = torch.stack([simplex[:, 0], simplex[:, 1].roll(1, 1)], 1)
    assert measures.instance_accuracy(swapped) == 0


def test_sigma_is_minus_log_pi_of_the_true_class_as_in_the_worked_example(monkeypatch):
    """pi = (0.81, 0.09, 0.03, 0.07) for image 0 [GeSSL Appendix B.1]: -ln 0.81 = 0.2107."""
    pi = torch.tensor([0.81, 0.09, 0.03, 0.07], dtype=torch.float64)

    def logits(h, temperature):
        rows = [pi.roll(image) for image in range(4)] * 2       # of both views of each image
        return torch.stack(rows).log() / temperature

    monkeypatch.setattr(measures, "pair_logits", logits)
    found = measures.sigma(torch.zeros(3, 2, 4, 5), 1.0)
    assert found.item() == pytest.approx(0.2107, abs=1e-4)


@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_the_temperature_is_the_best_of_the_grid(noise):
    tasks = task(6, 8, noise, count=4)
    grid = measures.TEMPERATURES
    assert grid[0] == pytest.approx(0.01) and grid[-1] == 1 and grid == sorted(grid)
    found = measures.best_temperature(tasks)
    assert found in grid
    slow = {temperature: slow_sigma(tasks, temperature) for temperature in grid}
    assert slow[found] <= min(slow.values()) + 1e-12


def test_sigma_pairs_views_and_takes_the_temperature_from_other_tasks(train, monkeypatch):
    train()
    seen = []
    real = measures.best_temperature

    def noisy_twins(job, split, count):
        assert split == "test"
        for t in range(count):
            a, noise = torch.randn(2, 16, 3, 8, 8, generator=common.rng(t))
            yield torch.stack([a, a + 0.5 * noise])

    def spied(tasks):
        seen.append(torch.stack(tasks))
        return real(tasks)

    monkeypatch.setattr(measures, "task_views", noisy_twins)
    monkeypatch.setattr(measures, "best_temperature", spied)
    measure("r", "--measure", "sigma", "--task-size", "16")
    found = values("sigma")
    assert found["log_n"] == pytest.approx(math.log(16), rel=1e-5)

    # Eight tasks: the first four are judged, at the temperature of the others.
    job = measures.MeasureJob(parsed("r"))
    with torch.no_grad():
        images = torch.stack(list(noisy_twins(job, "test", 8)))         # (8, 2, 16, 3, 8, 8)
        h = job.backbone(images.flatten(0, 2)).unflatten(0, (8, 2, 16))
        spaces = {"representation": h, "embedding": job.projector(h)}
    for tasks, (space, z) in zip(seen, spaces.items()):
        close(tasks, z[4:], rtol=1e-4, atol=1e-5)
        temperature = found[f"{space}_temperature"]
        assert temperature == pytest.approx(real(z[4:]), rel=1e-5)
        want = measures.sigma(z[:4], temperature).item()
        assert found[space] == pytest.approx(want, rel=1e-4)
        accuracy = measures.instance_accuracy(z[:4]).item()
        assert found[f"{space}_accuracy"] == pytest.approx(accuracy, rel=1e-4)


def test_tasks_are_pairs_of_views_of_different_images_of_the_right_part(train, monkeypatch):
    train()
    job = measures.MeasureJob(parsed("r", "--task-size", "16"))
    (a, b), *_ = measures.task_views(job, "test", 2)
    assert a.shape == (16, 3, 8, 8) and not torch.equal(a, b)

    # Without augmentation both views are the test images themselves, in some order.
    plain = {"crop": (1, 1), "ratio": (1, 1), "flip": 0, "jitter": (0,) * 4, "jitter_p": 0,
             "gray_p": 0, "blur_p": 0, "solarize_p": 0}
    monkeypatch.setitem(measures.AUGMENTATION, "small", plain)
    (a, b), (c, _) = measures.task_views(job, "test", 2)
    close(a, b)
    images = common.normalize(job.test.images / 255, job.state)
    distance = torch.cdist(torch.cat([a, c]).flatten(1), images.flatten(1))
    assert distance.min(1).values.max() < 0.05
    assert len(set(distance.argmin(1).tolist())) == 32


# ---- adaptation ----------------------------------------------------------------------------------
def write_log(out, per_epoch, curve, batch=64, **more):
    """A log with the accuracies of `curve` {epoch: (before, after)}."""
    os.makedirs(out, exist_ok=True)
    if os.path.exists(f"{out}/last.pt"):                # these settings make no projector
        os.remove(f"{out}/last.pt")
    settings = {"images": per_epoch * batch + 3, "images_per_step": batch, "data": "fake",
                "script": "simclr_tc2", "tasks": 4, "views": 4, "inner_lr": 0.01,
                "batch_size": batch, **more}
    rows = [{"settings": settings}, {"step": 0, "knn5": 1.0}]
    for epoch, (before, after) in curve.items():
        rows.append({"step": epoch * per_epoch, "knn5": 1.0, "adapted_before": before,
                     "adapted_after": after})
    with open(f"{out}/log.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_adaptation_is_read_from_the_logs_and_r_is_the_baselines_share():
    """The figures of GeSSL's Table 15; the two runs have other numbers of steps an epoch."""
    simclr = {20: 20.1, 40: 43.6, 60: 51.2, 80: 60.2}
    gessl = {20: 41.9, 40: 66.3, 60: 82.1, 100: 93.4}
    write_log("base", 10, {epoch: (5.0, after) for epoch, after in simclr.items()})
    write_log("ours", 7, {epoch: (after - 1, after) for epoch, after in gessl.items()}, batch=32)
    curve = measures.adaptation_curve("ours")
    assert curve == {epoch: (after - 1, after) for epoch, after in gessl.items()}
    ratio = measures.performance_ratio(measures.adaptation_curve("base"), curve)
    assert list(ratio) == [20, 40, 60]
    # The paper prints 0.479, 0.657, 0.623.
    assert list(ratio.values()) == pytest.approx([0.4797, 0.6576, 0.6236], abs=1e-4)


def test_adaptation_of_a_run_is_its_last_and_is_drawn(train):
    train(out="r")
    train(out="q")
    write_log("r", 8, {1: (50.0, 60.0), 2: (70.0, 80.0)})
    write_log("q", 8, {1: (10.0, 30.0), 2: (20.0, 40.0)})
    measure("r", "--measure", "adaptation", "--overlay", "q")
    assert values("adaptation") == {"before": 70, "after": 80, "r_q": 0.5}
    assert np.asarray(Image.open("r/adaptation.png")).std() > 10


@pytest.mark.parametrize("mine, theirs, refused", [
    ({}, {"views": 2}, "('SimCLR', 2, 16, 0.01) there and ('SimCLR', 4, 16, 0.01) in r"),
    ({}, {"tasks": 1}, None),                   # without tasks `diagnose` takes four
    ({}, {"tasks": 2}, "('SimCLR', 4, 32, 0.01) there"),
    ({}, {"inner_lr": 0.1}, "('SimCLR', 4, 16, 0.1) there"),
    ({"script": "byol_gessl", "batch_size": 16}, {"script": "byol_gessl"}, "('BYOL', 2, 64, 0.01)"),
    ({"script": "byol_gessl"}, {"script": "byol_gessl", "tasks": 1}, None),
    ({}, {"script": "mae_tc2"}, "q: is no run of simclr_tc2.py or byol_gessl.py")])
def test_the_performance_ratio_is_of_equal_tasks(mine, theirs, refused, train, capsys):
    """A view among more images, or with more right neighbours, has another accuracy by itself."""
    train(out="r")
    train(out="q")
    write_log("r", 8, {1: (50.0, 60.0)}, **mine)
    write_log("q", 8, {1: (20.0, 30.0)}, **theirs)
    if refused is None:
        measure("r", "--measure", "adaptation", "--overlay", "q")
        assert values("adaptation")["r_q"] == 0.5
        return
    with pytest.raises(SystemExit):
        measure("r", "--measure", "adaptation", "--overlay", "q")
    assert refused in capsys.readouterr().err


def test_a_run_of_another_program_says_that_its_representation_alone_is_measured(train, capsys):
    train()
    settings = json.loads(open("r/log.jsonl").readline())["settings"]
    with open("r/log.jsonl", "w") as file:
        file.write(json.dumps({"settings": {**settings, "script": "tc2_support"}}) + "\n")
    measure("r", "--measure", "spectrum")
    assert "r/last.pt is of tc2_support: the representation alone" in capsys.readouterr().out
    assert not [name for name in values("spectrum") if name.startswith("embedding")]


@pytest.mark.parametrize("spoil, word", [("run", "r: its log has no adapted_after"),
                                         ("overlay", "q: its log has no adapted_after"),
                                         ("epochs", "--overlay q: has no evaluation")])
def test_logs_without_an_adaptation_end_in_one_sentence(spoil, word, train, capsys):
    train(out="r")
    train(out="q")
    write_log("r", 8, {} if spoil == "run" else {1: (50.0, 60.0)})
    write_log("q", 8, {} if spoil == "overlay" else {2: (50.0, 60.0)})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        measure("r", "--measure", "adaptation", "--overlay", "q")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and word in error


# ---- conflict ------------------------------------------------------------------------------------
def conflict_of(views, monkeypatch):
    """The rows of a run whose tasks are all `views`."""
    def same_views(job, split, count):
        assert split == "train"
        return [views] * count

    monkeypatch.setattr(measures, "task_views", same_views)
    measure("r", "--measure", "conflict", "--task-size", "16")
    return values("conflict")


def test_conflict_of_equal_halves_is_none(train, monkeypatch):
    train()
    half = torch.randn(2, 8, 3, 8, 8, generator=common.rng(0))
    found = conflict_of(torch.cat([half, half], dim=1), monkeypatch)
    assert found["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["cosine_pm"] < 1e-4 and found["negative_share"] == 0


@pytest.mark.parametrize("name", ["simclr_tc2", "byol_gessl", "barlow_sparsehead"])
def test_conflict_is_the_cosine_of_the_halves_gradients_of_info_nce(name, train, monkeypatch):
    """Written out: positives are the two views, batch statistics, the run's own projector."""
    train(name)
    views = torch.randn(2, 16, 3, 8, 8, generator=common.rng(0))
    found = conflict_of(views, monkeypatch)

    job = measures.MeasureJob(parsed("r"))
    net = job.backbone.requires_grad_().train()
    job.projector.train()
    gradients = []
    for half in (views[:, :8], views[:, 8:]):
        z = F.normalize(job.projector(net(half.flatten(0, 1))), dim=1)
        similarity = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        partner = torch.arange(16).roll(8)
        loss = F.cross_entropy(similarity, partner)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    assert found["cosine"] == pytest.approx(cosine, abs=1e-4)
    assert found["negative_share"] == float(cosine < 0)


# ---- spectrum and distances ----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["simclr_tc2", "byol_gessl", "barlow_sparsehead"])
def test_spectra_are_those_of_the_representation_and_of_what_the_projector_makes_of_it(
        name, train, monkeypatch):
    train(name)
    train(name, "q", seed=1)
    drawn = {}

    def keep(path, panels):
        drawn.update(panels)

    monkeypatch.setattr(measures, "draw_spectra", keep)
    measure("r", "--measure", "spectrum", "--overlay", "q")
    assert list(drawn) == ["representation", "embedding"]

    script = __import__(name)
    with open("r/log.jsonl") as file:
        settings = json.loads(file.readline())["settings"]
    nets = script.build_nets(types.SimpleNamespace(**settings)).eval()
    nets.load_state_dict(torch.load("r/last.pt", weights_only=True)["nets"])
    saved = torch.load("r/backbone.pt", weights_only=True)
    images = common.load_data("fake", 8).test
    with torch.no_grad():
        h = nets["backbone"](common.normalize(images / 255, saved))
        spaces = {"representation": h, "embedding": nets["projector"](h)}
    for space, x in spaces.items():
        assert list(drawn[space]) == ["r", "q"]
        assert not torch.equal(drawn[space]["r"], drawn[space]["q"])
        x = (x - x.mean(0)).double()
        want = torch.linalg.svdvals(x).square() / (len(x) - 1)
        found = drawn[space]["r"][:len(want)]
        close(found, want, rtol=1e-3, atol=1e-5 * want[0].item())
        rank = common.effective_rank(x).item()
        assert values("spectrum")[f"{space}_rank"] == pytest.approx(rank, rel=1e-3)


def slow_ratio(z):
    """(max - min) / min of every row's distances to the others, on the unit sphere."""
    unit = [row / row.norm() for row in z]
    ratios = []
    for i, a in enumerate(unit):
        distances = [(a - b).norm().item() for j, b in enumerate(unit) if j != i]
        ratios.append((max(distances) - min(distances)) / min(distances))
    return torch.tensor(ratios, dtype=z.dtype)


@pytest.mark.parametrize("n, d", [(3, 2), (40, 6)])
def test_distance_ratio_equals_a_double_loop_and_ignores_norms_order_and_rotation(n, d):
    z = randn(n, d)
    want = slow_ratio(z)
    close(measures.distance_ratio(z), want)
    other = z * randn(n, 1, seed=1).exp() @ orthonormal(d)
    close(measures.distance_ratio(other.flip(0)), want.flip(0))


@pytest.mark.parametrize("n", [4, 10])
def test_distance_ratio_of_polygon_simplex_and_duplicates_in_closed_form(n):
    angle = 2 * math.pi * torch.arange(n).double() / n
    polygon = torch.stack([angle.cos(), angle.sin()], 1)
    want = torch.full((n,), 1 / math.sin(math.pi / n) - 1).double()
    close(measures.distance_ratio(polygon), want)
    simplex = 3 * torch.eye(n).double()
    close(measures.distance_ratio(simplex), torch.zeros(n).double())
    twice = measures.distance_ratio(simplex[[*range(n), 0]])
    close(twice[[0, n]], torch.full((2,), 2 ** 0.5 / 1e-12).double())
    close(twice[1:n], torch.zeros(n - 1).double())


def test_distance_ratio_is_right_for_almost_collapsed_float32_rows():
    z = (1 + 0.003 * randn(60, 8)).float()
    close(measures.distance_ratio(z), slow_ratio(z.double()).float(), rtol=5e-3, atol=0)


def test_distances_are_of_images_of_every_class_though_files_come_class_by_class(monkeypatch):
    rows = torch.arange(12001.0)[:, None].expand(-1, 2)
    seen = []

    def ratio(z):
        seen.append(z)
        return z[:, 0]

    monkeypatch.setattr(measures, "distance_ratio", ratio)
    job = types.SimpleNamespace(features={"test": (rows, None, None)}.get, projector=None)
    found = measures.measure_distance_ratio(job)
    assert len(seen[0]) == 4001 and seen[0][0, 0] == 0 and seen[0][-1, 0] == 12000
    assert found["representation"] == 6000 and found["representation_tenth"] == 1200


# ---- the program ---------------------------------------------------------------------------------
@each_script
def test_every_measure_on_a_run_of_every_script(name, train, monkeypatch):
    monkeypatch.setattr(measures, "MAX_TASKS", 4)
    train(name)
    kept = {}
    for file in ("backbone.pt", "last.pt", "log.jsonl"):
        with open(f"r/{file}", "rb") as opened:
            kept[file] = opened.read()
    measure("r", "--task-size", "16")
    adapts = name in ("simclr_tc2", "byol_gessl")
    with open("r/eval.json") as file:
        rows = json.load(file)
    found = {row["protocol"] for row in rows}
    assert found == set(measures.MEASURES) - (set() if adapts else {"adaptation"})
    assert rows[0]["command"].startswith("results/measures.py r ")
    assert rows[0]["settings"] == {"task_size": 16, "seed": 0}
    assert math.isfinite(sum(row["value"] for row in rows))
    for protocol in ("sigma", "distance-ratio"):
        assert ("embedding" in values(protocol)) == (name != "mae_tc2")
    for picture in ["spectra"] + ["adaptation"] * adapts + ["conflict"] * (name == "simclr_tc2"):
        assert np.asarray(Image.open(f"r/{picture}.png")).std() > 10
    for file, content in kept.items():
        with open(f"r/{file}", "rb") as opened:
            assert opened.read() == content


@pytest.mark.parametrize("kind", ["sigma", "conflict"])
def test_too_few_images_for_two_tasks_end_in_one_sentence(kind, train, capsys):
    train()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        measure("r", "--measure", kind, "--task-size", "300")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--task-size 300" in error


# ---- what no number shows ------------------------------------------------------------------------
def test_tasks_have_large_views_for_large_images_and_the_seed(monkeypatch):
    asked = []

    def batches(data, recipes, settings, *others):
        asked.append((recipes, settings.seed))
        return []

    monkeypatch.setattr(measures, "training_batches", batches)
    preprocessing = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    part = types.SimpleNamespace(images=torch.zeros(9, 3, 8, 8), labels=torch.zeros(9))
    for size, recipe in ((96, "small"), (97, "imagenet")):
        args = types.SimpleNamespace(task_size=8, seed=5, workers=0)
        job = types.SimpleNamespace(data="d", device=torch.device("cpu"), args=args, test=part,
                                    state={"image_size": size, **preprocessing})
        assert list(measures.task_views(job, "test", 1)) == []
        expected = {**simclr_tc2.AUGMENTATION[recipe], **preprocessing}
        assert asked.pop() == ([expected] * 2, 5)


def test_conflict_has_the_interval_of_its_cosines_and_leaves_the_network_in_eval(train,
                                                                                monkeypatch):
    train("byol_gessl")
    cosines = [0.1, 0.4, -0.2]
    given = iter(cosines)

    def conflict(job, names, params, views):
        assert job.backbone.training and job.projector.training
        cosine = next(given)
        return torch.tensor([cosine, float(cosine < 0)])

    monkeypatch.setattr(measures, "halves_conflict", conflict)
    monkeypatch.setattr(measures, "task_views", lambda *_: range(3))
    job = measures.MeasureJob(parsed("r"))
    found = measures.measure_conflict(job)
    half = 1.96 * np.std(cosines, ddof=1) / 3 ** 0.5
    assert found["cosine"] == pytest.approx(0.1) and found["cosine_pm"] == pytest.approx(half)
    assert found["negative_share"] == pytest.approx(1 / 3)
    assert not job.backbone.training and not job.projector.training


def test_the_picture_of_adaptation_has_after_above_before(monkeypatch):
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, *_, **__: kept.append(self))
    measures.draw_adaptation("x.png", {"r": {1: (10.0, 30.0), 2: (20.0, 40.0)}}, {})
    lines = {line.get_label(): list(line.get_ydata()) for line in kept[0].axes[0].lines}
    assert lines == {"r, after a step": [30, 40], "r, before": [10, 20]}
