"""Evaluate the frozen backbone of any run: what are the features that self-supervised training left behind good for?

  python eval_linear.py runs/simclr_tc2                                       linear probe and k-NN on the run's own data
  python eval_linear.py runs/simclr_tc2 --data cifar100 --protocol linear fewshot             transfer: other data, several protocols
  python eval_linear.py runs/mae_tc2 --protocol finetune --label-fraction 0.01 0.1 1          with few labels and with all
  python eval_linear.py runs/simclr_tc2 --domains PACS                        leave one domain out: a folder of domains of class folders
  python eval_linear.py runs/barlow_sparsehead --protocol spectrum --overlay runs/barlow_sparsehead-baseline      a picture of two runs

  linear          a linear classifier on frozen features: Adam, 1e-2 to 1e-6 (exponential), 500 epochs, weight decay 5e-6, batch 1000, the
                  protocol of Ermolov et al. 2021 that TC2 and SparseHead cite. [TC2 Table 5; GeSSL Tables 1, 7-9; SparseHead Table 1]
  knn             --k nearest neighbours: Euclidean, majority (the papers: k = 5), and cosine weighted with exp(cos / 0.07) (the field: k = 200)
  finetune        the whole network on a class-balanced share of the labels, crops and flips; with the learning rates of the papers: 50 epochs, SGD,
                  classifier and backbone 0.05 and 1e-4 (1 %), 1.0 and 0.01 (10 %). A ViT: AdamW with layer-wise decay, as MAE's Appendix A.
                  [TC2 Table 8, GeSSL Table 2, SparseHead Table 2]
  fewshot         N-way K-shot episodes on the test images: nearest centroid and logistic regression, 95 % interval. [GeSSL Tables 4, 12]
  sigma           -log pi_y when each view of an unseen image is classified among N images; log N = nothing learned. [GeSSL Def. 3.2, Fig. 5]
  adaptation      the same accuracy on training tasks before and after one gradient step on the task itself. [GeSSL Def. 3.1, Table 15]
  spectrum        eigenvalues of the covariance of representations r and embeddings z, effective ranks, picture. [SparseHead Figs. 1 and 3]
  distance-ratio  (farthest - nearest) / nearest distance; large values can mean collapse. [SparseHead Eq. 9]
  conflict        cosines between the gradients of two halves of a batch; picture over training where the log has it. [TC2 Fig. 1b/c]
  pca             the features in the plane of their two largest variances, a picture coloured by class

RUN is a folder with backbone.pt, see README. Features (of a ViT: the mean over all patch tokens) are computed once without augmentation and kept in RUN/features under a key of
backbone and data. Test labels are used for the printed number alone; --sweep chooses on a part of the training set. Results go to stdout as a table and a
Markdown row, and to RUN/eval.json, where rows of other protocols, metrics and data are kept, each with its command, as long as the weights are the same. Whatever the protocol, the backbone and its
BatchNorm statistics are checked to be bit-identical before and after: fine-tuning and inner steps work on copies.
"""
import argparse, contextlib, copy, hashlib, importlib, json, math, os, shlex, sys, time
from collections import namedtuple
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from common import (SMALL, ClassFolders, Data, Parser, batch_stats_only, class_hash, cores_per_process, effective_rank, embedding_std, extract_features, fail, knn_accuracy, load_data,
                    load_torch, lr_scale, make_backbone, number, one_spelling, read_classes, rng, save, set_lr, setup_distributed, training_views, without_loops)
from simclr_tc2 import AUGMENTATION, gradient_conflict, info_nce

PROBE_LR, PROBE_DECAY = 1e-2, 5e-6
PROBE_GRID = [(lr, decay) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for decay in (0, 5e-6, 5e-4)]       # --sweep
TUNE_LR = {0.01: (0.05, 1e-4), 0.1: (1.0, 0.01), 1.0: (0.05, 0.01)}     # classifier, backbone, batch 256; papers state 1 % and 10 %, 100 % is ours
TUNE_GRID = (0.3, 1, 3)                                                 # factors of both, --sweep
VIT_LR, VIT_WEIGHT_DECAY, VIT_LAYER_DECAY = 1e-3, 0.05, 0.75            # MAE Appendix A; lr per 256 images
TEMPERATURES = tuple(10 ** (i / 8) for i in range(-16, 1))              # 0.01 to 1
MAX_TASKS = 32


# ---- labels ---------------------------------------------------------------------------------------------------------
def balanced_subset(labels, fraction, seed):
    """Ascending indices of max(1, round(fraction n_c)) images of each class; a smaller fraction's choice lies in a larger one's."""
    chosen = []
    for c in labels[labels >= 0].unique().tolist():
        rows = (labels == c).nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=rng(seed, "labels", c))[:max(1, round(fraction * len(rows)))]])
    return torch.cat(chosen).sort().values


def hold_out(labels, fraction, seed):
    """(rest, held): ascending, disjoint indices of all labelled images; held is class-balanced, without classes of a single image."""
    alone = labels.clamp(min=0).bincount(labels >= 0)[labels.clamp(min=0)] < 2
    if alone.all():
        fail("--sweep: no class has two labelled images, one to train on and one to hold out")
    held = balanced_subset(labels.masked_fill(alone, -1), fraction, seed)
    rest = labels >= 0
    rest[held] = False
    return rest.nonzero()[:, 0], held


def listed_subset(files, path):
    """Ascending indices of the files that the text file `path` lists, one name or tail of a path per line."""
    try:
        with open(path) as file:
            lines = [line.strip().removeprefix("./") for line in file if line.strip()]
    except UnicodeDecodeError as error:
        fail(f"--label-list {path}: is not a text file ({error})")
    tails, depths = {}, {line.count("/") + 1 for line in lines}
    for i, name in enumerate(files):
        parts = name.replace(os.sep, "/").split("/")
        for depth in depths:
            tails.setdefault("/".join(parts[-depth:]), []).append(i)
    chosen = set()
    for line in lines:
        if len(found := tails.get(line, [])) != 1:
            fail(f"--label-list {path}: {line} names {len(found)} of the training files, not one")
        chosen.update(found)
    return torch.tensor(sorted(chosen)) if chosen else fail(f"--label-list {path}: lists no image")


# ---- protocols on features ------------------------------------------------------------------------------------------
@torch.no_grad()
def fit_probes(x, y, classes, settings, epochs, seed, batch=1000):
    """[(weight (classes, d), bias (classes,))] for each (lr, weight decay) of settings, trained side by side on x (n, d), y (n,): cross-entropy,
    Adam. The gradient of a linear classifier is x^T (softmax - one-hot), written out: autograd would take most of the time."""
    torch.manual_seed(seed)
    first, n, P = nn.Linear(x.shape[1], classes).to(x.device, x.dtype), len(x), len(settings)
    W, b, place = first.weight.repeat(P, 1), first.bias.repeat(P), torch.arange(min(batch, n), device=x.device)               # (P classes, d), (P classes,)
    probes = [*zip(W.split(classes), b.split(classes))]                                                             # views of W and b
    opt = torch.optim.Adam([{"params": probe, "lr": lr, "weight_decay": decay} for probe, (lr, decay) in zip(probes, settings)], fused=True)
    for epoch in range(epochs):
        set_lr({"probes": opt}, 1e-4 ** (epoch / max(1, epochs - 1)))
        for rows in torch.randperm(n, generator=rng(seed, epoch)).to(x.device).split(batch):
            xb = x.index_select(0, rows)
            p = torch.addmm(b[:, None], W, xb.T).view(P, classes, -1).softmax(1)                                    # images last: twice as fast
            p[:, y[rows], place[:len(rows)]] -= 1
            for (w, c), g in zip(probes, p.flatten(0, 1).div_(len(rows)).split(classes)):
                w.grad, c.grad = g @ xb, g.sum(1)
            opt.step()
    return probes


def top_accuracies(logits, y):
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
    return {"top1": 100 * hit[:, 0].float().mean().item()} | ({"top5": 100 * hit.any(1).float().mean().item()} if logits.shape[1] > 5 else {})


def linear(train, test, args):
    """Top-1 and top-5 accuracy in percent of a linear classifier. train, test: (features (n, d), labels (n,)); args.sweep chooses learning
    rate and weight decay by the accuracy on a tenth of the training set."""
    (x, y), (test_x, test_y), setting = train, test, (PROBE_LR, PROBE_DECAY)
    classes = int(torch.cat([y, test_y]).max()) + 1
    if args.sweep:
        rest, held = (rows.to(x.device) for rows in hold_out(y.cpu(), 0.1, args.seed))
        probes = fit_probes(x[rest], y[rest], classes, PROBE_GRID, args.probe_epochs, args.seed)
        scores = [top_accuracies(F.linear(x[held], *probe), y[held])["top1"] for probe in probes]
        for (lr, decay), score in zip(PROBE_GRID, scores):
            print(f"  sweep: lr {lr:g} weight decay {decay:g} {score:.2f} on {len(held)} held-out training images")
        setting = PROBE_GRID[max(range(len(scores)), key=scores.__getitem__)]
    probe = fit_probes(x, y, classes, [setting], args.probe_epochs, args.seed)[0]
    found = {**top_accuracies(F.linear(test_x, *probe), test_y), "train_top1": top_accuracies(F.linear(x, *probe), y)["top1"]}
    return found | ({"lr": setting[0], "weight_decay": setting[1]} if args.sweep else {})


def knn(train, test, ks=(5, 200)):
    """Top-1 accuracies in percent, {"k5_euclidean": ..}: Euclidean distance with majority and cosine with weights, for each k."""
    found = {metric: knn_accuracy(*train, *test, k=ks, metric=metric) for metric in ("euclidean", "cosine")}
    return {f"k{k}_{metric}": found[metric][i] for i, k in enumerate(ks) for metric in found}


def few_shot_episodes(labels, way, shot, queries, episodes, seed):
    """Indices (support (E, way, shot), query (E, way, queries)): `way` classes per episode, all images of a class different."""
    rows = [r for c in labels[labels >= 0].unique() if len(r := (labels == c).nonzero()[:, 0]) >= shot + queries]
    if len(rows) < way:
        fail(f"--way {way}: only {len(rows)} classes have {shot} + {queries} test images")
    g, drawn = rng(seed, "episodes"), []
    for _ in range(episodes):
        drawn.append(torch.stack([rows[c][torch.randperm(len(rows[c]), generator=g)[:shot + queries]] for c in torch.randperm(len(rows), generator=g)[:way].tolist()]))
    return torch.stack(drawn).split([shot, queries], 2)


def nearest_centroid(support, query):
    """Accuracy (E,) in percent of E episodes: support (E, way, shot, d), query (E, way, queries, d), Euclidean distance to the class means."""
    near = torch.cdist(query.flatten(1, 2), support.mean(2)).argmin(2).unflatten(1, query.shape[1:3])
    return 100 * (near == torch.arange(query.shape[1], device=near.device)[:, None]).float().mean((1, 2))


def logistic_regression(support, query, iterations=100):
    """(accuracy (E,) in percent, logits (E, way queries, way)) of a multinomial regression per episode: sum of cross-entropies + ||W||^2 / 2,
    W over the features and a constant 1. By the kernel: W = A^T X, and as the Hessian in the logits is at most 1/2, every step
    A <- A - (K / 2 + I)^{-1} (pi - Y + A) descends (Boehning 1992); there is no step length to choose."""
    E, way, shot, _ = support.shape
    x, q = (F.pad(t.flatten(1, 2), (0, 1), value=1) for t in (support, query))
    K, Y = x @ x.mT, torch.eye(way, dtype=x.dtype, device=x.device).repeat_interleave(shot, 0)
    A, inverse = torch.zeros_like(K[..., :way]), torch.linalg.inv(K / 2 + torch.eye(way * shot, dtype=x.dtype, device=x.device))
    for _ in range(iterations):
        A = A - inverse @ ((K @ A).softmax(2) - Y + A)
    logits = q @ x.mT @ A
    hit = logits.argmax(2) == torch.arange(way, device=x.device).repeat_interleave(query.shape[2])
    return 100 * hit.float().mean(1), logits


def interval(values):
    """(mean, half of the 95 % confidence interval of the mean) of values (n,)."""
    return values.double().mean().item(), (1.96 * values.double().std() / len(values) ** 0.5).item()


def fewshot(test, args):
    """{"5way_1shot_centroid": .., "5way_1shot_centroid_pm": half of the interval, ..} on l2-normalised features."""
    x, y, found = F.normalize(test[0], dim=1), test[1].cpu(), {}
    for shot in args.shot:
        episodes, scores = few_shot_episodes(y, args.way, shot, args.queries, args.episodes, args.seed), []
        for rows in zip(*(part.split(100) for part in episodes)):
            support, query = (x[r.to(x.device)] for r in rows)
            scores.append((nearest_centroid(support, query), logistic_regression(support, query)[0]))
        for name, column in zip(("centroid", "logistic"), zip(*scores)):
            found[f"{args.way}way_{shot}shot_{name}"], found[f"{args.way}way_{shot}shot_{name}_pm"] = interval(torch.cat(column))
    return found


def eigenvalues(x):
    """Eigenvalues, largest first, of the covariance (divisor n - 1) of the rows of x (n, d)."""
    return torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0).clamp(min=0)


def distance_ratio(z):
    """M = (max - min) / min over the distances of each of the n normalised rows of z (n, d) to the others -> (n,). [SparseHead Eq. 9]"""
    z = F.normalize(z, dim=1)
    d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = d.clone().fill_diagonal_(torch.inf).min(1).values.clamp(min=1e-12)
    return (d.max(1).values - nearest) / nearest


def pca_plane(x):
    """(coordinates (n, 2), share of the variance (2,)) of x (n, d) on its two principal axes; an axis's largest loading is positive."""
    _, s, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    return (x - x.mean(0)) @ axes.T, s[:2].square() / s.square().sum()


# ---- mini-batches as classification tasks ---------------------------------------------------------------------------
def pair_logits(h, temperature):
    """Every view of n images classified among the n other views, h (2, n, d) centred and normalised -> (2n, n); row i belongs to i mod n."""
    h = F.normalize(h - h.mean((0, 1)), dim=2)
    return (h @ h.flip(0).mT / temperature).flatten(0, 1)


def own_class(h):
    return torch.arange(h.shape[-2], device=h.device).repeat(2)


def sigma(tasks, temperature):
    """Mean of -log pi_y over tasks (T, 2, n, d): KL(one-hot || pi); the other way round, as printed, it is infinite. [GeSSL Definition 3.2]"""
    return torch.stack([F.cross_entropy(pair_logits(h, temperature), own_class(h)) for h in tasks]).mean()


def instance_accuracy(tasks):
    """Share, in percent, of views whose own image is the nearest: tasks (T, 2, n, d)."""
    return 100 * torch.stack([(pair_logits(h, 1).argmax(1) == own_class(h)).float().mean() for h in tasks]).mean()


def calibrate_temperature(tasks):
    """The temperature of TEMPERATURES with the lowest sigma."""
    return min(TEMPERATURES, key=lambda t: sigma(tasks, t).item())


def task_views(job, part, count):
    """Yield `count` mini-batches of two views, [(n, 3, S, S)] * 2, of different images of `part`: SimCLR's views for every run, whatever it was
    trained on, so that runs compare."""
    recipe = dict(AUGMENTATION["imagenet" if job.state["image_size"] > SMALL else "small"][0], mean=job.state["mean"], std=job.state["std"])
    data = Data(part.name, part.images, part.labels, [], None, job.state["image_size"])
    return training_views(data, [recipe] * 2, job.state["image_size"], job.args.task_size, job.args.seed, 0, 1, job.device, job.args.workers, 0, count)


def count_tasks(job, part, groups):
    count = min(MAX_TASKS, len(part.labels) // (groups * job.args.task_size))
    return count if count * groups > 1 else fail(f"--task-size {job.args.task_size}: two such tasks need more than the {len(part.labels)} images of {part.name}")


def sigma_protocol(job):
    """Sigma, its temperature (calibrated on tasks of other images), accuracy; on representation and, where there is one, embedding."""
    count, spaces = count_tasks(job, job.test, 2), {}
    with torch.no_grad():
        for views in task_views(job, job.test, 2 * count):
            h = job.backbone(torch.cat(views)).float()
            for name, z in spaces_of(job, h).items():
                spaces.setdefault(name, []).append(z.unflatten(0, (2, -1)))
    found = {}
    for name, tasks in spaces.items():
        temperature = calibrate_temperature(tasks[count:])
        found |= {name: sigma(tasks[:count], temperature).item(), f"{name}_accuracy": instance_accuracy(tasks[:count]).item(), f"{name}_temperature": temperature}
    return found | {"log_n": math.log(job.args.task_size)}


def adaptation(job):
    """Accuracy on training tasks before and after one step of gradient descent on the task's InfoNCE (tau 0.2, on centred features), and its ratio r to
    this run's for an --overlay run that has been through the same. [GeSSL Definition 3.1, Table 15]"""
    names, params = zip(*((k, p.detach().requires_grad_()) for k, p in job.backbone.named_parameters()))
    tasks, count, loss_of = [], count_tasks(job, job.train, 1), lambda h: info_nce(h - h.mean((0, 1)), 0.2)
    job.backbone.train()
    for views in task_views(job, job.train, count):
        x = torch.cat(views)
        embed = lambda params: functional_call(job.backbone, dict(zip(names, params)), (x,)).float().unflatten(0, (2, -1))
        with batch_stats_only(job.backbone):
            h = embed(params)
            grads = torch.autograd.grad(loss_of(h), params, materialize_grads=True)
            with torch.no_grad():
                after = embed(torch._foreach_add(params, grads, alpha=-job.args.inner_lr))
                tasks.append(torch.stack([value for z in (h, after) for value in (instance_accuracy(z[None]), loss_of(z))]))
    job.backbone.eval()
    found = {}
    for name, column in zip(("before", "loss_before", "after", "loss_after"), torch.stack(tasks).T):
        found[name], found[f"{name}_pm"] = interval(column)
    if found["loss_after"] > found["loss_before"]:
        print(f"  adaptation: the step raises the loss it descends, --inner-lr {job.args.inner_lr:g} is too long")
    for other in job.args.overlay:
        wanted = (one_spelling(job.name), "adaptation", "after", settings_of("adaptation", job.args), job.classes, weights_hash(load_run(other)[1]))
        rows = [r for r in read_json(os.path.join(other, "eval.json"))["results"] if (*row_key(r), r.get("weights")) == wanted]
        found[f"r_{run_name(other)}"] = rows[0]["value"] / found["after"] if rows else \
            fail(f"--overlay {other}: no adaptation of its present weights on {job.name} with the same settings in its eval.json")
    return found


def conflict(job):
    """Mean cosine between the gradients of two halves of a batch, and share of negative ones; conflict.png where the logs have it. InfoNCE at
    tau 0.2 on the embedding, or the representation of a run without projector. [TC2 Fig. 1b/c]"""
    params, found, count = [p.detach().requires_grad_() for p in job.backbone.parameters()], [], count_tasks(job, job.train, 1)
    names = [k for k, _ in job.backbone.named_parameters()]
    job.backbone.train()
    for views in task_views(job, job.train, count):
        gradients = []
        for halves in zip(*(v.chunk(2) for v in views)):
            with batch_stats_only(job.backbone):
                h = functional_call(job.backbone, dict(zip(names, params)), (torch.cat(halves),)).float()
            z = (job.projector(h) if job.projector else h).unflatten(0, (2, -1))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(info_nce(z, 0.2), params, materialize_grads=True)]))
        found.append(torch.stack(gradient_conflict(torch.stack(gradients))))
    job.backbone.eval()
    (cosine, pm), (negative, _) = (interval(column) for column in torch.stack(found).T)
    plot_conflict([job.args.run, *job.args.overlay], os.path.join(job.args.run, "conflict.png"))
    return {"cosine": cosine, "cosine_pm": pm, "negative_share": negative}


# ---- fine-tuning ----------------------------------------------------------------------------------------------------
def layer_groups(backbone, head, lr, weight_decay, decay):
    """Parameter groups of a ViT: lr decay^(L + 1 - layer), layer 0 = patch embedding and class token, 1 to L = blocks, L + 1 = norm and head; no weight
    decay on biases, norms and the class token. [MAE Appendix A, layer-wise learning-rate decay]"""
    layers = [[backbone.class_token, *backbone.patch_embed.parameters()], *(list(b.parameters()) for b in backbone.blocks), [*backbone.norm.parameters(), *head.parameters()]]
    return [{"params": chosen, "lr": lr * decay ** (len(layers) - 1 - i), "weight_decay": weight_decay * matrix} for i, params in enumerate(layers)
            for matrix in (True, False) if (chosen := [p for p in params if (p.ndim == 2) == matrix])]


def tune(job, images, labels, test, classes, fraction, scale):
    """((logits (n, classes), labels (n,)) of `test` = (images, labels), training accuracy in the last epoch) after fine-tuning a copy of the backbone and a new
    classifier on (images, labels). The rate falls to 0 along a cosine; no weight decay for a ResNet."""
    args, state, batch = job.args, job.state, len(labels) // -(-len(labels) // 256)                    # at most 256, hardly an image left out
    recipe = dict(crop=(0.08 if state["image_size"] > SMALL else 0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter_p=0, jitter=(0, 0, 0, 0), gray_p=0, blur_p=0,
                  solarize_p=0, mean=state["mean"], std=state["std"])
    torch.manual_seed(args.seed)
    backbone, head = copy.deepcopy(job.backbone).requires_grad_().train(), nn.Linear(job.width, classes).to(job.device)
    net = nn.Sequential(backbone, head)
    nn.init.zeros_(head.weight)
    if hasattr(backbone, "patch_embed"):
        opt = torch.optim.AdamW(layer_groups(backbone, head, VIT_LR * scale, VIT_WEIGHT_DECAY, VIT_LAYER_DECAY))
    else:
        head_lr, body_lr = TUNE_LR[min(TUNE_LR, key=lambda f: abs(math.log(f / fraction)))]
        scale = scale * batch / 256
        opt = torch.optim.SGD([{"params": backbone.parameters(), "lr": body_lr * scale}, {"params": head.parameters(), "lr": head_lr * scale}], momentum=0.9)
    per_epoch, peak = len(labels) // batch, [group["lr"] for group in opt.param_groups]
    total, warmup = args.tune_epochs * per_epoch, 0.1 * args.tune_epochs * per_epoch if hasattr(backbone, "patch_embed") else 0
    views = training_views(Data(job.name, images, labels, [], None, state["image_size"]), [recipe], state["image_size"], batch, args.seed, 0, 1, job.device, args.workers,
                           0, total, labelled=True)
    hits = []
    for step, ((x,), y) in enumerate(views):
        for group, lr in zip(opt.param_groups, peak):
            group["lr"] = lr * lr_scale(step, total, warmup)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
            logits = net(x).float()
            loss = F.cross_entropy(logits, y)
        if step >= total - per_epoch:
            hits.append((logits.argmax(1) == y).float().mean())
        opt.zero_grad()
        loss.backward()
        opt.step()
    logits, kept = extract_features(net, test[0], state["image_size"], state["mean"], state["std"], args.workers, job.device, job.name)
    return (logits, test[1][kept].to(job.device)), 100 * float(sum(hits) / max(1, len(hits)))


def finetune(job):
    """{"1%_top1": .., "1%_top5": .., "1%_train_top1": .., "1%_images": ..} for each --label-fraction, or of the images in --label-list."""
    part, args, found = job.train, job.args, {}
    classes = int(torch.cat([part.labels, job.test.labels]).max()) + 1
    if args.label_list:
        rows = listed_subset(part.files or fail(f"--label-list: the images of {part.name} are not files"), args.label_list)
        chosen = {"list": (len(rows) / len(part.labels), rows)}
    else:
        chosen = {f"{100 * f:g}%": (f, balanced_subset(part.labels, f, 0)) for f in args.label_fraction}        # the same images for every seed
    test = take(job.test, (job.test.labels >= 0).nonzero()[:, 0]), job.test.labels[job.test.labels >= 0]
    for name, (fraction, rows) in chosen.items():
        scale, labels = 1, part.labels[rows]
        if args.sweep:
            rest, held = hold_out(labels, 0.2, args.seed)
            scores = [top_accuracies(*tune(job, take(part, rows[rest]), labels[rest], (take(part, rows[held]), labels[held]), classes, fraction, s)[0])["top1"] for s in TUNE_GRID]
            print("\n".join(f"  sweep: {name} of the labels, learning rates times {s:g}: {score:.2f} on {len(held)} held out" for s, score in zip(TUNE_GRID, scores)))
            scale = TUNE_GRID[scores.index(max(scores))]
        tuned, fitted = tune(job, take(part, rows), labels, test, classes, fraction, scale)
        found |= {f"{name}_{k}": v for k, v in {**top_accuracies(*tuned), "train_top1": fitted, "images": len(rows), **({"lr_scale": scale} if args.sweep else {})}.items()}
    return found


# ---- pictures -------------------------------------------------------------------------------------------------------
def figure_of(columns):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, columns, figsize=(5.5 * columns, 4.5), layout="constrained", squeeze=False)
    def finish(path):
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return axes[0], finish


def run_name(run):
    return os.path.basename(os.path.normpath(run))


def plot_spectra(runs, path):
    """Log-scaled eigenvalues by index, representation left, embedding right, one curve per run. [SparseHead Figs. 1 and 3]"""
    axes, finish = figure_of(2)
    for run, style in zip(runs, ["-", "--", "-.", ":"] * len(runs)):
        for axis, (name, values) in zip(axes, read_json(os.path.join(run, "spectrum.json"))["eigenvalues"].items()):
            values = torch.tensor(values, dtype=torch.float64)
            axis.plot((values / values[0]).clamp(min=1e-16).log10(), style, label=f"{run_name(run)}, {len(values)} dimensions")
            axis.set(title=name, xlabel="index of the eigenvalue", ylabel="log10 of eigenvalue / largest")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    for axis in axes:
        axis.set_axis_on() if axis.has_data() else axis.set_axis_off()
    finish(path)


def plot_conflict(runs, path):
    """Cosine between the tasks' gradients over training, from the logs that have it. [TC2 Fig. 1b/c]"""
    logs = {run: [json.loads(line) for line in open(log)] for run in runs if os.path.isfile(log := os.path.join(run, "log.jsonl"))}
    curves = {(run, key): [(r["step"], r[key]) for r in rows if key in r] for run, rows in logs.items() for key in ("conflict_cos_raw", "conflict_cos_calibrated")}
    if not any(curves.values()):
        return
    (axis,), finish = figure_of(1)
    for (run, key), points in curves.items():
        if points:
            axis.plot(*zip(*points), "-" if key.endswith("raw") else "--", label=f"{run_name(run)}, {'z' if key.endswith('raw') else 'calibrated z'}")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="task conflict", xlabel="step", ylabel="mean cosine between the tasks' gradients")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    finish(path)


def pca(job):
    """pca.png: up to 2,000 test features in the plane of their two largest variances, coloured by class (the first ten); shares in percent."""
    x, y = (t[:: -(-len(t) // 2000)].cpu() for t in features(job, job.test))
    points, share = pca_plane(x)
    (axis,), finish = figure_of(1)
    for c, marker in zip(y.unique().tolist(), "os^vD<>PX*"):
        axis.scatter(*points[y == c].T, s=9, alpha=0.6, marker=marker, label=str(job.test.classes[c]))
    axis.set(title=run_name(job.args.run), xlabel=f"first axis, {100 * share[0]:.0f} % of the variance", ylabel=f"second axis, {100 * share[1]:.0f} %")
    axis.legend(fontsize="small", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    finish(os.path.join(job.args.run, "pca.png"))
    return {"axis1_share": 100 * share[0].item(), "axis2_share": 100 * share[1].item()}


# ---- one job --------------------------------------------------------------------------------------------------------
def embedding(job, h):
    return torch.cat([job.projector(part) for part in h.split(4096)])


def spaces_of(job, h):
    """{"representation": h, "embedding": projector(h)} of features (n, d), the second where the run has a projector."""
    return {"representation": h} | ({"embedding": embedding(job, h)} if job.projector else {})


def spectrum(job):
    """Effective rank, and number of eigenvalues above 1e-6 of the largest, of representation and embedding of the test images."""
    found, spectra = {}, {}
    for other in job.args.overlay:
        seen = read_json(os.path.join(other, "spectrum.json"))
        if [one_spelling(seen["data"]), seen.get("classes"), seen.get("weights")] != [one_spelling(job.name), job.classes, weights_hash(load_run(other)[1])]:
            fail(f"--overlay {other}: its spectrum.json is of {seen['data']}, not of {job.name}, of other classes, or of weights that it has no more")
    for name, x in spaces_of(job, features(job, job.test)[0]).items():
        values = eigenvalues(x)
        spectra[name] = values.tolist()
        found |= {f"{name}_rank": effective_rank(x).item(), f"{name}_above_1e-6": (values > 1e-6 * values[0]).sum().item()}
    save(os.path.join(job.args.run, "spectrum.json"), json.dumps({"data": job.name, "classes": job.classes, "weights": job.weights, "eigenvalues": spectra}))
    plot_spectra([job.args.run, *job.args.overlay], os.path.join(job.args.run, "spectrum.png"))
    return found


def ratios(job):
    """Median and tenth percentile of M over up to 5,000 test images, and the spread of the features (0 = collapsed). [SparseHead Eq. 9]"""
    found = {}
    h = features(job, job.test)[0]
    for name, z in spaces_of(job, h[:: -(-len(h) // 5000)]).items():                        # files come class by class
        ratio = distance_ratio(z)
        found |= {name: ratio.median().item(), f"{name}_tenth": ratio.quantile(0.1).item(), f"{name}_std": embedding_std(z).item()}
    return found


def on_features(protocol, parts=("train", "test")):
    """A protocol (train, test, args), or of one of them, on --on representation or embedding, once for each held-out domain with --domains."""
    def run(job):
        pick = lambda part: (embedding(job, part[0]) if job.args.on == "embedding" else part[0], part[1])
        if not job.domains:
            return protocol(*(pick(features(job, getattr(job, part))) for part in parts), job.args)
        domains, found = {run_name(part.name): features(job, part) for part in job.domains}, {}
        for name in domains:
            train = pick([torch.cat(c) for c in zip(*(domains[other] for other in domains if other != name))])
            for metric, value in protocol(train, pick(domains[name]), job.args).items():
                found.setdefault(metric, {})[name] = value
        return {f"{metric}_{name}": value for metric, values in found.items() for name, value in
                {**values, **({"average": sum(values.values()) / len(values), "worst": min(values.values())} if len(values) == len(domains) else {})}.items()}
    return run


def knn_protocol(train, test, args):
    for k in (too_many := [k for k in args.k if k > len(train[0])]):
        print(f"  knn: left out k = {k}, there are only {len(train[0])} training images")
    return knn(train, test, [k for k in args.k if k not in too_many] or fail(f"--k {args.k}: there are only {len(train[0])} training images"))


PROTOCOLS = {"linear": on_features(linear), "knn": on_features(knn_protocol), "finetune": finetune, "fewshot": on_features(fewshot, ["test"]), "sigma": sigma_protocol,
             "adaptation": adaptation, "spectrum": spectrum, "distance-ratio": ratios, "conflict": conflict, "pca": pca}
BY_DOMAIN = ("linear", "knn")
SETTINGS = {"linear": ("probe_epochs", "seed"), "finetune": ("tune_epochs", "label_list", "seed"), "fewshot": ("queries", "episodes", "seed"), "sigma": ("task_size", "seed"),
            "adaptation": ("task_size", "inner_lr", "seed"), "conflict": ("task_size", "seed")}         # rows of eval.json differ if these do


def settings_of(protocol, args):
    return {k: getattr(args, k) for k in SETTINGS.get(protocol, ())}


def row_key(row):
    return one_spelling(row["data"]), *(row.get(k) for k in ("protocol", "metric", "settings", "classes"))


def weights_hash(state):
    """Of the weights and preprocessing in backbone.pt: what belongs to other weights is not kept."""
    return digest(*(v for kv in state["state_dict"].items() for v in kv), *(state[k] for k in ("image_size", "mean", "std")))[:12]


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n\nRUN is")[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = lambda name, kind, text, **kw: p.add_argument(name, type=kind, help=text.replace("%", "%%"), **kw)
    p.add_argument("run", metavar="RUN", help="folder with backbone.pt")
    flag("--data", str, "as in the training scripts (default: the data of the run)")
    flag("--classes", str, "file of class names: only these class folders (default: the run's, on the run's data)")
    flag("--train-data", str, "train here instead: a data set, a folder with train/, or a folder of class folders")
    flag("--test-data", str, "and test here, on the same classes")
    flag("--domains", str, "folder of domains, each a folder of the same class folders: train on all but one, test on it, average and worst")
    p.add_argument("--protocol", nargs="+", metavar="PROTOCOL", choices=tuple(PROTOCOLS), default=["linear", "knn"], help="one or more of those above (default: linear knn)")
    flag("--on", str, "features of linear, knn and fewshot (default: representation)", choices=("representation", "embedding"), default="representation")
    flag("--k", number(int, 1), "knn: neighbours (default: 1 5 10 20 200)", nargs="+", default=[1, 5, 10, 20, 200])
    flag("--probe-epochs", number(int, 1), "linear: epochs (default: 500, the papers')", default=500)
    flag("--label-fraction", number(float, 1e-6, 1), "finetune: shares of the labels, class-balanced (default: 0.01 0.1)", nargs="+", default=[0.01, 0.1])
    flag("--label-list", str, "finetune: a file of image names instead, such as ImageNet's published 1 % and 10 % lists")
    flag("--tune-epochs", number(int, 1), "finetune: epochs (default: 50, the papers')", default=50)
    flag("--way", number(int, 2), "fewshot: N, classes of an episode (default: 5)", default=5)
    flag("--shot", number(int, 1), "fewshot: K, labelled images per class (default: 1 5)", nargs="+", default=[1, 5])
    flag("--queries", number(int, 1), "fewshot: test images per class (default: 15)", default=15)
    flag("--episodes", number(int, 2), "fewshot: (default: 600)", default=600)
    flag("--task-size", number(int, 4), "sigma, adaptation, conflict: N, images of a task (default: 64)", default=64)
    flag("--inner-lr", number(float, 0), "adaptation: alpha of the one step (default: 0.01)", default=0.01)
    p.add_argument("--sweep", action="store_true", help="linear, finetune: choose learning rate and weight decay on held-out training images, print the grid")
    p.add_argument("--overlay", nargs="+", default=[], metavar="RUN", help="spectrum, conflict: draw these runs too; adaptation: the ratio r to them")
    flag("--workers", number(int, 0), "decoding processes for images above 96 px", default=cores_per_process())
    flag("--seed", number(int, 0), "initial weights and order of classifiers, episodes, tasks (default: 0)", default=0)
    return p.parse_args(argv)


def check_args(args):
    if (args.train_data is None) != (args.test_data is None):
        fail("--train-data and --test-data: give both or neither")
    if sum(x is not None for x in (args.data, args.train_data, args.domains)) > 1:
        fail("--data, --train-data, --domains: choose one")
    if args.domains and set(args.protocol) - set(BY_DOMAIN):
        fail(f"--domains: goes with {' and '.join(BY_DOMAIN)}, not with {', '.join(sorted(set(args.protocol) - set(BY_DOMAIN)))}")
    if args.domains and args.sweep:
        fail("--sweep: cannot go with --domains")
    if args.label_list and not os.path.isfile(args.label_list):
        fail(f"--label-list {args.label_list}: no such file")
    for other in args.overlay:
        for protocol, name in (("spectrum", "spectrum.json"), ("adaptation", "eval.json")):
            if protocol in args.protocol and not os.path.isfile(os.path.join(other, name)):
                fail(f"--overlay {other}: no {name} in it, run --protocol {protocol} there first")


def load_run(folder):
    """(backbone with its trained weights, the dict of backbone.pt, the settings of the run or {})."""
    path, log = os.path.join(folder, "backbone.pt"), os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        fail(f"RUN {folder}: no backbone.pt in it")
    state = load_torch(path, f"RUN {folder}", ("arch", "image_size", "mean", "std", "state_dict"))
    try:
        if state["arch"].startswith("vit"):
            mae, width = importlib.import_module("mae_tc2"), state["state_dict"]["patch_embed.weight"].shape[1]
            backbone = mae.Encoder(state["image_size"], round((width / 3) ** 0.5), *mae.ARCHS[state["arch"]])
        else:
            backbone, _ = make_backbone(state["arch"], state["image_size"])
        backbone.load_state_dict(state["state_dict"])
        with open(log) if os.path.isfile(log) else contextlib.nullcontext() as file:
            return backbone, state, json.loads(file.readline())["settings"] if file else {}
    except Exception as error:                          # another program's file: torch, json and Python raise a dozen types
        fail(f"RUN {folder}: is not a run of this project ({type(error).__name__}: {str(error)[:80].partition(chr(10))[0]})")


def load_projector(folder, settings, device):
    """The frozen projector of the run's last.pt, its script builds the networks; None if the method has none."""
    path = os.path.join(folder, "last.pt")
    if "script" not in settings or not os.path.isfile(path):
        return None
    nets, _ = importlib.import_module(settings["script"]).build_nets(argparse.Namespace(**settings))
    nets.load_state_dict(load_torch(path, f"RUN {folder}", ("nets",))["nets"])
    return nets["projector"].to(device).eval().requires_grad_(False) if "projector" in nets else None


Part = namedtuple("Part", "name split images labels classes files")


def take(part, rows):
    """The images of a Part at the given rows: a tensor, or a list of files."""
    return part.images[rows] if torch.is_tensor(part.images) else [part.images[i] for i in rows]


def load_part(name, split, size, args, only=None):
    """A Part: split "train" or "test" of whatever --data can name, or the whole of a folder of class folders."""
    if os.path.isdir(name) and not (os.path.isdir(f"{name}/train") and any(os.path.isdir(f"{name}/{s}") for s in ("val", "test"))):
        try:
            found = ClassFolders(name, read_classes(only))
        except FileNotFoundError as error:
            fail(f"{name}: {str(error).split('. Supp')[0]}")
        files = without_loops(name, [f for f, _ in found.samples])
        return Part(name, split, files, torch.tensor(found.targets), found.classes, files)
    return parts_of(name, size, args, only)[split == "test"]


def parts_of(name, size, args, only=None):
    """Training and test Part of whatever --data can name."""
    data = load_data(name, size if size <= SMALL else None, args.workers, only)
    if data.train_labels is None:
        fail(f"--data {name}: has no train/ and val/ or test/ of class folders; a single folder of them can be --train-data or --test-data")
    return Part(name, "train", data.train, data.train_labels, data.classes, data.files), \
        Part(name, "test", data.test, data.test_labels, data.classes, None if torch.is_tensor(data.test) else data.test)


def same_classes(a, b):
    if list(a.classes) != list(b.classes):
        odd = sorted(set(a.classes) ^ set(b.classes))
        fail(f"{a.name} and {b.name} must have the same classes in the same order; only one of them has {', '.join(odd[:5]) or 'this order'}")


def digest(*things):
    """A hash of tensors and plain values."""
    h = hashlib.sha256()
    for thing in things:
        h.update(thing.cpu().contiguous().numpy().tobytes() if torch.is_tensor(thing) else repr(thing).encode())
    return h.hexdigest()


def features(job, part):
    """(features (n, d), labels (n,)) on the device of the labelled images; from RUN/features if they have been computed before."""
    if part.name + part.split in job.known:
        return job.known[part.name + part.split]
    rows, state = (part.labels >= 0).nonzero()[:, 0], job.state
    images, labels = take(part, rows) if len(rows) < len(part.labels) else part.images, part.labels[rows]
    content = images if torch.is_tensor(images) else [(f, os.path.getsize(f), os.path.getmtime(f)) for f in images]
    folder = os.path.join(job.args.run, "features")
    path = os.path.join(folder, f"{job.weights}-{digest(content, labels)[:12]}.pt")
    if os.path.isfile(path):
        found = load_torch(path, f"RUN {job.args.run}", ("x", "labels"))
        x, labels = found["x"].to(job.device), found["labels"]
    else:
        begun = time.perf_counter()
        x, kept = extract_features(job.backbone, images, state["image_size"], state["mean"], state["std"], job.args.workers, job.device, part.name)
        labels = labels[kept]
        print(f"features of {len(x)} {part.split} images of {part.name}: {time.perf_counter() - begun:.1f} s")
        os.makedirs(folder, exist_ok=True)
        for old in os.listdir(folder):
            if not old.startswith(job.weights):
                os.remove(os.path.join(folder, old))
        save(path, {"x": x.cpu(), "labels": labels})
    return job.known.setdefault(part.name + part.split, (x, labels.to(job.device)))


def as_text(value):
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def show(run, data, rows):
    """The aligned table, intervals beside their means, and a Markdown row with its head."""
    half = {(r["protocol"], r["metric"]): r["value"] for r in rows}
    cells = [(r["protocol"], r["metric"], as_text(r["value"]) + (f" ± {half[pm]:.2f}" if (pm := (r["protocol"], r["metric"] + "_pm")) in half else ""))
             for r in rows if not r["metric"].endswith("_pm")]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    print("\n".join(f"{p:<{widths[0]}}{m:<{widths[1]}}{v:>{widths[2]}}" for p, m, v in cells))
    print(f"\n| run | data | {' | '.join(f'{p} {m}' for p, m, _ in cells)} |\n|{'---|' * (len(cells) + 2)}\n| {run} | {data} | {' | '.join(v for *_, v in cells)} |")


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error})")


def make_job(args):
    """What the protocols need: backbone, projector, images; features are computed when a protocol asks for them."""
    job = SimpleNamespace(args=args, device=setup_distributed()[2], domains=None, projector=None, known={})
    job.backbone, job.state, settings = load_run(args.run)
    job.backbone.to(job.device).eval().requires_grad_(False)
    job.frozen, job.weights = {k: v.clone() for k, v in job.backbone.state_dict().items()}, weights_hash(job.state)
    job.projector, size = load_projector(args.run, settings, job.device), job.state["image_size"]
    with torch.no_grad():
        job.width = job.backbone(torch.zeros(1, 3, size, size, device=job.device)).shape[1]
    if args.on == "embedding" and job.projector is None:
        fail(f"--on embedding: RUN {args.run} has no projector, or no last.pt and log.jsonl to build it from")
    if args.domains:
        folders = sorted(d.path for d in os.scandir(args.domains) if d.is_dir()) if os.path.isdir(args.domains) else fail(f"--domains {args.domains}: no such folder")
        job.name, job.domains = args.domains, [load_part(folder, "train", size, args, args.classes) for folder in folders]
        if len(job.domains) < 2:
            fail(f"--domains {args.domains}: has {len(job.domains)} domains, leaving one out needs two")
        for part in job.domains[1:]:
            same_classes(job.domains[0], part)
    elif args.train_data:
        job.train, job.test = load_part(args.train_data, "train", size, args, args.classes), load_part(args.test_data, "test", size, args, args.classes)
        job.name = f"{args.train_data} -> {args.test_data}"
        if set(map(os.path.realpath, job.train.files or ())) & set(map(os.path.realpath, job.test.files or ())):
            fail(f"--train-data {args.train_data}, --test-data {args.test_data}: have images in common")
        same_classes(job.train, job.test)
    else:
        own = settings.get("data")
        job.name = args.data or own or fail(f"--data: not given, and {args.run} has no log that names it")
        job.train, job.test = parts_of(job.name, size, args, args.classes or (settings.get("classes") if own and os.path.realpath(job.name) == os.path.realpath(own) else None))
    job.classes = class_hash((job.domains or [job.train])[0].classes)
    return job


def main(argv=None):
    args = parse_args(argv)
    check_args(args)
    job, rows, path = make_job(args), [], os.path.join(args.run, "eval.json")
    earlier = [r for r in (read_json(path)["results"] if os.path.isfile(path) else []) if r.get("weights") == job.weights]
    count = lambda part: int((part.labels >= 0).sum())
    images = [sum(map(count, job.domains))] * 2 if job.domains else [count(job.train), count(job.test)]
    made = {"train_images": images[0], "test_images": images[1], "command": shlex.join(["eval_linear.py", *(sys.argv[1:] if argv is None else argv)])}
    print(f"{args.run} on {job.name}: " + (f"{len(job.domains)} domains, {images[0]} images" if job.domains else f"{images[0]} training and {images[1]} test images")
          + f", classes {job.classes}")
    for protocol in args.protocol:
        label = protocol + " (embedding)" * (args.on == "embedding" and protocol in ("linear", "knn", "fewshot")) + " (sweep)" * (args.sweep and protocol in ("linear", "finetune"))
        begun = time.perf_counter()
        rows += [{"data": job.name, "protocol": label, "metric": metric, "value": float(f"{value:.6g}"), "settings": settings_of(protocol, args), "classes": job.classes,
                  "weights": job.weights}
                 for metric, value in PROTOCOLS[protocol](job).items()]
        rows[-1]["seconds"] = round(time.perf_counter() - begun, 1)
        if not all(torch.equal(v, job.frozen[k]) for k, v in job.backbone.state_dict().items()):
            raise AssertionError(f"{protocol} has changed the backbone")
        kept = [r for r in earlier if row_key(r) not in list(map(row_key, rows))]          # written at once: the next protocol may fail
        save(path, json.dumps({"arch": job.state["arch"], "results": kept + [r | made for r in rows]}, indent=1))
    show(run_name(args.run), job.name, rows)


if __name__ == "__main__":
    main()
