"""What only training shows: the paper's words collapse where the defaults do not, TC2 and GeSSL carry other base losses, the probe measures."""
import types

import torch
from torch import nn

import byol_gessl
import common
import eval_linear
import simclr_tc2


def small_encoder():
    layer = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layer(3, 16), *layer(16, 32), *layer(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(steps, *flags):
    """Terms of the last step of a run on drawn shapes with 16 images per task."""
    args = simclr_tc2.parse_args([*flags])
    data = common.load_data("shapes")
    common.resolve(args, simclr_tc2.RECIPES, data, "x")
    simclr_tc2.check_args(args, data, 1)
    torch.manual_seed(0)
    nets = simclr_tc2.build_nets(args)[0]
    nets["backbone"] = small_encoder()
    opts = simclr_tc2.build_opts(nets, args)
    views = common.training_views(data, [simclr_tc2.WEAK] * args.views, 32, args.batch_size, 0, 0, 1, torch.device("cpu"), 0, 0, steps)
    for batch in views:
        terms = simclr_tc2.train_step(nets, opts, batch, args, 0)
    return {k: v.item() for k, v in terms.items()}


def test_the_papers_words_collapse_where_the_defaults_do_not():
    literal, default = train(80, "--literal"), train(80)
    assert literal["loss_query"] < 1e-3 and literal["std_z"] < 0.25 and abs(literal["loss_support"] - torch.tensor(31.0).log()) < 0.05  # log(2 n - 1)
    assert default["std_z"] > 0.7 and default["loss_support"] < 2.9 and default["loss_query"] < 0.85


def barlow(z, k=0):
    """Barlow Twins' loss of the first two views of z (m, n, d)."""
    a, b = (v.sub(v.mean(0)).div(v.std(0) + 1e-5) for v in z[:2])
    c = a.T @ b / len(a)
    return (c.diagonal() - 1).square().sum() + 0.05 * (c - torch.diag(c.diagonal())).square().sum()


def test_gessl_carries_other_base_losses():
    """The KL alone, without the SSL gradient, lowers the SSL loss from random weights: SimCLR's with the views as anchors of each other, and Barlow Twins'."""
    ssl_losses = {"simclr": lambda z: simclr_tc2.info_nce(z.unflatten(0, (2, -1)), 0.5), "barlow": lambda z: barlow(z.unflatten(0, (2, -1)))}
    for name, ssl_loss in ssl_losses.items():
        torch.manual_seed(0)
        net, n, losses = nn.Sequential(small_encoder(), nn.Linear(64, 16)), 32, []
        names, theta = zip(*net.named_parameters())
        opt, alpha = torch.optim.Adam(theta, 2e-3), 0.05 if name == "simclr" else 0.002
        def forward(params):
            with common.batch_stats_only(net):
                return torch.func.functional_call(net, dict(zip(names, params)), (x,))
        for a, b in common.training_views(common.load_data("shapes"), [simclr_tc2.WEAK] * 2, 32, n, 0, 0, 1, torch.device("cpu"), 0, 0, 60):
            x = torch.cat([a, b])
            gradient, _, terms = byol_gessl.gessl_task(forward, ssl_loss, lambda z: byol_gessl.class_logits(z, z, 0.5), list(theta), 1, 3, alpha, "fd")
            for p, g in zip(theta, gradient):
                p.grad = g
            opt.step()
            losses.append(terms["loss_ssl"].item())
        first, last = sum(losses[:5]) / 5, sum(losses[-10:]) / 10
        assert last < (first - 0.3 if name == "simclr" else 0.9 * first), (name, first, last)


def test_tc2_carries_another_base_loss():
    """Barlow Twins' cross-correlation in place of InfoNCE: the block between the fences knows neither SimCLR nor the flags."""
    torch.manual_seed(0)
    encoder, factor_net, weight_net = nn.Sequential(small_encoder(), nn.Linear(64, 16)), simclr_tc2.FactorNet(16, 8), simclr_tc2.WeightNet(16, 8)
    opt, factor_opt = torch.optim.Adam(encoder.parameters(), 2e-3), torch.optim.Adam([*factor_net.parameters(), *weight_net.parameters()], 3e-3)
    losses = []
    for views in common.training_views(common.load_data("shapes"), [simclr_tc2.WEAK] * 4, 32, 64, 0, 0, 1, torch.device("cpu"), 0, 0, 40):
        x, n = torch.stack(views), 32
        with torch.no_grad():
            Z = encoder(x.flatten(0, 1)).unflatten(0, (4, 64))
        S = simclr_tc2.batch_summary(Z)
        simclr_tc2.update_factors(factor_net, weight_net, factor_opt, Z, S, 2, barlow, lambda q, s, k: barlow(q), 2, 0.1)
        V = factor_net(S).detach()
        def task_loss(views, params, k):
            z = torch.func.functional_call(encoder, params, (x[views, k * n:(k + 1) * n].flatten(0, 1),)).unflatten(0, (2, n))
            return barlow(simclr_tc2.calibrate(z, V, weight_net))
        params = dict(encoder.named_parameters())
        with common.batch_stats_only(encoder):
            grads, terms = simclr_tc2.update_encoder(params, lambda p, k: task_loss(slice(0, 2), p, k), lambda p, k: task_loss(slice(2, 4), p, k), 2, 0.01, False)
        for name, p in params.items():
            p.grad = grads[name]
        opt.step()
        losses.append(terms["loss_query"].item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


# ---- the frozen probe -----------------------------------------------------------------------------------------------
PROBE = types.SimpleNamespace(probe_epochs=1500, seed=0, sweep=False)


def clusters(n, classes=6, spread=0.3, seed=0):
    y = torch.arange(n) % classes
    return 4 * torch.eye(classes, 12)[y] + spread * torch.randn(n, 12, generator=common.rng(seed)), y


def test_probe_is_full_on_separable_clusters_and_chance_on_random_labels():
    train_set, test_set = clusters(600), clusters(300, seed=1)
    found = eval_linear.linear(train_set, test_set, PROBE)
    assert found["top1"] == found["top5"] == found["train_top1"] == 100 and eval_linear.knn(train_set, test_set)["k5_euclidean"] == 100
    noise = lambda y, seed: y[torch.randperm(len(y), generator=common.rng(seed))]
    chance = eval_linear.linear((train_set[0], noise(train_set[1], 2)), (test_set[0], noise(test_set[1], 3)), PROBE)
    assert abs(chance["top1"] - 100 / 6) < 4 * 100 * (5 / 36 / 300) ** 0.5


def test_probe_agrees_with_logistic_regression_solved_to_the_end():
    (x, y), (test_x, test_y) = clusters(600, spread=2.5), clusters(2000, spread=2.5, seed=1)
    solved = nn.Linear(12, 6)
    opt = torch.optim.LBFGS(solved.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(solved(x), y)
        loss.backward()
        return loss
    opt.step(closure)
    reference = 100 * (solved(test_x).argmax(1) == test_y).float().mean().item()
    assert 60 < reference < 99 and abs(eval_linear.linear((x, y), (test_x, test_y), types.SimpleNamespace(probe_epochs=4000, seed=0, sweep=False))["top1"] - reference) < 1


def test_test_labels_change_nothing_but_the_score():
    train_set, (x, y) = clusters(300, spread=2.0), clusters(200, spread=2.0, seed=1)
    for args in (PROBE, types.SimpleNamespace(probe_epochs=20, seed=0, sweep=True)):
        a, b = (eval_linear.linear(train_set, (x, labels), args) for labels in (y, y.flip(0)))
        assert a["top1"] != b["top1"] and all(a[k] == b[k] for k in a if k not in ("top1", "top5"))


def test_sweep_chooses_on_held_out_training_images_and_prints_the_grid(capsys):
    train_set, test_set = clusters(600, spread=2.5), clusters(2000, spread=2.5, seed=1)
    found = eval_linear.linear(train_set, test_set, types.SimpleNamespace(probe_epochs=3, seed=0, sweep=True))
    scores = {tuple(float(line.split()[i]) for i in (2, 5)): float(line.split()[6]) for line in capsys.readouterr().out.splitlines()}
    assert len(scores) == len(eval_linear.PROBE_GRID) and scores[found["lr"], found["weight_decay"]] == max(scores.values()) > min(scores.values())


def test_a_frozen_protocol_leaves_the_backbone_alone_to_the_bit():
    backbone, _ = common.make_backbone("resnet_tiny", 32)
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    x, kept = common.extract_features(backbone, common.load_data("fake").test, 32, (0.5,) * 3, (0.2,) * 3, 0, torch.device("cpu"))
    assert x.shape == (128, 64) and kept.tolist() == list(range(128)) and backbone.training and not x.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
