"""The numbers of the recipes that stand in a paper, written down here from the paper.

A recipe is read by nobody else: a slip in it would train something else, and no other test would
see it.
"""
import types

import pytest
import torch
import torchvision
from torch import nn

import barlow_sparsehead
import byol_gessl
import common
import mae_tc2
import simclr_tc2

# TC2 Appendix IV, for the small data sets and for ImageNet.
TC2_SMALL = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5,
             "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.1, "blur_p": 0,
             "solarize_p": 0}
TC2_IMAGENET = {**TC2_SMALL, "crop": (0.08, 1.0), "jitter": (0.8, 0.8, 0.8, 0.2), "gray_p": 0.2,
                "blur_p": 0.5}
# BYOL Appendix B, and Barlow Twins, Section 2.2, which follows it.
BYOL_FIRST = {**TC2_IMAGENET, "jitter": (0.4, 0.4, 0.2, 0.1), "blur_p": 1.0}
BYOL_SECOND = {**BYOL_FIRST, "blur_p": 0.1, "solarize_p": 0.2}
# MAE Section 4: cropping and flipping, no colours.
MAE = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter_p": 0, "gray_p": 0,
       "blur_p": 0, "solarize_p": 0}


def augmentation(script, image_size):
    """The recipe of each view of images that are no drawn shapes."""
    x = torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(600, dtype=torch.int64)
    data = common.Data("photos", x, labels, x, labels, image_size, ["a"], "x")
    args = script.parse_args([])
    script.fill_defaults(args, data, torch.device("cpu"))
    return script.view_augmentations(args, data)


@pytest.mark.parametrize("script, image_size, expected", [
    (simclr_tc2, 32, [TC2_SMALL] * 4), (simclr_tc2, 224, [TC2_IMAGENET] * 4),
    (byol_gessl, 32, [TC2_SMALL] * 2), (byol_gessl, 224, [BYOL_FIRST, BYOL_SECOND]),
    (barlow_sparsehead, 32, [TC2_SMALL] * 2), (barlow_sparsehead, 224, [BYOL_FIRST, BYOL_SECOND]),
    (mae_tc2, 32, [MAE]), (mae_tc2, 224, [MAE])])
def test_views_are_augmented_as_the_papers_say(script, image_size, expected):
    found = augmentation(script, image_size)
    assert len(found) == len(expected)
    for view, paper in zip(found, expected):
        for name, value in paper.items():
            assert view[name] == value, name


def test_drawn_shapes_are_grayer_where_colour_would_tell_them_apart():
    for script, gray in ((simclr_tc2, 0.1), (byol_gessl, 0.3), (barlow_sparsehead, 0.3)):
        recipes = script.AUGMENTATION["shapes"]
        for view in [recipes] if isinstance(recipes, dict) else recipes:
            assert {**TC2_SMALL, "gray_p": gray}.items() <= view.items()


def test_mae_has_the_rate_of_its_appendix_in_proportion_to_the_batch():
    recipe = mae_tc2.RECIPES["imagenet"]
    assert recipe["lr"] == pytest.approx(1.5e-4 * recipe["batch_size"] / 256)
    assert recipe["weight_decay"] == 0.05 and recipe["warmup_epochs"] == 40
    assert recipe["norm_pixels"] and recipe["patch_size"] == 16 and recipe["position_base"] == 1e4


def test_simclr_has_the_pre_training_that_its_probe_is_cited_for():
    recipe = simclr_tc2.RECIPES["small"]                # Ermolov et al. 2021, Section 4
    assert (recipe["lr"], recipe["epochs"]) == (3e-3, 1000)
    assert recipe["weight_decay"] == 0                  # theirs is 1e-6, see RECIPES
    assert (recipe["temperature"], recipe["dim"], recipe["batch_size"]) == (0.5, 64, 512)


def test_gessl_has_the_papers_tasks_and_byols_widths():
    recipe = byol_gessl.RECIPES["imagenet"]
    assert (recipe["batch_size"], recipe["tasks"]) == (32, 8)           # GeSSL Appendix G.5
    assert recipe["target_steps"] == 10                                 # Section 5
    assert (recipe["hidden"], recipe["dim"]) == (4096, 256)             # BYOL Section 3.3


def test_sparsehead_has_the_papers_training_and_barlow_twins_widths():
    small = barlow_sparsehead.RECIPES["small"]                          # SparseHead Section 7.1
    assert (small["lr"], small["epochs"], small["weight_decay"]) == (3e-3, 1000, 1e-6)
    large = barlow_sparsehead.RECIPES["imagenet"]
    assert (large["hidden"], large["dim"], large["epochs"]) == (8192, 8192, 1000)
    assert barlow_sparsehead.parse_args([]).lambda_offdiag == 5e-3      # Barlow Twins Section 2.2
    args = barlow_sparsehead.parse_args(["--penalty", "bilevel"])
    assert (args.inner_steps, args.inner_lr, barlow_sparsehead.RHO) == (5, 0.01, 0.1)


@pytest.mark.parametrize("arch, peer", [("vit_base", "vit_b_16"), ("vit_large", "vit_l_16")])
def test_large_vits_are_torchvisions_and_have_maes_decoder(arch, peer):
    with torch.device("meta"):
        encoder = mae_tc2.Encoder(224, 16, *mae_tc2.ARCHS[arch])
        vit = getattr(torchvision.models, peer)()
        vit.heads = nn.Identity()
    weights = mae_tc2.to_torchvision(encoder.state_dict(), 16)
    found = {name: value.shape for name, value in weights.items()}
    assert found == {name: value.shape for name, value in vit.state_dict().items()}
    assert encoder.blocks[0].heads == vit.encoder.layers[0].num_heads
    assert mae_tc2.DECODERS[arch] == (512, 8)                           # MAE Section 4


def test_tokens_start_small():
    for net, token in ((mae_tc2.Encoder(32, 4, 96, 1, 3), "class_token"),
                       (mae_tc2.Decoder(32, 4, 96, 64, 1), "mask_token")):
        values = getattr(net, token)
        assert 0.005 < values.abs().mean() < 0.1


def test_limits_are_those_that_the_docstrings_name():
    assert simclr_tc2.LIMITS["inner_step"][0] == 0.1
    assert mae_tc2.LIMITS["inner_step"][0] == 0.003
    assert byol_gessl.LIMITS["curvature"][0] == 1 == byol_gessl.LIMITS["alpha_lambda_max"][0]
    assert barlow_sparsehead.LIMITS["rescaling"][0] == 0.5


def test_a_baseline_has_a_folder_of_its_own():
    for flags, out in (([], "runs/simclr_tc2"), (["--baseline"], "runs/simclr_tc2-baseline")):
        args = simclr_tc2.parse_args(["--data", "fake", *flags])
        simclr_tc2.fill_defaults(args, common.load_data("fake"), torch.device("cpu"))
        assert args.out == out


@pytest.mark.parametrize("epochs, warmup", [(5, 0.5), (6, 5.0)])
def test_a_recipes_warm_up_that_is_as_long_as_the_run_becomes_a_tenth(epochs, warmup):
    args = simclr_tc2.parse_args(["--data", "fake", "--epochs", str(epochs)])
    simclr_tc2.fill_defaults(args, common.load_data("fake"), torch.device("cpu"))
    assert args.warmup_epochs == warmup


def test_a_warm_up_may_last_as_long_as_the_run():
    args = simclr_tc2.parse_args(["--data", "fake", "--epochs", "3", "--warmup-epochs", "3"])
    data = common.load_data("fake")
    simclr_tc2.fill_defaults(args, data, torch.device("cpu"))
    assert common.check_shared_flags(args, data, 1) is None
    too_long = types.SimpleNamespace(**{**vars(args), "warmup_epochs": 3.1})
    with pytest.raises(SystemExit):
        common.check_shared_flags(too_long, data, 1)
