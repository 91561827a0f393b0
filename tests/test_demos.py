"""results/demos.py: the toy of Theorem 1 against what the theorem says; pictures appear."""
import importlib.util
import json
import os
import sys

import pytest
import torch
from torch import nn

import common
from conftest import ROOT

sys.path.insert(0, f"{ROOT}/results")
spec = importlib.util.spec_from_file_location("demos", f"{ROOT}/results/demos.py")
demos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demos)


def ratio(c, n, repeats=1):
    drawn = [demos.weight_ratio(c, n, seed) for seed in range(repeats)]
    return sum(drawn) / repeats


def population_ratio(c):
    """|w_j| / |w_i| of Theorem 1's toy for infinitely many samples, by Newton's method on a grid.

    Given Y_i = 1 (the other half is its mirror image), x_i is N(1, 1) and x_j a mixture."""
    grid = torch.linspace(-7, 7, 141, dtype=torch.float64)
    x_i, x_j = torch.meshgrid(grid, grid, indexing="ij")

    def bell(x, mean):
        return torch.exp(-(x - mean) ** 2 / 2)

    p = bell(x_i, 1) * (c * bell(x_j, 1) + (1 - c) * bell(x_j, -1))
    p = p.flatten() / p.sum()
    x = torch.stack([x_i.flatten(), x_j.flatten()])
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):
        wrong = torch.sigmoid(-(w @ x))
        gradient = x @ (p * wrong)
        hessian = (x * (p * wrong * (1 - wrong))) @ x.T
        w = w + torch.linalg.solve(hessian, gradient)
    return (w[1] / w[0]).abs().item()


@pytest.mark.parametrize("c", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_other_tasks_factor_has_weight_unless_the_labels_are_independent(c):
    """[TC2 Theorem 1], first sentence. At n = 50,000 a weight's standard error is about 0.01."""
    expected = population_ratio(c)
    assert abs(ratio(c, 50_000) - expected) < 0.03
    assert expected > 0.15 or c == 0.5


def test_limited_samples_give_it_weight_even_then():
    """[TC2 Theorem 1], second sentence: the error of a weight falls as 1 / sqrt(n)."""
    few = ratio(0.5, 50, repeats=40)
    many = ratio(0.5, 5000, repeats=40)
    assert 5 < few / many < 20                      # sqrt(100) = 10, were the ratios normal


def test_certain_labels_make_the_two_factors_alike():
    """With Y_j = Y_i the factors are two equally noisy views of one label."""
    assert abs(ratio(1.0, 50_000) - 1) < 0.05


@pytest.mark.parametrize("name, options", [
    ("fig1", {"steps": 2}), ("conflict", {"runs": 4, "steps": 2, "sizes": (4, 8)}),
    ("theorem1", {"repeats": 1})])
def test_a_demonstration_leaves_a_picture_and_a_caption(name, options, tmp_path, monkeypatch,
                                                        capsys):
    def small_data(_):
        return common.load_data("fake")

    monkeypatch.setattr(demos, "load_data", small_data)
    path = tmp_path / "deep" / "picture.png"
    demos.DEMOS[name](0, str(path), **options)
    picture = common.decode(str(path))
    assert picture.shape[1] > 300 and picture.float().std() > 10
    said = capsys.readouterr().out
    assert str(path) in said and "Seen" in said


def test_a_caption_is_no_wider_than_its_picture(tmp_path, monkeypatch):
    import matplotlib.figure
    captions = []
    monkeypatch.setattr(matplotlib.figure.Figure, "supxlabel",
                        lambda self, text, **style: captions.append(text))
    panel = (("x", "y"), {"curve": ([1, 2], [3, 4])}, "-")
    for panels in ({"one": panel}, {"one": panel, "two": panel}):
        demos.show(str(tmp_path / "p" / "x.png"), panels, "first line\n" + "word " * 60)
    one, two = captions
    assert max(map(len, one.split("\n"))) <= 85 < max(map(len, two.split("\n"))) <= 170
    assert one.split("\n")[0] == "first line" and one.split() == two.split()


def test_the_interval_of_a_correlation_is_fishers():
    """A classic value: r = 0.5 over 28 pairs has 0.156 to 0.736 (z = 0.549 +- 0.392)."""
    low, high = demos.correlation_interval(0.5, 28)
    assert abs(low - 0.1559) < 1e-3 and abs(high - 0.7357) < 1e-3


def test_a_step_of_the_demonstrations_is_simclrs():
    """By hand: Adam on the cross-entropy of each view among all others but itself."""
    data = common.load_data("fake")
    encoder, _ = demos.train_simclr(demos.linear_head, 1, 3, data, batch_size=8)

    torch.manual_seed(3)
    backbone, d = common.make_backbone("resnet_tiny", 32)
    by_hand = nn.Sequential(backbone, demos.linear_head(d))
    opt = torch.optim.Adam(by_hand.parameters(), 3e-3)
    args = demos.Settings(8, 3)
    views, _ = next(common.training_batches(data, [demos.WEAK] * 2, args, 0, 1, demos.CPU, 0, 1))
    z = nn.functional.normalize(by_hand(views.flatten(0, 1)), dim=1)
    similarity = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    nn.functional.cross_entropy(similarity, torch.arange(16).roll(8)).backward()
    opt.step()
    for found, expected in zip(encoder.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_groups_is_simclr_plus_t(monkeypatch):
    """With one group the encoder is that of plain SimCLR, with two it is another."""
    data = common.load_data("fake")
    weights = []
    for groups in (1, 1, 2):
        encoder, _ = demos.train_simclr(demos.linear_head, 2, 0, data, groups=groups)
        weights.append(nn.utils.parameters_to_vector(encoder.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adaptation_draws_the_ratio_from_two_logs(tmp_path, monkeypatch, capsys):
    def short_run(argv):
        """The log alone of a run of byol_gessl."""
        out = argv[argv.index("--out") + 1]
        os.makedirs(out)
        after = 40 if "--baseline" in argv else 80
        rows = [{"settings": {"images": 64, "images_per_step": 64}},
                {"step": 1, "adapted_before": 10, "adapted_after": after}]
        with open(f"{out}/log.jsonl", "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(demos.byol_gessl, "main", short_run)
    demos.adaptation(0, f"{tmp_path}/adaptation.png")
    assert common.decode(f"{tmp_path}/adaptation.png").shape[1] > 300
    assert "epoch 1: 0.50" in capsys.readouterr().out
