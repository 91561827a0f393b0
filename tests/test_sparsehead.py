"""Oracles for barlow_sparsehead derived from the equations: slow loops, closed forms, finite differences, limits, invariants."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import byol_gessl
import simclr_tc2
from barlow_sparsehead import (barlow_loss, barlow_terms, build_nets, build_opts, column_norms, cross_correlation, l21_norm, prox_l21,
                               row_normalize, sparse_penalty, sparsity, standardize, train_step)

close, grad = torch.testing.assert_close, torch.autograd.grad
PENALTIES = ["plain", "rownorm", "prox"]


def randn(*shape, seed=0, train=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(train)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def views_of(n, m, seed=0, noise=0.5, scale=1.0):
    return [scale * (randn(n, m, seed=seed) + noise * randn(n, m, seed=seed + s)) @ randn(m, m, seed=seed + 9) for s in (1, 2)]


def slow_correlation(z1, z2, eps=1e-5):
    n = len(z1)
    unit = lambda z: (z - sum(z) / n) / ((sum((z - sum(z) / n) ** 2) / n) + eps) ** 0.5
    return [[sum(unit(z1[:, i]) * unit(z2[:, j])) / n for j in range(z2.shape[1])] for i in range(z1.shape[1])]


def slow_terms(z1, z2, lambda_offdiag):
    C, dims = slow_correlation(z1, z2), range(z1.shape[1])
    return sum((1 - C[i][i]) ** 2 for i in dims), lambda_offdiag * sum(C[i][j] ** 2 for i in dims for j in dims if i != j)


def slow_penalty(W, penalty):
    rows = W if penalty == "plain" else torch.stack([row / sum(row ** 2) ** 0.5 for row in W])
    return sum(sum(rows[:, j] ** 2) ** 0.5 for j in range(W.shape[1]))


def slow_prox(W, threshold):
    out = torch.zeros_like(W)
    for j in range(W.shape[1]):
        norm = math.sqrt(sum(w.item() ** 2 for w in W[:, j]))
        out[:, j] = W[:, j] * (norm - threshold) / norm if norm > threshold else 0
    return out


# ---- the Barlow Twins loss ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_standardize_is_batchnorm_without_affine_parameters_in_train_mode(scale):
    z = scale * randn(11, 4) + 5
    close(standardize(z), nn.BatchNorm1d(4, affine=False).double().train()(z), rtol=1e-10, atol=1e-10)
    close(standardize(z, eps=0.1), nn.BatchNorm1d(4, affine=False, eps=0.1).double()(z), rtol=1e-10, atol=1e-10)


def test_standardized_dimensions_have_mean_0_and_biased_variance_v_over_v_plus_eps():
    z = randn(9, 5) * f64(1, 1e-2, 1e-3, 7, 100) + 3
    out, v = standardize(z), z.var(0, unbiased=False)
    close(out.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-12)
    close(out.var(0, unbiased=False), v / (v + 1e-5))
    assert out.dtype == torch.float64 and not standardize(torch.full((4, 2), 3.0)).any()


@pytest.mark.parametrize("scale", [3e-3, 1.0])
def test_cross_correlation_and_both_terms_equal_double_loops(scale):
    z1, z2 = views_of(7, 4, scale=scale)
    C, (first, second) = cross_correlation(z1, z2), barlow_terms(z1, z2, 0.3)
    close(C, torch.stack([torch.stack(row) for row in slow_correlation(z1, z2)]))
    assert (C - C.T).abs().max() > 0.1
    close(torch.stack([first, second]), torch.stack(slow_terms(z1, z2, 0.3)))
    close(barlow_loss(z1, z2, 0.3), sum(slow_terms(z1, z2, 0.3)))
    assert first.shape == second.shape == barlow_loss(z1, z2, 0.3).shape == ()


def test_loss_closed_forms():
    n, m = 16, 5
    Q = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), randn(n, m)], 1))[0][:, 1:] * 1e3
    assert barlow_loss(Q, Q, 1.0).abs() < 1e-15 and barlow_loss(Q, 2 * Q + 1, 1.0).abs() < 1e-15
    close(barlow_loss(Q, -Q, 7.0), torch.tensor(4.0 * m).double())
    close(barlow_loss(Q, Q.roll(1, 1), 0.3), torch.tensor(m + 0.3 * m).double())
    same = Q[:, :1].expand(n, m)
    close(torch.stack(barlow_terms(same, same, 0.3)), f64(0, 0.3 * m * (m - 1)), atol=1e-9, rtol=1e-9)
    constant = torch.ones(n, m).double()
    close(barlow_loss(constant, constant, 0.3), torch.tensor(float(m)).double())


def test_loss_is_invariant_to_increasing_affine_maps_of_each_dimension_of_each_view():
    z1, z2 = views_of(20, 6, scale=1e3)
    loss, positive = barlow_loss(z1, z2, 0.1), [randn(6, seed=s).exp() for s in (1, 2)]
    close(barlow_loss(z1 * positive[0] + 7, z2 * positive[1] - randn(6), 0.1), loss, rtol=1e-7, atol=1e-7)
    flipped = z1 * f64(-1, 1, 1, 1, 1, 1)
    close(barlow_loss(flipped, z2 * f64(-1, 1, 1, 1, 1, 1), 0.1), loss, rtol=1e-7, atol=1e-7)
    assert barlow_loss(flipped, z2, 0.1) > loss + 1


def test_loss_is_invariant_to_scaling_rows_of_W_and_not_columns():
    W, (u1, u2), s = randn(4, 2), [1e3 * (randn(30, 2) + 0.3 * randn(30, 2, seed=v)) * f64(1, 5) for v in (1, 2)], f64(0.1, 10, 3, 0.7)
    loss = lambda W: barlow_loss(u1 @ W.T, u2 @ W.T, 5e-2)
    close(loss(s[:, None] * W), loss(W), rtol=1e-4, atol=1e-4)
    close(loss(row_normalize(W)), loss(W), rtol=1e-4, atol=1e-4)
    assert (loss(W * f64(1, 0.1)) - loss(W)).abs() > 1e-2


def test_gradient_equals_finite_differences_of_the_double_loop():
    z1, z2, e = *(z.requires_grad_() for z in views_of(6, 3)), 1e-5
    for z, g in zip((z1, z2), grad(barlow_loss(z1, z2, 0.3), (z1, z2))):
        for k in range(z.numel()):
            with torch.no_grad():
                flat = z.view(-1)
                old, values = flat[k].item(), []
                for step in (e, -e):
                    flat[k] = old + step
                    values.append(sum(slow_terms(z1, z2, 0.3)).item())
                flat[k] = old
            assert (values[0] - values[1]) / (2 * e) == pytest.approx(g.view(-1)[k].item(), rel=1e-6, abs=1e-8)


# ---- the penalties --------------------------------------------------------------------------------------------------
def test_l21_closed_forms():
    m, H = 3, 7
    W = randn(m, H)
    close(column_norms(W), torch.stack([sum(W[:, j] ** 2) ** 0.5 for j in range(H)]))
    close(l21_norm(W), slow_penalty(W, "plain"))
    close(l21_norm(torch.ones(m, H).double()), torch.tensor(H * m ** 0.5).double())
    assert l21_norm(f64([0, 3, 0], [0, -4, 0])) == 5 and l21_norm(torch.zeros(m, H)) == 0
    close(l21_norm(-2 * W), 2 * l21_norm(W))
    assert (l21_norm(W) - l21_norm(W.T)).abs() > 0.1


def test_l21_gradient_is_the_unit_column_and_satisfies_euler():
    W = randn(4, 6, train=True)
    g, = grad(l21_norm(W), W)
    for j in range(6):
        close(g[:, j], W[:, j] / sum(W[:, j] ** 2) ** 0.5)
    close((W * g).sum(), l21_norm(W))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_is_zero_and_finite_at_a_zero_column_and_a_zero_row(penalty):
    W = randn(3, 5)
    W[:, 1] = 0
    for zero_row in (False, True):
        W[2] *= not zero_row
        g, = grad(sparse_penalty(W.requires_grad_(), penalty), W)
        W = W.detach()
        assert g.isfinite().all() and not g[:, 1].any() and g[:2, 0].all()
    dead = torch.zeros(3, 5, requires_grad=True)
    g, = grad(column_norms(dead).sum(), dead)
    assert not g.any()


def test_row_normalize_gives_unit_rows_and_keeps_zero_rows():
    W = randn(4, 3)
    W[1] = 0
    out = row_normalize(W)
    close(out.norm(dim=1), f64(1, 0, 1, 1))
    close(out[0] * W[0].norm(), W[0])
    close(row_normalize(1e-5 * W), out)
    close(row_normalize(out), out)
    assert out.dtype == torch.float64


def test_rownorm_penalty_ignores_the_scale_of_rows_so_its_gradient_is_orthogonal_to_them():
    W, s = randn(4, 6, train=True), randn(4, seed=3).exp()
    close(sparse_penalty(W, "rownorm"), slow_penalty(W, "rownorm"))
    close(sparse_penalty(s[:, None] * W, "rownorm"), sparse_penalty(W, "rownorm"))
    close(sparse_penalty(W, "prox"), sparse_penalty(W, "rownorm"))
    close(sparse_penalty(W, "plain"), l21_norm(W))
    g, = grad(sparse_penalty(W, "rownorm"), W)
    close((g * W).sum(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    reference = W.detach().clone().requires_grad_()
    close(g, grad(slow_penalty(reference, "rownorm"), reference)[0])
    assert g.abs().max() > 0.1 and (sparse_penalty(2 * W, "plain") / sparse_penalty(W, "plain")).item() == pytest.approx(2)


def test_rownorm_penalty_lies_between_sqrt_m_and_sqrt_mH_with_equality_for_one_column_and_uniform_columns():
    m, H = 5, 8
    for seed in range(20):
        W = randn(m, H, seed=seed) * randn(H, seed=seed + 50).exp() ** 3
        assert m ** 0.5 < sparse_penalty(W, "rownorm") < (m * H) ** 0.5
    one = torch.zeros(m, H).double()
    one[:, 3] = randn(m)
    signs = randn(m, H).sign() * randn(m, 1).exp()
    close(sparse_penalty(one, "rownorm"), torch.tensor(m ** 0.5).double())
    close(sparse_penalty(signs, "rownorm"), torch.tensor((m * H) ** 0.5).double())


# ---- the proximal step ----------------------------------------------------------------------------------------------
def with_threshold_inside(seed=0):
    W = randn(4, 9, seed=seed) * f64(1, 3, 0.2, 1, 0.1, 2, 0.5, 1, 0)
    return W, W.norm(dim=0).median().item()


def test_prox_shortens_each_column_by_the_threshold_and_keeps_its_direction():
    W, t = with_threshold_inside()
    out = prox_l21(W, t)
    close(out, slow_prox(W, t))
    close(out.norm(dim=0), (W.norm(dim=0) - t).clamp_min(0))
    live = out.norm(dim=0) > 0
    assert 0 < live.sum() < 9 and out.isfinite().all() and not out[:, W.norm(dim=0) < t].any() and out.dtype == torch.float64
    close((out * W).sum(0)[live], (out.norm(dim=0) * W.norm(dim=0))[live])
    close(prox_l21(W, 0.0), W)
    assert not prox_l21(W, 1e3).any() and not prox_l21(torch.zeros(3, 4), 0.0).any() and not prox_l21(torch.zeros(3, 4), 0.1).any()
    close(prox_l21(prox_l21(W, 0.1), 0.2), prox_l21(W, 0.3))


def test_prox_satisfies_the_optimality_condition():
    W, t = with_threshold_inside(1)
    out = prox_l21(W, t)
    for x, w in zip(out.T, W.T):
        if x.any():
            close(w - x, t * x / x.norm())
        else:
            assert w.norm() <= t


def test_prox_minimises_its_objective_against_random_perturbations():
    W, t = with_threshold_inside(2)
    out = prox_l21(W, t)
    objective = lambda X: 0.5 * ((X - W) ** 2).sum((-2, -1)) + t * (X ** 2).sum(-2).sqrt().sum(-1)
    best = objective(out)
    close(best, 0.5 * ((out - W) ** 2).sum() + t * l21_norm(out))
    steps = randn(4000, 4, 9, seed=5) * 10 ** torch.linspace(-4, 0.5, 4000).double()[:, None, None]
    single = steps * nn.functional.one_hot(torch.arange(4000) % 9, 9)[:, None]
    assert (objective(out + steps) >= best).all() and (objective(out + single) >= best - 1e-12).all()
    assert objective(out * 1.01) > best and objective(out * 0.99) > best


def test_prox_is_non_expansive():
    for seed in range(200):
        A, B = randn(3, 5, seed=seed), randn(3, 5, seed=seed + 1000)
        assert (prox_l21(A, 1.0) - prox_l21(B, 1.0)).norm() <= (A - B).norm()


def test_group_lasso_with_orthonormal_design_is_the_prox_of_the_correlations():
    """min_W ||Y - U W^T||^2 / 2 + t sum_j ||W_:j||, solved without any threshold: ||w|| = min over a v = w of (a^2 + ||v||^2) / 2."""
    U, Y, H, m = torch.linalg.qr(randn(20, 6))[0], randn(20, 3, seed=1), 6, 3
    t = (Y.T @ U).norm(dim=0).sort().values[2:4].mean().item()
    a, V = torch.ones(H, dtype=torch.float64, requires_grad=True), randn(m, H, seed=2, train=True)
    solver = torch.optim.LBFGS([a, V], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        value = 0.5 * ((Y - U @ (V * a).T) ** 2).sum() + t / 2 * ((a ** 2).sum() + (V ** 2).sum())
        value.backward()
        return value

    solver.step(objective)
    close((V * a).detach(), prox_l21(Y.T @ U, t), rtol=1e-6, atol=1e-8)
    assert (prox_l21(Y.T @ U, t).norm(dim=0) == 0).sum() == 3


# ---- what is logged of W --------------------------------------------------------------------------------------------
def test_sparsity_values_on_hand_made_weights():
    out = sparsity(f64([3, 0, 0, 5e-3], [4, 0, 1, 0]))
    assert all(v.shape == () for v in out.values())
    r1, r2 = math.sqrt(9 + 25e-6), math.sqrt(17)
    expected = dict(l21=6 + 5e-3, frobenius=math.sqrt(26 + 25e-6), live_columns=0.5, zero_columns=0.25,
                    l21_normalized=(math.hypot(3 / r1, 4 / r2) + 1 / r2 + 5e-3 / r1) / math.sqrt(8))
    assert {k: v.item() for k, v in out.items()} == pytest.approx(expected, rel=1e-6)


def test_live_columns_are_relative_to_the_largest_and_zero_columns_are_exact():
    W = torch.diag(f64(1, 1.1e-3, 0.9e-3, 1e-30, 0))
    for scale in (1, 1e6, 1e-6):
        out = sparsity(scale * W)
        assert out["live_columns"].item() == pytest.approx(2 / 5) and out["zero_columns"].item() == pytest.approx(1 / 5)
    assert sparsity(randn(3, 4))["live_columns"] == 1 and sparsity(randn(3, 4))["zero_columns"] == 0


def test_l21_normalized_lies_between_1_over_sqrt_H_and_1():
    m, H = 4, 9
    value = lambda W: sparsity(W)["l21_normalized"].item()
    one = torch.zeros(m, H).double()
    one[:, 2] = 3
    assert value(one) == pytest.approx(H ** -0.5) and value(-5 * torch.ones(m, H)) == pytest.approx(1)
    for seed in range(10):
        W = randn(m, H, seed=seed)
        assert H ** -0.5 < value(W) < 1 and value(W) == pytest.approx(value(100 * W))


# ---- one step -------------------------------------------------------------------------------------------------------
def args_with(**over):
    return SimpleNamespace(**{**dict(arch="resnet_tiny", image_size=8, head="mlp", hidden=12, dim=5, lr=0.01, weight_decay=0.1,
                                     lambda_offdiag=0.05, penalty="rownorm", lambda_sparse=0.3, bf16=False), **over})


def toy(seed=0, **over):
    torch.manual_seed(seed)
    args = args_with(**over)
    nets, d = build_nets(args)
    assert d == 64
    nets["backbone"] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, d))
    x = randn(10, 3, 8, 8, seed=seed)
    return nets.double(), args, [x + 0.5 * randn(*x.shape, seed=seed + s) for s in (1, 2)]


def weight(nets):
    return nets["projector"][-1].weight


def sgd(nets, lr=1.0, lr_W=0.5, decay=0.1):
    W = weight(nets)
    return {"encoder": torch.optim.SGD([dict(params=[p for p in nets.parameters() if p is not W], lr=lr, weight_decay=decay),
                                        dict(params=[W], lr=lr_W, weight_decay=0)], lr=lr)}


def slow_embeddings(nets, views):
    """(z1, z2): the head by hand, its BatchNorm over the rows of both views."""
    head, r = nets["projector"], nets["backbone"](torch.cat(views))
    if len(head) > 1:
        h = r @ head[0].weight.T
        mean = sum(h) / len(h)
        h = (h - mean) / (sum((h - mean) ** 2) / len(h) + 1e-5) ** 0.5 * head[1].weight + head[1].bias
        r = h * (h > 0)
    z = r @ head[-1].weight.T
    return z[:len(z) // 2], z[len(z) // 2:]


def params_after(nets, views, args, penalty=None, **step):
    nets = copy.deepcopy(nets)
    out = train_step(nets, sgd(nets, **step), views, SimpleNamespace(**{**vars(args), **({"penalty": penalty} if penalty else {})}), 0.0)
    return dict(nets.named_parameters()), out


def hand_update(nets, views, args, lr=1.0, lr_W=0.5, decay=0.1):
    names, params = zip(*nets.named_parameters())
    loss = sum(slow_terms(*slow_embeddings(nets, views), args.lambda_offdiag))
    if args.penalty != "prox":
        loss = loss + args.lambda_sparse * slow_penalty(weight(nets), args.penalty)
    new = {n: (p - lr_W * g if p is weight(nets) else p - lr * (g + decay * p)).detach() for n, p, g in zip(names, params, grad(loss, params))}
    if args.penalty == "prox":
        name = next(n for n, p in zip(names, params) if p is weight(nets))
        shrunk = slow_prox(new[name], lr_W * args.lambda_sparse)
        new[name] = torch.stack([row / sum(row ** 2) ** 0.5 for row in shrunk])
    return new


@pytest.mark.parametrize("head, H", [("mlp", 12), ("linear", 64)])
def test_build_nets(head, H):
    args = args_with(head=head)
    nets, d = build_nets(args)
    projector = nets["projector"]
    assert set(nets) == {"backbone", "projector"} and d == 64 and weight(nets).shape == (5, H) and projector[-1].bias is None
    assert [type(m) for m in projector] == ([nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear] if head == "mlp" else [nn.Linear])
    assert projector[0].bias is None and projector[0].in_features == 64
    live = dict(projector.named_buffers())["live_columns"]
    assert live.dtype == torch.bool and live.shape == (H,)
    assert nets["projector"](nets["backbone"](torch.randn(4, 3, 8, 8))).shape == (4, 5)


def test_optimizer_decays_every_parameter_but_W():
    nets, args, views = toy(weight_decay=0.25)
    opt = build_opts(nets, args)["encoder"]
    rest, sparse = opt.param_groups
    assert isinstance(opt, torch.optim.Adam) and len(opt.param_groups) == 2
    assert rest["weight_decay"] == 0.25 and sparse["weight_decay"] == 0 and rest["lr"] == sparse["lr"] == args.lr
    assert len(sparse["params"]) == 1 and sparse["params"][0] is weight(nets)
    assert {id(p) for p in rest["params"]} == {id(p) for p in nets.parameters()} - {id(weight(nets))}
    other = copy.deepcopy(nets)
    for net, decay in ((nets, 0.0), (other, 1e4)):
        args.weight_decay = decay
        train_step(net, build_opts(net, args), views, args, 0.0)
    assert torch.equal(weight(nets), weight(other)) and not torch.equal(nets["projector"][0].weight, other["projector"][0].weight)


@pytest.mark.parametrize("penalty, head, lambda_sparse", [("plain", "mlp", 0.7), ("rownorm", "mlp", 0.7), ("rownorm", "linear", 0.7),
                                                          ("prox", "mlp", 0.6)])
def test_update_and_terms_equal_those_by_hand(penalty, head, lambda_sparse):
    nets, args, views = toy(penalty=penalty, head=head, lambda_sparse=lambda_sparse)
    before = copy.deepcopy(nets)
    expected = hand_update(nets, views, args)
    after, out = params_after(nets, views, args)
    for name, p in before.named_parameters():
        close(after[name].detach(), expected[name], rtol=1e-8, atol=1e-10, msg=lambda m: f"{name}: {m}")
        assert not torch.equal(after[name], p)
    z1, z2 = slow_embeddings(before, views)
    first, second = slow_terms(z1, z2, args.lambda_offdiag)
    z, W = torch.cat([z1, z2]), after["projector.%d.weight" % (len(before["projector"]) - 1)].detach()
    values = dict(loss_ssl=first + second, loss_invariance=first, loss_redundancy=second, loss_sparse=slow_penalty(weight(before), penalty),
                  l21=slow_penalty(W, "plain"), frobenius=(W ** 2).sum() ** 0.5, l21_normalized=slow_penalty(W, "rownorm") / W.numel() ** 0.5)
    for name, value in values.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert out["var_z"].item() == pytest.approx(z.var(0).mean().item(), rel=0.15) and out["std_z"] > 0
    norms = W.norm(dim=0)
    assert out["live_columns"].item() == pytest.approx((norms > 1e-3 * norms.max()).double().mean().item())
    assert out["zero_columns"].item() == pytest.approx((norms == 0).double().mean().item())
    assert all(v.shape == () and not v.requires_grad and v.isfinite() for v in out.values())
    if penalty == "prox":
        assert 0 < out["zero_columns"] < 1
        close(W.norm(dim=1), torch.ones(5).double())


def test_var_z_is_the_variance_of_the_raw_embeddings_and_std_z_is_free_of_scale():
    nets, args, views = toy(lambda_sparse=0.0)
    big = copy.deepcopy(nets)
    with torch.no_grad():
        weight(big).mul_(3)
    (_, out), (_, out_big) = params_after(nets, views, args), params_after(big, views, args)
    assert (out_big["var_z"] / out["var_z"]).item() == pytest.approx(9) and (out_big["std_z"] / out["std_z"]).item() == pytest.approx(1)


def test_without_sparsity_the_step_is_barlow_twins_bit_for_bit():
    nets, args, views = toy(lambda_sparse=0.0, lr=0.01)
    plain = copy.deepcopy(nets)
    opt = build_opts(plain, args)["encoder"]
    for _ in range(3):
        z1, z2 = plain["projector"](plain["backbone"](torch.cat(views))).chunk(2)
        opt.zero_grad()
        barlow_loss(z1, z2, args.lambda_offdiag).backward()
        opt.step()
    for args.penalty in PENALTIES:
        other = copy.deepcopy(nets)
        opts = build_opts(other, args)
        for _ in range(3):
            out = train_step(other, opts, views, args, 0.0)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]) or "live_columns" in name, name
        assert out["live_columns"] == 1 and (row_normalize(weight(other)) - weight(other)).abs().max() > 1e-3


def test_penalty_changes_the_update_of_W_alone():
    nets, args, views = toy()
    bare, _ = params_after(nets, views, args_with(lambda_sparse=0.0))
    for penalty in PENALTIES:
        after, _ = params_after(nets, views, args, penalty=penalty)
        changed = {n for n in bare if not torch.equal(bare[n], after[n])}
        assert changed == {"projector.3.weight"}, penalty


def test_penalty_step_is_the_negative_subgradient_times_lr_and_lambda():
    nets, args, views = toy(lambda_sparse=0.7)
    W = weight(nets).detach()
    bare, _ = params_after(nets, views, args_with(lambda_sparse=0.0))
    after, _ = params_after(nets, views, args, penalty="plain")
    close(after["projector.3.weight"] - bare["projector.3.weight"], -0.5 * 0.7 * W / W.norm(dim=0), rtol=1e-9, atol=1e-12)
    after, _ = params_after(nets, views, args, penalty="rownorm")
    step = after["projector.3.weight"] - bare["projector.3.weight"]
    close((step * W).sum(1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert slow_penalty(W + 1e-3 * step, "rownorm") < slow_penalty(W, "rownorm")


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_prox_threshold_follows_the_scheduled_lr_of_the_group_of_W_not_the_flag(factor):
    nets, args, views = toy(penalty="prox", lambda_sparse=25.0)
    bare, outs = copy.deepcopy(nets), []
    for net, args.lambda_sparse in ((bare, 0.0), (nets, 25.0)):
        opts = build_opts(net, args)
        for group in opts["encoder"].param_groups:
            group["lr"] *= factor
        outs.append(train_step(net, opts, views, args, 0.0))
    shrunk = slow_prox(weight(bare).detach(), 0.01 * factor * 25.0)
    close(weight(nets).detach(), torch.stack([row / row.norm() for row in shrunk]), rtol=1e-9, atol=1e-12)
    assert outs[0]["zero_columns"] == 0 and (outs[1]["zero_columns"] > 0) == (factor == 1.0)


def test_live_mask_marks_the_columns_after_the_step():
    nets, args, views = toy(lambda_sparse=0.0)
    with torch.no_grad():
        weight(nets)[:] = randn(5, 12).sign() * torch.tensor([1, 2e-3, 5e-4, 0] * 3)
    out = train_step(nets, sgd(nets, lr_W=0.0), views, args, 0.0)
    assert nets["projector"].live_columns.tolist() == [True, True, False, False] * 3
    assert out["live_columns"].item() == pytest.approx(0.5) and out["zero_columns"].item() == pytest.approx(0.25)
    nets, args, views = toy(penalty="prox", lambda_sparse=0.6)
    train_step(nets, sgd(nets), views, args, 0.0)
    assert torch.equal(nets["projector"].live_columns, weight(nets).norm(dim=0) > 0) and not nets["projector"].live_columns.all()
    assert torch.equal(nets.state_dict()["projector.live_columns"], nets["projector"].live_columns)


def test_permuting_columns_with_the_hidden_units_changes_nothing_but_their_order():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for penalty in PENALTIES:
        nets, args, views = toy(penalty=penalty, lambda_sparse=0.6)
        other = copy.deepcopy(nets)
        with torch.no_grad():
            for p in (other["projector"][0].weight, other["projector"][1].weight, other["projector"][1].bias):
                p.copy_(p[order].clone())
            weight(other).copy_(weight(nets)[:, order])
        out, permuted = train_step(nets, sgd(nets), views, args, 0.0), train_step(other, sgd(other), views, args, 0.0)
        assert {k: v.item() for k, v in permuted.items()} == pytest.approx({k: v.item() for k, v in out.items()})
        close(weight(other), weight(nets)[:, order])


def test_both_views_share_one_batch_of_batchnorm_statistics_and_the_order_of_views_does_not_matter():
    nets, args, (x1, x2) = toy()
    x2 = 2 * x2 + 1
    h = nets["backbone"](torch.cat([x1, x2])) @ nets["projector"][0].weight.T
    swapped = copy.deepcopy(nets)
    out, other = train_step(nets, sgd(nets), [x1, x2], args, 0.0), train_step(swapped, sgd(swapped), [x2, x1], args, 0.0)
    bn = nets["projector"][1]
    assert bn.num_batches_tracked == 1
    close(bn.running_mean, 0.1 * h.mean(0).detach())
    assert other["loss_ssl"].item() == pytest.approx(out["loss_ssl"].item())
    close(weight(swapped), weight(nets))


# ---- does it remove columns? ----------------------------------------------------------------------------------------
def shrinking_lr(opts, t, steps):
    for opt in opts.values():
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * (1 + math.cos(math.pi * t / steps)) / 2


def train_barlow(penalty, lambda_sparse, seed=0, steps=200, n=64, factors=6):
    nets, args, _ = toy(seed, hidden=32, dim=8, weight_decay=0.0, penalty=penalty, lambda_sparse=lambda_sparse)
    nets["backbone"] = nn.Sequential(nn.Flatten(), nn.Linear(192, 64)).double()
    g, opts, losses, start = torch.Generator().manual_seed(seed), build_opts(nets, args), [], weight(nets).norm().item()
    mixing = torch.randn(factors, 192, generator=g).double() / factors ** 0.5
    for t in range(steps):
        x = torch.randn(n, factors, generator=g).double() @ mixing
        shrinking_lr(opts, t, steps)
        out = train_step(nets, opts, [(x + 0.5 * torch.randn(n, 192, generator=g)).view(n, 3, 8, 8) for _ in range(2)], args, t / steps)
        losses.append(out["loss_ssl"].item())
    norms = weight(nets).norm(dim=0)
    return SimpleNamespace(loss=sum(losses[-20:]) / 20, first=losses[0], shrink=out["frobenius"].item() / start, live=out["live_columns"].item(),
                           zero=out["zero_columns"].item(), spread=(norms.min() / norms.max()).item(), normalized=out["l21_normalized"].item())


def test_plain_l21_shrinks_W_without_removing_a_column_while_rownorm_and_prox_remove_columns():
    none, plain, rownorm, prox = [train_barlow(*how) for how in (("plain", 0.0), ("plain", 1.0), ("rownorm", 0.1), ("prox", 2.0))]
    assert none.loss < 0.1 * none.first and none.live == 1 and none.shrink > 0.7 and none.normalized > 0.95
    assert plain.shrink < 0.1 and plain.live == 1 and plain.zero == 0 and plain.spread > 2e-3 and plain.loss < 0.2
    assert rownorm.live < 0.75 and rownorm.shrink > 0.5 and rownorm.loss < 0.1 and rownorm.normalized < 0.7
    assert prox.zero > 0.25 and prox.spread == 0 and prox.live < 0.75 and prox.loss < 0.1 and prox.normalized < 0.75


# ---- the penalty on other methods -----------------------------------------------------------------------------------
def pair_of_features(n, d, informative, g, noise=0.3):
    """Two views (2, n, d): `informative` features shared by the views up to noise, the others drawn for each view."""
    shared = torch.randn(n, informative, generator=g).double()
    return torch.stack([torch.cat([shared + noise * torch.randn(n, informative, generator=g),
                                   torch.randn(n, d - informative, generator=g)], 1) for _ in range(2)])


def simclr_projector(dim):
    torch.manual_seed(0)
    nets, _ = simclr_tc2.build_nets(SimpleNamespace(arch="resnet_tiny", image_size=8, dim=dim, baseline=True))
    return nets["projector"].double()


def test_info_nce_on_the_simclr_projector_ignores_the_scale_of_W_but_not_of_a_row():
    head, r = simclr_projector(6), randn(2, 10, 64)
    loss = lambda W, b: simclr_tc2.info_nce(r @ W.T + b, 0.2)
    W, b = head.weight.detach(), head.bias.detach()
    for s in (0.1, 10.0):
        close(loss(s * W, s * b), loss(W, b))
        close(loss(s * W, 0 * b), loss(W, 0 * b))
    assert (loss(W * f64([5], [1], [1], [1], [1], [1]), 0 * b) - loss(W, 0 * b)).abs() > 1e-3
    W = W.clone().requires_grad_()
    assert abs((grad(loss(W, 0 * b), W)[0] * W).sum()) < 1e-12 < abs((grad(l21_norm(W), W)[0] * W).sum())


def train_simclr(strength, steps=120, informative=12):
    head, g = simclr_projector(8), torch.Generator().manual_seed(0)
    opts, losses = {"head": torch.optim.Adam(head.parameters(), 0.02)}, []
    for t in range(steps):
        shrinking_lr(opts, t, steps)
        loss = simclr_tc2.info_nce(head(pair_of_features(64, 64, informative, g)), 0.2)
        opts["head"].zero_grad()
        (loss + strength * l21_norm(row_normalize(head.weight))).backward()
        opts["head"].step()
        losses.append(loss.item())
    live, norms = sparsity(head.weight)["live_columns"].item(), column_norms(head.weight.detach())
    return sum(losses[-20:]) / 20, losses[0], live, (norms[:informative].min() / norms[informative:].max()).item()


def test_rownorm_penalty_on_simclr_leaves_the_informative_features_alone():
    (dense, first, live, ratio), (loss, _, sparse_live, sparse_ratio) = train_simclr(0.0), train_simclr(0.3)
    assert dense < first - 2 and live == 1 and ratio < 100
    assert loss < dense + 0.1 and sparse_live == 12 / 64 and sparse_ratio > 500


def train_byol(strength, steps=60, informative=8):
    torch.manual_seed(0)
    projector, predictor = byol_gessl.mlp(32, 32, 8).double(), byol_gessl.mlp(8, 24, 8).double()
    target, g, losses, W = copy.deepcopy(projector), torch.Generator().manual_seed(0), [], predictor[-1].weight
    opts = {"encoder": torch.optim.Adam([*projector.parameters(), *predictor.parameters()], 0.01)}
    for t in range(steps):
        shrinking_lr(opts, t, steps)
        r = pair_of_features(64, 32, informative, g).flatten(0, 1)
        loss = byol_gessl.byol_loss(predictor(projector(r)), target(r))
        opts["encoder"].zero_grad()
        loss.backward()
        opts["encoder"].step()
        losses.append(loss.item())
        with torch.no_grad():
            if strength:
                W.copy_(row_normalize(prox_l21(W, opts["encoder"].param_groups[0]["lr"] * strength)))
            for slow, fast in zip(target.parameters(), projector.parameters()):
                slow.lerp_(fast, 0.1)
    return sum(losses[-10:]) / 10, losses[0], sparsity(W.detach())


def test_byol_loss_ignores_the_scale_of_the_last_layer_and_prox_removes_hidden_units_of_the_predictor():
    p, z = randn(12, 6), randn(12, 6, seed=1)
    close(byol_gessl.byol_loss(7 * p, z), byol_gessl.byol_loss(p, z))
    (dense, first, without), (loss, _, out) = train_byol(0.0), train_byol(5.0)
    assert dense < 0.5 * first and loss < dense + 0.2
    assert without["live_columns"] == 1 and out["live_columns"] < 0.8 and out["zero_columns"] > 0.2
