"""Every table of results/README.md, but for the first column's words, and compute.png, from the logs in this folder: python results/tables.py"""
import glob, json, os, sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval_linear import as_text

HERE = os.path.dirname(os.path.abspath(__file__))
METHODS = {"cifar10_cpu": "SimCLR, TC2", "cifar10_cpu_gessl": "BYOL, GeSSL", "cifar10_cpu_sparsehead": "Barlow Twins, SparseHead", "cifar10_cpu_mae": "MAE, TC2"}
RUNS = ["simclr_2views", "tc2", "byol", "gessl", "barlow", "rownorm", "mae", "mae_tc2"]          # a baseline before its method
DATA, DOMAINS = ".data/cifar10", "runs/domains"
PROTOCOLS = [(DATA, protocol, metric) for protocol, metrics in (
    ("linear", "top1"), ("linear (sweep)", "top1"), ("linear (embedding)", "top1"), ("knn", "k1_euclidean k5_euclidean k20_euclidean k200_euclidean k5_cosine k200_cosine"),
    ("knn (embedding)", "k5_euclidean"), ("finetune", "1%_top1 10%_top1 100%_top1"), ("fewshot", "5way_1shot_centroid 5way_1shot_logistic 5way_5shot_centroid 5way_5shot_logistic"),
    ("sigma", "representation representation_accuracy embedding embedding_accuracy"), ("adaptation", "before after r_simclr_2views r_byol r_barlow r_mae"),
    ("spectrum", "representation_rank embedding_rank"), ("distance-ratio", "representation embedding embedding_std"), ("conflict", "cosine negative_share"), ("pca", "axis1_share"))
    for metric in metrics.split()]
PROTOCOLS += [(DOMAINS, "linear", f"top1_{d}") for d in ("photo", "gray", "edges", "inverted", "average", "worst")] + [
    (DOMAINS, "knn", "k5_euclidean_average"), (f"{DATA} -> {DOMAINS}/inverted", "linear", "top1")]


def read(folder):
    """(settings, training lines, last evaluation, {(data, protocol, metric): value}) of a run's log.jsonl and eval.json."""
    with open(f"{folder}/log.jsonl") as file:
        log = [json.loads(line) for line in file]
    return log[0]["settings"], [r for r in log if "lr" in r], [r for r in log if "rank_h" in r][-1], values(folder)


def values(folder):
    with open(f"{folder}/eval.json") as file:
        return {(r.get("data", DATA), r["protocol"], r["metric"]): r["value"] for r in json.load(file)["results"]}


def cost(s):
    """Forward and backward passes per image, a forward pass alone counts a third; as explained above each table."""
    kind, base = s.get("script", "simclr_tc2"), s["baseline"]
    if kind == "byol_gessl":
        K, lam = s["inner_steps"], s["target_steps"]
        return 2 * (1 / 3 + (1 if base else K + lam + 1 / 3 if s["lookahead"] else K + lam + 4 / 3 + K * (s["hypergrad"] == "fd")))
    if kind == "mae_tc2":
        return s["masks"] if base else s["masks"] * (5 / 6 + (s["inner_lr"] > 0) / 2 + (s["calibrate"] != "none") / 2)
    if kind == "barlow_sparsehead":
        return 2
    return s["views"] if base else 4 / 3 + 4 + 2 * (s["inner_lr"] > 0)


def row(folder):
    """(thousands of images seen, thousands of passes, the cells of the table)."""
    s, steps, last, found = read(folder)
    images = steps[-1]["step"] * s["batch_size"] * (s["tasks"] if s.get("script") == "byol_gessl" and not s["baseline"] else 1) / 1e3
    accuracy = [f"{found[DATA, p, m]:.2f}" for p, m in (("linear", "top1"), ("knn", "k5_euclidean"), ("knn", "k200_cosine"))]
    end, passes = steps[-1], images * cost(s)
    if s.get("script") == "barlow_sparsehead":
        rest = [f"{100 * end['live_columns']:.1f}", f"{100 * end['zero_columns']:.1f}", f"{end['l21_normalized']:.3f}", f"{end['frobenius']:.2f}",
                *(f"{found[DATA, 'spectrum', f'{space}_rank']:.1f}" for space in ("representation", "embedding"))]
        return images, passes, [f"{images:.0f}", *accuracy, *rest]
    rest = [f"{last['loss_reconstruction']:.3f}"] if s.get("script") == "mae_tc2" else [f"{end['std_z']:.2f}"]
    return images, passes, [f"{images:.0f}", f"{passes:.0f}", *accuracy, *rest, f"{last['rank_h']:.0f}"]


def protocol_lines():
    found = {run: values(f"{HERE}/cifar10_cpu_protocols/{run}") for run in RUNS}
    yield "| data, protocol, metric | " + " | ".join(f"`{run}`" for run in RUNS) + " |"
    for key in PROTOCOLS:
        half = (*key[:2], key[2] + "_pm")
        cells = [as_text(v[key]) + (f" ± {v[half]:.2f}" if half in v else "") if key in v else "" for v in found.values()]
        yield "| " + " ".join(f"`{k}`" for k in key) + " | " + " | ".join(cells) + " |"


def figure(path):
    """Linear accuracy against passes, one panel per method."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharex=True, sharey=True, layout="constrained")           # one scale: small differences stay small
    for axis, (folder, title) in zip(axes.flat, METHODS.items()):
        points = []
        for run in glob.glob(f"{HERE}/{folder}/*/"):
            s, _, _, found = read(run)
            points.append((found[DATA, "linear", "top1"], row(run)[1], s["baseline"], os.path.basename(run[:-1])))
        below = -1e9
        for accuracy, passes, baseline, name in sorted(points):
            axis.plot(passes, accuracy, "o" if baseline else "s", color="black" if baseline else "tab:red", markerfacecolor="white" if baseline else "tab:red")
            below = max(accuracy, below + 0.8)                                  # labels of neighbours above each other
            axis.annotate(name, (passes, below), textcoords="offset points", xytext=(6, -3), fontsize=8)
        axis.set(title=f"{title} (circles: baseline)", xlim=(0, 1700), xlabel="thousand forward-backward passes", ylabel="linear top-1 (%)")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for folder in METHODS:
        print(f"\n{METHODS[folder]}")
        for run in sorted(glob.glob(f"{HERE}/{folder}/*/")):
            print(f"| `{os.path.basename(run[:-1])}` | " + " | ".join(row(run)[2]) + " |")
    print("\n" + "\n".join(protocol_lines()))
    figure(f"{HERE}/compute.png")
