"""Barlow Twins with SparseHead: one file, read beside the papers.

Barlow Twins makes the cross-correlation of the embeddings of two views the identity: a dimension
says the same of both views, and no two dimensions say the same. SparseHead asks the last layer of
the projection head to use few of its inputs, by an L2,1 penalty on the columns of its weight W. As
printed the penalty removes no column here, since the loss does not see the scale of a row of W: the
file holds it, a measure of this (`rescaling_share`), and forms that do remove columns.

  Barlow Twins  Zbontar et al. 2021, arXiv 2103.03230: Eqs. 1-2, Algorithm 1
  SparseHead    Song et al., "Towards the Sparseness of Projection Head in Self-Supervised
                Learning": Section 6, Eqs. 12-13

One step, [Barlow Twins Algorithm 1] with the penalty of [SparseHead Section 6]:
  r = f_theta(x1, x2);  z1, z2 = h_phi(r)              one pass over both views
  C = correlation of z1 and z2 over the batch                             Barlow Twins Eq. 2
  L = sum_i (1 - C_ii)^2 + lambda_o sum_{i != j} C_ij^2                   Barlow Twins Eq. 1
  theta, phi <- a step of Adam on L + lambda ||W'||_{2,1}                 SparseHead Eqs. 12, 13
By --penalty:
  rownorm  W' is W with rows of unit norm
  inputs   W' is W with columns times the spread of their inputs, and then with rows of unit norm
  plain    W' is W
  prox     the step is on L alone; then columns of W are shortened by (this step's learning rate)
           lambda, and rows set to unit norm
  bilevel  proximal steps from W give W^t, theta takes a step on L at W^t, W moves towards W^t

  paper           here                  shape, meaning
  r = f_theta(x)  r                     (2, n, d) representation, what is kept after training
  z = h_phi(r)    z                     (2, n, m) embedding of both views, z = u W^T
  (not named)     u                     (2, n, H) inputs of the last layer of the head
  W               projector[-1].weight  (m, H) last layer of the head, no bias; linear head: H = d
  W^t             W_t                   (m, H) with --penalty bilevel: the W of one batch t
  ||W||_{2,1}     l21_norm(W)           sum of the norms of the columns; a column is one input
  lambda          --lambda-sparse       SparseHead's; lambda_o, --lambda-offdiag, is Barlow Twins'
  C               C                     (m, m) over the batch of all processes

  python barlow_sparsehead.py                        drawn shapes, a minute on a laptop
  python barlow_sparsehead.py --data /imagenet100    one large GPU; plain Barlow Twins: --baseline
  torchrun --nproc-per-node 8 barlow_sparsehead.py --data /imagenet100      as is, or --sync-bn too

Controls:
  --baseline                           no penalty
  --penalty plain                      the paper's, lambda = 1e-4
  --penalty plain --lambda-sparse 1    shrinks W and removes no column
  --penalty prox                       exact zeros
  --penalty bilevel                    a W for each batch
  --head linear                        columns are dimensions of r
  --head none --baseline               z = r, as in the paper's Fig. 1a

Result (results/sparsehead.md): at CPU scale few columns carry the accuracy of the baseline after
short trainings, without a gain, and a little less after long ones; not run at ImageNet scale.

Deviations from the paper, numbered as in results/sparsehead.md, which has the others and the
evidence:
  (1)  The default penalises W with unit rows, not W.
  (2)  lambda = 0.3 for it: 1e-4 changes nothing.
  (3)  One W for all batches, trained with theta, where Eqs. 12-13 have a W^t for each, as
       --penalty bilevel has.
  (4)  Groups are columns, by the support in Section 5.2; a smaller "dimensionality of the
       embedding" (Section 5.3) would need rows.
  (5)  What "sparse" means is counted: columns below 1e-3 of the largest, exact zeros, and inputs in
       use, since BatchNorm can fake the first.
  (6)  No weight decay on W.
  (8)  Adam at every scale, not Barlow Twins' LARS.
  (10) The penalty sees W alone: --penalty inputs weighs a column by the spread of its input.
"""
import math
import sys

import torch
from torch import nn

from common import (Log, all_reduce_sum, at_least_float32, average_gradients, base_parser,
                    batch_stats_only, check_shared_flags, draw_views, effective_rank,
                    embedding_std, fail, fill_from_recipe, graceful_stop, load_data, lr_scale,
                    make_backbone, monitor, number, open_run, parse, recipe_name, run, save_run,
                    set_lr, setup_processes, training_batches, world_size)

SCRIPT = "barlow_sparsehead"
LAMBDA_SPARSE = {"rownorm": 0.3, "inputs": 0.3, "prox": 3.0, "plain": 1e-4, "bilevel": 1.0,
                 "none": 0.0}
LIVE = 1e-3             # a column below this share of the largest counts as dead
RHO = 0.1               # with --penalty bilevel, how far W follows each W^t

# SparseHead states no augmentation. small: Appendix IV of TC2, the paper of simclr_tc2.py. shapes:
# ours. imagenet: Barlow Twins Section 2.2, whose two views differ.
# jitter: brightness, contrast, saturation, hue.
WEAK = {"crop": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5,
        "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.1, "blur_p": 0.0,
        "solarize_p": 0.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
GRAYER = {**WEAK, "gray_p": 0.3}
FIRST = {**WEAK, "crop": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1), "gray_p": 0.2,
         "blur_p": 1.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SECOND = {**FIRST, "blur_p": 0.1, "solarize_p": 0.2}
AUGMENTATION = {"shapes": [GRAYER, GRAYER], "small": [WEAK, WEAK], "imagenet": [FIRST, SECOND]}

# Weight decay: SparseHead's Section 7. small: epochs and lr of it for CIFAR, dim of Section 4; for
# STL-10 it has --lr 2e-3 --epochs 2000, for Tiny ImageNet --lr 2e-3. imagenet: Barlow Twins' widths
# and epochs, with SparseHead's two layers and Adam. What is not named here is ours. Only
# shapes has been run as it stands.
RECIPES = {
    "shapes": {"arch": "resnet_tiny", "epochs": 10, "batch_size": 64, "lr": 3e-3,
               "weight_decay": 1e-6, "warmup_epochs": 0.5, "eval_every": 2,
               "hidden": 256, "dim": 128},
    "small": {"arch": "resnet18", "epochs": 1000, "batch_size": 256, "lr": 3e-3,
              "weight_decay": 1e-6, "warmup_epochs": 10.0, "eval_every": 20,
              "hidden": 2048, "dim": 512},
    "imagenet": {"arch": "resnet50", "epochs": 1000, "batch_size": 1024, "lr": 1e-3,
                 "weight_decay": 1e-6, "warmup_epochs": 10.0, "eval_every": 20,
                 "hidden": 8192, "dim": 8192},
}

# A term above its limit warns once, on the screen and in the log.
LIMITS = {"rescaling": (0.5, "most of the penalty's gradient rescales rows of W, and the loss does "
                             "not see the scale of a row of W: a large lambda shrinks all of W, "
                             "none removed a column in our runs; --penalty rownorm and prox do"),
          "zero_columns": (0.99999, "all of W is zero, and nothing will train any more: lower "
                                    "--lambda-sparse")}


# ---- model ---------------------------------------------------------------------------------------
def build_nets(args):
    """Backbone and projector; projector.live_columns (H,) says which columns of W are live.

    `train_step` writes this buffer, for those who load the head from last.pt.
    [SparseHead Section 4, Section 7.1]"""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    if args.head == "mlp":
        head = [nn.Linear(feature_dim, args.hidden, bias=False), nn.BatchNorm1d(args.hidden),
                nn.ReLU(), nn.Linear(args.hidden, args.dim, bias=False)]
    elif args.head == "linear":
        head = [nn.Linear(feature_dim, args.dim, bias=False)]
    else:
        head = [nn.Linear(feature_dim, feature_dim, bias=False)]
        # h_phi = I, fixed: z = r.
        nn.init.eye_(head[0].weight)
        head[0].weight.requires_grad_(False)

    projector = nn.Sequential(*head)
    all_live = torch.ones(head[-1].in_features, dtype=torch.bool)
    projector.register_buffer("live_columns", all_live)
    return nn.ModuleDict({"backbone": backbone, "projector": projector})


def build_opts(nets, args):
    """Adam; W has no weight decay: the loss does not see its scale, the penalty alone decides."""
    W = nets["projector"][-1].weight
    rest = [p for p in nets.parameters() if p is not W]
    groups = [{"params": rest, "weight_decay": args.weight_decay},
              {"params": [W], "weight_decay": 0}]
    return {"encoder": torch.optim.Adam(groups, args.lr, fused=True)}


def embed(nets, views, args):
    """(r, u, z) of views (2, n, 3, height, width): (2, n, d), (2, n, H), (2, n, m), no bfloat16.

    r is the representation, u = what W multiplies, z = u W^T the embedding. Both views share the
    BatchNorm statistics of one pass."""
    # channels_last: faster convolutions, on a GPU and on a CPU.
    images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
        r = nets["backbone"](images)
        u = nets["projector"][:-1](r)
        z = nets["projector"][-1](u)
    return [at_least_float32(x).unflatten(0, views.shape[:2]) for x in (r, u, z)]


# ---- Barlow Twins --------------------------------------------------------------------------------
def standardize(z, eps=1e-5):
    """z (n, m) -> zero mean, unit variance per dimension, over the batch of all processes.

    BatchNorm without affine parameters, whose statistics autograd follows across processes."""
    N = len(z) * world_size()
    z = z - all_reduce_sum(z.sum(0)) / N
    variance = all_reduce_sum(z.square().sum(0)) / N
    return z / (variance + eps).sqrt()


def cross_correlation(z1, z2):
    """C (m, m) of two embeddings (n, m), over the batch of all processes. [Barlow Twins Eq. 2]"""
    N = len(z1) * world_size()
    return all_reduce_sum(standardize(z1).T @ standardize(z2)) / N


def barlow_terms(z1, z2, lambda_offdiag):
    """(invariance term, weighted redundancy term) of z1, z2 (n, m). [Barlow Twins Eq. 1]"""
    C = cross_correlation(z1, z2)
    diagonal = C.diagonal()
    invariance = (1 - diagonal).square().sum()
    redundancy = C.square().sum() - diagonal.square().sum()
    return invariance, lambda_offdiag * redundancy


def barlow_loss(z1, z2, lambda_offdiag):
    """sum_i (1 - C_ii)^2 + lambda_o sum_{i != j} C_ij^2 of z1, z2 (n, m). [Barlow Twins Eq. 1]"""
    invariance, redundancy = barlow_terms(z1, z2, lambda_offdiag)
    return invariance + redundancy


# ---- SparseHead ----------------------------------------------------------------------------------
def column_norms(W):
    """(H,) norms of the columns of W (m, H); the gradient at a zero column is zero."""
    return torch.linalg.vector_norm(W, dim=0)


def l21_norm(W):
    """||W||_{2,1}: sum of the norms of the columns of W (m, H). [SparseHead Eq. 13]

    It relaxes ||W||_{2,0}, the number of inputs in use."""
    return column_norms(W).sum()


def row_normalize(W):
    """W (m, H) with rows of unit norm; zero rows stay.

    Barlow's loss is the same for W and for the result. l21_norm of the result lies between sqrt(m),
    one column left, and sqrt(m H), all alike: it can fall only as columns become unequal."""
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W / norms.clamp(min=1e-12)


def input_spread(u):
    """(H,) standard deviation of each input u (2, n, H) of the last layer, over all processes.

    If BatchNorm makes input j c times larger, and column j of W becomes c times shorter, z stays as
    it is: how much an input counts is the product of both. No gradient flows."""
    u = u.detach().flatten(0, 1)
    N = len(u) * world_size()
    mean = all_reduce_sum(u.sum(0)) / N
    return (all_reduce_sum((u - mean).square().sum(0)) / N).sqrt()


def sparse_penalty(W, kind, spread=None):
    """||W'||_{2,1} of W (m, H), by --penalty: W' is W (plain), or W with unit rows (all others).

    inputs: each column is first multiplied by the spread (H,) of its input. prox, bilevel and
    --baseline only log the result. [SparseHead Eqs. 12-13]"""
    if kind == "plain":
        return l21_norm(W)
    if kind == "inputs":
        W = W * spread
    return l21_norm(row_normalize(W))


def prox_l21(W, threshold):
    """argmin_X ||X - W||^2 / 2 + threshold ||X||_{2,1}, for X, W (m, H).

    Each column is shorter by the threshold, and exactly zero if it was below it. What is solved is
    the step, not Eq. 13. [SparseHead Eq. 13, its proximal step]"""
    shrink = 1 - threshold / column_norms(W).clamp(min=1e-12)
    return W * shrink.clamp(min=0)


def batch_head(W, u, args):
    """W^t (m, H), a head for one batch: proximal gradient steps from W, theta fixed.

    u (2, n, H): the inputs of the last layer. Rows are set to unit norm, since the loss does not
    see their scale. The result has no graph. [SparseHead Eq. 13]"""
    u1, u2 = u.detach()
    W_t = W.detach()
    for _ in range(args.inner_steps):
        W_t.requires_grad_()
        loss = barlow_loss(u1 @ W_t.T, u2 @ W_t.T, args.lambda_offdiag)
        gradient = torch.autograd.grad(loss, W_t)[0]
        gradient = all_reduce_sum(gradient) / world_size()

        W_t = W_t.detach() - args.inner_lr * gradient
        W_t = row_normalize(prox_l21(W_t, args.inner_lr * args.lambda_sparse))
    return W_t


def live_columns(W):
    """(H,) bool: the columns of W (m, H) that are longer than LIVE times the longest."""
    norms = column_norms(W)
    return norms > LIVE * norms.max()


def sparsity(W):
    """What has become of W (m, H): terms to log.

    l21, frobenius  norms of W
    l21_normalized  l21 with unit rows over sqrt(m H): 1 = columns alike, 1 / sqrt(H) = one left
    live_columns    share of columns above a thousandth of the largest; settled only once the
                    learning rate is near 0
    zero_columns    share of columns that are exactly zero now; the next step may revive them"""
    return {"l21": l21_norm(W), "frobenius": torch.linalg.matrix_norm(W),
            "l21_normalized": l21_norm(row_normalize(W)) / math.sqrt(W.numel()),
            "live_columns": live_columns(W).to(W.dtype).mean(),
            "zero_columns": (column_norms(W) == 0).to(W.dtype).mean()}


def rescaling_share(W):
    """Share of the gradient of ||W||_{2,1} that only rescales rows of W (m, H), in squared norms.

    1: a small step on the penalty changes nothing that the loss can see. The gradient of rownorm's
    penalty would give 0."""
    # The part of a row's gradient that lies along the row changes the row's length alone.
    gradient = W / column_norms(W).clamp(min=1e-12)
    along_rows = (gradient * row_normalize(W)).sum(1)
    return along_rows.square().sum() / gradient.square().sum().clamp(min=1e-12)


# ---- one step ------------------------------------------------------------------------------------
def train_step(nets, opts, views, args, progress):
    """One step, optimiser included: views (2, n, 3, height, width) of this process -> terms to log.

    loss_ssl         loss_invariance + loss_redundancy, the two terms of Barlow Twins' loss.
    loss_sparse      The penalty without its weight, of W before the step. With prox, bilevel and
                     --baseline it is the L2,1 norm of W with unit rows, and not in the loss.
    l21 .. zero_columns   See `sparsity`, of W after the step.
    live_inputs      Share of the inputs that are used: live_columns of W after the step, times this
                     batch's `input_spread`.
    std_z            Spread of z1 over directions. Low is a collapse, or a constant that all z have
                     in common and that the loss does not see: 0.22 in a run of rownorm that learnt.
    var_z            Variance of z1, the mean over its dimensions. It should stay far above the
                     epsilon of `standardize`, 1e-5. The penalties lower it, to 1e-3 in our runs.
    rescaling        With plain: the part of the penalty's gradient that only changes the length of
                     rows, which the loss does not see. See `rescaling_share`.
    batch_columns    With bilevel: share of the columns that are live in W^t.
    support_change   With bilevel: share of the columns that are live in one of W and W^t alone,
                     once W has followed. They are in the main those that W^t has dropped.

    progress, the share of the training done, is for methods that change with it; this one does not.

    [Barlow Twins Algorithm 1, with SparseHead's Section 6]"""
    opt = opts["encoder"]
    W = nets["projector"][-1].weight
    _, u, z = embed(nets, views, args)
    if args.penalty == "bilevel":
        # Eq. 13: z at W_t in place of W, which gets no gradient and follows W_t below.
        W_t = batch_head(W, u, args)
        z = u @ W_t.T
    z1, z2 = z

    # Eq. 12 with the penalty of Section 6; lambda_o is in the redundancy.
    invariance, redundancy = barlow_terms(z1, z2, args.lambda_offdiag)
    loss_ssl = invariance + redundancy
    spread = input_spread(u)                    # an input counts by its column times this
    loss_sparse = sparse_penalty(W, args.penalty, spread)
    loss = loss_ssl
    if args.penalty in ("plain", "rownorm", "inputs"):
        loss = loss + args.lambda_sparse * loss_sparse

    opt.zero_grad()
    loss.backward()
    average_gradients(nets.parameters())
    opt.step()

    with torch.no_grad():
        # What prox and bilevel do to W after the step.
        if args.penalty == "prox" and args.lambda_sparse:
            # The threshold falls with the learning rate, as a gradient step would. The last group
            # holds W alone.
            threshold = opt.param_groups[-1]["lr"] * args.lambda_sparse
            W.copy_(row_normalize(prox_l21(W, threshold)))
        if args.penalty == "bilevel":
            W.lerp_(W_t, RHO)
        nets["projector"].live_columns.copy_(live_columns(W))

        # For the log: from here on nothing moves.
        terms = {"loss_ssl": loss_ssl, "loss_invariance": invariance,
                 "loss_redundancy": redundancy, "loss_sparse": loss_sparse,
                 "std_z": embedding_std(z1), "var_z": z1.var(0).mean()}
        if args.penalty == "bilevel":
            terms["batch_columns"] = live_columns(W_t).to(W.dtype).mean()
            terms["support_change"] = (live_columns(W_t) != live_columns(W)).to(W.dtype).mean()
        if args.penalty == "plain" and args.lambda_sparse:
            terms["rescaling"] = rescaling_share(W)
        terms |= sparsity(W)
        terms["live_inputs"] = live_columns(W * spread).to(W.dtype).mean()
    return {name: value.detach() for name, value in terms.items()}


# ---- what is measured at evaluations -------------------------------------------------------------
def diagnose(nets, views, args):
    """The last batch at the present weights, its first view: terms to log.

    rank_r, rank_z   Effective rank of the representation and of the embedding: at most n - 1, for
                     n images of this process. Over the test set, as in the paper:
                     results/measures.py.

    [SparseHead Figs. 1 and 3]"""
    with torch.no_grad(), batch_stats_only(nets):
        r, _, z = embed(nets, views, args)
    return {"rank_r": effective_rank(r[0]), "rank_z": effective_rank(z[0])}


# ---- flags and checks ----------------------------------------------------------------------------
def parse_args(argv=None):
    p = base_parser(__doc__, RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    add = p.add_argument
    add("--lambda-offdiag", type=number(float, 0), default=5e-3,
        help="lambda of Barlow Twins, weight of the redundancy term; 0 = off (default: 0.005 as in "
        "the paper)")
    add("--head", choices=("mlp", "linear", "none"), default="mlp",
        help="mlp: two layers with BatchNorm and ReLU, as in the paper (default); linear: one "
        "layer; none: z = r, with --baseline")
    add("--dim", type=number(int, 2), help="m, width of the embedding; --head none: that of r")
    add("--hidden", type=number(int, 2), help="H, width of the hidden layer of the mlp head")
    add("--penalty", choices=("rownorm", "inputs", "prox", "plain", "bilevel"),
        default="rownorm",
        help="rownorm: L2,1 of W with unit rows (default); inputs: the same, after each column "
        "is multiplied by the spread of its input: BatchNorm cannot evade it; prox: after each "
        "step columns are shortened, then rows set to unit norm: exact zeros; plain: the paper's, "
        "L2,1 of W; bilevel: a W for each batch, by proximal steps")
    add("--lambda-sparse", type=number(float, 0),
        help="lambda of Eq. 13; prox multiplies it by the step's learning rate, bilevel by "
        "--inner-lr; 0 = off (no unit rows in prox; bilevel still takes its inner steps) "
        "(default: 0.3 rownorm and inputs, 3 prox, 1 bilevel, 1e-4 plain as in the paper; prox "
        "needs more at --dim above 128, in proportion to its root)")
    add("--inner-steps", type=number(int, 0), default=5,
        help="bilevel: proximal steps from W to a batch's own; 0 = none, W stays (default: 5)")
    add("--inner-lr", type=number(float, 0), default=0.01,
        help="bilevel: their learning rate; at --dim above 1000 try 0.001 (default: 0.01)")
    return parse(p, argv, ("penalty", "inner_steps", "inner_lr"))


def fill_defaults(args, data, device):
    """Fill the flags left open."""
    fill_from_recipe(args, RECIPES, data, device, SCRIPT)
    if args.baseline:
        args.penalty = "none"
    if args.lambda_sparse is None:
        args.lambda_sparse = LAMBDA_SPARSE[args.penalty]
    args.images_per_step = args.batch_size


def view_augmentations(args, data):
    """The augmentation of each view."""
    return AUGMENTATION[recipe_name(data.name, args.image_size)]


def check_args(args, data, world):
    """Settings that do not go together end in a sentence."""
    check_shared_flags(args, data, world)
    n = args.batch_size
    if n % world or n < 2 * world:
        fail(f"--batch-size {n}: must be a multiple of the {world} processes, at least 2 images "
             "each")
    if args.baseline and args.lambda_sparse:
        fail(f"--lambda-sparse {args.lambda_sparse}: --baseline has no penalty")
    if args.head == "none" and not args.baseline:
        fail("--head none: has no last layer to make sparse; add --baseline, or choose another")


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
