"""Four demonstrations for a course: a claim of a paper, and what is seen when one looks.

  python results/demos.py fig1         SparseHead Fig. 1: no head, a linear head, an MLP head
  python results/demos.py conflict     TC2's premise: do tasks that conflict more gain less?
  python results/demos.py theorem1     TC2's Theorem 1, as logistic regression on two factors
  python results/demos.py adaptation   GeSSL's Table 15: does GeSSL adapt faster to a task?

  --seed S (default: 0)   --out FOLDER (default: runs/demos), for NAME.png

Each takes at most three minutes on two cores: fig1 and adaptation with one seed, conflict with six,
theorem1 (drawn numbers, no images) the mean of 20. Pictures to talk about, no evidence. The numbers
are printed and stand in the picture's caption.
"""
import math
import os
import sys
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import byol_gessl
import measures
from common import (Parser, effective_rank, extract_features, knn_accuracy, load_data,
                    make_backbone, number, rng, run, training_batches)
from eval_linear import eigenvalues
from simclr_tc2 import WEAK, flat_gradient, gradient_conflict, info_nce

CPU = torch.device("cpu")
TEMPERATURE = 0.2


def show(path, panels, caption):
    """A picture of panels {title: (axis labels, {curve: (x, y)}, format)}, with a caption."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, (labels, curves, style)) in zip(axes, panels.items()):
        for name, (x, y) in curves.items():
            axis.plot(x, y, style, label=name)
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
        if title.startswith("spectrum"):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    lines = [textwrap.fill(line, 85 * len(panels)) for line in caption.split("\n")]
    figure.supxlabel("\n".join(lines), fontsize="small")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"{caption}\n{path}")


class Settings:
    """What `training_batches` needs to know."""
    def __init__(self, batch_size, seed):
        self.images_per_step = batch_size
        self.image_size = 32
        self.workers = 0
        self.seed = seed


def train_simclr(head, steps, seed, data, groups=1, batch_size=64):
    """(encoder, mean cosine between the gradients of two groups) after SimCLR on two views.

    head: (d) -> module after the backbone. groups: the loss is the mean over groups of images, the
    paper's SimCLR+T; with one group the cosine is that of two halves all the same."""
    torch.manual_seed(seed)
    backbone, d = make_backbone("resnet_tiny", 32)
    encoder = nn.Sequential(backbone, head(d))
    theta = dict(encoder.named_parameters())
    opt = torch.optim.Adam(theta.values(), 3e-3)
    batches = training_batches(data, [WEAK, WEAK], Settings(batch_size, seed), 0, 1, CPU, 0, steps)
    cosines = []
    for step, (views, _) in enumerate(batches):
        z = encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        if step % 10 == 0:
            halves = [flat_gradient(info_nce(half, TEMPERATURE), theta)
                      for half in z.chunk(2, dim=1)]
            cosines.append(gradient_conflict(torch.stack(halves))[0])
        losses = [info_nce(group, TEMPERATURE) for group in z.chunk(groups, dim=1)]
        opt.zero_grad()
        torch.stack(losses).mean().backward()
        opt.step()
    return encoder, torch.stack(cosines).mean().item()


def linear_head(d):
    return nn.Linear(d, 64)


def mlp_head(d):
    return nn.Sequential(nn.Linear(d, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))


def no_head(d):
    return nn.Identity()


def features(net, images):
    return extract_features(net, "shapes", images, 32, WEAK, 0, CPU)[0]


def accuracy(encoder, data):
    """5-NN accuracy of the representation in percent."""
    bank = features(encoder[0], data.train)
    queries = features(encoder[0], data.test)
    return knn_accuracy(bank, data.train_labels, queries, data.test_labels)


# ---- SparseHead Fig. 1 ---------------------------------------------------------------------------
def fig1(seed, path, steps=100):
    data = load_data("shapes")
    heads = {"no head": no_head, "linear": linear_head, "MLP": mlp_head}
    spectra_r, spectra_z, lines = {}, {}, []
    for name, head in heads.items():
        encoder, _ = train_simclr(head, steps, seed, data)
        r = features(encoder[0], data.test)
        z = features(encoder, data.test)
        for spectra, x in ((spectra_r, r), (spectra_z, z)):
            values = eigenvalues(x)
            spectra[name] = (range(1, len(values) + 1), (values / values[0]).clamp(min=1e-10))
        lines.append(f"{name}: rank of r {effective_rank(r):.1f}, of z {effective_rank(z):.1f}, "
                     f"5-NN {accuracy(encoder, data):.1f} %")
    caption = ("SparseHead Fig. 1 claims that a head raises the rank of r, and that z has a lower "
               "rank than r; it counts eigenvalues above zero.\nSeen, effective ranks: "
               + "; ".join(lines) + ".")
    labels = ("index", "eigenvalue / largest")
    show(path, {"spectrum of the representation r": (labels, spectra_r, "-"),
                "spectrum of the embedding z": (labels, spectra_z, "-")}, caption)


# ---- TC2's premise -------------------------------------------------------------------------------
def cosine_by_size(encoder, data, sizes, seed):
    """Mean cosine between the gradients of random groups of a size, at the same weights."""
    theta = dict(encoder.named_parameters())
    found = []
    for size in sizes:
        batch_size = 4 * size
        batches = training_batches(data, [WEAK, WEAK], Settings(batch_size, seed), 0, 1, CPU, 0, 4)
        cosines = []
        for views, _ in batches:
            gradients = []
            for group in views.chunk(4, dim=1):
                z = encoder(group.flatten(0, 1)).unflatten(0, group.shape[:2])
                gradients.append(flat_gradient(info_nce(z, TEMPERATURE), theta))
            cosines.append(gradient_conflict(torch.stack(gradients))[0])
        found.append(torch.stack(cosines).mean().item())
    return found


def correlation_interval(r, n):
    """95 % interval of a correlation over n > 3 pairs, by Fisher's transformation."""
    z = math.atanh(max(-0.9999, min(0.9999, r)))
    half = 1.96 / (n - 3) ** 0.5
    return math.tanh(z - half), math.tanh(z + half)


def conflict(seed, path, runs=6, steps=62, sizes=(8, 16, 32, 64, 128)):
    data = load_data("shapes")
    cosines, gains = [], []
    for s in range(seed, seed + runs):
        plain, _ = train_simclr(linear_head, steps, s, data)
        tasks, cosine = train_simclr(linear_head, steps, s, data, groups=2)
        cosines.append(cosine)
        gains.append(accuracy(tasks, data) - accuracy(plain, data))
    r = torch.corrcoef(torch.tensor([cosines, gains]))[0, 1].item()
    low, high = correlation_interval(r, runs)
    control = cosine_by_size(tasks, data, sizes, seed)
    caption = ("TC2's premise: runs of SimCLR+T (K = 2, two views) whose tasks conflict more gain "
               "less over SimCLR, a correlation above 0.\n"
               f"Seen: {r:+.2f} over {runs} runs, 95 % interval {low:+.2f} to {high:+.2f}; "
               "other seeds can give another sign.\n"
               f"Control: at the same weights the cosine of random groups grows with their size, "
               f"{control[0]:.2f} at {sizes[0]} images, {control[-1]:.2f} at {sizes[-1]}: it "
               "measures noise too.")
    show(path, {"gain of SimCLR+T over SimCLR": (("mean cosine of the tasks' gradients",
                                                  "gain in 5-NN accuracy, points"),
                                                 {"one run each": (cosines, gains)}, "o"),
                "control": (("images in a group", "mean cosine"),
                            {"the same weights": (sizes, control)}, "o-")}, caption)


# ---- TC2's Theorem 1 -----------------------------------------------------------------------------
def weight_ratio(c, n, seed):
    """|w_j| / |w_i| of logistic regression of Y_i on two factors, for n samples.

    Y_i and Y_j are signs that agree with probability c. F_i = Y_i + noise, F_j = Y_j + noise: the
    factor of the other task says nothing of Y_i but through Y_j. [TC2 Theorem 1]"""
    g = rng("theorem1", c, n, seed)
    y_i = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0)
    y_j = torch.where(torch.rand(n, generator=g) < c, y_i, -y_i)
    x = torch.stack([y_i, y_j], dim=1) + torch.randn(n, 2, generator=g)
    w = torch.zeros(2, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        value = F.softplus(-y_i * (x @ w)).mean()
        value.backward()
        return value

    opt.step(loss)
    w = w.detach().abs()
    return (w[1] / w[0]).item()


def theorem1(seed, path, repeats=20):
    correlations = (0.1, 0.3, 0.5, 0.7, 0.9)
    curves, lines = {}, []
    for n in (50_000, 500, 50):
        ratios = []
        for c in correlations:
            drawn = [weight_ratio(c, n, seed + i) for i in range(repeats)]
            ratios.append(sum(drawn) / repeats)
        curves[f"n = {n}"] = (correlations, ratios)
        lines.append(f"n = {n}: " + " ".join(f"{ratio:.2f}" for ratio in ratios))
    caption = ("TC2's Theorem 1: the best classifier of task i gives weight to task j's factor "
               "unless their labels agree with probability 0.5,\nand there too with limited "
               "samples (which the paper states and does not prove). Seen, |w_j| / |w_i|: "
               + "; ".join(lines) + ".")
    labels = ("probability that Y_i = Y_j", "|w_j| / |w_i|")
    show(path, {"weight on the other task's factor": (labels, curves, "o-")}, caption)


# ---- GeSSL's Table 15 ----------------------------------------------------------------------------
def adaptation(seed, path, epochs=2):
    curves = {}
    for name, flags in (("gessl", []), ("byol", ["--baseline"])):
        out = f"{os.path.dirname(path)}/adaptation_{name}_seed{seed}"
        byol_gessl.main([*flags, "--out", out, "--seed", str(seed), "--epochs", str(epochs),
                         "--device", "cpu"])
        curves[name] = measures.adaptation_curve(out)
    ratio = measures.performance_ratio(curves["byol"], curves["gessl"])
    shown = ", ".join(f"epoch {epoch:g}: {value:.2f}" for epoch, value in ratio.items())
    caption = ("GeSSL's Table 15 claims that after one step on a task's own loss the model with "
               "GeSSL is more accurate,\nr = accuracy without / with GeSSL below 1 (its base is "
               f"SimCLR, ours BYOL). Seen: {shown}.")
    measures.draw_adaptation(path, curves, {"byol": ratio}, caption)
    print(f"{caption}\n{path}")


DEMOS = {"fig1": fig1, "conflict": conflict, "theorem1": theorem1, "adaptation": adaptation}


def main(argv=None):
    p = Parser(description="Demonstrations for a course.", allow_abbrev=False)
    p.add_argument("name", choices=DEMOS)
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--out", type=os.path.expanduser, default="runs/demos")
    args = p.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    DEMOS[args.name](args.seed, f"{args.out}/{args.name}.png")


if __name__ == "__main__":
    run(main)
