"""Every table of results/README.md, but for the first column's words, and its figures, from the logs in this folder: python results/tables.py"""
import glob, json, os, re, statistics, sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval_linear import as_text

HERE = os.path.dirname(os.path.abspath(__file__))
METHODS = {"cifar10_cpu": "SimCLR, TC2", "cifar10_cpu_gessl": "BYOL, GeSSL", "cifar10_cpu_sparsehead": "Barlow Twins, SparseHead", "cifar10_cpu_mae": "MAE, TC2"}
RUNS = ["simclr_2views", "tc2", "byol", "gessl", "barlow", "rownorm", "mae", "mae_tc2"]          # a baseline before its method
DATA, DOMAINS = ".data/cifar10", "runs/domains"
PROTOCOLS = [(DATA, protocol, metric) for protocol, metrics in (
    ("linear", "top1"), ("linear (sweep)", "top1"), ("linear (embedding)", "top1"), ("knn", "k1_euclidean k5_euclidean k20_euclidean k200_euclidean k5_cosine k200_cosine"),
    ("knn (embedding)", "k5_euclidean"), ("fewshot", "5way_1shot_centroid 5way_1shot_logistic 5way_5shot_centroid 5way_5shot_logistic"),
    ("sigma", "representation representation_accuracy embedding embedding_accuracy"),
    ("spectrum", "representation_rank embedding_rank"), ("conflict", "cosine negative_share"), ("pca", "axis1_share"))
    for metric in metrics.split()]
PROTOCOLS += [(DOMAINS, "linear", f"top1_{d}") for d in ("photo", "gray", "edges", "inverted", "average", "worst")] + [
    (DOMAINS, "knn", "k5_euclidean_average"), (f"{DATA} -> {DOMAINS}/inverted", "linear", "top1")]


SEEDS = {"SimCLR and TC2": ["simclr_2views", "simclr_4views", "simclr_4views_equal_passes", "simclr_t", "tc2", "tc2_inner0", "tc2_no_calibration", "tc2_mix", "tc2_half_factors",
                            "tc2_lambda_s_0.01", "tc2_lambda_s_1", "tc2_2tasks", "tc2_8tasks", "tc2_nce", "tc2_literal"],
         "BYOL and GeSSL": ["byol", "byol_large_batch", "byol_equal_passes", "byol_large_batch_equal_passes", "gessl", "gessl_kl_only", "gessl_lambda_1", "gessl_lambda_5",
                            "gessl_lambda_10", "gessl_alpha_0.005", "lookahead", "gessl_first_order", "gessl_exact", "gessl_neumann", "gessl_cg"],
         "Barlow Twins and SparseHead": ["barlow", "plain", "plain_strong", "rownorm", "prox", "prox_strong"],
         "MAE and TC2": ["mae", "mae_2masks", "mae_equal_passes", "mae_tc2", "mae_tc2_no_calibration", "mae_tc2_inner_lr_0.1", "mae_tc2_inner_lr_1"],
         "Unseen classes": ["seen_simclr_4views", "seen_simclr_4views_equal_passes", "seen_tc2"]}
PAIRS = [("tc2", "simclr_2views"), ("tc2", "simclr_4views"), ("tc2", "simclr_4views_equal_passes"), ("simclr_t", "simclr_4views"), ("tc2_inner0", "tc2"), ("tc2_no_calibration", "tc2"),
         ("gessl", "byol"), ("gessl", "byol_large_batch"), ("gessl", "byol_equal_passes"), ("gessl", "byol_large_batch_equal_passes"), ("lookahead", "gessl"), ("gessl_kl_only", "gessl"),
         ("plain", "barlow"), ("rownorm", "barlow"), ("prox", "barlow"), ("prox_strong", "barlow"),
         ("mae_tc2", "mae"), ("mae_tc2", "mae_2masks"), ("mae_tc2", "mae_equal_passes"), ("mae_tc2_no_calibration", "mae_tc2"),
         ("seen_tc2", "seen_simclr_4views"), ("seen_tc2", "seen_simclr_4views_equal_passes")]
PAIRS += [(name, method) for method in ("tc2", "gessl", "mae_tc2") for names in SEEDS.values() for name in names          # variants against their method
          if name.startswith(f"{method}_") and (name, method) not in PAIRS]
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}                   # 97.5 % quantile of Student's t for n seeds
ACCURACIES = (("linear", "top1"), ("knn", "k5_euclidean"), ("knn", "k200_cosine"))


def read(folder):
    """(settings, training lines, last evaluation, {(data, protocol, metric): value}) of a run's log.jsonl and eval.json."""
    with open(f"{folder}/log.jsonl") as file:
        log = [json.loads(line) for line in file]
    return log[0]["settings"], [r for r in log if "lr" in r], [r for r in log if "rank_h" in r][-1], values(folder)


def judged_on(settings):
    """The data of the linear probe: the run's own, but for the rows of unseen classes."""
    return settings["data"].replace("/seen", "/unseen")


def values(folder):
    with open(f"{folder}/eval.json") as file:
        return {(r.get("data", DATA), r["protocol"], r["metric"]): r["value"] for r in json.load(file)["results"]}


def cost(s):
    """Forward and backward passes per image, a forward pass alone counts a third, as explained above each table; nan for second derivatives, which are
    no passes: hypergradients.png has their time."""
    kind, base = s.get("script", "simclr_tc2"), s["baseline"]
    if kind == "byol_gessl":
        K, lam = s["inner_steps"], s["target_steps"]
        if not base and not s["lookahead"] and s["hypergrad"] in ("exact", "neumann", "cg"):
            return float("nan")
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
    accuracy = [f"{found[judged_on(s), p, m]:.2f}" for p, m in ACCURACIES]
    end, passes = steps[-1], images * cost(s)
    if s.get("script") == "barlow_sparsehead":
        rest = [f"{100 * end['live_columns']:.1f}", f"{100 * end['zero_columns']:.1f}", f"{end['l21_normalized']:.3f}", f"{end['frobenius']:.2f}",
                *(f"{found[s['data'], 'spectrum', f'{space}_rank']:.1f}" for space in ("representation", "embedding"))]
        return images, passes, [f"{images:.0f}", *accuracy, *rest]
    rest = [f"{last['loss_reconstruction']:.3f}"] if s.get("script") == "mae_tc2" else [f"{end['std_z']:.2f}"]
    return images, passes, [f"{images:.0f}", f"{passes:.0f}", *accuracy, *rest, f"{last['rank_h']:.0f}"]


def seeds(name):
    """{seed: folder} of the runs of a row."""
    return {int(os.path.basename(os.path.dirname(run)).removeprefix("seed")): run for run in glob.glob(f"{HERE}/cifar10_seeds/seed*/{name}")}


def accuracies(folder, own=False):
    """Of the linear probe and both k-NN, on the data of `judged_on` or on the run's own."""
    s, _, _, found = read(folder)
    return [found[s["data"] if own else judged_on(s), p, m] for p, m in ACCURACIES]


def images_per_s(folder):
    return statistics.median(r["images_per_s"] for r in read(folder)[1])


def seed_line(name):
    """The row's name, number of seeds, images, passes, minutes of training of the seed that was disturbed least, accuracies as mean ± standard deviation
    over the seeds, means of the other columns."""
    runs, rate = [row(run) for run in seeds(name).values()], max(map(images_per_s, seeds(name).values()))
    head = [f"{images:.0f} | {'' if passes != passes else f'{passes:.0f}'} | {1e3 * images / rate / 60:.1f}" for images, passes, _ in runs[:1]]
    accuracy = [spread(c) for c in zip(*map(accuracies, seeds(name).values()))]
    digits = (1, 1, 3, 2, 1, 1) if len(runs[0][2]) == 10 else (3, 0) if name.startswith("mae") else (2, 0)
    rest = [f"{statistics.mean(c):.{n}f}" for n, c in zip(digits, zip(*(map(float, cells[-len(digits):]) for *_, cells in runs)))]
    return f"| `{name}` | " + " | ".join([str(len(runs)), *head, *accuracy, *rest]) + " |"


def paired_line(a, b, own=False):
    """Mean difference a - b over the seeds that both have, ± half of its 95 % interval (of a single seed, none)."""
    first, second = seeds(a), seeds(b)
    both = sorted(set(first) & set(second))
    differences = zip(*([x - y for x, y in zip(accuracies(first[k], own), accuracies(second[k], own))] for k in both))
    return f"| `{a}` - `{b}` | {len(both)} | " + " | ".join(f"{statistics.mean(d):+.1f}" + (f" ± {T[len(d)] * statistics.stdev(d) / len(d) ** 0.5:.1f}" if len(d) > 1 else "") for d in differences) + " |"


def spread(column, digits=1):
    """mean ± standard deviation"""
    return f"{statistics.mean(column):.{digits}f}" + (f" ± {statistics.stdev(column):.{digits}f}" if len(column) > 1 else "")


def more_lines(columns, names):
    """A line for each row that has the first of `columns`, (protocol, metric) pairs: mean and standard deviation of each over the seeds."""
    for name in names:
        found = [(values(run), read(run)[0]["data"]) for run in seeds(name).values()]
        cells = [[v[data, p, m] for v, data in found if (data, p, m) in v] for p, m in columns]
        if cells[0]:
            yield f"| `{name}` | {len(cells[0])} | " + " | ".join(spread(c, 1 if max(c) > 10 else 2) if c else "" for c in cells) + " |"


def seed_tables():
    """{title: lines} of all tables over seeds."""
    tables = {title: [seed_line(name) for name in names if seeds(name)] for title, names in SEEDS.items()}
    tables["Differences"] = [paired_line(a, b) for a, b in PAIRS if set(seeds(a)) & set(seeds(b))]
    rows = [name for names in SEEDS.values() for name in names]
    tables["Seen classes"] = [*more_lines(ACCURACIES, SEEDS["Unseen classes"]), *(paired_line(a, b, own=True) for a, b in PAIRS if a.startswith("seen"))]
    tables["Fine-tuning"] = [*more_lines([("finetune", "1%_top1"), ("finetune", "10%_top1"), ("finetune", "10%_train_top1"), ("linear", "top1")], rows)]
    tables["Adaptation and distances"] = [*more_lines([("adaptation", m) for m in ("loss_before", "loss_after", "before", "after")]
                                                      + [("distance-ratio", m) for m in ("representation", "embedding", "embedding_std")], rows)]
    return tables


def protocol_lines():
    found = {run: values(f"{HERE}/cifar10_cpu_protocols/{run}") for run in RUNS}
    yield "| data, protocol, metric | " + " | ".join(f"`{run}`" for run in RUNS) + " |"
    for key in PROTOCOLS:
        half = (*key[:2], key[2] + "_pm")
        cells = [as_text(v[key]) + (f" ± {v[half]:.2f}" if half in v else "") if key in v else "" for v in found.values()]
        yield "| " + " ".join(f"`{k}`" for k in key) + " | " + " | ".join(cells) + " |"


def draw(rows, columns, **kw):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, layout="constrained", **kw)


def compute_figure(path):
    """Linear accuracy against passes, one panel per method, without the variants of its settings: mean and range over the seeds."""
    variant = re.compile("lambda|alpha|inner_lr|factors|[28]tasks|mix|nce|literal|exact|neumann|cg")
    figure, axes = draw(2, 2, figsize=(13, 10))
    for axis, title in zip(axes.flat, [title for title in SEEDS if " and " in title]):
        names = SEEDS[title]
        points = []
        for name in (n for n in names if seeds(n) and not variant.search(n)):
            values, baseline = [accuracies(run)[0] for run in seeds(name).values()], read([*seeds(name).values()][0])[0]["baseline"]
            points.append((statistics.mean(values), row([*seeds(name).values()][0])[1], values, baseline, name))
        low, high = min(p[0] for p in points), max(p[0] for p in points)
        labels = {}
        for mean, passes, values, baseline, name in sorted(points):
            colour = "black" if baseline else "tab:red"
            axis.plot([passes] * 2, [min(values), max(values)], color=colour, linewidth=1)
            axis.plot(passes, mean, "o" if baseline else "s", color=colour, markerfacecolor="white" if baseline else colour)
            labels[passes] = max(mean, labels.get(passes, -1e9) + max(high - low, 4) / 28)        # labels of neighbours above each other
            axis.annotate(name, (passes, labels[passes]), textcoords="offset points", xytext=(7, -3), fontsize=8)
        axis.set(title=f"{title} (circles: baseline)", xlim=(0, 1.45 * max(p[1] for p in points)), xlabel="thousand forward-backward passes", ylabel="linear top-1 (%)")
        axis.set_ylim(min(axis.get_ylim()[0], high - 4), None)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def conflict_figure(path):
    """Cosine between the tasks' gradients over training, mean and range over the seeds. [TC2 Fig. 1b/c]"""
    figure, axis = draw(1, 1, figsize=(7, 4.5))
    for name, key, style in (("simclr_2views", "raw", "k:"), ("simclr_4views", "raw", "k-"), ("tc2_no_calibration", "raw", "b-"), ("tc2", "raw", "r-"), ("tc2", "calibrated", "r--")):
        curves = []
        for run in seeds(name).values():
            with open(f"{run}/log.jsonl") as file:
                curves.append([(r["step"], r[f"conflict_cos_{key}"]) for r in map(json.loads, file) if f"conflict_cos_{key}" in r])
        steps, values = [step for step, _ in curves[0]], list(zip(*([v for _, v in curve] for curve in curves)))
        axis.plot(steps, [statistics.mean(v) for v in values], style, label=f"{name}, {'z' if key == 'raw' else 'calibrated z'} ({len(curves)} seeds)")
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=style[0], alpha=0.07)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="mean cosine between the tasks' gradients", title="task conflict: mean and range over the seeds")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def hypergradient_figure(path):
    """Accuracy of the derivatives of Eq. 4 against measured time per image. [GeSSL Fig. 4]"""
    figure, axis = draw(1, 1, figsize=(7, 4.5))
    for name, label in (("gessl_first_order", "first order"), ("gessl", "finite difference"), ("gessl_exact", "exact"), ("gessl_neumann", "Neumann"), ("gessl_cg", "conjugate gradients"),
                        ("lookahead", "lookahead")):
        if runs := [*seeds(name).values()]:
            times, values = [1e3 / images_per_s(run) for run in runs], [accuracies(run)[0] for run in runs]
            axis.plot([statistics.mean(times)] * 2, [min(values), max(values)], color="gray", linewidth=1)
            axis.plot(statistics.mean(times), statistics.mean(values), "s", label=label)
    axis.set(xlabel="milliseconds per image, one CPU core", ylabel="linear top-1 (%)", title="hypergradients: cost against accuracy")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for title, lines in seed_tables().items():
        print("\n".join(["", title, *lines]))
    for folder in METHODS:
        print(f"\n{METHODS[folder]}")
        for run in sorted(glob.glob(f"{HERE}/{folder}/*/")):
            print(f"| `{os.path.basename(run[:-1])}` | " + " | ".join(row(run)[2]) + " |")
    print("\n" + "\n".join(protocol_lines()))
    compute_figure(f"{HERE}/compute.png")
    conflict_figure(f"{HERE}/conflict.png")
    hypergradient_figure(f"{HERE}/hypergradients.png")
