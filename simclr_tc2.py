"""SimCLR with task conflict calibration (TC2): one file, read beside the papers.

SimCLR pulls the views of an image together and pushes other images away. TC2 splits each batch into
K "tasks" and lets the encoder adapt to a task's support views before it is judged on its query
views. Two small networks rewrite every embedding as a combination of factors that all tasks share,
so that what one task learns does not disturb another's.

  SimCLR  Chen et al. 2020, arXiv 2002.05709: NT-Xent, here over all pairs of m views
  TC2     Guo et al., "Exploring Transferability of Self-Supervised Learning by Task Conflict
          Calibration": Eqs. 1-7, Algorithm 1

One step, [TC2 Algorithm 1]:
  split the batch into K tasks of n images, m views each                       lines 2-3
  Z = f_theta(X), S = mean and covariance of Z
  f_v, f_w <- a step on the support views, then one on the query views         line 4   Eqs. 4, 5
  theta_k  <- theta - beta_1 grad L_support(theta)           for each task     line 5   Eq. 6
  theta    <- theta - beta_2 mean_k grad L_query(theta_k)                      line 5   Eq. 7

  paper             here                       shape, meaning
  X_tr; K, m        tasks; --tasks, --views    (K, m, n, 3, H, W): this process's tasks
  support, query    [:half], [half:]           the first m // 2 views, and the others (i.i.d.)
  f_theta, z_j      embed, Z                   (K, m, n, d) backbone and projector, norm sqrt(d)
  S                 S                          (d + 1, d) mean above covariance, of all processes
  f_v, V            factor_net, V              (d, n_f) columns: factors shared by all tasks
  f_w, W_j          weight_net, W              (..., n_f) f_w(z_j), weights of one sample
  f_w(z_j) V^T      z_hat                      (..., d) the calibrated embedding
  alpha_1..4        TC2_LR                     one Adam for f_v and f_w
  beta_1, beta_2    --inner-lr, --lr           plain gradient descent, Adam

  python simclr_tc2.py                                            drawn shapes, a minute on a laptop
  python simclr_tc2.py --data /imagenet100                        one GPU; plain SimCLR: --baseline
  torchrun --nproc-per-node 4 simclr_tc2.py --data /imagenet100   whole tasks; 8 GPUs: --tasks 8

Controls:
  --baseline --views 4             SimCLR at equal views
  --baseline --tasks 2 --views 2   the paper's SimCLR+T: tasks, neither calibration nor inner loop
  --inner-lr 0                     no inner loop
  --without calibration            plain first-order MAML; f_v, f_w train beside it, for the log
  --literal                        nearer to the paper's words

Result (results/tc2.md): at CPU scale TC2 trains, does not collapse, and does not beat SimCLR at
equal compute; not run at ImageNet scale.

Deviations from the paper, numbered as in results/tc2.md, which has the evidence; --literal undoes
the first four:
  (1) V is orthonormal by QR, not by the penalty alone.
  (2) f_w has a skip path z V.
  (3) z has norm sqrt(d): at unit norm Eq. 2 leaves a sample at most three weights.
  (4) The query error is that of the implicit n-way classification of a task: the squared distance
      of views collapses.
  (5) Eq. 7 is first order by default.
  (6) Eqs. 1-2 are means over samples, Eq. 7 over tasks.
  (7) n_f = d / 2: with n_f = d, the paper's best (Table 9), an orthonormal V is square,
      V V^T = I, and Eq. 1 is zero whatever f_v does.
Below Eq. 2 the paper prints W_j = f_w(z_j) V^T; that has d entries, not n_f, so W_j = f_w(z_j).
"""
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from common import (Log, all_reduce_sum, at_least_float32, average_gradients, base_parser,
                    batch_stats_only, check_shared_flags, draw_views, effective_rank,
                    embedding_std, fail, fill_from_recipe, gather_batch, graceful_stop, load_data,
                    lr_scale, make_backbone, monitor, number, open_run, parse, recipe_name, run,
                    save_run, say, set_lr, setup_processes, training_batches, world_size)

SCRIPT = "simclr_tc2"
TC2_LR = 3e-3           # alpha_1 .. alpha_4 at the peak of the schedule; the paper states none

# TC2 Appendix IV, the same for all views. In torchvision's words: RandomResizedCrop, flip,
# ColorJitter (brightness, contrast, saturation, hue), RandomGrayscale, GaussianBlur, solarize.
WEAK = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5,
        "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.1, "blur_p": 0.0,
        "solarize_p": 0.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
STRONG = {**WEAK, "crop": (0.08, 1.0), "jitter": (0.8, 0.8, 0.8, 0.2), "gray_p": 0.2,
          "blur_p": 0.5, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AUGMENTATION = {"shapes": WEAK, "small": WEAK, "imagenet": STRONG}

# The paper states no optimiser. small: the pre-training of Ermolov et al. 2021 on CIFAR, whom it
# cites for the linear probe, with a cosine schedule and without their weight decay of 1e-6. As part
# of Adam's gradient that would weigh 11 to 70 times more in TC2 than in SimCLR: the query error has
# a gradient as many times smaller. imagenet: ours. Only shapes has been run as it stands.
RECIPES = {
    "shapes": {"arch": "resnet_tiny", "epochs": 5, "batch_size": 64, "lr": 3e-3,
               "weight_decay": 1e-6, "warmup_epochs": 1.0, "eval_every": 1,
               "temperature": 0.2, "dim": 64},
    "small": {"arch": "resnet18", "epochs": 1000, "batch_size": 512, "lr": 3e-3,
              "weight_decay": 0.0, "warmup_epochs": 5.0, "eval_every": 20,
              "temperature": 0.5, "dim": 64},
    "imagenet": {"arch": "resnet50", "epochs": 200, "batch_size": 512, "lr": 1e-3,
                 "weight_decay": 0.0, "warmup_epochs": 10.0, "eval_every": 10,
                 "temperature": 0.2, "dim": 128},
}

# A term above its limit warns once, on the screen and in the log.
LIMITS = {"inner_step": (0.1, "the inner step is long beside the weights, which harms: lower "
                              "--inner-lr")}


# ---- model ---------------------------------------------------------------------------------------
def build_nets(args):
    """Backbone, linear projector and f_v, f_w. [TC2 Appendix IV]

    The encoder's weights are drawn first: --baseline starts from the same ones."""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    nets = nn.ModuleDict({"backbone": backbone, "projector": nn.Linear(feature_dim, args.dim)})
    if not args.baseline:
        orthogonal = "qr" not in args.without
        skip = "skip" not in args.without
        nets["factor_net"] = FactorNet(args.dim, args.factors, orthogonal)
        nets["weight_net"] = WeightNet(args.dim, args.factors, skip)
    return nets


def build_opts(nets, args):
    encoder = [*nets["backbone"].parameters(), *nets["projector"].parameters()]
    opts = {"encoder": torch.optim.Adam(encoder, args.lr, weight_decay=args.weight_decay,
                                        fused=True)}
    if not args.baseline:
        factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
        opts["factors"] = torch.optim.Adam(factors, TC2_LR, fused=True)
    return opts


def embed(encoder, x, args, theta=None):
    """z (..., d) of images x (..., 3, H, W), never in bfloat16; norm sqrt(d), or 1: --without norm.

    theta: {name: tensor} in place of the encoder's own parameters."""
    # All images in one batch (B, 3, H, W). channels_last: faster convolutions, on GPU and CPU.
    images = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        if theta is None:
            z = encoder(images)
        else:
            z = functional_call(encoder, theta, (images,), tie_weights=False)
    z = at_least_float32(z).unflatten(0, x.shape[:-3])
    z = F.normalize(z, dim=-1)
    if "norm" in args.without:
        return z
    return z * z.shape[-1] ** 0.5


# ---- SimCLR --------------------------------------------------------------------------------------
def info_nce(z, temperature):
    """NT-Xent over all pairs of views: z (m, n, d) -> scalar. Each row is classified among all
    other rows; its m - 1 positives are averaged. [SimCLR Eq. 1]"""
    m, n, _ = z.shape
    z = F.normalize(z, dim=-1).flatten(0, 1)                        # (m n, d)
    image = torch.arange(n, device=z.device).repeat(m)              # row r shows image[r]
    itself = torch.eye(m * n, dtype=torch.bool, device=z.device)
    positive = (image[:, None] == image) & ~itself

    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_p = similarity.log_softmax(dim=1)
    n_positives = m * n * (m - 1)
    return -log_p.where(positive, 0).sum() / n_positives


def simclr_step(nets, opts, views, args):
    """One step of SimCLR, views (m, n, 3, H, W) of this process. [SimCLR Algorithm 1]

    With --tasks K the loss is the mean over K groups of images: the paper's SimCLR+T."""
    encoder = nn.Sequential(nets["backbone"], nets["projector"])
    z = embed(encoder, views, args)                                 # (m, n, d)
    groups = gather_batch(z, dim=1).chunk(args.tasks, dim=1)        # of all processes' images
    loss = sum(info_nce(group, args.temperature) for group in groups) / args.tasks

    opts["encoder"].zero_grad()
    loss.backward()
    average_gradients(encoder.parameters())
    opts["encoder"].step()
    return {"loss_ssl": loss.detach(), "std_z": embedding_std(z[0].detach())}


# -- shared: tc2 --
def batch_summary(z):
    """S (d + 1, d): the mean in row 0, the covariance below it, of the M rows of z (..., d).

    The rows of all processes count; the covariance is divided by M - 1. [TC2 before Eq. 1]"""
    z = z.detach().flatten(0, -2)
    M = len(z) * world_size()
    mean = all_reduce_sum(z.sum(0)) / M
    covariance = all_reduce_sum((z - mean).T @ (z - mean)) / (M - 1)
    return torch.cat([mean[None], covariance])


def mlp(inputs, hidden, outputs):
    """Three linear layers with ReLU. [TC2 Appendix IV, of f_w; f_v has the same here]"""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


class FactorNet(nn.Module):
    """f_v: S (d + 1, d) -> V (d, n_f). [TC2 question i]

    Each column of S, a dimension's mean and covariances, gives a row of V; then QR, with signs such
    that the diagonal of R is positive, makes the columns orthonormal. A network of the flattened S
    would have 134M parameters at d = n_f = 512, this one has 2.1M."""
    def __init__(self, dim, n_factors, orthogonal=True, hidden=256):
        super().__init__()
        # With fewer hidden units than columns V would lack full rank, and its QR a usable gradient.
        self.mlp = mlp(dim + 1, max(hidden, 2 * n_factors), n_factors)
        # More columns than rows cannot be orthonormal.
        self.orthogonal = orthogonal and n_factors <= dim

    def forward(self, S):
        V = self.mlp(S.T)
        if self.orthogonal:
            V, R = torch.linalg.qr(V)
            V = V * torch.where(R.diagonal() < 0, -1, 1)    # QR is unique up to these signs
        return V


class WeightNet(nn.Module):
    """f_w: z (..., d), V (d, n_f) -> W (..., n_f) = z V + MLP(z). [TC2 question ii]

    V is given: no gradient reaches f_v through the skip path. With QR a loss of cosines, such as
    SimCLR's, gives f_v none at all: L_v alone trains it. MAE's decoder sees z_hat itself, so that
    its loss reaches f_v. The MLP starts at zero: calibration starts as the projection on V."""
    def __init__(self, dim, n_factors, skip=True, hidden=128):
        super().__init__()
        # With fewer hidden units than factors W would lack full rank.
        self.mlp = mlp(dim, max(hidden, n_factors), n_factors)
        self.skip = skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, z, V):
        if self.skip:
            return z @ V.detach() + self.mlp(z)
        return self.mlp(z)


def calibrate(z, V, weight_net):
    """z_hat = f_w(z) V^T, (..., d) -> (..., d). [TC2 question iii]"""
    return weight_net(z, V) @ V.T


def factor_loss(z, V):
    """L_v = ||V^T V - I||^2 + ||Z - Z V V^T||^2, the second per row of z (..., d). [TC2 Eq. 1]"""
    identity = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    orthogonality = (V.T @ V - identity).square().sum()
    unexplained = (z - z @ V @ V.T).square().sum(-1).mean()
    return orthogonality + unexplained


def weight_loss(z, W, V):
    """L_w = ||z_j - W_j V^T||^2 + ||W_j||_1, the mean over samples; V is given. [TC2 Eq. 2]"""
    error = (z - W @ V.detach().T).square().sum(-1)
    sparsity = W.abs().sum(-1)
    return (error + sparsity).mean()


def mean_over_tasks(loss_fn, z_hat):
    """Mean of loss_fn(z_hat[k], k) over the K tasks, with one task's graph in memory at a time.

    The loss is differentiated to z_hat task by task. What is returned is linear in z_hat, with this
    value and this gradient, so that backward() goes on from there by the chain rule."""
    K = len(z_hat)
    value, gradients = 0, []
    for k in range(K):
        z = z_hat[k].detach().requires_grad_()
        loss = loss_fn(z, k) / K
        value = value + loss.detach()
        gradient, = torch.autograd.grad(loss, z)
        gradients.append(gradient)
    linear = (z_hat * torch.stack(gradients)).sum()
    return value + linear - linear.detach()


def update_factors(nets, opt, Z, S, on_support, on_query, lambda_v, lambda_s):
    """Stage 1, f_theta fixed: a step of f_v and f_w on the support, one on the query views.

    Z (K, m, n, ..., d) embeddings without graph; S (d + 1, d); on_support(z_hat, k) is the loss of
    the calibrated support views of task k, on_query(z_hat, k) sees all its views. L_v + lambda_s
    L_w is Eq. 3: L_v of all views in both steps, as in Eq. 1, L_w of the views of the step.
    lambda_v = 1 but for an ablation. [TC2 Eqs. 3-5]"""
    factor_net, weight_net = nets["factor_net"], nets["weight_net"]
    half = Z.shape[1] // 2

    # Eq. 4: a step on the support views.
    V = factor_net(S)
    W = weight_net(Z[:, :half], V)
    loss_support = mean_over_tasks(on_support, W @ V.T)
    loss_v = factor_loss(Z, V)
    loss_w = weight_loss(Z[:, :half], W, V)
    take_step(opt, loss_support + lambda_v * loss_v + lambda_s * loss_w)

    # Eq. 5: a step on the query views, at f'_v and f'_w. It does not differentiate through Eq. 4.
    # W of all views: on_query takes what it needs. SimCLR makes its anchors of the support views,
    # MAE leaves them out.
    V = factor_net(S)
    W = weight_net(Z, V)
    loss_query = mean_over_tasks(on_query, W @ V.T)
    loss_v = factor_loss(Z, V)
    loss_w = weight_loss(Z[:, half:], W[:, half:], V)
    take_step(opt, loss_query + lambda_v * loss_v + lambda_s * loss_w)

    return {"loss_factors_support": loss_support.detach(), "loss_v": loss_v.detach(),
            "loss_w": loss_w.detach(), "loss_factors_query": loss_query.detach()}


def take_step(opt, loss):
    opt.zero_grad()
    loss.backward()
    average_gradients(opt.param_groups[0]["params"])
    opt.step()


def inner_step(theta, loss, beta_1, second_order=False):
    """theta_k = theta - beta_1 grad loss(theta), for theta {name: tensor}. [TC2 Eq. 6]

    First order: theta_k are new leaves. Second order: they are functions of theta."""
    # materialize_grads: zeros for a parameter that the loss does not use.
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=second_order,
                                materialize_grads=True)
    theta_k = {name: p - beta_1 * g for (name, p), g in zip(theta.items(), grads)}
    if not second_order:
        theta_k = {name: p.detach().requires_grad_() for name, p in theta_k.items()}
    return theta_k


def add_gradient(theta, loss, at):
    """theta's .grad += the gradient of `loss` with respect to the weights `at`. [TC2 Eq. 7]

    at = theta_k: first order. at = theta: second order, through the graph of Eq. 6."""
    grads = torch.autograd.grad(loss, list(at.values()), materialize_grads=True)
    for p, g in zip(theta.values(), grads):
        if p.grad is None:
            p.grad = torch.zeros_like(p)        # in the memory layout of p: fused Adam needs that
        p.grad += g


@torch.no_grad()
def relative_change(theta_k, theta):
    """||theta_k - theta|| / ||theta||: the length of the inner step."""
    change = [theta_k[name] - theta[name] for name in theta]
    return nn.utils.get_total_norm(change) / nn.utils.get_total_norm(list(theta.values()))

# -- end shared --


def prototypes(z):
    """Anchors (n, d) of the n implicit classes: each image's mean direction over its views z
    (v, n, d). Views have unit norm before the mean, anchors after it.

    [TC2 "anchor ... like a cluster center"]"""
    return F.normalize(F.normalize(z, dim=-1).mean(0), dim=-1)


def brier_loss(query, anchors, temperature):
    """L_sse: query (v, n, d) classified among anchors (n, d), squared error of the softmax.

    [TC2 Eqs. 5 and 7]"""
    query = F.normalize(query, dim=-1)
    anchors = F.normalize(anchors, dim=-1)
    logits = query @ anchors.T / temperature                        # (v, n, n)
    truth = torch.eye(len(anchors), dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-1) - truth).square().sum(-1).mean()


def view_sse(query):
    """L_sse as the squared distance of an image's views, query (v, n, d) of any norm: the mean over
    images and pairs of views. It collapses."""
    a, b = torch.triu_indices(len(query), len(query), 1, device=query.device)
    return (query[a] - query[b]).square().sum(-1).mean()


def query_loss(z, args):
    """The loss of Eqs. 5 and 7 of one task's views z (m, n, d): support first, then query.

    The paper does not say whose errors are squared: those of the n-way classification (brier, the
    default, whose anchors carry a gradient), or those between an image's views (sse)."""
    support, query = z[:len(z) // 2], z[len(z) // 2:]
    if args.query_loss == "brier":
        return brier_loss(query, prototypes(support), args.temperature)
    if args.query_loss == "sse":
        return view_sse(query)
    return info_nce(query, args.temperature)


# ---- one step ------------------------------------------------------------------------------------
def train_step(nets, opts, views, args, progress):
    """One step, optimisers included: views (m, K n, 3, H, W) of this process -> terms to log.

    [TC2 Algorithm 1]
    loss_query         L_sse of Eq. 7. With brier it should be below 1 - 1 / n, its value where all
                       embeddings are alike (collapse). At n = 128 and tau = 0.5 the best is 0.90.
    loss_support       InfoNCE before the inner step. It should be below log((m // 2) n - 1), its
                       value at collapse.
    inner_step         Length of the last task's inner step, divided by that of the weights. 0.001
                       to 0.005 in our runs; above 0.1 a warning comes.
    std_z, std_z_hat   Spread over directions, of the first view: near 1 is good, 0 is collapsed. z
                       is from before the step, z_hat is made of it by f_v and f_w after the step.
    cos_z_hat          Cosine of z and z_hat. At 1 calibration turns nothing.
    loss_v, loss_w     Eqs. 1 and 2, as they stand in Eq. 5.
    loss_factors_*     The first terms of Eqs. 4 and 5.
    loss_ssl           InfoNCE, the one loss of --baseline.

    progress, the share of the training done, is for scripts that change with it; this one does
    not."""
    if args.baseline:
        return simclr_step(nets, opts, views, args)
    encoder = nn.Sequential(nets["backbone"], nets["projector"])
    K = args.tasks // world_size()                              # of this process
    half = len(views) // 2

    # Lines 2-3. BatchNorm's running statistics move in this pass only.
    tasks = views.unflatten(1, (K, -1)).transpose(0, 1)         # (K, m, n, 3, H, W)
    with torch.no_grad():
        Z = embed(encoder, tasks, args)                         # (K, m, n, d)
    S = batch_summary(Z)

    # Line 4, Eqs. 4 and 5: f_theta is fixed. k, the task's number, is for mae_tc2.py.
    def on_support(z_hat, k):
        return info_nce(z_hat, args.temperature)

    def on_query(z_hat, k):
        return query_loss(z_hat, args)

    lambda_v = 0 if "lv" in args.without else 1
    factor_terms = update_factors(nets, opts["factors"], Z, S, on_support, on_query, lambda_v,
                                  args.lambda_s)
    V = nets["factor_net"](S).detach()                          # f_v has moved: V is taken anew

    def calibrated(z):
        if "calibration" in args.without:
            return z
        return calibrate(z, V, nets["weight_net"])

    # Line 5, Eqs. 6 and 7, task after task. f_v and f_w are fixed, they are no part of theta.
    theta = dict(encoder.named_parameters())
    opts["encoder"].zero_grad()
    support_losses = []
    query_losses = []
    with batch_stats_only(encoder):
        for x in tasks:                                         # x (m, n, 3, H, W)
            theta_k = theta
            if args.inner_lr:
                z_hat = calibrated(embed(encoder, x[:half], args))
                loss_support = info_nce(z_hat, args.temperature)
                theta_k = inner_step(theta, loss_support, args.inner_lr, args.second_order)
                support_losses.append(loss_support.detach())

            # All m views: brier's anchors are the support views at theta_k. Those of Eq. 6, at
            # theta, would save half of this pass, and cost 6 points (results/tc2.md, row 4).
            z_hat = calibrated(embed(encoder, x, args, theta_k))
            loss_query = query_loss(z_hat, args)

            # First order: the gradient at theta_k is given to theta as it is.
            at = theta if args.second_order else theta_k
            add_gradient(theta, loss_query / K, at)
            query_losses.append(loss_query.detach())

    # The length of the inner step is taken before theta moves.
    terms = {"loss_query": torch.stack(query_losses).mean()}
    if args.inner_lr:
        terms["loss_support"] = torch.stack(support_losses).mean()
        terms["inner_step"] = relative_change(theta_k, theta)
    average_gradients(theta.values())
    opts["encoder"].step()

    z = Z[:, 0].flatten(0, 1)                                   # the first view of every image
    z_hat = calibrated(z).detach()
    terms |= {"std_z": embedding_std(z), "std_z_hat": embedding_std(z_hat),
              "cos_z_hat": F.cosine_similarity(z_hat, z, dim=-1).mean()}
    return {**terms, **factor_terms}


# ---- what is measured at evaluations -------------------------------------------------------------
def gradient_conflict(task_gradients):
    """(mean cosine, share of negative cosines) over the pairs of rows of task_gradients (K, P).

    [TC2 Fig. 1b/c]"""
    K = len(task_gradients)
    unit = F.normalize(task_gradients, dim=1)
    a, b = torch.triu_indices(K, K, 1, device=unit.device)
    cosine = (unit @ unit.T)[a, b]
    return cosine.mean(), (cosine < 0).to(cosine.dtype).mean()


def flat_gradient(loss, theta):
    """The gradient of `loss` to theta {name: tensor}, laid end to end (P,). The graph is kept."""
    grads = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


@torch.no_grad()
def instance_accuracy(z):
    """Share of the rows of z (m, n, d) whose nearest other row is a view of the same image."""
    n = z.shape[1]
    z = F.normalize(z, dim=-1).flatten(0, 1)
    nearest = (z @ z.T).fill_diagonal_(-torch.inf).argmax(1)
    image = torch.arange(len(z), device=z.device) % n
    return (nearest % n == image).float().mean()


def diagnose(nets, views, args):
    """This process's last batch at the present weights, in K groups (4 if K = 1): terms to log.
    With P processes the groups are P times smaller than the tasks.

    rank_z, rank_z_hat   Effective rank of the embeddings, before and after calibration.
    conflict_*           Gradients of the groups' InfoNCE, on z (raw) and on z_hat (calibrated):
                         mean cosine, and share of negative cosines. The groups are random, and
                         gradients of small groups have small cosines anyway. [TC2 Fig. 1b/c]
    adapted_*            Instance accuracy of z in a group, before and after one step of Eq. 6 on
                         the loss that the model is trained on. [GeSSL Definition 3.1]
    orthogonality        The first term of Eq. 1.
    explained_by_w       Share of Z that W V^T keeps.
    zero_weights         Share of |W| below 0.01."""
    encoder = nn.Sequential(nets["backbone"], nets["projector"])
    theta = dict(encoder.named_parameters())
    calibrating = not args.baseline and "calibration" not in args.without
    K = args.tasks if args.tasks > 1 else 4
    # At least two groups of two images or more: one process of many has few images. Those that fill
    # no group are left out.
    K = max(2, min(K, views.shape[1] // 2))
    n = views.shape[1] // K
    tasks = views[:, :K * n].unflatten(1, (K, n)).transpose(0, 1)       # (K, m, n, 3, H, W)
    raw_gradients = []
    calibrated_gradients = []
    before = []
    after = []
    with batch_stats_only(encoder):
        with torch.no_grad():
            Z = embed(encoder, tasks, args)
        found = {"rank_z": effective_rank(Z.flatten(0, -2))}
        if calibrating:
            V = nets["factor_net"](batch_summary(Z)).detach()
            found |= calibration_health(Z, V, nets["weight_net"])

        for x in tasks:
            z = embed(encoder, x, args)
            raw_loss = info_nce(z, args.temperature)
            raw_gradients.append(flat_gradient(raw_loss, theta))
            own_loss = raw_loss                                 # what the model is trained on
            if calibrating:
                z_hat = calibrate(z, V, nets["weight_net"])
                own_loss = info_nce(z_hat, args.temperature)
                calibrated_gradients.append(flat_gradient(own_loss, theta))

            theta_k = inner_step(theta, own_loss, args.inner_lr)
            before.append(instance_accuracy(z))
            with torch.no_grad():
                after.append(instance_accuracy(embed(encoder, x, args, theta_k)))

    cosine, negative = gradient_conflict(torch.stack(raw_gradients))
    found |= {"conflict_cos_raw": cosine, "conflict_negative_raw": negative}
    if calibrating:
        cosine, negative = gradient_conflict(torch.stack(calibrated_gradients))
        found |= {"conflict_cos_calibrated": cosine, "conflict_negative_calibrated": negative}
    found["adapted_before"] = 100 * torch.stack(before).mean()
    found["adapted_after"] = 100 * torch.stack(after).mean()
    return found


@torch.no_grad()
def calibration_health(Z, V, weight_net):
    """What f_v and f_w do to Z (..., d): terms to log."""
    W = weight_net(Z, V)
    z_hat = W @ V.T
    identity = torch.eye(V.shape[1], device=V.device)
    return {"rank_z_hat": effective_rank(z_hat.flatten(0, -2)),
            "orthogonality": (V.T @ V - identity).square().sum(),
            "explained_by_w": 1 - (Z - z_hat).square().sum() / Z.square().sum(),
            "zero_weights": (W.abs() < 1e-2).float().mean()}


# ---- flags and checks ----------------------------------------------------------------------------
def parse_args(argv=None):
    p = base_parser(__doc__, RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    add = p.add_argument
    add("--views", type=number(int, 2),
        help="m, augmented views per image (default: 4; 2 with --baseline)")
    add("--tasks", type=number(int, 1),
        help="K, tasks per batch (default: 4 as in the paper; 1 with --baseline)")
    add("--temperature", type=number(float, 1e-3), help="tau of InfoNCE and of the query error")
    add("--inner-lr", type=number(float, 0), default=0.01,
        help="beta_1 of Eq. 6; 0 = no inner loop (default: 0.01); with --baseline only that of the "
        "step behind adapted_after")
    add("--second-order", action="store_true",
        help="differentiate Eq. 7 through Eq. 6 (default: first order)")
    add("--factors", type=number(int, 1), help="n_f, columns of V (default: d / 2; d, the "
        "paper's best, makes Eq. 1 zero by construction; above d there is no QR)")
    add("--lambda-s", type=number(float, 0), default=0.1,
        help="lambda_s of Eq. 3; 0 = no L_w (default: 0.1; paper: 0.001 to 1)")
    add("--query-loss", choices=("brier", "nce", "sse"),
        help="L_sse of Eqs. 5 and 7: brier, squared error of the n-way classification (default); "
        "nce, InfoNCE; sse, squared distance of views, which collapses")
    add("--without", nargs="+", default=[], choices=("qr", "skip", "norm", "lv", "calibration"),
        help="take away: the QR of V, the skip path of f_w, the norm sqrt(d) of z, L_v [Table 12], "
        "calibration in Eqs. 6-7")
    add("--literal", action="store_true",
        help="nearer to the paper's words: --without qr skip norm --query-loss sse; collapses")
    return parse(p, argv, ("second_order", "factors", "lambda_s", "query_loss", "without",
                           "literal"))


def fill_defaults(args, data, device):
    """Fill the flags left open."""
    fill_from_recipe(args, RECIPES, data, device, SCRIPT)
    args.views = args.views or (2 if args.baseline else 4)
    args.tasks = args.tasks or (1 if args.baseline else 4)
    args.factors = args.factors or args.dim // 2
    args.query_loss = args.query_loss or ("sse" if args.literal else "brier")
    without = set(args.without)
    if args.literal:
        without |= {"qr", "skip", "norm"}
    args.without = sorted(without)
    args.images_per_step = args.batch_size
    if args.factors == args.dim and "qr" not in without and not args.baseline:
        say(f"--factors {args.factors}: as many as dimensions, so that V is square and orthogonal: "
            "Eq. 1 is zero by construction")
    qr = "qr" not in without and args.factors <= args.dim
    if "lv" in without and qr and not args.baseline:
        say("--without lv: with the QR no other loss gives f_v a gradient, so that V is left to "
            "chance; the paper's ablation is --without lv qr")


def view_augmentations(args, data):
    """The augmentation of each view."""
    recipe = recipe_name(data.name, args.image_size)
    return [AUGMENTATION[recipe]] * args.views


def check_args(args, data, world):
    """Settings that do not go together end in a sentence."""
    check_shared_flags(args, data, world)
    n = args.batch_size
    if n % world or n % args.tasks or n < 2 * max(args.tasks, world):
        fail(f"--batch-size {n}: must be a multiple of --tasks {args.tasks} and of {world} "
             "processes, at least 2 images each")
    if args.baseline:
        return
    if args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole "
             "tasks")
    if args.views < 4:
        fail(f"--views {args.views}: TC2 takes at least 4 here, two for support and two for query")
    if args.sync_bn:
        fail("--sync-bn: goes with --baseline; a task's passes lie in one process")
    if args.compile and args.second_order:
        fail("--second-order: cannot go with --compile, whose backward pass has no derivative")


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
