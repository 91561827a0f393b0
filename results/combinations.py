"""An enhancement of one script on the base method of another: how to copy one into your project.

  python results/combinations.py BASE ENHANCEMENT [flags]

  byol tc2           barlow tc2           TC2 with the base's own loss, K tasks, four views
  simclr gessl                            GeSSL with InfoNCE as the task's loss
  simclr sparsehead  byol sparsehead      the sparsity penalty on the last layer of the projector
  simclr pcgrad      simclr gradvac       rivals of TC2 for conflicting gradients, on SimCLR+T:
  simclr graddrop                         InfoNCE of K groups of images

The frame is the base script's own main, with --baseline. What differs is handed to it by name:
`main` below puts the combination's functions in the place of the script's train_step, build_nets,
build_opts, fill_defaults, check_args, view_augmentations and diagnose, for one run. Flags are those
of the base script and these, in any order; a name that is in both is the enhancement's:

  tc2         --tasks 4  --inner-lr (byol 0.1, barlow 0.0001)  --lambda-s 0.1
  gessl       --tasks 2  --inner-steps 1  --target-steps 3  --inner-lr 0.005
  sparsehead  --lambda-sparse 0.03
  pcgrad, gradvac, graddrop  --tasks 2

A run leaves what the base script leaves, in runs/BASE_ENHANCEMENT, and goes on if it is stopped.
One process. None of these was tuned. results/README.md has rows of four of them, which say what
was gained, not what could be.

  TC2, GeSSL, SparseHead   see simclr_tc2.py, byol_gessl.py, barlow_sparsehead.py
  PCGrad                   Yu et al. 2020, arXiv 2001.06782, Algorithm 1
  GradVac                  Wang et al. 2021, arXiv 2010.05874, Algorithm 1
  GradDrop                 Chen et al. 2020, arXiv 2010.06808, Algorithm 1
"""
import copy
import os
import sys
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import barlow_sparsehead
import byol_gessl
import common
import simclr_tc2
from barlow_sparsehead import barlow_loss, sparse_penalty, sparsity
from byol_gessl import class_logits, ema_decay_at, flatten, gessl_task, set_gradient
from common import (Parser, at_least_float32, batch_stats_only, effective_rank, embedding_std, fail,
                    number, rng, run)
from simclr_tc2 import (TC2_LR, FactorNet, WeightNet, add_gradient, batch_summary, calibrate,
                        calibration_health, gradient_conflict, info_nce, inner_step,
                        relative_change, take_step, update_factors)

BASES = {"simclr": simclr_tc2, "byol": byol_gessl, "barlow": barlow_sparsehead}
SUPPORT = slice(0, 2)       # of four views
QUERY = slice(2, 4)
GRADVAC_BETA = 0.01         # how fast GradVac's target similarities follow, as in the paper


def encoder_of(nets):
    return nn.Sequential(nets["backbone"], nets["projector"])


def split_tasks(views, K):
    """Views (m, K n, 3, H, W) as tasks (K, m, n, 3, H, W)."""
    return views.unflatten(1, (K, -1)).transpose(0, 1)


def mean_terms(found):
    """The mean over tasks of a list of {name: tensor}."""
    mean = {}
    for name in found[0]:
        mean[name] = torch.stack([terms[name] for terms in found]).mean()
    return mean


# ---- TC2 on BYOL and on Barlow Twins -------------------------------------------------------------
class Online(nn.Module):
    """Images to what the base's loss takes: encoder, calibration, and a predictor if there is one.

    What is calibrated is the projection z, set to norm sqrt(d) first; plain BYOL and Barlow Twins
    do not do that."""
    def __init__(self, nets, bf16):
        super().__init__()
        self.bf16 = bf16
        self.encoder = encoder_of(nets)
        self.predictor = nn.Identity()
        if "predictor" in nets:
            self.predictor = nets["predictor"]

    def predict(self, z_hat):
        """(v, n, d) -> (v, n, d); BatchNorm sees the views of a task together."""
        with torch.autocast(z_hat.device.type, torch.bfloat16, enabled=self.bf16):
            p = self.predictor(z_hat.flatten(0, 1))
        return at_least_float32(p).unflatten(0, z_hat.shape[:2])

    def forward(self, x, args, calibrated):
        """Images x (v, n, 3, H, W) -> (v, n, d)."""
        z = simclr_tc2.embed(self.encoder, x, args)
        return self.predict(calibrated(z))


def tc2_step(nets, opts, tasks, args, loss):
    """One step on tasks (K, 4, n, 3, H, W) -> terms to log, as in simclr_tc2.train_step, but
    loss_query and loss_support, which are the base's loss.

    loss(p, k, half): the base's, of the outputs p (2, n, d) for the views `half`, SUPPORT or QUERY,
    of task k. It is the support and the query loss. [TC2 Algorithm 1]"""
    online = Online(nets, args.bf16)
    theta = {name: p for name, p in online.named_parameters() if p.requires_grad}

    # Lines 2-3.
    with torch.no_grad():
        Z = simclr_tc2.embed(online.encoder, tasks, args)           # (K, 4, n, d)
    S = batch_summary(Z)

    # Line 4, Eqs. 4 and 5.
    def on_support(z_hat, k):
        return loss(online.predict(z_hat), k, SUPPORT)

    def on_query(z_hat, k):
        return loss(online.predict(z_hat[QUERY]), k, QUERY)

    with batch_stats_only(online):
        terms = update_factors(nets, opts["factors"], Z, S, on_support, on_query, 1, args.lambda_s)
    V = nets["factor_net"](S).detach()

    def calibrated(z):
        return calibrate(z, V, nets["weight_net"])

    # Line 5, Eqs. 6 and 7.
    opts["encoder"].zero_grad()
    found = []
    with batch_stats_only(online):
        for k, x in enumerate(tasks):
            p = online(x[SUPPORT], args, calibrated)
            loss_support = loss(p, k, SUPPORT)
            theta_k = inner_step(theta, loss_support, args.inner_lr)

            inputs = (x[QUERY], args, calibrated)
            p = functional_call(online, theta_k, inputs, tie_weights=False)
            loss_query = loss(p, k, QUERY)
            add_gradient(theta, loss_query / len(tasks), theta_k)
            found.append({"loss_query": loss_query.detach(), "loss_support": loss_support.detach(),
                          "inner_step": relative_change(theta_k, theta)})
    opts["encoder"].step()
    return {**mean_terms(found), **terms, "std_z": embedding_std(Z[:, 0].flatten(0, 1))}


def byol_tc2(nets, opts, views, args, progress):
    tasks = split_tasks(views, args.tasks)
    with torch.no_grad():
        z_target = byol_gessl.embed(nets["target"], tasks, args)    # (K, 4, n, d)

    def loss(p, k, half):
        return byol_gessl.byol_loss(p, z_target[k, half])

    terms = tc2_step(nets, opts, tasks, args, loss)
    follow(nets, args, progress)
    return terms


def barlow_tc2(nets, opts, views, args, progress):
    def loss(z, k, half):
        return barlow_loss(z[0], z[1], args.lambda_offdiag)

    return tc2_step(nets, opts, split_tasks(views, args.tasks), args, loss)


def follow(nets, args, progress):
    """BYOL's moving average, after a step. [BYOL Eq. 1]"""
    decay = ema_decay_at(args.ema_decay, progress)
    byol_gessl.ema_update(nets["target"], encoder_of(nets), decay)


def add_factor_nets(nets, args):
    d = nets["projector"][-1].out_features
    nets["factor_net"] = FactorNet(d, d // 2)
    nets["weight_net"] = WeightNet(d, d // 2)


def tc2_diagnose(nets, views, args):
    """Ranks of z and z_hat, and what calibration does, on the last batch: terms to log."""
    online = Online(nets, args.bf16)
    with torch.no_grad(), batch_stats_only(online):
        Z = simclr_tc2.embed(online.encoder, views, args)
        V = nets["factor_net"](batch_summary(Z))
        health = calibration_health(Z, V, nets["weight_net"])
    return {"rank_z": effective_rank(Z.flatten(0, -2)), **health}


# ---- GeSSL on SimCLR -----------------------------------------------------------------------------
def simclr_task(encoder, x, theta, args):
    """A mini-batch x (2, N, 3, H, W) as a task: weights (P,) -> (InfoNCE, logits (2, N, N)).

    BatchNorm's running statistics move at `theta` only."""
    def task(weights):
        if weights is theta:
            z = byol_gessl.embed(encoder, x, args, weights)
        else:
            with batch_stats_only(encoder):
                z = byol_gessl.embed(encoder, x, args, weights)
        return info_nce(z, args.temperature), class_logits(z, z, args.temperature)
    return task


def simclr_gessl(nets, opts, views, args, progress):
    """One step; its terms are named in byol_gessl.train_step. [GeSSL Algorithm 1]"""
    encoder = encoder_of(nets)
    theta = flatten(encoder)
    outer = torch.zeros_like(theta)
    ssl = torch.zeros_like(theta)
    found = []
    for x in split_tasks(views, args.tasks):
        task = simclr_task(encoder, x, theta, args)
        outer_l, ssl_l, terms = gessl_task(task, theta, args.inner_steps, args.target_steps,
                                           args.inner_lr)
        outer += outer_l / args.tasks
        ssl += ssl_l / args.tasks
        found.append(terms)
    set_gradient(encoder, outer + ssl)
    opts["encoder"].step()

    with torch.no_grad(), batch_stats_only(encoder):
        z = byol_gessl.embed(encoder, x, args)
    return {**mean_terms(found), "outer_to_ssl": outer.norm() / ssl.norm().clamp(min=1e-30),
            "std_z": embedding_std(z[0])}


# ---- SparseHead on SimCLR and on BYOL ------------------------------------------------------------
def sparse_step(W, loss_ssl, opt, args):
    """A step on loss_ssl + lambda ||W'||_{2,1}, W' with rows of unit norm. [SparseHead Eq. 12]

    barlow_sparsehead.py's default, where the loss does not see the lengths of rows. SimCLR and BYOL
    do, so that here short rows can lower the penalty too: they hardly enter z."""
    penalty = sparse_penalty(W, "rownorm")
    take_step(opt, loss_ssl + args.lambda_sparse * penalty)
    return {"loss_ssl": loss_ssl.detach(), "loss_sparse": penalty.detach(), **sparsity(W.detach())}


def group_losses(z, args):
    """InfoNCE of --tasks groups of images, z (m, n, d): SimCLR+T, or SimCLR for one group."""
    return [info_nce(group, args.temperature) for group in z.chunk(args.tasks, dim=1)]


def simclr_sparsehead(nets, opts, views, args, progress):
    """The projector is one linear layer: its columns are dimensions of the representation."""
    z = simclr_tc2.embed(encoder_of(nets), views, args)
    loss_ssl = torch.stack(group_losses(z, args)).mean()
    terms = sparse_step(nets["projector"].weight, loss_ssl, opts["encoder"], args)
    return {**terms, "std_z": embedding_std(z[0].detach())}


def byol_sparsehead(nets, opts, views, args, progress):
    with torch.no_grad():
        z_target = byol_gessl.embed(nets["target"], views, args)
    p = byol_gessl.embed(byol_gessl.online_network(nets), views, args)
    loss_ssl = byol_gessl.byol_loss(p, z_target)
    terms = sparse_step(nets["projector"][-1].weight, loss_ssl, opts["encoder"], args)
    follow(nets, args, progress)
    return {**terms, "std_z": embedding_std(z_target[0])}


# ---- TC2's rivals: conflicting gradients ---------------------------------------------------------
def others_of(i, K, generator):
    """The tasks but i, in random order."""
    order = torch.randperm(K, generator=generator).tolist()
    return [j for j in order if j != i]


def pcgrad(G, generator):
    """Mean over tasks of the projected gradients, for G (K, P): in random order, each one loses its
    part along every other task's gradient that it conflicts with. [PCGrad Algorithm 1]"""
    projected = []
    for i, g in enumerate(G):
        for j in others_of(i, len(G), generator):
            product = torch.dot(g, G[j]).clamp(max=0)               # 0: no conflict
            g = g - product / G[j].square().sum().clamp(min=1e-30) * G[j]
        projected.append(g)
    return torch.stack(projected).mean(0)


def gradvac(G, generator, target):
    """As PCGrad, but each pair's cosine is raised to a target: a moving average of its own values.

    target (K, K) is updated in place, from 0. At target 0 it is PCGrad. The whole network is one
    group of parameters. [GradVac Algorithm 1, Eqs. 4-5]"""
    changed = []
    for i, g in enumerate(G):
        for j in others_of(i, len(G), generator):
            length = g.norm()
            length_j = G[j].norm().clamp(min=1e-30)
            cosine = torch.dot(g, G[j]) / (length * length_j).clamp(min=1e-30)
            aim = target[i, j].clone()
            sine = (1 - cosine ** 2).clamp(min=0).sqrt()
            sine_aim = (1 - aim ** 2).sqrt()
            share = length * (aim * sine - cosine * sine_aim) / (length_j * sine_aim)
            g = g + torch.where(cosine < aim, share, 0) * G[j]
            target[i, j] = torch.lerp(aim, cosine, GRADVAC_BETA)
        changed.append(g)
    return torch.stack(changed).mean(0)


def graddrop(G, generator):
    """Each coordinate of G (K, P) keeps one sign at random, then the mean over tasks.

    The positive one with probability (1 + sum G / sum |G|) / 2. The paper does it to activations,
    here it is done to the weights' gradients. [GradDrop Algorithm 1]"""
    purity = (1 + G.sum(0) / G.abs().sum(0).clamp(min=1e-30)) / 2
    u = torch.rand(purity.shape, generator=generator).to(G.device)
    keep = torch.where(u < purity, G > 0, G < 0)
    return (G * keep).mean(0)


def conflict_step(nets, opts, views, args, progress, combine):
    """A step of SimCLR+T, with combine(G, generator) -> (P,) in place of the mean of the tasks'
    gradients G (K, P)."""
    encoder = encoder_of(nets)
    theta = flatten(encoder)
    z = byol_gessl.embed(encoder, views, args, theta)
    losses = group_losses(z, args)
    G = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])
    gradient = combine(G, rng(args.seed, "combine", progress))      # progress stands for the step
    set_gradient(encoder, gradient)
    opts["encoder"].step()

    cosine, negative = gradient_conflict(G)
    return {"loss_ssl": torch.stack(losses).detach().mean(), "conflict_cos": cosine,
            "conflict_negative": negative, "length_kept": gradient.norm() / G.mean(0).norm(),
            "std_z": embedding_std(z[0].detach())}


def simclr_pcgrad(nets, opts, views, args, progress):
    return conflict_step(nets, opts, views, args, progress, pcgrad)


def simclr_graddrop(nets, opts, views, args, progress):
    return conflict_step(nets, opts, views, args, progress, graddrop)


def simclr_gradvac(nets, opts, views, args, progress):
    def combine(G, generator):
        return gradvac(G, generator, nets["similarities"].target)

    return conflict_step(nets, opts, views, args, progress, combine)


def add_similarities(nets, args):
    """GradVac's targets lie in the checkpoint: a resumed run goes on with them."""
    nets["similarities"] = nn.Module()
    nets["similarities"].register_buffer("target", torch.zeros(args.tasks, args.tasks))


# ---- the frame -----------------------------------------------------------------------------------
# The inner steps are short beside the weights: BYOL's gradient is small, Barlow Twins' is large.
COMBINATIONS = {
    ("byol", "tc2"): (byol_tc2, {"tasks": 4, "inner_lr": 0.1, "lambda_s": 0.1}),
    ("barlow", "tc2"): (barlow_tc2, {"tasks": 4, "inner_lr": 1e-4, "lambda_s": 0.1}),
    ("simclr", "gessl"): (simclr_gessl, {"tasks": 2, "inner_steps": 1, "target_steps": 3,
                                         "inner_lr": 0.005}),
    ("simclr", "sparsehead"): (simclr_sparsehead, {"lambda_sparse": 0.03}),
    ("byol", "sparsehead"): (byol_sparsehead, {"lambda_sparse": 0.03}),
    ("simclr", "pcgrad"): (simclr_pcgrad, {"tasks": 2}),
    ("simclr", "gradvac"): (simclr_gradvac, {"tasks": 2}),
    ("simclr", "graddrop"): (simclr_graddrop, {"tasks": 2}),
}
LIMITS = {"tc2": simclr_tc2.LIMITS, "gessl": byol_gessl.LIMITS}
ADDED_NETS = {"tc2": add_factor_nets, "gradvac": add_similarities}


def own_flags(defaults, argv):
    """({name: value} of the enhancement's flags, the flags that are left)."""
    p = Parser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        low = 1 if name in ("tasks", "inner_steps") else 0
        flag = "--" + name.replace("_", "-")
        p.add_argument(flag, type=number(type(default), low), default=default)
    known, rest = p.parse_known_args(argv)
    return vars(known), rest


def replacements(base_name, enhancement, settings):
    """{name: value}: what stands for the base script's functions, and limits, of these names."""
    base = BASES[base_name]
    # The originals, since these names will stand for the functions below.
    base_nets, base_opts = base.build_nets, base.build_opts
    base_defaults, base_checks = base.fill_defaults, base.check_args
    base_augmentations = base.view_augmentations

    def build_nets(args):
        nets = base_nets(args)
        if enhancement in ADDED_NETS:
            ADDED_NETS[enhancement](nets, args)
        return nets

    def build_opts(nets, args):
        added = ("factor_net", "weight_net", "similarities")
        bare = nn.ModuleDict({name: net for name, net in nets.items() if name not in added})
        opts = base_opts(bare, args)
        if enhancement == "tc2":
            factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
            opts["factors"] = torch.optim.Adam(factors, TC2_LR, fused=True)
        return opts

    def fill_defaults(args, data, device):
        args.out = args.out or f"runs/{base_name}_{enhancement}"
        base_defaults(args, data, device)
        args.script = f"{base_name}_{enhancement}"
        vars(args).update(settings)
        if enhancement == "gessl":                      # --batch-size is that of a task
            args.images_per_step = args.batch_size * args.tasks
        if enhancement == "tc2":
            args.without = []

    def view_augmentations(args, data):
        augmentations = base_augmentations(args, data)
        if enhancement == "tc2":                        # four views: two pairs of the base's two
            return 2 * augmentations
        return augmentations

    def check_args(args, data, world):
        if world > 1:
            fail(f"{world} processes: combinations.py runs in one")
        if enhancement == "gessl" and (args.views != 2 or not args.inner_lr):
            fail("gessl: takes --views 2 and an --inner-lr above 0")
        if enhancement in ("pcgrad", "gradvac", "graddrop") and args.tasks < 2:
            fail(f"--tasks {args.tasks}: {enhancement} needs at least 2")
        checked = copy.copy(args)
        if enhancement == "gessl":                      # --batch-size is that of a task
            checked.tasks = 1
        base_checks(checked, data, world)
        K = args.tasks if enhancement == "tc2" else 1
        if args.batch_size % K or args.batch_size < 2 * K:
            fail(f"--batch-size {args.batch_size}: must be a multiple of --tasks {K}, at least 2 "
                 "images each")

    train_step, _ = COMBINATIONS[base_name, enhancement]
    found = {"train_step": train_step, "build_nets": build_nets, "build_opts": build_opts,
             "fill_defaults": fill_defaults, "check_args": check_args,
             "view_augmentations": view_augmentations,
             "LIMITS": LIMITS.get(enhancement, {})}
    if enhancement == "tc2":
        found["diagnose"] = tc2_diagnose
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    pair = tuple(argv[:2])
    if pair not in COMBINATIONS:
        known = ", ".join(map(" ".join, COMBINATIONS))
        named = " ".join(pair) or "nothing"
        fail(f"{named}: not a combination of BASE and ENHANCEMENT; there are {known}")
    if "--baseline" in argv:
        fail("--baseline: for the base method alone run its own script")
    base_name, enhancement = pair
    _, defaults = COMBINATIONS[pair]
    settings, rest = own_flags(defaults, argv[2:])
    base = BASES[base_name]

    def open_run(args, _, *others):                     # the log gets the whole command
        return common.open_run(args, argv, *others)

    found = replacements(base_name, enhancement, settings)
    with mock.patch.multiple(base, **found, open_run=open_run):
        base.main([*rest, "--baseline"])


if __name__ == "__main__":
    run(main)
