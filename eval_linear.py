"""Evaluate the frozen backbone of any run: how good are the features that self-supervised training left behind?

  python eval_linear.py runs/simclr_tc2                                       linear probe and k-NN on the run's own data
  python eval_linear.py runs/simclr_tc2 --data cifar100 --protocol knn        transfer: other data, one protocol
  python eval_linear.py runs/barlow_sparsehead --protocol spectrum --overlay runs/barlow_sparsehead-baseline      a picture of two runs

  linear  a linear classifier on features computed once without augmentation: Adam, learning rate 1e-2 to 1e-6 (exponential), 500 epochs,
          weight decay 5e-6, batch 1000. The protocol of Ermolov et al. 2021 that TC2 and SparseHead cite.
  knn     k nearest neighbours, no training: 5 by Euclidean distance and majority (the papers), 200 by cosine weighted with exp(cos / 0.07)
          (the field). The two differ by points on the same features: never compare one with the other.
  spectrum  eigenvalues of the covariance of the test images' representations r and embeddings z (after the projector), their effective ranks,
          RUN/spectrum.json and, log10 of both, RUN/spectrum.png with the spectra of --overlay runs. [SparseHead Section 4, Figs. 1 and 3]

RUN is a folder with backbone.pt, see README. Test labels are used once, for the printed number; nothing is chosen by them. The table goes to
stdout and to RUN/eval.json (other protocols' results there are kept). A protocol is a function (train, test, args) -> {metric: value} in PROTOCOLS; train and test are (features,
labels). The backbone and its BatchNorm statistics are checked to be bit-identical before and after.
"""
import argparse
import importlib
import json
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

from common import Parser, effective_rank, extract_features, fail, knn_accuracy, load_data, load_torch, make_backbone, number, rng, save_text, setup_distributed


def linear(train, test, args):
    """Top-1 and top-5 accuracy in percent of a linear classifier. train, test: (features (n, d), labels (n,))."""
    (x, y), (test_x, test_y) = train, test
    classes, epochs, batch = int(y.max()) + 1, args.probe_epochs, min(1000, len(x))
    torch.manual_seed(args.seed)
    probe = nn.Linear(x.shape[1], classes).to(x.device)
    opt = torch.optim.Adam(probe.parameters(), 1e-2, weight_decay=5e-6, fused=True)
    for epoch in range(epochs):
        opt.param_groups[0]["lr"] = 1e-2 * 1e-4 ** (epoch / max(1, epochs - 1))
        order = torch.randperm(len(x), generator=rng(args.seed, epoch)).to(x.device)
        for rows in order.split(batch):
            opt.zero_grad()
            F.cross_entropy(probe(x[rows]), y[rows]).backward()
            opt.step()
    with torch.no_grad():
        ranked = probe(test_x).topk(min(5, classes), dim=1).indices == test_y[:, None]
        return {"top1": 100 * ranked[:, 0].float().mean().item(), "top5": 100 * ranked.any(1).float().mean().item(),
                "train_top1": 100 * (probe(x).argmax(1) == y).float().mean().item()}


def knn(train, test, args):
    """Top-1 accuracy in percent by both protocols."""
    return {"k5_euclidean": knn_accuracy(*train, *test, k=5), "k200_cosine": knn_accuracy(*train, *test, k=200, metric="cosine", temperature=0.07)}


def eigenvalues(x):
    """Eigenvalues, largest first, of the covariance (divisor n - 1) of the rows of x (n, d)."""
    return torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0).clamp(min=0)


def spectrum(train, test, args):
    """Effective rank, and number of eigenvalues above 1e-6 of the largest, of representation and embedding of the test images."""
    found, spectra = {}, {}
    for name, x in (("representation", test[0]), ("embedding", args.embed(test[0]))):
        values = eigenvalues(x)
        spectra[name] = values.tolist()
        found |= {f"{name}_rank": effective_rank(x).item(), f"{name}_above_1e-6": (values > 1e-6 * values[0]).sum().item()}
    save_text(os.path.join(args.run, "spectrum.json"), json.dumps(spectra))
    plot_spectra([args.run, *args.overlay], os.path.join(args.run, "spectrum.png"))
    return found


def plot_spectra(runs, path):
    """Log-scaled eigenvalues by index, representation left, embedding right, one curve per run. [SparseHead Figs. 1 and 3]"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run, style in zip(runs, ["-", "--", "-.", ":"] * len(runs)):
        with open(os.path.join(run, "spectrum.json")) as file:
            spectra = json.load(file)
        for axis, name in zip(axes, ("representation", "embedding")):
            values = torch.tensor(spectra[name], dtype=torch.float64)
            axis.plot((values / values[0]).clamp(min=1e-16).log10(), style, label=os.path.basename(os.path.normpath(run)))
            axis.set(title=f"{name} ({len(values)} dimensions)", xlabel="index of the eigenvalue", ylabel="log10 of eigenvalue / largest")
            axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


PROTOCOLS = {"linear": linear, "knn": knn, "spectrum": spectrum}


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("run", metavar="RUN", help="folder with backbone.pt")
    p.add_argument("--data", help="as in the training scripts (default: the data of the run)")
    p.add_argument("--protocol", nargs="+", choices=tuple(PROTOCOLS), default=["linear", "knn"], help="one or more (default: linear knn)")
    p.add_argument("--overlay", nargs="+", default=[], metavar="RUN", help="spectrum: runs whose spectrum.json is drawn too (default: none)")
    p.add_argument("--probe-epochs", type=number(int, 1), default=500, help="epochs of the linear classifier (default: 500, the papers')")
    p.add_argument("--workers", type=number(int, 0), default=min(16, os.cpu_count() or 1), help="decoding processes for images above 96 px")
    p.add_argument("--seed", type=number(int, 0), default=0, help="initial weights and data order of the classifier (default: 0)")
    return p.parse_args(argv)


def load_run(folder):
    """(backbone with its trained weights, the dict of backbone.pt, the settings of the run or {})."""
    path, log = os.path.join(folder, "backbone.pt"), os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        fail(f"RUN {folder}: no backbone.pt in it")
    state = load_torch(path, f"RUN {folder}", ("arch", "image_size", "mean", "std", "state_dict"))
    if state["arch"].startswith("vit"):
        mae, width = importlib.import_module("mae_tc2"), state["state_dict"]["patch_embed.weight"].shape[1]
        backbone = mae.Encoder(state["image_size"], round((width / 3) ** 0.5), *mae.ARCHS[state["arch"]])
    else:
        backbone, _ = make_backbone(state["arch"], state["image_size"])
    backbone.load_state_dict(state["state_dict"])
    if os.path.isfile(log):
        with open(log) as file:
            return backbone, state, json.loads(file.readline())["settings"]
    return backbone, state, {}


def load_projector(folder, settings, device):
    """The projector of the run's last.pt as a frozen function of features (n, d): its script builds the networks."""
    path = os.path.join(folder, "last.pt")
    if "script" not in settings or not os.path.isfile(path):
        fail(f"RUN {folder}: has no last.pt with the projector and log.jsonl that names its script, --protocol spectrum needs both")
    nets, _ = importlib.import_module(settings["script"]).build_nets(argparse.Namespace(**settings))
    if "projector" not in nets:
        fail(f"RUN {folder}: {settings['script']} has no projector, --protocol spectrum needs one")
    nets.load_state_dict(load_torch(path, f"RUN {folder}", ("nets",))["nets"])
    projector = nets["projector"].to(device).eval()
    return torch.no_grad()(lambda x: torch.cat([projector(part) for part in x.split(4096)]))


def labelled_features(backbone, state, data, split, args, device):
    """(features, labels) of one split, images without label left out."""
    images, labels = (data.train, data.train_labels) if split == "train" else (data.test, data.test_labels)
    x, kept = extract_features(backbone, images, state["image_size"], state["mean"], state["std"], args.workers, device, data.name)
    labels = labels[kept]
    return x[labels >= 0], labels[labels >= 0].to(device)


def main(argv=None):
    args = parse_args(argv)
    backbone, state, settings = load_run(args.run)
    for other in args.overlay:
        if not os.path.isfile(os.path.join(other, "spectrum.json")):
            fail(f"--overlay {other}: no spectrum.json in it, run --protocol spectrum there first")
    name = args.data or settings.get("data") or fail(f"--data: not given, and {args.run} has no log that names it")
    data = load_data(name, state["image_size"] if state["image_size"] <= 96 else None, args.workers)
    if data.train_labels is None:
        fail(f"--data {name}: has no class folders, and these protocols need labels")
    device = setup_distributed()[2]
    backbone.to(device).eval()
    if "spectrum" in args.protocol:
        args.embed = load_projector(args.run, settings, device)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    begun = time.perf_counter()
    train, test = (labelled_features(backbone, state, data, split, args, device) for split in ("train", "test"))
    print(f"{args.run} on {name}: {len(train[0])} training and {len(test[0])} test images, {train[0].shape[1]} features, "
          f"{time.perf_counter() - begun:.1f} s")
    rows = []
    for protocol in args.protocol:
        begun = time.perf_counter()
        rows += [{"protocol": protocol, "metric": metric, "value": round(value, 3)} for metric, value in PROTOCOLS[protocol](train, test, args).items()]
        rows[-1]["seconds"] = round(time.perf_counter() - begun, 1)
    if not all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()):
        raise AssertionError("a frozen protocol has changed the backbone")
    print("\n".join(f"{r['protocol']:<10}{r['metric']:<16}{r['value']:>8.2f}" for r in rows))
    path = os.path.join(args.run, "eval.json")
    if os.path.isfile(path):
        with open(path) as file:
            before = json.load(file)
        kept = before["results"] if (before["data"], before["train_images"], before["test_images"]) == (name, len(train[0]), len(test[0])) else []
        rows = [r for r in kept if r["protocol"] not in args.protocol] + rows
    save_text(path, json.dumps({"data": name, "arch": state["arch"], "train_images": len(train[0]),
                                                              "test_images": len(test[0]), "seed": args.seed, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
