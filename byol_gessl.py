"""BYOL with the self-motivated target of GeSSL: one file, read beside the papers.

BYOL predicts how a slowly moving average of its own network embeds the other view. GeSSL calls each
mini-batch a task: tell N images apart. The network takes K + lambda gradient steps on it, and the
start moves so that after K steps the network already answers as it would lambda steps later.
That gradient runs through the inner steps; here are five ways to take it.

  BYOL    Grill et al. 2020, arXiv 2006.07733: Eqs. 1-2, Section 3.3 on the moving average
  GeSSL   "On the Universality of Self-Supervised Representation Learning": Eqs. 2-4, Algorithm 1,
          Appendix G.4 (Eqs. 18-22)

One step, [GeSSL Algorithm 1]:
  sample M mini-batches of N images, two views each                 lines 1-4
  for each of these tasks, from theta_0 = theta:                    line 5
    K steps of theta_k+1 = theta_k - alpha grad l(theta_k)          lines 6-9    Eq. 2
    lambda more, to the self-motivated target                       lines 11-14  Eq. 2
    L = KL(pi(target) | pi(theta_K)), the target fixed              lines 10, 15 Eq. 3
  theta <- theta - beta mean over tasks of grad L(theta_K(theta))   line 17      Eq. 4
  xi <- decay^M xi + (1 - decay^M) theta, BYOL's moving average                  BYOL Eq. 1

  paper                  here                       shape, meaning
  X_tr,l^aug; M, N       x; --tasks, --batch-size   (2, N, 3, H, W): one task; n in G.5 is M
  f_theta                theta                      (P,) backbone, projector, predictor, end to end
  f_theta^{l,K}          theta_K, trajectory[-1]    (P,) after K (--inner-steps) steps
  f_theta^{l,K+lambda}   target                     (P,) lambda (--target-steps) steps later
  l(f_theta, X)          task(theta)[0]             BYOL's loss, z' fixed during the task
  pi(f_theta(x))         task(theta)[1]             (2, N, N) logits: which of the N images is it?
  p, z'                  p, z_target                (2, N, d) prediction; from the moving average
  alpha, beta            --inner-lr, --lr           plain gradient descent, AdamW

  python byol_gessl.py                                            drawn shapes, a minute on a laptop
  python byol_gessl.py --data /imagenet100                        one GPU; plain BYOL: --baseline
  torchrun --nproc-per-node 8 byol_gessl.py --data /imagenet100   whole tasks: M = 8, one a process

Controls:
  --baseline                    BYOL on mini-batches of N; with torchrun add --sync-bn
  --baseline --batch-size MN    BYOL on the images of one outer step [GeSSL Table 22]; the same
                                memory of its average: --ema-decay DECAY^M
  --lookahead                   the same inner loop without the KL
  --hypergrad first-order       no second derivative
  --ssl-weight 0                Eq. 4 word for word

Result (results/gessl.md): at CPU scale GeSSL trains, does not collapse, and does not beat BYOL;
not run at ImageNet scale.

Deviations from the paper, numbered as in results/gessl.md, which has the others and the evidence:
  (1) pi is a softmax over the N anchors of BYOL's loss: in a pilot a learned head did not train.
  (2) Appendix C also speaks of N binary problems: --outer-loss bernoulli.
  (3) BYOL's gradient is added to Eq. 4; --ssl-weight 0 undoes it.
  (4) Eqs. 18-21 are printed for two variables; here one, theta, starts the inner loop and is
      adapted by it.
  (5) The difference of Eq. 21 is taken backward: with a forward one curvature grew without end.
  (7) AdamW, not SGD.
  (8) Eqs. 3 and 4 are means, not sums.
  (9) Two views of an image, where Appendix C augments it 5 times.
"""
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from common import (SMALL, Log, at_least_float32, average_gradients, base_parser,
                    batch_stats_only, check_shared_flags, draw_views, effective_rank,
                    embedding_std, fail, fill_from_recipe, graceful_stop, load_data, lr_scale,
                    make_backbone, monitor, number, open_run, parse, recipe_name, run, save_run,
                    set_lr, setup_processes, training_batches, world_size)

SCRIPT = "byol_gessl"
SOLVER_TERMS = 5        # highest power of the Neumann series; iterations of conjugate gradients
FD_LENGTH = 0.03        # ||e v|| of the finite difference; shorter is worse in ReLU networks

# One for each of the two views. jitter: brightness, contrast, saturation, hue.
# GeSSL's Appendix C says "the same data augmentation scheme as SimCLR", for every base method.
# imagenet has BYOL's asymmetric pair in its place, which BYOL was tuned for [BYOL Appendix B];
# small has TC2's weaker one (the paper of simclr_tc2.py), shapes that with more gray.
WEAK = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5,
        "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.1, "blur_p": 0.0,
        "solarize_p": 0.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
STRONG = {**WEAK, "crop": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1), "gray_p": 0.2,
          "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AUGMENTATION = {
    "shapes": [{**WEAK, "gray_p": 0.3}, {**WEAK, "gray_p": 0.3}],
    "small": [WEAK, WEAK],
    "imagenet": [{**STRONG, "blur_p": 1.0}, {**STRONG, "blur_p": 0.1, "solarize_p": 0.2}],
}

# N (or 16) and M as in GeSSL's Appendix G.5, lambda = 10 as in its Section 5; M and lambda of
# shapes are ours. The paper states neither alpha nor beta, nor a projector: imagenet has the widths
# of BYOL's. Only shapes has been run as it stands.
RECIPES = {
    "shapes": {"arch": "resnet_tiny", "epochs": 4, "batch_size": 32, "lr": 5e-3,
               "weight_decay": 1e-4, "warmup_epochs": 0.5, "eval_every": 1,
               "tasks": 2, "target_steps": 3, "inner_lr": 0.005,
               "temperature": 0.2, "ema_decay": 0.9, "hidden": 256, "dim": 128},
    "small": {"arch": "resnet18", "epochs": 200, "batch_size": 32, "lr": 2e-3,
              "weight_decay": 1e-4, "warmup_epochs": 5.0, "eval_every": 10,
              "tasks": 8, "target_steps": 10, "inner_lr": 0.02,
              "temperature": 0.2, "ema_decay": 0.996, "hidden": 1024, "dim": 128},
    "imagenet": {"arch": "resnet50", "epochs": 200, "batch_size": 32, "lr": 1e-3,
                 "weight_decay": 1e-4, "warmup_epochs": 10.0, "eval_every": 10,
                 "tasks": 8, "target_steps": 10, "inner_lr": 0.005,
                 "temperature": 0.2, "ema_decay": 0.999, "hidden": 4096, "dim": 256},
}

# A term above its limit warns once, on the screen and in the log.
LIMITS = {"curvature": (1, "the step of Eq. 2 may overshoot (fd), or a Neumann series diverge: "
                           "lower --inner-lr"),
          "alpha_lambda_max": (1, "the step of Eq. 2 may overshoot: lower --inner-lr"),
          "negative_curvature": (0, "conjugate gradients met negative curvature and stopped early: "
                                    "lower --inner-lr")}


# ---- model ---------------------------------------------------------------------------------------
def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


def build_nets(args):
    """Backbone, projector, predictor and target, xi in BYOL: a copy of the first two that no
    gradient reaches. [BYOL Section 3.1]"""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    projector = mlp(feature_dim, args.hidden, args.dim)
    predictor = mlp(args.dim, args.hidden, args.dim)
    target = copy.deepcopy(nn.Sequential(backbone, projector)).requires_grad_(False)
    return nn.ModuleDict({"backbone": backbone, "projector": projector, "predictor": predictor,
                          "target": target})


def online_network(nets):
    """What is trained: images -> p. [:2] of it, without the predictor, is what xi averages."""
    return nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"])


def build_opts(nets, args):
    """AdamW with torch's other defaults; biases and BatchNorm's parameters do not decay."""
    params = list(online_network(nets).parameters())
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim <= 1]            # biases and BatchNorm
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return {"encoder": torch.optim.AdamW(groups, args.lr, fused=True)}


def embed(net, x, args, theta=None):
    """Outputs (..., d) of images x (..., 3, H, W), never in bfloat16.

    theta (P,): weights in place of the net's own."""
    # All images in one batch (B, 3, H, W). channels_last: faster convolutions, on GPU and CPU.
    images = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        if theta is None:
            out = net(images)
        else:
            out = functional_call(net, unflatten(theta, net), (images,), tie_weights=False)
    return at_least_float32(out).unflatten(0, x.shape[:-3])


# ---- BYOL ----------------------------------------------------------------------------------------
def byol_loss(p, z_target):
    """Mean of 2 - 2 cos(p, z'), each view against the other one's z': p, z_target (2, N, d).

    [BYOL Eq. 2]"""
    other_view = z_target.detach().flip(0)
    return (2 - 2 * F.cosine_similarity(p, other_view, dim=-1)).mean()


def ema_decay_at(base, progress):
    """tau of the moving average: from `base` to 1 along half a cosine as progress goes from 0 to 1.

    0 stays 0: no average. [BYOL Section 3.3]"""
    if base == 0:
        return 0
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def ema_update(target, online, decay):
    """xi <- decay xi + (1 - decay) theta; BatchNorm's statistics are copied. [BYOL Eq. 1]"""
    for xi, theta in zip(target.parameters(), online.parameters()):
        xi.lerp_(theta, 1 - decay)
    for old, new in zip(target.buffers(), online.buffers()):
        old.copy_(new)


def byol_step(nets, opts, views, args, progress):
    """One step of BYOL, views (2, n, 3, H, W) of this process. [BYOL Algorithm 1]"""
    online = online_network(nets)
    with torch.no_grad():
        z_target = embed(nets["target"], views, args)       # (2, n, d)
    loss = byol_loss(embed(online, views, args), z_target)

    opts["encoder"].zero_grad()
    loss.backward()
    average_gradients(online.parameters())
    opts["encoder"].step()
    ema_update(nets["target"], online[:2], ema_decay_at(args.ema_decay, progress))
    return {"loss_ssl": loss.detach(), "std_z": embedding_std(z_target[0])}


# ---- GeSSL: pi and the outer loss ----------------------------------------------------------------
def class_logits(p, anchors, temperature):
    """Logits (2, N, N) of pi: each view classified among the other views of the N images.

    Entry v, i, j is the cosine of p[v, i] and the anchor of image j in the other view, divided by
    the temperature. p, anchors (2, N, d); image i is class i. The anchors are those of the SSL
    loss, so that pi depends on every parameter that the loss depends on. [GeSSL Section 2]"""
    p = F.normalize(p, dim=-1)
    anchors = F.normalize(anchors, dim=-1).flip(0)
    return p @ anchors.mT / temperature


def self_motivated_kl(target_logits, logits):
    """KL(pi(target) | pi(theta_K)), the target fixed: two (..., N) -> mean over rows.

    [GeSSL Eq. 3]"""
    log_q = target_logits.detach().log_softmax(-1)
    log_p = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def bernoulli_kl(target_logits, logits):
    """Eq. 3 if pi is N sigmoids, one "binary classification problem" per anchor.

    [GeSSL Appendix C]"""
    target_logits = target_logits.detach()
    q = target_logits.sigmoid()
    positive = F.logsigmoid(target_logits) - F.logsigmoid(logits)
    negative = F.logsigmoid(-target_logits) - F.logsigmoid(-logits)
    return (q * positive + (1 - q) * negative).sum(-1).mean()


def outer_loss(kind, target_logits, logits):
    """Eq. 3 and its alternatives: two (..., N) -> mean over rows. [GeSSL Fig. 3, Eqs. 14-17]

    Each is a sum over the N classes; mse too, where Eq. 14 has a mean.
    ce has the gradient of kl, since the target is fixed. wasserstein: images have no order, so
    between any two of the N classes the distance is 1."""
    if kind == "kl":
        return self_motivated_kl(target_logits, logits)
    if kind == "bernoulli":
        return bernoulli_kl(target_logits, logits)
    q = target_logits.detach().softmax(-1)
    p = logits.softmax(-1)
    distance = {"ce": -q * logits.log_softmax(-1),
                "mse": (p - q) ** 2,
                "wasserstein": (p - q).abs() / 2}[kind]
    return distance.sum(-1).mean()


# ---- GeSSL: all weights as one vector ------------------------------------------------------------
def channels_last(p):
    """A kernel (out, in, h, w) as (out, h, w, in); any other parameter as it is."""
    return p.movedim(1, -1) if p.ndim == 4 else p


def flatten(net):
    """theta (P,): copies of all parameters of a net, laid end to end.

    Kernels lie there with their channels last, as convolutions read them fastest."""
    parts = [channels_last(p.detach()).flatten() for p in net.parameters()]
    return torch.cat(parts).requires_grad_()


def unflatten(theta, net):
    """theta (P,) as {name: tensor}, in the shapes of the net's parameters."""
    params = dict(net.named_parameters())
    parts = theta.split([p.numel() for p in params.values()])
    found = {}
    for (name, p), part in zip(params.items(), parts):
        part = part.view(channels_last(p).shape)
        found[name] = part.movedim(-1, 1) if p.ndim == 4 else part
    return found


def set_gradient(net, gradient):
    """.grad of every parameter of a net, in its own memory format, from a vector (P,)."""
    parts = unflatten(gradient, net)
    for name, p in net.named_parameters():
        p.grad = torch.empty_like(p).copy_(parts[name])


# ---- GeSSL: inner steps and the gradient through them --------------------------------------------
# A task is a function: task(theta) -> (loss, logits of pi), for theta (P,). Nothing from here to
# `gessl_task` knows BYOL.

def nonzero_norm(v):
    """||v||, at least 1e-30: for denominators."""
    return v.norm().clamp(min=1e-30)


def loss_and_gradient(task, theta, create_graph=False):
    """(l, grad l) at theta (P,)."""
    loss, _ = task(theta)
    gradient, = torch.autograd.grad(loss, theta, create_graph=create_graph)
    return loss.detach(), gradient


def inner_step(task, theta, alpha, create_graph=False):
    """(theta - alpha grad l(theta), l, grad l). [GeSSL Eq. 2]

    The new theta is a leaf; with create_graph it is a function of the old one."""
    loss, gradient = loss_and_gradient(task, theta, create_graph)
    theta_next = theta - alpha * gradient
    if not create_graph:
        theta_next = theta_next.detach().requires_grad_()
    return theta_next, loss, gradient.detach()


def difference_hvp(task, theta, gradient, v, length=FD_LENGTH):
    """H v = (grad(theta) - grad(theta - e v)) / e, e = length / ||v||; gradient is grad(theta).

    Backward: its error is -(e / 2) grad(v H v). Eq. 4 holds -alpha H v, so that its step descends
    (alpha e / 2) v H v too, the curvature along v. With a forward difference it climbs.
    [GeSSL Eq. 21]"""
    e = length / nonzero_norm(v)
    behind = (theta - e * v).detach().requires_grad_()
    _, gradient_behind = loss_and_gradient(task, behind)
    return (gradient - gradient_behind) / e


def exact_hvp(task, theta):
    """The function v -> H v at theta, a leaf: one graph of grad l, differentiated at each call."""
    _, gradient = loss_and_gradient(task, theta, create_graph=True)

    def hvp(v):
        Hv, = torch.autograd.grad(gradient, theta, v, retain_graph=True)
        return Hv
    return hvp


def neumann(hvp, v, terms=SOLVER_TERMS):
    """sum_{t=0}^{terms} (-A)^t v for hvp(u) = A u: (I + A)^{-1} v, if it converges.

    Returns the sum and the largest ||A u|| / ||u|| met; above 1 it diverges. [GeSSL Eq. 19]"""
    total = v
    term = v
    growth = v.new_zeros(())
    for _ in range(terms):
        before = term
        term = -hvp(term)
        total = total + term
        growth = torch.maximum(growth, term.norm() / nonzero_norm(before))
    return total, growth


def conjugate_gradient(hvp, v, iterations=SOLVER_TERMS):
    """x with (I + A) x = v for hvp(u) = A u, from x = 0. [GeSSL Eq. 20]

    Returns x, the largest ||A p|| / ||p|| met, and whether a direction p had p (I + A) p <= 0.
    From there on its steps have length 0: to leave the loop the host would have to wait for the
    GPU. If it was the first direction x would stay 0, so it is v, the gradient of first-order."""
    x = torch.zeros_like(v)
    r = v                                                   # residual v - (I + A) x
    p = v
    growth = v.new_zeros(())
    going = torch.ones_like(growth, dtype=torch.bool)
    negative = ~going
    for i in range(iterations):
        Ap = hvp(p)
        q = p + Ap                                          # (I + A) p
        growth = torch.maximum(growth, going * Ap.norm() / nonzero_norm(p))

        # At r = 0 it has converged: p = 0 too, which is no negative curvature.
        rr = torch.dot(r, r)
        pq = torch.dot(p, q)
        negative = negative | (going & (pq <= 0) & (rr > 0))
        going = going & (pq > 0)
        if i == 0:
            x = torch.where(negative, v, x)

        step = torch.where(going, rr / pq, 0)
        x = x + step * p
        r = r - step * q
        ratio = torch.where(rr > 0, torch.dot(r, r) / rr, 0)
        p = r + ratio * p
    return x, growth, negative.to(v.dtype)


def hypergradient(mode, outer, task, trajectory, gradients, alpha, terms=SOLVER_TERMS,
                  length=FD_LENGTH):
    """d outer / d theta_0 (P,), for a scalar `outer` computed from theta_K. [GeSSL Eq. 4]

    trajectory = [theta_0, .., theta_K] and the K gradients come from `inner_step`. H is the Hessian
    of l, and v = d outer / d theta_K. The modes:

    first-order  v, as if theta_K = theta_0 + constant
    exact        prod_k (I - alpha H(theta_k)) v, by the graph of the steps     [GeSSL Eq. 18]
    fd           the same product, each H v from one more gradient              [GeSSL Eq. 21]
    neumann, cg  (I + K alpha H(theta_K))^{-1} v: as if theta_K minimised       [GeSSL Eqs. 19-20]
                 l(theta) + ||theta - theta_0||^2 / (2 K alpha)

    Returns also the largest ||A u|| / ||u|| met, for A = alpha H (fd) or K alpha H (neumann, cg), 0
    for the first two; and 1 if cg met negative curvature."""
    theta_K = trajectory[-1]
    K = len(gradients)
    zero = torch.zeros_like(outer.detach())
    if mode == "exact":
        gradient, = torch.autograd.grad(outer, trajectory[0])
        return gradient, zero, zero

    v, = torch.autograd.grad(outer, theta_K)
    if mode == "first-order":
        return v, zero, zero

    if mode == "fd":
        curvature = zero
        for k in reversed(range(K)):
            Hv = difference_hvp(task, trajectory[k], gradients[k], v, length)
            curvature = torch.maximum(curvature, alpha * Hv.norm() / nonzero_norm(v))
            v = v - alpha * Hv                                      # (I - alpha H(theta_k)) v
        return v, curvature, zero

    hvp = exact_hvp(task, theta_K)

    def scaled_hvp(u):
        return K * alpha * hvp(u)

    if mode == "neumann":
        total, growth = neumann(scaled_hvp, v, terms)
        return total, growth, zero
    return conjugate_gradient(scaled_hvp, v, terms)


def gessl_task(task, theta, inner_steps, target_steps, alpha, hypergrad="fd", lookahead=False,
               kind="kl"):
    """One task from theta (P,): (outer gradient, SSL gradient, terms). [GeSSL Algorithm 1]

    task(theta) -> (loss, logits of pi (.., N)). theta is left alone. hypergrad: the mode of
    `hypergradient`, kind: that of `outer_loss`; lookahead takes neither. The SSL gradient is that
    of the first inner step, grad l(theta)."""
    # Lines 6-9: K steps. Only the first one calls task with the tensor theta itself: there
    # BatchNorm's running statistics move (`byol_task`).
    unroll = hypergrad == "exact" and not lookahead
    trajectory = [theta]
    losses = []                                             # losses[k]: l at theta_k
    gradients = []
    for _ in range(inner_steps):
        theta_k, loss, gradient = inner_step(task, trajectory[-1], alpha, unroll)
        trajectory.append(theta_k)
        losses.append(loss)
        gradients.append(gradient)
    theta_K = trajectory[-1]

    # Lines 11-14: lambda more steps, to the self-motivated target.
    target = theta_K.detach().requires_grad_()
    for _ in range(target_steps):
        target, loss, _ = inner_step(task, target, alpha)
        losses.append(loss)

    # Line 15.
    with torch.no_grad():
        loss, target_logits = task(target)
    losses.append(loss)
    terms = {"loss_ssl": losses[0], "loss_ssl_inner": losses[inner_steps],
             "loss_ssl_target": losses[-1]}

    # Eq. 22 in place of Eqs. 3-4: along the line from theta to the target. The quotient is the sum
    # of the K + lambda gradients on the way.
    if lookahead:
        return (theta - target).detach() / alpha, gradients[0], terms

    # Line 10, Eq. 3, and the gradient of Eq. 4.
    _, logits = task(theta_K)
    loss_kl = outer_loss(kind, target_logits, logits)
    gradient, curvature, negative = hypergradient(hypergrad, loss_kl, task, trajectory, gradients,
                                                  alpha)
    terms = {"loss_kl": loss_kl.detach(), **terms, "entropy_pi": relative_entropy(target_logits),
             "curvature": curvature, "negative_curvature": negative}
    return gradient, gradients[0], terms


def relative_entropy(logits):
    """Entropy of the softmax of logits (..., N) over log N, the mean over rows: 1 = uniform."""
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy.mean() / math.log(logits.shape[-1])


# ---- one step ------------------------------------------------------------------------------------
def byol_task(online, x, z_target, theta, args):
    """A mini-batch x (2, N, 3, H, W) as a task: weights (P,) -> (BYOL's loss, logits (2, N, N)).

    z_target (2, N, d) is fixed. BatchNorm's running statistics move at `theta` only."""
    def task(weights):
        if weights is theta:                    # not ==: see `gessl_task`
            p = embed(online, x, args, weights)
        else:
            with batch_stats_only(online):
                p = embed(online, x, args, weights)
        return byol_loss(p, z_target), class_logits(p, z_target, args.temperature)
    return task


def train_step(nets, opts, views, args, progress):
    """One outer step, optimiser included: views (2, M N / processes, 3, H, W) -> terms to log.

    A task is N images in a row. A term is the mean over tasks where nothing else is said.
    loss_kl              Eq. 3, or the distance that --outer-loss names.
    loss_ssl             BYOL's loss at theta.
    loss_ssl_inner       The same after K steps of Eq. 2. It should be below loss_ssl.
    loss_ssl_target      The same after K + lambda steps. It should be below loss_ssl_inner.
    entropy_pi           Entropy of the target's softmax, divided by log N. At 1 pi is uniform, and
                         the KL teaches nothing.
    curvature            Largest alpha ||H v|| / ||v|| that the hypergradient met. It should be
                         below 1; with fd the kinks of ReLU add to it, up to five times at the
                         start. Times K for neumann and cg, 0 for exact and first-order.
    negative_curvature   Share of tasks where conjugate gradients stopped for it. It should be 0.
    std_z                Spread of z' over directions, of the last task's first view. Near 1 is
                         good, 0 is collapsed.
    cos_outer_ssl        Cosine of the outer gradient (the hypergradient, or that of --lookahead)
                         and BYOL's gradient, each the mean over the tasks of its process.
    outer_to_ssl         Length of the first of these, divided by that of the second.

    --lookahead has no loss_kl, entropy_pi and curvature, --baseline loss_ssl and std_z alone.
    progress in [0, 1): the share of the training done before this step."""
    if args.baseline:
        return byol_step(nets, opts, views, args, progress)
    online = online_network(nets)
    theta = flatten(online)                                     # (P,)
    M = args.tasks // world_size()                              # of this process

    # Lines 1-4.
    mini_batches = views.unflatten(1, (M, -1)).transpose(0, 1)  # (M, 2, N, 3, H, W)

    # Lines 5-16, task after task, each from theta.
    outer_gradient = torch.zeros_like(theta)
    ssl_gradient = torch.zeros_like(theta)
    terms_of_tasks = []
    for x in mini_batches:
        with torch.no_grad():
            z_target = embed(nets["target"], x, args)           # (2, N, d)
        task = byol_task(online, x, z_target, theta, args)
        outer_task, ssl_task, terms_task = gessl_task(
            task, theta, args.inner_steps, args.target_steps, args.inner_lr,
            hypergrad=args.hypergrad, lookahead=args.lookahead, kind=args.outer_loss)
        outer_gradient += outer_task / M
        ssl_gradient += ssl_task / M
        terms_of_tasks.append(terms_task)

    # Line 17, Eq. 4, with AdamW for the descent.
    gradient = outer_gradient
    if not args.lookahead:
        gradient = outer_gradient + args.ssl_weight * ssl_gradient
    set_gradient(online, gradient)
    average_gradients(online.parameters())
    opts["encoder"].step()

    # BYOL's moving average, once: the decay to the power of all processes' mini-batches.
    decay = ema_decay_at(args.ema_decay, progress) ** args.tasks
    ema_update(nets["target"], online[:2], decay)

    terms = {}
    for name in terms_of_tasks[0]:
        terms[name] = torch.stack([of_task[name] for of_task in terms_of_tasks]).mean()
    terms["std_z"] = embedding_std(z_target[0])
    outer_norm = outer_gradient.norm()
    ssl_norm = ssl_gradient.norm()
    product = (outer_norm * ssl_norm).clamp(min=1e-30)
    terms["cos_outer_ssl"] = torch.dot(outer_gradient, ssl_gradient) / product
    terms["outer_to_ssl"] = outer_norm / nonzero_norm(ssl_gradient)
    return terms


# ---- what is measured at evaluations -------------------------------------------------------------
def curvature_probe(task, theta, iterations=10):
    """About the largest |eigenvalue| of the Hessian of l at theta (P,), by power iteration.

    Eq. 2 descends while alpha times it is below 2. Above 1 it overshoots the minimum where the
    eigenvalue is positive; at the start the largest is often negative."""
    hvp = exact_hvp(task, theta)
    v = torch.ones_like(theta)
    for _ in range(iterations):
        v = hvp(v / nonzero_norm(v))
    return v.norm()


@torch.no_grad()
def instance_accuracy(task, weights):
    """Share of a task's views that pi takes for the right one of the N images, at weights (P,)."""
    _, logits = task(weights)                                   # (2, N, N)
    image = torch.arange(logits.shape[-1], device=logits.device)
    return (logits.argmax(-1) == image).float().mean()


def adaptation(task, theta, alpha):
    """Instance accuracy in percent before and after one step of Eq. 2: a tensor (2,).

    [GeSSL Definition 3.1, Table 15]"""
    theta_1, _, _ = inner_step(task, theta, alpha)
    before = instance_accuracy(task, theta)
    after = instance_accuracy(task, theta_1)
    return 100 * torch.stack([before, after])


def diagnose(nets, views, args):
    """The last batch at the present weights: terms to log, of its first task but for adapted_*.

    adapted_*           Percent of a task's views that pi takes for the right image, before and
                        after one step of Eq. 2 on the model's own loss, the mean over the tasks of
                        the first process.
    rank_z, rank_p      Effective rank of projection and prediction. It should not fall to a few.
    std_p               Spread of the prediction over directions. Near 1 is good, 0 is collapsed.
    alpha_lambda_max    Alpha times the largest curvature of the task's loss, for images up to 96
                        px. It should be below 1."""
    online = online_network(nets)
    theta = flatten(online)
    M = 1 if args.baseline else args.tasks // world_size()
    mini_batches = views.unflatten(1, (M, -1)).transpose(0, 1)  # (M, 2, N, 3, H, W)
    tasks = []
    with batch_stats_only(nets):
        with torch.no_grad():
            z = embed(online[:2], mini_batches[0], args)        # (2, N, d)
            p = embed(online, mini_batches[0], args)
            for x in mini_batches:
                z_target = embed(nets["target"], x, args)
                tasks.append(byol_task(online, x, z_target, theta, args))

        found = {"rank_z": effective_rank(z.flatten(0, 1)),
                 "rank_p": effective_rank(p.flatten(0, 1)), "std_p": embedding_std(p[0])}
        adapted = [adaptation(task, theta, args.inner_lr) for task in tasks]
        before, after = torch.stack(adapted).mean(0)
        found |= {"adapted_before": before, "adapted_after": after}
        # A compiled network has no second derivative, and that of large convolutions is slow.
        if not args.baseline and not args.compile and args.image_size <= SMALL:
            found["alpha_lambda_max"] = args.inner_lr * curvature_probe(tasks[0], theta)
    return found


# ---- flags and checks ----------------------------------------------------------------------------
def parse_args(argv=None):
    p = base_parser(__doc__, RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    add = p.add_argument
    add("--tasks", type=number(int, 1),
        help="M, mini-batches of --batch-size images per outer step (paper: n = 8)")
    add("--inner-steps", type=number(int, 1), default=1,
        help="K, steps of Eq. 2 (default: 1 as in the paper); the more, the lower --inner-lr")
    add("--target-steps", type=number(int, 0),
        help="lambda, further steps to the self-motivated target (paper: 10); 0 = no target")
    add("--inner-lr", type=number(float, 1e-12),
        help="alpha of Eq. 2; alpha times the largest curvature of the loss is logged as "
        "alpha_lambda_max and should stay below 1")
    add("--hypergrad", choices=("fd", "exact", "first-order", "neumann", "cg"), default="fd",
        help="derivative through Eq. 2: fd, finite differences (default, the paper's); exact, the "
        "unrolled graph; first-order; neumann and cg, implicit")
    add("--lookahead", action="store_true",
        help="Eq. 22 in place of Eqs. 3-4: no KL; --hypergrad, --ssl-weight, --outer-loss and "
        "--temperature have no effect")
    add("--ssl-weight", type=number(float, 0), default=1.0,
        help="weight of BYOL's gradient beside Eq. 4; 0 = Eq. 4 word for word (default: 1)")
    add("--outer-loss", choices=("kl", "mse", "ce", "wasserstein", "bernoulli"), default="kl",
        help="distance of Eq. 3 (default: kl); bernoulli: pi as N sigmoids. Their gradients differ "
        "in length: only --ssl-weight 0 compares them alone")
    add("--temperature", type=number(float, 1e-3), help="tau of pi")
    add("--ema-decay", type=number(float, 0, 1),
        help="of BYOL's target per mini-batch at the start, rising to 1; 0 = no average")
    return parse(p, argv, ("tasks", "inner_steps", "target_steps", "hypergrad", "lookahead",
                           "ssl_weight", "outer_loss"))


def fill_defaults(args, data, device):
    """Fill the flags left open."""
    fill_from_recipe(args, RECIPES, data, device, SCRIPT)
    args.images_per_step = args.batch_size
    if not args.baseline:
        args.images_per_step = args.batch_size * args.tasks


def view_augmentations(args, data):
    """The augmentation of each view."""
    return AUGMENTATION[recipe_name(data.name, args.image_size)]


def check_args(args, data, world):
    """Settings that do not go together end in a sentence."""
    check_shared_flags(args, data, world)
    n = args.batch_size
    if args.baseline:
        if n % world or n < 2 * world:
            fail(f"--batch-size {n}: must be a multiple of the {world} processes, at least 2 "
                 "images each")
        return
    if args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole "
             "tasks")
    if args.sync_bn:
        fail("--sync-bn: goes with --baseline; a task's passes lie in one process")
    twice = args.hypergrad in ("exact", "neumann", "cg") and not args.lookahead
    if args.compile and twice:
        fail(f"--hypergrad {args.hypergrad}: cannot go with --compile, whose backward pass has no "
             "derivative")


def main(argv=None):
    args = parse_args(argv)
    # -- shared: main --
    rank, world, device = setup_processes(args.device)
    data = load_data(args.data, args.image_size, args.workers)
    fill_defaults(args, data, device)
    check_args(args, data, world)
    augmentations = view_augmentations(args, data)

    torch.manual_seed(args.seed)                    # the same initial weights on every process
    nets = build_nets(args).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        nets = nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    if args.compile:
        torch._dynamo.config.recompile_limit = 16   # views, tasks, evaluations differ in shape
        torch._functorch.config.donated_buffer = False      # a `diagnose` may go backward twice
        nets["backbone"].compile()
    opts = build_opts(nets, args)

    # The schedule counts optimiser steps. An incomplete last batch is left out.
    per_epoch = len(data.train) // args.images_per_step
    total = args.epochs * per_epoch
    stop = total
    if args.max_steps:
        stop = min(stop, args.max_steps)
    argv = sys.argv[1:] if argv is None else argv
    start, settings = open_run(args, argv, data, nets, opts, rank)
    log = Log(args, rank, stop, LIMITS)

    def evaluate(backbone):
        if rank > 0:
            return {}
        return monitor(backbone, data, args, augmentations[0], device)

    with graceful_stop() as stop_signal:
        if data.test_labels is None:
            log.show(f"{args.data} has no train/ and val/ or test/ of class folders: training "
                     "without labels, the k-NN monitor is off")
        elif start == 0:                            # what the run has to beat
            log.show("step 0: k-NN before training ...", live=True)
            raw = evaluate(None) if torch.is_tensor(data.train) else {}
            raw = {f"raw_pixels_{name}": value for name, value in raw.items()}
            log.event(0, **evaluate(nets["backbone"]), **raw)

        if start >= stop:
            log.show(f"complete at step {start}: nothing is left to train")

        # `train_step` is one step of gradient descent. The lines around it look, log and save.
        batches = training_batches(data, augmentations, args, rank, world, device, start, stop)
        for step, (views, index) in enumerate(batches, start + 1):      # counts steps that are done
            if step == 1 and rank == 0:
                draw_views(args, data, views, index, augmentations)
            set_lr(opts, lr_scale(step - 1, total, args.warmup_epochs * per_epoch))
            terms = train_step(nets, opts, views, args, progress=(step - 1) / total)
            log.add(step, terms)

            signum = stop_signal()
            last = step == stop
            epoch_end = last or step % per_epoch == 0
            evaluate_now = last or (epoch_end and (step // per_epoch) % args.eval_every == 0)
            if epoch_end or signum or step % args.log_every == 0:
                log.write(nets, opts["encoder"].param_groups[0]["lr"])
            if signum and rank == 0:                # first: an evaluation may outlast the grace
                save_run(args, step, nets, opts, augmentations[0], settings)
            if evaluate_now:
                log.event(step, **evaluate(nets["backbone"]), **diagnose(nets, views, args))
            if epoch_end and rank == 0:
                save_run(args, step, nets, opts, augmentations[0], settings)
            if signum:
                log.end(f"stopped by signal {signum} after step {step}; the same command goes on")
                raise SystemExit(128 + signum)
    labels = " --data FOLDER-WITH-TRAIN-AND-VAL" if data.test_labels is None else ""
    log.end(f"done: {args.out}/backbone.pt, curves.png, views.png, log.jsonl; next: "
            f"python eval_linear.py {args.out}{labels}")
    # -- end shared --


if __name__ == "__main__":
    run(main)
