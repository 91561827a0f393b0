"""Two readings of TC2 that simclr_tc2.py does not take, each as one changed step.

  python results/readings.py READING [flags of simclr_tc2.py]

  support    The encoder follows the support loss too. Algorithm 1 says "Update SSL model f_theta
             via Eq. 6 and Eq. 7"; the script takes Eq. 6 for a means to Eq. 7, which alone moves
             theta. Here theta moves by mean_k [grad L_query(theta_k) + grad L_support(theta)].
  features   f_v and f_w calibrate the backbone's features h, which stay, in place of the
             projections z, which are thrown away after training: z_hat = projector(f_w(h) V^T).

The frame is simclr_tc2.py's own main, with another train_step. A run leaves what that script
leaves, in runs/tc2_READING, and goes on if it is stopped. One process. results/notes.md has the
hypotheses and what came of them.
"""
import os
import sys
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import simclr_tc2
from common import batch_stats_only, effective_rank, embedding_std, fail, run
from simclr_tc2 import (FactorNet, WeightNet, add_gradient, batch_summary, calibrate,
                        calibration_health, embed, info_nce, inner_step, query_loss,
                        relative_change, update_factors)

# The originals, since `main` puts others in the places of these names.
script_nets = simclr_tc2.build_nets
script_step = simclr_tc2.train_step


# ---- support: the encoder follows Eq. 6 too ------------------------------------------------------
def support_step(nets, opts, views, args, progress):
    """simclr_tc2.train_step, where theta also collects each inner step's gradient, divided by K.

    [TC2 Algorithm 1, line 5]"""
    def inner_step_and_gradient(theta, loss, beta_1, second_order):
        grads = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        theta_k = {}
        for (name, p), g in zip(theta.items(), grads):
            theta_k[name] = (p - beta_1 * g).detach().requires_grad_()
            # train_step clears .grad before the tasks and adds Eq. 7's: this adds Eq. 6's.
            share = g / args.tasks
            p.grad = share if p.grad is None else p.grad + share
        return theta_k

    with mock.patch.object(simclr_tc2, "inner_step", inner_step_and_gradient):
        return script_step(nets, opts, views, args, progress)


# ---- features: h is calibrated, not z ------------------------------------------------------------
class FeatureCalibrated(nn.Module):
    """Images x (m, n, 3, H, W) -> z_hat (m, n, d), by way of calibrated features h (m, n, d_h), of
    norm sqrt(d_h)."""
    def __init__(self, nets):
        super().__init__()
        self.backbone = nets["backbone"]
        self.projector = nets["projector"]

    def forward(self, x, args, calibrated):
        return self.projector(calibrated(embed(self.backbone, x, args)))


def features_step(nets, opts, views, args, progress):
    """One step on views (m, K n, 3, H, W) -> terms to log. [TC2 Algorithm 1, with h for z]"""
    encoder = FeatureCalibrated(nets)
    projector = nets["projector"]
    half = len(views) // 2

    # Lines 2-3, of the features.
    tasks = views.unflatten(1, (args.tasks, -1)).transpose(0, 1)    # (K, m, n, 3, H, W)
    with torch.no_grad():
        H = embed(nets["backbone"], tasks, args)                    # (K, m, n, d_h)
    S = batch_summary(H)

    # Line 4, Eqs. 4 and 5: the losses see the features through the projector.
    def on_support(h_hat, k):
        return info_nce(projector(h_hat), args.temperature)

    def on_query(h_hat, k):
        return query_loss(projector(h_hat), args)

    terms = update_factors(nets, opts["factors"], H, S, on_support, on_query, 1, args.lambda_s)
    V = nets["factor_net"](S).detach()

    def calibrated(h):
        return calibrate(h, V, nets["weight_net"])

    # Line 5, Eqs. 6 and 7.
    theta = dict(encoder.named_parameters())
    opts["encoder"].zero_grad()
    support_losses = []
    query_losses = []
    with batch_stats_only(encoder):
        for x in tasks:
            loss = info_nce(encoder(x[:half], args, calibrated), args.temperature)
            theta_k = inner_step(theta, loss, args.inner_lr)
            support_losses.append(loss.detach())

            inputs = (x, args, calibrated)
            z_hat = functional_call(encoder, theta_k, inputs, tie_weights=False)
            loss = query_loss(z_hat, args)
            add_gradient(theta, loss / args.tasks, theta_k)
            query_losses.append(loss.detach())
    change = relative_change(theta_k, theta)
    opts["encoder"].step()                                          # moves theta

    h = H[:, 0].flatten(0, 1)                                       # the first view of every image
    return {"loss_query": torch.stack(query_losses).mean(),
            "loss_support": torch.stack(support_losses).mean(), "inner_step": change,
            "std_h": embedding_std(h), "std_h_hat": embedding_std(calibrated(h).detach()), **terms}


def build_features_nets(args):
    """The nets of simclr_tc2.py, with f_v and f_w for features: n_f = d_h / 2."""
    nets = script_nets(args)
    d_h = nets["projector"].in_features
    nets["factor_net"] = FactorNet(d_h, d_h // 2)
    nets["weight_net"] = WeightNet(d_h, d_h // 2)
    return nets


def diagnose_features(nets, views, args):
    """Ranks of h and of calibrated h, and what calibration does, on the last batch."""
    with torch.no_grad(), batch_stats_only(nets["backbone"]):
        H = embed(nets["backbone"], views, args)
        V = nets["factor_net"](batch_summary(H))
        health = calibration_health(H, V, nets["weight_net"])
    health["rank_h_hat"] = health.pop("rank_z_hat")
    return {"rank_h_batch": effective_rank(H.flatten(0, -2)), **health}


# ---- the frame -----------------------------------------------------------------------------------
READINGS = {
    "support": {"train_step": support_step},
    "features": {"train_step": features_step, "build_nets": build_features_nets,
                 "diagnose": diagnose_features},
}


def replacements(reading):
    """{name: function}: what stands for simclr_tc2's functions of these names."""
    script_defaults, script_checks = simclr_tc2.fill_defaults, simclr_tc2.check_args

    def fill_defaults(args, data, device):
        args.out = args.out or f"runs/tc2_{reading}"
        if reading == "features" and args.factors:
            fail(f"--factors {args.factors}: with features n_f is half of their dimensions")
        script_defaults(args, data, device)
        args.script = f"tc2_{reading}"

    def check_args(args, data, world):
        if world > 1:
            fail(f"{world} processes: readings.py runs in one")
        for flag in ("baseline", "literal", "second_order", "without"):
            if getattr(args, flag):
                fail(f"--{flag.replace('_', '-')}: does not go with readings.py")
        if not args.inner_lr:
            fail("--inner-lr 0: a reading is one of the inner loop")
        script_checks(args, data, world)

    return {**READINGS[reading], "fill_defaults": fill_defaults, "check_args": check_args}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0] not in READINGS:
        named = argv[0] if argv else "nothing"
        fail(f"{named}: not a reading; there are {', '.join(READINGS)}")

    def open_run(args, _, *others):                     # the log gets the whole command
        return common.open_run(args, argv, *others)

    with mock.patch.multiple(simclr_tc2, **replacements(argv[0]), open_run=open_run):
        simclr_tc2.main(argv[1:])


if __name__ == "__main__":
    run(main)
