"""BYOL with the self-motivated target of GeSSL: one file, read beside the papers.

BYOL predicts the slowly moving average of its own embedding of the other view. GeSSL calls each mini-batch a task, "tell N images apart",
lets the network take K + lambda gradient steps on it, and moves the start so that after K steps the network already answers like the
network lambda steps later. That gradient runs through the inner steps: the file holds five ways to take it.

  BYOL    Grill et al. 2020, arXiv 2006.07733: Eqs. 1-2, Section 3.3 on the moving average
  GeSSL   "On the Universality of Self-Supervised Representation Learning": Eqs. 2-4, Algorithm 1, Appendix G.4 (Eqs. 18-22)

  paper               here                         shape, meaning
  X_tr,l, N, M (n)    views, --batch-size --tasks  M mini-batches of N images per outer step; views[v] is (M N / processes, 3, H, W)
  f_theta             theta                        parameters of backbone, projector, predictor: a list of tensors
  f_theta^{l,K}       trajectory[-1]               theta after K (--inner-steps) steps of gradient descent on task l
  f_theta^{l,K+lambda}                             the self-motivated target, lambda = --target-steps further steps; gives only numbers
  pi(f(x))            softmax(class_logits(p, z')) (2N, N)  p (2N, d) prediction, z' (2N, d) projection by the moving average
  alpha, beta         --inner-lr, --lr             of Eq. 2 (plain gradient descent) and of Eq. 4 (AdamW)

  python byol_gessl.py                                          drawn shapes, two minutes on a laptop
  python byol_gessl.py --data /imagenet100                      one GPU; plain BYOL with --baseline
  torchrun --nproc-per-node 8 byol_gessl.py --data /imagenet100

Controls: `--baseline` BYOL on mini-batches of N | `--baseline --batch-size MN` BYOL on the images of an outer step (Table 22) | `--lookahead`
the same inner loop without the KL (Eq. 22) | `--hypergrad first-order` no second derivatives | `--ssl-weight 0` Eq. 4 word for word.

Result (results/README.md): at CPU scale GeSSL trains, does not collapse, does not beat BYOL; not run at ImageNet scale.
Deviations from the paper (evidence in README.md): (1) pi is the softmax over the N anchors of the SSL loss, not a learned head, which does not
train; (2) the SSL gradient is added, --ssl-weight; (3) means, not sums; (4) Eqs. 18-21 read for the start of the inner loop; (5) AdamW, not SGD.
"""
import contextlib, copy, math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from common import (Log, average_gradients, base_parser, batch_stats_only, class_hash, effective_rank, ema_update, embedding_std, fail, graceful_stop,
                    load_data, lr_scale, make_backbone, monitor, number, open_run, resolve, save_run, set_lr, setup_distributed, training_views, world_size)

SCRIPT = "byol_gessl"
SOLVER_TERMS = 5                # highest power of the Neumann series, iterations of conjugate gradients
FD_LENGTH = 0.03                # length of the finite difference in parameter space; shorter ones are worse in ReLU networks
WEAK = dict(crop=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.1, blur_p=0.0,
            solarize_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
STRONG = dict(crop=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=1.0,
              solarize_p=0.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
AUGMENTATION = {"shapes": [dict(WEAK, gray_p=0.3)], "small": [WEAK], "imagenet": [STRONG, dict(STRONG, blur_p=0.1, solarize_p=0.2)]}      # BYOL Appendix B
RECIPES = {     # N and M as in GeSSL's Appendix G.5; the paper states neither beta nor a projector, heads as in BYOL for imagenet
    "shapes": dict(arch="resnet_tiny", epochs=4, batch_size=32, lr=5e-3, weight_decay=1e-4, warmup_epochs=0.5, eval_every=1,
                   views=2, tasks=2, target_steps=3, inner_lr=0.005, temperature=0.2, ema_decay=0.5, hidden=256, dim=128),
    "small": dict(arch="resnet18", epochs=200, batch_size=32, lr=2e-3, weight_decay=1e-4, warmup_epochs=5.0, eval_every=10,
                  views=2, tasks=8, target_steps=10, inner_lr=0.02, temperature=0.2, ema_decay=0.996, hidden=1024, dim=128),
    "imagenet": dict(arch="resnet50", epochs=200, batch_size=32, lr=1e-3, weight_decay=1e-4, warmup_epochs=10.0, eval_every=10,
                     views=2, tasks=8, target_steps=10, inner_lr=0.02, temperature=0.2, ema_decay=0.999, hidden=4096, dim=256)}
LIMITS = {"curvature": (1, "alpha ||H v|| / ||v|| above 1: the step of Eq. 2 overshoots, a Neumann series diverges; lower --inner-lr"),
          "negative_curvature": (0, "conjugate gradients met negative curvature and stopped early; lower --inner-lr")}


def parse_args(argv=None):
    p, flag = base_parser(__doc__.split("\n")[0], RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    flag("--tasks", number(int, 1), "M, mini-batches of --batch-size images per outer step (paper: n = 8)")
    flag("--inner-steps", number(int, 1), "K of Eq. 2 (default: 1 as in the paper)", default=1)
    flag("--target-steps", number(int, 0), "lambda of Eq. 3, further steps to the self-motivated target (paper: 10); 0 = no target")
    flag("--inner-lr", number(float, 1e-12), "alpha of Eq. 2; alpha times the largest curvature of the loss (logged as alpha_lambda_max) should stay below 1")
    flag("--hypergrad", str, "derivative through Eq. 2: fd, finite differences (paper); exact, the unrolled graph; first-order; neumann and cg, "
         "implicit (default: fd)", choices=("fd", "exact", "first-order", "neumann", "cg"), default="fd")
    p.add_argument("--lookahead", action="store_true", help="Eq. 22 in place of Eqs. 3-4: no KL, so that --hypergrad and the next three flags have no effect")
    flag("--ssl-weight", number(float, 0), "weight of the SSL gradient beside Eq. 4; 0 = Eq. 4 word for word (default: 1)", default=1.0)
    flag("--outer-loss", str, "distance of Eq. 3 (default: kl)", choices=("kl", "mse", "ce", "wasserstein"), default="kl")
    flag("--temperature", number(float, 1e-3), "tau of pi")
    flag("--ema-decay", number(float, 0, 1), "decay of BYOL's target per mini-batch at the start, rising to 1; 0 = no average")
    return p.parse_args(argv)


def check_args(args, data, world):
    """The number of images in one step; settings that do not go together end in `fail`."""
    per_step = args.batch_size * (1 if args.baseline else args.tasks)
    if args.baseline and (args.batch_size % world or args.batch_size < 2 * world):
        fail(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes, at least 2 images each")
    if not args.baseline and args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole tasks")
    if args.sync_bn and not args.baseline:
        fail("--sync-bn: goes with --baseline; GeSSL's batches are tasks, each in one process, and no statistics cross them")
    if per_step > len(data.train):
        fail(f"--batch-size {args.batch_size}: one step takes {per_step} images, there are only {len(data.train)} training images")
    if args.compile and not args.baseline and args.hypergrad in ("exact", "neumann", "cg"):
        fail(f"--hypergrad {args.hypergrad}: cannot go with --compile, whose backward pass cannot be differentiated")
    return per_step


# ---- model ----------------------------------------------------------------------------------------------------------
def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build_nets(args):
    """(ModuleDict of backbone, projector, predictor and target, feature dimension). target, xi in the paper: a copy of backbone and
    projector that no gradient reaches. [BYOL Section 3.1]"""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    nets = nn.ModuleDict({"backbone": backbone, "projector": mlp(feature_dim, args.hidden, args.dim), "predictor": mlp(args.dim, args.hidden, args.dim)})
    nets["target"] = copy.deepcopy(nn.Sequential(nets["backbone"], nets["projector"])).requires_grad_(False)
    return nets, feature_dim


def build_opts(nets, args):
    params = [p for name in ("backbone", "projector", "predictor") for p in nets[name].parameters()]
    groups = [{"params": [p for p in params if (p.ndim > 1) == matrix], "weight_decay": args.weight_decay * matrix} for matrix in (True, False)]
    return {"encoder": torch.optim.AdamW(groups, args.lr, fused=True)}                              # no decay of biases and BatchNorm


# ---- BYOL -----------------------------------------------------------------------------------------------------------
def swap_views(z):
    """Rows (2N, d), view after view, in the order of each row's other view."""
    return z.roll(len(z) // 2, 0)


def byol_loss(p, z_target):
    """Mean of 2 - 2 cos(p_i, z'_sigma(i)) over the 2N views, sigma swaps the views of an image: p, z_target (2N, d) -> scalar. [BYOL Eq. 2]"""
    return (2 - 2 * F.cosine_similarity(p, swap_views(z_target.detach()), dim=1)).mean()


def ema_decay_at(base, progress):
    """tau of xi <- tau xi + (1 - tau) theta: from `base` to 1 along half a cosine, progress in [0, 1]; 0 stays 0. [BYOL Section 3.3]"""
    return base and 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


# ---- GeSSL ----------------------------------------------------------------------------------------------------------
def class_logits(p, anchors, temperature):
    """Logits of pi: every view classified among the other views of the N images, p, anchors (2N, d) -> (2N, N), the right class of row i is
    i mod N. The anchors are those of the SSL loss, so that pi sees every parameter the loss sees. [GeSSL Section 2, pi of Eq. 3]"""
    p, anchors = (F.normalize(t, dim=1).unflatten(0, (2, -1)) for t in (p, swap_views(anchors)))                    # (2, N, d)
    return (p @ anchors.mT / temperature).flatten(0, 1)


def self_motivated_kl(target_logits, logits):
    """KL(pi(f^{K + lambda}) || pi(f^K)), the first one fixed: two (R, N) -> scalar, the mean over rows. [GeSSL Eq. 3]"""
    return F.kl_div(logits.log_softmax(1), target_logits.detach().log_softmax(1), reduction="batchmean", log_target=True)


def outer_loss(kind, target_logits, logits):
    """Eq. 3 and its alternatives, mean over rows: kl; ce (the same gradient: the target is fixed); mse; wasserstein, whose ground distance
    between any two of the N classes is 1, since images have no order. [GeSSL Fig. 3, Eqs. 14-17]"""
    if kind == "kl":
        return self_motivated_kl(target_logits, logits)
    target, p = target_logits.detach().softmax(1), logits.softmax(1)
    by_class = -target * logits.log_softmax(1) if kind == "ce" else (p - target).square() if kind == "mse" else (p - target).abs() / 2
    return by_class.sum(1).mean()


def inner_step(loss_fn, params, inner_lr, create_graph=False):
    """One step of plain gradient descent, (new params, loss, gradient); params is a list of tensors, loss_fn(params) a scalar. The new ones
    are leaves, or with create_graph functions of the old ones. [GeSSL Eq. 2]"""
    loss = loss_fn(params)
    grads = torch.autograd.grad(loss, params, create_graph=create_graph, materialize_grads=True)
    new = torch._foreach_add(params, grads, alpha=-inner_lr)
    return new if create_graph else [p.detach().requires_grad_() for p in new], loss.detach(), [g.detach() for g in grads]


def dot(a, b):
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def length_ratio(a, b):
    return nn.utils.get_total_norm(a) / nn.utils.get_total_norm(b).clamp(min=1e-30)


def scale_add(a, s, b):
    """a + s b for lists of tensors and a scalar tensor s: the host never waits for its value."""
    return torch._foreach_add(a, torch._foreach_mul(b, s))


def difference_hvp(loss_fn, params, v, length, gradient=None):
    """H v = (grad(params) - grad(params - e v)) / e with e = length / ||v||; the inner loop has `gradient`, that at params, already. Backward, since
    its error -(e / 2) grad(v H v) lets Eq. 4 descend the curvature along v; that of the forward difference climbs it. [GeSSL Eq. 21]"""
    e = length / nn.utils.get_total_norm(v).clamp(min=1e-30)
    at, behind = ([p.detach().requires_grad_() for p in where] for where in (params, scale_add(params, -e, v)))
    gradient = gradient or torch.autograd.grad(loss_fn(at), at, materialize_grads=True)
    return torch._foreach_div(torch._foreach_sub(gradient, torch.autograd.grad(loss_fn(behind), behind, materialize_grads=True)), e)


def exact_hvp(loss_fn, params):
    """The function v -> H v at params (leaves): one graph of the gradient, differentiated at each call."""
    grads = torch.autograd.grad(loss_fn(params), params, create_graph=True, materialize_grads=True)
    used = [g for g in grads if g.requires_grad]
    return lambda v: torch.autograd.grad(used, params, [u for u, g in zip(v, grads) if g.requires_grad], retain_graph=True, materialize_grads=True)


def neumann(hvp, v, terms):
    """sum_{t=0}^{terms} (-A)^t v with A = hvp, (I + A)^{-1} v if it converges; and the largest growth ||A u|| / ||u||. [GeSSL Eq. 19]"""
    total, term, growth = list(v), list(v), [torch.zeros_like(v[0].sum())]
    for _ in range(terms):
        before, term = term, torch._foreach_neg(hvp(term))
        growth.append(length_ratio(term, before))
        total = torch._foreach_add(total, term)
    return total, torch.stack(growth).max()


def conjugate_gradient(hvp, v, iterations):
    """x with (I + A) x = v, A = hvp, from x = 0; and the largest ||A p|| / ||p||, and 1 if a direction p had p (I + A) p <= 0, where it stops
    (with x = v if that is the first one). All of it without waiting for a value. [GeSSL Eq. 20]"""
    x, r, p, going, growth = [torch.zeros_like(t) for t in v], list(v), list(v), torch.ones_like(dot(v, v)), [torch.zeros_like(v[0].sum())]
    negative = torch.zeros_like(going)
    for i in range(iterations):
        Ap = hvp(p)
        growth.append(going * length_ratio(Ap, p))
        q = torch._foreach_add(p, Ap)
        rr, curvature = dot(r, r), dot(p, q)
        negative = torch.maximum(negative, going * ((curvature <= 0) & (rr > 0)))
        if i == 0:
            x = torch._foreach_mul(v, negative)
        going = going * (curvature > 0)
        step = torch.where(going > 0, rr / curvature.where(going > 0, 1), 0)
        x, r = scale_add(x, step, p), scale_add(r, -step, q)
        p = scale_add(r, torch.where(rr > 0, dot(r, r) / rr.where(rr > 0, 1), 0), p)
    return x, torch.stack(growth).max(), negative


def hypergradient(mode, loss_fn, outer_fn, trajectory, inner_lr, terms=SOLVER_TERMS, fd_length=FD_LENGTH, inner_grads=None):
    """[GeSSL Eq. 4] d outer_fn(theta_K) / d theta_0 where trajectory = [theta_0, .., theta_K] comes from `inner_step`, as do the K inner_grads (fd takes
    them anew if they are not given). Returns (list of gradients, curvature, negative): the largest alpha ||H u|| / ||u|| met (0 for exact
    and first-order) and whether cg met negative curvature.

    first-order  v = d outer_fn / d theta_K, as if theta_K = theta_0 + constant
    exact        through the graph of the inner steps (they need create_graph): prod_k (I - alpha H(theta_k)) v             [GeSSL Eq. 18]
    fd           the same product, each H v from one more gradient instead of a graph                                       [GeSSL Eq. 21]
    neumann, cg  (I + K alpha H(theta_K))^{-1} v: theta_K as minimum of loss_fn + ||theta_K - theta_0||^2 / (2 K alpha)    [GeSSL Eqs. 19-20]"""
    end = trajectory[-1]
    v = list(torch.autograd.grad(outer_fn(end), trajectory[0] if mode == "exact" else end, materialize_grads=True))
    zero = torch.zeros((), dtype=v[0].dtype, device=v[0].device)
    if mode in ("exact", "first-order") or len(trajectory) == 1:
        return v, zero, zero
    if mode == "fd":
        curvature = []
        for params, gradient in zip(trajectory[-2::-1], (inner_grads or [None] * len(trajectory[1:]))[::-1]):
            Hv = difference_hvp(loss_fn, params, v, fd_length, gradient)
            curvature.append(inner_lr * length_ratio(Hv, v))
            v = torch._foreach_add(v, Hv, alpha=-inner_lr)
        return v, torch.stack(curvature).max(), zero
    H, scale = exact_hvp(loss_fn, end), inner_lr * (len(trajectory) - 1)
    hvp = lambda u: torch._foreach_mul(H(u), scale)
    return (*neumann(hvp, v, terms), zero) if mode == "neumann" else conjugate_gradient(hvp, v, terms)


def gessl_task(forward, ssl_loss, logits, theta, inner_steps, target_steps, inner_lr, hypergrad="fd", lookahead=False, outer="kl"):
    """One task: (outer gradient, SSL gradient, terms) at theta, a list of leaves that is left alone. [GeSSL Algorithm 1, lines 5-16]

    forward(params) -> outputs of the task's views; ssl_loss(outputs) -> scalar; logits(outputs) -> (R, N), those of pi."""
    loss_fn = lambda params: ssl_loss(forward(params))
    trajectory, losses, inner_grads = [theta], [], []
    for _ in range(inner_steps):                                                                # lines 6-9
        params, loss, grads = inner_step(loss_fn, trajectory[-1], inner_lr, hypergrad == "exact" and not lookahead)
        inner_grads, losses, trajectory = inner_grads + [grads], losses + [loss], trajectory + [params]
    params = [p.detach().requires_grad_() for p in trajectory[-1]]
    for _ in range(target_steps):                                                               # lines 11-14
        params, loss, _ = inner_step(loss_fn, params, inner_lr)
        losses.append(loss)
    with torch.no_grad():                                                                       # line 15
        outputs = forward(params)
        losses, target_logits = losses + [ssl_loss(outputs)], logits(outputs)
    terms = {"loss_ssl": losses[0], "loss_ssl_inner": losses[inner_steps], "loss_ssl_target": losses[-1]}
    if lookahead:                                                                               # [GeSSL Eq. 22]
        return torch._foreach_div(torch._foreach_sub([p.detach() for p in theta], [p.detach() for p in params]), inner_lr), inner_grads[0], terms
    found = {}
    def outer_fn(params):
        found["loss"] = outer_loss(outer, target_logits, logits(forward(params)))
        return found["loss"]
    gradient, curvature, negative = hypergradient(hypergrad, loss_fn, outer_fn, trajectory, inner_lr, inner_grads=inner_grads)
    entropy = torch.special.entr(target_logits.softmax(1)).sum(1).mean() / math.log(target_logits.shape[1])
    return [g.detach() for g in gradient], inner_grads[0], {"loss_kl": found["loss"].detach(), **terms, "entropy_pi": entropy, "curvature": curvature.detach(),
                                                   "negative_curvature": negative.detach()}


def curvature_probe(loss_fn, params, iterations=10):
    """Power iteration: about the largest |eigenvalue| of the Hessian of loss_fn at params. Eq. 2 descends while alpha times it is below 2."""
    hvp, v = exact_hvp(loss_fn, params), [torch.ones_like(p) for p in params]
    for _ in range(iterations):
        v = list(hvp(torch._foreach_div(v, nn.utils.get_total_norm(v).clamp(min=1e-30))))
    return nn.utils.get_total_norm(v)


# ---- one iteration --------------------------------------------------------------------------------------------------
def embed(net, x, args, params=None):
    """Outputs (rows, d) of images x (rows, 3, H, W), not in bfloat16. With `params` ({name: tensor}) BatchNorm's running statistics, theta's, stay."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16), contextlib.nullcontext() if params is None else batch_stats_only(net):
        out = net(x) if params is None else functional_call(net, params, (x,), tie_weights=False)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def train_step(nets, opts, views, args, progress):
    """One outer iteration, optimiser step included: views is [x1, x2], (M N / processes, 3, H, W) each; progress in [0, 1] is the share of
    the training done. [GeSSL Algorithm 1, BYOL Algorithm 1]"""
    online = nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"])
    names, theta = zip(*online.named_parameters())
    theta, M = list(theta), 1 if args.baseline else args.tasks // world_size()                  # this process's tasks
    zeros = lambda: [] if args.baseline else [torch.zeros_like(p) for p in theta]
    outer, ssl, terms = zeros(), zeros(), {}
    for x in (torch.cat(task) for task in zip(*(view.chunk(M) for view in views))):             # (2N, 3, H, W), view after view
        with torch.no_grad():
            z_target = embed(nets["target"], x, args)                                           # fixed during the task
        forward = lambda params: embed(online, x, args, None if params is theta else dict(zip(names, params)))
        ssl_loss = lambda p: byol_loss(p, z_target)
        if args.baseline:
            loss = ssl_loss(forward(theta))
            gradient, found = torch.autograd.grad(loss, theta), {"loss_ssl": loss.detach()}
        else:
            task_outer, task_ssl, found = gessl_task(forward, ssl_loss, lambda p: class_logits(p, z_target, args.temperature), theta, args.inner_steps,
                                                     args.target_steps, args.inner_lr, args.hypergrad, args.lookahead, args.outer_loss)
            torch._foreach_add_(outer, task_outer, alpha=1 / M)                                 # [GeSSL Eq. 4]
            torch._foreach_add_(ssl, task_ssl, alpha=1 / M)
        terms = {k: terms.get(k, 0) + v / M for k, v in found.items()}
    terms["std_z"] = embedding_std(z_target[:len(z_target) // 2])
    if not args.baseline:
        terms |= {"cos_outer_ssl": dot(outer, ssl) / (nn.utils.get_total_norm(outer) * nn.utils.get_total_norm(ssl)).clamp(min=1e-30),
                  "outer_to_ssl": length_ratio(outer, ssl)}
        gradient = torch._foreach_add(outer, ssl, alpha=0 if args.lookahead else args.ssl_weight)
    for p, g in zip(theta, gradient):
        p.grad = g
    average_gradients(theta)
    opts["encoder"].step()
    ema_update(nets["target"], online[:2], ema_decay_at(args.ema_decay, progress) ** (1 if args.baseline else args.tasks))
    return terms


def diagnose(nets, views, args):
    """At the present weights: effective ranks of projection and prediction, and alpha times the largest curvature of one task's loss."""
    online, n = nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"]), args.batch_size
    (names, theta), x = zip(*online.named_parameters()), torch.cat([v[:n] for v in views])
    with batch_stats_only(nets):
        with torch.no_grad():
            z_target, z = embed(nets["target"], x, args), embed(online[:2], x, args)
            p = embed(online[2], z, args)
            found = {"rank_z": effective_rank(z), "rank_p": effective_rank(p), "std_p": embedding_std(p[:n])}
        if not args.baseline and not args.compile:
            loss_fn = lambda params: byol_loss(embed(online, x, args, dict(zip(names, params))), z_target)
            found["alpha_lambda_max"] = args.inner_lr * curvature_probe(loss_fn, list(theta))
    return found


def main(argv=None):
    args = parse_args(argv)
    # -- shared: main --
    rank, world, device = setup_distributed()
    data = load_data(args.data, args.image_size, args.workers, args.classes)
    recipe = resolve(args, RECIPES, data, SCRIPT)
    per_step = check_args(args, data, world)                                                # images
    augmented = (AUGMENTATION[recipe] * args.views)[:args.views]
    torch.manual_seed(args.seed)                                                            # the same initial weights on every process
    nets = build_nets(args)[0].to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    opts = build_opts(nets, args)
    per_epoch = len(data.train) // per_step                                                 # an incomplete last batch is left out
    total = args.epochs * per_epoch
    stop = min(total, args.max_steps or total)
    start = open_run(args, nets, opts, rank, images=len(data.train), class_list=class_hash(data.classes), processes=world, steps_per_epoch=per_epoch)
    log = Log(args.out, per_step, rank, world, start, stop, LIMITS)
    evaluate = lambda backbone: monitor(backbone, data, args, augmented[0], device) if rank == 0 else {}
    with graceful_stop() as asked_to_stop:
        if data.train_labels is None:
            log.show(f"{args.data} has no labels: the k-NN monitor is off")
        elif start == 0:                                                                    # what the run has to beat
            raw = evaluate(None) if torch.is_tensor(data.train) else {}
            log.event(step=0, **evaluate(nets["backbone"]), **{f"raw_pixels_{k}": v for k, v in raw.items()})
        batches = training_views(data, augmented, args.image_size, per_step, args.seed, rank, world, device, args.workers, start, stop)
        for step, views in enumerate(batches, start + 1):                                   # step = steps done after this one
            set_lr(opts, lr_scale(step - 1, total, args.warmup_epochs * per_epoch))
            log.add(step, train_step(nets, opts, views, args, (step - 1) / total))
            signum, epoch_end = asked_to_stop(), step % per_epoch == 0 or step == stop
            if step % args.log_every == 0 or epoch_end or signum:
                log.write(opts["encoder"].param_groups[0]["lr"])
            if step == stop or epoch_end and step // per_epoch % args.eval_every == 0:
                log.event(step=step, **evaluate(nets["backbone"]), **diagnose(nets, views, args))
            if rank == 0 and (epoch_end or signum):
                save_run(args, step, nets, opts, augmented[0])
            if signum:
                log.end(f"stopped by signal {signum} after step {step}; the same command goes on from there")
                raise SystemExit(128 + signum)
    log.end(f"done: {args.out}/backbone.pt, curves.png, log.jsonl; next: python eval_linear.py {args.out}")
    # -- end shared --


if __name__ == "__main__":
    main()
