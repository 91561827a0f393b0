"""How one tests such a method: from its equations, not from its code.

Every loss and norm has a slow twin here, double loops in float64, and closed forms: orthonormal
embeddings have loss 0, equal ones lambda m (m - 1), constant ones m. A penalty is tested by what it
must not see, the scale of a row, and a proximal step by its optimality condition, by random
perturbations, and by a group lasso that is solved without any threshold. A whole step is compared
with one written by hand, and with lambda = 0 it is Barlow Twins to the bit. That the printed
penalty removes no column where two others do is shown by training on a linear backbone.
"""
import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.testing import assert_close

import barlow_sparsehead
import simclr_tc2
from barlow_sparsehead import (RHO, barlow_loss, barlow_terms, batch_head, build_nets, build_opts,
                               check_args, column_norms, cross_correlation, diagnose, embed,
                               fill_defaults, input_spread, l21_norm, live_columns, parse_args,
                               prox_l21, rescaling_share, row_normalize, sparse_penalty, sparsity,
                               standardize, train_step, view_augmentations)
from common import Data
from conftest import checkpoint, rows, tiny

PENALTIES = ["plain", "rownorm", "inputs", "prox", "bilevel"]
W_NAME = "projector.3.weight"


# ---- helpers -------------------------------------------------------------------------------------
def randn(*shape, seed=0, train=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(train)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def pair_of_views(n, m, seed=0, scale=1.0):
    """Two noisy versions of the same correlated embeddings (n, m)."""
    shared = randn(n, m, seed=seed)
    mixing = scale * randn(m, m, seed=seed + 9)
    z1 = (shared + 0.5 * randn(n, m, seed=seed + 1)) @ mixing
    z2 = (shared + 0.5 * randn(n, m, seed=seed + 2)) @ mixing
    return z1, z2


# ---- slow twins ----------------------------------------------------------------------------------
def slow_standardize(z, eps=1e-5):
    """The columns of z (n, m), a list."""
    columns = []
    for column in z.T:
        centred = column - sum(column) / len(column)
        variance = sum(centred ** 2) / len(column)
        columns.append(centred / (variance + eps) ** 0.5)
    return columns


def slow_correlation(z1, z2):
    C = []
    for a in slow_standardize(z1):
        C.append([sum(a * b) / len(z1) for b in slow_standardize(z2)])
    return C


def slow_terms(z1, z2, lambda_offdiag):
    C = slow_correlation(z1, z2)
    invariance = redundancy = 0
    for i in range(len(C)):
        invariance = invariance + (1 - C[i][i]) ** 2
        for j in range(len(C)):
            if i != j:
                redundancy = redundancy + C[i][j] ** 2
    return invariance, lambda_offdiag * redundancy


def slow_l21(W):
    total = 0
    for j in range(W.shape[1]):
        total = total + sum(W[:, j] ** 2) ** 0.5
    return total


def unit_rows(W):
    return torch.stack([row / sum(row ** 2) ** 0.5 for row in W])


def slow_penalty(W, penalty):
    return slow_l21(W) if penalty == "plain" else slow_l21(unit_rows(W))


def slow_prox(W, threshold):
    out = torch.zeros_like(W)
    for j in range(W.shape[1]):
        norm = math.sqrt(sum(w.item() ** 2 for w in W[:, j]))
        if norm > threshold:
            out[:, j] = W[:, j] * (norm - threshold) / norm
    return out


# ---- the Barlow Twins loss -----------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_standardize_is_batchnorm_without_affine_parameters_in_train_mode(scale):
    z = scale * randn(11, 4) + 5
    for eps in (1e-5, 0.1):
        norm = nn.BatchNorm1d(4, affine=False, eps=eps).double()
        assert_close(standardize(z, eps), norm(z), rtol=1e-10, atol=1e-10)
    assert_close(standardize(z), standardize(z, 1e-5), rtol=0, atol=0)


def test_standardized_dimensions_have_mean_0_and_biased_variance_v_over_v_plus_eps():
    z = randn(9, 5) * f64(1, 1e-2, 1e-3, 7, 100) + 3
    out = standardize(z)
    variance = z.var(0, unbiased=False)
    assert_close(out.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert_close(out.var(0, unbiased=False), variance / (variance + 1e-5))
    assert out.dtype == torch.float64
    assert not standardize(torch.full((4, 2), 3.0)).any()


@pytest.mark.parametrize("scale", [3e-3, 1.0])
def test_cross_correlation_and_both_terms_equal_double_loops(scale):
    z1, z2 = pair_of_views(7, 4, scale=scale)
    C = cross_correlation(z1, z2)
    assert_close(C, torch.stack([torch.stack(row) for row in slow_correlation(z1, z2)]))
    assert (C - C.T).abs().max() > 0.1

    found = barlow_terms(z1, z2, 0.3)
    assert_close(torch.stack(found), torch.stack(slow_terms(z1, z2, 0.3)))
    assert_close(barlow_loss(z1, z2, 0.3), sum(slow_terms(z1, z2, 0.3)))
    assert [term.shape for term in found] == [(), ()]


def test_loss_closed_forms():
    n = 16
    m = 5
    ones = torch.ones(n, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, randn(n, m)], dim=1))[0]
    Q = 1e3 * basis[:, 1:]                              # orthonormal and centred
    assert barlow_loss(Q, Q, 1.0) < 1e-15
    assert barlow_loss(Q, 2 * Q + 1, 1.0) < 1e-15
    assert_close(barlow_loss(Q, -Q, 7.0), f64(4 * m)[0])
    assert_close(barlow_loss(Q, Q.roll(1, 1), 0.3), f64(m + 0.3 * m)[0])

    same = Q[:, :1].expand(n, m)
    expected = f64(0, 0.3 * m * (m - 1))
    assert_close(torch.stack(barlow_terms(same, same, 0.3)), expected, atol=1e-9, rtol=1e-9)
    constant = ones.expand(n, m)
    assert_close(barlow_loss(constant, constant, 0.3), f64(m)[0])


def test_loss_is_invariant_to_increasing_affine_maps_of_each_dimension_of_each_view():
    z1, z2 = pair_of_views(20, 6, scale=1e3)
    loss = barlow_loss(z1, z2, 0.1)
    mapped = barlow_loss(z1 * randn(6, seed=1).exp() + 7, z2 * randn(6, seed=2).exp() - 3, 0.1)
    assert_close(mapped, loss, rtol=1e-7, atol=1e-7)

    signs = f64(-1, 1, 1, 1, 1, 1)
    assert_close(barlow_loss(z1 * signs, z2 * signs, 0.1), loss, rtol=1e-7, atol=1e-7)
    assert barlow_loss(z1 * signs, z2, 0.1) > loss + 1


def test_loss_is_invariant_to_scaling_rows_of_W_and_not_columns():
    W = randn(4, 2)
    u1, u2 = pair_of_views(30, 2, scale=1e3)

    def loss(W):
        return barlow_loss(u1 @ W.T, u2 @ W.T, 5e-2)

    scaled = f64(0.1, 10, 3, 0.7)[:, None] * W
    assert_close(loss(scaled), loss(W), rtol=1e-4, atol=1e-4)
    assert_close(loss(row_normalize(W)), loss(W), rtol=1e-4, atol=1e-4)
    assert (loss(W * f64(1, 0.1)) - loss(W)).abs() > 1e-2


def test_gradient_equals_finite_differences_of_the_double_loop():
    z = torch.stack(pair_of_views(6, 3)).requires_grad_()
    found, = grad(barlow_loss(*z, 0.3), z)
    e = 1e-5
    for k in range(z.numel()):
        values = []
        for step in (e, -e):
            moved = z.detach().clone()
            moved.view(-1)[k] += step
            values.append(sum(slow_terms(*moved, 0.3)).item())
        slope = (values[0] - values[1]) / (2 * e)
        assert slope == pytest.approx(found.view(-1)[k].item(), rel=1e-6, abs=1e-8)


# ---- the penalties -------------------------------------------------------------------------------
def test_l21_closed_forms():
    m = 3
    H = 7
    W = randn(m, H)
    for j, norm in enumerate(column_norms(W)):
        assert_close(norm, sum(W[:, j] ** 2) ** 0.5)
    assert_close(l21_norm(W), slow_l21(W))
    assert_close(l21_norm(torch.ones(m, H).double()), f64(H * m ** 0.5)[0])
    assert l21_norm(f64([0, 3, 0], [0, -4, 0])) == 5
    assert l21_norm(torch.zeros(m, H)) == 0
    assert_close(l21_norm(-2 * W), 2 * l21_norm(W))
    assert (l21_norm(W) - l21_norm(W.T)).abs() > 0.1


def test_l21_gradient_is_the_unit_column_and_satisfies_euler():
    W = randn(4, 6, train=True)
    found, = grad(l21_norm(W), W)
    for j in range(6):
        assert_close(found[:, j], W[:, j] / sum(W[:, j] ** 2) ** 0.5)
    assert_close((W * found).sum(), l21_norm(W))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("zero_row", [False, True])
def test_gradient_is_zero_and_finite_at_a_zero_column_and_a_zero_row(penalty, zero_row):
    W = randn(3, 5)
    W[:, 1] = 0
    if zero_row:
        W[2] = 0
    W.requires_grad_()
    spread = torch.ones(5).double()
    found, = grad(sparse_penalty(W, penalty, spread), W)
    assert found.isfinite().all()
    assert not found[:, 1].any()
    assert found[:2, 0].all()
    dead = torch.zeros(3, 5, requires_grad=True)
    assert not grad(sparse_penalty(dead, penalty, spread), dead)[0].any()


def test_row_normalize_gives_unit_rows_and_keeps_zero_rows():
    W = randn(4, 3)
    W[1] = 0
    out = row_normalize(W)
    assert_close(out.norm(dim=1), f64(1, 0, 1, 1))
    assert_close(out[0] * W[0].norm(), W[0])
    assert_close(row_normalize(1e-5 * W), out)
    assert_close(row_normalize(out), out)
    assert out.dtype == torch.float64


def test_rownorm_penalty_ignores_the_scale_of_rows_so_its_gradient_is_orthogonal_to_them():
    W = randn(4, 6, train=True)
    scaled = randn(4, 1, seed=3).exp() * W
    rownorm = sparse_penalty(W, "rownorm")
    assert_close(rownorm, slow_penalty(W, "rownorm"))
    assert_close(sparse_penalty(scaled, "rownorm"), rownorm)
    for same in ("prox", "bilevel", "none"):
        assert_close(sparse_penalty(W, same), rownorm)

    plain = sparse_penalty(W, "plain")
    assert_close(plain, slow_l21(W))
    assert_close(sparse_penalty(2 * W, "plain"), 2 * plain)

    found, = grad(rownorm, W)
    assert_close((found * W).sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    assert_close(found, grad(slow_penalty(W, "rownorm"), W)[0])
    assert found.abs().max() > 0.1


def test_rownorm_penalty_lies_between_one_column_and_all_alike():
    m = 5
    H = 8
    for seed in range(20):
        W = randn(m, H, seed=seed) * randn(H, seed=seed + 50).exp() ** 3
        assert m ** 0.5 < sparse_penalty(W, "rownorm") < (m * H) ** 0.5
    one = torch.zeros(m, H).double()
    one[:, 3] = randn(m)
    assert_close(sparse_penalty(one, "rownorm"), f64(m ** 0.5)[0])
    alike = randn(m, H).sign() * randn(m, 1).exp()
    assert_close(sparse_penalty(alike, "rownorm"), f64((m * H) ** 0.5)[0])


def test_rescaling_share_is_the_part_of_the_gradient_along_the_rows():
    W = randn(4, 6, train=True)
    gradient, = grad(slow_l21(W), W)
    along = 0
    for g, w in zip(gradient, W):
        along = along + ((g @ w) / w.norm()) ** 2
    assert_close(rescaling_share(W), along / (gradient ** 2).sum())
    assert 0 < rescaling_share(W) < 1

    # Columns alike: the penalty only rescales. One entry a row is the same, its direction is fixed.
    assert_close(rescaling_share(randn(4, 6).sign()), f64(1)[0])
    assert_close(rescaling_share(torch.diag(f64(1, 5, 0.1))), f64(1)[0])
    # Each column of unit gradient; of the two entries of row 1, the small one is hardly along it.
    assert_close(rescaling_share(f64([1, 1e-6], [0, 0])), f64(0.5)[0], rtol=1e-5, atol=0)
    assert rescaling_share(torch.zeros(2, 3)) == 0


# ---- the proximal step ---------------------------------------------------------------------------
def with_threshold_inside(seed=0):
    """W (4, 9) and a threshold that some of its columns are below; one column is zero."""
    W = randn(4, 9, seed=seed) * f64(1, 3, 0.2, 1, 0.1, 2, 0.5, 1, 0)
    return W, W.norm(dim=0).median().item()


def test_prox_shortens_each_column_by_the_threshold_and_keeps_its_direction():
    W, t = with_threshold_inside()
    out = prox_l21(W, t)
    norms = W.norm(dim=0)
    new_norms = out.norm(dim=0)
    live = new_norms > 0
    assert_close(out, slow_prox(W, t))
    assert_close(new_norms, (norms - t).clamp_min(0))
    assert 0 < live.sum() < 9
    assert not out[:, norms < t].any()
    assert out.isfinite().all() and out.dtype == torch.float64
    assert_close((out * W).sum(0)[live], (new_norms * norms)[live])


def test_prox_limits():
    W = randn(3, 4)
    assert_close(prox_l21(W, 0.0), W)
    assert not prox_l21(W, 1e3).any()
    assert not prox_l21(torch.zeros(3, 4), 0.0).any()
    assert not prox_l21(torch.zeros(3, 4), 0.1).any()
    assert_close(prox_l21(prox_l21(W, 0.1), 0.2), prox_l21(W, 0.1 + 0.2))


def test_prox_satisfies_the_optimality_condition():
    W, t = with_threshold_inside(1)
    for x, w in zip(prox_l21(W, t).T, W.T):
        if x.any():
            assert_close(w - x, t * x / x.norm())
        else:
            assert w.norm() <= t


def test_prox_minimises_its_objective_against_random_perturbations():
    W, t = with_threshold_inside(2)
    out = prox_l21(W, t)

    def objective(X):
        norms = (X ** 2).sum(-2).sqrt()
        return 0.5 * ((X - W) ** 2).sum((-2, -1)) + t * norms.sum(-1)

    best = objective(out)
    assert_close(best, 0.5 * ((out - W) ** 2).sum() + t * l21_norm(out))
    lengths = 10 ** torch.linspace(-4, 0.5, 4000).double()
    steps = randn(4000, 4, 9, seed=5) * lengths[:, None, None]
    single = steps * F.one_hot(torch.arange(4000) % 9, 9)[:, None]
    assert (objective(out + steps) >= best).all()
    assert (objective(out + single) >= best - 1e-12).all()
    assert objective(out * 1.01) > best
    assert objective(out * 0.99) > best


def test_prox_is_non_expansive():
    for seed in range(200):
        A = randn(3, 5, seed=seed)
        B = randn(3, 5, seed=seed + 1000)
        assert (prox_l21(A, 1.0) - prox_l21(B, 1.0)).norm() <= (A - B).norm()


def test_group_lasso_with_orthonormal_design_is_the_prox_of_the_correlations():
    """min_W ||Y - U W^T||^2 / 2 + t ||W||_{2,1}, solved without any threshold.

    ||w|| is the minimum over a v = w of (a^2 + ||v||^2) / 2, which is smooth."""
    U = torch.linalg.qr(randn(20, 6))[0]
    Y = randn(20, 3, seed=1)
    correlations = Y.T @ U
    t = correlations.norm(dim=0).sort().values[2:4].mean().item()

    a = torch.ones(6, dtype=torch.float64, requires_grad=True)
    V = randn(3, 6, seed=2, train=True)
    solver = torch.optim.LBFGS([a, V], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        error = Y - U @ (V * a).T
        value = 0.5 * (error ** 2).sum() + t / 2 * ((a ** 2).sum() + (V ** 2).sum())
        value.backward()
        return value

    solver.step(objective)
    found = prox_l21(correlations, t)
    assert_close((V * a).detach(), found, rtol=1e-6, atol=1e-8)
    assert (found.norm(dim=0) == 0).sum() == 3


# ---- what is logged of W -------------------------------------------------------------------------
def test_sparsity_values_on_hand_made_weights():
    found = sparsity(f64([3, 0, 0, 5e-3], [4, 0, 1, 0]))
    assert all(value.shape == () for value in found.values())
    row1 = math.sqrt(9 + 25e-6)
    row2 = math.sqrt(17)
    normalized = math.hypot(3 / row1, 4 / row2) + 1 / row2 + 5e-3 / row1
    expected = {"l21": 6 + 5e-3, "frobenius": math.sqrt(26 + 25e-6), "live_columns": 0.5,
                "zero_columns": 0.25, "l21_normalized": normalized / math.sqrt(8)}
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_live_columns_are_relative_to_the_largest_and_zero_columns_are_exact():
    W = torch.diag(f64(1, 1.1e-3, 0.9e-3, 1e-30, 0))
    for scale in (1, 1e6, 1e-6):
        assert live_columns(scale * W).tolist() == [True, True, False, False, False]
        found = sparsity(scale * W)
        assert found["live_columns"].item() == pytest.approx(2 / 5)
        assert found["zero_columns"].item() == pytest.approx(1 / 5)
    found = sparsity(randn(3, 4))
    assert found["live_columns"] == 1 and found["zero_columns"] == 0


def test_l21_normalized_lies_between_1_over_sqrt_H_and_1():
    m = 4
    H = 9

    def value(W):
        return sparsity(W)["l21_normalized"].item()

    one = torch.zeros(m, H).double()
    one[:, 2] = 3
    assert value(one) == pytest.approx(H ** -0.5)
    assert value(-5 * torch.ones(m, H)) == pytest.approx(1)
    for seed in range(10):
        W = randn(m, H, seed=seed)
        assert H ** -0.5 < value(W) < 1
        assert value(W) == pytest.approx(value(100 * W))


# ---- networks ------------------------------------------------------------------------------------
def args_with(**changes):
    args = {"arch": "resnet_tiny", "image_size": 8, "head": "mlp", "hidden": 12, "dim": 5,
            "lr": 0.01, "weight_decay": 0.1, "lambda_offdiag": 0.05, "penalty": "rownorm",
            "lambda_sparse": 0.3, "inner_steps": 3, "inner_lr": 0.02, "bf16": False}
    return Namespace(**{**args, **changes})


def toy(seed=0, **changes):
    """(nets with a small smooth backbone, args, views (2, 10, 3, 8, 8)), in float64."""
    torch.manual_seed(seed)
    args = args_with(**changes)
    nets = build_nets(args)
    nets["backbone"] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(),
                                     nn.Linear(144, 64))
    x = randn(10, 3, 8, 8, seed=seed)
    views = x + 0.5 * randn(2, 10, 3, 8, 8, seed=seed + 1)
    return nets.double(), args, views


def weight(nets):
    return nets["projector"][-1].weight


def sgd(nets, lr=1.0, lr_W=0.5, decay=0.1):
    W = weight(nets)
    rest = [p for p in nets.parameters() if p is not W]
    groups = [{"params": rest, "lr": lr, "weight_decay": decay},
              {"params": [W], "lr": lr_W, "weight_decay": 0}]
    return {"encoder": torch.optim.SGD(groups, lr)}


def parameters(nets):
    return {name: p.detach().clone() for name, p in nets.named_parameters()}


def after_a_step(nets, views, args, **step):
    """(parameters, terms) of a copy of `nets` after one step of plain gradient descent."""
    nets = copy.deepcopy(nets)
    terms = train_step(nets, sgd(nets, **step), views, args, 0.0)
    return parameters(nets), terms


@pytest.mark.parametrize("head, m, H", [("mlp", 5, 12), ("linear", 5, 64), ("none", 64, 64)])
def test_build_nets(head, m, H):
    nets = build_nets(args_with(head=head))
    projector = nets["projector"]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] if head == "mlp" else []
    assert set(nets) == {"backbone", "projector"}
    assert [type(layer) for layer in projector] == [*hidden, nn.Linear]
    assert weight(nets).shape == (m, H)
    assert projector[-1].bias is None and projector[0].bias is None
    assert projector[0].in_features == 64
    live = dict(projector.named_buffers())["live_columns"]
    assert live.dtype == torch.bool and live.shape == (H,) and live.all()
    assert projector(nets["backbone"](torch.randn(4, 3, 8, 8))).shape == (4, m)


def test_without_a_head_z_is_r_and_a_step_trains_the_backbone_on_it():
    nets, args, views = toy(head="none", penalty="none", lambda_sparse=0.0)
    r, u, z = embed(nets, views, args)
    assert torch.equal(z, r) and torch.equal(u, r)
    before = copy.deepcopy(nets)
    terms = train_step(nets, build_opts(nets, args), views, args, 0.0)
    assert torch.equal(weight(nets), torch.eye(64).double())
    assert not torch.equal(nets["backbone"][0].weight, before["backbone"][0].weight)
    first, second = slow_terms(*before["backbone"](views.flatten(0, 1)).chunk(2), 0.05)
    assert terms["loss_ssl"].item() == pytest.approx((first + second).item())
    assert terms["live_columns"] == 1


def test_the_head_s_embedding_is_that_of_both_views_in_one_pass():
    nets, args, views = toy()
    r, u, z = embed(nets, views, args)
    other = copy.deepcopy(nets)
    x = views.flatten(0, 1)
    assert_close(r.flatten(0, 1), other["backbone"](x))
    assert_close(z.flatten(0, 1), other["projector"](other["backbone"](x)))
    assert_close(z, u @ weight(nets).T)
    assert [x.shape for x in (r, u, z)] == [(2, 10, 64), (2, 10, 12), (2, 10, 5)]


def test_embeddings_are_never_in_bfloat16():
    nets = build_nets(args_with())
    images = torch.randn(2, 4, 3, 8, 8)
    exact = embed(nets, images, args_with())
    rounded = embed(nets, images, args_with(bf16=True))
    for a, b in zip(exact, rounded):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


def test_baseline_starts_from_the_same_weights_and_sees_the_same_augmentation():
    data = Data("fake", range(512), None, [], None, 32, None, "")
    found = []
    for argv in ([], ["--baseline"], ["--baseline", "--penalty", "plain"]):
        args = parse_args(argv)
        fill_defaults(args, data, torch.device("cpu"))
        recipes = view_augmentations(args, data)
        check_args(args, data, 1)
        torch.manual_seed(0)
        found.append((build_nets(args).state_dict(), recipes, args))
    (nets, recipes, args), *baselines = found
    assert args.penalty == "rownorm" and args.lambda_sparse == 0.3
    for base_nets, base_recipes, base in baselines:
        assert base.penalty == "none" and base.lambda_sparse == 0
        assert base_recipes == recipes and len(recipes) == 2
        for name, value in nets.items():
            assert torch.equal(value, base_nets[name])


@pytest.mark.parametrize("penalty, expected", [
    ("rownorm", 0.3), ("inputs", 0.3), ("prox", 3.0), ("plain", 1e-4), ("bilevel", 1.0)])
def test_each_penalty_has_its_lambda(penalty, expected):
    data = Data("fake", range(512), None, [], None, 32, None, "")
    args = parse_args(["--penalty", penalty])
    fill_defaults(args, data, torch.device("cpu"))
    assert args.lambda_sparse == expected
    args = parse_args(["--penalty", penalty, "--lambda-sparse", "0"])
    fill_defaults(args, data, torch.device("cpu"))
    assert args.lambda_sparse == 0


def test_large_images_get_the_two_different_views_of_barlow_twins():
    data = Data("x", range(10 ** 4), None, [], None, 224, None, "")
    args = parse_args([])
    fill_defaults(args, data, torch.device("cpu"))
    first, second = view_augmentations(args, data)
    assert (first["blur_p"], second["blur_p"]) == (1.0, 0.1)
    assert (first["solarize_p"], second["solarize_p"]) == (0.0, 0.2)
    alike = ("crop", "flip", "jitter", "jitter_p", "gray_p", "mean", "std")
    assert all(first[key] == second[key] for key in alike)


@pytest.mark.parametrize("flags, words", [
    ("--head none", "--head none: has no last layer to make sparse; add --baseline"),
    ("--head none --lambda-sparse 0.1", "--head none: has no last layer"),
    ("--baseline --lambda-sparse 0.5", "--lambda-sparse 0.5: --baseline has no penalty"),
    ("--batch-size 9", "--batch-size 9: must be a multiple of the 2 processes"),
    ("--batch-size 2", "--batch-size 2: must be"),
    ("--sync-bn", "--sync-bn: needs")])
def test_what_does_not_go_together_ends_in_a_sentence(flags, words, capsys):
    data = Data("fake", range(512), None, [], None, 32, None, "")
    args = parse_args(flags.split())
    fill_defaults(args, data, torch.device("cpu"))
    with pytest.raises(SystemExit) as stopped:
        check_args(args, data, 2)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in error and error.count("\n") == 1


def test_optimizer_decays_every_parameter_but_W():
    nets, args, views = toy(weight_decay=0.25)
    opt = build_opts(nets, args)["encoder"]
    rest, sparse = opt.param_groups
    assert isinstance(opt, torch.optim.Adam)
    assert rest["weight_decay"] == 0.25 and sparse["weight_decay"] == 0
    assert rest["lr"] == sparse["lr"] == args.lr
    assert sparse["params"][0] is weight(nets) and len(sparse["params"]) == 1
    others = {id(p) for p in nets.parameters()} - {id(weight(nets))}
    assert {id(p) for p in rest["params"]} == others

    decayed = copy.deepcopy(nets)
    for net, args.weight_decay in ((nets, 0.0), (decayed, 1e4)):
        train_step(net, build_opts(net, args), views, args, 0.0)
    assert torch.equal(weight(nets), weight(decayed))
    assert not torch.equal(nets["projector"][0].weight, decayed["projector"][0].weight)


# ---- one step ------------------------------------------------------------------------------------
def slow_inputs(nets, views):
    """u (2 n, H) by hand: the head's BatchNorm is over the rows of both views."""
    head = nets["projector"]
    r = nets["backbone"](torch.cat(list(views)))
    if len(head) == 1:
        return r
    h = torch.stack(slow_standardize(r @ head[0].weight.T), dim=1)
    h = h * head[1].weight + head[1].bias
    return h * (h > 0)


def slow_embeddings(nets, views):
    z = slow_inputs(nets, views) @ weight(nets).T
    return z[:len(z) // 2], z[len(z) // 2:]


def hand_update(nets, views, args, lr=1.0, lr_W=0.5, decay=0.1):
    """{name: parameter} after a step of plain gradient descent, by hand."""
    params = dict(nets.named_parameters())
    loss = sum(slow_terms(*slow_embeddings(nets, views), args.lambda_offdiag))
    if args.penalty == "inputs":
        spread = slow_inputs(nets, views).detach().std(0, correction=0)
        loss = loss + args.lambda_sparse * slow_penalty(weight(nets) * spread, "rownorm")
    elif args.penalty != "prox":
        loss = loss + args.lambda_sparse * slow_penalty(weight(nets), args.penalty)
    new = {}
    for (name, p), g in zip(params.items(), grad(loss, list(params.values()))):
        if p is not weight(nets):
            new[name] = (p - lr * (g + decay * p)).detach()
            continue
        new[name] = (p - lr_W * g).detach()
        if args.penalty == "prox":
            new[name] = unit_rows(slow_prox(new[name], lr_W * args.lambda_sparse))
    return new


@pytest.mark.parametrize("penalty, head, lambda_sparse", [
    ("plain", "mlp", 0.7), ("rownorm", "mlp", 0.7), ("rownorm", "linear", 0.7),
    ("inputs", "mlp", 0.7), ("inputs", "linear", 0.7), ("prox", "mlp", 2.0)])
def test_update_and_terms_equal_those_by_hand(penalty, head, lambda_sparse):
    nets, args, views = toy(penalty=penalty, head=head, lambda_sparse=lambda_sparse)
    before = copy.deepcopy(nets)
    after, terms = after_a_step(nets, views, args)
    for name, expected in hand_update(before, views, args).items():
        assert_close(after[name], expected, rtol=1e-8, atol=1e-10)
        assert not torch.equal(after[name], before.state_dict()[name])

    z1, z2 = slow_embeddings(before, views)
    first, second = slow_terms(z1, z2, args.lambda_offdiag)
    W = after[f"projector.{len(before['projector']) - 1}.weight"]
    norms = W.norm(dim=0)
    spread = slow_inputs(before, views).std(0, correction=0)
    penalised = weight(before) * spread if penalty == "inputs" else weight(before)
    used = (W * spread).norm(dim=0)
    expected = {"loss_ssl": first + second, "loss_invariance": first, "loss_redundancy": second,
                "loss_sparse": slow_penalty(penalised, penalty), "l21": slow_l21(W),
                "frobenius": (W ** 2).sum() ** 0.5, "var_z": z1.var(0).mean(),
                "l21_normalized": slow_penalty(W, "rownorm") / W.numel() ** 0.5,
                "live_columns": (norms > 1e-3 * norms.max()).double().mean(),
                "zero_columns": (norms == 0).double().mean(),
                "live_inputs": (used > 1e-3 * used.max()).double().mean()}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-6), name
    for name, value in terms.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, name
    if penalty == "prox":
        assert 0 < terms["zero_columns"] < 1
        assert_close(W.norm(dim=1), torch.ones(5).double())


def test_var_z_is_the_variance_of_the_raw_embeddings_and_std_z_is_free_of_scale():
    nets, args, views = toy(lambda_sparse=0.0)
    big = copy.deepcopy(nets)
    with torch.no_grad():
        weight(big).mul_(3)
    _, terms = after_a_step(nets, views, args)
    _, terms_of_big = after_a_step(big, views, args)
    assert (terms_of_big["var_z"] / terms["var_z"]).item() == pytest.approx(9)
    assert terms_of_big["std_z"].item() == pytest.approx(terms["std_z"].item())
    assert 0.1 < terms["std_z"] < 1.2


def test_without_sparsity_the_step_is_barlow_twins_to_the_bit():
    nets, args, views = toy(lambda_sparse=0.0)
    plain = copy.deepcopy(nets)
    opt = build_opts(plain, args)["encoder"]
    x = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        z1, z2 = plain["projector"](plain["backbone"](x)).chunk(2)
        opt.zero_grad()
        barlow_loss(z1, z2, args.lambda_offdiag).backward()
        opt.step()

    for args.penalty in ("none", "plain", "rownorm", "inputs", "prox"):
        other = copy.deepcopy(nets)
        opts = build_opts(other, args)
        for _ in range(3):
            terms = train_step(other, opts, views, args, 0.0)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert terms["live_columns"] == 1
    assert (row_normalize(weight(other)) - weight(other)).abs().max() > 1e-3


def test_batchnorm_can_fake_short_columns_but_not_unused_inputs():
    """gamma_j and beta_j times c, column j over c: z and the penalty `inputs` are as they were."""
    found = {}
    for c in (1, 1e4):
        nets, args, views = toy(penalty="inputs")
        norm = nets["projector"][1]
        with torch.no_grad():
            norm.weight[:4] *= c
            norm.bias[:4] *= c
            weight(nets)[:, :4] /= c
            _, u, z = embed(nets, views, args)
        W = weight(nets).detach()
        spread = input_spread(u)
        assert_close(spread, slow_inputs(nets, views).std(0, correction=0))
        found[c] = {"z": z, "inputs": sparse_penalty(W, "inputs", spread),
                    "used": live_columns(W * spread), "rownorm": sparse_penalty(W, "rownorm"),
                    "live": live_columns(W).sum()}
        args.lr = 0
        terms = train_step(nets, build_opts(nets, args), views, args, 0.0)
        found[c] |= {"live_inputs": terms["live_inputs"], "live_columns": terms["live_columns"]}
    for same in ("z", "inputs", "used", "live_inputs"):
        torch.testing.assert_close(found[1][same], found[1e4][same], rtol=1e-6, atol=1e-9)
    assert found[1e4]["rownorm"] < 0.9 * found[1]["rownorm"]
    assert found[1]["live"] - found[1e4]["live"] == 4
    assert found[1e4]["live_columns"] < found[1]["live_columns"] == found[1]["live_inputs"]


@pytest.mark.parametrize("penalty", ["plain", "rownorm", "inputs", "prox"])
def test_penalty_changes_the_update_of_W_alone(penalty):
    nets, args, views = toy(penalty=penalty)
    after, _ = after_a_step(nets, views, args)
    bare, _ = after_a_step(nets, views, args_with(lambda_sparse=0.0))
    changed = [name for name in bare if not torch.equal(bare[name], after[name])]
    assert changed == [W_NAME]


def test_penalty_step_is_the_negative_subgradient_times_lr_and_lambda():
    nets, args, views = toy(lambda_sparse=0.7)
    W = weight(nets).detach()
    bare, _ = after_a_step(nets, views, args_with(lambda_sparse=0.0))
    steps = {}
    for args.penalty in ("plain", "rownorm"):
        after, _ = after_a_step(nets, views, args)
        steps[args.penalty] = after[W_NAME] - bare[W_NAME]
    assert_close(steps["plain"], -0.5 * 0.7 * W / W.norm(dim=0), rtol=1e-9, atol=1e-12)

    step = steps["rownorm"]
    assert_close((step * W).sum(1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert slow_penalty(W + 1e-3 * step, "rownorm") < slow_penalty(W, "rownorm")


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_prox_threshold_follows_the_scheduled_lr_of_the_group_of_W(factor):
    nets, args, views = toy(penalty="prox")
    found = []
    for args.lambda_sparse in (0.0, 25.0):
        net = copy.deepcopy(nets)
        opts = build_opts(net, args)
        for group in opts["encoder"].param_groups:
            group["lr"] *= factor
        terms = train_step(net, opts, views, args, 0.0)
        found.append((weight(net).detach(), terms["zero_columns"]))
    (bare, no_zeros), (sparse, zeros) = found
    expected = unit_rows(slow_prox(bare, 0.01 * factor * 25.0))
    assert_close(sparse, expected, rtol=1e-9, atol=1e-12)
    assert no_zeros == 0
    assert (zeros > 0) == (factor == 1.0)


def test_live_mask_marks_the_columns_after_the_step():
    nets, args, views = toy(lambda_sparse=0.0)
    with torch.no_grad():
        weight(nets)[:] = randn(5, 12).sign() * torch.tensor([1, 2e-3, 5e-4, 0] * 3)
    terms = train_step(nets, sgd(nets, lr_W=0.0), views, args, 0.0)
    assert nets["projector"].live_columns.tolist() == [True, True, False, False] * 3
    assert terms["live_columns"].item() == pytest.approx(0.5)
    assert terms["zero_columns"].item() == pytest.approx(0.25)

    nets, args, views = toy(penalty="prox", lambda_sparse=2.0)
    train_step(nets, sgd(nets), views, args, 0.0)
    mask = nets.state_dict()["projector.live_columns"]
    norms = weight(nets).norm(dim=0)
    assert torch.equal(mask, norms > 1e-3 * norms.max()) and not mask.all()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_permuting_columns_with_the_hidden_units_changes_nothing_but_their_order(penalty):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    nets, args, views = toy(penalty=penalty, lambda_sparse=0.6)
    other = copy.deepcopy(nets)
    first, norm = other["projector"][:2]
    with torch.no_grad():
        for p in (first.weight, norm.weight, norm.bias):
            p.copy_(p[order].clone())
        weight(other).copy_(weight(nets)[:, order])
    terms = train_step(nets, sgd(nets), views, args, 0.0)
    permuted = train_step(other, sgd(other), views, args, 0.0)
    for name, value in terms.items():
        assert permuted[name].item() == pytest.approx(value.item()), name
    assert_close(weight(other), weight(nets)[:, order])


def test_both_views_share_one_pass_and_their_order_does_not_matter():
    nets, args, views = toy()
    views[1] = 2 * views[1] + 1
    h = nets["backbone"](views.flatten(0, 1)) @ nets["projector"][0].weight.T
    swapped = copy.deepcopy(nets)
    terms = train_step(nets, sgd(nets), views, args, 0.0)
    other = train_step(swapped, sgd(swapped), views.flip(0), args, 0.0)
    norm = nets["projector"][1]
    assert norm.num_batches_tracked == 1
    assert_close(norm.running_mean, 0.1 * h.mean(0).detach())
    assert other["loss_ssl"].item() == pytest.approx(terms["loss_ssl"].item())
    assert_close(weight(swapped), weight(nets))


def slow_effective_rank(z):
    s = torch.linalg.svdvals(z - z.mean(0))
    p = s / s.sum()
    return math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0))


def test_diagnose_reports_the_ranks_of_one_view_and_moves_nothing():
    nets, args, views = toy()
    before = copy.deepcopy(nets.state_dict())
    found = diagnose(nets, views, args)
    z = slow_embeddings(nets, views)[0].detach()
    r = nets["backbone"](views[0]).detach()
    assert found["rank_r"].item() == pytest.approx(slow_effective_rank(r), rel=1e-3)
    assert found["rank_z"].item() == pytest.approx(slow_effective_rank(z), rel=1e-3)
    for name, value in nets.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- a head for each batch -----------------------------------------------------------------------
def slow_batch_head(W, u1, u2, args):
    """Eq. 13 by proximal gradient descent, its gradient that of the double loop."""
    W_t = W.detach().clone()
    for _ in range(args.inner_steps):
        W_t.requires_grad_()
        loss = sum(slow_terms(u1 @ W_t.T, u2 @ W_t.T, args.lambda_offdiag))
        W_t = (W_t - args.inner_lr * grad(loss, W_t)[0]).detach()
        W_t = unit_rows(slow_prox(W_t, args.inner_lr * args.lambda_sparse))
    return W_t


def bilevel_toy(**changes):
    settings = {"penalty": "bilevel", "lambda_sparse": 12.0, **changes}
    nets, args, views = toy(**settings)
    u = slow_inputs(nets, views).detach()
    return nets, args, views, u.unflatten(0, (2, 10))


def test_the_head_of_a_batch_equals_proximal_descent_by_hand():
    nets, args, views, u = bilevel_toy()
    found = batch_head(weight(nets), u, args)
    assert_close(found, slow_batch_head(weight(nets), *u, args), rtol=1e-8, atol=1e-10)
    assert 0 < (found.norm(dim=0) == 0).sum() < 12
    assert_close(found.norm(dim=1), torch.ones(5).double())
    assert not found.requires_grad


def test_the_head_of_a_batch_lowers_its_objective_and_depends_on_the_batch():
    nets, args, _, u = bilevel_toy(lambda_sparse=1.0, inner_lr=1e-3, inner_steps=20)

    def objective(W):
        return barlow_loss(u[0] @ W.T, u[1] @ W.T, args.lambda_offdiag) + l21_norm(W)

    start = row_normalize(weight(nets).detach())
    found = batch_head(start, u, args)
    assert objective(found) < objective(start) - 0.01
    other = batch_head(start, u.flip(2), args)
    assert (found - other).abs().max() > 0.01


def test_where_nothing_is_left_to_gain_the_head_of_a_batch_is_W():
    """Orthonormal inputs, W = I: the loss is zero, its minimum, and columns are alike.

    The penalty shortens all columns by as much, unit rows undo that."""
    ones = torch.ones(16, 1, dtype=torch.float64)
    Q = 1e4 * torch.linalg.qr(torch.cat([ones, randn(16, 5)], dim=1))[0][:, 1:]
    W = torch.eye(5).double()
    args = args_with(inner_steps=10, inner_lr=0.01, lambda_sparse=2.0)
    assert_close(batch_head(W, torch.stack([Q, Q]), args), W, rtol=0, atol=1e-9)
    moved = batch_head(W + 0.1 * randn(5, 5), torch.stack([Q, Q]), args)
    assert (moved - W).abs().max() > 1e-3


def test_theta_descends_the_loss_at_the_head_of_the_batch_and_W_follows_it():
    nets, args, views, u = bilevel_toy()
    W = weight(nets).detach().clone()
    W_t = slow_batch_head(W, *u, args)
    after, terms = after_a_step(nets, views, args, decay=0.0)
    assert_close(after[W_NAME], W + RHO * (W_t - W), rtol=1e-8, atol=1e-10)

    at_head = copy.deepcopy(nets)
    with torch.no_grad():
        weight(at_head).copy_(W_t)
    loss = sum(slow_terms(*slow_embeddings(at_head, views), args.lambda_offdiag))
    assert terms["loss_ssl"].item() == pytest.approx(loss.item())
    theta = {name: p for name, p in at_head.named_parameters() if name != W_NAME}
    for (name, p), g in zip(theta.items(), grad(loss, list(theta.values()))):
        assert_close(after[name], (p - g).detach(), rtol=1e-7, atol=1e-9)

    live = W_t.norm(dim=0) > 0
    assert 0 < live.sum() < 12
    assert terms["batch_columns"].item() == pytest.approx(live.double().mean().item())
    # W has followed W^t by a tenth only, and all of its columns live on.
    assert terms["support_change"].item() == pytest.approx((~live).double().mean().item())


def test_no_gradient_reaches_W_and_no_optimiser_moves_it_when_each_batch_has_its_head():
    nets, args, views, _ = bilevel_toy(inner_steps=0)
    W = weight(nets).detach().clone()
    terms = train_step(nets, build_opts(nets, args), views, args, 0.0)
    assert weight(nets).grad is None
    assert torch.equal(weight(nets), W)
    assert terms["support_change"] == 0


def test_without_inner_steps_theta_s_step_is_that_of_barlow_twins():
    nets, args, views, _ = bilevel_toy(inner_steps=0)
    after, terms = after_a_step(nets, views, args)
    base, base_terms = after_a_step(nets, views, args_with(penalty="none", lambda_sparse=0.0))
    assert terms["loss_ssl"].item() == pytest.approx(base_terms["loss_ssl"].item())
    for name, value in base.items():
        if name != W_NAME:
            assert_close(after[name], value, rtol=1e-9, atol=1e-12)


# ---- does it remove columns? ---------------------------------------------------------------------
def set_cosine_lr(opts, t, steps):
    for opt in opts.values():
        for group in opt.param_groups:
            peak = group.setdefault("base_lr", group["lr"])
            group["lr"] = peak * (1 + math.cos(math.pi * t / steps)) / 2


def train_barlow(penalty, lambda_sparse, steps=200, n=64, factors=6):
    """A linear backbone on inputs that `factors` variables explain: what has become of W."""
    nets, args, _ = toy(hidden=32, dim=8, weight_decay=0.0, penalty=penalty,
                        lambda_sparse=lambda_sparse, inner_steps=5, inner_lr=0.01)
    nets["backbone"] = nn.Sequential(nn.Flatten(), nn.Linear(192, 64)).double()
    opts = build_opts(nets, args)
    start = weight(nets).norm().item()
    mixing = randn(factors, 192) / factors ** 0.5
    losses = []
    for t in range(steps):
        x = randn(n, factors, seed=2 * t) @ mixing
        views = x + 0.5 * randn(2, n, 192, seed=2 * t + 1)
        set_cosine_lr(opts, t, steps)
        terms = train_step(nets, opts, views.view(2, n, 3, 8, 8), args, t / steps)
        losses.append(terms["loss_ssl"].item())
    found = {name: terms[name].item() for name in sparsity(weight(nets).detach())}
    norms = weight(nets).norm(dim=0)
    return Namespace(loss=sum(losses[-20:]) / 20, first=losses[0], **found,
                     shrink=found["frobenius"] / start, spread=(norms.min() / norms.max()).item())


def test_plain_l21_shrinks_W_without_removing_a_column_while_the_others_remove_columns():
    none = train_barlow("none", 0.0)
    assert none.loss < 0.1 * none.first
    assert none.live_columns == 1 and none.shrink > 0.7 and none.l21_normalized > 0.95

    plain = train_barlow("plain", 1.0)
    assert plain.shrink < 0.1 and plain.loss < 0.2
    assert plain.live_columns == 1 and plain.zero_columns == 0

    rownorm = train_barlow("rownorm", 0.1)
    assert rownorm.live_columns < 0.75 and rownorm.l21_normalized < 0.7
    assert rownorm.shrink > 0.5 and rownorm.loss < 0.1

    prox = train_barlow("prox", 2.0)
    assert prox.zero_columns > 0.25 and prox.spread == 0 and prox.live_columns < 0.75
    assert prox.l21_normalized < 0.75 and prox.loss < 0.1


def test_plain_penalty_says_once_why_it_cannot_sparsify(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.plot_curves", print)
    monkeypatch.chdir(tmp_path)
    for penalty, lambda_sparse, times in (("plain", 1e-4, 1), ("plain", 0, 0), ("rownorm", 0.3, 0)):
        out = f"{penalty}{lambda_sparse}"
        flags = ("--penalty", penalty, "--lambda-sparse", str(lambda_sparse), "--log-every", "1",
                 "--max-steps", "3", "--out", out)
        barlow_sparsehead.main(tiny("barlow_sparsehead", *flags))
        shown = capsys.readouterr().out
        assert shown.count("the loss does not see the scale of a row of W") == times
        warnings = [row["warning"] for row in rows(out) if "warning" in row]
        assert len(warnings) == times
        for row in rows(out):
            if "lr" in row:
                assert ("rescaling" in row) == (times == 1)
    saved = checkpoint("rownorm0.3")["nets"]
    mask = saved["projector.live_columns"]
    assert mask.dtype == torch.bool
    assert mask.shape == saved[W_NAME].shape[1:]


def test_a_threshold_that_takes_all_of_W_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.plot_curves", print)
    monkeypatch.chdir(tmp_path)
    flags = ("--penalty", "prox", "--lambda-sparse", "1e9", "--log-every", "1", "--max-steps", "2")
    barlow_sparsehead.main(tiny("barlow_sparsehead", *flags, "--out", "dead"))
    assert "all of W is zero, and nothing will train any more" in capsys.readouterr().out


# ---- the penalty on other methods ----------------------------------------------------------------
def pair_of_features(n, d, informative, seed, noise=0.3):
    """Two views (2, n, d): `informative` features shared up to noise, the others of each view."""
    shared = randn(n, informative, seed=3 * seed) + noise * randn(2, n, informative,
                                                                  seed=3 * seed + 1)
    return torch.cat([shared, randn(2, n, d - informative, seed=3 * seed + 2)], dim=2)


def test_info_nce_ignores_the_scale_of_W_but_not_of_a_row():
    r = randn(2, 10, 64)
    W = randn(6, 64, seed=1) / 8

    def loss(W):
        return simclr_tc2.info_nce(r @ W.T, 0.2)

    for scale in (0.1, 10.0):
        assert_close(loss(scale * W), loss(W))
    one_row = W * f64([5], [1], [1], [1], [1], [1])
    assert (loss(one_row) - loss(W)).abs() > 1e-3
    W.requires_grad_()
    assert abs((grad(loss(W), W)[0] * W).sum()) < 1e-12
    assert abs((grad(l21_norm(W), W)[0] * W).sum()) > 1


def train_simclr(strength, steps=120, informative=12):
    """A linear head on 64 features: (last loss, first loss, live share, ratio).

    ratio: the shortest column of an informative feature over the longest of the others."""
    torch.manual_seed(0)
    head = nn.Linear(64, 8).double()
    opts = {"head": torch.optim.Adam(head.parameters(), 0.02)}
    losses = []
    for t in range(steps):
        set_cosine_lr(opts, t, steps)
        z = head(pair_of_features(64, 64, informative, seed=t))
        loss = simclr_tc2.info_nce(z, 0.2)
        opts["head"].zero_grad()
        (loss + strength * sparse_penalty(head.weight, "rownorm")).backward()
        opts["head"].step()
        losses.append(loss.item())
    W = head.weight.detach()
    norms = column_norms(W)
    ratio = norms[:informative].min() / norms[informative:].max()
    return sum(losses[-20:]) / 20, losses[0], live_columns(W).double().mean().item(), ratio.item()


def test_rownorm_penalty_on_simclr_leaves_the_informative_features_alone():
    """Over five seeds the ratio is 16 to 23 without and 126 to 302 with the penalty."""
    dense_loss, first, live, ratio = train_simclr(0.0)
    assert dense_loss < first - 2 and live == 1 and ratio < 40
    loss, _, live, ratio = train_simclr(0.1)
    assert loss < dense_loss + 0.1 and 12 / 64 <= live < 0.75 and ratio > 60


def small_mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs)).double()


def cosine_loss(p, z):
    """BYOL's, of each view's prediction and the other view's target."""
    return 2 - 2 * F.cosine_similarity(p, z.flip(0).detach(), dim=-1).mean()


def train_byol(strength, steps=60, informative=8):
    """(last loss, first loss, `sparsity` of the predictor's last layer)."""
    torch.manual_seed(0)
    projector = small_mlp(32, 32, 8)
    predictor = small_mlp(8, 24, 8)
    target = copy.deepcopy(projector)
    W = predictor[-1].weight
    opts = {"encoder": torch.optim.Adam([*projector.parameters(), *predictor.parameters()], 0.01)}
    losses = []
    for t in range(steps):
        set_cosine_lr(opts, t, steps)
        r = pair_of_features(64, 32, informative, seed=t).flatten(0, 1)
        p = predictor(projector(r)).unflatten(0, (2, 64))
        loss = cosine_loss(p, target(r).unflatten(0, (2, 64)))
        opts["encoder"].zero_grad()
        loss.backward()
        opts["encoder"].step()
        losses.append(loss.item())
        with torch.no_grad():
            if strength:
                threshold = opts["encoder"].param_groups[0]["lr"] * strength
                W.copy_(row_normalize(prox_l21(W, threshold)))
            for slow, fast in zip(target.parameters(), projector.parameters()):
                slow.lerp_(fast, 0.1)
    return sum(losses[-10:]) / 10, losses[0], sparsity(W.detach())


def test_prox_on_byol_removes_hidden_units_of_the_predictor():
    dense_loss, first, dense = train_byol(0.0)
    loss, _, sparse = train_byol(5.0)
    assert dense_loss < 0.6 * first and loss < dense_loss + 0.35
    assert dense["live_columns"] == 1
    assert sparse["live_columns"] < 0.75 and sparse["zero_columns"] > 0.25
