"""Barlow Twins with SparseHead: one file, read beside the papers.

Barlow Twins makes the cross-correlation of the two views' embeddings the identity: each dimension invariant, no two alike. SparseHead asks
the last layer of the projection head to use few of its inputs, by an L2,1 penalty on the columns of its weight. The penalty as printed
does nothing here, since the loss does not see the scale of that weight; the file holds it, the reason, and two forms that do sparsify.

  Barlow Twins  Zbontar et al. 2021, arXiv 2103.03230: Eqs. 1-2
  SparseHead    "Towards the Sparseness of Projection Head in Self-Supervised Learning": Section 6, Eqs. 12-13; Eq. 9 is in eval_linear.py

  paper               here                         shape, meaning
  r = f_theta(x)      r                            (n, d)         representation, from the backbone; what is kept after training
  z = h_phi(r)        z1, z2                       (n, m)         embeddings of the two views, n = batch / processes
  W                   projector[-1].weight         (m, H)         last layer of the head, no bias; H = d for --head linear
  ||W||_{2,1}         l21_norm(W)                  sum of the H column norms: a column is one input feature of the last layer
  lambda              --lambda-sparse              weight of the penalty (SparseHead), not lambda_offdiag (Barlow Twins)
  C                   c                            (m, m)         cross-correlation over the batch of all processes

  python barlow_sparsehead.py                                   drawn shapes, a minute on a laptop
  python barlow_sparsehead.py --data /imagenet100               one large GPU, by estimate 120 GB in bf16; plain with --baseline
  torchrun --nproc-per-node 8 barlow_sparsehead.py --data /imagenet100

Controls: `--baseline` no penalty | `--penalty plain` the paper's, lambda = 1e-4 | `--penalty plain --lambda-sparse 1` shrinks W 64-fold, and
no column | `--penalty prox` exact zeros | `--head linear` columns are dimensions of the representation itself.

Result (results/README.md): at CPU scale 5 % of the hidden units suffice for the accuracy of the baseline, without a gain; not run at ImageNet scale.
Deviations from the paper (evidence in README.md): (1) the default penalises the row-normalised weight, sum_j ||W'_:j||, W'_i: = W_i: / ||W_i:||;
(2) lambda = 0.3 for it, since 1e-4 changes nothing; (3) "sparse" is counted as columns below 1e-3 of the largest, and as exact zeros.
"""
import math, os

import torch
from torch import nn

from common import (Log, all_reduce_sum, average_gradients, base_parser, batch_stats_only, class_hash, effective_rank, embedding_std, fail,
                    graceful_stop, load_data, lr_scale, make_backbone, monitor, number, open_run, resolve, save_run, set_lr, setup_distributed,
                    training_views, world_size)

SCRIPT = "barlow_sparsehead"
LAMBDA_SPARSE = {"rownorm": 0.3, "plain": 1e-4, "prox": 3.0}
LIVE = 1e-3                     # a column below this share of the largest counts as dead
WEAK = dict(crop=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.1, blur_p=0.0,
            solarize_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
STRONG = dict(crop=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=1.0,
              solarize_p=0.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
AUGMENTATION = {"shapes": [dict(WEAK, gray_p=0.3)], "small": [WEAK], "imagenet": [STRONG, dict(STRONG, blur_p=0.1, solarize_p=0.2)]}      # Barlow Twins Section 2.2
RECIPES = {     # small: lr, epochs, weight decay of SparseHead's Section 7; imagenet: Barlow Twins' widths, with Adam in place of LARS
    "shapes": dict(arch="resnet_tiny", epochs=10, batch_size=64, lr=3e-3, weight_decay=1e-6, warmup_epochs=0.5, eval_every=2,
                   views=2, lambda_offdiag=5e-3, hidden=256, dim=128),
    "small": dict(arch="resnet18", epochs=1000, batch_size=256, lr=3e-3, weight_decay=1e-6, warmup_epochs=10.0, eval_every=20,
                  views=2, lambda_offdiag=5e-3, hidden=2048, dim=512),
    "imagenet": dict(arch="resnet50", epochs=1000, batch_size=1024, lr=1e-3, weight_decay=1e-6, warmup_epochs=10.0, eval_every=20,
                     views=2, lambda_offdiag=5e-3, hidden=8192, dim=8192)}
LIMITS = {}


def parse_args(argv=None):
    p, flag = base_parser(__doc__.split("\n")[0], RECIPES, ("resnet_tiny", "resnet18", "resnet50"))
    flag("--lambda-offdiag", number(float, 0), "lambda of Barlow Twins, weight of the redundancy term; 0 = off")
    flag("--head", str, "mlp, two layers with BatchNorm and ReLU, or linear (default: mlp as in the paper)", choices=("mlp", "linear"), default="mlp")
    flag("--dim", number(int, 2), "m, width of the embedding")
    flag("--hidden", number(int, 2), "H, width of the hidden layer of the mlp head")
    flag("--penalty", str, "rownorm, L2,1 of the row-normalised weight; plain, the paper's; prox, exact zeros by a group soft-threshold after each step, "
         "then rows to unit norm (default: rownorm)", choices=("rownorm", "plain", "prox"), default="rownorm")
    flag("--lambda-sparse", number(float, 0), "lambda of Eq. 13; prox multiplies it by the learning rate; 0 = off (default: 0.3 rownorm, 3 prox, 1e-4 plain as in "
         "the paper)")
    return p.parse_args(argv)


def check_args(args, data, world):
    """The number of images in one step; settings that do not go together end in `fail`."""
    if args.lambda_sparse is None:
        args.lambda_sparse = 0.0 if args.baseline else LAMBDA_SPARSE[args.penalty]
    if args.baseline and args.lambda_sparse:
        fail(f"--lambda-sparse {args.lambda_sparse}: --baseline has no penalty")
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes, at least 2 images each")
    if args.batch_size > len(data.train):
        fail(f"--batch-size {args.batch_size}: there are only {len(data.train)} training images")
    if args.penalty == "plain" and not args.baseline and not int(os.environ.get("RANK", 0)):
        print("--penalty plain: the embeddings are standardised, so that the loss does not see the scale of a row of W; the penalty shrinks "
              "the whole of W (watch l21 and frobenius), and no column goes (live_columns); --penalty rownorm and prox remove columns")
    return args.batch_size


# ---- model ----------------------------------------------------------------------------------------------------------
def build_nets(args):
    """(ModuleDict of backbone and projector, feature dimension); projector.live_columns (H,) bool says which inputs its last layer still uses."""
    backbone, feature_dim = make_backbone(args.arch, args.image_size)
    if args.head == "mlp":
        layers = [nn.Linear(feature_dim, args.hidden, bias=False), nn.BatchNorm1d(args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.dim, bias=False)]
    else:
        layers = [nn.Linear(feature_dim, args.dim, bias=False)]
    projector = nn.Sequential(*layers)
    projector.register_buffer("live_columns", torch.ones(layers[-1].in_features, dtype=torch.bool))
    return nn.ModuleDict({"backbone": backbone, "projector": projector}), feature_dim


def build_opts(nets, args):
    W = nets["projector"][-1].weight            # no weight decay on it: the loss does not see its scale, the penalty should alone decide
    rest = [p for p in nets.parameters() if p is not W]
    return {"encoder": torch.optim.Adam([{"params": rest, "weight_decay": args.weight_decay}, {"params": [W], "weight_decay": 0}], args.lr, fused=True)}


# ---- Barlow Twins ---------------------------------------------------------------------------------------------------
def standardize(z, eps=1e-5):
    """z (n, m) -> zero mean, unit variance per dimension over the batch of all processes: BatchNorm without affine parameters, whose
    statistics autograd follows from process to process."""
    N = len(z) * world_size()
    z = z - all_reduce_sum(z.sum(0)) / N
    return z / (all_reduce_sum(z.square().sum(0)) / N + eps).sqrt()


def cross_correlation(z1, z2):
    """C (m, m) of two embeddings (n, m), over the batch of all processes. [Barlow Twins Eq. 2]"""
    return all_reduce_sum(standardize(z1).T @ standardize(z2)) / (len(z1) * world_size())


def barlow_terms(z1, z2, lambda_offdiag):
    """(invariance term, redundancy term with its weight) of the loss, scalars. [Barlow Twins Eq. 1]"""
    c = cross_correlation(z1, z2)
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum(), lambda_offdiag * (c.square().sum() - diagonal.square().sum())


def barlow_loss(z1, z2, lambda_offdiag):
    """sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 for z1, z2 (n, m) -> scalar, the sum of `barlow_terms`. [Barlow Twins Eq. 1]"""
    return sum(barlow_terms(z1, z2, lambda_offdiag))


# ---- SparseHead -----------------------------------------------------------------------------------------------------
def column_norms(W):
    """(H,) norms of the columns of W (m, H); the gradient at a zero column is zero."""
    return torch.linalg.vector_norm(W, dim=0)


def l21_norm(W):
    """||W||_{2,1}, the sum of the norms of the columns of W (m, H): the relaxed number of inputs in use. [SparseHead Eq. 13]"""
    return column_norms(W).sum()


def row_normalize(W):
    """W (m, H) with rows of unit norm, zero rows left alone. Barlow's loss is the same for both; l21_norm of it lies between sqrt(m), one
    column left, and sqrt(m H), all alike: it can fall only by sparsity."""
    return W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp(min=1e-12)


def prox_l21(W, threshold):
    """argmin_X ||X - W||^2 / 2 + threshold ||X||_{2,1}: each column of W (m, H) shorter by `threshold`, gone below it. [SparseHead Eq. 13, solved exactly]"""
    return W * (1 - threshold / column_norms(W).clamp(min=1e-12)).clamp(min=0)


def sparse_penalty(W, penalty):
    """The term that --lambda-sparse weighs, scalar: of W (plain), or of its rows scaled to unit norm (rownorm). [SparseHead Eqs. 12-13]"""
    return l21_norm(W if penalty == "plain" else row_normalize(W))


def sparsity(W):
    """Logged numbers of W (m, H): norms; l21_normalized in [1 / sqrt(H), 1]; shares of columns above LIVE times the largest, and exactly zero."""
    norms = column_norms(W)
    return {"l21": norms.sum(), "frobenius": torch.linalg.matrix_norm(W), "l21_normalized": l21_norm(row_normalize(W)) / math.sqrt(W.numel()),
            "live_columns": (norms > LIVE * norms.max()).to(W.dtype).mean(), "zero_columns": (norms == 0).to(W.dtype).mean()}


# ---- one iteration --------------------------------------------------------------------------------------------------
def embed(nets, views, args):
    """(representations, embeddings), each one tensor (n, .) per view, not in bfloat16."""
    x = torch.cat(views)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        r = nets["backbone"](x)
        z = nets["projector"](r)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return r.chunk(len(views)), z.chunk(len(views))


def train_step(nets, opts, views, args, progress):
    """One iteration, optimiser and proximal step included: views is [x1, x2], (n, 3, H, W) each; `progress`, the share of the training
    done, is for methods that change with it. [Barlow Twins Algorithm 1, SparseHead Eq. 12]"""
    W, opt = nets["projector"][-1].weight, opts["encoder"]
    _, (z1, z2) = embed(nets, views, args)
    invariance, redundancy = barlow_terms(z1, z2, args.lambda_offdiag)
    penalty = sparse_penalty(W, args.penalty)
    opt.zero_grad()
    loss = invariance + redundancy
    (loss if args.penalty == "prox" or not args.lambda_sparse else loss + args.lambda_sparse * penalty).backward()
    average_gradients(nets.parameters())
    opt.step()
    with torch.no_grad():
        if args.penalty == "prox" and args.lambda_sparse:                   # the threshold falls with the learning rate, as a gradient step would
            W.copy_(row_normalize(prox_l21(W, opt.param_groups[-1]["lr"] * args.lambda_sparse)))
        found = sparsity(W)
        norms = column_norms(W)
        nets["projector"].live_columns.copy_(norms > LIVE * norms.max())
    return {"loss_ssl": loss.detach(), "loss_invariance": invariance.detach(), "loss_redundancy": redundancy.detach(), "loss_sparse": penalty.detach(),
            "std_z": embedding_std(z1.detach()), "var_z": z1.detach().var(0).mean(), **found}


def diagnose(nets, views, args):
    """Effective ranks of representation and embedding of this batch, both centred. [SparseHead Figs. 1 and 3]"""
    with torch.no_grad(), batch_stats_only(nets):
        (r, _), (z, _) = embed(nets, views, args)
    return {"rank_r": effective_rank(r), "rank_z": effective_rank(z)}


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
