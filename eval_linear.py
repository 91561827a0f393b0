"""What is a backbone worth? Its frozen features, few labels, fine-tuning. It knows no method.

  python eval_linear.py runs/simclr_tc2                  linear probe and k-NN on the run's data
  python eval_linear.py runs/simclr_tc2 --data cifar100 --protocol linear fewshot
  python eval_linear.py runs/mae_tc2 --protocol finetune --label-fraction 0.01 0.1 1
  python eval_linear.py runs/simclr_tc2 --train-data pets --test-data pets      transfer
  python eval_linear.py runs/simclr_tc2 --train-data PACS/photo PACS/cartoon PACS/sketch \\
      --test-data PACS/art                               leave one domain out
  python eval_linear.py runs/barlow_sparsehead --protocol spectrum --overlay runs/other

  linear       logistic regression on standardised features, converged, whatever their scale
               [TC2 Table 5, GeSSL Tables 1, 7-9, SparseHead Table 1]
  linear_adam  with `linear`: Adam from 1e-2 to 1e-6, 500 epochs, the protocol that TC2 cites, which
               depends on the features' scale [Ermolov et al. 2021]
  linear_tuned `linear` with the penalty that is best on a tenth of the training images: for few
               images of a class per feature (a ResNet-50 has 0.6 on ImageNet), where the weak
               penalty of `linear` overfits
  knn          nearest neighbours, Euclidean with majority (the papers: 5) and cosine with weights
               (the field: 200); neighbours.png
  finetune     the whole network, on a class-balanced share of the labels
               [TC2 Table 8, GeSSL Table 2, SparseHead Table 2; a ViT: the rates of MAE Appendix A,
               without its RandAugment, mixup, cutmix, label smoothing and drop path]
  fewshot      N-way K-shot episodes of test images: nearest centroid and logistic regression, with
               95 % intervals [GeSSL Tables 4, 12, whose shots are augmentations of one image]
  spectrum     effective rank and eigenvalues of the features' covariance; spectrum.png

RUN is a folder with backbone.pt; its last epoch is judged, never the best on the test set. Features
are those of images without augmentation; of a ViT, the mean over the patch tokens. Results: a
table, a Markdown row, and RUN/eval.json, where rows of other settings and data stay as long as the
weights do. After each protocol the backbone is checked to be the same to the bit. The papers' own
measures: results/measures.py.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import time
import types
import typing

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as TF

from common import (BUILT_IN, SMALL, Data, Parser, central_square, choose_device, decode,
                    default_workers, draw_grid, effective_rank, extract_features, fail,
                    find_splits, list_classes, load_data, load_torch, lr_scale, make_backbone,
                    nearest, number, pick, printable, read_log, rng, run, save, set_lr,
                    to_device, training_batches, vote)

GREEN = (0.1, 0.75, 0.1)                    # frames of neighbours.png: same class, another, none
RED = (0.9, 0.1, 0.1)
WHITE = (1.0, 1.0, 1.0)

CHUNK = 16384                               # images whose logits are in memory at a time
PENALTIES = (1e4, 1e3, 1e2, 10, 1)          # of linear_tuned
ADAM_LR = 1e-2                              # of linear_adam, and its weight decay
ADAM_DECAY = 5e-6

# Fine-tuning a ResNet: {share of the labels: (rate of the classifier, of the backbone)} at batch
# 256. TC2 and GeSSL state those of 1 % and 10 %, those of all labels are ours.
TUNE_LR = {0.01: (0.05, 1e-4), 0.1: (1.0, 0.01), 1.0: (0.05, 0.01)}
# Fine-tuning a ViT. [MAE Appendix A]
VIT_LR = 1e-3
VIT_WEIGHT_DECAY = 0.05
VIT_LAYER_DECAY = 0.75


# ---- linear --------------------------------------------------------------------------------------
def accuracies(logits, y):
    """Top-1, and with more than five classes top-5, in percent: logits (n, classes), y (n,)."""
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
    found = {"top1": 100 * hit[:, 0].float().mean().item()}
    if logits.shape[1] > 5:
        found["top5"] = 100 * hit.any(1).float().mean().item()
    return found


def moments(x):
    """Mean and standard deviation (d,) of x (n, d); 1 for a feature that does not vary."""
    std, mean = torch.std_mean(x, dim=0)
    varies = std > 1e-6 * mean.abs()
    return mean, torch.where(varies, std, 1)


def fit_logistic(x, y, classes, penalty=1):
    """Weight (classes, d), bias (classes,) of logistic regression on x (n, d), y (n,).

    The minimum of sum_i cross-entropy_i + penalty ||weight||^2 / 2, scikit-learn's
    LogisticRegression(C=1 / penalty), by full-batch L-BFGS, until ten iterations lower it by less
    than 1e-6 of itself."""
    weight = torch.zeros(classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, dtype=x.dtype, requires_grad=True)
    opt = torch.optim.LBFGS([weight, bias], max_iter=10, max_eval=100, history_size=10,
                            tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        opt.zero_grad()
        decay = penalty * weight.square().sum() / 2
        decay.backward()
        total = decay.item()
        for x_part, y_part in zip(x.split(CHUNK), y.split(CHUNK)):
            logits = F.linear(x_part, weight, bias)
            loss = F.cross_entropy(logits, y_part, reduction="sum")
            loss.backward()
            total += loss.item()
        return total

    before = math.inf
    for _ in range(200):
        now = opt.step(objective)           # the objective before these ten iterations
        if not now < before * (1 - 1e-6):
            return weight.detach(), bias.detach()
        before = now
    print("  linear: not converged after 2,000 iterations")
    return weight.detach(), bias.detach()


@torch.no_grad()
def fit_adam(x, y, classes, epochs, seed, batch=1000):
    """Weight and bias as above, by Adam; the rate falls to 1e-4 of itself over the epochs.

    The gradient of the cross-entropy, (pi - Y) x, is written out: half the time of autograd."""
    torch.manual_seed(seed)
    probe = nn.Linear(x.shape[1], classes).to(x.device, x.dtype)
    opt = torch.optim.Adam(probe.parameters(), ADAM_LR, weight_decay=ADAM_DECAY, fused=True)
    column = torch.arange(batch, device=x.device)
    for epoch in range(epochs):
        set_lr({"probe": opt}, 1e-4 ** (epoch / max(1, epochs - 1)))
        order = torch.randperm(len(x), generator=rng(seed, epoch)).to(x.device)
        for rows in order.split(batch):
            x_part = x.index_select(0, rows)
            logits = torch.addmm(probe.bias[:, None], probe.weight, x_part.T)   # (classes, batch)
            error = logits.softmax(0)
            error[y[rows], column[:len(rows)]] -= 1
            probe.weight.grad = error @ x_part / len(rows)
            probe.bias.grad = error.mean(1)
            opt.step()
    return probe.weight.detach(), probe.bias.detach()


def linear(job):
    x, y, _ = job.features("train")
    # On CIFAR-10 2 images of a class per feature cost two points of accuracy, 0.5 six, 10 none.
    if len(y) < 5 * job.classes * x.shape[1]:
        print(f"linear: {len(y) / job.classes:.0f} images of a class for {x.shape[1]} features: it "
              "may overfit, see linear_tuned", flush=True)
    return logistic_accuracies(job, penalty=1)


def logistic_accuracies(job, penalty):
    x, y, _ = job.features("train")
    test_x, test_y, _ = job.features("test")
    mean, std = moments(x)
    x = (x - mean).div_(std)
    test_x = (test_x - mean).div_(std)
    probe = fit_logistic(x, y, job.classes, penalty)
    train_top1 = accuracies(F.linear(x, *probe), y)["top1"]
    return {**accuracies(F.linear(test_x, *probe), test_y), "train_top1": train_top1}


def linear_tuned(job):
    x, y, _ = job.features("train")
    penalty = best_penalty(x, y, job.classes)
    return {**logistic_accuracies(job, penalty), "penalty": penalty}


def best_penalty(x, y, classes):
    """The one of PENALTIES that is best on a tenth of the images, after a fit to the others."""
    held_out = torch.zeros(len(y), dtype=torch.bool)
    held_out[balanced_subset(y.cpu(), 0.1, seed=0)] = True
    held_out = held_out.to(y.device)
    mean, std = moments(x)
    rest = (x[~held_out] - mean).div_(std)
    held = (x[held_out] - mean).div_(std)

    # From the strongest, which converges first, to where weaker ones begin to overfit.
    found = {}
    for penalty in PENALTIES:
        probe = fit_logistic(rest, y[~held_out], classes, penalty)
        found[penalty] = accuracies(F.linear(held, *probe), y[held_out])["top1"]
        if found[penalty] < max(found.values()):
            break
    return max(found, key=found.get)


def linear_adam(job):
    x, y, _ = job.features("train")
    test_x, test_y, _ = job.features("test")
    probe = fit_adam(x, y, job.classes, job.args.probe_epochs, job.args.seed)
    train_top1 = accuracies(F.linear(x, *probe), y)["top1"]
    return {**accuracies(F.linear(test_x, *probe), test_y), "train_top1": train_top1}


# ---- nearest neighbours --------------------------------------------------------------------------
def knn(job):
    """{"k5_euclidean": percent, ..} for each --k, and neighbours.png."""
    x, y, _ = job.features("train")
    test_x, test_y, _ = job.features("test")
    ks = [k for k in job.args.k if k <= len(x)]
    if not ks:
        fail(f"--k {job.args.k}: there are only {len(x)} training images")
    if len(ks) < len(job.args.k):
        print(f"  knn: only k = {ks}, there are only {len(x)} training images")

    found = {}
    for metric in ("euclidean", "cosine"):
        near, index = nearest(x, test_x, max(ks), metric)
        for k in ks:
            predicted = vote(near[:, :k], y[index[:, :k]], metric)
            found[f"k{k}_{metric}"] = 100 * (predicted == test_y).float().mean().item()
    if job.writable:
        draw_neighbours(job)
    return found


def draw_neighbours(job):
    """neighbours.png: a test image of each of eight classes, its five nearest training images."""
    x, y, images = job.features("train")
    test_x, test_y, test_images = job.features("test")
    shown = [(test_y == c).nonzero()[0].item() for c in test_y.unique()[:8]]
    _, index = nearest(x, test_x[shown], 5, "euclidean")

    rows = {}
    for i, neighbours in zip(shown, index.tolist()):
        pictures = [framed(job.picture("test", test_images[i]), WHITE)]
        for j in neighbours:
            colour = GREEN if y[j] == test_y[i] else RED
            pictures.append(framed(job.picture("train", images[j]), colour))
        rows[job.test.classes[test_y[i]]] = torch.stack(pictures)
    path = f"{job.args.run}/neighbours.png"
    draw_grid(path, rows, job.data)
    print(f"  {path}: test images (left), their five nearest training images, green: same class")


def framed(image, colour):
    """image (3, S, S) with a border of S / 16 pixels."""
    return TF.pad(image, [max(1, image.shape[1] // 16)], fill=list(colour))


# ---- few-shot episodes ---------------------------------------------------------------------------
def few_shot_episodes(labels, way, shot, queries, episodes, seed):
    """Indices of support (E, way, shot) and query images (E, way, queries) of E episodes.

    `way` classes an episode; the images of a class are all different."""
    members = []
    for c in labels.unique():
        rows = (labels == c).nonzero()[:, 0]
        if len(rows) >= shot + queries:
            members.append(rows)
    if len(members) < way:
        largest = sorted(torch.bincount(labels).tolist(), reverse=True)[:way]
        fail(f"--way {way}: only {len(members)} classes have {shot} + {queries} test images, the "
             f"largest have {', '.join(map(str, largest))}; lower --way, --shot or --queries")

    g = rng(seed, "episodes")
    drawn = []
    for _ in range(episodes):
        episode = []
        for c in torch.randperm(len(members), generator=g)[:way].tolist():
            order = torch.randperm(len(members[c]), generator=g)
            episode.append(members[c][order[:shot + queries]])
        drawn.append(torch.stack(episode))
    return torch.stack(drawn).split([shot, queries], dim=2)


def nearest_centroid(support, query):
    """Accuracy (E,) in percent: support (E, way, shot, d), query (E, way, queries, d)."""
    _, way, queries, _ = query.shape
    centroids = support.mean(2)                                     # (E, way, d)
    distance = torch.cdist(query.flatten(1, 2), centroids)
    truth = torch.arange(way, device=query.device).repeat_interleave(queries)
    return 100 * (distance.argmin(2) == truth).float().mean(1)


def logistic_regression(support, query, iterations=100):
    """(accuracy (E,) in percent, logits (E, way queries, way)), a regression for each episode.

    It minimises the sum of cross-entropies + ||W||^2 / 2, W over the features and a constant 1. In
    the kernel, W = A^T X: the Hessian in the logits is at most 1/2, so that each step
    A <- A - (K / 2 + I)^-1 (pi - Y + A) descends, without a step length. [Boehning 1992]"""
    _, way, shot, _ = support.shape
    x = F.pad(support.flatten(1, 2), (0, 1), value=1)               # (E, way shot, d + 1)
    q = F.pad(query.flatten(1, 2), (0, 1), value=1)
    K = x @ x.mT
    identity = torch.eye(way * shot, dtype=x.dtype, device=x.device)
    Y = torch.eye(way, dtype=x.dtype, device=x.device).repeat_interleave(shot, 0)

    inverse = torch.linalg.inv(K / 2 + identity)
    A = torch.zeros_like(K[..., :way])
    for _ in range(iterations):
        pi = (K @ A).softmax(2)
        A = A - inverse @ (pi - Y + A)

    logits = q @ x.mT @ A
    truth = torch.arange(way, device=x.device).repeat_interleave(query.shape[2])
    return 100 * (logits.argmax(2) == truth).float().mean(1), logits


def interval(values):
    """(mean, half of its 95 % confidence interval) of values (n,)."""
    values = values.double().cpu()
    half = 1.96 * values.std() / len(values) ** 0.5
    return values.mean().item(), half.item()


def fewshot(job):
    """{"5way_1shot_centroid": percent, "5way_1shot_centroid_pm": half of the interval, ..}."""
    args = job.args
    x, y, _ = job.features("test")
    x = F.normalize(x, dim=1)
    found = {}
    for shot in args.shot:
        support, query = few_shot_episodes(y.cpu(), args.way, shot, args.queries, args.episodes,
                                           args.seed)
        scores = {"centroid": [], "logistic": []}
        for s, q in zip(support.to(x.device).split(100), query.to(x.device).split(100)):
            scores["centroid"].append(nearest_centroid(x[s], x[q]))
            scores["logistic"].append(logistic_regression(x[s], x[q])[0])
        for name, values in scores.items():
            name = f"{args.way}way_{shot}shot_{name}"
            found[name], found[f"{name}_pm"] = interval(torch.cat(values))
    return found


# ---- spectrum ------------------------------------------------------------------------------------
def eigenvalues(x):
    """Eigenvalues, largest first, of the covariance (divisor n - 1) of the rows of x (n, d)."""
    return torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0).clamp(min=0)


def spectrum(job):
    """Effective rank, eigenvalues above 1e-6 of the largest, of the test features; spectrum.png."""
    x, _, _ = job.features("test")
    if len(x) < 2:
        fail("--protocol spectrum: needs at least two test images")
    n, d = x.shape
    if n <= d:
        print(f"  spectrum: {n} images have at most {n - 1} eigenvalues above zero, of {d}")
    values = eigenvalues(x).cpu()
    curves = {job.args.run: values}
    for other in job.args.overlay:
        curves[other] = eigenvalues(job.of(other).features("test")[0]).cpu()
    if job.writable:
        title = f"representation, {printable(job.data)}"
        draw_spectra(f"{job.args.run}/spectrum.png", {title: curves})
    return {"rank": effective_rank(x).item(),
            "above_1e-6": (values > 1e-6 * values[0]).sum().item()}


def draw_spectra(path, panels):
    """Eigenvalues by index: panels {title: {name of a run: eigenvalues}}."""
    from matplotlib.figure import Figure        # takes a second; pyplot would choose a backend
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items()):
        for name, values in curves.items():
            relative = (values / values[0]).clamp(min=1e-16)        # rounding, below the rank
            label = f"{printable(name)}, {len(values)} dim."
            axis.plot(range(1, len(values) + 1), relative, label=label)
        axis.set(title=title, xlabel="index", ylabel="eigenvalue / largest", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---- fine-tuning ---------------------------------------------------------------------------------
def balanced_subset(labels, fraction, seed):
    """Ascending indices of max(1, round(fraction n_c)) images of each class c.

    A smaller fraction's choice lies in a larger one's."""
    chosen = []
    for c in labels.unique().tolist():
        rows = (labels == c).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=rng(seed, "labels", c))
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[order[:count]])
    return torch.cat(chosen).sort().values


def layer_groups(vit, head, lr, weight_decay, decay):
    """Parameter groups of a ViT with L blocks: lr decay^(L + 1 - layer). [MAE Appendix A]

    Layer 0: patch embedding and class token, 1 to L: blocks, L + 1: norm and head. No weight decay
    on biases, norms and the class token."""
    layers = [[vit.class_token, *vit.patch_embed.parameters()]]
    layers += [list(block.parameters()) for block in vit.blocks]
    layers += [[*vit.norm.parameters(), *head.parameters()]]
    groups = []
    for i, params in enumerate(layers):
        layer_lr = lr * decay ** (len(layers) - 1 - i)
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        groups.append({"params": matrices, "lr": layer_lr, "weight_decay": weight_decay})
        groups.append({"params": others, "lr": layer_lr, "weight_decay": 0.0})
    return groups


def tune_optimizer(backbone, head, fraction, batch):
    """(optimiser, share of the steps that warm up). A ResNet's rates are those of its share."""
    if hasattr(backbone, "patch_embed"):
        groups = layer_groups(backbone, head, VIT_LR, VIT_WEIGHT_DECAY, VIT_LAYER_DECAY)
        return torch.optim.AdamW(groups), 0.1

    def distance(share):
        return abs(math.log(share / fraction))

    head_lr, backbone_lr = TUNE_LR[min(TUNE_LR, key=distance)]
    groups = [{"params": backbone.parameters(), "lr": backbone_lr * batch / 256},
              {"params": head.parameters(), "lr": head_lr * batch / 256}]
    return torch.optim.SGD(groups, momentum=0.9), 0


def tune(job, images, labels, fraction):
    """(a copy of the backbone with a classifier, both trained; training accuracy in percent).

    The rate falls to 0 along a cosine; crops and flips; the accuracy is that of the last epoch."""
    args = job.args
    size = job.state["image_size"]
    batches_of_256 = math.ceil(len(labels) / 256)
    batch = len(labels) // batches_of_256               # at most 256, hardly an image left out
    per_epoch = len(labels) // batch
    total = args.tune_epochs * per_epoch
    crop = (0.08 if size > SMALL else 0.2, 1.0)
    augmentation = {"crop": crop, "ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": (0, 0, 0, 0),
                    "jitter_p": 0, "gray_p": 0, "blur_p": 0, "solarize_p": 0,
                    "mean": job.state["mean"], "std": job.state["std"]}

    torch.manual_seed(args.seed)
    backbone = copy.deepcopy(job.backbone).requires_grad_().train()
    head = nn.Linear(job.features_dim, job.classes).to(job.device)
    nn.init.zeros_(head.weight)
    net = nn.Sequential(backbone, head)
    opt, warmup = tune_optimizer(backbone, head, fraction, batch)
    bf16 = job.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    data = Data(name=job.data, train=images, train_labels=labels, test=[], test_labels=None,
                size=size, classes=None, fingerprint="")
    settings = types.SimpleNamespace(images_per_step=batch, image_size=size, seed=args.seed,
                                     workers=args.workers)
    batches = training_batches(data, [augmentation], settings, 0, 1, job.device, 0, total)
    right = 0
    seen = 0
    for step, (views, index) in enumerate(batches):
        set_lr({"net": opt}, lr_scale(step, total, warmup * total))
        y = to_device(labels[index], job.device)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
            logits = net(views[0]).float()
        loss = F.cross_entropy(logits, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step >= total - per_epoch:
            right += (logits.argmax(1) == y).sum()
            seen += len(y)
    return net, 100 * (right / seen).item()


def finetune(job):
    """Yield {"1%_top1", "1%_top5", "1%_train_top1", "1%_images"} for each --label-fraction."""
    for fraction in job.args.label_fraction:
        rows = balanced_subset(job.train.labels, fraction, seed=0)      # whatever --seed is
        images = pick(job.train.images, rows)
        net, train_top1 = tune(job, images, job.train.labels[rows], fraction)
        logits, labels, _ = job.extract(net, "test")
        scores = {**accuracies(logits, labels), "train_top1": train_top1, "images": len(rows)}
        yield {f"{100 * fraction:g}%_{name}": value for name, value in scores.items()}


# ---- a run, its data and its features ------------------------------------------------------------
class Part(typing.NamedTuple):
    """The labelled images to train or to test on."""
    images: typing.Any          # uint8 (N, 3, S, S), or a list of file names
    labels: torch.Tensor        # int64 (N,)
    classes: list               # their names


def load_run(folder):
    """(backbone with its weights, what backbone.pt holds, the run's settings or {})."""
    path = os.path.join(folder, "backbone.pt")
    if not os.path.isfile(path):
        fail(f"RUN {folder}: is no folder with a backbone.pt")
    state = load_torch(path, f"RUN {folder}", ("arch", "image_size", "mean", "std", "state_dict"))
    try:
        if state["arch"].startswith("vit"):
            import mae_tc2
            backbone = mae_tc2.encoder_from_checkpoint(state)
        else:
            backbone, _ = make_backbone(state["arch"], state["image_size"])
            backbone.load_state_dict(state["state_dict"])
    except Exception as error:          # another program's file: a dozen types are possible
        reason = str(error).split("\n")[0][:80]
        fail(f"RUN {folder}: is not a run of this project ({type(error).__name__}: {reason})")
    rows = read_log(folder)
    settings = rows[0].get("settings", {}) if rows else {}
    return backbone.eval().requires_grad_(False), state, settings


def load_part(name, split, size, workers, loaded):
    """Part "train" or "test" of data with both, or all of a folder of class folders.

    loaded {name: Data} saves what has been read."""
    folder = os.path.expanduser(name)
    if name not in BUILT_IN and os.path.isdir(folder) and find_splits(folder)[1] is None:
        files, labels, classes = list_classes(folder)
        if files:                               # without any, load_data gives no labels
            return Part([os.path.join(folder, file) for file in files], labels, classes)
    if name not in loaded:
        loaded[name] = load_data(name, size, workers)
    data = loaded[name]
    if data.test_labels is None:
        fail(f"{name}: has no class folders, and so no labels; name some with --data FOLDER")
    if split == "train":
        return Part(data.train, data.train_labels, data.classes)
    return Part(data.test, data.test_labels, data.classes)


def load_joined(names, split, size, workers, loaded):
    """The Parts of all `names` as one."""
    parts = [load_part(name, split, size, workers, loaded) for name in names]
    in_memory = torch.is_tensor(parts[0].images)
    for part, name in zip(parts, names):
        if torch.is_tensor(part.images) != in_memory:
            fail(f"{names[0]} and {name}: cannot be joined, one is read at once, one file by file")
    parts = [in_order_of(parts[0], part, f"{names[0]} and {name}")
             for part, name in zip(parts, names)]
    images = [part.images for part in parts]
    images = torch.cat(images) if in_memory else sum(images, [])
    return Part(images, torch.cat([part.labels for part in parts]), parts[0].classes)


def in_order_of(first, part, names):
    """`part` with labels that count the classes in the order of `first`, which has the same."""
    odd = sorted(set(first.classes) ^ set(part.classes))
    if odd:
        fail(f"{names}: must have the same classes; only one of them has {', '.join(odd[:5])}")
    place = torch.tensor([first.classes.index(name) for name in part.classes])
    labels = torch.where(part.labels < 0, part.labels, place[part.labels])      # -1: none
    return Part(part.images, labels, first.classes)


def load_parts(args, size):
    """(training Part, test Part, what to call the data)."""
    train_names = args.train_data or [args.data]
    test_names = args.test_data or [args.data]
    loaded = {}
    train = load_joined(train_names, "train", size, args.workers, loaded)
    test = load_joined(test_names, "test", size, args.workers, loaded)

    train_name = " + ".join(map(spelling, train_names))
    test_name = " + ".join(map(spelling, test_names))
    test = in_order_of(train, test, f"{train_name} and {test_name}")
    read_from = {real_folder(name, "train") for name in train_names}
    if read_from & {real_folder(name, "test") for name in test_names}:
        names = " and ".join(dict.fromkeys([train_name, test_name]))
        fail(f"{names}: training and test images are the same; give --train-data and --test-data, "
             "or a folder with train/ and val/ or test/")
    if train_name == test_name:
        return train, test, train_name
    return train, test, f"{train_name} -> {test_name}"


def real_folder(name, split):
    """The folder, links resolved, that "train" or "test" of this data is read from."""
    folder = os.path.expanduser(name)
    if name in BUILT_IN or not os.path.isdir(folder):
        return name, split
    train, test = find_splits(folder)
    return os.path.realpath(test if test and split == "test" else train)


def labelled(part):
    rows = (part.labels >= 0).nonzero()[:, 0]
    if len(rows) == len(part.labels):
        return part
    return Part(pick(part.images, rows), part.labels[rows], part.classes)


def spelling(name):
    """One spelling of a folder, relative where it lies below the working directory."""
    path = os.path.abspath(os.path.expanduser(name))
    if name in BUILT_IN or not os.path.isdir(path):
        return name
    try:
        below = os.path.relpath(path)
    except ValueError:                          # another drive of Windows
        return path
    return path if below.startswith("..") else below


class Job:
    """What the protocols need: a run, its images, features when they are asked for."""
    def __init__(self, args):
        self.device = choose_device(args.device)
        self.args = args
        self.backbone, self.state, self.settings = load_run(args.run)
        # channels_last: faster convolutions, on a GPU and on a CPU.
        self.backbone.to(self.device, memory_format=torch.channels_last)
        self.weights = weights_hash(self.backbone, self.state)
        self.writable = os.access(args.run, os.W_OK)
        if args.train_data is None and args.data is None:
            args.data = self.settings.get("data")
            if args.data is None:
                fail(f"--data: not given, and {args.run} has no log that names it")
            if not self.settings.get("classes", 1):
                fail(f"--data: {args.run} was trained without labels; name a folder with train/ "
                     "and val/ or test/ of class folders")
            if args.data not in BUILT_IN and not os.path.isdir(os.path.expanduser(args.data)):
                fail(f"--data: the run's own, {args.data}, is not found from here; name it")

        # Larger images stay as they are until their features are computed; small ones of several
        # sizes are then cut to their median side first.
        size = self.state["image_size"]
        train, test, self.data = load_parts(args, size if size <= SMALL else None)
        self.train = labelled(train)
        self.test = labelled(test)
        self.classes = len(self.train.classes)
        blank = torch.zeros(1, 3, size, size, device=self.device)
        self.features_dim = self.backbone(blank).shape[1]
        self.known = {}

    def of(self, folder):
        """The same job for another run."""
        args = copy.copy(self.args)
        args.run = folder
        return type(self)(args)

    def extract(self, backbone, split):
        """(features (n, d), labels (n,), n indices of the images) of "train" or "test"."""
        part = getattr(self, split)
        x, kept = extract_features(backbone, self.data, part.images, self.state["image_size"],
                                   self.state, self.args.workers, self.device)
        return x, part.labels[kept].to(self.device), kept

    def features(self, split):
        """`extract` of the run's own backbone, computed once."""
        if split not in self.known:
            start = time.perf_counter()
            self.known[split] = self.extract(self.backbone, split)
            seconds = time.perf_counter() - start
            print(f"  features of {len(self.known[split][0])} {split} images: {seconds:.1f} s")
        return self.known[split]

    def picture(self, split, i):
        """Image i of "train" or "test", (3, S, S) in [0, 1]."""
        image = getattr(self, split).images[i]
        if not torch.is_tensor(image):
            image = decode(image)
        return central_square(image, self.state["image_size"]) / 255


def weights_hash(backbone, state):
    """Of all weights and buffers, and of the preprocessing in backbone.pt."""
    digest = hashlib.sha256(repr([state[k] for k in ("image_size", "mean", "std")]).encode())
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# ---- results -------------------------------------------------------------------------------------
PROTOCOLS = {"linear": linear, "linear_adam": linear_adam, "linear_tuned": linear_tuned,
             "knn": knn, "finetune": finetune, "fewshot": fewshot, "spectrum": spectrum}
# Rows of other settings are other rows.
SETTINGS = {"linear_adam": ("probe_epochs", "seed"), "finetune": ("tune_epochs", "seed"),
            "fewshot": ("queries", "episodes", "seed")}


# Rows that differ in one of these stand beside each other; else the later one counts.
ROW = ("protocol", "metric", "settings", "data", "weights")


def as_text(value):
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def table_cells(rows):
    """[(protocol, metric, value)] as text; half an interval, `_pm`, stands beside its mean."""
    values = {(row["protocol"], row["metric"]): row["value"] for row in rows}
    cells = []
    for (protocol, metric), value in values.items():
        half = values.get((protocol, f"{metric}_pm"))
        text = as_text(value)
        if half is not None:
            text += f" ± {half:.2f}"
        if not metric.endswith("_pm"):
            cells.append((protocol, metric, text))
    return cells


def read_rows(path):
    """The rows of eval.json."""
    if not os.path.exists(path):
        return []
    try:
        with open(path) as file:
            rows = json.load(file)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error}); move it away")
    complete = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not complete or any(name not in row for name in ROW for row in rows):
        fail(f"{path}: is not a table of this program; move it away")
    return rows


def row_key(row):
    return [row[name] for name in ROW]


def keep(path, rows):
    """Add rows to eval.json, read again: another evaluation may have written since."""
    keys = [row_key(row) for row in rows]
    kept = []
    for row in read_rows(path):
        if row["weights"] == rows[0]["weights"] and row_key(row) not in keys:
            kept.append(row)
    save(path, json.dumps(kept + rows, indent=1))


def evaluate(job, protocols, settings, command):
    """Measure, show and keep the results of protocols {name: function of the job}."""
    args = job.args
    print(f"{args.run} on {job.data}: {len(job.train.labels)} training and {len(job.test.labels)} "
          f"test images, {job.classes} classes")
    path = f"{args.run}/eval.json"
    if job.writable:
        read_rows(path)             # one that cannot be read ends the program before it measures

    rows = []
    for protocol, function in protocols.items():
        chosen = {name: getattr(args, name) for name in settings.get(protocol, ())}
        results = function(job)
        if isinstance(results, dict):
            results = [results]     # finetune yields several, which may come hours apart
        for found in results:
            if weights_hash(job.backbone, job.state) != job.weights:
                raise AssertionError(f"{protocol} has changed the backbone")
            for metric, value in found.items():
                rows.append({"protocol": protocol, "metric": metric,
                             "value": float(f"{value:.6g}"), "settings": chosen,
                             "data": job.data, "command": command, "weights": job.weights})
            for cell in table_cells(rows[-len(found):]):
                print("{:<16}{:<28}{:>16}".format(*cell), flush=True)
            if job.writable:        # at once: what follows may fail
                keep(path, rows)

    cells = table_cells(rows)
    heads = [f"{protocol} {metric}" for protocol, metric, _ in cells]
    print(f"\n| run | data | {' | '.join(heads)} |")
    print(f"|{'---|' * (len(cells) + 2)}")
    name = os.path.basename(os.path.normpath(args.run))
    print(f"| {name} | {job.data} | {' | '.join(text for _, _, text in cells)} |")
    if not job.writable:
        print(f"nothing is kept: {args.run} is read-only")


# ---- flags ---------------------------------------------------------------------------------------
def job_parser(doc):
    """The flags that results/measures.py shares."""
    p = Parser(description=(doc or "").split("\n\nRUN is")[0], allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("run", metavar="RUN", type=os.path.expanduser, help="folder with backbone.pt")
    add("--data", help="as in the training scripts (default: the data of the run)")
    add("--train-data", nargs="+", metavar="DATA",
        help="train on these instead: class folders, or a folder with train/, whose train/ is "
        "taken, or built-in data; several are joined")
    add("--test-data", nargs="+", metavar="DATA",
        help="and test on these, of a folder with train/ on its val/ or test/; the same classes")
    add("--overlay", nargs="+", default=[], metavar="RUN", type=os.path.expanduser,
        help="other runs, drawn into the pictures")
    add("--workers", type=number(int, 0), default=default_workers(),
        help="decoding processes, for images in files (default: the cores, up to 16)")
    add("--seed", type=number(int, 0, 2 ** 63), default=0,
        help="of classifiers, orders, episodes, tasks (default: 0)")
    add("--device", choices=("cuda", "mps", "cpu"),
        help="default: cuda where there is one, else cpu; mps is untested")
    return p


def parse_args(argv=None):
    p = job_parser(__doc__)
    add = p.add_argument
    add("--protocol", nargs="+", metavar="PROTOCOL", choices=tuple(PROTOCOLS),
        default=["linear", "knn"], help="one or more of those above (default: linear knn)")
    add("--k", nargs="+", type=number(int, 1), default=[5, 200],
        help="knn: neighbours (default: 5 200)")
    add("--probe-epochs", type=number(int, 1), default=500, help="linear_adam: (default: 500)")
    add("--label-fraction", nargs="+", type=number(float, 1e-6, 1), default=[0.01, 0.1],
        help="finetune: shares of the labels, class-balanced (default: 0.01 0.1)")
    add("--tune-epochs", type=number(int, 1), default=50,
        help="finetune: epochs (default: 50, the papers')")
    add("--way", type=number(int, 2), default=5, help="fewshot: N, classes (default: 5)")
    add("--shot", nargs="+", type=number(int, 1), default=[1, 5],
        help="fewshot: K, labelled images of a class (default: 1 5)")
    add("--queries", type=number(int, 1), default=15,
        help="fewshot: test images of a class (default: 15)")
    add("--episodes", type=number(int, 2), default=600, help="fewshot: (default: 600)")
    return p.parse_args(argv)


def check_args(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("several processes would each do the whole evaluation: start it without torchrun")
    if (args.train_data is None) != (args.test_data is None):
        fail("--train-data and --test-data: give both or neither")
    if args.data and args.train_data:
        fail("--data and --train-data: choose one")
    for other in args.overlay:
        if not os.path.isfile(f"{other}/backbone.pt"):
            fail(f"--overlay {other}: no backbone.pt in it")


def main(argv=None):
    args = parse_args(argv)
    check_args(args)
    names = list(args.protocol)
    if "linear" in names and "linear_adam" not in names:
        names.insert(names.index("linear") + 1, "linear_adam")
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["eval_linear.py", *argv])
    job = Job(args)
    if "fewshot" in names:              # too few test images must not cost the other protocols
        for shot in args.shot:
            few_shot_episodes(job.test.labels, args.way, shot, args.queries, 1, args.seed)
    evaluate(job, {name: PROTOCOLS[name] for name in names}, SETTINGS, command)


if __name__ == "__main__":
    run(main, advice="evaluate fewer images, or on --device cpu")
