"""Properties of common.py, checked against torchvision's per-sample operations, closed forms and one-process runs."""
import copy
import datetime
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

import common

OFF = dict(crop=(1., 1.), ratio=(1., 1.), flip=0., jitter=(0., 0., 0., 0.), jitter_p=0., gray_p=0., blur_p=0.,
           solarize_p=0., mean=(0., 0., 0.), std=(1., 1., 1.))
FULL = dict(crop=(.2, 1.), ratio=(3 / 4, 4 / 3), flip=.5, jitter=(.4, .4, .4, .1), jitter_p=.8, gray_p=.2, blur_p=.5,
            solarize_p=.2, mean=(.4, .5, .6), std=(.2, .3, .25))
WORLD = 2


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def noise(n, h, w):
    return torch.randint(0, 256, (n, 3, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def copies(n, image, recipe, **options):
    """n augmentations of one image (1, 3, h, w); everything that the recipe does not name is off."""
    return common.augment(image.repeat(n, 1, 1, 1), OFF | recipe, common.rng(11), **options)


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test at level 1e-5; a dither of 1e-3 swallows rounding errors at atoms."""
    dither = np.random.default_rng(0)
    a, b = (np.sort(np.asarray(x, dtype=float) + 1e-3 * dither.random(len(x))) for x in (a, b))
    cdf_a, cdf_b = (np.searchsorted(x, np.concatenate([a, b]), "right") / len(x) for x in (a, b))
    assert np.abs(cdf_a - cdf_b).max() < 2.47 * math.sqrt(1 / len(a) + 1 / len(b))


def assert_fraction(hits, p):
    assert abs(hits.double().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / len(hits)) + .003


@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (.2, 1.), (3 / 4, 4 / 3)), (100, 40, (.2, 1.), (3 / 4, 4 / 3)), (100, 40, (.05, .5), (1 / 4, 1.)),
    (4, 60, (.02, .5), (3 / 4, 4 / 3)),  # some draws run out of tries
    (1, 50, (.2, 1.), (3 / 4, 4 / 3)), (300, 3, (.2, 1.), (3 / 4, 4 / 3))])  # all do: the central box
def test_random_boxes_have_the_distribution_of_random_resized_crop(height, width, scale, ratio):
    boxes = common.random_boxes(4000, height, width, scale, ratio, common.rng(3)).double()
    torch.manual_seed(0)
    get_params, blank = torchvision.transforms.RandomResizedCrop.get_params, torch.empty(3, height, width)
    expected = torch.tensor([get_params(blank, list(scale), list(ratio)) for _ in range(4000)]).double()
    for statistic in (lambda t, l, h, w: h * w, lambda t, l, h, w: (w / h).log(), lambda t, l, h, w: t + h / 2,
                      lambda t, l, h, w: l + w / 2, lambda t, l, h, w: t, lambda t, l, h, w: l):
        assert_same_distribution(statistic(*boxes.T), statistic(*expected.T))
    assert torch.equal(boxes, boxes.round()) and boxes[:, :2].min() >= 0 and boxes[:, 2:].min() >= 1
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize("size", [7, 24, 64])
def test_crop_resize_equals_resized_crop_per_sample(size):
    boxes = torch.tensor([[0, 0, 50, 36], [3, 5, 9, 8], [10, 2, 7, 30], [20, 20, 1, 1], [49, 0, 1, 36], [5, 30, 40, 6]])
    images, dtype = noise(6, 50, 36) / 255, common.random_boxes(1, 8, 8, (.5, 1.), (1., 1.), common.rng(0)).dtype
    for flip in (torch.arange(6) % 2 == 0, torch.arange(6) % 2 == 1):
        crops = [TF2.resized_crop(x, *box, [size, size], antialias=True) for x, box in zip(images, boxes.tolist())]
        expected = torch.stack([crop.flip(-1) if mirror else crop for crop, mirror in zip(crops, flip)])
        close(common.crop_resize(images, boxes.to(dtype), flip, size), expected, 1e-4)


@pytest.mark.parametrize("name, factors", [
    ("brightness", (0., .3, 1., 1.4, 2.5, .9)), ("contrast", (0., .3, 1., 1.4, 2.5, 1.7)),
    ("saturation", (0., .3, 1., 1.4, 2.5, 1.7)), ("hue", (-.5, -.23, 0., .1, .5, -.3)), ("grayscale", None)])
def test_colour_operations_equal_torchvision_with_a_factor_per_sample(name, factors):
    x = torch.rand(6, 3, 9, 14, generator=torch.Generator().manual_seed(2))
    x[..., :3] = torch.tensor(list(itertools.product((0., .5, 1.), repeat=3))).T.reshape(3, 9, 3)  # grays, pure, ties
    x[5] = x[5, :1]  # a gray image
    if factors is None:
        return close(common.grayscale(x), TF.rgb_to_grayscale(x, 3))
    expected = torch.stack([getattr(TF, f"adjust_{name}")(image, f) for image, f in zip(x, factors)])
    close(getattr(common, name)(x.clone(), torch.tensor(factors)), expected)


@pytest.mark.parametrize("size, kernel", [(12, 3), (32, 3), (48, 5), (65, 7), (96, 9)])
def test_gaussian_blur_equals_torchvision_with_a_sigma_per_sample(size, kernel):
    x, sigma = noise(5, size, size) / 255, (.1, .7, 0., 2., 5.)
    out = common.gaussian_blur(x, torch.tensor(sigma))
    close(out, torch.stack([TF.gaussian_blur(i, [kernel, kernel], [s, s]) if s else i for i, s in zip(x, sigma)]))
    assert torch.equal(out[2], x[2])


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("recipe, expected", [
    ({}, lambda x: x / 255), (dict(flip=1.), lambda x: x.flip(-1) / 255),
    (dict(gray_p=1.), lambda x: TF.rgb_to_grayscale(x / 255, 3)),
    (dict(solarize_p=1.), lambda x: TF.solarize(x, 128) / 255),
    (dict(mean=(.4, .5, .6), std=(.2, .3, .25)), lambda x: TF.normalize(x / 255, (.4, .5, .6), (.2, .3, .25)))])
def test_certain_operations_of_augment_equal_torchvision(recipe, expected, crop):
    x = noise(4, 16, 16)
    for boxes in (dict(), dict(crop=(.2, .4)))[:1 if crop else 2]:  # crop=False ignores the boxes
        out = common.augment(x, OFF | recipe | boxes, common.rng(0), crop=crop)
        assert out.dtype == torch.float32
        close(out, expected(x))


def test_augment_crops_like_random_resized_crop():
    place = torch.meshgrid(torch.arange(40) * 6, torch.arange(24) * 10, torch.arange(1), indexing="ij")
    image = torch.stack(place)[None, ..., 0].to(torch.uint8)  # the values of a pixel are its place
    out = copies(1000, image, dict(crop=(.1, .6), ratio=(.5, 2.)), size=16)
    torch.manual_seed(0)
    reference = torchvision.transforms.RandomResizedCrop(16, (.1, .6), (.5, 2.), antialias=True)
    expected = torch.stack([reference(image[0] / 255) for _ in range(1000)])
    assert out.shape == (1000, 3, 16, 16)
    for channel, moment in itertools.product((0, 1), (torch.mean, torch.std)):
        assert_same_distribution(moment(out[:, channel], (1, 2)), moment(expected[:, channel], (1, 2)))


@pytest.mark.parametrize("jitter, p", [((.4, 0., 0., 0.), 1.), ((0., .5, 0., 0.), 1.), ((0., 0., .6, 0.), 1.),
                                       ((0., 0., 0., .1), 1.), ((.4, .4, .4, .1), .8), ((.4, .4, .4, .1), .3)])
def test_jitter_has_the_distribution_of_random_apply_color_jitter(jitter, p):
    image = noise(1, 8, 8) // 4 + torch.tensor([120, 70, 60], dtype=torch.uint8).view(3, 1, 1)
    out = copies(1500, image, dict(jitter=jitter, jitter_p=p), crop=False)
    torch.manual_seed(0)
    reference = torchvision.transforms.RandomApply([torchvision.transforms.ColorJitter(*jitter)], p)
    expected = torch.stack([reference(image[0] / 255) for _ in range(1500)])
    for statistic in (lambda x: TF.rgb_to_grayscale(x).mean((1, 2, 3)), lambda x: TF.rgb_to_grayscale(x).std((1, 2, 3)),
                      lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),  # brightness, contrast; saturation, hue
                      lambda x: torch.atan2(x[:, 1] - x[:, 2], 2 * x[:, 0] - x[:, 1] - x[:, 2]).mean((1, 2))):
        assert_same_distribution(statistic(out), statistic(expected))
    assert_fraction((out - image / 255).abs().amax((1, 2, 3)) > 1e-5, p)


def test_the_order_of_the_colour_operations_is_drawn_for_each_quarter_of_the_batch(monkeypatch):
    calls, names = [], ("brightness", "contrast", "saturation", "hue")
    for name in names:
        monkeypatch.setattr(common, name, lambda x, f, name=name: calls.append((name, len(x))) or x)
    orders = []
    for seed in range(50):
        calls.clear()
        common.augment(noise(8, 8, 8), FULL | dict(jitter_p=1.), common.rng(seed), crop=False)
        assert len(calls) == 16 and {n for _, n in calls} == {2}
        orders += [tuple(name for name, _ in calls[i:i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(order) == sorted(names) for order in orders) and len(set(orders)) == 24
    assert sum(a != b for a, b in zip(orders[::4], orders[1::4])) > 40


@pytest.mark.parametrize("crop", [True, False])
def test_flip_gray_solarize_and_blur_happen_independently_with_their_probabilities(crop):
    image = torch.empty(1, 3, 32, 32, dtype=torch.uint8)  # two bright halves: every decision can be read off
    image[..., :16] = torch.tensor([250, 150, 140]).view(3, 1, 1)
    image[..., 16:] = torch.tensor([140, 150, 250]).view(3, 1, 1)
    out = copies(3000, image, dict(flip=.3, gray_p=.2, solarize_p=.35, blur_p=.6), crop=crop)
    left, edge, right = out[:, 0, 8, 4], out[:, 0, 8, 15], out[:, 0, 8, 28]
    tap = (edge - left) / (right - left)  # outer weight of the 3-tap blur, so the blur's sigma
    sigma = (-.5 / (tap / (1 - 2 * tap)).clamp(min=1e-9).log()).sqrt()
    wide, solarized, gray = sigma > .3, left < .5, (out[:, 0] - out[:, 2]).abs().amax((1, 2)) < 1e-5
    flipped, p_wide = (left < right) ^ solarized, .6 * 1.7 / 1.9  # sigma is uniform in [.1, 2]
    for a, b, p, q in ((flipped, gray, .3, .2), (gray, solarized, .2, .35), (solarized, flipped, .35, .3),
                       (wide, flipped, p_wide, .3), (wide, gray, p_wide, .2), (wide, solarized, p_wide, .35)):
        assert_fraction(a, p)
        assert_fraction(a & b, p * q)
    assert_same_distribution(sigma[wide], torch.linspace(.3, 2., 10000))


@pytest.mark.parametrize("crop, recipe", [(True, dict(crop=(.2, 1.), ratio=(.5, 2.))), (True, FULL), (
    False, dict(jitter=(.4, 0., 0., 0.), jitter_p=1.)), (False, dict(jitter=(0., 0., 0., .1), jitter_p=1.))])
def test_copies_of_one_image_are_augmented_differently(crop, recipe):
    assert len(torch.unique(copies(12, noise(1, 32, 32), recipe, crop=crop).flatten(1), dim=0)) == 12


def test_augment_is_a_function_of_the_generator_only_and_normalises_last():
    images, outputs, raw = noise(6, 32, 32), [], FULL | dict(mean=OFF["mean"], std=OFF["std"])
    for seed, key, recipe in ((1, 5, FULL), (2, 5, FULL), (3, 6, FULL), (4, 5, raw)):
        state = torch.manual_seed(seed).get_state()
        outputs.append(common.augment(images, recipe, common.rng(key), size=24))
        assert torch.equal(state, torch.get_rng_state()) and torch.equal(images, noise(6, 32, 32))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert outputs[3].min() > -1e-5 and outputs[3].max() < 1 + 1e-5
    close(outputs[0], TF.normalize(outputs[3], FULL["mean"], FULL["std"]))


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("middle", [4, 3])
def test_shares_of_a_batch_augment_to_the_whole_batch_bit_for_bit(crop, middle):
    images, generators = noise(8, 32, 32), [common.rng(9) for _ in range(3)]
    whole, *parts = [common.augment(images[share], FULL, g, crop=crop, share=share, total=8) for share, g in
                     zip((slice(None), slice(0, middle), slice(middle, 8)), generators)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole, common.augment(images, FULL, common.rng(9), crop=crop))
    assert all(torch.equal(g.get_state(), generators[0].get_state()) for g in generators)  # processes stay in step


def test_rng_is_a_function_of_the_integers_and_of_their_order():
    keys = [(0,), (1,), (2,), (12,), (1, 2), (2, 1), (0, 0), (1, 2, 0), (0, 1, 2), (1, 0, 2), (2 ** 33,)]
    first, second = (torch.stack([torch.rand(8, generator=common.rng(*key)) for key in keys]) for _ in range(2))
    assert torch.equal(first, second) and len(torch.unique(first[:, 0])) == len(keys)


@pytest.mark.parametrize("total, warmup", [(100, 10), (7, 3), (20, 0)])
def test_lr_scale_warms_up_linearly_and_falls_to_zero_as_a_cosine(total, warmup):
    values = [common.lr_scale(step, total, warmup) for step in range(total)]
    assert values[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    cosine = [(1 + math.cos(math.pi * i / (total - warmup))) / 2 for i in range(total - warmup + 1)]
    for value, (above, below) in zip(values[warmup:], itertools.pairwise(cosine), strict=True):
        assert below - 1e-9 <= value <= above + 1e-9  # zero may be meant at the last step or one past it


def test_set_lr_scales_every_group_and_survives_a_checkpoint():
    def optimizers():
        a, b, c = ([nn.Parameter(torch.zeros(1))] for _ in range(3))
        return dict(a=torch.optim.SGD([dict(params=a), dict(params=b, lr=.4)], lr=.1), b=torch.optim.Adam(c, lr=.01))

    def assert_rates(opts, scale):
        common.set_lr(opts, scale)
        rates = [group["lr"] for opt in opts.values() for group in opt.param_groups]
        assert rates == pytest.approx([.1 * scale, .4 * scale, .01 * scale])
    opts, fresh, used = optimizers(), optimizers(), optimizers()
    for o, scale in ((opts, .5), (opts, .2), (opts, .4), (used, .3)):
        assert_rates(o, scale)
    for loaded in (fresh, used):
        for name, opt in loaded.items():
            opt.load_state_dict(copy.deepcopy(opts[name].state_dict()))
        assert_rates(loaded, .7)


def conv_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5))
    for _ in range(seed):
        net(normal(6, 3, 6, 6, seed=seed))  # running statistics away from their start
    return net


def test_ema_update_interpolates_parameters_and_copies_buffers():
    target, online = conv_net(1), conv_net(2)
    expected = [.9 * old.data + .1 * new.data for old, new in zip(target.parameters(), online.parameters())]
    common.ema_update(target, online, .9)
    close([p.data for p in target.parameters()], expected, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), online.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(online.state_dict().values(), conv_net(2).state_dict().values()))
    assert all(p.is_leaf and p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_batch_stats_only_normalises_by_the_batch_leaves_buffers_and_is_undone(fails):
    net, twin, x = conv_net(2), conv_net(2), 3 + 2 * normal(8, 3, 6, 6, seed=5)
    before, expected = copy.deepcopy(net.state_dict()), twin(x)
    with pytest.raises(ZeroDivisionError) if fails else common.batch_stats_only(nn.Identity()):
        with common.batch_stats_only(net):
            out = net(x)
            1 / (not fails)
    close(out, expected)
    grads, expected = (torch.autograd.grad(y.pow(3).sum(), n.parameters()) for y, n in ((out, net), (expected, twin)))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and len(before) == len(net.state_dict())
    net(x)  # afterwards the statistics are tracked again
    close(dict(net.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("arch, size, width", [("resnet18", 32, 512), ("resnet18", 64, 512), ("resnet18", 128, 512),
                                               ("resnet50", 32, 2048), ("resnet50", 96, 2048)])
def test_backbone_is_the_torchvision_resnet_with_the_stem_of_its_image_size(arch, size, width):
    net, dim = common.make_backbone(arch, size)
    reference, maps = getattr(torchvision.models, arch)(weights=None), []
    reference.fc = nn.Identity()
    if size <= 96:
        reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    if size <= 32:
        reference.maxpool = nn.Identity()
    reference.load_state_dict(net.state_dict(), strict=True)
    reference.layer4.register_forward_hook(lambda _, __, out: maps.append(out.shape[2:]))
    with torch.no_grad():
        out, expected = net.eval()(normal(2, 3, size, size)), reference.eval()(normal(2, 3, size, size))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert dim == width and out.shape == (2, width) and min(maps[0]) >= 4


@pytest.mark.parametrize("size", [32, 64])
def test_tiny_backbone_gives_its_feature_dim_and_trains_every_parameter(size):
    net, dim = common.make_backbone("resnet_tiny", size)
    out = net(normal(4, 3, size, size))
    out.square().sum().backward()
    assert out.shape == (4, dim) and all(p.grad.isfinite().all() for p in net.parameters())


def slow_knn(bank, labels, queries, answers, k, metric, temperature):
    hits = 0
    for q, answer in zip(queries, answers.tolist()):
        near, votes = [], {}
        for b, label in zip(bank, labels.tolist()):
            cos, distance = float(q @ b / q.norm() / b.norm()), float((q - b).norm())
            near.append((distance, label, 1.) if metric == "euclidean" else (-cos, label, math.exp(cos / temperature)))
        for _, label, weight in sorted(near)[:k]:
            votes[label] = votes.get(label, 0.) + weight
        hits += max(votes, key=votes.get) == answer
    return 100 * hits / len(queries)


@pytest.mark.parametrize("metric, k, temperature, classes", [  # the majority vote has no ties
    ("euclidean", 1, .07, 4), ("euclidean", 7, .07, 2), ("cosine", 9, .07, 4), ("cosine", 9, 1., 4)])
def test_knn_accuracy_equals_a_double_loop(metric, k, temperature, classes):
    bank, queries = normal(80, 4, seed=1) + .5, normal(60, 4, seed=2) + .5
    labels, answers = [((x[:, 0] > .5) + 2 * (x[:, 1] > .5)) % classes for x in (bank, queries)]
    case = bank + normal(80, 4, seed=3), labels, queries + normal(60, 4, seed=4), answers, k, metric, temperature
    accuracy = common.knn_accuracy(*case)
    assert isinstance(accuracy, float) and 20 < accuracy < 95 and accuracy == pytest.approx(slow_knn(*case))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_accuracy_is_full_on_separable_clusters_and_chance_on_random_labels(metric):
    labels, answers, a, b = torch.arange(1000) % 10, torch.arange(1500) % 10, normal(1000, 10), normal(1500, 10, seed=1)
    bank, queries = 10 * torch.eye(10)[labels] + .1 * a, 10 * torch.eye(10)[answers] + .1 * b
    assert common.knn_accuracy(bank, labels, queries, answers, metric=metric) == 100.
    chance = common.knn_accuracy(a, labels, b, answers, metric=metric)
    assert abs(chance - 10) < 450 * math.sqrt(.09 / 1500)


@pytest.mark.parametrize("k, metric, temperature, winner", [
    (3, "euclidean", .07, 1),  # two votes against one
    (3, "cosine", .07, 0), (3, "cosine", 1., 1),  # exp(1 / .07) > 2 exp(.9 / .07), but e < 2 exp(.9)
    (1, "euclidean", .07, 1), (1, "cosine", .07, 0),  # the nearest point and the nearest direction differ
    (99, "euclidean", .07, 1), (99, "cosine", .07, 0)])  # k larger than the bank: everybody votes
def test_knn_votes_checked_by_hand(k, metric, temperature, winner):
    bank, labels = torch.tensor([[10., 0.], [.9, .19 ** .5], [.9, -.19 ** .5]]), torch.tensor([0, 1, 1])
    for answer in (0, 1):
        result = common.knn_accuracy(bank, labels, torch.eye(2)[:1], torch.tensor([answer]), k, metric, temperature)
        assert result == 100. * (answer == winner)


FRAME = torch.cat([torch.eye(8), -torch.eye(8)]).repeat(250, 1)  # 4000 rows: divisors n and n - 1 do not matter
TWO = torch.tensor([[3., 0., 0.], [-3., 0., 0.], [0., 1., 0.], [0., -1., 0.]])  # singular values 3 : 1


@pytest.mark.parametrize("statistic, z, value", [
    ("embedding_std", normal(1, 8).repeat(9, 1), 0.), ("embedding_std", normal(4000, 32), 1.),
    ("embedding_std", FRAME, 1.), ("embedding_std", FRAME * (normal(4000, 1).abs() + .1), 1.),  # whatever the lengths
    ("embedding_std", FRAME[::8, :4], .5),  # on a line: 1 in one of 4 dimensions, times sqrt(4)
    ("effective_rank", FRAME, 8.), ("effective_rank", 7 * FRAME + 5, 8.), ("effective_rank", TWO, 4 / 3 ** .75),
    ("effective_rank", normal(20, 1) @ normal(1, 6, seed=1) + 5, 1.)])
def test_collapse_statistics_have_their_closed_forms(statistic, z, value):
    assert float(getattr(common, statistic)(z)) == pytest.approx(value, abs=1e-2 if z.shape[1] == 32 else 2e-3)


def contrastive(z, rows=slice(None)):
    """Softmax contrastive loss of the given rows of z (2, n, d), flattened, against all rows."""
    z = F.normalize(z.flatten(0, 1), dim=1)
    logits = (z @ z.T / .5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits[rows], (torch.arange(len(z)) + len(z) // 2)[rows] % len(z))


def cross_correlation(z):
    a, b = ((v - v.mean(0)) / v.std(0) for v in z.unbind(1))  # z (n, 2, d)
    return (a.T @ b / len(z) - torch.eye(z.shape[2])).square().sum()


def steps(rank, world, gather, total, average):
    """Loss and gradients of one step of every kind; x (2, 8, 5) is the joined batch, each process has its share."""
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    x, rows = normal(2, 8, 5, dtype=torch.float64)[:, mine], torch.arange(16).view(2, 8)[:, mine].flatten()

    def embed(params):
        return torch.tanh(x @ params[0].T) @ params[1].T

    def moments(params):
        z = embed(params).flatten(0, 1)
        return (total(z.T @ z) - torch.eye(z.shape[1])).square().mean()

    def bilevel(params):  # the inner gradient is averaged over processes inside the graph
        inner = contrastive(gather(embed(params), 1)) + moments(params)
        grads = torch.autograd.grad(inner, params, create_graph=True)
        fast = [p - .5 * total(g) / world for p, g in zip(params, grads)]
        return cross_correlation(gather(embed(fast).transpose(0, 1), 0))
    results = {}
    for kind, loss_of in dict(
            contrastive=lambda params: contrastive(gather(embed(params), 1)), moments=moments, bilevel=bilevel,
            cross_correlation=lambda params: cross_correlation(gather(embed(params).transpose(0, 1), 0)),
            own_rows=lambda params: contrastive(gather(embed(params), 1), rows)).items():  # losses differ by process
        params = [nn.Parameter(normal(*shape, seed=1, dtype=torch.float64)) for shape in ((6, 5), (4, 6))]
        loss = loss_of(params)
        loss.backward()
        average(params + [nn.Parameter(torch.zeros(1))])  # one parameter without a gradient
        results[kind] = [total(loss.detach()) / world] + [p.grad for p in params]
    return results


def raw_all_reduce(x):
    """The mistake: autograd takes the sum over processes for the process's own term."""
    everybody = x.detach().clone()
    dist.all_reduce(everybody)
    return x + (everybody - x.detach())


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD,
                            timeout=datetime.timedelta(seconds=60))
    x, own = torch.arange(24.).view(2, 4, 3), torch.full((3,), rank + 1.)
    torch.save(dict(
        gathered=[common.gather_batch(x.chunk(WORLD, dim)[rank].clone(), dim) for dim in (0, 1)],
        sums=[common.all_reduce_sum(own), common.AllReduceSum.apply(own), own],
        right=steps(rank, WORLD, common.gather_batch, common.all_reduce_sum, common.average_gradients),
        wrong=steps(rank, WORLD, common.gather_batch, raw_all_reduce, common.average_gradients)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every process of one run of WORLD processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.start_processes(worker, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one_process():
    return steps(0, 1, lambda z, dim: z, lambda x: x, lambda params: None)


def test_gather_batch_joins_in_rank_order_and_all_reduce_sum_adds_out_of_place(ranks):
    for r, rank in enumerate(ranks):
        assert all(torch.equal(gathered, torch.arange(24.).view(2, 4, 3)) for gathered in rank["gathered"])
        assert torch.equal(torch.stack(rank["sums"]), torch.tensor([3., 3., r + 1.])[:, None].expand(3, 3))


@pytest.mark.parametrize("kind", ["contrastive", "cross_correlation", "moments", "own_rows", "bilevel"])
def test_two_processes_have_the_loss_and_gradient_of_one(ranks, one_process, kind):
    for rank in ranks:
        close(rank["right"][kind], one_process[kind], 1e-12)


@pytest.mark.parametrize("kind", ["moments", "bilevel"])
def test_a_raw_all_reduce_in_the_loss_would_give_a_wrong_gradient(ranks, one_process, kind):
    for value, expected in zip(ranks[0]["wrong"][kind][1:], one_process[kind][1:], strict=True):
        assert (value - expected).norm() > 1e-2 * expected.norm()


def test_distributed_helpers_do_nothing_in_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert common.setup_distributed()[:2] == (0, 1) and not dist.is_initialized()
    p = nn.Parameter(normal(3, 2))
    (common.gather_batch(p, 0) * common.all_reduce_sum(p)).sum().backward()
    common.average_gradients([p, nn.Parameter(torch.zeros(1))])
    close(p.grad, 2 * p.data)


def test_large_images_are_resized_to_eight_sevenths_and_cut_to_the_middle(tmp_path):
    image = torch.randint(0, 255, (3, 120, 160), dtype=torch.uint8, generator=common.rng(3))
    torchvision.io.write_png(image, str(tmp_path / "x.png"))
    found, kept = common.extract_features(nn.Flatten(), [str(tmp_path / "x.png")], 112, (0.4,) * 3, (0.2,) * 3, 0, torch.device("cpu"))
    expected = (TF.center_crop(TF.resize(image, [128], antialias=True), [112, 112]).float() / 255 - 0.4) / 0.2
    close(found, expected.flatten()[None], 0.02)                                  # one grey level: the two resizes round differently
    assert kept.tolist() == [0]


def test_features_of_large_images_are_taken_in_smaller_batches():
    """Memory of an evaluation does not follow --batch-size: 128 images of 224 px fit where training does."""
    for size, expected in ((32, [300]), (112, [128, 128, 44])):
        seen = []
        net = nn.Sequential(nn.Flatten())
        net.register_forward_hook(lambda net, inputs, out: seen.append(len(out)))
        images = torch.zeros(300, 3, size, size, dtype=torch.uint8)
        found, kept = common.extract_features(net, images, size, (0.4,) * 3, (0.2,) * 3, 0, torch.device("cpu"))
        assert seen == expected and kept.tolist() == list(range(300)) and len(found) == 300


def test_neighbours_of_nearly_collapsed_features_are_found():
    """A spread of 3e-4 around a common offset of 1: distances by the matrix product of the raw features lose it, 60 % in place of 91."""
    y = torch.arange(10).repeat(100)
    centres = torch.randn(10, 64, generator=common.rng(0))
    x = centres[y] + 1.2 * torch.randn(1000, 64, generator=common.rng(1))
    near = lambda z: common.knn_accuracy(z[:800], y[:800], z[800:], y[800:])
    assert near(x) > 85 and abs(near(1 + 3e-4 * x) - near(x)) < 3


def test_the_monitor_keeps_labels_with_their_images():
    labels = torch.randint(0, 2, (300,), generator=common.rng(1))
    images = (60 + 120 * labels)[:, None, None, None].expand(300, 3, 8, 8).to(torch.uint8).clone()
    data = common.Data("d", images[:200], labels[:200], images[200:], labels[200:], 8, ["a", "b"])
    args = Namespace(image_size=8, workers=0)
    assert common.monitor(None, data, args, {"mean": (0.5,) * 3, "std": (0.2,) * 3}, torch.device("cpu"))["knn5"] == 100
