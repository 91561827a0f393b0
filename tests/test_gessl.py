"""Oracles for byol_gessl derived from the equations: slow loops, closed forms, finite differences, limits, invariants."""
import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import byol_gessl
from byol_gessl import (byol_loss, class_logits, curvature_probe, ema_decay_at, gessl_task, hypergradient, inner_step,
                        outer_loss, self_motivated_kl)

close, autograd = torch.testing.assert_close, torch.autograd
MODES, KINDS, TAU = ["first-order", "exact", "fd", "neumann", "cg"], ["kl", "ce", "mse", "wasserstein"], 0.5


def randn(*shape, seed=0, train=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(train)


def leaves(params):
    return [p.detach().clone().requires_grad_() for p in params]


def grads(y, params, **kw):
    return list(autograd.grad(y, params, materialize_grads=True, **kw))


def pack(tensors):
    return torch.cat([t.flatten() for t in tensors])


def unpack(vector, like):
    return [x.view_as(t) for x, t in zip(vector.split([t.numel() for t in like]), like)]


def move(params, step, direction):
    return leaves([p + step * d for p, d in zip(params, direction)])


def relative(a, b):
    return ((pack(a) - pack(b)).norm() / pack(b).norm()).item()


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def slow_byol(p, z):
    n = len(p) // 2
    return sum(2 - 2 * cos(p[i], z[(i + n) % (2 * n)].detach()) for i in range(2 * n)) / (2 * n)


def slow_logits(p, anchors, t):
    n = len(p) // 2
    return torch.stack([torch.stack([cos(p[i], anchors[j + n * (i < n)]) / t for j in range(n)]) for i in range(2 * n)])


def slow_probabilities(row):
    e = [(u - row.max()).exp() for u in row]
    return [x / sum(e) for x in e]


def slow_outer(kind, target, logits):
    total = 0.0
    for a, b in zip(target.detach(), logits):
        p, q = slow_probabilities(a), slow_probabilities(b)
        total = total + {"kl": lambda: sum(x * (x / y).log() for x, y in zip(p, q)),
                         "ce": lambda: -sum(x * y.log() for x, y in zip(p, q)),
                         "mse": lambda: sum((x - y) ** 2 for x, y in zip(p, q)),
                         "wasserstein": lambda: sum((x - y).abs() for x, y in zip(p, q)) / 2}[kind]()
    return total / len(logits)


def transport_cost(p, q):
    """[GeSSL Eq. 17] the infimum over couplings is at a vertex of the transport polytope; ground metric 1[i != j]."""
    n, best = len(p), math.inf
    for basis in itertools.combinations(itertools.product(range(n), repeat=2), 2 * n - 1):
        A = torch.zeros(2 * n, 2 * n - 1, dtype=p.dtype)
        for k, (i, j) in enumerate(basis):
            A[i, k] = A[n + j, k] = 1
        if torch.linalg.matrix_rank(A) == 2 * n - 1:
            mass = torch.linalg.lstsq(A, torch.cat([p, q])).solution
            if mass.min() > -1e-12:
                best = min(best, sum(m.item() for m, (i, j) in zip(mass, basis) if i != j))
    return best


def unroll(theta, loss, steps, lr):
    path = [theta]
    for _ in range(steps):
        path.append([p - lr * g for p, g in zip(path[-1], grads(loss(path[-1]), path[-1], create_graph=True))])
    return path


def trajectory(theta, loss, steps, lr, create_graph=False):
    path = [leaves(theta)]
    for _ in range(steps):
        path.append(inner_step(loss, path[-1], lr, create_graph=create_graph)[0])
    return path


def slow_hvp(loss, params, v):
    params = leaves(params)
    first = grads(loss(params), params, create_graph=True)
    return grads(sum((g * x).sum() for g, x in zip(first, v)), params)


def krylov_minimiser(B, v, terms):
    """x in span(v, Bv, ..) with residual orthogonal to it; stops where B is no longer positive on the span."""
    basis, w, x = [], v, v
    for j in range(terms):
        for _ in range(2):
            w = w - sum((w @ u) * u for u in basis)
        basis.append(w / w.norm())
        Q = torch.stack(basis, 1)
        T = Q.T @ B @ Q
        if torch.linalg.eigvalsh(T).min() <= 0:
            return x, j
        x, w = Q @ torch.linalg.solve(T, Q.T @ v), B @ basis[-1]
    return x, None


def quadratic(eigenvalues=torch.linspace(0.2, 5, 8), seed=0):
    """[readings 8] l = 1/2 th'A th - b'th, F = 1/2 (th - c)'S(th - c)."""
    n = len(eigenvalues)
    V, R = torch.linalg.qr(randn(n, n, seed=seed))[0], randn(n, n, seed=seed + 1)
    A, S = V @ torch.diag(eigenvalues.double()) @ V.T, R @ R.T / n + torch.eye(n)
    b, c, theta = randn(n, seed=seed + 2), randn(n, seed=seed + 3), randn(n, seed=seed + 4)
    return SimpleNamespace(n=n, A=A, S=S, b=b, c=c, theta=theta, V=V, I=torch.eye(n, dtype=torch.float64),
                           loss=lambda ps: 0.5 * pack(ps) @ A @ pack(ps) - b @ pack(ps),
                           outer=lambda ps: 0.5 * (pack(ps) - c) @ S @ (pack(ps) - c))


def run(mode, q, K, lr, **kw):
    path = trajectory([q.theta], q.loss, K, lr, create_graph=mode == "exact")
    (h,), curvature, negative = hypergradient(mode, q.loss, q.outer, path, lr, **kw)
    return h, curvature.item(), negative.item(), q.S @ (path[-1][0].detach() - q.c)


class Net(nn.Module):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 4))
        self.predictor = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Softplus(), nn.Linear(5, 4))
        self.double()

    def forward(self, x):
        z = self.encoder(x)
        return z, self.predictor(z)


def problem(n=5, seed=0):
    """BYOL on 2n views: pi from the predictor against the EMA projections; the slow_ twins share no code with byol_gessl."""
    net, base = Net(seed), randn(n, 5, seed=seed).repeat(2, 1)
    views = base + 0.5 * randn(2 * n, 5, seed=seed + 1)
    z = Net(seed + 1)(views)[0].detach()
    names, theta = zip(*[(k, v.detach().clone().requires_grad_()) for k, v in net.named_parameters()])

    def forward(params):
        return functional_call(net, dict(zip(names, params)), (views,))
    task = SimpleNamespace(n=n, z=z, names=names, theta=list(theta), forward=forward)
    task.ssl, task.logits = lambda out: byol_loss(out[1], z), lambda out: class_logits(out[1], z, TAU)
    task.loss, task.u = lambda ps: task.ssl(forward(ps)), lambda ps: task.logits(forward(ps))
    task.slow_loss, task.slow_u = lambda ps: slow_byol(forward(ps)[1], z), lambda ps: slow_logits(forward(ps)[1], z, TAU)
    return task


def call(t, K, lam, lr, **kw):
    return gessl_task(t.forward, t.ssl, t.logits, t.theta, K, lam, lr, **kw)


def fisher_times(t, params, g):
    """F g with F the mean over rows of J'(diag pi - pi pi')J, J the Jacobian of the row's logits."""
    like = leaves(params)
    J = autograd.functional.jacobian(lambda x: t.u(unpack(x, like)), pack(params).detach())
    pi = t.u(like).detach().softmax(1)
    return sum(j.T @ ((torch.diag(p) - torch.outer(p, p)) @ (j @ g)) for j, p in zip(J, pi)) / len(pi)


def test_byol_loss_equals_double_loop_and_leaves_the_target_alone():
    p, z = randn(8, 5, train=True), randn(8, 5, seed=1, train=True)
    fast, slow = byol_loss(p, z), slow_byol(p, z)
    close((fast, *grads(fast, [p])), (slow, *grads(slow, [p])))
    assert fast.dtype == torch.float64 and autograd.grad(fast, z, allow_unused=True)[0] is None


def test_byol_loss_ignores_row_scale_and_runs_from_0_aligned_to_4_opposite():
    p, z = randn(8, 5), randn(8, 5, seed=1)
    close(byol_loss(p * randn(8, 1, seed=2).exp(), z * randn(8, 1, seed=3).exp()), byol_loss(p, z))
    aligned = 3 * torch.cat([z[4:], z[:4]])
    close((byol_loss(aligned, z).item(), byol_loss(-aligned, z).item()), (0.0, 4.0))
    assert byol_loss(z, z) > 0.1


@pytest.mark.parametrize("t", [0.1, 1.0])
def test_class_logits_equal_loop_in_value_and_in_both_gradients(t):
    p, a, w = randn(8, 5, train=True), randn(8, 5, seed=1, train=True), randn(8, 4, seed=2)
    fast, slow = class_logits(p, a, t), slow_logits(p, a, t)
    close((fast, *grads((w * fast).sum(), [p, a])), (slow, *grads((w * slow).sum(), [p, a])))
    fast, slow = class_logits(p, p, t), slow_logits(p, p, t)
    close((fast, *grads((w * fast).sum(), [p])), (slow, *grads((w * slow).sum(), [p])))
    assert autograd.grad(class_logits(p, a.detach(), t).sum(), a, allow_unused=True)[0] is None


def test_pi_is_a_distribution_and_the_class_of_row_i_is_i_mod_n():
    z, scale = randn(10, 7), randn(10, 1, seed=1).exp()
    p = torch.cat([z[5:], z[:5]])
    u = class_logits(p, z, 0.05)
    close(u.softmax(1).sum(1), torch.ones(10, dtype=u.dtype))
    assert u.argmax(1).tolist() == [i % 5 for i in range(10)]
    close(u[range(10), [i % 5 for i in range(10)]], torch.full((10,), 1 / 0.05, dtype=u.dtype))
    close(class_logits(scale * p, z / scale, 0.05), u)


def test_permuted_pairs_permute_rows_and_classes_and_swapped_views_permute_rows():
    p, a, order = randn(10, 6), randn(10, 6, seed=1), torch.tensor([3, 0, 4, 1, 2])
    u, both = class_logits(p, a, TAU), torch.cat([order, order + 5])
    close(class_logits(p[both], a[both], TAU), u[both][:, order])
    close(class_logits(p.roll(5, 0), a.roll(5, 0), TAU), u.roll(5, 0))
    assert (u - u.roll(5, 0)).abs().max() > 0.1


@pytest.mark.parametrize("self_anchored", [False, True])
def test_collapse_makes_pi_uniform_with_no_kl_and_no_gradient_even_towards_another_target(self_anchored):
    p, a = randn(6).repeat(8, 1).requires_grad_(), randn(6, seed=1).repeat(8, 1)
    u, v = class_logits(p, p if self_anchored else a, TAU), class_logits(3 * p.detach(), -a, TAU)
    close(u.softmax(1), torch.full((8, 4), 0.25, dtype=u.dtype))
    close(self_motivated_kl(v, u).item(), 0.0)
    for target in (v, randn(8, 4, seed=2)):
        assert grads(self_motivated_kl(target, u), [p], retain_graph=True)[0].abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_outer_losses_equal_loops_and_never_train_the_target(kind):
    """[GeSSL Eqs. 3, 14-17] means over rows; MSE summed over classes; Wasserstein as total variation."""
    target, u = 2 * randn(7, 4, train=True), 2 * randn(7, 4, seed=1, train=True)
    fast, slow = outer_loss(kind, target, u), slow_outer(kind, target, u)
    close((fast, *grads(fast, [u], retain_graph=True)), (slow, *grads(slow, [u])))
    assert fast.ndim == 0 and autograd.grad(fast, target, allow_unused=True)[0] is None


def test_self_motivated_kl_equals_loop_is_the_kl_outer_loss_and_points_from_target_to_current():
    target, u = randn(6, 5), randn(6, 5, seed=1)
    close(self_motivated_kl(target, u), slow_outer("kl", target, u))
    close(outer_loss("kl", target, u), self_motivated_kl(target, u))
    close(self_motivated_kl(target, target + randn(6, 1)).item(), 0.0)
    assert (self_motivated_kl(target, u) - self_motivated_kl(u, target)).abs() > 1e-2


def test_kl_gradient_is_the_probability_gap_over_rows_and_cross_entropy_shares_it():
    target, u = 2 * randn(6, 5, train=True), randn(6, 5, seed=1, train=True)
    kl, ce = self_motivated_kl(target, u), outer_loss("ce", target, u)
    close(grads(kl, [u], retain_graph=True)[0], ((u.softmax(1) - target.softmax(1)) / 6).detach())
    close(grads(ce, [u]), grads(kl, [u], retain_graph=True))
    entropy = -(target.softmax(1) * target.log_softmax(1)).sum(1).mean()
    close(ce - kl, entropy)
    assert autograd.grad(kl, target, allow_unused=True)[0] is None


def test_outer_losses_survive_probabilities_that_underflow():
    target, u = torch.tensor([[200.0, -200, 0], [-200, 0, 200]]), torch.tensor([[-200.0, 200, 0], [-200, 0, 200]]).requires_grad_()
    for kind, value in (("kl", 200.0), ("ce", 200.0), ("mse", 1.0), ("wasserstein", 0.5)):
        loss = outer_loss(kind, target, u)
        close(loss.item(), value)
        assert grads(loss, [u])[0].isfinite().all()


@pytest.mark.parametrize("n, seed", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_wasserstein_is_the_cheapest_coupling_under_the_0_1_metric(n, seed):
    target, u = 2 * randn(1, n, seed=seed), 2 * randn(1, n, seed=seed + 10)
    close(outer_loss("wasserstein", target, u).item(), transport_cost(target.softmax(1)[0], u.softmax(1)[0]))


def test_wasserstein_is_the_largest_gap_over_events():
    target, u = randn(4, 6), randn(4, 6, seed=1)
    gap, events = target.softmax(1) - u.softmax(1), torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double()
    close(outer_loss("wasserstein", target, u), (gap @ events.T).max(1).values.mean())


@pytest.mark.parametrize("create_graph", [False, True])
def test_inner_step_is_plain_descent_that_modifies_nothing(create_graph):
    q = quadratic()
    b = q.b.clone().requires_grad_()
    start = leaves([q.theta[:3], q.theta[3:].view(5, 1)])
    kept = [p.detach().clone() for p in start]
    new, loss, g = inner_step(lambda ps: q.loss(ps) + (q.b - b) @ pack(ps), start, 0.1, create_graph=create_graph)
    close(pack(g).detach(), q.A @ q.theta - q.b)
    close(pack(new).detach(), q.theta - 0.1 * (q.A @ q.theta - q.b))
    close(loss.item(), q.loss([q.theta]).item())
    assert not loss.requires_grad and all(p.requires_grad and p.shape == s.shape for p, s in zip(new, start))
    assert all(torch.equal(p, k) and p.grad is None for p, k in zip(start, kept)) and b.grad is None
    if create_graph:
        v = randn(8, seed=9)
        close(pack(grads(pack(new) @ v, start)), v - 0.1 * q.A @ v)
    else:
        assert all(p.is_leaf for p in new)


@pytest.mark.parametrize("lr", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("K", [1, 3, 10])
def test_trajectory_and_unrolled_gradients_of_a_quadratic_have_closed_forms(lr, K):
    q = quadratic()
    optimum, P = torch.linalg.solve(q.A, q.b), torch.linalg.matrix_power(q.I - lr * q.A, K)
    theta_K = optimum + P @ (q.theta - optimum)
    close(trajectory([q.theta], q.loss, K, lr)[-1][0].detach(), theta_K)
    right = P @ q.S @ (theta_K - q.c)
    h, curvature, negative, _ = run("exact", q, K, lr)
    close(h, right, rtol=1e-12, atol=1e-13)
    assert curvature == 0 and negative == 0
    for length in (1e-2, 0.03, 1.0):
        close(run("fd", q, K, lr, fd_length=length)[0], right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lr, K", [(0.15, 1), (0.3, 3)])
def test_fd_curvature_is_the_largest_ratio_met_on_the_way_back(lr, K):
    q = quadratic()
    _, curvature, negative, v = run("fd", q, K, lr)
    met = []
    for _ in range(K):
        met.append((lr * (q.A @ v).norm() / v.norm()).item())
        v = v - lr * q.A @ v
    close(curvature, max(met), rtol=1e-7, atol=0)
    assert negative == 0


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("lr, T", [(lr, T) for lr in (0.05, 0.15) for T in (1, 3, 10, 30)])
def test_neumann_is_the_partial_sum_and_errs_at_most_by_the_next_power(lr, T, K):
    q = quadratic()
    h, curvature, negative, v = run("neumann", q, K, lr, terms=T)
    aA = K * lr * q.A
    powers = [torch.linalg.matrix_power(-aA, t) @ v for t in range(T + 1)]
    close(h, sum(powers), rtol=1e-10, atol=1e-12)
    error = (h - torch.linalg.solve(q.I + aA, v)).norm()
    assert error <= (K * lr * 5) ** (T + 1) * v.norm() * (1 + 1e-9) + 1e-12 and negative == 0
    close(curvature, max(((aA @ x).norm() / x.norm()).item() for x in powers[:T]), rtol=1e-9, atol=0)


def test_neumann_of_no_terms_is_first_order():
    h, curvature, _, v = run("neumann", quadratic(), 1, 0.1, terms=0)
    close(h, v, rtol=1e-14, atol=1e-15)
    assert curvature == 0


@pytest.mark.parametrize("lr, K", [(0.3, 1), (0.1, 3)])
def test_neumann_diverges_and_says_so_when_a_times_the_largest_eigenvalue_exceeds_one(lr, K):
    q, size = quadratic(), []
    for T in (10, 20, 30):
        h, curvature, _, v = run("neumann", q, K, lr, terms=T)
        size.append(((h - torch.linalg.solve(q.I + K * lr * q.A, v)).norm() / v.norm()).item())
    assert size[0] < size[1] / 30 < size[2] / 900 and size[2] > 1e3
    close(curvature, 1.5, rtol=1e-2, atol=0)
    assert run("neumann", q, K, lr / 2, terms=30)[1] < 1


@pytest.mark.parametrize("lr, K", [(0.05, 1), (0.3, 1), (0.3, 3)])
def test_cg_minimises_over_the_krylov_space_and_is_exact_after_n_iterations(lr, K):
    q = quadratic()
    B, last, met = q.I + K * lr * q.A, 0, []
    for terms in range(1, 9):
        h, curvature, negative, v = run("cg", q, K, lr, terms=terms)
        right = krylov_minimiser(B, v, terms)[0]
        close(h, right, rtol=1e-8, atol=1e-10)
        met.append((K * lr * (q.A @ (right - last)).norm() / (right - last).norm()).item())
        close(curvature, max(met), rtol=1e-6, atol=0)
        assert negative == 0
        last = right
    close(h, torch.linalg.solve(B, v), rtol=1e-10, atol=1e-12)
    h, _, negative, v = run("cg", q, K, lr, terms=20)
    close(h, torch.linalg.solve(B, v), rtol=1e-10, atol=1e-12)
    assert negative == 0


def test_implicit_modes_approach_the_derivative_of_the_proximal_map():
    """theta -> F(phi*), phi* = argmin l(phi) + |phi - theta|^2 / (2a) = (A + I/a)^-1 (b + theta/a)."""
    q, a = quadratic(), 0.15
    theta = leaves([q.theta])[0]
    phi = torch.linalg.solve(q.A + q.I / a, q.b + theta / a)
    right = grads(q.outer([phi]), [theta])[0]
    for mode, terms in (("cg", 8), ("neumann", 80)):
        close(hypergradient(mode, q.loss, q.outer, [[theta], leaves([phi])], a, terms=terms)[0][0], right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lowest, first", [(-2.3, False), (-2.3, True), (-5.0, False), (-50.0, True)])
def test_cg_stops_at_negative_curvature_says_so_and_stays_finite(lowest, first):
    q = quadratic(torch.tensor([lowest, 0.2, 0.5, 1, 2, 3, 4, 5]))
    theta, lr, v = leaves([q.theta]), 0.5, q.V[:, 0] if first else q.V @ torch.tensor([0.3, 1, 1, 1, 1, 1, 1, 1]).double()
    right, stop = krylov_minimiser(q.I + lr * q.A, v, 8)
    for terms in (stop + 1, stop + 5):
        (h,), curvature, negative = hypergradient("cg", q.loss, lambda ps: pack(ps) @ v, [theta, leaves(theta)], lr, terms=terms)
        close(h, right, rtol=1e-8, atol=1e-10)
        assert negative == 1 and h.isfinite().all() and curvature.isfinite()
    assert (stop == 0) == first and torch.allclose(right, v) == first
    if not first:
        assert hypergradient("cg", q.loss, lambda ps: pack(ps) @ v, [theta, leaves(theta)], lr, terms=stop)[2] == 0


@pytest.mark.parametrize("K", [0, 1, 4])
def test_first_order_is_the_outer_gradient_and_every_mode_agrees_with_it_without_inner_steps(K):
    q = quadratic()
    h, curvature, negative, v = run("first-order", q, K, 0.1)
    close(h, v, rtol=1e-14, atol=1e-15)
    assert curvature == 0 and negative == 0
    for mode in MODES if K == 0 else []:
        h, _, negative, v = run(mode, q, 0, 0.1)
        close(h, v, rtol=1e-12, atol=1e-14)
        assert negative == 0


@pytest.mark.parametrize("lr", [0.05, 0.3])
def test_many_inner_steps_forget_the_initialisation(lr):
    q = quadratic()
    sizes = [(h.norm() / v.norm()).item() for h, _, _, v in (run("exact", q, K, lr) for K in (1, 10, 50))]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] <= (1 - 0.2 * lr) ** 50 * (1 + 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [1, 3])
def test_zero_outer_gradient_stays_exactly_zero_without_nan_or_alarm(mode, K):
    q = quadratic()
    path = trajectory([q.theta[:3], q.theta[3:]], q.loss, K, 0.1, create_graph=mode == "exact")
    h, curvature, negative = hypergradient(mode, q.loss, lambda ps: 0 * q.outer(ps), path, 0.1)
    assert all((x == 0).all() for x in h) and curvature.isfinite() and negative == 0


def test_fd_survives_a_gradient_that_vanishes_on_the_way_back():
    theta, v = leaves([torch.zeros(3, dtype=torch.float64)]), torch.tensor([1.0, 0, 0]).double()
    h, curvature, _ = hypergradient("fd", lambda ps: ps[0].square().sum(), lambda ps: ps[0] @ v, [theta] * 4, 0.5, fd_length=0.5)
    assert (h[0] == 0).all() and curvature == 1


def bumpy(sizes=(8,)):
    """A loss whose Hessian moves, of one vector or of the same vector cut into pieces."""
    W, c = randn(12, 8), randn(8, seed=1)

    def loss(ps):
        return (W @ pack(ps)).logsumexp(0) + 0.05 * pack(ps).pow(4).sum()

    def outer(ps):
        return (pack(ps) - c).square().sum() * 0.5 + pack(ps).sin().sum()
    return loss, outer, list(randn(8, seed=2).split(list(sizes)))


@pytest.mark.parametrize("mode", MODES)
def test_cutting_the_parameters_into_tensors_changes_nothing_and_no_grad_is_filled(mode):
    results = []
    for sizes in ((8,), (3, 5), (1, 1, 6)):
        loss, outer, theta = bumpy(sizes)
        outside = torch.ones((), dtype=torch.float64, requires_grad=True)
        path = trajectory(theta, loss, 3, 0.1, create_graph=mode == "exact")
        h, curvature, negative = hypergradient(mode, lambda ps: outside * loss(ps), lambda ps: outside * outer(ps), path, 0.1, 3, 0.1)
        assert [x.shape for x in h] == [x.shape for x in theta] and not any(x.requires_grad for x in h)
        assert curvature.ndim == negative.ndim == 0 and outside.grad is None
        assert all(x.grad is None for step in path for x in step if x.is_leaf)
        results.append((pack(h), curvature, negative))
    for other in results[1:]:
        close(other, results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kw, length", [({}, 0.03), ({"fd_length": 0.3}, 0.3)])
@pytest.mark.parametrize("given", [False, True])
def test_fd_is_the_one_sided_difference_of_stated_length_from_the_last_step_to_the_first(kw, length, given):
    loss, outer, theta = bumpy((3, 5))
    path = trajectory(theta, loss, 3, 0.2)
    at = [leaves(params) for params in path[:-1]]
    inner = [grads(loss(params), params) for params in at]
    v = pack(grads(outer(path[3]), path[3]))
    for k in (2, 1, 0):
        e = length / v.norm()
        moved = move(path[k], -e, unpack(v, theta))
        v = v - 0.2 * (pack(inner[k]) - pack(grads(loss(moved), moved))) / e
    calls = []
    counted = lambda ps: calls.append(1) or loss(ps)
    close(pack(hypergradient("fd", counted, outer, path, 0.2, inner_grads=inner if given else None, **kw)[0]), v, rtol=1e-9, atol=1e-12)
    assert len(calls) == (3 if given else 6)            # the inner loop's gradients are not taken a second time


def test_the_error_of_the_finite_difference_lowers_the_curvature_along_v():
    loss = lambda ps: (ps[0] ** 4).sum() / 12                                   # v H v = (theta v)^2, its gradient 2 theta v^2
    theta, v = leaves([torch.tensor([1.0, -2.0]).double()]), torch.tensor([0.6, 0.8]).double()
    h = hypergradient("fd", loss, lambda ps: ps[0] @ v, [theta, theta], 0.1, fd_length=1e-4)[0][0]
    exact = v - 0.1 * theta[0].detach() ** 2 * v
    close(h - exact, 0.1 * 1e-4 / 2 * 2 * theta[0].detach() * v ** 2, rtol=1e-3, atol=0)       # a step along -h descends v H v


def test_the_task_uses_its_inner_gradients_in_the_finite_differences():
    t, calls = problem(), []
    loss = lambda out: calls.append(1) or t.ssl(out)
    gessl_task(t.forward, loss, t.logits, t.theta, 3, 2, 0.1, "fd")
    assert len(calls) == 3 + 2 + 1 + 3                  # inner steps, target steps, the target's value, one per difference


@pytest.mark.parametrize("kw, terms", [({"terms": 1}, 1), ({}, 5)])
def test_implicit_modes_take_the_hessian_at_the_last_point_with_rate_k_times_alpha(kw, terms):
    loss, outer, theta = bumpy((3, 5))
    path = trajectory(theta, loss, 3, 0.02)
    last = pack(path[-1]).detach()
    aH = 3 * 0.02 * autograd.functional.hessian(lambda x: loss(unpack(x, theta)), last)
    v = pack(grads(outer(path[-1]), path[-1]))
    series = sum(torch.linalg.matrix_power(-aH, t) @ v for t in range(terms + 1))
    close(pack(hypergradient("neumann", loss, outer, path, 0.02, **kw)[0]), series, rtol=1e-10, atol=1e-12)
    right, stop = krylov_minimiser(torch.eye(8, dtype=aH.dtype) + aH, v, terms)
    close(pack(hypergradient("cg", loss, outer, path, 0.02, **kw)[0]), right, rtol=1e-9, atol=1e-11)
    assert stop is None


@pytest.mark.parametrize("K", [1, 3])
def test_exact_hypergradient_of_byol_is_the_finite_difference_of_the_bilevel_map(K):
    """[GeSSL Eq. 4] theta -> KL(fixed pi(theta_K+lambda), pi(theta_K(theta))), with BatchNorm in training mode."""
    t, lr = problem(), 0.1
    target = t.u(trajectory(t.theta, t.loss, K + 3, lr)[-1]).detach()

    def bilevel(theta):
        return self_motivated_kl(target, t.u(trajectory(theta, t.loss, K, lr)[-1])).item()
    path = trajectory(t.theta, t.loss, K, lr, create_graph=True)
    h = hypergradient("exact", t.loss, lambda ps: self_motivated_kl(target, t.u(ps)), path, lr)[0]
    for seed in range(6):
        d = unpack(randn(sum(p.numel() for p in t.theta), seed=seed), t.theta)
        sides = {s: bilevel(move(t.theta, s * 1e-3, d)) for s in (-2, -1, 1, 2)}
        slope = (8 * (sides[1] - sides[-1]) - (sides[2] - sides[-2])) / 12e-3
        close((pack(h) @ pack(d)).item(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("K", [1, 3, 5])
def test_product_of_hessian_vector_products_along_the_path_equals_exact(K):
    t, lr = problem(), 0.1
    target = t.u(trajectory(t.theta, t.loss, K + 3, lr)[-1]).detach()

    def outer(ps):
        return self_motivated_kl(target, t.u(ps))
    path = trajectory(t.theta, t.loss, K, lr, create_graph=True)
    last = leaves(path[-1])
    v = grads(outer(last), last)
    for k in reversed(range(K)):
        v = [x - lr * y for x, y in zip(v, slow_hvp(t.loss, path[k], v))]
    close(pack(hypergradient("exact", t.loss, outer, path, lr)[0]), pack(v), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("K", [1, 3])
def test_fd_error_falls_with_its_length(K):
    t, lr = problem(), 0.1
    target = t.u(trajectory(t.theta, t.loss, K + 3, lr)[-1]).detach()

    def outer(ps):
        return self_motivated_kl(target, t.u(ps))
    path = trajectory(t.theta, t.loss, K, lr, create_graph=True)
    right = hypergradient("exact", t.loss, outer, path, lr)[0]
    path = trajectory(t.theta, t.loss, K, lr)
    errors = [relative(hypergradient("fd", t.loss, outer, path, lr, fd_length=c)[0], right) for c in (1e-2, 1e-3)]
    assert 9 < errors[0] / errors[1] < 11 and errors[1] < 1e-3


@pytest.mark.parametrize("lam", [1, 10])
def test_outer_gradient_tends_to_alpha_lambda_fisher_times_ssl_gradient_which_descends(lam):
    """[readings 1] grad KL at theta_K = alpha lambda F grad l(theta_K) + O(alpha^2)."""
    t, errors = problem(), []
    for lr in (1e-3, 1e-4):
        theta_K = trajectory(t.theta, t.loss, 1, lr)[-1]
        g = pack(grads(t.loss(theta_K), theta_K))
        h = pack(call(t, 1, lam, lr, hypergrad="first-order")[0])
        errors.append(relative([h], [lr * lam * fisher_times(t, theta_K, g)]))
        assert h @ g > 0
    assert 8 < errors[0] / errors[1] < 12 and errors[1] < 0.05


def test_first_order_gives_nothing_to_parameters_outside_pi_but_the_hessian_term_does():
    t = problem()
    shares = {}
    for mode in ("first-order", "exact", "fd"):
        h = gessl_task(t.forward, t.ssl, lambda out: class_logits(out[0], out[0], TAU), t.theta, 1, 3, 0.1, hypergrad=mode)[0]
        shares[mode] = {part: pack([x for x, k in zip(h, t.names) if k.startswith(part)]).norm().item()
                        for part in ("encoder", "predictor")}
    assert shares["first-order"]["predictor"] == 0 < shares["first-order"]["encoder"]
    assert shares["exact"]["predictor"] > 1e-6 and shares["fd"]["predictor"] > 1e-6


@pytest.mark.parametrize("K, lam", [(1, 1), (1, 10), (2, 3)])
def test_theorem_4_1_has_the_right_sign_but_a_remainder_of_order_alpha_beta(K, lam):
    """[GeSSL Eq. 6] left / right -> lam / (lam - 1/2), because the target is theta_K - alpha lam g + O(alpha^2) and KL is
    quadratic around it: left = -beta alpha lam g'Fg, right = -beta alpha (lam - 1/2) g'Fg, and o(beta (alpha + beta)) is -beta alpha g'Fg / 2."""
    t, gaps, remainders = problem(), [], []
    for lr in (1e-2, 1e-3, 1e-4):
        beta = lr
        path = trajectory(t.theta, t.loss, K, lr, create_graph=True)
        target = t.u(trajectory(path[-1], t.loss, lam, lr)[-1]).detach()

        def kl(ps):
            return self_motivated_kl(target, t.u(ps)).item()
        h = hypergradient("exact", t.loss, lambda ps: self_motivated_kl(target, t.u(ps)), path, lr)[0]
        last = leaves(path[-1])
        g = grads(t.loss(last), last)
        Gg = g
        for k in reversed(range(K)):
            Gg = [x - lr * y for x, y in zip(Gg, slow_hvp(t.loss, path[k], Gg))]
        for k in range(K):
            Gg = [x - lr * y for x, y in zip(Gg, slow_hvp(t.loss, path[k], Gg))]
        left = (t.loss(trajectory(move(t.theta, -beta, h), t.loss, K, lr)[-1]) - t.loss(last)).item()
        right = beta / lr * (kl(move(last, -lr, Gg)) - kl(last))
        assert left < 0 and right < 0
        gFg = (pack(g) @ fisher_times(t, last, pack(g))).item()
        gaps.append(abs(left / right / (lam / (lam - 0.5)) - 1))
        remainders.append((left - right) / (beta * lr * gFg))
    assert gaps[2] < 0.05 and 7 < gaps[1] / gaps[2] < 13
    close(remainders[2], -0.5, rtol=0.1, atol=0)


def reference(t, K, lam, lr, kind="kl", detach=True):
    path = unroll(t.theta, t.slow_loss, K + lam, lr)
    target = t.slow_u(path[-1])
    p = target.softmax(1)
    if detach:
        outer = slow_outer(kind, target, t.slow_u(path[K]))
    else:
        outer = (p * (target.log_softmax(1) - t.slow_u(path[K]).log_softmax(1))).sum(1).mean()
    return grads(outer, t.theta), outer.detach(), path, target.detach()


@pytest.mark.parametrize("K, lam", [(1, 3), (3, 1), (2, 2)])
def test_task_equals_the_unrolled_slow_computation(K, lam):
    t, lr = problem(), 0.1
    right, outer, path, target = reference(t, K, lam, lr)
    h, ssl, terms = call(t, K, lam, lr, hypergrad="exact")
    close(pack(h), pack(right), rtol=1e-8, atol=1e-11)
    close(pack(ssl), pack(grads(t.slow_loss(t.theta), t.theta)))
    rows = [slow_probabilities(row) for row in target]
    entropy = -sum(p * p.log() for row in rows for p in row) / len(rows) / math.log(t.n)
    expected = {"loss_kl": outer, "loss_ssl": t.slow_loss(path[0]).detach(), "loss_ssl_inner": t.slow_loss(path[K]).detach(),
                "loss_ssl_target": t.slow_loss(path[-1]).detach(), "entropy_pi": entropy}
    close({k: terms[k] for k in expected}, expected, rtol=1e-8, atol=1e-12)
    assert terms["curvature"] == 0 and terms["negative_curvature"] == 0
    assert all(x.ndim == 0 and not x.requires_grad for x in terms.values())
    assert not any(x.requires_grad for x in h + ssl) and [x.shape for x in h] == [x.shape for x in t.theta]


@pytest.mark.parametrize("kind", KINDS)
def test_task_minimises_the_outer_loss_it_is_told(kind):
    t = problem()
    right, outer, _, _ = reference(t, 2, 3, 0.1, kind)
    h, _, terms = call(t, 2, 3, 0.1, hypergrad="exact", outer=kind)
    close(pack(h), pack(right), rtol=1e-8, atol=1e-11)
    close(terms["loss_kl"], outer)


def test_no_gradient_flows_through_the_target():
    t = problem()
    (fixed, value, _, _), (through, same, _, _) = reference(t, 1, 3, 0.1), reference(t, 1, 3, 0.1, detach=False)
    h = call(t, 1, 3, 0.1, hypergrad="exact")[0]
    close(value, same)
    assert relative(h, fixed) < 1e-8 and relative(h, through) > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [1, 3])
def test_task_hands_its_trajectory_to_the_chosen_mode(mode, K):
    t, lr = problem(), 0.1
    path = trajectory(t.theta, t.loss, K, lr, create_graph=mode == "exact")
    target = t.u(trajectory(path[-1], t.loss, 2, lr)[-1]).detach()
    right, curvature, negative = hypergradient(mode, t.loss, lambda ps: self_motivated_kl(target, t.u(ps)), path, lr)
    h, _, terms = call(t, K, 2, lr, hypergrad=mode)
    close((pack(h), terms["curvature"], terms["negative_curvature"]), (pack(right), curvature, negative), rtol=1e-8, atol=1e-10)
    if mode == "fd":
        close(pack(call(t, K, 2, lr)[0]), pack(h))
        assert terms["curvature"] > 0


@pytest.mark.parametrize("mode", MODES + ["lookahead"])
def test_task_leaves_theta_and_every_grad_untouched(mode):
    t = problem()
    t.z.requires_grad_()
    t.theta[0].grad = randn(*t.theta[0].shape, seed=5)
    before, sentinel = [p.detach().clone() for p in t.theta], t.theta[0].grad.clone()
    call(t, 2, 2, 0.1, **({"lookahead": True} if mode == "lookahead" else {"hypergrad": mode}))
    assert all(torch.equal(p, b) and p.is_leaf and p.requires_grad for p, b in zip(t.theta, before))
    assert torch.equal(t.theta[0].grad, sentinel) and t.z.grad is None and all(p.grad is None for p in t.theta[1:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [1, 3])
def test_a_target_zero_steps_ahead_teaches_nothing(mode, K):
    t = problem()
    h, ssl, terms = call(t, K, 0, 0.1, hypergrad=mode)
    assert abs(terms["loss_kl"].item()) < 1e-14 and pack(h).abs().max() < 1e-13 and terms["negative_curvature"] == 0
    close(pack(ssl), pack(grads(t.slow_loss(t.theta), t.theta)))
    close(terms["loss_ssl_inner"], terms["loss_ssl_target"], rtol=0, atol=0)


@pytest.mark.parametrize("K, lam", [(1, 3), (2, 0), (2, 2)])
def test_lookahead_is_the_sum_of_all_inner_gradients(K, lam):
    t, lr = problem(), 0.1
    path = unroll(t.theta, t.slow_loss, K + lam, lr)
    total = sum(pack(grads(t.slow_loss(leaf), leaf)) for leaf in map(leaves, path[:-1]))
    h, ssl, terms = call(t, K, lam, lr, lookahead=True)
    close(pack(h), total, rtol=1e-9, atol=1e-12)
    close(pack(ssl), pack(grads(t.slow_loss(t.theta), t.theta)))
    for name, k in (("loss_ssl", 0), ("loss_ssl_inner", K), ("loss_ssl_target", K + lam)):
        close(terms[name], t.slow_loss(path[k]).detach())


def test_task_of_a_collapsed_model_has_uniform_pi_and_no_gradient():
    t = problem()
    for k, p in zip(t.names, t.theta):
        if k == "predictor.3.weight":
            p.data.zero_()
    t.z.copy_(t.z[:1].expand_as(t.z))
    h, _, terms = call(t, 1, 3, 0.1, hypergrad="exact")
    close(terms["entropy_pi"].item(), 1.0)
    assert pack(h).abs().max() < 1e-13 and abs(terms["loss_kl"].item()) < 1e-14


@pytest.mark.parametrize("base", [0.9, 0.996])
def test_ema_decay_rises_from_base_through_the_midpoint_to_one(base):
    close([float(ema_decay_at(base, x)) for x in (0, 0.5, 1)], [base, (1 + base) / 2, 1.0])
    path = [float(ema_decay_at(base, x / 20)) for x in range(21)]
    assert all(a < b for a, b in zip(path, path[1:]))


def test_ema_decay_of_zero_is_no_average_throughout():
    assert [ema_decay_at(0, x / 4) for x in range(5)] == [0] * 5


@pytest.mark.parametrize("extreme", [5.0, -5.0])
@pytest.mark.parametrize("kw", [{}, {"iterations": 30}])
def test_curvature_probe_finds_the_largest_absolute_eigenvalue(extreme, kw):
    q = quadratic(torch.tensor([extreme, 1.0, 0.8, 0.6, 0.4, 0.2, -0.5, -1.0]))
    for params in ([q.theta], [q.theta[:3], q.theta[3:].view(5, 1)]):
        params = leaves(params)
        kept, found = pack(params).detach().clone(), curvature_probe(q.loss, params, **kw)
        close(float(found), 5.0, rtol=1e-4, atol=0)
        assert torch.as_tensor(found).ndim == 0 and all(p.grad is None for p in params)
        assert torch.equal(pack(params), kept)


def test_curvature_probe_never_overshoots_and_evaluates_the_hessian_where_it_stands():
    q = quadratic()
    assert all(0 < float(curvature_probe(q.loss, leaves([q.theta]), iterations=i)) <= 5 * (1 + 1e-9) for i in range(1, 8))
    loss, _, theta = bumpy((3, 5))
    for scale in (1.0, 3.0):
        params = leaves([scale * p for p in theta])
        H = autograd.functional.hessian(lambda x: loss(unpack(x, theta)), pack(params).detach())
        close(float(curvature_probe(loss, params, iterations=200)), torch.linalg.eigvalsh(H).abs().max().item(), rtol=1e-3, atol=0)


# ---- the outer step of the script -----------------------------------------------------------------------------------
def step_args(**kw):
    return SimpleNamespace(**{**dict(baseline=False, tasks=2, inner_steps=1, target_steps=2, inner_lr=0.05, hypergrad="exact", lookahead=False, ssl_weight=1.0,
                                     outer_loss="kl", temperature=0.5, ema_decay=0.9, bf16=False, hidden=7, dim=5, arch="resnet_tiny", image_size=8,
                                     batch_size=4, compile=False), **kw})


def step_nets():
    torch.manual_seed(1)
    nets = byol_gessl.build_nets(step_args())[0]
    nets["backbone"] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(144, 64))
    nets["target"] = nn.Sequential(*map(copy.deepcopy, (nets["backbone"], nets["projector"]))).requires_grad_(False)
    for p in nets["target"].parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return nets.double()


def online(nets):
    return nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"])


def outer_step(x1, x2, progress=0.0, **kw):
    """One train_step with SGD at rate 1: (what it took off the parameters, networks, terms)."""
    nets, args = step_nets(), step_args(**kw)
    before = pack(online(nets).parameters()).detach()
    terms = byol_gessl.train_step(nets, {"encoder": torch.optim.SGD(online(nets).parameters(), 1.0)}, [x1, x2], args, progress)
    return before - pack(online(nets).parameters()).detach(), nets, terms


X1, X2 = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
TWO = torch.cat([X1, X1.flip(3)]), torch.cat([X2, X2 + 0.3 * randn(4, 3, 8, 8, seed=3)])


def plain_byol(x1, x2):
    nets = step_nets()
    with torch.no_grad():
        z = nets["target"](torch.cat([x1, x2]))
    return pack(grads(slow_byol(online(nets)(torch.cat([x1, x2])), z), list(online(nets).parameters())))


def test_baseline_is_byols_gradient_and_so_is_gessl_without_target_steps():
    close(outer_step(X1, X2, baseline=True)[0], plain_byol(X1, X2))
    close(outer_step(X1, X2, tasks=1, target_steps=0)[0], plain_byol(X1, X2))
    assert outer_step(X1, X2, tasks=1, target_steps=0, ssl_weight=0)[0].abs().max() < 1e-14


@pytest.mark.parametrize("mode", MODES)
def test_an_outer_step_is_the_mean_over_tasks_and_linear_in_the_ssl_weight(mode):
    step = lambda i, **kw: outer_step(TWO[0][i * 4:i * 4 + 4], TWO[1][i * 4:i * 4 + 4], tasks=1, hypergrad=mode, **kw)[0]
    close(outer_step(*TWO, hypergrad=mode)[0], (step(0) + step(1)) / 2)
    close(outer_step(torch.cat([X1, X1]), torch.cat([X2, X2]), hypergrad=mode)[0], step(0))
    close(step(0, ssl_weight=3.0) - step(0, ssl_weight=0.0), 3 * plain_byol(X1, X2))


def test_lookahead_follows_the_inner_path_whatever_the_ssl_weight():
    a, b = (outer_step(X1, X2, tasks=1, lookahead=True, ssl_weight=w, target_steps=0)[0] for w in (0.0, 2.0))
    close(a, b)
    close(a, plain_byol(X1, X2), rtol=1e-9, atol=1e-12)                         # K + lambda = 1: (theta - theta^1) / alpha is the gradient


@pytest.mark.parametrize("kw", [dict(), dict(hypergrad="fd"), dict(hypergrad="cg"), dict(lookahead=True), dict(inner_steps=2)])
def test_running_statistics_move_in_the_passes_at_theta_alone(kw):
    _, nets, _ = outer_step(*TWO, **kw)
    fresh = step_nets()
    for i in (0, 4):
        online(fresh)(torch.cat([TWO[0][i:i + 4], TWO[1][i:i + 4]]))
    for (name, a), b in zip(nets["backbone"].named_buffers(), fresh["backbone"].buffers()):
        assert torch.equal(a, b), name
    for a, b in zip(nets["predictor"].buffers(), fresh["predictor"].buffers()):
        assert torch.equal(a, b)


def test_target_gets_no_gradient_and_follows_the_moving_average():
    for progress, kw in ((0.0, dict(baseline=True)), (0.5, dict()), (1.0, dict())):
        taken, nets, _ = outer_step(*TWO, progress=progress, **kw)
        decay = (1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2) ** (1 if kw else 2)
        new, old = nets["backbone"].state_dict(), step_nets()["target"][0].state_dict()
        for k, t in nets["target"][0].state_dict().items():
            close(t, new[k] if "running" in k or "num" in k else decay * old[k] + (1 - decay) * new[k])
        assert all(p.grad is None for p in nets["target"].parameters())


def test_health_terms_tell_collapse_from_spread():
    terms = outer_step(*TWO)[2]
    assert 0 < terms["std_z"] < 1.5 and 0 < terms["entropy_pi"] <= 1 + 1e-12 and -1 <= terms["cos_outer_ssl"] <= 1 and terms["outer_to_ssl"] > 0
    nets = step_nets()
    for p in nets["target"].parameters():
        p.data.zero_()
    args = step_args()
    flat_terms = byol_gessl.train_step(nets, {"encoder": torch.optim.SGD(online(nets).parameters(), 0.0)}, list(TWO), args, 0)
    assert flat_terms["std_z"] == 0 and flat_terms["entropy_pi"] == pytest.approx(1) and flat_terms["loss_kl"].abs() < 1e-12
    assert 0 < byol_gessl.diagnose(step_nets(), list(TWO), args)["alpha_lambda_max"]
