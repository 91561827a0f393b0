"""Oracles for simclr_tc2 derived from the equations: slow loops, closed forms, finite differences, invariants."""
import copy
import math
import weakref
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from simclr_tc2 import (FactorNet, WeightNet, batch_summary, calibrate, factor_loss, gradient_conflict, info_nce,
                        prototypes, query_sse, train_step, update_encoder, update_factors, view_sse,
                        weight_loss)

close, grad = torch.testing.assert_close, torch.autograd.grad
T = 0.5


def randn(*shape, seed=0, train=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(train)


def orthonormal(d, n, seed=0):
    return torch.linalg.qr(randn(d, n, seed=seed))[0]


def seeded(cls, *args, seed=0, **kw):
    torch.manual_seed(seed)
    return cls(*args, **kw).double()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def slow_nce(z, t):
    m, n, _ = z.shape
    rows, total = z.reshape(m * n, -1), 0.0
    for a in range(m * n):
        logit = {b: cos(rows[a], rows[b]) / t for b in range(m * n) if b != a}
        log_denominator = sum(x.exp() for x in logit.values()).log()
        total = total + sum(log_denominator - logit[b] for b in logit if b % n == a % n) / (m - 1)
    return total / (m * n)


def slow_prototypes(z):
    sums = [sum(z[v, i] / z[v, i].norm() for v in range(len(z))) for i in range(z.shape[1])]
    return torch.stack([s / s.norm() for s in sums])


def slow_brier(query, anchors, t):
    (v, n, _), total = query.shape, 0.0
    for q in query:
        for i in range(n):
            e = [(cos(q[i], anchors[j]) / t).exp() for j in range(n)]
            total = total + sum((e[j] / sum(e) - float(i == j)) ** 2 for j in range(n))
    return total / (v * n)


def slow_tc2(z_all, z, W, V):
    """[TC2 Eq. 1] and [TC2 Eq. 2] with V pre-given in the second: sums over features, means over rows."""
    fs, rows, given = range(V.shape[1]), z_all.reshape(-1, z_all.shape[-1]), V.detach()
    orth = sum((V[:, a] @ V[:, b] - float(a == b)) ** 2 for a in fs for b in fs)
    recon = sum((r - sum((r @ V[:, f]) * V[:, f] for f in fs)).square().sum() for r in rows) / len(rows)
    pairs = list(zip(z.reshape(-1, z.shape[-1]), W.reshape(-1, V.shape[1])))
    fit = sum((r - sum(w[f] * given[:, f] for f in fs)).square().sum() + w.abs().sum() for r, w in pairs) / len(pairs)
    return orth + recon, fit


@pytest.mark.parametrize("v", [2, 4])
def test_info_nce_equals_double_loop_in_value_and_gradient(v):
    z = randn(v, 3, 5, train=True)
    fast, slow = info_nce(z, T), slow_nce(z, T)
    close((fast, *grad(fast, z)), (slow, *grad(slow, z)))


@pytest.mark.parametrize("v, n", [(2, 32), (3, 4), (4, 8)])
def test_collapse_is_chance_for_info_nce_and_brier_but_optimal_for_literal_sse(v, n):
    z = randn(5).expand(v, n, 5)
    close(info_nce(z, 0.1).item(), math.log(v * n - 1))
    close(query_sse(z, prototypes(z), 0.1).item(), 1 - 1 / n)
    assert view_sse(z) == 0


def test_info_nce_ignores_sample_order_view_order_and_row_scale():
    z = randn(3, 6, 4)
    for other in (z[:, [3, 0, 5, 1, 2, 4]], z[[2, 0, 1]], z * randn(3, 6, 1, seed=1).exp()):
        close(info_nce(other, T), info_nce(z, T))
    assert (info_nce(torch.stack([z[0], z[1].flip(0), z[2]]), T) - info_nce(z, T)).abs() > 1e-3


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_info_nce_is_finite_and_right_at_temperature_001_in_float32(sign):
    z = torch.eye(6).repeat(2, 1, 1) + 1e-3 * randn(2, 6, 6).float()
    z = torch.stack([z[0], sign * z[1]]).requires_grad_()
    loss = info_nce(z, 0.01)
    close(loss.double(), slow_nce(z.detach().double(), 0.01), rtol=1e-4, atol=1e-4)
    assert grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("v", [1, 3])
def test_query_sse_equals_double_loop_and_trains_queries_and_anchors(v):
    q, a = randn(v, 4, 5, train=True), randn(4, 5, seed=1, train=True)
    fast, slow = query_sse(q, a, T), slow_brier(q, a, T)
    close((fast, *grad(fast, (q, a))), (slow, *grad(slow, (q, a))))


def test_query_sse_gradient_at_uniform_p_is_two_over_n_of_cross_entropy():
    n = 8
    q, a = randn(2, n, 5), randn(5).repeat(n, 1).requires_grad_()
    logits = F.normalize(q, dim=-1) @ F.normalize(a, dim=-1).T / T
    ce = F.cross_entropy(logits.flatten(0, 1), torch.arange(n).repeat(2))
    close(grad(query_sse(q, a, T), a)[0], 2 / n * grad(ce, a)[0])


@pytest.mark.parametrize("n, t", [(4, 0.2), (8, 1.0)])
def test_query_sse_of_perfect_positives_and_orthogonal_negatives(n, t):
    a, p = orthonormal(n, n), math.exp(1 / t) / (math.exp(1 / t) + n - 1)
    close(query_sse(3 * a.expand(2, n, n), a, t).item(), (1 - p) ** 2 + (n - 1) * ((1 - p) / (n - 1)) ** 2)


def test_view_sse_is_the_unnormalised_mean_over_samples_and_view_pairs():
    q, pairs = randn(3, 4, 5), [(0, 1), (0, 2), (1, 2)]
    close(view_sse(q), sum((q[a, i] - q[b, i]).square().sum() for i in range(4) for a, b in pairs) / 12)


def test_prototypes_average_directions_not_lengths():
    z = randn(3, 4, 5)
    close(prototypes(z), slow_prototypes(z))
    close(prototypes(z * randn(3, 4, 1, seed=1).exp()), prototypes(z))


def test_batch_summary_is_mean_over_psd_covariance_detached_and_order_free():
    z = randn(3, 5, 2, 4, train=True)
    rows, S = z.detach().reshape(-1, 4), batch_summary(z)
    close(S, torch.cat([rows.mean(0, keepdim=True), torch.cov(rows.T)]))
    assert not S.requires_grad and torch.linalg.eigvalsh(S[1:]).min() > -1e-12
    close(batch_summary(rows.flip(0)), S)


@pytest.mark.parametrize("d, n_f", [(6, 6), (8, 3)])
def test_factor_net_is_the_positive_diagonal_qr_factor_of_its_column_mlp(d, n_f):
    S, net, raw_net = randn(d + 1, d), seeded(FactorNet, d, n_f), seeded(FactorNet, d, n_f, orthogonal=False)
    raw_net.load_state_dict(net.state_dict())
    V, raw = net(S), raw_net(S)
    close(V.T @ V, torch.eye(n_f, dtype=V.dtype), rtol=0, atol=1e-10)
    R = V.T @ raw
    close((V @ R, R), (raw, R.triu()))
    assert R.diagonal().min() > 0 and torch.equal(V, net(S))


@pytest.mark.parametrize("seed", range(4))
def test_factor_net_is_continuous_in_the_summary(seed):
    """A sign left to the QR routine makes a column of V jump by 2 on these paths."""
    net, a, b = seeded(FactorNet, 8, 4, hidden=32, seed=seed), randn(9, 8, seed=seed), randn(9, 8, seed=seed + 20)
    path = torch.stack([net(a + (b - a) * t) for t in torch.linspace(0, 1, 301)])
    assert path.diff(dim=0).norm(dim=1).max() < 0.2 and (path[-1] - path[0]).norm() > 1e-2
    close(net(a + 1e-9 * b), net(a), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_f, orthogonal", [(3, False), (7, True)])
def test_raw_factor_net_applies_one_mlp_to_every_column(n_f, orthogonal):
    net, S, rest = seeded(FactorNet, 5, n_f, orthogonal=orthogonal), randn(6, 5), [0, 1, 3, 4]
    V, moved = net(S), net(S + torch.eye(5)[2])
    assert V.shape == (5, n_f) and (moved[2] - V[2]).norm() > 1e-3
    close((moved[rest], net(S.flip(1))), (V[rest], V.flip(0)))


def test_weight_net_starts_as_the_projection_and_adds_only_a_function_of_z():
    net, plain, z = seeded(WeightNet, 6, 4), seeded(WeightNet, 6, 4, skip=False), randn(2, 3, 6)
    V, U = randn(6, 4), randn(6, 4, seed=1)
    close(net(z, V), z @ V)
    assert plain(z, V).norm() > 1e-3 and torch.equal(plain(z, V), plain(z, U))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    close(net(z, V) - z @ V, net(z, U) - z @ U)
    assert (net(z, V) - z @ V).norm() > 1e-2
    close(calibrate(z, V, net), torch.einsum("vnf,df->vnd", net(z, V), V))


def test_tc2_losses_equal_slow_loops_in_value_and_gradient():
    """[TC2 Eqs. 1-3] the loop detaches V in Eq. 2, so equal gradients also say that Eq. 2 gives V none."""
    z_all, z, V = randn(3, 4, 5), randn(2, 4, 5, seed=1), randn(5, 3, train=True)
    W = randn(2, 4, 3, seed=2, train=True)
    l_v, l_w = slow_tc2(z_all, z, W, V)
    close((factor_loss(z_all, V), weight_loss(z, W, V)), (l_v, l_w))
    total = factor_loss(z_all, V) + 0.7 * weight_loss(z, W, V)
    close((total, *grad(total, (V, W))), (l_v + 0.7 * l_w, *grad(l_v + 0.7 * l_w, (V, W))))


@pytest.mark.parametrize("n_f", [2, 5, 7])
def test_factor_loss_of_top_eigenvectors_is_the_rest_of_the_spectrum(n_f):
    """[TC2 Eq. 1] zero for the square orthogonal V (n_f = d = 7); unchanged by V -> V R."""
    z = randn(50, 7) * torch.arange(1, 8)
    values, vectors = torch.linalg.eigh(z.T @ z)
    V, expected = vectors[:, -n_f:], values[:7 - n_f].sum() / 50
    for basis in (V, V @ orthonormal(n_f, n_f)):
        close(factor_loss(z, basis), expected, rtol=1e-9, atol=1e-9)
    assert n_f == 7 or factor_loss(z, orthonormal(7, n_f, seed=3)) > expected + 1e-3


def test_factor_loss_with_more_factors_than_dimensions_is_at_least_the_excess():
    """[TC2 Eq. 1] floor n_f - d = 3, reached by orthonormal rows."""
    tight = orthonormal(7, 4).T
    close(factor_loss(randn(10, 4), tight).item(), 3.0)
    assert min(factor_loss(torch.zeros(1, 4).double(), tight + 0.3 * randn(4, 7, seed=s)) for s in range(20)) >= 3


@pytest.mark.parametrize("d, n_f, norm", [(8, 8, 3.0), (8, 3, 3.0), (64, 64, 1.0)])
def test_weight_loss_is_minimal_at_the_soft_threshold(d, n_f, norm):
    """[TC2 Eq. 2] lasso for orthonormal V; for unit-norm z in 64 dimensions the optimum is W = 0."""
    z, V = norm * F.normalize(randn(20, d), dim=1), orthonormal(d, n_f, seed=1)
    a = z @ V
    W = a.sign() * (a.abs() - 0.5).clamp(min=0)
    huber = torch.where(a.abs() > 0.5, a.abs() - 0.25, a.square())  # min over w of (a - w)^2 + |w|
    best = (z.square().sum(1) - a.square().sum(1) + huber.sum(1)).mean()
    close(weight_loss(z, W, V), best)
    assert (W == 0).all() == (norm == 1)
    assert all(weight_loss(z, W + s * randn(20, n_f, seed=i), V) > best for i, s in enumerate([1e-4, 1e-2, 1.0]))


def test_losses_in_factor_space_equal_losses_of_the_calibrated_embedding():
    """W and W V^T have the same cosines when V^T V = I."""
    W, V = randn(3, 4, 5), orthonormal(9, 5, seed=1)
    close((info_nce(W @ V.T, T), query_sse(W[1:] @ V.T, W[0] @ V.T, T)), (info_nce(W, T), query_sse(W[1:], W[0], T)))


class Net(nn.Module):
    """One matrix and a formula."""
    def __init__(self, formula, *shape):
        super().__init__()
        self.formula, self.M = formula, nn.Parameter(0.4 * randn(*shape, seed=5))

    def forward(self, *inputs):
        return self.formula(self.M, *inputs)


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 6, 2, 5)], ids=["vectors", "tokens"])
def test_update_factors_is_two_consecutive_gradient_steps(shape):
    """[TC2 Eqs. 4-5] support step, then a query step from its result; task k = k-th contiguous chunk."""
    lr, lam, m, K, Z, S = 0.05, 0.3, 1, 3, randn(*shape), randn(6, 5, seed=1)
    f, w = Net(lambda A, S: S.T @ A, 6, 3), Net(lambda B, z, V: (z @ B).tanh(), 5, 3)

    def ssl(z_hat, k):
        return (z_hat - k).square().sum() + z_hat.prod(1).sum()

    def query(q, s, k):
        return ((q - s.mean(0)).square() * (k + 1)).sum() + s.cos().sum()

    A, B = (net.M.detach().clone().requires_grad_() for net in (f, w))
    for phase in ("support", "query"):
        V, W, views = S.T @ A, (Z @ B).tanh(), slice(m) if phase == "support" else slice(m, None)
        chunks = [(W @ V.T)[:, 2 * k:2 * k + 2] for k in range(K)]
        task = [ssl(c[:m], k) if phase == "support" else query(c[m:], c[:m], k) for k, c in enumerate(chunks)]
        l_v, l_w = slow_tc2(Z, Z[views], W[views], V)
        g = grad(sum(task) / K + l_v + lam * l_w, (A, B))
        A, B = ((p - lr * d).detach().requires_grad_() for p, d in zip((A, B), g))
    copies = Z.clone(), S.clone()
    terms = update_factors(f, w, torch.optim.SGD([f.M, w.M], lr), Z, S, m, ssl, query, K, lam)
    close((f.M.detach(), w.M.detach()), (A.detach(), B.detach()))
    assert torch.equal(Z, copies[0]) and torch.equal(S, copies[1]) and {"loss_v", "loss_w"} <= set(terms)
    assert not any(torch.as_tensor(t).requires_grad for t in terms.values())


def test_weight_loss_trains_the_weight_net_and_never_the_factor_net():
    """[TC2 Eq. 2] V is pre-given, also inside f_w's skip connection; f_v still learns from Eq. 1 through the QR."""
    def zero(z, *_):
        return 0 * z.sum()

    def train(lam):
        f, w, Z = seeded(FactorNet, 6, 3, hidden=16), seeded(WeightNet, 6, 3, hidden=16), 2 * randn(4, 8, 6)
        opt = torch.optim.SGD([*f.parameters(), *w.parameters()], 0.05 * (lam is not None))
        update_factors(f, w, opt, Z, batch_summary(Z), 2, zero, zero, 2, lam or 0.0)
        return flat(f.parameters()), flat(w.parameters())

    (f0, w0), (f1, w1), (f2, w2) = (train(lam) for lam in (None, 0.0, 5.0))
    close((f2, w1), (f1, w0))
    assert (f1 - f0).norm() > 1e-6 and (w2 - w1).norm() > 1e-6


def test_update_factors_holds_the_graph_of_one_task_at_a_time():
    held, alive = [], []

    def loss(*tensors):
        big = torch.cat([t.flatten() for t in tensors]).repeat(50).exp()                    # exp keeps its result for the backward pass
        held.append(weakref.ref(big))
        alive.append(sum(r() is not None for r in held))
        return big.sum()

    f, w = seeded(FactorNet, 5, 3), seeded(WeightNet, 5, 3)
    opt = torch.optim.SGD([*f.parameters(), *w.parameters()], 0.1)
    update_factors(f, w, opt, randn(4, 8, 5), randn(6, 5, seed=1), 2, lambda z, k: loss(z), lambda q, s, k: loss(q, s), 4, 0.1)
    assert len(alive) == 8 and max(alive) == 1


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("b", [0.0, 0.2])
def test_update_encoder_on_quadratics_without_touching_parameters_or_their_grad(b, second_order):
    """[TC2 Eqs. 6-7] L_s = t'At/2, L_q = t'Bt/2: mean over k of (I-bA) B (I-bA) t, first order B (I-bA) t."""
    A, B = ([M @ M.T for M in randn(3, 4, 4, seed=s)] for s in (0, 1))
    params = {"t": randn(4, seed=2, train=True), "unused": randn(2, 3, train=True)}
    for p in params.values():
        p.grad = torch.full_like(p, 7.0)
    t, I, support_calls = params["t"].detach().clone(), torch.eye(4, dtype=torch.float64), []

    def support(p, k):
        support_calls.append(k)
        return p["t"] @ A[k] @ p["t"] / 2

    grads, _ = update_encoder(params, support, lambda p, k: p["t"] @ B[k] @ p["t"] / 2, 3, b, second_order)
    outer = [I - b * a if second_order else I for a in A]
    close(grads["t"], sum(outer[k] @ B[k] @ (I - b * A[k]) @ t for k in range(3)) / 3)
    assert torch.equal(grads["unused"], torch.zeros(2, 3, dtype=t.dtype)) and not grads["t"].requires_grad
    assert torch.equal(params["t"], t) and all((p.grad == 7).all() for p in params.values())
    assert len(support_calls) == (3 if b else 0)


def test_second_order_equals_central_differences_of_the_adapted_query_loss():
    """[TC2 Eqs. 6-7] float64, softplus convolution with BatchNorm in train mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(3, 4)).double()
    params, x, b, h = dict(net.named_parameters()), randn(2, 2, 6, 2, 4, 4, seed=1), 0.5, 1e-4

    def support(p, k):
        return slow_nce(functional_call(net, p, (x[0, k],)).view(2, 3, 4), T)

    def query(p, k):
        z = functional_call(net, p, (x[1, k],)).view(2, 3, 4)
        return slow_brier(z[:1], z[1], T)

    def objective(p):
        steps = [grad(support(p, k), list(p.values())) for k in range(2)]
        return sum(query({n: p[n] - b * d for n, d in zip(p, g)}, k).item() / 2 for k, g in enumerate(steps))

    exact, first = (update_encoder(params, support, query, 2, b, order)[0] for order in (True, False))
    for seed in range(3):
        u = {n: randn(*p.shape, seed=seed) for n, p in params.items()}
        up, down = (objective({n: (p + s * u[n]).detach().requires_grad_() for n, p in params.items()})
                    for s in (h, -h))
        slope, first_slope = (sum((g[n] * u[n]).sum() for n in u).item() for g in (exact, first))
        assert slope == pytest.approx((up - down) / (2 * h), rel=1e-5) and first_slope != pytest.approx(slope, rel=1e-2)


def test_gradient_conflict_equals_the_pairwise_loop_and_ignores_scale():
    g = randn(5, 7)
    pairs = [cos(g[i], g[j]) for i in range(5) for j in range(i + 1, 5)]
    mean, negative = gradient_conflict(g * torch.tensor([[1.0], [9], [0.1], [5], [2]]))
    assert mean.shape == negative.shape == ()
    close((mean.item(), negative.item()), (sum(pairs).item() / 10, sum(c.item() < 0 for c in pairs) / 10))
    for sign in (1.0, -1.0):
        close(tuple(x.item() for x in gradient_conflict(torch.stack([g[0], sign * g[0]]))), (sign, float(sign < 0)))


def make_nets(norm=True, n_f=4, baseline=False, zero_init=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(4, momentum=0.3) if norm else nn.Identity()
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    nets = nn.ModuleDict({"backbone": backbone, "projector": nn.Linear(16, 6)})
    if not baseline:
        nets["factor_net"], nets["weight_net"] = FactorNet(6, n_f, hidden=16), WeightNet(6, n_f, hidden=16)
        for p in () if zero_init else nets["weight_net"].parameters():
            p.data += 0.2 * torch.randn_like(p)
    return nets.double().train()


def encoder(nets):
    return nn.Sequential(nets["backbone"], nets["projector"])


def factors(nets):
    return nn.Sequential(nets["factor_net"], nets["weight_net"])


def images(batch=0):
    return randn(1, 8, 3, 6, 6, seed=10 + batch) + 0.7 * randn(4, 8, 3, 6, 6, seed=20 + batch)


def run(nets, encoder_lr=1.0, factor_lr=0.0, batches=(0,), **kw):
    """Algorithm 1 with SGD: (what it took off the encoder's parameters, the order of optimizer steps, last terms)."""
    args = Namespace(**{**dict(baseline=False, views=4, tasks=2, temperature=T, inner_lr=0.0, second_order=False,
                               lambda_s=0.1, query_loss="brier", calibrate="both", literal=False, bf16=False, micro_batch=None), **kw})
    order, before = [], flat(encoder(nets).parameters())
    opts = {"encoder": torch.optim.SGD(encoder(nets).parameters(), encoder_lr)}
    if not args.baseline:
        opts["factors"] = torch.optim.SGD(factors(nets).parameters(), factor_lr)
    for name, opt in opts.items():
        opt.register_step_post_hook(lambda *_, name=name: order.append(name))
    for batch in batches:
        terms = train_step(nets, opts, list(images(batch)), args, 0)
    return before - flat(encoder(nets).parameters()), order, terms


def same(a, b):
    close(a, b, rtol=1e-6, atol=1e-9)
    assert a.norm() > 1e-3


def slow_encoder_gradient(net, factor_net, weight_net, calibrated, inner_lr, second_order):
    """Stage 2 for two tasks, two support and two query views; V from the whole batch's embeddings at theta."""
    params, total = dict(net.named_parameters()), 0

    def embed(p, x):
        z = functional_call(net, p, (x.flatten(0, 1),))
        return (z.shape[1] ** 0.5 * z / z.norm(dim=1, keepdim=True)).view(*x.shape[:2], -1)

    rows = embed(params, images()).detach().flatten(0, 1)
    V = factor_net(torch.cat([rows.mean(0, keepdim=True), torch.cov(rows.T)])).detach()
    for x in images().chunk(2, dim=1):
        head = (lambda z: weight_net(z, V) @ V.T) if calibrated else (lambda z: z)
        g = grad(slow_nce(head(embed(params, x[:2])), T), list(params.values()), create_graph=True)
        fast = {n: p - inner_lr * d for (n, p), d in zip(params.items(), g)}
        z = head(embed(fast, x))  # support and query views are one BatchNorm batch at theta_k
        loss = slow_brier(z[2:], slow_prototypes(z[:2]), T)
        total = total + flat(grad(loss, list((params if second_order else fast).values()))) / 2
    return total


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("calibrated, inner_lr", [(True, 0.0), (True, 0.5), (False, 0.5)])
def test_train_step_follows_algorithm_1(calibrated, inner_lr, second_order):
    """[TC2 Eqs. 6-7] theta as before the step, f_v and f_w as stage 1 left them; "none" reads neither of them."""
    nets = make_nets()
    net, mode = copy.deepcopy(encoder(nets)), "both" if calibrated else "none"
    taken, _, terms = run(nets, factor_lr=0.05, inner_lr=inner_lr, second_order=second_order, calibrate=mode)
    same(taken, slow_encoder_gradient(net, nets["factor_net"], nets["weight_net"], calibrated, inner_lr, second_order))
    assert all(t.shape == () and not t.requires_grad for t in terms.values())


@pytest.mark.parametrize("encoder_lr, factor_lr", [(0.0, 0.05), (1.0, 0.0)])
def test_each_stage_trains_only_its_own_networks(encoder_lr, factor_lr):
    """[TC2 Eqs. 4-7] f_v and f_w take a support and a query step, then the encoder takes one."""
    nets, start = make_nets(), make_nets()
    taken, order, _ = run(nets, encoder_lr, factor_lr, inner_lr=0.5)
    assert (taken.norm() > 0) == (encoder_lr > 0) and order == ["factors", "factors", "encoder"]
    for name in ("factor_net", "weight_net"):
        assert torch.equal(flat(nets[name].parameters()), flat(start[name].parameters())) == (factor_lr == 0)


@pytest.mark.parametrize("mode", [dict(factor_lr=0.05, inner_lr=0.5), dict(baseline=True)], ids=["tc2", "baseline"])
def test_no_gradient_is_carried_into_the_next_step(mode):
    """Neither the encoder's own nor one that stage 2 leaves behind for f_v and f_w."""
    nets, other = (make_nets(baseline="baseline" in mode) for _ in range(2))
    run(nets, batches=(0, 1), **mode)
    for batch in (0, 1):
        taken = run(other, batches=(batch,), **mode)[0]
        other.zero_grad()
    assert taken.norm() > 1e-3
    same(flat(nets.parameters()), flat(other.parameters()))


@pytest.mark.parametrize("second_order", [False, True])
def test_fresh_calibration_with_as_many_factors_as_dimensions_is_the_identity(second_order):
    """Zero-initialised f_w, n_f = d: TC2's encoder gradient is uncalibrated MAML's."""
    same(*(run(make_nets(n_f=6, zero_init=True), inner_lr=0.5, second_order=second_order, calibrate=mode)[0]
           for mode in ("both", "none")))


def test_mixed_calibration_is_the_mean_of_the_raw_and_the_calibrated_loss():
    mix, none, both = (run(make_nets(), calibrate=mode)[0] for mode in ("mix", "none", "both"))
    same(mix, (none + both) / 2)


@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("mode, first", [(dict(baseline=True), 0), (dict(query_loss="nce", calibrate="none"), 2)],
                         ids=["baseline", "maml without inner step"])
def test_gradient_is_info_nce_averaged_over_groups(mode, first, tasks):
    """The baseline: all views, one BatchNorm batch; MAML's outer loss: the query views (no BatchNorm here)."""
    nets = make_nets(norm=first == 0, baseline=first == 0)
    net = copy.deepcopy(encoder(nets))
    groups = net(images()[first:].flatten(0, 1)).view(-1, 8, 6).chunk(tasks, dim=1)
    expected = grad(sum(slow_nce(g, T) for g in groups) / tasks, list(net.parameters()))
    same(run(nets, tasks=tasks, **mode)[0], flat(expected))


@pytest.mark.parametrize("mode", [dict(), dict(calibrate="none", second_order=True), dict(baseline=True)],
                         ids=["tc2", "maml", "baseline"])
def test_batchnorm_buffers_move_once_per_step_with_the_whole_batch(mode):
    nets, old = make_nets(baseline="baseline" in mode), randn(4)
    conv, bn = nets["backbone"][:2]
    bn.running_mean.copy_(old)
    h = conv(images().flatten(0, 1)).detach().transpose(0, 1).flatten(1)
    run(nets, inner_lr=0.5, **mode)
    assert bn.num_batches_tracked == 1 and bn.track_running_stats and bn.training
    close((bn.running_mean, bn.running_var), (0.7 * old + 0.3 * h.mean(1), 0.7 + 0.3 * h.var(1)))
