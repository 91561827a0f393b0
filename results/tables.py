"""Every table of results/README.md and its figures, from the logs beside this file.

  python results/tables.py         prints the tables, draws lengths, compute, conflict and
                                   hypergradients.png

A row of the tables is a run, or several runs that differ in their seed. The rows over lengths of
training, logs/cifar10_lengths, are of the second edition; all others are of the first, whose metric
`linear top1` is `linear_adam` of the second.
"""
import functools
import glob
import json
import math
import os
import re
import statistics
import typing

HERE = os.path.dirname(os.path.abspath(__file__))
LOGS = os.path.join(HERE, "logs")

# ---- what stands in which table ------------------------------------------------------------------
# The rows over seeds, in logs/cifar10_seeds/seed*/ROW.
SEEDS = {
    "SimCLR and TC2": [
        "simclr_2views", "simclr_4views", "simclr_4views_equal_passes", "simclr_t", "tc2",
        "tc2_inner0", "tc2_no_calibration", "tc2_mix", "tc2_half_factors", "tc2_lambda_s_0.01",
        "tc2_lambda_s_1", "tc2_2tasks", "tc2_8tasks", "tc2_nce", "tc2_literal"],
    "BYOL and GeSSL": [
        "byol", "byol_large_batch", "byol_equal_passes", "byol_large_batch_equal_passes", "gessl",
        "gessl_kl_only", "gessl_lambda_1", "gessl_lambda_5", "gessl_lambda_10",
        "gessl_alpha_0.005", "lookahead", "gessl_first_order", "gessl_exact", "gessl_neumann",
        "gessl_cg"],
    "Barlow Twins and SparseHead": [
        "barlow", "plain", "plain_strong", "rownorm", "prox", "prox_strong"],
    "MAE and TC2": [
        "mae", "mae_2masks", "mae_equal_passes", "mae_tc2", "mae_tc2_no_calibration",
        "mae_tc2_inner_lr_0.1", "mae_tc2_inner_lr_1"],
    "Unseen classes": [
        "seen_simclr_4views", "seen_simclr_4views_equal_passes", "seen_tc2"],
}
ALL_ROWS = [name for names in SEEDS.values() for name in names]

# The differences: first minus second, at the same seeds. Variants against their method follow.
PAIRS = [
    ("tc2", "simclr_2views"), ("simclr_4views", "simclr_2views"), ("tc2", "simclr_4views"),
    ("tc2", "simclr_4views_equal_passes"), ("simclr_t", "simclr_4views"), ("tc2_inner0", "tc2"),
    ("tc2_no_calibration", "tc2"),
    ("gessl", "byol"), ("gessl", "byol_large_batch"), ("gessl", "byol_equal_passes"),
    ("gessl", "byol_large_batch_equal_passes"), ("lookahead", "gessl"), ("gessl_kl_only", "gessl"),
    ("plain", "barlow"), ("rownorm", "barlow"), ("prox", "barlow"), ("prox_strong", "barlow"),
    ("mae_tc2", "mae"), ("mae_tc2", "mae_2masks"), ("mae_tc2", "mae_equal_passes"),
    ("mae_tc2_no_calibration", "mae_tc2"),
    ("seen_tc2", "seen_simclr_4views"), ("seen_tc2", "seen_simclr_4views_equal_passes"),
]
for method in ("tc2", "gessl", "mae_tc2"):
    variants = [name for name in ALL_ROWS if name.startswith(f"{method}_")]
    PAIRS += [(name, method) for name in variants if (name, method) not in PAIRS]

# The papers' gains over their own baselines: method, baseline, where it stands, linear, 5-NN.
CLAIMS = [
    ("tc2", "simclr_2views", "TC2 Table 5, CIFAR-10", 93.84 - 91.80, 91.75 - 88.42),
    ("mae_tc2", "mae", "TC2 Table 6, ImageNet, fine-tuned ViT-B", 86.2 - 83.6, None),
    ("gessl", "byol", "GeSSL Table 21, STL-10", 94.5 - 91.9, None),
    ("rownorm", "barlow", "SparseHead Table 1, CIFAR-10", 91.28 - 90.88, 89.87 - 88.78),
    ("prox", "barlow", "the same", 91.28 - 90.88, 89.87 - 88.78),
]
COLLAPSED = ("tc2_literal", "mae_tc2_inner_lr_1")
CONFLICT = ["simclr_2views", "simclr_4views", "simclr_t", "tc2_no_calibration", "tc2"]

# The rows over lengths, in logs/cifar10_lengths/length*/seed*/ROW.
LENGTHS = (1, 4, 16)
LENGTH_ROWS = {
    "SimCLR and TC2": [
        "simclr_2views", "simclr_2views_equal_passes", "simclr_4views",
        "simclr_4views_equal_passes", "simclr_t", "simclr_t_2", "tc2", "tc2_support",
        "tc2_features", "tc2_without_skip", "tc2_no_calibration", "tc2_literal",
        "simclr_4views_512", "tc2_512"],
    "BYOL and GeSSL": [
        "byol", "byol_large_batch", "byol_large_batch_equal_passes", "gessl", "gessl_ssl_4",
        "gessl_kl_only", "lookahead"],
    "Barlow Twins and SparseHead": ["barlow", "rownorm", "inputs", "plain"],
    "MAE and TC2": ["mae", "mae_2masks", "mae_equal_passes", "mae_tc2", "mae_tc2_inner0"],
    "Other bases": [
        "byol_large_batch_4epochs", "byol_tc2", "barlow_equal_passes", "barlow_tc2",
        "simclr_sparsehead", "simclr_sparsehead_strong", "simclr_gessl",
        "simclr_2views_equal_gessl"],
    "Unseen classes": [
        "seen_simclr_4views", "seen_simclr_4views_equal_passes", "seen_simclr_t", "seen_tc2"],
    "Settings": [
        "tc2_inner0", "tc2_all_factors", "tc2_lambda_s_0.01", "tc2_lambda_s_1", "tc2_2tasks",
        "tc2_8tasks", "tc2_nce", "tc2_no_decay",
        "byol_equal_passes", "gessl_lambda_1", "gessl_lambda_5", "gessl_lambda_10",
        "gessl_alpha_0.005", "gessl_first_order", "gessl_exact",
        "gessl_neumann", "gessl_cg", "plain_strong", "prox", "prox_strong",
        "mae_tc2_no_calibration", "mae_tc2_inner_lr_0.1", "mae_tc2_inner_lr_1",
        "mae_tc2_lambda_s_0.001", "mae_tc2_all_factors"],
}
LENGTH_PAIRS = [
    ("tc2", "simclr_2views"), ("tc2", "simclr_4views"), ("tc2", "simclr_4views_equal_passes"),
    ("tc2", "simclr_2views_equal_passes"), ("simclr_4views", "simclr_2views"),
    ("simclr_t", "simclr_4views"), ("simclr_t_2", "simclr_2views"), ("tc2", "simclr_t"),
    ("tc2_support", "tc2"), ("tc2_features", "tc2"), ("tc2_without_skip", "tc2"),
    ("tc2_no_calibration", "tc2"), ("tc2_literal", "tc2"), ("tc2_512", "simclr_4views_512"),
    ("gessl", "byol"), ("gessl", "byol_large_batch"), ("gessl", "byol_large_batch_equal_passes"),
    ("gessl_ssl_4", "gessl"), ("gessl_kl_only", "gessl"), ("lookahead", "gessl"),
    ("rownorm", "barlow"), ("inputs", "barlow"), ("inputs", "rownorm"), ("plain", "barlow"),
    ("mae_tc2", "mae"), ("mae_tc2", "mae_2masks"), ("mae_tc2", "mae_equal_passes"),
    ("mae_tc2_inner0", "mae_tc2"),
    ("byol_tc2", "byol_large_batch_4epochs"), ("byol_tc2", "byol_large_batch_equal_passes"),
    ("barlow_tc2", "barlow"), ("barlow_tc2", "barlow_equal_passes"),
    ("simclr_sparsehead", "simclr_2views"), ("simclr_sparsehead_strong", "simclr_2views"),
    ("simclr_gessl", "simclr_2views"), ("simclr_gessl", "simclr_2views_equal_gessl"),
    ("seen_tc2", "seen_simclr_4views"), ("seen_tc2", "seen_simclr_4views_equal_passes"),
    ("seen_tc2", "seen_simclr_t"),
]

# The settings' own differences, in a table of their own: many lines, no claims.
SETTING_PAIRS = [
    ("tc2_no_decay", "simclr_2views"), ("tc2_no_decay", "simclr_4views"),
    ("tc2_no_decay", "simclr_4views_equal_passes"), ("gessl", "byol_equal_passes"),
    ("plain_strong", "barlow"), ("prox", "barlow"), ("prox_strong", "barlow")]
for method in ("tc2", "gessl", "mae_tc2"):
    variants = [name for name in LENGTH_ROWS["Settings"] if name.startswith(f"{method}_")]
    SETTING_PAIRS += [(name, method) for name in variants]

# The papers' gains: method, base at equal images, at equal passes, source, linear, 5-NN. BYOL has
# two bases at equal images: batches of a task's size, and of a step's, which has as many steps.
LENGTH_CLAIMS = [
    ("tc2", "simclr_2views", "simclr_4views_equal_passes", "TC2 Table 5, CIFAR-10", 2.04, 3.33),
    ("byol_tc2", "byol_large_batch_4epochs", "byol_large_batch_equal_passes",
     "TC2 Table 5, CIFAR-10", 94.89 - 91.73, 91.96 - 89.26),
    ("barlow_tc2", "barlow", "barlow_equal_passes", "TC2 Table 5, CIFAR-10", 94.41 - 90.88,
     91.81 - 88.78),
    ("mae_tc2", "mae", "mae_equal_passes", "TC2 Table 6, ImageNet, fine-tuned ViT-B", 2.6, None),
    ("gessl", "byol", "byol_large_batch_equal_passes", "GeSSL Table 21, STL-10", 2.6,
     None),
    ("gessl", "byol_large_batch", "byol_large_batch_equal_passes", "GeSSL Table 21, STL-10", 2.6,
     None),
    ("simclr_gessl", "simclr_2views", "simclr_2views_equal_gessl", "GeSSL Table 21, STL-10",
     93.1 - 90.5, None),
    ("simclr_sparsehead", "simclr_2views", "simclr_2views", "SparseHead Table 1, CIFAR-10",
     92.75 - 91.80, 90.32 - 88.42),
    ("simclr_sparsehead_strong", "simclr_2views", "simclr_2views", "SparseHead Table 1, CIFAR-10",
     92.75 - 91.80, 90.32 - 88.42),
    ("rownorm", "barlow", "barlow", "SparseHead Table 1, CIFAR-10", 0.40, 1.09),
]

# The curves of lengths.png: {panel: {label: (colour, rows)}}, all lengths of these rows.
LENGTH_CURVES = {
    "on SimCLR": {
        "SimCLR, 2 views": ("gray", ["simclr_2views", "simclr_2views_equal_passes",
                                     "simclr_2views_equal_gessl"]),
        "SimCLR, 4 views": ("black", ["simclr_4views", "simclr_4views_equal_passes"]),
        "TC2": ("tab:red", ["tc2"]),
        "GeSSL": ("tab:blue", ["simclr_gessl"]),
        "SparseHead": ("tab:green", ["simclr_sparsehead"])},
    "on BYOL": {
        "BYOL, batch 128": ("black", ["byol_large_batch", "byol_large_batch_4epochs",
                                      "byol_large_batch_equal_passes"]),
        "TC2": ("tab:red", ["byol_tc2"]),
        "GeSSL": ("tab:blue", ["gessl"])},
    "on Barlow Twins": {
        "Barlow Twins": ("black", ["barlow", "barlow_equal_passes"]),
        "TC2": ("tab:red", ["barlow_tc2"]),
        "SparseHead": ("tab:green", ["rownorm"])},
    "on MAE": {
        "MAE, one mask": ("black", ["mae", "mae_equal_passes"]),
        "MAE, two masks": ("gray", ["mae_2masks"]),
        "TC2": ("tab:red", ["mae_tc2"])},
}

# One seed, 50,000 images: {folder of logs/: title}.
SINGLE = {"cifar10_cpu": "SimCLR and TC2", "cifar10_cpu_gessl": "BYOL and GeSSL",
          "cifar10_cpu_sparsehead": "Barlow Twins and SparseHead", "cifar10_cpu_mae": "MAE and TC2"}

# Every protocol on one run, logs/cifar10_cpu_protocols: a baseline stands before its method.
PROTOCOL_RUNS = ["simclr_2views", "tc2", "byol", "gessl", "barlow", "rownorm", "mae", "mae_tc2"]
DATA, DOMAINS = ".data/cifar10", "runs/domains"
PROTOCOLS = [
    (DATA, "linear", "top1"), (DATA, "linear (sweep)", "top1"),
    (DATA, "linear (embedding)", "top1"),
    (DATA, "knn", "k1_euclidean k5_euclidean k20_euclidean k200_euclidean k5_cosine k200_cosine"),
    (DATA, "knn (embedding)", "k5_euclidean"),
    (DATA, "fewshot", "5way_1shot_centroid 5way_1shot_logistic 5way_5shot_centroid "
                      "5way_5shot_logistic"),
    (DATA, "sigma", "representation representation_accuracy embedding embedding_accuracy"),
    (DATA, "spectrum", "representation_rank embedding_rank"),
    (DATA, "conflict", "cosine negative_share"), (DATA, "pca", "axis1_share"),
    (DOMAINS, "linear", "top1_photo top1_gray top1_edges top1_inverted top1_average top1_worst"),
    (DOMAINS, "knn", "k5_euclidean_average"),
    (f"{DATA} -> {DOMAINS}/inverted", "linear", "top1"),
]

ACCURACIES = [("linear", "top1"), ("knn", "k5_euclidean"), ("knn", "k200_cosine")]
ACCURACY_HEAD = ["linear_adam", "5-NN", "cosine 200-NN"]
BOTH_PROBES = [("linear", "top1"), ("linear_adam", "top1"), ("knn", "k5_euclidean"),
               ("knn", "k200_cosine")]
BOTH_HEAD = ["linear", *ACCURACY_HEAD]

# By number of seeds: 97.5 % quantile of Student's t, and the true difference, in standard errors,
# that a paired test at 5 % finds four times in five.
T = {2: 12.706, 3: 4.3027, 4: 3.1824, 5: 2.7764}
FOUND = {3: 5.653, 4: 4.256, 5: 3.761}


# ---- reading -------------------------------------------------------------------------------------
class Run(typing.NamedTuple):
    """What a run and its evaluation have left."""
    settings: dict
    log: list           # lines of training, each with its step, terms and images per second
    last: dict          # the line of the last evaluation
    conflict: list      # cosine between the tasks' gradients at each evaluation
    found: dict         # {(data, protocol, metric): value} of eval.json


def read_values(folder):
    """{(data, protocol, metric): value} of a folder's eval.json."""
    with open(f"{folder}/eval.json") as file:
        results = json.load(file)
    if isinstance(results, dict):                   # the first edition's
        results = results["results"]
    return {(r.get("data", DATA), r["protocol"], r["metric"]): r["value"] for r in results}


@functools.cache
def read(folder):
    """The Run of a folder that holds log.jsonl and eval.json."""
    with open(f"{folder}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    training = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "rank_h" in line]
    conflict = [(e["step"], e) for e in evaluations if "conflict_cos_raw" in e]
    return Run(lines[0]["settings"], training, evaluations[-1], conflict, read_values(folder))


def seeds(name, where="cifar10_seeds"):
    """{seed: Run} of a row over seeds, in a folder of logs/."""
    runs = {}
    for folder in sorted(glob.glob(f"{LOGS}/{where}/seed*/{name}")):
        seed = os.path.basename(os.path.dirname(folder)).removeprefix("seed")
        runs[int(seed)] = read(folder)
    return runs


# ---- one number of one run -----------------------------------------------------------------------
def script(run):
    return run.settings.get("script", "simclr_tc2")


def images(run):
    """Thousands of images seen, repetitions counted."""
    per_step = run.settings["batch_size"]
    if script(run) == "byol_gessl" and not run.settings["baseline"]:
        per_step *= run.settings["tasks"]
    per_step = run.settings.get("images_per_step", per_step)
    return run.log[-1]["step"] * per_step / 1e3


def gessl_cost(s):
    """Passes per image, two views of 1 each: K + lambda inner steps; a third for BYOL's target, a
    third for the self-motivated one, 1 for the outer loss and its gradient at theta_K; K more for
    finite differences. Lookahead has no outer loss. BYOL: 1, and a third for its target."""
    inner = s["inner_steps"] + s["target_steps"]
    if s["baseline"]:
        return 2 * (1 + 1 / 3)
    if s["lookahead"]:
        return 2 * (inner + 2 / 3)
    if s["hypergrad"] in ("exact", "neumann", "cg"):
        return math.nan             # second derivatives are no passes: hypergradients.png
    differences = s["inner_steps"] if s["hypergrad"] == "fd" else 0
    return 2 * (inner + 5 / 3 + differences)


def mae_cost(s):
    """Passes per image. TC2, each of its masks: a third for the tokens without gradient, a half for
    Eq. 6 (the support half of the masks), a half for Eq. 7 (the others), and a half for stage 1,
    through the decoder alone; without calibration the first edition left stage 1 out."""
    if s["baseline"]:
        return s["masks"]
    cost = 1 / 3 + 1 / 2
    if s["inner_lr"] > 0:
        cost += 1 / 2
    if s.get("calibrate") != "none":
        cost += 1 / 2
    return s["masks"] * cost


def combined_tc2_cost(s):
    """Four views without gradient, two support and two query views; BYOL's target, four."""
    target = 4 / 3 if s["script"].startswith("byol") else 0
    return target + 4 / 3 + 2 + 2


def combined_gessl_cost(s):
    """As `gessl_cost`, without target networks, with finite differences."""
    return 2 * (2 * s["inner_steps"] + s["target_steps"] + 4 / 3)


def two_views(s):
    return 2


def conflict_cost(s):
    """Two views: one forward pass, a backward pass for each task."""
    return 2 * (1 / 3 + 2 / 3 * s["tasks"])


COMBINED = {"byol_tc2": combined_tc2_cost, "barlow_tc2": combined_tc2_cost,
            "simclr_gessl": combined_gessl_cost, "simclr_sparsehead": two_views,
            "simclr_pcgrad": conflict_cost, "simclr_gradvac": conflict_cost,
            "simclr_graddrop": conflict_cost}


def passes(run):
    """Thousands of forward and backward passes of one view or mask; a forward pass alone counts a
    third."""
    s = run.settings
    if script(run) in COMBINED:
        return images(run) * COMBINED[script(run)](s)
    if script(run) == "byol_gessl":
        return images(run) * gessl_cost(s)
    if script(run) == "mae_tc2":
        return images(run) * mae_cost(s)
    if script(run) == "barlow_sparsehead":
        return images(run) * 2
    if s["baseline"]:
        return images(run) * s["views"]

    # TC2: four views without gradient, two support views, four at theta_k.
    support = 2 if s["inner_lr"] > 0 else 0
    return images(run) * (4 / 3 + support + 4)


def speed(run):
    """Images per second of training."""
    return statistics.median(line["images_per_s"] for line in run.log)


def judged_on(run):
    """The data of the probe: the run's own, but for the rows of unseen classes."""
    return run.settings["data"].replace("/seen", "/unseen")


def accuracies(run):
    """Of the linear probe and both k-NN."""
    return [run.found[judged_on(run), *key] for key in ACCURACIES]


def both_probes(run):
    """Of both linear probes and both k-NN."""
    return [run.found[judged_on(run), *key] for key in BOTH_PROBES]


def own_accuracies(run):
    """The same on the classes that the run was trained on."""
    return [run.found[run.settings["data"], *key] for key in ACCURACIES]


def transfer(run):
    """Of a row seen_*: linear on its own classes; linear, 5-NN, few-shot on the five others."""
    own, others = run.settings["data"], judged_on(run)
    few = [run.found[others, "fewshot", f"5way_{k}shot_logistic"] for k in (1, 5)]
    return [run.found[own, "linear", "top1"], run.found[others, "linear", "top1"],
            run.found[others, "knn", "k5_euclidean"], *few]


def cosines(run):
    """Cosine between the tasks' gradients, on z, at each evaluation. [TC2 Fig. 1b/c]"""
    return [line["conflict_cos_raw"] for _, line in run.conflict]


def end(key, factor=1):
    """A function: what a run logged under `key` at the end of training."""
    def value(run):
        return factor * run.log[-1][key]
    return value


def last(key):
    """A function: what a run's last evaluation logged under `key`."""
    def value(run):
        return run.last[key]
    return value


def spectrum(key):
    """A function: a number of the protocol `spectrum`."""
    def value(run):
        return run.found[run.settings["data"], "spectrum", key]
    return value


# The further columns of a table: head, function of a run, digits.
USUAL = [("std_z", end("std_z"), 2), ("rank h", last("rank_h"), 0)]
SPARSE = [("live %", end("live_columns", 100), 1), ("zero %", end("zero_columns", 100), 1),
          ("L2,1", end("l21_normalized"), 3), ("norm of W", end("frobenius"), 2),
          ("rank r", spectrum("representation_rank"), 1),
          ("rank z", spectrum("embedding_rank"), 1)]
MASKED = [("error", last("loss_reconstruction"), 3), ("rank h", last("rank_h"), 0)]
FURTHER = {"Barlow Twins and SparseHead": SPARSE, "MAE and TC2": MASKED}


# ---- cells and lines -----------------------------------------------------------------------------
def line(cells):
    return "| " + " | ".join(cells) + " |"


def table(head, rows):
    """The lines of a table in Markdown."""
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def spread(column, digits=1):
    """mean ± standard deviation"""
    text = f"{statistics.mean(column):.{digits}f}"
    if len(column) == 1:
        return text
    return f"{text} ± {statistics.stdev(column):.{digits}f}"


def standard_error(column):
    return statistics.stdev(column) / len(column) ** 0.5


def interval(column, digits=1):
    """mean ± half of its 95 % interval; of a single seed, none"""
    text = f"{statistics.mean(column):+.{digits}f}"
    if len(column) == 1:
        return text
    return f"{text} ± {T[len(column)] * standard_error(column):.{digits}f}"


def columns(rows):
    """Rows of equal length as columns."""
    return list(zip(*rows))


def paired(a, b, measure, where="cifar10_seeds"):
    """{seed: the differences a - b of the numbers `measure(run)`}."""
    first, second = seeds(a, where), seeds(b, where)
    found = {}
    for seed in sorted(set(first) & set(second)):
        pairs = zip(measure(first[seed]), measure(second[seed]))
        found[seed] = [x - y for x, y in pairs]
    return found


def differences(a, b, measure, where="cifar10_seeds"):
    """Paired differences a - b of the numbers `measure(run)`: one column per number."""
    return columns(paired(a, b, measure, where).values())


def difference_row(a, b, measure, digits=1):
    """The cells of a line of paired differences."""
    found = differences(a, b, measure)
    cells = [interval(column, digits) for column in found]
    return [f"`{a}` - `{b}`", str(len(found[0])), *cells]


# ---- tables --------------------------------------------------------------------------------------
def seed_table(title):
    """Means over the seeds, with the standard deviation of the accuracies.

    The minutes of training are those of the seed that was disturbed least."""
    further = FURTHER.get(title, USUAL)
    rows = []
    for name in SEEDS[title]:
        runs = list(seeds(name).values())
        cost = passes(runs[0])
        minutes = 1e3 * images(runs[0]) / max(map(speed, runs)) / 60
        cells = [f"`{name}`", str(len(runs)), f"{images(runs[0]):.0f}"]
        cells += ["" if math.isnan(cost) else f"{cost:.0f}", f"{minutes:.1f}"]
        cells += [spread(column) for column in columns(map(accuracies, runs))]
        cells += [f"{statistics.mean(map(f, runs)):.{digits}f}" for _, f, digits in further]
        rows.append(cells)
    head = ["row", "seeds", "images (k)", "passes (k)", "minutes", *ACCURACY_HEAD]
    return table(head + [name for name, *_ in further], rows)


def difference_table():
    rows = [difference_row(a, b, accuracies) for a, b in PAIRS]
    return table(["difference", "seeds", *ACCURACY_HEAD], rows)


def pooled_variance(columns):
    """Of columns of numbers about means of their own: each counts by its degrees of freedom."""
    squares = sum((len(column) - 1) * statistics.variance(column) for column in columns)
    return squares / sum(len(column) - 1 for column in columns)


def visible(method, measure):
    """The smallest true gain in one of ACCURACIES that a paired test at 5 % finds four times in
    five.

    The spread is pooled over all differences of the method's table, since three seeds know their
    own only roughly; rows that have collapsed are left out."""
    names = next(names for names in SEEDS.values() if method in names)
    columns = []
    for a, b in PAIRS:
        if a in names and a not in COLLAPSED:
            column = differences(a, b, accuracies)[measure]
            if len(column) > 1:
                columns.append(column)
    n = len(seeds(method))
    return FOUND[n] * (pooled_variance(columns) / n) ** 0.5


def claim_table():
    """The papers' gains beside ours, and the smallest gain that this design can see.

    positive: of all paired differences, seeds times accuracies, those above zero."""
    rows = []
    for a, b, source, *gains in CLAIMS:
        found = differences(a, b, accuracies)
        cells = [source, f"`{a}` - `{b}`"]
        for measure, gain in enumerate(gains):
            claimed = "" if gain is None else f"{gain:+.2f}"
            cells += [claimed, interval(found[measure]), f"{visible(a, measure):.1f}"]
        values = [value for column in found for value in column]
        positive = sum(value > 0 for value in values)
        rows.append([*cells, f"{positive} of {len(values)}"])
    head = ["claim", "difference"]
    for name in ("linear", "5-NN"):
        head += [f"{name}, paper", f"{name}, here", f"{name}, visible"]
    return table(head + ["positive"], rows)


def conflict_table():
    """Cosine between the tasks' gradients at the end of each epoch, one batch each."""
    rows = []
    for name in CONFLICT:
        runs = list(seeds(name).values())
        cells = [spread(column, 2) for column in columns(map(cosines, runs))]
        rows.append([f"`{name}`", str(len(runs)), *cells])
    rows += [difference_row("tc2", other, cosines, 2) for other in ("simclr_4views", "simclr_t")]
    return table(["row", "seeds", *(f"epoch {epoch}" for epoch in (1, 2, 3, 4))], rows)


def seen_table():
    """The rows of unseen classes, judged on the classes they were trained on."""
    names = SEEDS["Unseen classes"]
    rows = []
    for name in names:
        runs = list(seeds(name).values())
        cells = [spread(column) for column in columns(map(own_accuracies, runs))]
        rows.append([f"`{name}`", str(len(runs)), *cells])
    rows += [difference_row(a, b, own_accuracies) for a, b in PAIRS if a in names]
    return table(["row", "seeds", *ACCURACY_HEAD], rows)


def protocol_cell(runs, key):
    """mean ± standard deviation over the runs that have a number, on their own data."""
    found = []
    for run in runs:
        value = run.found.get((run.settings["data"], *key))
        if value is not None:
            found.append(value)
    if not found:
        return ""
    return spread(found, 1 if max(found) > 10 else 2)


# ---- lengths of training -------------------------------------------------------------------------
def at_length(length):
    return f"cifar10_lengths/length{length}"


def length_table(title):
    """Each row of a table at every length there is."""
    rows = []
    for name in LENGTH_ROWS[title]:
        for length in LENGTHS:
            runs = list(seeds(name, at_length(length)).values())
            if not runs:
                continue
            cost = passes(runs[0])
            cells = [f"`{name}`", str(length), str(len(runs)), f"{images(runs[0]):.0f}",
                     "" if math.isnan(cost) else f"{cost:.0f}"]
            cells += [spread(column) for column in columns(map(both_probes, runs))]
            cells.append(f"{statistics.mean(run.last['rank_h'] for run in runs):.0f}")
            rows.append(cells)
    head = ["row", "length", "seeds", "images (k)", "passes (k)", *BOTH_HEAD, "rank h"]
    return table(head, rows)


def student_p(column):
    """Two-sided p-value of the mean of `column` against 0, by Student's t.

    The distribution is a finite sum for whole degrees of freedom, one for even numbers of them and
    one for odd ones. [Abramowitz and Stegun, 26.7.3 and 26.7.4]"""
    freedom = len(column) - 1
    t = abs(statistics.mean(column)) / standard_error(column)
    angle = math.atan(t / freedom ** 0.5)
    odd = freedom % 2 == 1

    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(3 if odd else 2, freedom, 2):
        term *= math.cos(angle) ** 2 * (power - 1) / power
        total += term
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return 1 - inside


def holm(p_values):
    """p-values corrected for their number. [Holm 1979]"""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def length_differences(pairs=LENGTH_PAIRS):
    """[(a, b, length, columns of paired differences)] of the pairs with two common seeds."""
    found = []
    for a, b in pairs:
        for length in LENGTHS:
            rows = differences(a, b, both_probes, at_length(length))
            if rows and len(rows[0]) > 1:
                found.append((a, b, length, rows))
    return found


def length_difference_table(pairs=LENGTH_PAIRS):
    """Paired differences; the p-values, of `linear`, are corrected for the lines of this table."""
    found = length_differences(pairs)
    p_values = holm([student_p(rows[0]) for *_, rows in found])
    lines = []
    for (a, b, length, rows), p in zip(found, p_values):
        cells = [f"`{a}` - `{b}`", str(length), str(len(rows[0]))]
        cells += [interval(column) for column in rows]
        lines.append([*cells, p_cell(p)])
    return table(["difference", "length", "seeds", *BOTH_HEAD, "p, Holm"], lines)


def transfer_table():
    """Rows trained on five classes, on these and on five others, and their differences."""
    names = LENGTH_ROWS["Unseen classes"]
    rows = []
    for length in LENGTHS:
        where = at_length(length)
        for name in names:
            runs = list(seeds(name, where).values())
            if runs:
                cells = [spread(column) for column in columns(map(transfer, runs))]
                rows.append([f"`{name}`", str(length), str(len(runs)), *cells])
        for a, b in LENGTH_PAIRS:
            found = differences(a, b, transfer, where) if a in names else []
            if found:
                cells = [str(length), str(len(found[0])), *map(interval, found)]
                rows.append([f"`{a}` - `{b}`", *cells])
    head = ["row", "length", "seeds", "linear, seen", "linear, unseen", "5-NN, unseen"]
    return table([*head, "1-shot, unseen", "5-shot, unseen"], rows)


def length_visible(base, length, n):
    """The smallest true difference in `linear` that n paired seeds find four times in five.

    The spread is pooled over this length's differences from the same base method."""
    method = base.split("_")[0]
    columns = [rows[0] for _, b, other, rows in length_differences()
               if b.startswith(method) and other == length]
    return FOUND[n] * (pooled_variance(columns) / n) ** 0.5


def p_cell(p):
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def length_claims():
    """[(claim, length, columns at equal images, at equal passes)], from three seeds on."""
    found = []
    for claim in LENGTH_CLAIMS:
        method, equal_images, equal_passes = claim[:3]
        for length in LENGTHS:
            where = at_length(length)
            at_images = differences(method, equal_images, both_probes, where)
            at_passes = differences(method, equal_passes, both_probes, where)
            if at_images and at_passes and min(len(at_images[0]), len(at_passes[0])) > 2:
                found.append((claim, length, at_images, at_passes))
    return found


def length_claim_table():
    """The papers' gains beside ours at equal images and at equal passes.

    The p-values, of `linear`, are corrected for this table's comparisons, each counted once."""
    found = length_claims()
    compared = {}
    for (method, equal_images, equal_passes, *_), length, at_images, at_passes in found:
        compared[method, equal_images, length] = at_images[0]
        compared[method, equal_passes, length] = at_passes[0]
    corrected = holm([student_p(column) for column in compared.values()])
    p_of = dict(zip(compared, corrected))

    lines = []
    for claim, length, at_images, at_passes in found:
        method, equal_images, equal_passes, source, linear, knn = claim
        n = min(len(at_images[0]), len(at_passes[0]))
        visible = length_visible(equal_images, length, n)
        claimed = "" if knn is None else f"{knn:+.2f}"
        lines.append([
            source, f"`{method}` - `{equal_images}`", str(length), str(n),
            f"{linear:+.2f}",
            interval(at_images[0]), p_cell(p_of[method, equal_images, length]),
            interval(at_passes[0]), p_cell(p_of[method, equal_passes, length]), f"{visible:.1f}",
            claimed, interval(at_images[2]), interval(at_passes[2])])
    head = ["claim", "difference", "length", "seeds", "linear, paper", "linear, equal images", "p",
            "linear, equal passes", "p", "visible"]
    return table(head + ["5-NN, paper", "5-NN, equal images", "5-NN, equal passes"], lines)


def length_change_table():
    """How the paired differences change from one length to another, at the seeds of both.

    The p-values, of `linear`, are corrected for the lines of this table."""
    lines = []
    p_values = []
    for a, b in LENGTH_PAIRS:
        for short, long in ((1, 4), (4, 16)):
            before = paired(a, b, both_probes, at_length(short))
            after = paired(a, b, both_probes, at_length(long))
            common = sorted(set(before) & set(after))
            rows = []
            for seed in common:
                rows.append([y - x for x, y in zip(before[seed], after[seed])])
            if len(rows) > 1:
                changes = columns(rows)
                p_values.append(student_p(changes[0]))
                cells = [f"{short} to {long}", str(len(rows)), *map(interval, changes)]
                lines.append([f"`{a}` - `{b}`", *cells])
    for line, p in zip(lines, holm(p_values)):
        line.append(p_cell(p))
    return table(["difference", "length", "seeds", *BOTH_HEAD, "p, Holm"], lines)


# ---- further tables ------------------------------------------------------------------------------
def chosen_table(head, keys):
    """A line for every row over seeds that has the first of `keys`, pairs (protocol, metric)."""
    rows = []
    for name in ALL_ROWS:
        runs = list(seeds(name).values())
        cells = [protocol_cell(runs, key) for key in keys]
        if cells[0]:
            rows.append([f"`{name}`", str(len(runs)), *cells])
    return table(["row", "seeds", *head], rows)


def fine_tuning_table():
    keys = [("finetune", metric) for metric in ("1%_top1", "10%_top1", "10%_train_top1")]
    return chosen_table(["1 %", "10 %", "10 %, training", "linear_adam, 100 %"],
                        [*keys, ("linear", "top1")])


def adaptation_table():
    keys = [("adaptation", m) for m in ("loss_before", "loss_after", "before", "after")]
    keys += [("distance-ratio", m) for m in ("representation", "embedding", "embedding_std")]
    return chosen_table(["loss before", "loss after", "accuracy before", "accuracy after", "M(r)",
                         "M(z)", "std_z"], keys)


def single_table(folder):
    """The rows of one seed on 50,000 images."""
    further = FURTHER.get(SINGLE[folder], USUAL)
    with_passes = further is not SPARSE             # there, every row costs 2 passes per image
    rows = []
    for path in sorted(glob.glob(f"{LOGS}/{folder}/*/")):
        run = read(path.rstrip("/"))
        cells = [f"`{os.path.basename(path.rstrip('/'))}`", f"{images(run):.0f}"]
        if with_passes:
            cells.append(f"{passes(run):.0f}")
        cells += [f"{value:.2f}" for value in accuracies(run)]
        cells += [f"{f(run):.{digits}f}" for _, f, digits in further]
        rows.append(cells)
    head = ["row", "images (k)", *(["passes (k)"] if with_passes else []), *ACCURACY_HEAD]
    return table(head + [name for name, *_ in further], rows)


def as_text(value):
    """Two digits after the point; of numbers below a hundredth, the first two that are not 0."""
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.2f}"


def all_protocols_table():
    """Every protocol on one run of each script; ± is the evaluation's own 95 % interval."""
    found = [read_values(f"{LOGS}/cifar10_cpu_protocols/{run}") for run in PROTOCOL_RUNS]
    rows = []
    for data, protocol, metrics in PROTOCOLS:
        for metric in metrics.split():
            cells = [f"`{data}` `{protocol}` `{metric}`"]
            for values in found:
                value = values.get((data, protocol, metric))
                half = values.get((data, protocol, f"{metric}_pm"))
                text = "" if value is None else as_text(value)
                cells.append(text if half is None else f"{text} ± {half:.2f}")
            rows.append(cells)
    return table(["data, protocol, metric", *(f"`{run}`" for run in PROTOCOL_RUNS)], rows)


def all_tables():
    """[(title, lines)], in the order of the page."""
    tables = [("The claims, second round", length_claim_table()),
              ("Change with length", length_change_table()),
              ("Differences over lengths", length_difference_table()),
              ("Differences of settings", length_difference_table(SETTING_PAIRS))]
    for title in LENGTH_ROWS:
        lines = length_table(title)
        if len(lines) > 2:                          # some rows have run
            tables.append((f"{title}, over lengths", lines))
    tables.append(("Transfer to unseen classes", transfer_table()))
    tables += [("What the papers claim", claim_table()), ("Differences", difference_table())]
    tables += [(title, seed_table(title)) for title in SEEDS]
    tables += [("Seen classes", seen_table()), ("Task conflict", conflict_table()),
               ("Fine-tuning", fine_tuning_table()),
               ("Adaptation and distances", adaptation_table())]
    tables += [(f"{title}, one seed", single_table(folder)) for folder, title in SINGLE.items()]
    return tables + [("Every protocol, one seed", all_protocols_table())]


# ---- figures -------------------------------------------------------------------------------------
def new_figure(width, height, rows=1, columns=1):
    """A figure and the list of its panels."""
    from matplotlib.figure import Figure
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def curve_points(rows):
    """[(passes, lowest, mean, highest)] in `linear` of these rows at all lengths, by passes."""
    points = []
    for name in rows:
        for length in LENGTHS:
            runs = list(seeds(name, at_length(length)).values())
            if runs:
                values = [both_probes(run)[0] for run in runs]
                mean = statistics.mean(values)
                points.append((passes(runs[0]), min(values), mean, max(values)))
    return sorted(points)


def lengths_figure(path):
    """Accuracy against compute, at every length: mean, and the range over the seeds."""
    figure, axes = new_figure(13, 8, 2, 2)
    for axis, (title, curves) in zip(axes, LENGTH_CURVES.items()):
        for label, (colour, rows) in curves.items():
            points = curve_points(rows)
            if points:
                cost, low, mean, high = columns(points)
                axis.plot(cost, mean, "o-", color=colour, label=label)
                axis.vlines(cost, low, high, color=colour)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel="thousand forward-backward passes", ylabel="linear top-1 (%)")
        if axis.lines:
            axis.legend(fontsize="small", loc="upper left")
    figure.suptitle("each point a training with its own schedule: mean and range over the seeds, "
                    "no range: one seed")
    figure.savefig(path, dpi=110)


def mean_linear(runs):
    return statistics.mean(accuracies(run)[0] for run in runs)


def compute_panel(axis, title):
    """Linear accuracy of a table's rows, the cheapest on top, without the variants of settings."""
    variant = "lambda|alpha|inner_lr|factors|[28]tasks|mix|nce|literal|exact|neumann|cg"
    shown = {}
    for name in SEEDS[title]:
        if not re.search(variant, name):
            shown[name] = list(seeds(name).values())

    labels = []
    by_cost = sorted(shown, key=lambda name: (passes(shown[name][0]), name))
    for y, name in enumerate(by_cost):
        runs = shown[name]
        colour, marker, face = "tab:red", "s", "tab:red"
        if runs[0].settings["baseline"]:
            colour, marker, face = "black", "o", "white"
        values = [accuracies(run)[0] for run in runs]
        axis.plot([min(values), max(values)], [y, y], color=colour, linewidth=1)
        axis.plot(mean_linear(runs), y, marker, color=colour, markerfacecolor=face)
        labels.append(f"{name}  {passes(runs[0]):.0f}k")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="linear_adam top-1 (%)")


def compute_figure(path):
    """Accuracy against compute: mean and range over the seeds."""
    figure, axes = new_figure(13, 7, 2, 2)
    titles = [title for title in SEEDS if title != "Unseen classes"]
    for axis, title in zip(axes, titles):
        compute_panel(axis, title)
    figure.suptitle("mean and range over the seeds; circles: baseline; behind a name: thousand "
                    "forward-backward passes")
    figure.savefig(path, dpi=110)


def conflict_figure(path):
    """Cosine between the tasks' gradients over training: mean, and each seed's batch.

    [TC2 Fig. 1b/c]"""
    figure, (axis,) = new_figure(8, 5)
    styles = [("gray", ":"), ("black", "-"), ("tab:green", "--"), ("tab:blue", "-."),
              ("tab:red", "-")]
    for i, (name, (colour, style)) in enumerate(zip(CONFLICT, styles)):
        runs = list(seeds(name).values())
        steps = [step for step, _ in runs[0].conflict]
        curves = [cosines(run) for run in runs]
        means = [statistics.mean(column) for column in columns(curves)]
        axis.plot(steps, means, style, color=colour, label=f"{name} ({len(runs)} seeds)")
        apart = [step + 4 * (i - 2) for step in steps]
        for curve in curves:
            axis.plot(apart, curve, ".", color=colour, alpha=0.5)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="mean cosine between the tasks' gradients",
             title="task conflict: lines are means, each dot is one batch of one seed")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def hypergradient_figure(path):
    """Accuracy of the derivatives of Eq. 4 against measured time per image. [GeSSL Fig. 4]"""
    labels = {"lookahead": "lookahead", "gessl_first_order": "first order",
              "gessl": "finite difference", "gessl_exact": "exact",
              "gessl_cg": "conjugate gradients (1 seed)", "gessl_neumann": "Neumann (1 seed)"}
    figure, (axis,) = new_figure(8, 5)
    for name, label in labels.items():
        runs = list(seeds(name).values())
        time = statistics.mean(1e3 / speed(run) for run in runs)
        values = [accuracies(run)[0] for run in runs]
        axis.plot([time, time], [min(values), max(values)], color="gray", linewidth=1)
        axis.plot(time, mean_linear(runs), "s", label=label)
    axis.set(xlabel="milliseconds per image, one CPU core", ylabel="linear_adam top-1 (%)",
             title="hypergradients: cost against accuracy, mean and range over the seeds")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    for title, lines in all_tables():
        print(f"\n### {title}\n")
        print("\n".join(lines))
    lengths_figure(f"{HERE}/lengths.png")
    compute_figure(f"{HERE}/compute.png")
    conflict_figure(f"{HERE}/conflict.png")
    hypergradient_figure(f"{HERE}/hypergradients.png")


if __name__ == "__main__":
    main()
