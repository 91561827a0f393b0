"""results/combinations.py: an enhancement of one script on the base method of another.

What an adapter can get wrong is the base: its loss, its views, its moving average. So each
combination is compared, in float64 and with plain gradient descent, with the base's own step where
the enhancement does nothing, and with a slow step on copies of the network where it does. PCGrad,
GradVac and GradDrop are compared with loops over numbers from the papers' algorithms.
"""
import copy
import functools
import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import barlow_sparsehead
import byol_gessl
import common
import simclr_tc2
from conftest import ROOT, checkpoint, losses, same

spec = importlib.util.spec_from_file_location("combinations", f"{ROOT}/results/combinations.py")
combinations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(combinations)

close = torch.testing.assert_close
LR = 0.1
each_pair = pytest.mark.parametrize("pair", list(combinations.COMBINATIONS), ids="_".join)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test has a folder of its own; pictures take longer than the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "plot_curves", print)
    monkeypatch.setattr(common, "draw_grid", print)


def combine(pair, *flags, steps=2, out="r"):
    combinations.main([*pair, "--data", "fake", "--arch", "resnet_tiny", "--batch-size", "32",
                       "--image-size", "8", "--epochs", "1", "--warmup-epochs", "0",
                       "--log-every", "1", "--max-steps", str(steps), "--device", "cpu",
                       "--workers", "0", "--out", out, *flags])


def settings_of(out):
    with open(f"{out}/log.jsonl") as file:
        return json.loads(file.readline())["settings"]


# ---- through main --------------------------------------------------------------------------------
@each_pair
def test_two_steps_leave_a_run_and_finite_terms(pair):
    base = combinations.BASES[pair[0]]
    own = base.train_step
    combine(pair)
    assert base.train_step is own                       # the script is itself again
    with open("r/log.jsonl") as file:                   # the log has the whole command
        assert json.loads(file.readline())["argv"][:3] == [*pair, "--data"]
    rows = losses("r")
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    terms = [row for row in rows if "lr" in row]
    assert [row["step"] for row in terms] == [1, 2]
    expected = {"tc2": {"loss_query", "loss_support", "loss_v", "loss_w", "inner_step"},
                "gessl": {"loss_ssl", "loss_kl", "curvature", "outer_to_ssl"},
                "sparsehead": {"loss_ssl", "loss_sparse", "live_columns"}}
    rival = {"loss_ssl", "conflict_cos", "length_kept"}
    assert expected.get(pair[1], rival) | {"std_z"} <= set(terms[0])
    assert settings_of("r")["script"] == "_".join(pair)
    backbone = torch.load("r/backbone.pt", weights_only=True)
    common.make_backbone("resnet_tiny", 8)[0].load_state_dict(backbone["state_dict"])


@pytest.mark.parametrize("pair", [("byol", "tc2"), ("simclr", "gradvac"), ("simclr", "pcgrad")],
                         ids="_".join)
def test_a_resumed_run_equals_an_uninterrupted_one(pair):
    flags = ("--tasks", "4")
    combine(pair, *flags, steps=3, out="whole")
    combine(pair, *flags, steps=1, out="parts")
    combine(pair, *flags, steps=3, out="parts")
    assert same(checkpoint("whole"), checkpoint("parts"))


def test_flags_of_the_enhancement_and_of_the_base_arrive():
    combine(("byol", "tc2"), "--tasks", "2", "--inner-lr", "0.5", "--ema-decay", "0.9", steps=1)
    settings = settings_of("r")
    found = [settings[name] for name in ("tasks", "inner_lr", "lambda_s", "ema_decay")]
    assert found == [2, 0.5, 0.1, 0.9]


def test_out_is_named_after_both(monkeypatch):
    def note(args, data, world):
        common.fail(args.out)

    monkeypatch.setattr(byol_gessl, "check_args", note)
    for flags, expected in (((), "runs/byol_tc2"), (("--out", "x"), "x")):
        with pytest.raises(SystemExit):
            combinations.main(["byol", "tc2", "--data", "fake", *flags, "--device", "cpu"])
        functions = combinations.replacements("byol", "tc2", {"tasks": 4})
        args = byol_gessl.parse_args(["--data", "fake", "--baseline", *flags])
        data = common.load_data("fake")
        functions["fill_defaults"](args, data, torch.device("cpu"))
        assert len(functions["view_augmentations"](args, data)) == 4
        assert (args.out, args.script) == (expected, "byol_tc2")


@pytest.mark.parametrize("argv, word", [
    ([], "nothing"), (["byol"], "byol"), (["byol", "gessl"], "byol gessl"),
    (["tc2", "byol"], "simclr graddrop"), (["byol", "tc2", "--baseline"], "--baseline"),
    (["simclr", "gessl", "--data", "fake", "--views", "3"], "--views 2"),
    (["simclr", "gessl", "--data", "fake", "--inner-lr", "0"], "--inner-lr"),
    (["simclr", "pcgrad", "--data", "fake", "--tasks", "1"], "--tasks 1"),
    (["byol", "tc2", "--tasks", "0"], "--tasks"), (["byol", "tc2", "--inner-lr", "-1"], "-1"),
    (["byol", "tc2", "--data", "fake", "--batch-size", "30"], "--batch-size 30"),
    (["byol", "tc2", "--data", "fake", "--batch-size", "4"], "--batch-size 4"),
    (["simclr", "pcgrad", "--nothing", "1"], "--nothing")])
def test_bad_input_ends_in_one_sentence(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        combinations.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error


def test_tasks_of_gessl_are_batches_of_their_own_and_do_not_split_one():
    combine(("simclr", "gessl"), "--batch-size", "8", "--tasks", "3", steps=1)
    assert settings_of("r")["images_per_step"] == 24


def test_several_processes_are_refused(capsys):
    check = combinations.replacements("byol", "tc2", {"tasks": 4})["check_args"]
    with pytest.raises(SystemExit):
        check(None, None, 2)
    assert "2 processes" in capsys.readouterr().err


# ---- steps in float64 ----------------------------------------------------------------------------
def make(pair, *flags, n=8, **changes):
    """(nets, plain gradient descent, views, args) of a combination, in float64."""
    base = combinations.BASES[pair[0]]
    _, defaults = combinations.COMBINATIONS[pair]
    functions = combinations.replacements(*pair, {**defaults, **changes})
    args = base.parse_args(["--data", "fake", "--arch", "resnet_tiny", "--image-size", "8",
                            "--baseline", "--batch-size", str(n), *flags])
    data = common.load_data("fake", 8)
    functions["fill_defaults"](args, data, torch.device("cpu"))
    recipes = functions["view_augmentations"](args, data)
    torch.manual_seed(0)
    nets = functions["build_nets"](args).double()
    opts = functions["build_opts"](nets, args)
    params = [p for group in opts["encoder"].param_groups for p in group["params"]]
    opts["encoder"] = torch.optim.SGD(params, LR)
    n_views = args.images_per_step
    views = torch.randn(len(recipes), n_views, 3, 8, 8, generator=common.rng("views"),
                        dtype=torch.float64)
    return nets, opts, views, args


def step_of(pair):
    return combinations.COMBINATIONS[pair][0]


def assert_same_nets(found, expected, but=()):
    for name, value in expected.state_dict().items():
        if not name.startswith(but):
            close(found.state_dict()[name], value)


@pytest.mark.parametrize("pair, flags", [
    (("simclr", "sparsehead"), ()), (("simclr", "sparsehead"), ("--tasks", "2")),
    (("byol", "sparsehead"), ())])
def test_sparsehead_adds_the_penalty_of_the_last_layer_and_nothing_else(pair, flags):
    nets, opts, views, args = make(pair, *flags, lambda_sparse=0.0)
    plain = copy.deepcopy(nets)
    params = [p for p in plain.parameters() if p.requires_grad]
    combinations.BASES[pair[0]].train_step(plain, {"encoder": torch.optim.SGD(params, LR)}, views,
                                           args, 0.3)
    before = copy.deepcopy(nets)
    terms = step_of(pair)(nets, opts, views, args, 0.3)
    assert_same_nets(nets, plain)

    # With a weight: W alone moves otherwise, by the slope of the sum of column norms.
    sparse, opts, views, args = make(pair, *flags, lambda_sparse=0.2)
    step_of(pair)(sparse, opts, views, args, 0.3)
    name = "projector.weight" if pair[0] == "simclr" else "projector.3.weight"
    assert_same_nets(sparse, plain, but=(name, "target"))
    W = before.state_dict()[name].clone().requires_grad_()
    rows = W / W.square().sum(1, keepdim=True).sqrt()
    penalty = sum(rows[:, j].square().sum().sqrt() for j in range(rows.shape[1]))
    penalty.backward()
    close(sparse.state_dict()[name], plain.state_dict()[name] - LR * 0.2 * W.grad)
    close(terms["loss_sparse"], penalty.detach())


def test_gessl_without_a_target_is_simclr():
    nets, opts, views, args = make(("simclr", "gessl"), tasks=1, target_steps=0)
    plain = copy.deepcopy(nets)
    optimizer = torch.optim.SGD(plain.parameters(), LR)
    args_of_base = copy.copy(args)
    terms = simclr_tc2.train_step(plain, {"encoder": optimizer}, views, args_of_base, 0)
    found = combinations.simclr_gessl(nets, opts, views, args, 0)
    assert_same_nets(nets, plain)
    close(found["loss_ssl"], terms["loss_ssl"])
    close(found["loss_kl"], torch.zeros_like(found["loss_kl"]))


def test_gessl_on_simclr_equals_a_step_through_the_unrolled_graph(monkeypatch):
    """With exact second derivatives in place of finite differences, which are coarse here."""
    exact = functools.partial(byol_gessl.gessl_task, hypergrad="exact")
    monkeypatch.setattr(combinations, "gessl_task", exact)
    nets, opts, views, args = make(("simclr", "gessl"), n=4, inner_lr=0.02)
    slow = copy.deepcopy(nets)
    encoder = nn.Sequential(slow["backbone"], slow["projector"])
    names = [name for name, _ in encoder.named_parameters()]
    theta = list(encoder.parameters())

    def outputs(weights, x):
        z = torch.func.functional_call(encoder, dict(zip(names, weights)), (x.flatten(0, 1),))
        z1, z2 = F.normalize(z, dim=1).chunk(2)
        logits = torch.cat([z1 @ z2.T, z2 @ z1.T]) / args.temperature
        return simclr_tc2.info_nce(torch.stack([z1, z2]), args.temperature), logits

    def descend(weights, x):
        grads = torch.autograd.grad(outputs(weights, x)[0], weights, create_graph=True)
        return [p - args.inner_lr * g for p, g in zip(weights, grads)]

    total = 0
    for x in (views[:, :4], views[:, 4:]):
        adapted = descend(theta, x)
        target = adapted
        for _ in range(3):
            target = descend(target, x)
        q = outputs(target, x)[1].softmax(1).detach()
        log_p = outputs(adapted, x)[1].log_softmax(1)
        kl = (q * (q.log() - log_p)).sum(1).mean()
        total = total + (kl + outputs(theta, x)[0]) / 2
    grads = torch.autograd.grad(total, theta)

    combinations.simclr_gessl(nets, opts, views, args, 0)
    moved = nn.Sequential(nets["backbone"], nets["projector"]).parameters()
    found = torch.cat([(old - new).flatten() / LR for old, new in zip(theta, moved)])
    expected = torch.cat([g.flatten() for g in grads])
    close(found, expected)


@each_pair
def test_each_parameter_belongs_to_one_optimizer(pair):
    nets, opts, _, _ = make(pair)
    held = [id(p) for opt in opts.values() for group in opt.param_groups for p in group["params"]]
    trained = {id(p) for p in nets.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == trained


# ---- TC2 on BYOL and Barlow Twins ----------------------------------------------------------------
def slow_outputs(nets, x, calibrated):
    """Projections at norm sqrt(d), calibrated and predicted, of two views x (2, n, 3, H, W)."""
    z = F.normalize(nets["projector"](nets["backbone"](x.flatten(0, 1))), dim=1)
    z = calibrated(z * z.shape[1] ** 0.5)
    if "predictor" in nets:
        z = nets["predictor"](z)
    return z.chunk(2)


def slow_loss(nets, before, x, z_target, calibrated, args):
    a, b = slow_outputs(nets, x, calibrated)
    if "predictor" not in nets:
        a = (a - a.mean(0)) / (a.var(0, unbiased=False) + 1e-5).sqrt()
        b = (b - b.mean(0)) / (b.var(0, unbiased=False) + 1e-5).sqrt()
        C = a.T @ b / len(a)
        identity = torch.eye(len(C), dtype=C.dtype)
        off = args.lambda_offdiag * (1 - identity)
        return ((C - identity) ** 2 * (identity + off)).sum()
    unit = [F.normalize(rows, dim=1) for rows in (a, b, *z_target)]
    squares = (unit[0] - unit[3]).square().sum(1) + (unit[1] - unit[2]).square().sum(1)
    return squares.mean() / 2


@pytest.mark.parametrize("bf16, inside", [(True, torch.bfloat16), (False, torch.float32)])
def test_tc2_passes_the_predictor_in_the_precision_of_plain_byol(bf16, inside):
    """Losses are float32 in both."""
    nets = {"backbone": nn.Identity(), "projector": nn.Identity(), "predictor": nn.Linear(8, 8)}
    seen = []

    def note(module, inputs, output):
        seen.append(output.dtype)

    nets["predictor"].register_forward_hook(note)
    p = combinations.Online(nets, bf16).predict(torch.ones(2, 3, 8))
    assert seen == [inside] and p.dtype == torch.float32 and p.shape == (2, 3, 8)


@pytest.mark.parametrize("inner_lr", [0.0, 0.05])
@pytest.mark.parametrize("base", ["byol", "barlow"])
def test_tc2_equals_slow_steps_on_copies_of_the_network(base, inner_lr):
    pair = (base, "tc2")
    # With more dimensions than rows S is singular, and the QR of V is at the mercy of rounding.
    flags = ("--dim", "16") if base == "barlow" else ()
    nets, opts, views, args = make(pair, *flags, tasks=2, inner_lr=inner_lr)
    before = copy.deepcopy(nets)
    terms = step_of(pair)(nets, opts, views, args, 0.25)
    assert not same(nets["factor_net"].state_dict(), before["factor_net"].state_dict())
    assert not same(nets["weight_net"].state_dict(), before["weight_net"].state_dict())

    # Lines 2-3: the summary of all embeddings, one pass.
    first = copy.deepcopy(before)
    batch = torch.cat([views[:, :4].flatten(0, 1), views[:, 4:].flatten(0, 1)])
    Z = F.normalize(first["projector"](first["backbone"](batch)), dim=1)
    Z = Z.detach() * Z.shape[1] ** 0.5
    V = nets["factor_net"](torch.cat([Z.mean(0)[None], Z.T.cov()])).detach()

    def calibrated(z):
        return nets["weight_net"](z, V) @ V.T

    # BYOL's target of all views, in one pass.
    z_target = None
    if base == "byol":
        z_target = before["target"](batch).detach().unflatten(0, (2, 4, 4))

    total = [torch.zeros_like(p) for p in before.parameters()]
    queries = []
    for k, x in enumerate((views[:, :4], views[:, 4:])):
        adapted = copy.deepcopy(before).requires_grad_()
        adapted["factor_net"].requires_grad_(False)
        targets = [None, None]
        if base == "byol":
            targets = [z_target[k, :2], z_target[k, 2:]]
        slow_loss(adapted, before, x[:2], targets[0], calibrated, args).backward()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.grad is not None:
                    p -= inner_lr * p.grad
                p.grad = None
        query = slow_loss(adapted, before, x[2:], targets[1], calibrated, args)
        query.backward()
        queries.append(query.detach())
        for sum_, p in zip(total, adapted.parameters()):
            if p.grad is not None:
                sum_ += p.grad / 2
    close(terms["loss_query"], torch.stack(queries).mean())

    with torch.no_grad():
        for p, g in zip(before.parameters(), total):
            p -= LR * g
    fixed = ("factor_net", "weight_net")
    running = [name for name in nets.state_dict() if "running" in name or "num_batches" in name]
    assert_same_nets(nets, before, but=(*fixed, "target", *running))
    # BatchNorm's statistics are those of the one pass over all views.
    for name in running:
        if name.startswith(("backbone", "projector")):
            close(nets.state_dict()[name], first.state_dict()[name])

    if base == "byol":
        decay = 1 - (1 - args.ema_decay) * (math.cos(math.pi * 0.25) + 1) / 2
        online = nn.Sequential(nets["backbone"], nets["projector"])
        old = before["target"].parameters()
        for new, xi, theta in zip(nets["target"].parameters(), old, online.parameters()):
            close(new, decay * xi + (1 - decay) * theta)


def test_tc2_without_calibration_or_inner_step_is_barlow_twins():
    nets, opts, views, args = make(("barlow", "tc2"), tasks=1, inner_lr=0.0)
    d = args.dim
    nets["factor_net"] = simclr_tc2.FactorNet(d, d).double()        # square: V V^T = I
    nets["weight_net"] = simclr_tc2.WeightNet(d, d).double()
    factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
    opts["factors"] = torch.optim.SGD(factors, 0.0)
    # The norm of z is the only difference left: a projector whose rows have it already.
    nets["projector"] = nn.Sequential(nets["projector"], UnitRows())

    plain = copy.deepcopy(nets)
    _, z = slow_base(plain, views[2:])
    loss = barlow_sparsehead.barlow_loss(z[0], z[1], args.lambda_offdiag)
    loss.backward()
    with torch.no_grad():
        for p in plain.parameters():
            if p.grad is not None:
                p -= LR * p.grad
    terms = combinations.barlow_tc2(nets, opts, views, args, 0)
    close(terms["loss_query"], loss.detach())
    for p, q in zip(nets.parameters(), plain.parameters()):
        close(p, q)


class UnitRows(nn.Module):
    def forward(self, z):
        return F.normalize(z, dim=1) * z.shape[1] ** 0.5


def slow_base(nets, x):
    r = nets["backbone"](x.flatten(0, 1))
    return r, nets["projector"](r).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("base", ["byol", "barlow"])
def test_factors_and_network_are_judged_by_the_same_losses(base):
    """With BatchNorm at fixed statistics and no step in between, Eqs. 4-5 and 6-7 agree."""
    pair = (base, "tc2")
    nets, opts, views, args = make(pair, tasks=2, inner_lr=0.0)
    nets.eval()
    factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
    opts["factors"] = torch.optim.SGD(factors, 0.0)
    terms = step_of(pair)(nets, opts, views, args, 0)
    close(terms["loss_factors_support"], terms["loss_support"])
    close(terms["loss_factors_query"], terms["loss_query"])
    assert (terms["loss_support"] - terms["loss_query"]).abs() > 1e-3


# ---- PCGrad, GradVac, GradDrop -------------------------------------------------------------------
def gradients(K, P=6, seed=0):
    return torch.randn(K, P, generator=common.rng("gradients", seed), dtype=torch.float64)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def order_of(i, K, generator):
    return [j for j in torch.randperm(K, generator=generator).tolist() if j != i]


def slow_pcgrad(G, generator):
    """PCGrad's Algorithm 1 on lists of numbers: the projected gradients."""
    G = G.tolist()
    projected = []
    for i, row in enumerate(G):
        g = list(row)
        for j in order_of(i, len(G), generator):
            if dot(g, G[j]) < 0:
                factor = dot(g, G[j]) / dot(G[j], G[j])
                g = [x - factor * y for x, y in zip(g, G[j])]
        projected.append(g)
    return torch.tensor(projected, dtype=torch.float64)


def slow_gradvac(G, generator, target):
    """GradVac's Algorithm 1: (changed gradients, new targets)."""
    G = G.tolist()
    target = target.tolist()
    changed = []
    for i, row in enumerate(G):
        g = list(row)
        for j in order_of(i, len(G), generator):
            norm = math.sqrt(dot(g, g))
            norm_j = math.sqrt(dot(G[j], G[j]))
            phi = dot(g, G[j]) / (norm * norm_j)
            aim = target[i][j]
            if phi < aim:
                a = norm * (aim * math.sqrt(1 - phi ** 2) - phi * math.sqrt(1 - aim ** 2))
                a /= norm_j * math.sqrt(1 - aim ** 2)
                g = [x + a * y for x, y in zip(g, G[j])]
            target[i][j] = 0.99 * aim + 0.01 * phi
        changed.append(g)
    return torch.tensor(changed, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_pcgrad_and_gradvac_equal_the_papers_loops(K):
    for seed in range(10):
        G = gradients(K, seed=seed)
        expected = slow_pcgrad(G, common.rng(seed))
        close(combinations.pcgrad(G, common.rng(seed)), expected.mean(0))
        target = torch.rand(K, K, generator=common.rng("t", seed), dtype=torch.float64) - 0.3
        expected, new = slow_gradvac(G, common.rng(seed), target)
        close(combinations.gradvac(G, common.rng(seed), target), expected.mean(0))
        close(target, new)


def test_two_tasks_after_pcgrad_do_not_conflict_and_others_are_left_alone():
    conflicts = 0
    for seed in range(20):
        G = gradients(2, seed=seed)
        mean = combinations.pcgrad(G, common.rng(0))
        if torch.dot(*G) >= 0:
            close(mean, G.mean(0))
            continue
        conflicts += 1
        # g_1' + g_2' with g_1' orthogonal to g_2, and g_2' to g_1.
        assert torch.dot(mean, G[0]) > 0 and torch.dot(mean, G[1]) > 0
        close(torch.dot(2 * mean, G[0]), G[0].square().sum() - torch.dot(*G) ** 2
              / G[1].square().sum())
    assert 5 < conflicts < 15


def test_gradvac_at_target_zero_is_pcgrad_and_at_another_reaches_it():
    for seed in range(10):
        G = gradients(2, seed=seed)
        zero = torch.zeros(2, 2, dtype=torch.float64)
        pcgrad = combinations.pcgrad(G, common.rng(0))
        close(combinations.gradvac(G, common.rng(0), zero), pcgrad)
        # Aim for one task only: the other row's target is lower than any cosine.
        target = torch.tensor([[0, 0.9], [-0.999, 0]], dtype=torch.float64)
        changed = 2 * combinations.gradvac(G, common.rng(0), target) - G[1]
        close(F.cosine_similarity(changed, G[1], dim=0), torch.tensor(0.9, dtype=torch.float64))


def test_graddrop_keeps_one_sign_per_coordinate_in_the_papers_share():
    G = gradients(3, P=20)
    agree = (G > 0).all(0) | (G < 0).all(0)
    assert agree.any() and not agree.all()
    draws = torch.stack([combinations.graddrop(G, common.rng(i)) for i in range(2000)])
    close(draws[:, agree], G.mean(0)[agree].expand(2000, -1))

    positive = G.clamp(min=0).mean(0)
    negative = G.clamp(max=0).mean(0)
    for j in (~agree).nonzero()[:, 0].tolist():
        values = draws[:, j]
        is_positive = torch.isclose(values, positive[j])
        assert (is_positive | torch.isclose(values, negative[j])).all()
        share = positive[j] / (positive[j] - negative[j])           # P = (1 + sum / sum ||) / 2
        assert abs(is_positive.double().mean() - share) < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("rival", ["pcgrad", "gradvac", "graddrop"])
def test_a_rival_that_finds_no_conflict_is_simclr_plus_t(rival):
    """Two groups of the same images do not conflict: the step is that of SimCLR+T."""
    pair = ("simclr", rival)
    nets, opts, views, args = make(pair, n=4)
    views = torch.cat([views, views], dim=1)
    plain = copy.deepcopy(nets)
    params = [*plain["backbone"].parameters(), *plain["projector"].parameters()]
    simclr_tc2.train_step(plain, {"encoder": torch.optim.SGD(params, LR)}, views, args, 0)
    terms = step_of(pair)(nets, opts, views, args, 0)
    assert_same_nets(nets, plain, but=("similarities",))
    close(terms["conflict_cos"], torch.ones_like(terms["conflict_cos"]))
    close(terms["length_kept"], torch.ones_like(terms["length_kept"]))


def test_draws_of_a_rival_are_a_function_of_seed_and_step():
    found = []
    for seed, progress in (("0", 0), ("0", 0), ("0", 0.5), ("1", 0)):
        nets, opts, views, args = make(("simclr", "graddrop"), "--seed", seed)
        combinations.simclr_graddrop(nets, opts, views, args, progress)
        found.append(nets["projector"].weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_a_rival_gets_the_gradients_of_the_groups():
    pair = ("simclr", "pcgrad")
    nets, opts, views, args = make(pair, n=8)
    slow = copy.deepcopy(nets)
    params = list(slow.parameters())
    _, z = slow_base(slow, views)
    losses_ = [simclr_tc2.info_nce(z[:, :4], args.temperature),
               simclr_tc2.info_nce(z[:, 4:], args.temperature)]
    rows = []
    for loss in losses_:
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))

    def first_alone(G, generator):
        return G[0]

    combinations.conflict_step(nets, opts, views, args, 0, first_alone)
    moved = torch.cat([(p - q).flatten() for p, q in zip(params, nets.parameters())])
    close(moved, LR * rows[0])
