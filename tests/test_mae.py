"""Oracles for mae_tc2 derived from the equations: pixel loops, hand-written transformer, closed forms, finite differences, invariants."""
import copy
import math
from argparse import Namespace

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import mae_tc2
from mae_tc2 import (Block, Decoder, Encoder, FactorNet, WeightNet, build_nets, build_opts, calibrated_tokens, diagnose, draw_masks, normalize_patches,
                     patchify, random_masks, reconstruct, sincos_positions, to_torchvision, token_scale,
                     train_step, unpatchify, visible_patches)

close, grad = torch.testing.assert_close, torch.autograd.grad
SIZE, P, L, T, D, HEADS = 12, 4, 9, 3, 32, 2                    # image side, patch side, patches, visible patches, width, heads
PIXELS = 3 * P * P


def reconstruction_loss(predicted, patches, order, visible):
    return mae_tc2.reconstruction_loss(predicted, normalize_patches(patches), order, visible)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, train=False):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).requires_grad_(train)


def orthonormal(d, n, seed=0):
    return torch.linalg.qr(randn(d, n, seed=seed))[0]


def shaken(module, scale=0.1, seed=0):
    """All parameters away from their special starts (zero biases, unit gains, zero tokens), in float64."""
    for i, p in enumerate(module.double().parameters()):
        p.data += scale * randn(*p.shape, seed=1000 * seed + i)
    return module


def make_encoder(size=SIZE, depth=1, seed=0):
    torch.manual_seed(seed)
    return shaken(Encoder(size, P, D, depth, HEADS), seed=seed + 1)


def make_decoder(dim=32, depth=1, seed=0):
    torch.manual_seed(seed)
    return shaken(Decoder(SIZE, P, D, dim, depth), seed=seed + 2)


def images(n=4, size=SIZE, seed=5):
    return randn(n, 3, size, size, seed=seed) + randn(n, 3, 1, 1, seed=seed + 1)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def weights(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def part(params, name):
    return {k[len(name) + 1:]: p for k, p in params.items() if k.startswith(name + ".")}


# ---- slow references: `W` is a dictionary of weights, so that they can be differentiated at any weights ---------------------------
def slow_patches(x):
    rows, columns = x.shape[2] // P, x.shape[3] // P
    return torch.stack([x[:, :, P * i:P * i + P, P * j:P * j + P].flatten(1) for i in range(rows) for j in range(columns)], 1)


def slow_positions(dim, side):
    q, rows = dim // 4, []
    for y in range(side):
        for x in range(side):
            w = [10000 ** (-i / q) for i in range(q)]
            rows.append([f(u * v) for u in (y, x) for f in (math.sin, math.cos) for v in w])
    return torch.tensor(rows, dtype=torch.float64)


def slow_linear(W, name, x):
    return torch.einsum("...i,oi->...o", x, W[f"{name}.weight"]) + W[f"{name}.bias"]


def slow_norm(W, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return W[f"{name}.weight"] * centred / ((centred ** 2).mean(-1, keepdim=True) + 1e-6) ** 0.5 + W[f"{name}.bias"]


def slow_block(W, name, x, heads):
    size, mixed = x.shape[-1] // heads, []
    q, k, v = slow_linear(W, f"{name}.qkv", slow_norm(W, f"{name}.norm1", x)).chunk(3, -1)
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        e = (torch.einsum("nid,njd->nij", q[..., own], k[..., own]) / size ** 0.5).exp()
        mixed.append(torch.einsum("nij,njd->nid", e / e.sum(-1, keepdim=True), v[..., own]))
    x = x + slow_linear(W, f"{name}.proj", torch.cat(mixed, -1))
    u = slow_linear(W, f"{name}.mlp.0", slow_norm(W, f"{name}.norm2", x))
    return x + slow_linear(W, f"{name}.mlp.2", u * (1 + torch.erf(u / 2 ** 0.5)) / 2)


def slow_blocks(W, x, heads):
    for i in range(len({k.split(".")[1] for k in W if k.startswith("blocks.")})):
        x = slow_block(W, f"blocks.{i}", x, heads)
    return slow_norm(W, "norm", x)


def slow_tokens(W, x, visible):
    patches = slow_patches(x)
    rows = [torch.cat([W["class_token"][0]] + [slow_linear(W, "patch_embed", patches[i, [j]]) + W["positions"][[j]] for j in seen])
            for i, seen in enumerate(visible.tolist())]
    return slow_blocks(W, torch.stack(rows), HEADS)


def slow_decoder(W, t, order):
    rows, T = [], t.shape[1] - 1
    for i, row in enumerate(order.tolist()):
        slots = [t[i, 1 + row.index(j)] if row.index(j) < T else W["mask_token"][0, 0] for j in range(len(row))]
        rows.append(torch.stack([t[i, 0]] + [slot + W["positions"][j] for j, slot in enumerate(slots)]))
    return slow_linear(W, "predict", slow_blocks(W, torch.stack(rows), t.shape[-1] // 32))[:, 1:]


def slow_embedded(W, x, order):
    return slow_linear(part(W, "decoder"), "embed", slow_tokens(part(W, "backbone"), x, order[:, :T]))


def slow_reconstruct(W, x, order, space=lambda t: t):
    return slow_decoder(part(W, "decoder"), space(slow_embedded(W, x, order)), order)


def slow_loss(predicted, patches, order, visible):
    errors = []
    for i, row in enumerate(order.tolist()):
        for j in row[visible:]:
            p = patches[i, j]
            target = (p - p.mean()) / (((p - p.mean()) ** 2).sum() / (len(p) - 1) + 1e-6) ** 0.5
            errors += [(predicted[i, j] - target) ** 2]
    return torch.cat(errors).mean()


def slow_scale(t):
    mean = t.mean(-1, keepdim=True)
    std = (((t - mean) ** 2).mean(-1, keepdim=True) + 1e-6) ** 0.5
    return (t - mean) / std, mean, std


def slow_calibrated(V, weight_net):
    def space(t):
        z, mean, std = slow_scale(t)
        return mean + std * ((z @ V + weight_net.mlp(z)) @ V.T)
    return space


def slow_mean_loss(W, x, orders, space=lambda t: t):
    return sum(slow_loss(slow_reconstruct(W, x, order, space), slow_patches(x), order, T) for order in orders) / len(orders)


# ---- patches, masks, positions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p, height, width", [(4, 8, 8), (4, 12, 12), (2, 8, 8), (3, 12, 12)])
def test_patchify_follows_each_pixel(p, height, width):
    x, side = randn(2, 3, height, width), width // p
    patches = patchify(x, p)
    assert patches.shape == (2, side ** 2, 3 * p * p)
    for c in range(3):
        for y in range(height):
            for u in range(width):
                assert torch.equal(patches[:, y // p * side + u // p, c * p * p + y % p * p + u % p], x[:, c, y, u])
    assert torch.equal(unpatchify(patches, p, width), x)
    assert torch.equal(patchify(unpatchify(patches.roll(1, 1), p, width), p), patches.roll(1, 1))


@pytest.mark.parametrize("patches, ratio, expected", [(196, 0.75, 49), (9, 2 / 3, 3), (4, 0.75, 1), (9, 0.6, 4), (100, 0.9, 10), (16, 0, 16)])
def test_number_of_visible_patches(patches, ratio, expected):
    assert visible_patches(patches, ratio) == expected


def test_masks_are_permutations_and_show_every_patch_equally_often():
    m, n = 50, 200
    order = random_masks(m, n, L, generator())
    assert order.shape == (m, n, L) and order.dtype == torch.int64
    assert torch.equal(order.sort(-1).values, torch.arange(L).expand(m, n, L))
    shown = (order[..., :T, None] == torch.arange(L)).double().mean((0, 1))                     # (slot, patch)
    close(shown, torch.full_like(shown, 1 / L), rtol=0, atol=5 * (1 / L * (1 - 1 / L) / (m * n)) ** 0.5)
    close(shown.sum(0), torch.full((L,), T / L, dtype=torch.float64), rtol=0, atol=0.025)


def test_masks_of_images_and_of_masks_are_independent():
    order = random_masks(20, 200, L, generator(1))
    for a, b in ((order[1:], order[:-1]), (order[:, 1:], order[:, :-1]), (order[1:, 1:], order[:-1, :-1])):
        agree = (a == b).double().mean().item()
        assert abs(agree - 1 / L) < 0.01
    assert len(random_masks(5, 8, 64, generator(2)).flatten(0, 1).unique(dim=0)) == 40


def test_masks_are_a_function_of_the_generator():
    one, same, other = (random_masks(3, 4, 16, generator(s)) for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    g = generator(3)
    assert torch.equal(random_masks(3, 4, 16, g), one) and not torch.equal(random_masks(3, 4, 16, g), one)


def settings(**kw):
    return Namespace(**{**dict(baseline=False, norm_pixels=True, masks=5, tasks=2, mask_ratio=2 / 3, patch_size=P, image_size=SIZE, inner_lr=0.0, second_order=False,
                               lambda_s=0.1, calibrate="both", seed=0, bf16=False, lr=1e-3, weight_decay=0.05, position_base=30.0), **kw})


def test_drawn_masks_depend_on_seed_and_progress_alone():
    draw = lambda progress=0.25, **kw: draw_masks(settings(**kw), 8, progress, torch.device("cpu"))
    torch.manual_seed(0)
    one, state = draw(), torch.get_rng_state()
    torch.manual_seed(1)
    assert one.shape == (5, 8, L) and torch.equal(one.sort(-1).values, torch.arange(L).expand(5, 8, L))
    for same in (draw(), draw(inner_lr=1.0), draw(calibrate="none"), draw(tasks=4), draw(baseline=True), draw(mask_ratio=0.5), draw(lr=1.0)):
        assert torch.equal(one, same)
    for other in (draw(0.26), draw(0.25 + 1e-6), draw(seed=1)):
        assert (one != other).double().mean() > 0.7
    torch.manual_seed(0)
    draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_of_ten_steps_all_differ():
    drawn = torch.cat([draw_masks(settings(image_size=32), 4, step / 100, torch.device("cpu")).flatten(0, 1) for step in range(10)])
    assert drawn.shape == (200, 64) and len(drawn.unique(dim=0)) == 200


@pytest.mark.parametrize("dim, side", [(32, 2), (32, 3), (64, 5), (8, 14)])
def test_positions_equal_the_formula(dim, side):
    positions = sincos_positions(dim, side)
    assert positions.shape == (side ** 2, dim) and positions.dtype == torch.float32
    close(positions.double(), slow_positions(dim, side), rtol=0, atol=5e-6)


def test_the_lowest_frequency_is_one_over_the_base_and_both_networks_take_it_from_the_recipe():
    positions, low = sincos_positions(64, 8, 30.0).double(), 30.0 ** -(15 / 16)
    close(positions.unflatten(0, (8, 8))[:, 0, 15], (torch.arange(8).double() * low).sin(), rtol=0, atol=1e-6)          # the last sin of y
    nets = build_nets(settings(arch="vit_micro", factors=32, decoder_dim=32, decoder_depth=1, position_base=30.0))[0]
    side = SIZE // P
    assert torch.equal(nets["backbone"].positions, sincos_positions(96, side, 30.0)) and torch.equal(nets["decoder"].positions, sincos_positions(32, side, 30.0))
    assert not torch.allclose(sincos_positions(32, side, 30.0), sincos_positions(32, side))


# ---- encoder ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_equals_explicit_attention(heads):
    torch.manual_seed(0)
    block, x = shaken(Block(D, heads)), randn(2, 5, D)
    close(block(x), slow_block({f"b.{k}": v for k, v in weights(block).items()}, "b", x, heads))


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_equal_the_stack_on_the_gathered_patches(depth):
    encoder, x, visible = make_encoder(depth=depth), images(3), random_masks(1, 3, L, generator())[0, :, :T]
    close(encoder.positions.double(), slow_positions(D, 3), rtol=0, atol=5e-6)
    tokens, slow = encoder.tokens(x, visible), slow_tokens(weights(encoder), x, visible)
    assert tokens.shape == (3, 1 + T, D) and tokens.dtype == torch.float64
    close(tokens, slow)
    close(encoder.tokens(x), slow_tokens(weights(encoder), x, torch.arange(L).expand(3, L)))


def test_initial_tokens_equal_the_slow_ones_too():
    torch.manual_seed(0)
    encoder, visible = Encoder(8, P, D, 2, HEADS).double(), torch.tensor([[3, 0], [1, 2]])
    close(encoder.tokens(images(2, 8), visible), slow_tokens(weights(encoder), images(2, 8), visible))


def test_forward_is_the_mean_of_the_patch_tokens():
    encoder, x = make_encoder(), images(2)
    close(encoder(x), sum(encoder.tokens(x)[:, 1 + i] for i in range(L)) / L)
    assert (encoder(x) - encoder.tokens(x).mean(1)).abs().max() > 1e-3


def test_masked_pixels_reach_no_token():
    encoder, x, order = make_encoder(depth=2), images(3), random_masks(1, 3, L, generator(2))[0]
    tokens = encoder.tokens(x, order[:, :T])
    for slot in range(L):
        patches = patchify(x, P)
        patches[torch.arange(3), order[:, slot]] += randn(3, PIXELS, seed=slot)
        moved = (encoder.tokens(unpatchify(patches, P, SIZE), order[:, :T]) - tokens).abs().amax(-1)
        assert (moved == 0).all() if slot >= T else (moved > 1e-6).all()


def test_permuting_visible_patches_permutes_their_tokens_and_keeps_the_class_token():
    encoder, x, visible, shuffle = make_encoder(depth=2), images(3), random_masks(1, 3, L, generator(2))[0, :, :5], torch.tensor([3, 0, 4, 2, 1])
    tokens, shuffled = encoder.tokens(x, visible), encoder.tokens(x, visible[:, shuffle])
    close(shuffled[:, 0], tokens[:, 0], rtol=0, atol=1e-12)
    close(shuffled[:, 1:], tokens[:, 1:][:, shuffle], rtol=0, atol=1e-12)
    assert (shuffled[:, 1:] - tokens[:, 1:]).abs().max() > 1e-3
    close(encoder.tokens(x, torch.arange(L).expand(3, L)), encoder.tokens(x), rtol=0, atol=1e-12)


def test_float32_in_float32_out():
    torch.manual_seed(0)
    encoder, decoder = Encoder(8, P, D, 1, HEADS), Decoder(8, P, D, 32, 1)
    x, order = images(2, 8).float(), random_masks(1, 2, 4, generator())[0]
    tokens = encoder.tokens(x, order[:, :2])
    assert tokens.dtype == encoder(x).dtype == decoder(decoder.embed(tokens), order).dtype == torch.float32


def test_torchvision_gets_the_same_class_token():
    encoder, x = make_encoder(8, depth=2, seed=3), images(3, 8)
    vit = VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128).double()
    vit.heads = nn.Identity()
    vit.load_state_dict(to_torchvision(encoder.state_dict(), P), strict=True)
    close(vit.eval()(x), encoder.tokens(x)[:, 0])
    assert vit(x).std() > 0.1


# ---- decoder ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim, depth", [(32, 1), (64, 2)])
def test_decoder_equals_explicit_attention_in_image_order(dim, depth):
    decoder, order, t = make_decoder(dim, depth), random_masks(1, 3, L, generator(4))[0], randn(3, 1 + T, dim)
    close(decoder.positions.double(), slow_positions(dim, 3), rtol=0, atol=5e-6)
    predicted = decoder(t, order)
    assert predicted.shape == (3, L, PIXELS)
    close(predicted, slow_decoder(weights(decoder), t, order))
    close(decoder.embed(randn(3, 1 + T, D)), slow_linear(weights(decoder), "embed", randn(3, 1 + T, D)))


def test_without_blocks_visible_patches_carry_their_token_and_masked_ones_the_mask_token():
    decoder, order, t = make_decoder(), random_masks(1, 3, L, generator(4))[0], randn(3, 1 + T, 32)
    decoder.blocks, decoder.norm, readout = nn.Sequential(), nn.Identity(), decoder.predict
    for i in range(3):
        tokens = {order[i, s].item(): t[i, 1 + s] for s in range(T)}
        for j in range(L):
            expected = tokens.get(j, decoder.mask_token[0, 0]) + decoder.positions[j]
            close(decoder(t, order)[i, j], readout.weight @ expected + readout.bias)


def test_prediction_depends_on_the_place_of_a_token_and_not_on_the_order_of_the_tokens():
    decoder, order, t, shuffle = make_decoder(depth=2), random_masks(1, 3, L, generator(4))[0], randn(3, 1 + T, 32), torch.tensor([2, 0, 1])
    predicted = decoder(t, order)
    both = decoder(torch.cat([t[:, :1], t[:, 1:][:, shuffle]], 1), torch.cat([order[:, :T][:, shuffle], order[:, T:]], 1))
    close(both, predicted, rtol=0, atol=1e-12)
    close(decoder(t, torch.cat([order[:, :T], order[:, T:].flip(1)], 1)), predicted, rtol=0, atol=1e-12)
    for slots in ([1, 0, *range(2, L)], [T, *range(1, T), 0, *range(T + 1, L)]):
        assert (decoder(t, order[:, slots]) - predicted).abs().amax((1, 2)).min() > 1e-3


def autoencoder(**kw):
    return nn.ModuleDict({"backbone": make_encoder(**kw), "decoder": make_decoder(**kw)})


def test_reconstruct_equals_the_slow_autoencoder():
    nets, x, order, args = autoencoder(), images(), random_masks(1, 4, L, generator(6))[0], settings()
    run = lambda *space: reconstruct(nets["backbone"], nets["decoder"], x, order, T, args, *space)
    close(run(), slow_reconstruct(weights(nets), x, order))
    tilt = lambda t: t * torch.arange(1.0, 2 + T, dtype=torch.float64)[:, None] + t.roll(1, -1)                # the class token is token 0
    close(run(tilt), slow_reconstruct(weights(nets), x, order, tilt))
    assert (run(tilt) - run()).abs().max() > 1e-2


def test_masked_pixels_do_not_reach_the_reconstruction():
    nets, x, order = autoencoder(), images(), random_masks(1, 4, L, generator(6))[0]
    patches = patchify(x, P)
    patches[torch.arange(4)[:, None], order[:, T:]] += 1 + randn(4, L - T, PIXELS)
    run = lambda x: reconstruct(nets["backbone"], nets["decoder"], x, order, T, settings())
    assert torch.equal(run(unpatchify(patches, P, SIZE)), run(x))


# ---- reconstruction loss --------------------------------------------------------------------------------------------------------------
def loss_case(train=False):
    return randn(4, L, PIXELS, seed=1, train=train), patchify(images(), P), random_masks(1, 4, L, generator(7))[0]


def test_normalized_patches_have_zero_mean_and_unit_unbiased_variance():
    patches = 3 * randn(2, L, PIXELS) + 5
    patches[0, 0] = 0.5
    unit = normalize_patches(patches)
    close(unit.mean(-1), torch.zeros(2, L, dtype=torch.float64))
    assert torch.equal(unit[0, 0], torch.zeros(PIXELS, dtype=torch.float64))
    close(unit.var(-1, correction=1).flatten()[1:], torch.ones(2 * L - 1, dtype=torch.float64), rtol=1e-6, atol=0)
    p = 1e-3 * randn(1, 1, PIXELS)
    close(normalize_patches(p), (p - p.mean()) / (p.var() + 1e-6) ** 0.5)


@pytest.mark.parametrize("visible", [1, T, L - 1])
def test_loss_equals_a_loop_over_masked_pixels_in_value_and_gradient(visible):
    predicted, patches, order = loss_case(train=True)
    fast, slow = reconstruction_loss(predicted, patches, order, visible), slow_loss(predicted, patches, order, visible)
    close((fast, *grad(fast, predicted)), (slow, *grad(slow, predicted)))


def test_visible_patches_do_not_enter_the_loss():
    predicted, patches, order = loss_case(train=True)
    loss, images_of = reconstruction_loss(predicted, patches, order, T), torch.arange(4)[:, None]
    slope = grad(loss, predicted)[0]
    assert torch.equal(slope[images_of, order[:, :T]], torch.zeros(4, T, PIXELS, dtype=torch.float64))
    assert (slope[images_of, order[:, T:]].abs() > 0).all()
    a, b = predicted.detach().clone(), patches.clone()
    a[images_of, order[:, :T]], b[images_of, order[:, :T]] = 1e3, randn(4, T, PIXELS, seed=9)
    close(reconstruction_loss(a, b, order, T), loss.detach(), rtol=1e-14, atol=0)
    close(reconstruction_loss(predicted, patches, torch.cat([order[:, :T].flip(1), order[:, T:].flip(1)], 1), T), loss)


def test_loss_of_perfect_and_of_zero_prediction():
    _, patches, order = loss_case()
    assert reconstruction_loss(normalize_patches(patches), patches, order, T).item() < 1e-25
    close(reconstruction_loss(torch.zeros_like(patches), patches, order, T).item(), (PIXELS - 1) / PIXELS, rtol=1e-5, atol=0)
    zero = reconstruction_loss(torch.zeros_like(patches), patches, order, T)
    close(zero, torch.stack([normalize_patches(patches)[i, order[i, T:]] for i in range(4)]).square().mean())
    close(reconstruction_loss(normalize_patches(patches) + 2, patches, order, T).item(), 4.0)


# ---- calibration of tokens ----------------------------------------------------------------------------------------------------------
def make_factors(n_f=8, zero=False, dim=32):
    torch.manual_seed(1)
    nets = nn.ModuleDict({"factor_net": FactorNet(dim, n_f), "weight_net": WeightNet(dim, n_f)})
    shaken(nets["factor_net"], 0.05, seed=5)
    return nets.double() if zero else nn.ModuleDict({**nets, "weight_net": shaken(nets["weight_net"], seed=4)})


def test_token_scale_is_exact_standardisation():
    t = 3 * randn(2, 4, 32) + 2
    z, mean, std = token_scale(t)
    close((z, mean.expand(2, 4, 1), std.expand(2, 4, 1)), slow_scale(t))
    close(mean + std * z, t, rtol=0, atol=1e-12)
    close(z.mean(-1), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    close(z.var(-1, correction=0), torch.ones(2, 4, dtype=torch.float64), rtol=1e-5, atol=0)
    small, mean, std = token_scale(1e-4 * randn(2, 4, 32))
    close((small, mean, std), slow_scale(1e-4 * randn(2, 4, 32)))
    close(token_scale(5 * t - 1)[0], z, rtol=1e-5, atol=1e-6)


def test_calibration_starts_as_the_identity_when_v_is_square():
    nets, x, order, w = autoencoder(), images(), random_masks(1, 4, L, generator(6))[0], make_factors(32, zero=True)["weight_net"]
    t, V, slope = (3 * randn(2, 4, 32) + 1).requires_grad_(), orthonormal(32, 32), randn(2, 4, 32, seed=3)
    close(calibrated_tokens(t, V, w), t, rtol=0, atol=1e-12)
    close(grad(calibrated_tokens(t, V, w), t, slope)[0], slope, rtol=0, atol=1e-12)
    plain, calibrated = (reconstruct(nets["backbone"], nets["decoder"], x, order, T, settings(), *space)
                         for space in ((), (lambda t: calibrated_tokens(t, V, w),)))
    close(calibrated, plain, rtol=0, atol=1e-11)


def test_calibration_projects_on_the_columns_of_v():
    t, V, w = 3 * randn(2, 4, 32) + 1, orthonormal(32, 8), make_factors(8, zero=True)["weight_net"]
    z, mean, std = slow_scale(t)
    z_hat = (calibrated_tokens(t, V, w) - mean) / std
    close(z_hat, sum((z @ V[:, [f]]) * V[:, f] for f in range(8)))
    close(z_hat @ V @ V.T, z_hat)
    assert (z_hat - z).norm() > 0.5 * z.norm()


def test_calibrated_tokens_take_the_weights_of_f_w_and_keep_mean_and_std():
    t, V, w = (3 * randn(2, 4, 32) + 1).requires_grad_(), orthonormal(32, 8), make_factors(8)["weight_net"]
    fast, slow = calibrated_tokens(t, V, w), slow_calibrated(V, w)(t)
    close((fast, *grad(fast.square().sum(), t)), (slow, *grad(slow.square().sum(), t)))
    close(calibrated_tokens(5 * t - 3, V, w), 5 * fast - 3, rtol=1e-5, atol=1e-5)
    assert (w.mlp(token_scale(t)[0])).abs().max() > 0.01


def test_calibration_stays_in_full_precision_under_autocast():
    V, weight_net, t = orthonormal(8, 5).float(), WeightNet(8, 5), randn(6, 8).float()
    exact = calibrated_tokens(t, V, weight_net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(calibrated_tokens(t, V, weight_net), exact)
        low = calibrated_tokens(t.bfloat16(), V, weight_net)
    assert low.dtype == torch.float32 and torch.equal(low, calibrated_tokens(t.bfloat16().float(), V, weight_net))


# ---- one iteration --------------------------------------------------------------------------------------------------------------------
def make_nets(n_f=8, zero=False, baseline=False):
    nets = autoencoder(seed=2)
    return nets if baseline else nn.ModuleDict({**nets, **make_factors(n_f, zero)})


def model(nets):
    return nn.ModuleDict({"backbone": nets["backbone"], "decoder": nets["decoder"]})


def factors(nets):
    return nn.ModuleDict({"factor_net": nets["factor_net"], "weight_net": nets["weight_net"]})


def run(nets, encoder_lr=1.0, factor_lr=0.0, x=None, progress=0.5, watch=None, **kw):
    """One train_step with SGD: (what it took off encoder and decoder, terms)."""
    args, before = settings(**kw), flat(model(nets).parameters())
    opts = {"encoder": torch.optim.SGD(model(nets).parameters(), encoder_lr)}
    if not args.baseline:
        opts["factors"] = torch.optim.SGD(factors(nets).parameters(), factor_lr)
    for name, opt in opts.items():
        opt.register_step_post_hook(lambda *_, name=name: watch and watch(name))
    terms = train_step(nets, opts, [images() if x is None else x], args, progress)
    return before - flat(model(nets).parameters()), terms


def masks(progress=0.5, n=4, **kw):
    return draw_masks(settings(**kw), n, progress, torch.device("cpu"))


def same(a, b, rtol=1e-7):
    close(a, b, rtol=rtol, atol=1e-10)
    assert a.norm() > 1e-3


def slow_rows(W, x, orders):
    return torch.stack([slow_scale(slow_embedded(W, x, order).detach())[0] for order in orders])                         # (m, n, 1 + T, d)


def slow_factor_matrix(nets, x, orders):
    rows = slow_rows(weights(model(nets)), x, orders).flatten(0, -2)
    return nets["factor_net"](torch.cat([rows.mean(0, keepdim=True), torch.cov(rows.T)]))


def slow_spaces(nets, x, orders, calibrate):
    calibrated, plain = slow_calibrated(slow_factor_matrix(nets, x, orders).detach(), nets["weight_net"]), lambda t: t
    return {"both": [calibrated], "none": [plain], "mix": [calibrated, plain]}[calibrate]


def slow_adapted(W, x, orders, spaces, inner_lr, second_order):
    names = [k for k, p in W.items() if p.requires_grad]
    loss = sum(slow_mean_loss(W, x, orders, space) for space in spaces) / len(spaces)
    steps = grad(loss, [W[k] for k in names], create_graph=second_order)
    return {**W, **{k: W[k] - inner_lr * g if second_order else (W[k] - inner_lr * g).detach().requires_grad_() for k, g in zip(names, steps)}}, loss


def slow_maml(nets, calibrate, inner_lr, second_order, x=None, orders=None, K=2, m_support=2):
    """[TC2 Eqs. 6-7] by hand: (gradient, mean query loss, mean support loss)."""
    x, orders = images() if x is None else x, masks() if orders is None else orders
    spaces, W, size = slow_spaces(nets, x, orders, calibrate), weights(model(nets)), len(x) // K
    names, total, query, support = [k for k, p in W.items() if p.requires_grad], 0, 0, 0
    for k in range(K):
        own = slice(k * size, (k + 1) * size)
        fast, before = slow_adapted(W, x[own], orders[:m_support, own], spaces, inner_lr, second_order)
        loss = sum(slow_mean_loss(fast, x[own], orders[m_support:, own], space) for space in spaces) / len(spaces)
        total = total + flat(grad(loss, [(W if second_order else fast)[name] for name in names])) / K
        query, support = query + loss.item() / K, support + before.item() / K
    return total, query, support


def slow_gradient(nets, orders):
    loss = slow_mean_loss(weights(model(nets)), images(), orders)
    return flat(grad(loss, list(model(nets).parameters()))), loss.item()


@pytest.mark.parametrize("m", [1, 3])
def test_baseline_is_the_gradient_of_the_mean_over_masks(m):
    nets = make_nets(baseline=True)
    expected, loss = slow_gradient(nets, masks(masks=m))
    taken, terms = run(nets, baseline=True, masks=m)
    same(taken, expected)
    close(float(terms["loss_ssl"]), loss)


def test_baseline_masks_follow_seed_and_progress():
    taken = lambda **kw: run(make_nets(baseline=True), baseline=True, masks=1, **kw)[0]
    assert torch.equal(taken(), taken())
    assert (taken() - taken(progress=0.75)).norm() > 1e-3 and (taken() - taken(seed=1)).norm() > 1e-3


def test_without_inner_step_and_calibration_tc2_is_the_gradient_on_the_query_masks():
    nets = make_nets()
    expected, loss = slow_gradient(nets, masks()[2:])
    taken, terms = run(nets, calibrate="none")
    same(taken, expected)
    close(float(terms["loss_query"]), loss)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("calibrate", ["both", "none", "mix"])
def test_stage_2_equals_maml_by_hand(calibrate, second_order):
    nets = make_nets()
    expected, query, support = slow_maml(nets, calibrate, 0.1, second_order)
    taken, terms = run(nets, calibrate=calibrate, inner_lr=0.1, second_order=second_order)
    same(taken, expected)
    close((float(terms["loss_query"]), float(terms["loss_support"])), (query, support))


def test_first_and_second_order_differ_with_an_inner_step_alone():
    taken = lambda **kw: run(make_nets(), calibrate="none", **kw)[0]
    close(taken(second_order=True), taken())
    assert (taken(inner_lr=0.1, second_order=True) - taken(inner_lr=0.1)).norm() > 1e-2 * taken().norm()
    assert (taken(inner_lr=0.1) - taken()).norm() > 1e-2 * taken().norm()


def test_mix_without_inner_step_is_the_mean_of_both_and_none():
    both, none, mix = (run(make_nets(), calibrate=c) for c in ("both", "none", "mix"))
    same(mix[0], (both[0] + none[0]) / 2)
    close(float(mix[1]["loss_query"]), (float(both[1]["loss_query"]) + float(none[1]["loss_query"])) / 2)
    assert (both[0] - none[0]).norm() > 1e-2 * none[0].norm()


@pytest.mark.parametrize("calibrate", ["both", "none"])
def test_second_order_equals_finite_differences_of_the_bilevel_objective(calibrate):
    nets, x, orders, h = make_nets(zero=True), images(), masks(), 1e-4
    spaces, theta = slow_spaces(nets, x, orders, calibrate), weights(model(nets))
    names = [k for k, p in theta.items() if p.requires_grad]

    def objective(W):
        W, total = {k: p.detach().requires_grad_(k in names) for k, p in W.items()}, 0
        for own in (slice(0, 2), slice(2, 4)):
            fast = slow_adapted(W, x[own], orders[:2, own], spaces, 0.3, False)[0]
            total += sum(slow_mean_loss(fast, x[own], orders[2:, own], space).item() for space in spaces) / len(spaces) / 2
        return total

    taken = run(copy.deepcopy(nets), calibrate=calibrate, inner_lr=0.3, second_order=True)[0]
    first = run(copy.deepcopy(nets), calibrate=calibrate, inner_lr=0.3)[0]
    for direction in (taken / taken.norm(), randn(len(taken), seed=11) / len(taken) ** 0.5):
        pieces = dict(zip(names, direction.split([theta[k].numel() for k in names])))
        moved = lambda s: {k: p + s * pieces[k].view_as(p) if k in pieces else p for k, p in theta.items()}
        slope = (objective(moved(h)) - objective(moved(-h))) / (2 * h)
        close((taken @ direction).item(), slope, rtol=1e-5, atol=1e-7)
        assert abs((first @ direction).item() - slope) > 1e-3 * abs(slope)


def test_weights_zero_and_square_v_are_plain_mae():
    nets = make_nets(n_f=32, zero=True)
    expected, loss = slow_gradient(nets, masks()[2:])
    taken, terms = run(nets, calibrate="both")
    close(float(terms["loss_query"]), loss, rtol=1e-9, atol=0)
    close(taken, expected, rtol=1e-9, atol=1e-9)
    assert expected.norm() > 0.1
    for kw in (dict(inner_lr=0.1), dict(inner_lr=0.1, second_order=True)):
        close(run(make_nets(n_f=32, zero=True), **kw)[0], run(make_nets(), calibrate="none", **kw)[0], rtol=1e-8, atol=1e-9)


def test_tasks_are_consecutive_groups(monkeypatch):
    x, orders = images(), masks()

    def taken(perm, **kw):
        monkeypatch.setattr(mae_tc2, "draw_masks", lambda *_: orders[:, perm])
        return run(make_nets(), x=x[perm], **kw)[0]

    for kw in (dict(calibrate="none", inner_lr=0.3), dict(calibrate="both", inner_lr=0.3, second_order=True)):
        one = taken([0, 1, 2, 3], **kw)
        for perm in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]):
            close(taken(perm, **kw), one, rtol=1e-7, atol=1e-10)
        for perm in ([0, 2, 1, 3], [3, 1, 2, 0]):
            assert (taken(perm, **kw) - one).norm() > 1e-3 * one.norm()
    close(taken([0, 2, 1, 3], calibrate="none"), taken([0, 1, 2, 3], calibrate="none"), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("K", [1, 4])
def test_other_numbers_of_tasks(K):
    nets = make_nets()
    expected, query, _ = slow_maml(nets, "both", 0.1, False, K=K)
    taken, terms = run(nets, tasks=K, inner_lr=0.1)
    same(taken, expected)
    close(float(terms["loss_query"]), query)


def slow_stage_1(nets, x, orders, lr, lambda_s, K=2, m_support=2):
    """[TC2 Eqs. 4-5] two SGD steps of f_v and f_w by hand; changes nets. Sums over features, means over rows."""
    W, Z, terms = {k: p.detach() for k, p in weights(model(nets)).items()}, slow_rows(weights(model(nets)), x, orders), {}
    for phase, own in (("support", slice(None, m_support)), ("query", slice(m_support, None))):
        V, size, rec = slow_factor_matrix(nets, x, orders), len(x) // K, 0
        mlp, skip = nets["weight_net"].mlp, lambda z: z @ V.detach()
        space = lambda t: (lambda z, mean, std: mean + std * ((skip(z) + mlp(z)) @ V.T))(*slow_scale(t))
        for k in range(K):
            rec = rec + slow_mean_loss(W, x[k * size:(k + 1) * size], orders[own, k * size:(k + 1) * size], space) / K
        rows, z = Z.flatten(0, -2), Z[own].flatten(0, -2)
        weight = skip(z) + mlp(z)
        loss_v = (V.T @ V - torch.eye(V.shape[1])).square().sum() + (rows - rows @ V @ V.T).square().sum(1).mean()
        loss_w = (z - weight @ V.detach().T).square().sum(1).mean() + weight.abs().sum(1).mean()
        terms |= {f"loss_factors_{phase}": rec.item(), "loss_v": loss_v.item(), "loss_w": loss_w.item()}
        params = list(factors(nets).parameters())
        for p, g in zip(params, grad(rec + loss_v + lambda_s * loss_w, params)):
            p.data -= lr * g
    return terms


def test_stage_1_is_two_steps_by_hand_and_stage_2_sees_their_result():
    nets, lr = make_nets(), 0.01
    by_hand, before = copy.deepcopy(nets), flat(factors(nets).parameters())
    expected = slow_stage_1(by_hand, images(), masks(), lr, 0.3)
    gradient = slow_maml(by_hand, "both", 0.1, False)[0]
    taken, terms = run(nets, factor_lr=lr, lambda_s=0.3, inner_lr=0.1)
    same((before - flat(factors(nets).parameters())) / lr, (before - flat(factors(by_hand).parameters())) / lr, rtol=1e-6)
    close({k: float(terms[k]) for k in expected}, expected)
    same(taken, gradient, rtol=1e-6)


def test_each_stage_moves_its_own_networks():
    nets, seen = make_nets(), []
    theta, given, other = list(model(nets).parameters()), flat(model(nets).parameters()), list(factors(nets).parameters())
    parts = lambda: [flat(nets[name].parameters()) for name in ("factor_net", "weight_net")]
    before = parts()

    def watch(name):
        if name == "factors":
            assert all(p.grad is None for p in theta) and torch.equal(flat(theta), given)
        seen.append((name, parts(), [p.grad.clone() if p.grad is not None else None for p in other]))

    run(nets, encoder_lr=0.1, factor_lr=0.01, inner_lr=0.1, second_order=True, watch=watch)
    assert [name for name, *_ in seen] == ["factors", "factors", "encoder"]
    for start, end in ((before, seen[0][1]), (seen[0][1], seen[1][1])):
        assert all((a != b).any() for a, b in zip(start, end))
    assert all(torch.equal(a, b) for a, b in zip(seen[1][1], parts()))
    assert all(a is None or b is None or torch.equal(a, b) for a, b in zip(seen[1][2], [p.grad for p in other]))
    assert not torch.equal(flat(theta), given) and all(p.requires_grad for p in nets.parameters())


def test_no_calibration_leaves_the_factors_alone_or_unused():
    nets, other = make_nets(), make_nets(n_f=4, zero=True)
    close(run(nets, calibrate="none", inner_lr=0.1)[0], run(other, calibrate="none", inner_lr=0.1, factor_lr=0.01)[0])


def diagnosed(nets, out, **kw):
    return {k: float(v) for k, v in diagnose(nets, [images()], settings(out=out, **kw)).items()}


def test_spectra_and_cosine_describe_the_tokens_of_the_batch(tmp_path):
    """Before and after calibration: the same rows, those of one drawn mask, with the factors of these rows."""
    nets, orders = make_nets(), masks(progress=-1)[:1]
    z = slow_rows(weights(model(nets)), images(), orders).flatten(0, -2)
    V = slow_factor_matrix(nets, images(), orders).detach()
    z_hat = ((z @ V + nets["weight_net"].mlp(z)) @ V.T).detach()
    shares = [s / s.sum() for s in (torch.linalg.eigvalsh(torch.cov(rows.T)).clamp(min=1e-20).sqrt() for rows in (z, z_hat))]
    cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(z_hat, z)]
    found = diagnosed(nets, tmp_path)
    close([found[k] for k in ("rank_z", "rank_z_hat", "cos_z_hat")],
          [*((-(p * p.log()).sum()).exp().item() for p in shares), sum(cosines).item() / len(z)], rtol=1e-5, atol=0)
    assert abs(found["rank_z"] - found["rank_z_hat"]) > 1e-3
    close(diagnosed(make_nets(baseline=True), tmp_path, baseline=True)["rank_z"], diagnosed(nets, tmp_path, calibrate="none")["rank_z"])


def test_identity_calibration_has_the_rank_of_the_tokens(tmp_path):
    found = diagnosed(make_nets(n_f=32, zero=True), tmp_path)
    close((found["rank_z_hat"], found["cos_z_hat"], found["loss_calibrated"]), (found["rank_z"], 1.0, found["loss_reconstruction"]))


# ---- networks and optimizers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("baseline", [True, False])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(baseline):
    args = settings(arch="vit_micro", baseline=baseline, factors=32, decoder_dim=32, decoder_depth=1)
    nets, width = build_nets(args)
    opts = build_opts(nets, args)
    assert isinstance(opts["encoder"], torch.optim.AdamW) and set(opts) == ({"encoder"} if baseline else {"encoder", "factors"})
    for opt, own in zip(opts.values(), (model(nets), *(() if baseline else (factors(nets),)))):
        held = [id(p) for group in opt.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in own.parameters()}
    decay = {id(p): group["weight_decay"] for group in opts["encoder"].param_groups for p in group["params"]}
    assert all(group["betas"] == (0.9, 0.95) and group["lr"] == args.lr for group in opts["encoder"].param_groups)
    for name, p in model(nets).named_parameters():
        assert decay[id(p)] == (0.05 if p.ndim == 2 else 0), name
    assert len(nets) == (2 if baseline else 4) and nets["backbone"](torch.zeros(1, 3, SIZE, SIZE)).shape == (1, width)
    if not baseline:
        assert type(opts["factors"]) is torch.optim.Adam and all(group["weight_decay"] == 0 for group in opts["factors"].param_groups)


def test_baseline_and_tc2_start_from_the_same_weights():
    start = []
    for baseline in (True, False):
        torch.manual_seed(0)
        args = settings(arch="vit_micro", baseline=baseline, factors=32, decoder_dim=32, decoder_depth=1)
        start.append(flat(model(build_nets(args)[0]).parameters()))
    assert torch.equal(*start)


def test_targets_are_normalised_or_the_patches_themselves():
    x = images()
    assert torch.equal(mae_tc2.targets(x, Namespace(patch_size=P, norm_pixels=False)), patchify(x, P))
    close(mae_tc2.targets(x, Namespace(patch_size=P, norm_pixels=True)), normalize_patches(patchify(x, P)))
