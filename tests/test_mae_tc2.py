"""MAE and its calibration by TC2, against slow code written from the papers.

How one tests such a method: every array operation has a reference that loops over pixels, patches
and heads, and takes its weights from a dictionary, so that it can be differentiated at any weights.
The masks come from a generator, so that a test can ask where a pixel may go and where it may not: a
masked one reaches no token, a visible one no loss. One training step with plain gradient descent of
rate 1 shows its gradient as the change of the weights; both stages are compared with bi-level
optimisation by hand, and the second-order one with finite differences of the whole objective. Where
calibration must do nothing (V square, f_w at its start) the step has to be plain MAE's. All this is
in float64, at sizes where a slow reference takes milliseconds.
"""
import copy
import json
import math
import os
import warnings
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

import common
import mae_tc2
from mae_tc2 import (Block, Decoder, Encoder, FactorNet, MaskedAutoencoder, WeightNet, build_nets,
                     build_opts, calibrated_tokens, diagnose, draw_masks, encoder_from_checkpoint,
                     normalize_patches, patchify, reconstruction_loss, sincos_positions,
                     standardize_tokens, to_torchvision, train_step, unpatchify,
                     visible_patches)

close = torch.testing.assert_close
grad = torch.autograd.grad
CPU = torch.device("cpu")

SIZE = 12                   # side of an image
P = 4                       # side of a patch
L = 9                       # patches
T = 3                       # visible patches
D = 32                      # width of the encoder
HEADS = 2
PIXELS = 3 * P * P


def flops_of_a_step(*flags):
    """Counted, of all products of matrices."""
    args = mae_tc2.parse_args(["--data", "fake", "--batch-size", "64", *flags])
    mae_tc2.fill_defaults(args, common.load_data("fake"), CPU)
    torch.manual_seed(0)
    nets = build_nets(args)
    counter = FlopCounterMode(display=False)
    with counter:
        train_step(nets, build_opts(nets, args), torch.zeros(1, 64, 3, 32, 32), args, 0.5)
    return counter.get_total_flops()


@pytest.mark.parametrize("arch, masks, told", [("vit_micro", 2, 3.4), ("vit_tiny", 4, 5.9)])
def test_a_step_of_tc2_costs_as_many_of_mae_as_the_text_says(arch, masks, told):
    one = flops_of_a_step("--arch", arch, "--baseline")
    tc2 = flops_of_a_step("--arch", arch, "--masks", str(masks), "--tasks", str(masks))
    assert abs(tc2 / one - told) < 0.15         # versions of torch may count attention differently
    assert "N = 6 times TC2's (drawn shapes: 3.4), by FLOPs" in mae_tc2.__doc__


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def images(n=4, size=SIZE, seed=5):
    return randn(n, 3, size, size, seed=seed) + randn(n, 3, 1, 1, seed=seed + 1)


def some_masks(m=1, n=4, seed=6):
    return torch.rand(m, n, L, generator=generator(seed)).argsort(-1)


def orthonormal(d, n, seed=0):
    return torch.linalg.qr(randn(d, n, seed=seed))[0]


def shaken(module, scale=0.1, seed=0):
    """In float64, with all parameters away from their special starts."""
    for i, p in enumerate(module.double().parameters()):
        p.data += scale * randn(*p.shape, seed=1000 * seed + i)
    return module


def make_encoder(size=SIZE, depth=1, seed=0):
    torch.manual_seed(seed)
    return shaken(Encoder(size, P, D, depth, HEADS), seed=seed + 1)


def make_decoder(dim=32, depth=1, seed=0):
    torch.manual_seed(seed)
    return shaken(Decoder(SIZE, P, D, dim, depth), seed=seed + 2)


def make_factors(n_f=8, at_start=False):
    """f_v and f_w; at_start: f_w with its last layer at zero, where it begins."""
    torch.manual_seed(1)
    factor_net = shaken(FactorNet(32, n_f), 0.05, seed=5)
    weight_net = WeightNet(32, n_f).double()
    if not at_start:
        weight_net = shaken(weight_net, seed=4)
    return {"factor_net": factor_net, "weight_net": weight_net}


def make_nets(n_f=8, at_start=False, baseline=False):
    nets = nn.ModuleDict({"backbone": make_encoder(seed=2), "decoder": make_decoder(seed=2)})
    if not baseline:
        nets.update(make_factors(n_f, at_start))
    return nets


def settings(**changes):
    given = {"data": "cifar10", "baseline": False, "norm_pixels": True, "masks": 4, "tasks": 2,
             "mask_ratio": 2 / 3, "patch_size": P, "image_size": SIZE, "inner_lr": 0.0,
             "second_order": False, "lambda_s": 0.1, "without": [], "seed": 0, "bf16": False,
             "lr": 1e-3, "weight_decay": 0.05, "position_base": 30.0, "arch": "vit_micro",
             "factors": 8}
    return Namespace(**{**given, **changes})


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def model(nets):
    return nn.ModuleDict({"backbone": nets["backbone"], "decoder": nets["decoder"]})


def factors(nets):
    return nn.ModuleDict({"factor_net": nets["factor_net"], "weight_net": nets["weight_net"]})


def weights(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def part(W, name):
    start = len(name) + 1
    return {key[start:]: p for key, p in W.items() if key.startswith(f"{name}.")}


def identity(t):
    return t


def always(value):
    def function(*_):
        return value
    return function


# ---- slow references: W is a dictionary of weights -----------------------------------------------
def slow_patches(x):
    found = []
    for i in range(x.shape[2] // P):
        for j in range(x.shape[3] // P):
            patch = x[:, :, P * i:P * i + P, P * j:P * j + P]
            found.append(patch.flatten(1))
    return torch.stack(found, 1)


def slow_positions(dim, side, base=10000):
    quarter = dim // 4
    rows = []
    for y in range(side):
        for x in range(side):
            row = []
            for place in (y, x):
                for function in (math.sin, math.cos):
                    for i in range(quarter):
                        row.append(function(place * base ** (-i / quarter)))
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def slow_linear(W, name, x):
    return torch.einsum("...i,oi->...o", x, W[f"{name}.weight"]) + W[f"{name}.bias"]


def slow_norm(W, name, x):
    centred = x - x.mean(-1, keepdim=True)
    std = ((centred ** 2).mean(-1, keepdim=True) + 1e-6) ** 0.5
    return W[f"{name}.weight"] * centred / std + W[f"{name}.bias"]


def slow_block(W, name, x, heads):
    size = x.shape[-1] // heads
    q, k, v = slow_linear(W, f"{name}.qkv", slow_norm(W, f"{name}.norm1", x)).chunk(3, -1)
    mixed = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        scores = torch.einsum("nid,njd->nij", q[..., own], k[..., own])
        e = (scores / size ** 0.5).exp()
        attention = e / e.sum(-1, keepdim=True)
        mixed.append(torch.einsum("nij,njd->nid", attention, v[..., own]))
    x = x + slow_linear(W, f"{name}.proj", torch.cat(mixed, -1))

    u = slow_linear(W, f"{name}.mlp.0", slow_norm(W, f"{name}.norm2", x))
    gelu = u * (1 + torch.erf(u / 2 ** 0.5)) / 2
    return x + slow_linear(W, f"{name}.mlp.2", gelu)


def slow_blocks(W, x, heads):
    depth = len({key.split(".")[1] for key in W if key.startswith("blocks.")})
    for i in range(depth):
        x = slow_block(W, f"blocks.{i}", x, heads)
    return slow_norm(W, "norm", x)


def slow_tokens(W, x, visible):
    patches = slow_patches(x)
    rows = []
    for i, seen in enumerate(visible.tolist()):
        row = [W["class_token"][0]]
        for j in seen:
            patch = slow_linear(W, "patch_embed", patches[i, [j]])
            row.append(patch + W["positions"][[j]])
        rows.append(torch.cat(row))
    return slow_blocks(W, torch.stack(rows), HEADS)


def slow_decoder(W, t, order):
    visible = t.shape[1] - 1
    rows = []
    for i, patches in enumerate(order.tolist()):
        row = [t[i, 0]]
        for j in range(len(patches)):
            slot = patches.index(j)
            token = t[i, 1 + slot] if slot < visible else W["mask_token"][0, 0]
            row.append(token + W["positions"][j])
        rows.append(torch.stack(row))
    return slow_linear(W, "predict", slow_blocks(W, torch.stack(rows), t.shape[-1] // 32))[:, 1:]


def slow_embedded(W, x, order):
    tokens = slow_tokens(part(W, "backbone"), x, order[:, :T])
    return slow_linear(part(W, "decoder"), "embed", tokens)


def slow_reconstruct(W, x, order, space=identity):
    return slow_decoder(part(W, "decoder"), space(slow_embedded(W, x, order)), order)


def slow_target(patch):
    variance = ((patch - patch.mean()) ** 2).sum() / (len(patch) - 1)
    return (patch - patch.mean()) / (variance + 1e-6) ** 0.5


def slow_loss(predicted, patches, order, visible):
    errors = []
    for i, row in enumerate(order.tolist()):
        for j in row[visible:]:
            errors.append((predicted[i, j] - slow_target(patches[i, j])) ** 2)
    return torch.cat(errors).mean()


def slow_mean_loss(W, x, orders, space=identity):
    """Mean over the masks orders (m, n, L) of the images x (n, 3, H, W)."""
    total = 0
    for order in orders:
        total = total + slow_loss(slow_reconstruct(W, x, order, space), slow_patches(x), order, T)
    return total / len(orders)


def slow_scale(t):
    mean = t.mean(-1, keepdim=True)
    std = (((t - mean) ** 2).mean(-1, keepdim=True) + 1e-6) ** 0.5
    return (t - mean) / std, mean, std


def slow_calibrated(V, weight_net):
    def space(t):
        z, mean, std = slow_scale(t)
        W = z @ V.detach() + weight_net.mlp(z)
        return mean + std * (W @ V.T)
    return space


def slow_rows(nets, x, orders):
    """Standardised tokens (m, n, 1 + T, d)."""
    W = weights(model(nets))
    return torch.stack([slow_scale(slow_embedded(W, x, order).detach())[0] for order in orders])


def slow_factor_matrix(nets, x, orders):
    rows = slow_rows(nets, x, orders).flatten(0, -2)
    S = torch.cat([rows.mean(0, keepdim=True), torch.cov(rows.T)])
    return nets["factor_net"](S)


# ---- patches, masks, positions -------------------------------------------------------------------
@pytest.mark.parametrize("p, side", [(4, 8), (4, 12), (2, 8), (3, 12)])
def test_patchify_follows_each_pixel(p, side):
    x = randn(2, 3, side, side)
    columns = side // p
    patches = patchify(x, p)
    assert patches.shape == (2, columns ** 2, 3 * p * p)
    for c in range(3):
        for y in range(side):
            for u in range(side):
                patch = y // p * columns + u // p
                place = c * p * p + y % p * p + u % p
                assert torch.equal(patches[:, patch, place], x[:, c, y, u])
    assert torch.equal(unpatchify(patches, p, side), x)
    assert torch.equal(patchify(unpatchify(patches.roll(1, 1), p, side), p), patches.roll(1, 1))
    assert torch.equal(patchify(x[:, None], p), patches[:, None])


@pytest.mark.parametrize("patches, ratio, expected", [
    (196, 0.75, 49), (9, 2 / 3, 3), (4, 0.75, 1), (9, 0.6, 4), (100, 0.9, 10), (16, 0, 16)])
def test_number_of_visible_patches(patches, ratio, expected):
    assert visible_patches(patches, ratio) == expected


def drawn(progress=0.25, n=8, **changes):
    return draw_masks(settings(**changes), n, progress, CPU)


def test_masks_are_permutations_and_show_every_patch_equally_often():
    m = 50
    n = 200
    order = drawn(n=n, masks=m)
    assert order.shape == (m, n, L) and order.dtype == torch.int64
    assert torch.equal(order.sort(-1).values, torch.arange(L).expand(m, n, L))

    shown = (order[..., :T, None] == torch.arange(L)).double().mean((0, 1))     # (slot, patch)
    standard_error = (1 / L * (1 - 1 / L) / (m * n)) ** 0.5
    close(shown, torch.full_like(shown, 1 / L), rtol=0, atol=5 * standard_error)
    close(shown.sum(0), torch.full((L,), T / L, dtype=torch.float64), rtol=0, atol=0.025)


def test_masks_of_images_and_of_masks_are_independent():
    order = drawn(n=200, masks=20)
    pairs = [(order[1:], order[:-1]), (order[:, 1:], order[:, :-1]),
             (order[1:, 1:], order[:-1, :-1])]
    for a, b in pairs:
        assert abs((a == b).double().mean().item() - 1 / L) < 0.01


def test_drawn_masks_depend_on_seed_and_progress_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = drawn()
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (4, 8, L)
    torch.manual_seed(1)
    for changes in ({}, {"inner_lr": 1.0}, {"without": ["calibration"]}, {"tasks": 4},
                    {"baseline": True}, {"mask_ratio": 0.5}, {"lr": 1.0}):
        assert torch.equal(drawn(**changes), one)
    for other in (drawn(0.26), drawn(0.25 + 1e-6), drawn(seed=1)):
        assert (one != other).double().mean() > 0.7


def test_a_process_draws_its_share_of_the_masks_of_the_joined_batch(monkeypatch):
    whole = drawn(n=12)
    ranks = iter(range(3))
    monkeypatch.setattr(mae_tc2, "world_size", always(3))
    monkeypatch.setattr(mae_tc2, "this_rank", ranks.__next__)
    shares = [drawn(n=4) for _ in range(3)]
    assert torch.equal(torch.cat(shares, dim=1), whole)


def test_masks_of_ten_steps_all_differ():
    steps = [drawn(step / 100, image_size=32).flatten(0, 1) for step in range(10)]
    assert len(torch.cat(steps).unique(dim=0)) == 10 * 4 * 8


@pytest.mark.parametrize("dim, side, base", [(32, 2, 1e4), (64, 5, 1e4), (8, 14, 1e4), (64, 8, 30)])
def test_positions_equal_the_formula(dim, side, base):
    positions = sincos_positions(dim, side, base)
    assert positions.shape == (side ** 2, dim) and positions.dtype == torch.float32
    close(positions.double(), slow_positions(dim, side, base), rtol=0, atol=5e-6)


def test_both_networks_take_the_frequencies_from_the_recipe():
    nets = build_nets(settings())
    close(nets["backbone"].positions, sincos_positions(96, 3, 30))
    close(nets["decoder"].positions, sincos_positions(64, 3, 30))
    assert not torch.allclose(sincos_positions(64, 3, 30), sincos_positions(64, 3))


# ---- encoder -------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_equals_explicit_attention(heads):
    torch.manual_seed(0)
    block = shaken(Block(D, heads))
    W = {f"b.{name}": p for name, p in weights(block).items()}
    x = randn(2, 5, D)
    close(block(x), slow_block(W, "b", x, heads))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_equal_the_stack_on_the_gathered_patches(depth):
    encoder = make_encoder(depth=depth)
    x = images(3)
    visible = some_masks(n=3)[0, :, :T]
    close(encoder.positions.double(), slow_positions(D, 3), rtol=0, atol=5e-6)
    tokens = encoder(x, visible)
    assert tokens.shape == (3, 1 + T, D) and tokens.dtype == torch.float64
    close(tokens, slow_tokens(weights(encoder), x, visible))
    close(encoder.tokens(x), slow_tokens(weights(encoder), x, torch.arange(L).expand(3, L)))


def test_features_are_the_mean_of_the_patch_tokens():
    encoder = make_encoder()
    x = images(2)
    tokens = encoder.tokens(x)
    close(encoder(x), sum(tokens[:, 1 + i] for i in range(L)) / L)
    assert (encoder(x) - tokens.mean(1)).abs().max() > 1e-3


def test_masked_pixels_reach_no_token():
    encoder = make_encoder(depth=2)
    x = images(3)
    order = some_masks(n=3)[0]
    tokens = encoder(x, order[:, :T])
    for slot in range(L):
        patches = patchify(x, P)
        patches[torch.arange(3), order[:, slot]] += randn(3, PIXELS, seed=slot)
        changed = encoder(unpatchify(patches, P, SIZE), order[:, :T])
        moved = (changed - tokens).abs().amax(-1)
        if slot < T:
            assert (moved > 1e-6).all()
        else:
            assert (moved == 0).all()


def test_permuting_visible_patches_permutes_their_tokens_and_keeps_the_class_token():
    encoder = make_encoder(depth=2)
    x = images(3)
    visible = some_masks(n=3)[0, :, :5]
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    tokens = encoder(x, visible)
    shuffled = encoder(x, visible[:, shuffle])
    close(shuffled[:, 0], tokens[:, 0], rtol=0, atol=1e-12)
    close(shuffled[:, 1:], tokens[:, 1:][:, shuffle], rtol=0, atol=1e-12)
    assert (shuffled[:, 1:] - tokens[:, 1:]).abs().max() > 1e-3


def test_float32_in_float32_out():
    torch.manual_seed(0)
    encoder = Encoder(8, P, D, 1, HEADS)
    decoder = Decoder(8, P, D, 32, 1)
    x = images(2, 8).float()
    order = torch.rand(2, 4, generator=generator()).argsort(-1)
    tokens = encoder(x, order[:, :2])
    predicted = decoder(decoder.embed(tokens), order)
    assert tokens.dtype == encoder(x).dtype == predicted.dtype == torch.float32


def test_torchvision_gets_the_same_class_token():
    encoder = make_encoder(8, depth=2, seed=3)
    x = images(3, 8)
    vit = VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32,
                            mlp_dim=128).double()
    vit.heads = nn.Identity()
    vit.load_state_dict(to_torchvision(encoder.state_dict(), P), strict=True)
    close(vit.eval()(x), encoder.tokens(x)[:, 0])
    assert vit(x).std() > 0.1


@pytest.mark.parametrize("patch_size", [2, 4, 10])
def test_a_checkpoint_gives_the_encoder_back(patch_size):
    torch.manual_seed(3)
    encoder = Encoder(20, patch_size, *mae_tc2.ARCHS["vit_micro"], position_base=30)
    state = {"arch": "vit_micro", "image_size": 20, "state_dict": encoder.state_dict()}
    x = images(2, 20).float()
    close(encoder_from_checkpoint(state)(x), encoder(x), rtol=0, atol=0)


def test_weights_are_drawn_xavier_uniform_with_zero_biases():
    torch.manual_seed(0)
    for net in build_nets(settings(baseline=True)).values():
        for name, p in net.named_parameters():
            if p.ndim == 2:
                bound = (6 / sum(p.shape)) ** 0.5
                assert p.abs().max() <= bound
                assert p.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)
            elif name.endswith("bias"):
                assert not p.any()


def test_weight_decay_spares_biases_norms_and_tokens():
    nets = build_nets(settings())
    names = {p: name for name, p in nets.named_parameters()}
    decayed, spared = build_opts(nets, settings())["encoder"].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0)
    assert decayed["betas"] == spared["betas"] == (0.9, 0.95)
    for group, decays in ((decayed, True), (spared, False)):
        for p in group["params"]:
            vector = "norm" in names[p] or "token" in names[p] or names[p].endswith("bias")
            assert vector != decays, names[p]
    assert len(decayed["params"] + spared["params"]) == len(list(model(nets).parameters()))


# ---- decoder -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim, depth", [(32, 1), (64, 2)])
def test_decoder_equals_explicit_attention_in_image_order(dim, depth):
    decoder = make_decoder(dim, depth)
    order = some_masks(n=3)[0]
    t = randn(3, 1 + T, dim)
    close(decoder.positions.double(), slow_positions(dim, 3), rtol=0, atol=5e-6)
    predicted = decoder(t, order)
    assert predicted.shape == (3, L, PIXELS)
    close(predicted, slow_decoder(weights(decoder), t, order))


def test_without_blocks_each_patch_carries_its_token_or_the_mask_token():
    decoder = make_decoder()
    decoder.blocks = nn.Sequential()
    decoder.norm = nn.Identity()
    order = some_masks(n=3)[0]
    t = randn(3, 1 + T, 32)
    predicted = decoder(t, order)
    for i in range(3):
        tokens = {order[i, slot].item(): t[i, 1 + slot] for slot in range(T)}
        for j in range(L):
            token = tokens.get(j, decoder.mask_token[0, 0])
            close(predicted[i, j], decoder.predict(token + decoder.positions[j]))


def test_prediction_depends_on_the_place_of_a_token_not_on_the_order_of_the_tokens():
    decoder = make_decoder(depth=2)
    order = some_masks(n=3)[0]
    t = randn(3, 1 + T, 32)
    predicted = decoder(t, order)

    shuffle = [2, 0, 1]
    tokens = torch.cat([t[:, :1], t[:, 1:][:, shuffle]], 1)
    both = decoder(tokens, order[:, [*shuffle, *range(T, L)]])
    close(both, predicted, rtol=0, atol=1e-12)
    masked_flipped = [*range(T), *range(L - 1, T - 1, -1)]
    close(decoder(t, order[:, masked_flipped]), predicted, rtol=0, atol=1e-12)
    for slots in ([1, 0, *range(2, L)], [T, *range(1, T), 0, *range(T + 1, L)]):
        moved = (decoder(t, order[:, slots]) - predicted).abs().amax((1, 2))
        assert moved.min() > 1e-3


def tilted(t):
    """Tokens mixed with their neighbours: the class token is token 0."""
    slope = torch.arange(1.0, 2 + T, dtype=torch.float64)[:, None]
    return t * slope + t.roll(1, -1)


@pytest.mark.parametrize("space", [identity, tilted])
def test_autoencoder_equals_the_slow_one_on_every_mask_and_task(space):
    nets = make_nets(baseline=True)
    autoencoder = MaskedAutoencoder(nets, T, False)
    x = images()
    orders = some_masks(m=3)
    predicted = autoencoder(x, orders, space)
    assert predicted.shape == (3, 4, L, PIXELS)
    for order, found in zip(orders, predicted):
        close(found, slow_reconstruct(weights(nets), x, order, space))

    # Two tasks at once, each with its own masks: (K, n, ...) and (K, m, n, L).
    tasks = x.unflatten(0, (2, 2))
    orders = orders.unflatten(1, (2, 2)).transpose(0, 1)
    close(autoencoder(tasks, orders, space), predicted.unflatten(1, (2, 2)).transpose(0, 1))


def test_masked_pixels_do_not_reach_the_reconstruction():
    autoencoder = MaskedAutoencoder(make_nets(baseline=True), T, False)
    x = images()
    orders = some_masks()
    patches = patchify(x, P)
    patches[torch.arange(4)[:, None], orders[0, :, T:]] += 1 + randn(4, L - T, PIXELS)
    changed = unpatchify(patches, P, SIZE)
    assert torch.equal(autoencoder(changed, orders, identity), autoencoder(x, orders, identity))


# ---- reconstruction loss -------------------------------------------------------------------------
def loss_case():
    predicted = randn(4, L, PIXELS, seed=1).requires_grad_()
    return predicted, patchify(images(), P), some_masks()[0]


def test_normalized_patches_have_zero_mean_and_unit_unbiased_variance():
    patches = 3 * randn(2, L, PIXELS) + 5
    patches[0, 0] = 0.5
    unit = normalize_patches(patches)
    close(unit.mean(-1), torch.zeros(2, L, dtype=torch.float64))
    assert not unit[0, 0].any()
    variance = unit.var(-1, correction=1).flatten()[1:]
    close(variance, torch.ones(2 * L - 1, dtype=torch.float64), rtol=1e-6, atol=0)
    faint = 1e-3 * randn(PIXELS)
    close(normalize_patches(faint), slow_target(faint))


@pytest.mark.parametrize("visible", [1, T, L - 1])
def test_loss_equals_a_loop_over_masked_pixels_in_value_and_gradient(visible):
    predicted, patches, order = loss_case()
    fast = reconstruction_loss(predicted, normalize_patches(patches), order, visible)
    slow = slow_loss(predicted, patches, order, visible)
    close(fast, slow)
    close(grad(fast, predicted), grad(slow, predicted))


def test_loss_of_several_masks_is_their_mean():
    target = normalize_patches(patchify(images(), P))
    predicted = randn(3, 4, L, PIXELS)
    orders = some_masks(m=3)
    each = [reconstruction_loss(p, target, order, T) for p, order in zip(predicted, orders)]
    close(reconstruction_loss(predicted, target, orders, T), sum(each) / 3)


def test_visible_patches_do_not_enter_the_loss():
    predicted, target, order = loss_case()
    image = torch.arange(4)[:, None]
    loss = reconstruction_loss(predicted, target, order, T)
    slope = grad(loss, predicted)[0]
    assert not slope[image, order[:, :T]].any()
    assert (slope[image, order[:, T:]].abs() > 0).all()

    other = target.clone()
    other[image, order[:, :T]] = randn(4, T, PIXELS, seed=9)
    close(reconstruction_loss(predicted, other, order, T), loss, rtol=1e-14, atol=0)


def test_loss_of_perfect_and_of_zero_prediction():
    _, patches, order = loss_case()
    target = normalize_patches(patches)
    zero = reconstruction_loss(torch.zeros_like(target), target, order, T)
    assert reconstruction_loss(target, target, order, T) == 0
    assert zero.item() == pytest.approx((PIXELS - 1) / PIXELS, rel=1e-5)
    assert reconstruction_loss(target + 2, target, order, T).item() == pytest.approx(4)


# ---- calibration of tokens -----------------------------------------------------------------------
def test_standardize_tokens_is_exact():
    t = 3 * randn(2, 4, 32) + 2
    z, mean, std = standardize_tokens(t)
    close(standardize_tokens(t), slow_scale(t))
    close(mean + std * z, t, rtol=0, atol=1e-12)
    close(z.mean(-1), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    close(z.norm(dim=-1), torch.full((2, 4), 32 ** 0.5, dtype=torch.float64), rtol=1e-5, atol=0)
    close(standardize_tokens(1e-4 * t), slow_scale(1e-4 * t))
    close(standardize_tokens(5 * t - 1)[0], z, rtol=1e-5, atol=1e-6)


def test_calibration_starts_as_the_identity_when_v_is_square():
    weight_net = make_factors(32, at_start=True)["weight_net"]
    t = (3 * randn(2, 4, 32) + 1).requires_grad_()
    found = calibrated_tokens(t, orthonormal(32, 32), weight_net)
    close(found, t, rtol=0, atol=1e-12)
    slope = randn(2, 4, 32, seed=3)
    close(grad(found, t, slope)[0], slope, rtol=0, atol=1e-12)


def test_calibration_projects_on_the_columns_of_v():
    t = 3 * randn(2, 4, 32) + 1
    V = orthonormal(32, 8)
    z, mean, std = slow_scale(t)
    weight_net = make_factors(8, at_start=True)["weight_net"]
    z_hat = (calibrated_tokens(t, V, weight_net) - mean) / std
    close(z_hat, sum((z @ V[:, [f]]) * V[:, f] for f in range(8)))
    assert (z_hat - z).norm() > 0.5 * z.norm()


def test_calibrated_tokens_take_the_weights_of_f_w_and_keep_mean_and_std():
    t = (3 * randn(2, 4, 32) + 1).requires_grad_()
    V = orthonormal(32, 8)
    weight_net = make_factors(8)["weight_net"]
    fast = calibrated_tokens(t, V, weight_net)
    slow = slow_calibrated(V, weight_net)(t)
    close(fast, slow)
    close(grad(fast.square().sum(), t), grad(slow.square().sum(), t))
    close(calibrated_tokens(5 * t - 3, V, weight_net), 5 * fast.detach() - 3, rtol=1e-5, atol=1e-5)
    assert weight_net.mlp(standardize_tokens(t)[0]).abs().max() > 0.01


def test_bfloat16_is_for_encoder_and_decoder_alone(monkeypatch):
    """Calibration and loss see float32, outside of autocast."""
    nets = make_nets().float()
    low = []
    high = []

    def note_output(module, inputs, output):
        low.append(output.dtype)

    nets["decoder"].embed.register_forward_hook(note_output)
    nets["decoder"].predict.register_forward_hook(note_output)

    def watched(function):
        def watch(t, *rest):
            high.append((t.dtype, torch.is_autocast_enabled("cpu")))
            return function(t, *rest)
        return watch

    for name in ("calibrate", "standardize_tokens", "reconstruction_loss", "factor_loss"):
        monkeypatch.setattr(mae_tc2, name, watched(getattr(mae_tc2, name)))
    x = images().float()[None]
    args = settings(bf16=True, inner_lr=0.1)
    terms = train_step(nets, build_opts(nets, args), x, args, 0.5)
    assert set(low) == {torch.bfloat16} and set(high) == {(torch.float32, False)}
    assert {value.dtype for value in terms.values()} == {torch.float32}


# ---- one step ------------------------------------------------------------------------------------
def step(nets, encoder_lr=1.0, factor_lr=0.0, x=None, progress=0.5, watch=None, **changes):
    """One train_step with plain gradient descent: (change of encoder and decoder, terms)."""
    args = settings(**changes)
    before = flat(model(nets).parameters())
    opts = {"encoder": torch.optim.SGD(model(nets).parameters(), encoder_lr)}
    if not args.baseline:
        opts["factors"] = torch.optim.SGD(factors(nets).parameters(), factor_lr)
    if watch:
        for opt in opts.values():
            opt.register_step_post_hook(watch)
    if x is None:
        x = images()
    terms = train_step(nets, opts, x[None], args, progress)
    return before - flat(model(nets).parameters()), terms


def same(found, expected, rtol=1e-7):
    close(found, expected, rtol=rtol, atol=1e-10)
    assert expected.norm() > 1e-3


def drawn_here(**changes):
    """The masks (m, n, L) that `step` draws."""
    return drawn(0.5, 4, **changes)


def slow_gradient(nets, orders):
    loss = slow_mean_loss(weights(model(nets)), images(), orders)
    return flat(grad(loss, list(model(nets).parameters()))), loss.item()


def slow_space(nets, x, orders, calibrated=True):
    if not calibrated:
        return identity
    return slow_calibrated(slow_factor_matrix(nets, x, orders).detach(), nets["weight_net"])


def slow_adapted(W, x, orders, space, inner_lr, second_order=False):
    """(weights after one step on the loss of these masks, that loss). [TC2 Eq. 6]"""
    names = [name for name, p in W.items() if p.requires_grad]
    loss = slow_mean_loss(W, x, orders, space)
    moved = dict(W)
    gradients = grad(loss, [W[name] for name in names], create_graph=second_order)
    for name, g in zip(names, gradients):
        moved[name] = W[name] - inner_lr * g
        if not second_order:
            moved[name] = moved[name].detach().requires_grad_()
    return moved, loss


def slow_maml(nets, calibrated, inner_lr, second_order=False, K=2, m=4):
    """Eqs. 6 and 7 by hand: (gradient, mean query loss, mean support loss)."""
    x = images()
    orders = drawn_here(masks=m)
    half = m // 2
    space = slow_space(nets, x, orders, calibrated)
    W = weights(model(nets))
    names = [name for name, p in W.items() if p.requires_grad]
    total = 0
    query = 0
    support = 0
    for k in range(K):
        own = slice(k * len(x) // K, (k + 1) * len(x) // K)
        moved, before = slow_adapted(W, x[own], orders[:half, own], space, inner_lr, second_order)
        loss = slow_mean_loss(moved, x[own], orders[half:, own], space)
        at = W if second_order else moved
        total = total + flat(grad(loss, [at[name] for name in names])) / K
        query += loss.item() / K
        support += before.item() / K
    return total, query, support


PLAIN = ["calibration"]


@pytest.mark.parametrize("m", [1, 3])
def test_baseline_is_the_gradient_of_the_mean_over_masks(m):
    nets = make_nets(baseline=True)
    expected, loss = slow_gradient(nets, drawn_here(masks=m))
    taken, terms = step(nets, baseline=True, masks=m)
    same(taken, expected)
    assert terms["loss_ssl"].item() == pytest.approx(loss)


def test_masks_of_a_step_follow_seed_and_progress():
    def taken(**changes):
        return step(make_nets(baseline=True), baseline=True, masks=1, **changes)[0]

    assert torch.equal(taken(), taken())
    assert (taken() - taken(progress=0.75)).norm() > 1e-3
    assert (taken() - taken(seed=1)).norm() > 1e-3


def test_raw_pixels_as_target_when_they_are_not_normalised():
    x = images()
    nets = make_nets(baseline=True)
    order = drawn_here(masks=1)[0]
    predicted = slow_reconstruct(weights(nets), x, order)
    errors = []
    for i in range(4):
        errors.append(predicted[i, order[i, T:]] - slow_patches(x)[i, order[i, T:]])
    _, terms = step(nets, baseline=True, masks=1, norm_pixels=False)
    expected = torch.stack(errors).square().mean()
    assert terms["loss_ssl"].item() == pytest.approx(expected.item())


def test_without_inner_step_and_calibration_tc2_is_the_gradient_on_the_query_masks():
    nets = make_nets()
    expected, loss = slow_gradient(nets, drawn_here()[2:])
    taken, terms = step(nets, without=PLAIN)
    same(taken, expected)
    assert terms["loss_query"].item() == pytest.approx(loss)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("without", [[], PLAIN], ids=["calibrated", "plain"])
def test_stage_2_equals_maml_by_hand(without, second_order):
    nets = make_nets()
    expected, query, support = slow_maml(nets, not without, 0.1, second_order)
    taken, terms = step(nets, without=without, inner_lr=0.1, second_order=second_order)
    same(taken, expected)
    assert terms["loss_query"].item() == pytest.approx(query)
    assert terms["loss_support"].item() == pytest.approx(support)


@pytest.mark.parametrize("K, m", [(1, 4), (4, 4), (2, 3)])
def test_other_numbers_of_tasks_and_masks(K, m):
    nets = make_nets()
    expected, query, _ = slow_maml(nets, True, 0.1, K=K, m=m)
    taken, terms = step(nets, tasks=K, masks=m, inner_lr=0.1)
    same(taken, expected)
    assert terms["loss_query"].item() == pytest.approx(query)


def test_first_and_second_order_differ_with_an_inner_step_alone():
    def taken(**changes):
        return step(make_nets(), without=PLAIN, **changes)[0]

    plain = taken()
    first = taken(inner_lr=0.1)
    close(taken(second_order=True), plain)
    assert (taken(inner_lr=0.1, second_order=True) - first).norm() > 1e-2 * plain.norm()
    assert (first - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("without", [[], PLAIN], ids=["calibrated", "plain"])
def test_second_order_equals_finite_differences_of_the_bilevel_objective(without):
    nets = make_nets(at_start=True)
    x = images()
    orders = drawn_here()
    space = slow_space(nets, x, orders, not without)
    theta = weights(model(nets))
    names = [name for name, p in theta.items() if p.requires_grad]

    def objective(direction, distance):
        W = {name: p.detach() for name, p in theta.items()}
        sizes = [W[name].numel() for name in names]
        for name, piece in zip(names, direction.split(sizes)):
            W[name] = (W[name] + distance * piece.view_as(W[name])).requires_grad_()
        total = 0
        for own in (slice(0, 2), slice(2, 4)):
            moved, _ = slow_adapted(W, x[own], orders[:2, own], space, 0.3)
            total += slow_mean_loss(moved, x[own], orders[2:, own], space).item() / 2
        return total

    exact, _ = step(copy.deepcopy(nets), without=without, inner_lr=0.3, second_order=True)
    first, _ = step(copy.deepcopy(nets), without=without, inner_lr=0.3)
    h = 1e-4
    for direction in (exact / exact.norm(), randn(len(exact), seed=11) / len(exact) ** 0.5):
        slope = (objective(direction, h) - objective(direction, -h)) / (2 * h)
        assert (exact @ direction).item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
        assert abs((first @ direction).item() - slope) > 1e-3 * abs(slope)


def test_with_f_w_at_its_start_and_a_square_v_it_is_plain_mae():
    nets = make_nets(n_f=32, at_start=True)
    expected, loss = slow_gradient(nets, drawn_here()[2:])
    taken, terms = step(nets)
    assert terms["loss_query"].item() == pytest.approx(loss, rel=1e-9)
    close(taken, expected, rtol=1e-9, atol=1e-9)
    assert expected.norm() > 0.1
    for second_order in (False, True):
        changes = {"inner_lr": 0.1, "second_order": second_order}
        calibrated, _ = step(make_nets(n_f=32, at_start=True), **changes)
        plain, _ = step(make_nets(), without=PLAIN, **changes)
        close(calibrated, plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("changes", [
    {"without": PLAIN, "inner_lr": 0.3}, {"inner_lr": 0.3, "second_order": True}])
def test_tasks_are_consecutive_groups(changes, monkeypatch):
    x = images()
    orders = drawn_here()

    def taken(images_in_order, **changes):
        monkeypatch.setattr(mae_tc2, "draw_masks", always(orders[:, images_in_order]))
        return step(make_nets(), x=x[images_in_order], **changes)[0]

    one = taken([0, 1, 2, 3], **changes)
    for other in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]):
        close(taken(other, **changes), one, rtol=1e-7, atol=1e-10)
    for other in ([0, 2, 1, 3], [3, 1, 2, 0]):
        assert (taken(other, **changes) - one).norm() > 1e-3 * one.norm()


def slow_stage_1(nets, lr, lambda_v, lambda_s, K=2, half=2):
    """Eqs. 4 and 5: two steps of f_v and f_w by hand; changes nets. Returns the terms."""
    x = images()
    orders = drawn_here()
    theta = {name: p.detach() for name, p in weights(model(nets)).items()}
    Z = slow_rows(nets, x, orders)
    mlp = nets["weight_net"].mlp
    terms = {}
    for phase, own in (("support", slice(half)), ("query", slice(half, None))):
        V = slow_factor_matrix(nets, x, orders)
        space = slow_calibrated(V, nets["weight_net"])
        ssl = 0
        for k in range(K):
            images_of_k = slice(2 * k, 2 * k + 2)
            ssl = ssl + slow_mean_loss(theta, x[images_of_k], orders[own, images_of_k], space) / K

        every = Z.flatten(0, -2)
        rows = Z[own].flatten(0, -2)
        W = rows @ V.detach() + mlp(rows)
        unexplained = (every - every @ V @ V.T).square().sum(1).mean()
        loss_v = (V.T @ V - torch.eye(V.shape[1])).square().sum() + unexplained
        loss_w = (rows - W @ V.detach().T).square().sum(1).mean() + W.abs().sum(1).mean()
        terms |= {f"loss_factors_{phase}": ssl, "loss_v": loss_v, "loss_w": loss_w}

        params = list(factors(nets).parameters())
        gradients = grad(ssl + lambda_v * loss_v + lambda_s * loss_w, params)
        for p, g in zip(params, gradients):
            p.data -= lr * g
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("without, lambda_v", [([], 1), (["lv"], 0)], ids=["", "without_lv"])
def test_stage_1_is_two_steps_by_hand_and_stage_2_sees_their_result(without, lambda_v):
    nets = make_nets()
    lr = 0.01
    by_hand = copy.deepcopy(nets)
    before = flat(factors(nets).parameters())
    expected = slow_stage_1(by_hand, lr, lambda_v, 0.3)
    gradient, _, _ = slow_maml(by_hand, True, 0.1)

    taken, terms = step(nets, factor_lr=lr, lambda_s=0.3, inner_lr=0.1, without=without)
    moved = before - flat(factors(nets).parameters())
    same(moved / lr, (before - flat(factors(by_hand).parameters())) / lr, rtol=1e-6)
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected)
    same(taken, gradient, rtol=1e-6)


def test_each_stage_moves_its_own_networks():
    nets = make_nets()
    theta = list(model(nets).parameters())
    others = list(factors(nets).parameters())
    start = flat(theta)
    history = [flat(others)]
    stages = []

    def watch(opt, args, kwargs):
        history.append(flat(others))
        if opt.param_groups[0]["params"][0] is theta[0]:
            stages.append("encoder")
        else:
            stages.append("factors")
            assert all(p.grad is None for p in theta)
            assert torch.equal(flat(theta), start)

    step(nets, encoder_lr=0.1, factor_lr=0.01, inner_lr=0.1, second_order=True, watch=watch)
    assert stages == ["factors", "factors", "encoder"]
    sizes = [p.numel() for p in others]
    for before, after in ((history[0], history[1]), (history[1], history[2])):
        still = [(a == b).all() for a, b in zip(before.split(sizes), after.split(sizes))]
        assert not any(still)
    assert torch.equal(history[2], history[3])
    assert not torch.equal(flat(theta), start)
    assert all(p.requires_grad for p in nets.parameters())


def test_without_calibration_the_factors_do_not_reach_the_encoder():
    few = make_nets(n_f=4, at_start=True)
    many = make_nets()
    one, _ = step(few, without=PLAIN, inner_lr=0.1, factor_lr=0.01)
    two, _ = step(many, without=PLAIN, inner_lr=0.1)
    assert torch.equal(one, two)


def test_inner_step_is_the_length_of_eq_6_beside_the_weights():
    """Of the last task, whatever the optimiser does afterwards."""
    nets = make_nets()
    orders = drawn_here()
    W = weights(model(nets))
    moved, _ = slow_adapted(W, images()[2:], orders[:2, 2:], identity, 0.1)
    names = [name for name, p in W.items() if p.requires_grad]
    theta = flat(W[name] for name in names)
    expected = (flat(moved[name] for name in names) - theta).norm() / theta.norm()
    for encoder_lr in (0, 10):
        _, terms = step(copy.deepcopy(nets), encoder_lr, without=PLAIN, inner_lr=0.1)
        assert terms["inner_step"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("changes", [{"baseline": True}, {}, {"inner_lr": 0.1},
                                     {"inner_lr": 0.1, "second_order": True}])
def test_terms_are_scalars_that_hold_no_graph(changes):
    _, terms = step(make_nets(baseline="baseline" in changes), **changes)
    assert all(term.ndim == 0 and not term.requires_grad for term in terms.values())
    assert ("inner_step" in terms) == ("inner_lr" in changes)


@pytest.mark.parametrize("baseline", [True, False])
def test_a_step_forgets_the_gradients_of_the_step_before(baseline):
    clean = make_nets(baseline=baseline)
    stale = copy.deepcopy(clean)
    for p in stale.parameters():
        p.grad = torch.ones_like(p)
    changes = {"baseline": baseline, "inner_lr": 0.1, "factor_lr": 0.01}
    expected, _ = step(clean, **changes)
    taken, _ = step(stale, **changes)
    assert torch.equal(taken, expected)
    assert torch.equal(flat(stale.parameters()), flat(clean.parameters()))


def test_flags_take_away_qr_and_skip():
    S = torch.cat([torch.zeros(1, 64), torch.eye(64)])
    z = torch.ones(2, 64)
    found = {}
    for flag in ("qr", "skip", "lv"):
        nets = build_nets(settings(without=[flag]))
        V = nets["factor_net"](S)
        orthonormal_columns = torch.allclose(V.T @ V, torch.eye(8), atol=1e-5)
        starts_at_zv = torch.allclose(nets["weight_net"](z, V), z @ V, atol=1e-5)
        found[flag] = (orthonormal_columns, starts_at_zv)
    assert found == {"qr": (False, True), "skip": (True, False), "lv": (True, True)}


# ---- evaluations and pictures --------------------------------------------------------------------
TEN = 0.3 * images(10)


def masks_of_diagnosis():
    """One mask of each of the ten images (1, n, L)."""
    return drawn(-1, 10)[:1]


def pictures_of(monkeypatch, nets, **changes):
    """(terms of diagnose, rows of its picture) for ten images."""
    pictures = {}

    def draw_grid(path, rows):
        pictures.update(rows)

    monkeypatch.setattr(mae_tc2, "draw_grid", draw_grid)
    terms = diagnose(nets, TEN[None], settings(out="r", **changes))
    return terms, pictures


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_show_the_images_the_masks_and_what_was_predicted(norm_pixels, monkeypatch):
    nets = make_nets()
    _, rows = pictures_of(monkeypatch, nets, norm_pixels=norm_pixels)
    assert list(rows) == ["original", "masked", "reconstruction", "calibrated"]
    shown = {name: slow_patches(pictures) for name, pictures in rows.items()}
    x = TEN[:8]
    orders = masks_of_diagnosis()
    close(rows["original"], common.denormalize(x, mae_tc2.WEAK))

    calibrated = slow_space(nets, TEN, orders)
    order = orders[0, :8]
    patches = slow_patches(x)
    expected = {"masked": torch.zeros_like(patches)}
    for name, space in (("reconstruction", identity), ("calibrated", calibrated)):
        predicted = slow_reconstruct(weights(model(nets)), x, order, space)
        if norm_pixels:
            predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
            predicted = predicted + patches.mean(-1, keepdim=True)
        expected[name] = predicted

    for name, values in expected.items():
        pictures = common.denormalize(unpatchify(values, P, SIZE), mae_tc2.WEAK)
        wanted = slow_patches(pictures)
        for i in range(8):
            seen = order[i, :T]
            masked = order[i, T:]
            close(shown[name][i, seen], shown["original"][i, seen])
            close(shown[name][i, masked], wanted[i, masked])


@pytest.mark.parametrize("data, size", [("shapes", 32), ("shapes", 112), ("cifar10", 96),
                                        ("cifar10", 112), ("photos", 112)])
def test_pictures_have_the_colours_of_the_images(data, size, monkeypatch):
    """What the run's own augmentation normalises, its picture shows as it was."""
    found = common.Data(data, torch.zeros(9, 3, size, size), None, None, None, size, None, data)
    args = mae_tc2.parse_args(["--data", data, "--image-size", str(size), "--patch-size", "8"])
    mae_tc2.fill_defaults(args, found, torch.device("cpu"))
    recipe, = mae_tc2.view_augmentations(args, found)
    image = torch.rand(2, 3, size, size, generator=common.rng("colours"))
    mean = torch.tensor(recipe["mean"])[:, None, None]
    std = torch.tensor(recipe["std"])[:, None, None]

    pictures = {}

    def draw_grid(path, rows):
        pictures.update(rows)

    monkeypatch.setattr(mae_tc2, "draw_grid", draw_grid)
    masked = torch.tensor([[1], [0]])
    mae_tc2.draw_reconstructions((image - mean) / std, masked, {}, args)
    close(pictures["original"], image)


def test_diagnosis_measures_the_rows_of_the_picture_and_the_tokens(monkeypatch):
    nets = make_nets()
    before = flat(nets.parameters())
    terms, _ = pictures_of(monkeypatch, nets)
    orders = masks_of_diagnosis()
    W = weights(model(nets))
    calibrated = slow_space(nets, TEN, orders)
    for name, space in (("reconstruction", identity), ("calibrated", calibrated)):
        expected = slow_mean_loss(W, TEN[:8], orders[:, :8], space)
        assert terms[f"loss_{name}"].item() == pytest.approx(expected.item())

    z = slow_rows(nets, TEN, orders)
    V = slow_factor_matrix(nets, TEN, orders)
    z_hat = (z @ V + nets["weight_net"].mlp(z)) @ V.T
    cosine = (z * z_hat).sum(-1) / (z.norm(dim=-1) * z_hat.norm(dim=-1))
    assert terms["cos_z_hat"].item() == pytest.approx(cosine.mean().item())
    for name, tokens in (("rank_z", z), ("rank_z_hat", z_hat)):
        expected = common.effective_rank(tokens.flatten(0, -2).detach())
        assert terms[name].item() == pytest.approx(expected.item())
    assert torch.equal(flat(nets.parameters()), before)
    assert all(p.grad is None for p in nets.parameters())


# ---- as a program --------------------------------------------------------------------------------
RUN = ["--data", "fake", "--arch", "vit_micro", "--batch-size", "64", "--patch-size", "8",
       "--epochs", "1", "--warmup-epochs", "0", "--max-steps", "2", "--out", "r", "--device", "cpu"]


@pytest.mark.parametrize("extra", [
    "--masks 2 --tasks 2", "--baseline",
    "--masks 3 --tasks 2 --second-order --factors 9 --mask-ratio 0.5 --without calibration lv"])
def test_a_run_leaves_its_files_and_warns_of_nothing(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mae_tc2.main([*RUN, *extra.split()])
    assert sorted(os.listdir("r")) == ["backbone.pt", "curves.png", "last.pt", "log.jsonl",
                                       "reconstructions.png", "views.png"]
    with open("r/log.jsonl") as file:
        header, *rows = [json.loads(line) for line in file]
    assert header["parameters"]["backbone"] == 242_496
    assert rows[-1].keys() >= {"knn5", "rank_h", "rank_z", "loss_reconstruction"}
    for row in rows:
        assert all(map(math.isfinite, row.values()))

    state = torch.load("r/backbone.pt", weights_only=True)
    assert state["arch"] == "vit_micro" and state["image_size"] == 32
    encoder = encoder_from_checkpoint(state)
    assert encoder.patch_size == 8
    vit = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=96,
                            mlp_dim=384)
    vit.heads = nn.Identity()
    vit.load_state_dict(to_torchvision(state["state_dict"], 8), strict=True)
    x = images(2, 32).float()
    close(vit.eval()(x), encoder.tokens(x)[:, 0], rtol=1e-4, atol=1e-5)


def filled(argv, data=None):
    args = mae_tc2.parse_args(argv)
    data = data or common.load_data("fake")
    mae_tc2.fill_defaults(args, data, CPU)
    return args, mae_tc2.view_augmentations(args, data), data


def test_baseline_starts_from_the_same_weights_and_has_one_mask():
    nets = []
    for flags, masks, tasks in (([], 4, 4), (["--baseline"], 1, 1)):
        args, augmentation, _ = filled(["--data", "fake", "--arch", "vit_micro", *flags])
        assert (args.masks, args.tasks) == (masks, tasks) and augmentation == [mae_tc2.WEAK]
        torch.manual_seed(0)
        nets.append(build_nets(args).state_dict())
    enhanced, baseline = nets
    assert all(torch.equal(value, enhanced[name]) for name, value in baseline.items())
    assert all(name.startswith(("factor_net", "weight_net")) for name in enhanced.keys() - baseline)


@pytest.mark.parametrize("flags, message", [
    ("--patch-size 5", "--patch-size 5"), ("--mask-ratio 0.99", "'0.99'"),
    ("--patch-size 32", "--mask-ratio 0.75"), ("--masks 1", "--masks 1"),
    ("--tasks 3", "--batch-size 512"), ("--arch resnet18", "'resnet18'"),
    ("--without norm", "'norm'"), ("--second-order --compile", "--compile"),
    ("--sync-bn", "a ViT has no BatchNorm"), ("--batch-size 4096", "--batch-size 4096")])
def test_bad_input_gives_one_sentence_and_writes_nothing(flags, message, tmp_path, monkeypatch,
                                                         capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        mae_tc2.main(["--data", "fake", "--device", "cpu", *flags.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert not os.listdir()


def test_whole_tasks_go_to_each_process(capsys):
    args, _, data = filled(["--tasks", "4"])
    before = dict(vars(args))
    mae_tc2.check_args(args, data, 2)
    assert vars(args) == before
    with pytest.raises(SystemExit):
        mae_tc2.check_args(args, data, 8)
    assert "--tasks 4" in capsys.readouterr().err

    # The baseline has no tasks: any number of them goes with any batch.
    args, _, data = filled(["--baseline", "--tasks", "3"])
    mae_tc2.check_args(args, data, 2)


def test_a_line_says_that_eq_1_is_zero_with_as_many_factors_as_the_decoder_has_dimensions(capsys):
    for flags in ([], ["--factors", "63"], ["--factors", "64", "--baseline"],
                  ["--factors", "64", "--without", "qr"]):
        filled(["--arch", "vit_micro", *flags])
        assert "by construction" not in capsys.readouterr().out
    args, _, _ = filled(["--arch", "vit_micro", "--factors", "64"])
    line = capsys.readouterr().out
    assert line.startswith("--factors 64: ") and line.endswith("by construction\n")
    V = build_nets(args)["factor_net"](randn(65, 64).float())
    assert V.shape == (64, 64)
    assert mae_tc2.factor_loss(randn(9, 64).float(), V) < 1e-8
