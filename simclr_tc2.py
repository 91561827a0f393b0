"""SimCLR with task conflict calibration (TC2): one file, read beside the papers.

SimCLR pulls the views of an image together and pushes other images away. TC2 splits each batch into K "tasks" and lets the encoder adapt
to a task's support views before it is judged on its query views. Two small networks rewrite every embedding as a sparse combination of
factors that all tasks share, so that the semantics of one task do not disturb another's.

  SimCLR  Chen et al. 2020, arXiv 2002.05709: NT-Xent, here over all pairs of m views
  TC2     Guo et al., "Exploring Transferability of Self-Supervised Learning by Task Conflict Calibration": Eqs. 1-7, Algorithm 1

  paper               here                         shape, meaning
  X_tr, N             views[v]                     (n, 3, H, W), n = N / processes: view v of this process's share of the batch
  K, m, m'            --tasks --views m_support    support = the first m' = m / 2 views, query = the others (views are i.i.d.)
  f_theta, z_j        embed(...), z                (..., d)       backbone and linear projector, scaled to norm sqrt(d)
  S                   S                            (d + 1, d)     mean over covariance of the joined batch
  f_v, V              factor_net, V                (d, n_f)       columns: factors shared by all tasks
  f_w, W_j            weight_net, W                (..., n_f)     weights of one sample
  f_w(z_j) V^T        z_hat                        (..., d)       the calibrated embedding
  alpha, beta_1, beta_2                            TC2_LR (one Adam for f_v and f_w), --inner-lr (SGD), --lr (Adam)

  python simclr_tc2.py                                          drawn shapes, two minutes on a laptop
  python simclr_tc2.py --data /imagenet100                      one GPU; plain SimCLR with --baseline
  torchrun --nproc-per-node 4 simclr_tc2.py --data /imagenet100        whole tasks per process: 8 need --tasks 8

Controls: `--baseline --views 4` SimCLR at equal views | `--inner-lr 0` no inner loop | `--calibrate none` plain first-order MAML |
`--baseline --tasks 2` the paper's SimCLR+T: K tasks, neither calibration nor inner loop | `--literal` the paper's words.

Result (results/README.md): at CPU scale TC2 trains, does not collapse, does not beat SimCLR at equal compute; not run at ImageNet scale.
Deviations from the paper (evidence in README.md; --literal undoes the first four): (1) V is orthonormal by QR, not by penalty alone; (2) f_w
has a skip path z V; (3) z has norm sqrt(d): at unit norm Eq. 2 makes W = 0; (4) the query error is that of the implicit N-way
classification: the squared distance of views collapses; (5) Eq. 7 is first order by default; (6) Eqs. 1-2 are means over samples.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from common import (Log, all_reduce_sum, average_gradients, base_parser, batch_stats_only, class_hash, effective_rank, embedding_std, fail,
                    gather_batch, graceful_stop, load_data, lr_scale, make_backbone, monitor, number, open_run, resolve, save_run, set_lr,
                    setup_distributed, training_views, world_size)

SCRIPT, TC2_LR = "simclr_tc2", 3e-3                     # alpha_1 .. alpha_4; the paper states none
WEAK = dict(crop=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.1, blur_p=0.0,
            solarize_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
STRONG = dict(WEAK, crop=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray_p=0.2, blur_p=0.5, mean=(0.485, 0.456, 0.406),
              std=(0.229, 0.224, 0.225))
AUGMENTATION = {"shapes": [WEAK], "small": [WEAK], "imagenet": [STRONG]}            # TC2 Appendix IV; the same for all views
LIMITS = {"inner_step": (0.1, "the inner step is long beside the weights, it harms above 0.02: lower --inner-lr")}
RECIPES = {     # small: the protocol the paper cites (Ermolov et al. 2021), with a cosine; imagenet: the paper states no optimiser
    "shapes": dict(arch="resnet_tiny", epochs=5, batch_size=64, lr=3e-3, weight_decay=1e-6, warmup_epochs=1.0, eval_every=1,
                   temperature=0.2, dim=64),
    "small": dict(arch="resnet18", epochs=1000, batch_size=512, lr=3e-3, weight_decay=1e-6, warmup_epochs=5.0, eval_every=20,
                  temperature=0.5, dim=64),
    "imagenet": dict(arch="resnet50", epochs=200, batch_size=512, lr=1e-3, weight_decay=1e-6, warmup_epochs=10.0, eval_every=10,
                     temperature=0.2, dim=128)}


def parse_args(argv=None):
    p, flag = base_parser(__doc__.split("\n")[0], RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    flag("--views", number(int, 2), "m, augmented views per image (default: 4; 2 with --baseline)")
    flag("--tasks", number(int, 1), "K, tasks per batch (default: 4 as in the paper; 1 with --baseline)")
    flag("--temperature", number(float, 1e-3), "tau of InfoNCE and of the query error")
    flag("--inner-lr", number(float, 0), "beta_1 of Eq. 6; 0 = no inner loop (default: 0.01)", default=0.01)
    p.add_argument("--second-order", action="store_true", help="differentiate Eq. 7 through Eq. 6 (default: first order)")
    flag("--factors", number(int, 1), "n_f, columns of V (default: d, the paper's best)")
    flag("--lambda-s", number(float, 0), "lambda_s of Eq. 3 (default: 0.1; paper: 0.001 to 1)", default=0.1)
    flag("--query-loss", str, "L_sse of Eqs. 5 and 7: brier, the squared error of the N-way classification; nce, InfoNCE; sse, the "
         "literal squared distance of views, which collapses (default: brier, sse with --literal)", choices=("brier", "nce", "sse"))
    flag("--calibrate", str, "losses of Eqs. 6-7 on z_hat (both), on z (none), or the mean of the two (mix); default: both",
         choices=("both", "none", "mix"), default="both")
    flag("--micro-batch", number(int, 2), "baseline: views per forward pass, for small GPUs; the gradient stays that of the whole batch (default: all)")
    p.add_argument("--literal", action="store_true", help="soft orthogonality, no skip path, unit-norm z, sse: collapses (off by default)")
    return p.parse_args(argv)


def check_args(args, data, world):
    """The number of images in one step; settings that do not go together end in `fail`."""
    args.views, args.tasks = args.views or (2 if args.baseline else 4), args.tasks or (1 if args.baseline else 4)
    args.factors, args.query_loss = args.factors or args.dim, args.query_loss or ("sse" if args.literal else "brier")
    if args.batch_size % world or args.batch_size % args.tasks or args.batch_size < 2 * max(args.tasks, world):
        fail(f"--batch-size {args.batch_size}: must be a multiple of --tasks {args.tasks} and of {world} processes, at least 2 images each")
    if args.batch_size > len(data.train):
        fail(f"--batch-size {args.batch_size}: there are only {len(data.train)} training images")
    if not args.baseline and args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole tasks")
    if not args.baseline and args.views < 4:
        fail(f"--views {args.views}: TC2 needs at least 4, two for support and two for query")
    if args.micro_batch and not args.baseline:
        fail(f"--micro-batch {args.micro_batch}: goes with --baseline; TC2 takes gradients one task at a time, more --tasks make them smaller")
    if args.micro_batch and args.sync_bn:
        fail(f"--micro-batch {args.micro_batch}: cannot go with --sync-bn, BatchNorm sees one part at a time")
    if args.compile and args.second_order and not args.baseline:
        fail("--second-order: cannot go with --compile, whose backward pass cannot be differentiated")
    return args.batch_size


# ---- model ----------------------------------------------------------------------------------------------------------
def build_nets(args):
    """(ModuleDict of backbone, linear projector and f_v, f_w, feature dimension); the encoder's weights are drawn first. [TC2 Appendix IV]"""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    nets = nn.ModuleDict({"backbone": backbone, "projector": nn.Linear(feature_dim, args.dim)})
    if not args.baseline:
        nets.update({"factor_net": FactorNet(args.dim, args.factors, orthogonal=not args.literal),
                     "weight_net": WeightNet(args.dim, args.factors, skip=not args.literal)})
    return nets, feature_dim


def build_opts(nets, args):
    adam = lambda names, lr, decay: torch.optim.Adam([p for n in names for p in nets[n].parameters()], lr, weight_decay=decay, fused=True)
    opts = {"encoder": adam(("backbone", "projector"), args.lr, args.weight_decay)}
    return opts if args.baseline else {**opts, "factors": adam(("factor_net", "weight_net"), TC2_LR, 0)}


def embed(encoder, x, args, params=None):
    """z (rows, d) of images x (rows, 3, H, W), not in bfloat16, of norm sqrt(d) (1 with --literal), with `params` if given."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        z = encoder(x) if params is None else functional_call(encoder, params, (x,), tie_weights=False)
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
    return z if args.literal else z * z.shape[-1] ** 0.5


# ---- SimCLR ---------------------------------------------------------------------------------------------------------
def info_nce(z, temperature):
    """NT-Xent over all pairs of views: z (m, N, d) -> scalar. [SimCLR Eq. 1, all m - 1 positives of a row averaged]"""
    m, N, _ = z.shape
    z = F.normalize(z, dim=-1).flatten(0, 1)                                                # (mN, d)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)                         # (mN, mN), a row is not its own negative
    log_p = similarity.log_softmax(1).view(m, N, m, N).diagonal(dim1=1, dim2=3)             # (m, m, N), pairs of views of one image
    return -log_p.masked_fill(torch.eye(m, dtype=torch.bool, device=z.device)[..., None], 0).sum() / (m * (m - 1) * N)


# -- shared: tc2 --
def batch_summary(z):
    """S (d + 1, d): the mean over the covariance (divisor M - 1) of all M rows of z (..., d), over all processes. [TC2 before Eq. 1]"""
    z = z.detach().flatten(0, -2)
    M = len(z) * world_size()
    mean = all_reduce_sum(z.sum(0)) / M
    return torch.cat([mean[None], all_reduce_sum((z - mean).T @ (z - mean)) / (M - 1)])


def mlp(*sizes):
    """Linear layers with ReLU between: three of them in the paper's f_v and f_w. [TC2 Appendix IV]"""
    return nn.Sequential(*(m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())))[:-1]


class FactorNet(nn.Module):
    """f_v: S (d + 1, d) -> V (d, n_f). Each column of S (a dimension's mean and covariances) gives a row of V, then QR makes the columns
    orthonormal. A network of the flattened S would have 134M parameters at d = 512, this one 0.3M. [TC2 question i]"""
    def __init__(self, dim, n_factors, hidden=256, orthogonal=True):
        super().__init__()
        self.mlp, self.orthogonal = mlp(dim + 1, hidden, hidden, n_factors), orthogonal and n_factors <= dim

    def forward(self, S):
        V = self.mlp(S.T)
        if self.orthogonal:
            V, R = torch.linalg.qr(V)
            V = V * torch.where(R.diagonal() < 0, -1, 1)            # QR is unique, and V continuous in S, up to these signs
        return V


class WeightNet(nn.Module):
    """f_w: z (..., d), V (d, n_f) -> W (..., n_f) = z V + MLP(z). V is given: no gradient reaches f_v through the skip path. The MLP
    starts at zero, so that calibration starts as the projection on V. [TC2 question ii]"""
    def __init__(self, dim, n_factors, hidden=128, skip=True):
        super().__init__()
        self.mlp, self.skip = mlp(dim, hidden, hidden, n_factors), skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, z, V):
        return self.mlp(z) + z @ V.detach() if self.skip else self.mlp(z)


def calibrate(z, V, weight_net):
    """z_hat = f_w(z) V^T, (..., d) -> (..., d). [TC2 question iii]"""
    return weight_net(z, V) @ V.T


def factor_loss(z, V):
    """L_v = ||V^T V - I||_F^2 + ||Z - Z V V^T||_F^2, the second per row of z (..., d). [TC2 Eq. 1]"""
    orthogonality = (V.T @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).square().sum()
    return orthogonality + (z - z @ V @ V.T).square().sum(-1).mean()


def weight_loss(z, W, V):
    """L_w = ||z_j - W_j V^T||^2 + ||W_j||_1, averaged over samples; V is given, it gets no gradient. [TC2 Eq. 2]"""
    return ((z - W @ V.detach().T).square().sum(-1) + W.abs().sum(-1)).mean()


def update_factors(factor_net, weight_net, opt, Z, S, m_support, ssl_loss, query_loss, tasks, lambda_s):
    """Stage 1, f_theta fixed: a step of f_v and f_w on the support views, then one on the query views. [TC2 Eqs. 3-5]

    Z (m, N, ..., d) embeddings without graph; S (d + 1, d); ssl_loss(z_hat_support, k) and query_loss(z_hat_query, z_hat_support, k) see
    the calibrated embeddings (views, n, ..., d) of task k. Eq. 5 differentiates at f'_v, not through Eq. 4: two consecutive steps."""
    terms = {}
    for phase, rows in (("support", slice(None, m_support)), ("query", slice(m_support, None))):
        V = factor_net(S)
        W = weight_net(Z if phase == "query" else Z[rows], V)                   # the query error needs support anchors too
        z_hat, loss, grad_z_hat = W @ V.T, 0, []
        for k, z in enumerate(z_hat.detach().chunk(tasks, dim=1)):              # chain rule, first part: to z_hat, one task's graph at a time
            task_loss = ssl_loss(z.requires_grad_(), k) if phase == "support" else query_loss(z.requires_grad_()[m_support:], z[:m_support], k)
            grad_z_hat += torch.autograd.grad(task_loss / tasks, z)
            loss = loss + task_loss.detach() / tasks
        loss_v, loss_w = factor_loss(Z, V), weight_loss(Z[rows], W if phase == "support" else W[rows], V)
        opt.zero_grad()
        torch.autograd.backward((z_hat, loss_v + lambda_s * loss_w), (torch.cat(grad_z_hat, 1), None))              # second part, and [TC2 Eq. 3]: to f_v, f_w
        average_gradients([p for group in opt.param_groups for p in group["params"]])
        opt.step()
        terms |= {f"loss_factors_{phase}": loss, "loss_v": loss_v.detach(), "loss_w": loss_w.detach()}              # loss_v, loss_w: those of Eq. 5
    return terms


def update_encoder(params, support_loss, query_loss, tasks, inner_lr, second_order):
    """Stage 2, f_v and f_w fixed: f_theta^k = f_theta - beta_1 grad L^s_k, then the gradient of mean_k L^q_k(f_theta^k). [TC2 Eqs. 6-7]

    params: {name: leaf tensor}; support_loss(params, k), query_loss(params, k) -> scalar. Returns ({name: gradient}, terms); the params
    and their .grad are left alone. First order takes the gradient at f_theta^k, second order goes on through Eq. 6 to f_theta."""
    names, theta, total = list(params), list(params.values()), [torch.zeros_like(p) for p in params.values()]
    terms = {"loss_query": 0, "loss_support": 0, "inner_step": 0} if inner_lr else {"loss_query": 0}
    for k in range(tasks):
        fast = theta
        if inner_lr:
            loss = support_loss(params, k)
            grads = torch.autograd.grad(loss, theta, create_graph=second_order, materialize_grads=True)
            fast = torch._foreach_add(theta, grads, alpha=-inner_lr)                                                    # [TC2 Eq. 6]
            terms["loss_support"] = terms["loss_support"] + loss.detach() / tasks
            if k == 0:                                                          # relative length of the first task's inner step: above 0.02 it harms
                terms["inner_step"] = (inner_lr * nn.utils.get_total_norm(grads) / nn.utils.get_total_norm(theta)).detach()
            if not second_order:
                fast = [p.detach().requires_grad_() for p in fast]
        loss = query_loss(dict(zip(names, fast)), k)
        grads = torch.autograd.grad(loss, theta if second_order else fast, materialize_grads=True)
        torch._foreach_add_(total, grads, alpha=1 / tasks)                                                              # [TC2 Eq. 7]
        terms["loss_query"] = terms["loss_query"] + loss.detach() / tasks
    return dict(zip(names, total)), terms

# -- end shared --


def gradient_conflict(task_gradients):
    """(mean cosine, fraction of negative cosines) over the pairs of rows of task_gradients (K, P). [TC2 Fig. 1b/c]"""
    unit = F.normalize(task_gradients, dim=1)
    cosine = (unit @ unit.T)[torch.triu_indices(len(unit), len(unit), 1, device=unit.device).unbind()]
    return cosine.mean(), (cosine < 0).to(cosine.dtype).mean()


def prototypes(z):
    """Anchors (n, d) of the n implicit classes: the normalised mean of the normalised views z (v, n, d). [TC2 "anchor ... like a cluster center"]"""
    return F.normalize(F.normalize(z, dim=-1).mean(0), dim=-1)


def query_sse(query, anchors, temperature):
    """L_sse: query (v, n, d) classified among anchors (n, d), sum over classes of squared errors of the softmax. [TC2 Eqs. 5 and 7]"""
    p = (F.normalize(query, dim=-1) @ F.normalize(anchors, dim=-1).T / temperature).softmax(-1)                         # (v, n, n)
    return (p - torch.eye(len(anchors), dtype=p.dtype, device=p.device)).square().sum(-1).mean()


def view_sse(query):
    """The literal L_sse: squared distance of the views of an image, query (v, n, d). A constant embedding minimises it."""
    a, b = torch.triu_indices(len(query), len(query), 1, device=query.device)
    return (query[a] - query[b]).square().sum(-1).mean()


# ---- one iteration --------------------------------------------------------------------------------------------------
def simclr_loss(z, args):
    """InfoNCE of the joined batch of all processes, z (m, n, d) -> scalar; with --tasks K the mean over K groups of it. [TC2 "SimCLR + T"]"""
    groups = gather_batch(z, 1).chunk(args.tasks, 1)
    return sum(info_nce(group, args.temperature) for group in groups) / args.tasks


def backward_in_parts(encoder, x, m, args):
    """(z, loss) with the gradient of the whole batch x (m n, 3, H, W) in the memory of --micro-batch views: the loss is differentiated to z, then
    each part passes a second time for the rest of the chain rule. BatchNorm sees the parts. [Gao et al. 2021, gradient cache]"""
    parts = x.split(args.micro_batch)
    with torch.no_grad():
        z = torch.cat([embed(encoder, part, args) for part in parts]).requires_grad_()
    loss = simclr_loss(z.unflatten(0, (m, -1)), args)
    loss.backward()
    with batch_stats_only(encoder):
        for part, grad_z in zip(parts, z.grad.split(args.micro_batch)):
            embed(encoder, part, args).backward(grad_z)
    return z, loss


def simclr_step(nets, opts, views, args):
    """One step of SimCLR, views as in `train_step`. [SimCLR Algorithm 1]"""
    encoder, x, m = nn.Sequential(nets["backbone"], nets["projector"]), torch.cat(views), len(views)
    opts["encoder"].zero_grad()
    if args.micro_batch and args.micro_batch < len(x):
        z, loss = backward_in_parts(encoder, x, m, args)
    else:
        z = embed(encoder, x, args)
        loss = simclr_loss(z.unflatten(0, (m, -1)), args)
        loss.backward()
    average_gradients(encoder.parameters())
    opts["encoder"].step()
    return {"loss_ssl": loss.detach(), "std_z": embedding_std(z[:len(views[0])].detach())}


def train_step(nets, opts, views, args, progress):
    """One iteration of Algorithm 1, optimiser steps included: views is a list of m (n, 3, H, W); progress is not used. [TC2 Algorithm 1]"""
    if args.baseline:
        return simclr_step(nets, opts, views, args)
    encoder, m, m_support = nn.Sequential(nets["backbone"], nets["projector"]), len(views), len(views) // 2
    K = args.tasks // world_size()                                                          # line 2: this process's tasks
    x = torch.cat([view.chunk(K)[k] for k in range(K) for view in views])
    tasks, n = x.chunk(K), len(x) // (K * m)                                                # line 3: task k is (m n, 3, H, W), view after view
    ssl_loss = lambda z, k: info_nce(z, args.temperature)
    query_loss = {"brier": lambda query, support, k: query_sse(query, prototypes(support), args.temperature),
                  "nce": lambda query, support, k: info_nce(query, args.temperature),
                  "sse": lambda query, support, k: view_sse(query)}[args.query_loss]
    with torch.no_grad():                                                                   # BatchNorm's running statistics move here only
        Z = embed(encoder, x, args).unflatten(0, (K, m, n)).transpose(0, 1).flatten(1, 2)   # (m, K n, d)
    terms, calibrated = {"std_z": embedding_std(Z[0])}, None
    if args.calibrate != "none":                                                            # line 4: Eqs. 4-5
        S = batch_summary(Z)
        terms |= update_factors(nets["factor_net"], nets["weight_net"], opts["factors"], Z, S, m_support, ssl_loss, query_loss, K, args.lambda_s)
        V = nets["factor_net"](S).detach()
        calibrated = lambda z: calibrate(z, V, nets["weight_net"])
        z_hat = calibrated(Z[0]).detach()
        terms |= {"std_z_hat": embedding_std(z_hat), "cos_z_hat": F.cosine_similarity(z_hat, Z[0], dim=-1).mean()}
    spaces = {"both": [calibrated], "none": [lambda z: z], "mix": [calibrated, lambda z: z]}[args.calibrate]
    embed_task = lambda params, k, v: embed(encoder, tasks[k][:v * n], args, params).unflatten(0, (v, n))              # (v, n, d)
    def support_loss(params, k):
        z = embed_task(params, k, m_support)
        return sum(ssl_loss(space(z), k) for space in spaces) / len(spaces)
    def query_loss_at(params, k):
        z = embed_task(params, k, m)                            # the anchors are computed at f_theta^k too: stale ones cost 6 points
        return sum(query_loss(c[m_support:], c[:m_support], k) for c in (space(z) for space in spaces)) / len(spaces)
    with batch_stats_only(encoder):                                                         # line 5: Eqs. 6-7
        params = dict(encoder.named_parameters())
        grads, encoder_terms = update_encoder(params, support_loss, query_loss_at, K, args.inner_lr, args.second_order)
    for name in params:
        params[name].grad = grads[name]
    average_gradients(params.values())
    opts["encoder"].step()
    return {**encoder_terms, **terms}


def diagnose(nets, views, args):
    """Figure 1b/c at the present weights: the gradients of InfoNCE over all views of K groups of the first process's share (4 if K = 1), on z (raw) and on
    z_hat (calibrated), and the health of both. The groups are random, so their cosine also falls when they are small."""
    encoder, m, K = nn.Sequential(nets["backbone"], nets["projector"]), len(views), args.tasks if args.tasks > 1 else 4
    views = [v[:K * max(2, args.micro_batch // m)] for v in views] if args.micro_batch else views       # a group is as large as a part
    with batch_stats_only(encoder):
        with torch.no_grad():
            Z = embed(encoder, torch.cat(views), args)
        found, spaces = {"rank_z": effective_rank(Z)}, {"raw": lambda z: z}
        if not args.baseline and args.calibrate != "none":
            V = nets["factor_net"](batch_summary(Z)).detach()
            W = nets["weight_net"](Z, V).detach()
            spaces["calibrated"] = lambda z: calibrate(z, V, nets["weight_net"])
            found |= {"rank_z_hat": effective_rank(W @ V.T), "orthogonality": (V.T @ V - torch.eye(V.shape[1], device=V.device)).square().sum(),
                      "explained_by_w": 1 - (Z - W @ V.T).square().sum() / Z.square().sum(), "zero_weights": (W.abs() < 1e-2).float().mean()}
        gradients = {name: [] for name in spaces}
        for task in zip(*(view.chunk(K) for view in views)):
            for name, space in spaces.items():
                z = embed(encoder, torch.cat(task), args).unflatten(0, (m, -1))
                g = torch.autograd.grad(info_nce(space(z), args.temperature), list(encoder.parameters()))
                gradients[name].append(torch.cat([t.flatten() for t in g]))
    for name, rows in gradients.items():
        found[f"conflict_cos_{name}"], found[f"conflict_negative_{name}"] = gradient_conflict(torch.stack(rows))
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
