"""Oracles for the functions of eval_linear: slow loops, closed forms, limits, invariants, statistics of repeated draws."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import eval_linear as E
import mae_tc2

close = torch.testing.assert_close


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def positive(*shape, seed=0):
    """Unit rows with a large common mean, as features after a ReLU: the bias of a classifier then matters."""
    return F.normalize(randn(*shape, seed=seed).abs() + 0.5, dim=-1)


def interleaved(*sizes, unlabelled=0, seed=0):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)] + [torch.full((unlabelled,), -1)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def ranks(labels, chosen, c):
    """Which of class c's images, counted within the class, are chosen."""
    return [r for r, i in enumerate((labels == c).nonzero().flatten().tolist()) if i in set(chosen.tolist())]


def stopped_with(capsys, call, *words):
    with pytest.raises(SystemExit) as stopped:
        call()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and all(w in err for w in words), err


# ---- label subsets

@pytest.mark.parametrize("n, fraction, expected", [(5, 0.5, 2), (7, 0.5, 4), (15, 0.1, 2), (4, 0.01, 1), (50, 0.3, 15)])
def test_balanced_subset_takes_pythons_round_but_at_least_one_of_every_class(n, fraction, expected):
    labels = interleaved(n, 3 * n, 40, unlabelled=6)
    chosen = E.balanced_subset(labels, fraction, 0)
    assert chosen.dtype == torch.int64 and (chosen.diff() > 0).all() and expected == max(1, round(fraction * n))
    want = [expected] + [max(1, round(fraction * m)) for m in (3 * n, 40)]
    assert [(labels[chosen] == c).sum().item() for c in range(-1, 3)] == [0, *want]


def test_balanced_subset_is_nested_in_the_fraction_and_complete_at_one():
    labels, smaller = interleaved(3, 17, 60, 101, unlabelled=20), set()
    for fraction in (0.01, 0.02, 0.1, 0.25, 0.5, 0.9, 1.0):
        chosen = set(E.balanced_subset(labels, fraction, 3).tolist())
        assert smaller <= chosen and (labels[list(chosen)] >= 0).all()
        smaller = chosen
    assert chosen == set((labels >= 0).nonzero().flatten().tolist())


def test_balanced_subset_of_a_class_ignores_the_other_classes_and_their_places():
    alone, mixed = torch.full((40,), 2), interleaved(30, 9, 40, 25, unlabelled=12)
    hidden = torch.where(mixed == 0, -1, mixed)
    want = ranks(alone, E.balanced_subset(alone, 0.25, 5), 2)
    assert len(want) == 10 and want == ranks(mixed, E.balanced_subset(mixed, 0.25, 5), 2) == ranks(hidden, E.balanced_subset(hidden, 0.25, 5), 2)


def test_balanced_subset_is_a_fair_draw_by_seed_and_class_not_by_the_global_generator():
    labels = interleaved(50, 50, 50)
    first = E.balanced_subset(labels, 0.2, 0)
    torch.manual_seed(99)
    assert torch.equal(E.balanced_subset(labels, 0.2, 0), first) and not torch.equal(E.balanced_subset(labels, 0.2, 1), first)
    assert ranks(labels, first, 0) != ranks(labels, first, 1) != ranks(labels, first, 2)
    counts = sum(torch.bincount(E.balanced_subset(labels[:60], 0.3, seed), minlength=60) for seed in range(500))
    assert counts.min() > 100 and counts.max() < 200               # a fair draw: mean 150, deviation 10


def test_hold_out_splits_the_labelled_images_in_two():
    labels = interleaved(20, 31, 4, unlabelled=9)
    rest, held = E.hold_out(labels, 0.2, 7)
    close(held, E.balanced_subset(labels, 0.2, 7))
    assert rest.dtype == held.dtype == torch.int64 and (rest.diff() > 0).all() and not set(rest.tolist()) & set(held.tolist())
    close(torch.cat([rest, held]).sort().values, (labels >= 0).nonzero().flatten())


FILES = [f"/data/train/{c}/{c}_{i}.JPEG" for c in ("n02", "n01") for i in (1, 11, 2)] + ["/data/train/n03/same.png", "/data/train/xn04/same.png"]


@pytest.mark.parametrize("lines, expected", [
    ("n01_11.JPEG\nn02_2.JPEG\nn02/n02_2.JPEG\n", [2, 4]), ("\n  n02_1.JPEG \t\r\n\n \nn03/same.png\n\n", [0, 6]),
    ("xn04/same.png\n/data/train/n01/n01_2.JPEG\ntrain/n02/n02_11.JPEG", [1, 5, 7])])
def test_listed_subset_finds_bare_names_and_tails_in_ascending_order(tmp_path, lines, expected):
    (tmp_path / "list").write_bytes(lines.encode())
    chosen = E.listed_subset(FILES, tmp_path / "list")
    assert chosen.dtype == torch.int64 and chosen.tolist() == expected


@pytest.mark.parametrize("name", ["n09_1.JPEG", "same.png", "n01/n02_1.JPEG", "n04/same.png"])
def test_listed_subset_refuses_missing_and_ambiguous_names_and_parts_of_names(tmp_path, capsys, name):
    (tmp_path / "list").write_text(f"n02_1.JPEG\n{name}\n")
    stopped_with(capsys, lambda: E.listed_subset(FILES, tmp_path / "list"), "--label-list", name)


# ---- linear probes

def slow_probe(x, y, classes, lr, weight_decay, epochs, seed, batch):
    torch.manual_seed(seed)
    net = nn.Linear(x.shape[1], classes).to(x.dtype)
    opt = torch.optim.Adam(net.parameters(), lr, weight_decay=weight_decay)
    for e in range(epochs):
        opt.param_groups[0]["lr"] = lr if epochs == 1 else lr * 1e-4 ** (e / (epochs - 1))
        order = torch.randperm(len(x), generator=common.rng(seed, e))
        for start in range(0, len(x), min(batch, len(x))):
            rows = order[start:start + batch]
            opt.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            opt.step()
    return net.weight.detach(), net.bias.detach()


PROBES = [(0.1, 0.0), (0.01, 0.3), (0.03, 1e-3)]


@pytest.mark.parametrize("dtype, n, epochs, batch", [(torch.float64, 21, 4, 8), (torch.float64, 21, 1, 8), (torch.float64, 21, 3, 1000),
                                                     (torch.float32, 21, 4, 8), (torch.float64, 1100, 1, None)])
def test_fit_probes_equals_a_loop_over_adam(dtype, n, epochs, batch):
    x, y = randn(n, 6, dtype=dtype) + 1, torch.arange(n) % 4
    found, batch = E.fit_probes(x, y, 4, PROBES, epochs, 3, **({"batch": batch} if batch else {})), batch or 1000
    assert len(found) == len(PROBES)
    for (w, b), (lr, decay) in zip(found, PROBES):
        rtol, atol = (1e-8, 1e-9) if dtype == torch.float64 else (1e-3, 1e-4)
        close((w, b), slow_probe(x, y, 4, lr, decay, epochs, 3, batch), rtol=rtol, atol=atol)





# ---- few-shot episodes

@pytest.mark.parametrize("way, shot, queries, seed", [(5, 1, 15, 0), (3, 5, 4, 1), (6, 2, 14, 2)])
def test_an_episode_has_different_classes_and_disjoint_images(way, shot, queries, seed):
    labels = interleaved(16, 20, 40, 16, 15, 3, 17, 30, seed=seed)     # classes 4 and 5 are too small for 16 images
    support, query = E.few_shot_episodes(labels, way, shot, queries, 40, seed)
    assert support.dtype == query.dtype == torch.int64 and support.shape == (40, way, shot) and query.shape == (40, way, queries)
    for s, q in zip(support, query):
        assert len(set(torch.cat([s, q], 1).flatten().tolist())) == way * (shot + queries)
        assert (labels[s] == labels[s][:, :1]).all() and (labels[q] == labels[s][:, :1]).all() and len(set(labels[s][:, 0].tolist())) == way
    usable = [c for c, n in enumerate(torch.bincount(labels)) if n >= shot + queries]
    assert labels[support].unique().tolist() == usable


def test_episodes_are_a_function_of_the_arguments_alone():
    labels = interleaved(20, 20, 20, 20)
    first = E.few_shot_episodes(labels, 3, 1, 5, 8, 0)
    torch.manual_seed(99)
    close(E.few_shot_episodes(labels, 3, 1, 5, 8, 0), first)
    other = E.few_shot_episodes(labels, 3, 1, 5, 8, 1)
    assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1]) and len({tuple(e.flatten().tolist()) for e in first[1]}) == 8


def test_episodes_draw_every_class_and_every_image_about_equally_often():
    labels = interleaved(*[6, 12, 30, 4, 12, 12, 12, 12])               # class 3 has too few images
    support, query = E.few_shot_episodes(labels, 3, 1, 4, 3000, 0)
    drawn, n = torch.bincount(labels[support].flatten(), minlength=8), torch.bincount(labels)
    assert drawn[3] == 0
    for c in (0, 1, 2, 4, 5, 6, 7):
        per_class, members = 3000 * 3 / 7, labels == c
        assert abs(drawn[c] / per_class - 1) < 0.12                      # deviation of a fair draw 2 %
        for index, each in ((support, 1), (query, 4)):
            counts, mean = torch.bincount(index.flatten(), minlength=len(labels))[members], per_class * each / n[c]
            assert (counts - mean).abs().max() < 5.5 * mean ** 0.5 + 0.05 * mean


def test_too_few_usable_classes_are_refused_and_just_enough_are_not(capsys):
    labels = interleaved(10, 10, 9, 30)
    assert E.few_shot_episodes(labels, 3, 4, 6, 2, 0)[0].shape == (2, 3, 4)
    stopped_with(capsys, lambda: E.few_shot_episodes(labels, 4, 4, 6, 2, 0), "--way")


def test_unlabelled_images_are_no_class_of_an_episode():
    labels = interleaved(8, 8, 8, unlabelled=50)
    assert all((labels[i] >= 0).all() for i in E.few_shot_episodes(labels, 3, 2, 4, 30, 0))


@pytest.mark.parametrize("way", [2, 5])
def test_features_without_information_give_chance_in_both_classifiers(way):
    labels = interleaved(*[60] * 40)                                     # a query among the support would lift it
    support, query = (F.normalize(randn(2400, 16), dim=1)[i] for i in E.few_shot_episodes(labels, way, 3, 5, 1000, 0))
    for accuracy in (E.nearest_centroid(support, query), E.logistic_regression(support, query, 30)[0]):
        assert abs(accuracy.mean() - 100 / way) < 3


def test_interval_covers_the_mean_over_all_episodes_in_about_95_of_100_repeats():
    labels = torch.arange(400) % 10
    x = 0.8 * randn(10, 4, seed=1)[labels] + randn(400, 4)
    parts = []
    for seed in range(160):
        s, q = E.few_shot_episodes(labels, 3, 1, 3, 40, seed)
        parts.append(E.nearest_centroid(x[s], x[q]))
    truth, intervals = torch.cat(parts).mean().item(), [E.interval(a) for a in parts]
    covered = sum(abs(mean - truth) <= half for mean, half in intervals) / len(parts)
    assert 40 < truth < 90 and 0.89 <= covered <= 0.993


@pytest.mark.parametrize("values, mean, half", [([1., 2., 3., 4.], 2.5, 1.96 * (5 / 3) ** 0.5 / 2), ([40., 60.], 50., 19.6)])
def test_interval_by_hand(values, mean, half):
    found = E.interval(torch.tensor(values))
    assert found == pytest.approx((mean, half), rel=1e-6) and all(type(v) is float for v in found)


# ---- few-shot classifiers

def slow_centroid(support, query):
    way, right = len(support), 0
    for c in range(way):
        for q in query[c]:
            distances = [sum((a - b) ** 2 for a, b in zip(q, sum(support[k]) / len(support[k]))) for k in range(way)]
            right += distances.index(min(distances)) == c
    return 100 * right / (way * query.shape[1])


@pytest.mark.parametrize("way, shot, queries", [(5, 1, 3), (3, 4, 6)])
def test_nearest_centroid_equals_a_loop(way, shot, queries):
    centres = 0.8 * randn(5, way, 1, 4)
    support, query = centres + randn(5, way, shot, 4, seed=1), centres + randn(5, way, queries, 4, seed=2)
    found, slow = E.nearest_centroid(support, query), [slow_centroid(s, q) for s, q in zip(support, query)]
    assert found.shape == (5,) and found.tolist() == pytest.approx(slow) and 30 < sum(slow) / 5 < 95



def newton(support, query):
    """Logits of the minimum of sum CE + 1/2 |W|^2 of one episode, by Newton's method with finite sums written out."""
    (way, _, d), one = support.shape, torch.ones(1, dtype=torch.float64)
    rows = [(torch.cat([x, one]), c) for c in range(way) for x in support[c].double()]
    W = torch.zeros(way * (d + 1), dtype=torch.float64)

    def objective(flat):
        W = flat.view(way, d + 1)
        return sum((W @ x).logsumexp(0) - W[c] @ x for x, c in rows) + 0.5 * W.square().sum()
    for _ in range(7):
        W = W - torch.linalg.solve(torch.autograd.functional.hessian(objective, W), torch.autograd.functional.jacobian(objective, W))
    assert torch.autograd.functional.jacobian(objective, W).norm() < 1e-9
    return torch.stack([W.view(way, d + 1) @ torch.cat([q, one]) for c in range(way) for q in query[c].double()])


@pytest.mark.parametrize("way, shot, scale", [(2, 1, 0), (3, 2, 1), (5, 5, 1)])
def test_logistic_regression_reaches_the_minimum_newton_finds(way, shot, scale):
    centres = scale * randn(2, way, 1, 6).abs()
    support, query = (F.normalize(centres + positive(2, way, k, 6, seed=k), dim=-1) for k in (shot, 3))
    want = torch.stack([newton(s, q) for s, q in zip(support, query)])
    right = (want.argmax(2) == torch.arange(way).repeat_interleave(3)).double().mean(1)
    accuracy, logits = E.logistic_regression(support, query, iterations=2000)
    close(logits, want, rtol=0, atol=1e-6)
    assert accuracy.shape == (2,) and accuracy.tolist() == pytest.approx((100 * right).tolist(), rel=1e-5)
    for dtype in (torch.float64, torch.float32):
        logits = E.logistic_regression(support.to(dtype), query.to(dtype))[1]
        close(logits, want.to(dtype), rtol=0, atol=2e-3)


@pytest.mark.parametrize("way", [2, 5])
def test_logistic_regression_of_orthonormal_classes_in_closed_form(way):
    low, high = 0., 1.                          # e_c alone in class c: W = (1 - p) I - q (J - I), no bias, q = (1 - p) / (way - 1)
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if p < 1 / (1 + (way - 1) * math.exp(-(1 - p) * way / (way - 1))) else (low, p)
    rows = orthonormal(way)[None, :, None]
    accuracy, logits = E.logistic_regression(rows, rows, iterations=2000)
    want = (1 - p) * (torch.eye(way) - (1 - torch.eye(way)) / (way - 1)).double()
    close(logits[0], want, rtol=0, atol=1e-6)
    assert accuracy.tolist() == [100.]



def test_logistic_regression_turns_with_the_features_permutes_with_the_classes_and_ignores_other_queries_and_episodes():
    support, query, order = positive(3, 4, 2, 5), positive(3, 4, 3, 5, seed=1), [2, 0, 3, 1]
    accuracy, logits = E.logistic_regression(support, query)
    turn = orthonormal(5, seed=3)
    close(E.logistic_regression(support @ turn, query @ turn)[1], logits, rtol=0, atol=1e-3)
    a, other = E.logistic_regression(support[:, order], query[:, order])
    close((a, other.view(3, 4, 3, 4)), (accuracy, logits.view(3, 4, 3, 4)[:, order][..., order]), rtol=0, atol=1e-3)
    close(E.logistic_regression(support[1:2], query[1:2, :, :1])[1], logits.view(3, 4, 3, 4)[1:2, :, 0], rtol=0, atol=1e-3)
    close(logits.sum(2), torch.zeros(3, 12, dtype=torch.float64), rtol=0, atol=1e-3)


# ---- GeSSL's instance discrimination

def slow_logits(h, t):
    _, n, d = h.shape
    mean = sum(h[v, i] for v in range(2) for i in range(n)) / (2 * n)
    unit = [[(h[v, i] - mean) / (h[v, i] - mean).norm() for i in range(n)] for v in range(2)]
    return torch.tensor([[(unit[v][i] @ unit[1 - v][j]).item() / t for j in range(n)] for v in range(2) for i in range(n)], dtype=h.dtype)


def slow_sigma(tasks, t):
    n, total = tasks.shape[2], 0.
    for h in tasks:
        for i, row in enumerate(slow_logits(h, t).tolist()):
            total += math.log(sum(math.exp(x - row[i % n]) for x in row))
    return total / (len(tasks) * 2 * n)


def views(tasks, n, d, noise, seed=0):
    return randn(tasks, 1, n, d, seed=seed) + noise * randn(tasks, 2, n, d, seed=seed + 1) + 2 + randn(2, 1, d, seed=seed + 2)


@pytest.mark.parametrize("n, t", [(3, 1.), (5, 0.1)])
def test_pair_logits_sigma_and_accuracy_equal_slow_loops(n, t):
    tasks = views(3, n, 4, 1.)
    close(E.pair_logits(tasks[0], t), slow_logits(tasks[0], t))
    assert float(E.sigma(tasks, t)) == pytest.approx(slow_sigma(tasks, t))
    right = [row.argmax().item() == i % n for h in tasks for i, row in enumerate(slow_logits(h, t))]
    assert float(E.instance_accuracy(tasks)) == pytest.approx(100 * sum(right) / len(right), rel=1e-5) and 0 < sum(right) / len(right) < 0.95


def test_pair_logits_ignore_origin_scale_and_rotation_and_swap_halves_with_the_views():
    h, order = views(1, 5, 4, 0.5)[0], [3, 0, 4, 1, 2]
    want = E.pair_logits(h, 0.2)
    close(E.pair_logits(3 * h @ orthonormal(4) + randn(4), 0.2), want)
    close(E.pair_logits(h.flip(0), 0.2), want.roll(5, 0))
    close(E.pair_logits(h[:, order], 0.2).view(2, 5, 5), want.view(2, 5, 5)[:, order][:, :, order])
    close(E.pair_logits(h, 0.4), want / 2)
    apart = torch.stack([h[0], h[1] + 10])                                # the two views far apart: their mean is one, not two
    assert (E.pair_logits(apart, 1.) < -0.5).all()


def test_pair_logits_of_a_row_at_the_mean_are_zero_and_finite():
    h = torch.tensor([[[0., 0.], [2., 1.]], [[-2., 0.], [0., -1.]]])
    close(E.pair_logits(h, 0.5)[0], torch.zeros(2))
    close(E.pair_logits(h, 0.5)[2:, 0], torch.zeros(2))
    assert E.pair_logits(h, 0.5).isfinite().all() and E.pair_logits(h, 0.5)[1:, 1].abs().min() > 0


@pytest.mark.parametrize("n", [2, 4, 7])
def test_sigma_of_collapse_is_log_n_and_of_a_simplex_has_a_closed_form(n):
    assert float(E.sigma(randn(5).expand(3, 2, n, 5), 0.1)) == pytest.approx(math.log(n))
    apart = (2 * orthonormal(8)[:n] + 1).expand(2, 2, n, 8)                 # centred orthonormal rows: cosine -1 / (n - 1)
    for t in (0.2, 1.):
        assert float(E.sigma(apart, t)) == pytest.approx(math.log1p((n - 1) * math.exp(-n / (n - 1) / t)))
    assert 0 <= float(E.sigma(apart, 0.01)) < 1e-9 and float(E.instance_accuracy(apart)) == 100
    assert float(E.instance_accuracy(torch.stack([apart[:, 0], apart[:, 1].roll(1, 1)], 1))) == 0



@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_calibrated_temperature_has_the_smallest_slow_sigma_of_the_grid(noise):
    tasks, grid = views(4, 6, 8, noise), E.TEMPERATURES
    assert type(grid) is tuple and len(grid) > 2 and all(0 < a < b for a, b in zip(grid, grid[1:]))
    found = E.calibrate_temperature(tasks)
    assert type(found) is float and found in grid and slow_sigma(tasks, found) <= min(slow_sigma(tasks, t) for t in grid) + 1e-12



# ---- distances, neighbours, principal axes

def slow_ratio(z):
    unit, out = [r / r.norm() for r in z], []
    for i in range(len(z)):
        d = [(unit[i] - unit[j]).norm().item() for j in range(len(z)) if j != i]
        out.append((max(d) - min(d)) / min(d))
    return torch.tensor(out, dtype=z.dtype)


@pytest.mark.parametrize("n, d", [(3, 2), (40, 6)])
def test_distance_ratio_equals_a_double_loop_and_ignores_row_scale_order_and_rotation(n, d):
    z = randn(n, d)
    want = slow_ratio(z)
    close(E.distance_ratio(z), want)
    close(E.distance_ratio((z * randn(n, 1, seed=1).exp() @ orthonormal(d)).flip(0)), want.flip(0))


@pytest.mark.parametrize("n", [4, 10])
def test_distance_ratio_of_polygon_simplex_and_duplicates_in_closed_form(n):
    angle = 2 * math.pi * torch.arange(n).double() / n
    close(E.distance_ratio(torch.stack([angle.cos(), angle.sin()], 1)), torch.full((n,), 1 / math.sin(math.pi / n) - 1).double())
    close(E.distance_ratio(3 * torch.eye(n).double()), torch.zeros(n).double())
    twice = E.distance_ratio(torch.eye(n).double()[[*range(n), 0]])
    close(twice[[0, n]], torch.full((2,), 2 ** 0.5 / 1e-12).double())
    close(twice[1:n], torch.zeros(n - 1).double())


def test_distance_ratio_is_right_for_almost_collapsed_float32_rows():
    z = (1 + 0.003 * randn(60, 8)).float()
    close(E.distance_ratio(z), slow_ratio(z.double()).float(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("ks", [(), (1, 3)])
def test_knn_is_both_metrics_of_the_common_one_for_every_k(ks):
    y, test_y = torch.arange(60) % 3, torch.arange(40) % 3
    x, test_x = (k * randn(3, 5)[c].float() + randn(len(c), 5, seed=k).exp().float() for k, c in ((1, y), (2, test_y)))
    found = E.knn((x, y), (test_x, test_y), *([ks] if ks else []))
    want = {f"k{k}_{m}": common.knn_accuracy(x, y, test_x, test_y, k=k, metric=m) for k in ks or (5, 200) for m in ("euclidean", "cosine")}
    assert found == pytest.approx(want) and len(set(want.values())) > 2
    assert {k: v for k, v in want.items() if "euc" in k} != pytest.approx({k: common.knn_accuracy(
        test_x, test_y, x, y, k=int(k[1:].split("_")[0])) for k in want if "euc" in k})


@pytest.mark.parametrize("seed", range(3))
def test_pca_plane_is_the_two_largest_eigenvectors_with_signs_by_the_largest_loading(seed):
    x = randn(30, 5, seed=seed) * torch.tensor([1., 4., 2., 0.5, 0.1]) @ orthonormal(5, seed=seed) + 7
    (coordinates, share), (values, axes) = E.pca_plane(x), torch.linalg.eigh(torch.cov(x.T))
    for k in range(2):
        axis = axes[:, -1 - k]
        axis = axis * axis[axis.abs().argmax()].sign()
        close(coordinates[:, k], (x - x.mean(0)) @ axis)
    close(share, values.flip(0)[:2] / values.sum())
    close(E.pca_plane(x.flip(0) - 3), (coordinates.flip(0), share))



@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_features(dtype):
    h, episodes = randn(2, 6, 4, dtype=dtype), randn(2, 3, 2, 4, dtype=dtype)
    found = [E.pair_logits(h, 0.5), E.sigma(h[None], 0.5), E.distance_ratio(h[0]), *E.pca_plane(h[0]), E.logistic_regression(episodes, episodes)[1],
             *E.fit_probes(h[0], torch.arange(6) % 2, 2, [(0.1, 0.1)], 2, 0)[0]]
    assert [a.dtype for a in found] == [dtype] * len(found)


# ---- learning rates by layer

@pytest.mark.parametrize("depth, decay", [(3, 0.5), (1, 0.75), (2, 1.)])
def test_layer_groups_decay_the_learning_rate_from_the_head_down_and_spare_vectors_and_class_token(depth, decay):
    torch.manual_seed(0)
    backbone, head = mae_tc2.Encoder(16, 4, 48, depth, 3), nn.Linear(48, 5)
    groups = E.layer_groups(backbone, head, 0.1, 0.05, decay)
    found = [(p, g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]
    names = {id(p): n for n, p in [*backbone.named_parameters(), *(("head." + n, p) for n, p in head.named_parameters())]}
    assert sorted(id(p) for p, _, _ in found) == sorted(names)
    for p, lr, weight_decay in found:
        name = names[id(p)]
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if name.startswith(("patch_embed", "class_token")) else depth + 1
        assert lr == pytest.approx(0.1 * decay ** (depth + 1 - layer)), name
        assert weight_decay == (0.05 if name.endswith("weight") and "norm" not in name else 0), name
