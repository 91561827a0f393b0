"""results/demos.py: the toy of Theorem 1 against what the theorem says; pictures appear."""
import importlib.util
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


def test_the_other_tasks_factor_has_weight_unless_the_labels_are_independent():
    """[TC2 Theorem 1], first sentence. At n = 50,000 a weight's standard error is about 0.01."""
    assert ratio(0.5, 50_000) < 0.03
    assert 0.15 < ratio(0.7, 50_000) < 0.27
    assert ratio(0.9, 50_000) > ratio(0.7, 50_000) + 0.2
    assert abs(ratio(0.9, 50_000) - ratio(0.1, 50_000)) < 0.06


def test_limited_samples_give_it_weight_even_then():
    """[TC2 Theorem 1], second sentence: the error of a weight falls as 1 / sqrt(n)."""
    few = ratio(0.5, 50, repeats=40)
    many = ratio(0.5, 5000, repeats=40)
    assert 5 < few / many < 20                      # sqrt(100) = 10, were the ratios normal


def test_certain_labels_make_the_two_factors_alike():
    """With Y_j = Y_i the factors are two equally noisy views of one label."""
    assert abs(ratio(1.0, 50_000) - 1) < 0.05


@pytest.mark.parametrize("name, options", [
    ("fig1", {"steps": 2}), ("conflict", {"runs": 2, "steps": 2, "sizes": (4, 8)}),
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
    assert str(path) in capsys.readouterr().out


def test_the_loss_of_groups_is_simclr_plus_t(monkeypatch):
    """With one group the encoder is that of plain SimCLR, with two it is another."""
    data = common.load_data("fake")
    weights = []
    for groups in (1, 1, 2):
        encoder, _ = demos.train_simclr(demos.linear_head, 2, 0, data, groups=groups)
        weights.append(nn.utils.parameters_to_vector(encoder.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
