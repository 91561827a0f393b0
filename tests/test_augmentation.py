"""The batched augmentation of common.py against torchvision's operations on one image at a time.

`augment` is a pure function of the random numbers that it is given. So two kinds of tests are
possible: with chosen numbers it must do what torchvision does with those numbers, to rounding; and
with uniform numbers its distribution must be that of torchvision's random transforms, by a
two-sample test on statistics that tell the operations apart.
"""
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.overrides import TorchFunctionMode
from torchvision.transforms import functional as TF

import common

RATIO = (3 / 4, 4 / 3)
MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.3, 0.25)
OFF = {
    "crop": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter": (0.0, 0.0, 0.0, 0.0),
    "jitter_p": 0.0,
    "gray_p": 0.0,
    "blur_p": 0.0,
    "solarize_p": 0.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
FULL = {
    "crop": (0.2, 1.0),
    "ratio": RATIO,
    "flip": 0.5,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_p": 0.8,
    "gray_p": 0.2,
    "blur_p": 0.5,
    "solarize_p": 0.2,
    "mean": MEAN,
    "std": STD,
}
NAMES = ("brightness", "contrast", "saturation", "hue")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def noise(n, height, width):
    shape = (n, 3, height, width)
    return torch.randint(0, 256, shape, generator=common.rng("noise"), dtype=torch.uint8)


def draws(n, *key):
    return torch.rand(n, common.AUGMENT_DRAWS, generator=common.rng("draws", *key))


def order_of(*key):
    return torch.randperm(4, generator=common.rng("order", *key)).tolist()


def copies(n, image, recipe, size=None):
    """n augmentations of one image (1, 3, H, W); what the recipe does not name is off."""
    images = image.expand(n, -1, -1, -1)
    return common.augment(images, draws(n), order_of(), {**OFF, **recipe}, size)


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov test at level 1e-5; a dither swallows rounding errors."""
    generator = np.random.default_rng(0)
    a = dithered(a, generator)
    b = dithered(b, generator)
    points = np.concatenate([a, b])
    cdf_a = np.searchsorted(a, points, "right") / len(a)
    cdf_b = np.searchsorted(b, points, "right") / len(b)
    limit = 2.47 * math.sqrt(1 / len(a) + 1 / len(b))
    assert np.abs(cdf_a - cdf_b).max() < limit


def dithered(x, generator):
    x = np.asarray(x, dtype=float)
    return np.sort(x + 1e-3 * generator.random(len(x)))


def assert_fraction(hits, p):
    """A share of p to 4.5 standard errors."""
    error = math.sqrt(p * (1 - p) / len(hits))
    assert abs(hits.double().mean().item() - p) < 4.5 * error + 0.003


# ---- boxes ---------------------------------------------------------------------------------------
def boxes_of_torchvision(n, height, width, scale, ratio):
    torch.manual_seed(0)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    blank = torch.empty(3, height, width)
    boxes = [get_params(blank, list(scale), list(ratio)) for _ in range(n)]
    return torch.tensor(boxes).double()


@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (0.2, 1.0), RATIO),
    (100, 40, (0.2, 1.0), RATIO),
    (100, 40, (0.05, 0.5), (1 / 4, 1.0)),
    (375, 500, (0.08, 1.0), RATIO),
    (4, 60, (0.02, 0.5), RATIO),                # some draws run out of tries
    (1, 50, (0.2, 1.0), RATIO),                 # all do
    (300, 3, (0.2, 1.0), RATIO),
    (300, 3, (0.2, 1.0), (1 / 2, 1.0)),
])
def test_boxes_are_distributed_as_those_of_random_resized_crop(height, width, scale, ratio):
    u = draws(4000)[:, :common.BOX_DRAWS]
    boxes = common.random_boxes(u, height, width, scale, ratio).double()
    expected = boxes_of_torchvision(4000, height, width, scale, ratio)
    top, left, h, w = boxes.T
    top_expected, left_expected, h_expected, w_expected = expected.T

    assert_same_distribution(h * w, h_expected * w_expected)
    assert_same_distribution((w / h).log(), (w_expected / h_expected).log())
    assert_same_distribution(h, h_expected)
    assert_same_distribution(w, w_expected)
    # Where all tries fail, which takes a strip, ours lies anywhere and torchvision's in the centre.
    if max(height, width) < 3 * min(height, width):
        assert_same_distribution(top, top_expected)
        assert_same_distribution(left, left_expected)
        assert_same_distribution(top - left, top_expected - left_expected)
        assert_same_distribution(top + h / 2, top_expected + h_expected / 2)
        assert_same_distribution(left + w / 2, left_expected + w_expected / 2)

    assert torch.equal(boxes, boxes.round())
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


def test_in_a_strip_the_largest_box_of_an_allowed_ratio_lies_anywhere():
    u = draws(4000)[:, :common.BOX_DRAWS]
    boxes = common.random_boxes(u, 300, 3, (0.2, 1.0), RATIO)
    top = boxes[:, 0]
    assert boxes[:, 1:].unique(dim=0).tolist() == [[0, 4, 3]]
    assert_same_distribution(top, torch.arange(297).repeat(10))


# ---- crop and resize -----------------------------------------------------------------------------
def test_a_ramp_is_cropped_to_the_ramp_that_it_is():
    """Bilinear sampling keeps what is linear, so every pixel has a closed form.

    It holds at the border of a box too: the pixels just outside it count, where torchvision repeats
    the last ones inside."""
    y = torch.arange(60.0)[:, None].expand(60, 50)
    x = torch.arange(50.0)[None].expand(60, 50)
    image = torch.stack([x, y, 2 * x - y])
    boxes = [
        [3, 5, 9, 8],
        [10, 2, 40, 30],
        [20, 20, 2, 3],
        [5, 30, 50, 16],
    ]
    for size in (7, 16, 24):
        images = image.expand(4, -1, -1, -1)
        out = common.crop_resize(images, torch.tensor(boxes).float(), size)
        for found, (top, left, h, w) in zip(out, boxes):
            centre = (torch.arange(size) + 0.5) / size
            rows = (top + h * centre - 0.5)[:, None].expand(size, size)
            columns = (left + w * centre - 0.5)[None].expand(size, size)
            expected = torch.stack([columns, rows, 2 * columns - rows])
            close(found, expected, 1e-3)


def test_enlarged_crops_equal_torchvision_in_the_interior():
    images = noise(3, 50, 36) / 255
    boxes = [
        [3, 5, 9, 8],
        [20, 0, 24, 30],
        [40, 26, 10, 10],
    ]
    size = 40
    out = common.crop_resize(images, torch.tensor(boxes).float(), size)
    for image, found, box in zip(images, out, boxes):
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        edge_rows = math.ceil(size / box[2] / 2)        # half a pixel of the image, at each side
        edge_columns = math.ceil(size / box[3] / 2)
        difference = (found - expected).abs()
        interior = difference[:, edge_rows:-edge_rows, edge_columns:-edge_columns]
        assert interior.numel() > 1000 and interior.max() < 1e-4
        # At the border, up to half of what lies outside.
        assert difference.max() < 0.5


def test_whole_image_and_equal_size_have_their_closed_forms():
    images = noise(1, 24, 24) / 255
    whole = torch.tensor([[0.0, 0, 24, 24]])
    # Nothing lies outside the whole image: torchvision's borders too.
    enlarged = F.interpolate(images, (31, 31), mode="bilinear")
    close(common.crop_resize(images, whole, 31), enlarged)
    close(common.crop_resize(images, whole, 24), images)

    box = torch.tensor([[4.0, 6, 12, 12]])
    part = images[:, :, 4:16, 6:18]
    close(common.crop_resize(images, box, 12), part)


def test_augment_crops_as_random_resized_crop_does():
    rows = torch.arange(40)[:, None].expand(40, 24) * 6
    columns = torch.arange(24)[None].expand(40, 24) * 10
    image = torch.stack([rows, columns, rows]).to(torch.uint8)      # a pixel's value is its place
    recipe = {"crop": (0.1, 0.6), "ratio": (0.5, 2.0)}
    out = copies(1000, image[None], recipe, size=16)

    torch.manual_seed(0)
    transform = torchvision.transforms.RandomResizedCrop
    reference = transform(16, recipe["crop"], recipe["ratio"])
    expected = torch.stack([reference(image / 255) for _ in range(1000)])
    assert out.shape == (1000, 3, 16, 16)
    for channel in (0, 1):
        found, wanted = out[:, channel], expected[:, channel]
        assert_same_distribution(found.mean((1, 2)), wanted.mean((1, 2)))
        assert_same_distribution(found.std((1, 2)), wanted.std((1, 2)))


# ---- colours -------------------------------------------------------------------------------------
FACTORS = (0.0, 0.3, 1.0, 1.4, 2.5, 1.7)
TURNS = (-0.5, -0.23, 0.0, 0.1, 0.5, -0.3)


@pytest.mark.parametrize("name, factors", [
    ("brightness", FACTORS),
    ("contrast", FACTORS),
    ("saturation", FACTORS),
    ("hue", TURNS),
])
def test_colour_operations_equal_torchvision_with_a_factor_per_sample(name, factors):
    x = torch.rand(6, 3, 9, 14, generator=common.rng(2))
    corners = list(itertools.product((0.0, 0.5, 1.0), repeat=3))
    x[..., :3] = torch.tensor(corners).T.reshape(3, 9, 3)       # grays, pure colours, ties
    x[5] = x[5, :1]                                             # a gray image
    before = x.clone()

    adjust = getattr(TF, f"adjust_{name}")
    expected = [adjust(image, factor) for image, factor in zip(x, factors)]
    found = getattr(common, name)(x, torch.tensor(factors))
    close(found, torch.stack(expected))
    assert torch.equal(x, before)


@pytest.mark.parametrize("size, kernel", [
    (12, 3),
    (32, 3),
    (48, 5),
    (65, 7),
    (96, 9),
])
def test_blur_equals_torchvision_with_a_sigma_per_sample(size, kernel):
    x = noise(5, size, size) / 255
    sigmas = (0.1, 0.7, 0.0, 2.0, 5.0)
    out = common.gaussian_blur(x, torch.tensor(sigmas))
    for image, found, sigma in zip(x, out, sigmas):
        if sigma:
            image = TF.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
        close(found, image)
    assert torch.equal(out[2], x[2])                            # 0 = not at all


@pytest.mark.parametrize("jitter, p", [
    ((0.4, 0.0, 0.0, 0.0), 1.0),
    ((0.0, 0.5, 0.0, 0.0), 1.0),
    ((0.0, 0.0, 0.6, 0.0), 1.0),
    ((0.0, 0.0, 0.0, 0.1), 1.0),
    ((0.8, 0.8, 0.8, 0.2), 0.8),
    ((0.4, 0.4, 0.4, 0.1), 0.3),
])
def test_jitter_is_distributed_as_random_apply_of_color_jitter(jitter, p):
    image = noise(1, 8, 8) // 4 + colour(120, 70, 60)
    recipe = {**OFF, "jitter": jitter, "jitter_p": p}
    views = []
    for i in range(750):                        # of two images each: a view has one order
        pair = image.expand(2, -1, -1, -1)
        views.append(common.augment(pair, draws(2, i), order_of(i), recipe))
    out = torch.cat(views)

    torch.manual_seed(0)
    color_jitter = torchvision.transforms.ColorJitter(*jitter)
    reference = torchvision.transforms.RandomApply([color_jitter], p)
    expected = torch.stack([reference(image[0] / 255) for _ in range(1500)])
    for statistic in (mean_luma, std_luma, mean_chroma, mean_hue):
        assert_same_distribution(statistic(out), statistic(expected))
    changed = (out - image / 255).abs().amax((1, 2, 3)) > 1e-5
    assert_fraction(changed, p)


def colour(*rgb):
    return torch.tensor(rgb, dtype=torch.uint8)[:, None, None]


def mean_luma(x):
    return TF.rgb_to_grayscale(x).mean((1, 2, 3))


def std_luma(x):
    return TF.rgb_to_grayscale(x).std((1, 2, 3))


def mean_chroma(x):
    return (x.amax(1) - x.amin(1)).mean((1, 2))


def mean_hue(x):
    red, green, blue = x.unbind(1)
    return torch.atan2(green - blue, 2 * red - green - blue).mean((1, 2))


def test_colour_operations_take_the_order_they_are_given():
    """Each operation alone is checked above; here, with known draws, all four in a row."""
    x = noise(2, 16, 16)
    u = draws(2)
    recipe = {**OFF, "jitter": (0.4, 0.3, 0.2, 0.1), "jitter_p": 1.0}
    found = []
    for order in itertools.permutations(range(4)):
        expected = x / 255
        for i in order:
            adjust = getattr(TF, f"adjust_{NAMES[i]}")
            draw = u[:, common.BOX_DRAWS + 2 + i]
            factors = (2 * draw - 1) * recipe["jitter"][i]
            if NAMES[i] != "hue":
                factors = 1 + factors
            pairs = zip(expected, factors.tolist())
            expected = torch.stack([adjust(image, factor) for image, factor in pairs])
        found.append(common.augment(x, u, order, recipe))
        close(found[-1], expected, 1e-4)
    for a, b in itertools.combinations(found, 2):
        assert not torch.equal(a, b)


# ---- the whole view ------------------------------------------------------------------------------
def as_floats(x):
    return x / 255


def mirrored(x):
    return x.flip(-1) / 255


def gray(x):
    return TF.rgb_to_grayscale(x / 255, 3)


def solarized(x):
    return TF.solarize(x, 128) / 255


def normalized(x):
    return TF.normalize(x / 255, MEAN, STD)


@pytest.mark.parametrize("size", [16, None])
@pytest.mark.parametrize("recipe, expected", [
    ({}, as_floats),
    ({"flip": 1.0}, mirrored),
    ({"gray_p": 1.0}, gray),
    ({"solarize_p": 1.0}, solarized),
    ({"mean": MEAN, "std": STD}, normalized),
])
def test_certain_operations_of_augment_equal_torchvision(recipe, expected, size):
    x = noise(4, 16, 16)
    if size is None:                            # images that are cropped already
        recipe = {**recipe, "crop": (0.2, 0.4)}
    recipe = {**OFF, **recipe}
    out = common.augment(x, draws(4), order_of(), recipe, size)
    assert out.dtype == torch.float32
    close(out, expected(x))


@pytest.mark.parametrize("size", [32, None])
def test_flip_jitter_gray_blur_and_solarize_have_their_probabilities_and_are_independent(size):
    image = torch.empty(1, 3, 32, 32, dtype=torch.uint8)        # two bright halves tell them apart
    image[..., :16] = colour(250, 150, 140)
    image[..., 16:] = colour(140, 150, 250)
    recipe = {"flip": 0.3, "gray_p": 0.2, "solarize_p": 0.35, "blur_p": 0.6, "jitter_p": 0.5,
              "jitter": (0.05, 0.0, 0.0, 0.0)}
    out = copies(3000, image, recipe, size)

    left = out[:, 0, 8, 4]
    edge = out[:, 0, 8, 15]
    right = out[:, 0, 8, 28]
    # The outer weight of the blur's three taps gives its sigma.
    tap = (edge - left) / (right - left)
    ratio = tap / (1 - 2 * tap)
    sigma = (-0.5 / ratio.clamp(min=1e-9).log()).sqrt()
    solarized = left < 0.5
    colourful = (out[:, 0] - out[:, 2]).abs().amax((1, 2))
    brighter = mean_luma(torch.maximum(out, 1 - out)) - mean_luma(image / 255)
    happened = {
        "blur": sigma > 0.3,
        "flip": (left < right) ^ solarized,
        "solarize": solarized,
        "gray": colourful < 1e-5,
        "jitter": brighter.abs() > 1e-4,
    }
    # Sigma is uniform in [0.1, 2].
    expected = {"flip": 0.3, "solarize": 0.35, "gray": 0.2, "jitter": 0.5}
    expected["blur"] = 0.6 * 1.7 / 1.9

    for a, p in expected.items():
        assert_fraction(happened[a], p)
    for a, b in itertools.combinations(expected, 2):
        assert_fraction(happened[a] & happened[b], expected[a] * expected[b])
    assert_same_distribution(sigma[sigma > 0.3], torch.linspace(0.3, 2.0, 10000))


@pytest.mark.parametrize("size, recipe", [
    (32, {"crop": (0.2, 1.0), "ratio": (0.5, 2.0)}),
    (32, FULL),
    (None, {"jitter": (0.4, 0.0, 0.0, 0.0), "jitter_p": 1.0}),
    (None, {"jitter": (0.0, 0.0, 0.0, 0.1), "jitter_p": 1.0}),
    (None, {"blur_p": 1.0}),
])
def test_copies_of_one_image_are_augmented_differently(size, recipe):
    out = copies(12, noise(1, 32, 32), recipe, size).flatten(1)
    assert len(out.unique(dim=0)) == 12


def test_augment_is_a_pure_function_and_normalises_last():
    images = noise(6, 32, 32)
    u = draws(6)
    raw = {**FULL, "mean": OFF["mean"], "std": OFF["std"]}
    outputs = []
    for seed, recipe in ((1, FULL), (2, FULL), (3, raw)):
        state = torch.manual_seed(seed).get_state()
        outputs.append(common.augment(images, u, [2, 0, 3, 1], recipe, 24))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(images, noise(6, 32, 32))
        assert torch.equal(u, draws(6))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[2].min() > -1e-5 and outputs[2].max() < 1 + 1e-5
    close(outputs[0], TF.normalize(outputs[2], MEAN, STD))


def test_denormalize_is_the_inverse_of_normalize():
    x = torch.rand(4, 3, 8, 8, generator=common.rng(0))
    normalized = common.normalize(x, FULL)
    close(normalized, TF.normalize(x, MEAN, STD))
    close(common.denormalize(normalized, FULL), x)
    assert common.denormalize(99 * normalized, FULL).max() == 1


class NoNumbersToTheDevice(TorchFunctionMode):
    """Python numbers that become a tensor on a GPU make the program wait for it."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.get("device") or "cpu"
            assert torch.device(device).type == "cpu", func
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "new_tensor", "nonzero"), func
        return func(*args, **kwargs)


@pytest.mark.parametrize("size", [24, None])
def test_augment_does_not_wait_for_the_device(size):
    images = noise(6, 32, 32).to("meta")            # has no values that one could ask for
    u = draws(6).to("meta")
    with NoNumbersToTheDevice():
        out = common.augment(images, u, [0, 1, 2, 3], FULL, size)
        with pytest.raises(AssertionError):
            torch.tensor([1.0], device=out.device)
    assert out.device.type == "meta"
    assert out.shape == (6, 3, size or 32, size or 32)


# ---- batches of views ----------------------------------------------------------------------------
def batches(images, recipes, rank=0, world=1, stop=3, batch_size=12):
    data = common.Data("x", images, None, [], None, 32, None, "x")
    args = Namespace(images_per_step=batch_size, image_size=24, seed=0, workers=0)
    device = torch.device("cpu")
    return list(common.training_batches(data, recipes, args, rank, world, device, 0, stop))


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_a_batch_augment_to_the_whole_batch_bit_for_bit(world):
    images = noise(30, 32, 32)
    recipes = [FULL, {**FULL, "solarize_p": 0.0}]
    whole = batches(images, recipes)
    shares = [batches(images, recipes, rank, world) for rank in range(world)]
    for step, (views, index) in enumerate(whole):
        parts = [share[step] for share in shares]
        joined = torch.cat([part for part, _ in parts], dim=1)
        assert torch.equal(joined, views)
        assert sum([own for _, own in parts], []) == index
        assert len(set(index)) == 12
    assert views.shape == (2, 12, 3, 24, 24)


def test_every_view_has_its_own_draws_its_own_order_and_its_own_recipe(monkeypatch):
    seen = []
    augment = common.augment

    def note(images, u, order, recipe, size):
        seen.append((tuple(order), u, recipe["gray_p"]))
        return augment(images, u, order, recipe, size)

    monkeypatch.setattr(common, "augment", note)
    recipes = [FULL, {**FULL, "gray_p": 0.7}]
    batches(noise(4, 32, 32), recipes, stop=100, batch_size=2)
    orders, numbers, gray_p = zip(*seen)
    assert len(orders) == 200 and len(set(orders)) == 24
    same = [a == b for a, b in zip(orders[::2], orders[1::2])]
    assert sum(same) < 20                                       # one in 24 by chance
    assert list(gray_p) == [0.2, 0.7] * 100
    u = torch.cat(numbers)
    assert u.shape == (400, common.AUGMENT_DRAWS)
    assert len(u.unique(dim=0)) == 400
    assert_same_distribution(u.flatten(), torch.linspace(0, 1, 10000))


# ---- a whole view --------------------------------------------------------------------------------
def test_a_whole_view_is_torchvisions_operations_in_simclrs_order():
    """With the view's own draws: flip, jitter, gray, blur, solarize, normalise.

    [SimCLR Appendix A, BYOL Appendix B]"""
    x = noise(64, 32, 32)
    u = draws(64)
    order = [2, 0, 3, 1]
    found = common.augment(x, u, order, FULL)

    flip, jitter, *strengths, gray, blur, sigma, solarize = u[:, common.BOX_DRAWS:].unbind(1)
    for i in range(len(x)):
        y = x[i] / 255
        if flip[i] < 0.5:
            y = TF.hflip(y)
        if jitter[i] < 0.8:
            for k in order:
                change = (2 * strengths[k][i].item() - 1) * FULL["jitter"][k]
                neutral = 0 if NAMES[k] == "hue" else 1
                y = getattr(TF, f"adjust_{NAMES[k]}")(y, neutral + change)
        if gray[i] < 0.2:
            y = TF.rgb_to_grayscale(y, 3)
        if blur[i] < 0.5:
            width = 0.1 + 1.9 * sigma[i].item()
            y = TF.gaussian_blur(y, [3, 3], [width, width])
        if solarize[i] < 0.2:
            y = torch.minimum(y, 1 - y)
        close(found[i], TF.normalize(y, MEAN, STD), 2e-3)


def one_view(train, recipes, seed):
    """The views of the one image of a data set: their order cannot differ."""
    data = common.Data("x", train, None, [], None, 24, None, "x")
    args = Namespace(images_per_step=1, image_size=24, seed=seed, workers=0)
    views, _ = next(common.training_batches(data, recipes, args, 0, 1, torch.device("cpu"), 0, 1))
    return views


def test_augmentation_depends_on_the_seed():
    first, second = (one_view(noise(1, 24, 24), [FULL], seed) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_crops_of_files_depend_on_the_seed_and_are_those_of_the_first_recipe(tmp_path):
    image = noise(1, 120, 120)[0]
    path = str(tmp_path / "x.png")
    torchvision.io.write_png(image, path)
    recipes = [{**OFF, "crop": (0.1, 0.2)}, OFF]
    first, second = (one_view([path], recipes, seed) for seed in (0, 1))
    assert not torch.allclose(first, second)
    whole = TF.resize(image, [24, 24], antialias=True) / 255
    for view in first[:, 0]:
        assert not torch.allclose(view, whole, atol=0.01)
