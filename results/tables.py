"""Every table of results/README.md and its figures, from the logs beside this file.

  python results/tables.py         prints the tables and draws lengths.png

A row of the tables is a run, or several runs that differ in their seed. All are of this edition but
those of fine-tuning, logs/first_edition, whose metric `linear top1` is `linear_adam` now.
"""
import functools
import glob
import json
import math
import os
import statistics
import typing

HERE = os.path.dirname(os.path.abspath(__file__))
LOGS = os.path.join(HERE, "logs")

# ---- what stands in which table ------------------------------------------------------------------
# The rows, in logs/cifar10_lengths/length*/seed*/ROW.
LENGTHS = (1, 4, 16)
ROWS = {
    "SimCLR and TC2": [
        "simclr_2views", "simclr_2views_equal_passes", "simclr_4views",
        "simclr_4views_equal_passes", "simclr_t", "simclr_t_2", "tc2", "tc2_support",
        "tc2_features", "tc2_without_skip", "tc2_no_calibration", "tc2_inner0", "tc2_all_factors",
        "tc2_lambda_s_0.01", "tc2_lambda_s_1", "tc2_2tasks", "tc2_8tasks", "tc2_nce",
        "tc2_no_decay", "tc2_literal", "simclr_4views_512", "tc2_512"],
    "BYOL and GeSSL": [
        "byol", "byol_equal_passes", "byol_large_batch", "byol_large_batch_equal_passes", "gessl",
        "gessl_ssl_4", "gessl_kl_only", "lookahead", "gessl_lambda_1", "gessl_lambda_5",
        "gessl_lambda_10", "gessl_alpha_0.005", "gessl_first_order", "gessl_exact",
        "gessl_neumann", "gessl_cg"],
    "Barlow Twins and SparseHead": [
        "barlow", "plain", "plain_strong", "rownorm", "inputs", "prox", "prox_strong"],
    "MAE and TC2": [
        "mae", "mae_2masks", "mae_equal_passes", "mae_tc2", "mae_tc2_no_calibration",
        "mae_tc2_inner0", "mae_tc2_inner_lr_0.1", "mae_tc2_inner_lr_1", "mae_tc2_lambda_s_0.001",
        "mae_tc2_all_factors"],
    "Other bases": [
        "byol_large_batch_4epochs", "byol_tc2", "barlow_equal_passes", "barlow_tc2",
        "simclr_sparsehead", "simclr_sparsehead_strong", "simclr_gessl",
        "simclr_2views_equal_gessl"],
    "Unseen classes": [
        "seen_simclr_4views", "seen_simclr_4views_equal_passes", "seen_simclr_t", "seen_tc2"],
}

# The differences: first minus second, at the same seeds.
PAIRS = [
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
    ("tc2_no_decay", "simclr_4views_equal_passes"), ("tc2_no_decay", "tc2"),
    ("tc2_inner0", "tc2"), ("tc2_all_factors", "tc2"), ("tc2_lambda_s_0.01", "tc2"),
    ("tc2_lambda_s_1", "tc2"), ("tc2_2tasks", "tc2"), ("tc2_8tasks", "tc2"), ("tc2_nce", "tc2"),
    ("gessl", "byol_equal_passes"), ("gessl_lambda_1", "gessl"), ("gessl_lambda_5", "gessl"),
    ("gessl_lambda_10", "gessl"), ("gessl_alpha_0.005", "gessl"), ("gessl_first_order", "gessl"),
    ("gessl_exact", "gessl"), ("gessl_neumann", "gessl"), ("gessl_cg", "gessl"),
    ("plain_strong", "barlow"), ("prox", "barlow"), ("prox_strong", "barlow"),
    ("mae_tc2_no_calibration", "mae_tc2"), ("mae_tc2_inner_lr_0.1", "mae_tc2"),
    ("mae_tc2_inner_lr_1", "mae_tc2"), ("mae_tc2_lambda_s_0.001", "mae_tc2"),
    ("mae_tc2_all_factors", "mae_tc2")]

# The papers' gains: method, base at equal images, at equal passes, source, linear, 5-NN. BYOL has
# two bases at equal images: batches of a task's size, and of a step's, which has as many steps.
CLAIMS = [
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
CURVES = {
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

# Rows whose last batch is judged in groups: by the cosines of their gradients, and by one step.
CONFLICT = ["simclr_2views", "simclr_4views", "simclr_t", "tc2_no_calibration", "tc2"]
ADAPTATION = [("tc2", "simclr_4views"), ("tc2", "simclr_4views_equal_passes"),
              ("gessl", "byol"), ("gessl", "byol_equal_passes")]

# Fine-tuned in the first edition, logs/first_edition/seed*/ROW: a base at equal passes, its method.
FINE_TUNED = ["simclr_4views_equal_passes", "tc2", "byol_large_batch_equal_passes", "gessl",
              "barlow", "rownorm", "mae_equal_passes", "mae_tc2"]

ACCURACIES = [("linear", "top1"), ("linear_adam", "top1"), ("knn", "k5_euclidean"),
              ("knn", "k200_cosine")]
ACCURACY_HEAD = ["linear", "linear_adam", "5-NN", "cosine 200-NN"]

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
    found: dict         # {(data, protocol, metric): value} of eval.json


def read_values(folder):
    """{(data, protocol, metric): value} of a folder's eval.json."""
    with open(f"{folder}/eval.json") as file:
        results = json.load(file)
    if isinstance(results, dict):                   # the first edition's
        results = results["results"]
    return {(r["data"], r["protocol"], r["metric"]): r["value"] for r in results}


@functools.cache
def read(folder):
    """The Run of a folder that holds log.jsonl and eval.json."""
    with open(f"{folder}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    training = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "rank_h" in line]
    return Run(lines[0]["settings"], training, evaluations[-1], read_values(folder))


def seeds(name, where):
    """{seed: Run} of a row, in a folder of logs/."""
    runs = {}
    for folder in sorted(glob.glob(f"{LOGS}/{where}/seed*/{name}")):
        seed = os.path.basename(os.path.dirname(folder)).removeprefix("seed")
        runs[int(seed)] = read(folder)
    return runs


# ---- one number of one run -----------------------------------------------------------------------
def images(run):
    """Thousands of images seen, repetitions counted."""
    return run.log[-1]["step"] * run.settings["images_per_step"] / 1e3


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
        return math.nan             # second derivatives are no passes
    differences = s["inner_steps"] if s["hypergrad"] == "fd" else 0
    return 2 * (inner + 5 / 3 + differences)


def mae_cost(s):
    """Passes per image. TC2, each of its masks: a third for the tokens without gradient, a half for
    Eq. 6 (the support half of the masks), a half for Eq. 7 (the others), and a half for stage 1,
    through the decoder alone."""
    if s["baseline"]:
        return s["masks"]
    cost = 1 / 3 + 1 / 2 + 1 / 2
    if s["inner_lr"] > 0:
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
    if s["script"] in COMBINED:
        return images(run) * COMBINED[s["script"]](s)
    if s["script"] == "byol_gessl":
        return images(run) * gessl_cost(s)
    if s["script"] == "mae_tc2":
        return images(run) * mae_cost(s)
    if s["script"] == "barlow_sparsehead":
        return images(run) * 2
    if s["baseline"]:
        return images(run) * s["views"]

    # TC2: four views without gradient, two support views, four at theta_k.
    support = 2 if s["inner_lr"] > 0 else 0
    return images(run) * (4 / 3 + support + 4)


def judged_on(run):
    """The data of the probe: the run's own, but for the rows of unseen classes."""
    return run.settings["data"].replace("/seen", "/unseen")


def accuracies(run):
    """Of both linear probes and both k-NN."""
    return [run.found[judged_on(run), *key] for key in ACCURACIES]


def transfer(run):
    """Of a row seen_*: linear on its own classes; linear, 5-NN, few-shot on the five others."""
    own, others = run.settings["data"], judged_on(run)
    few = [run.found[others, "fewshot", f"5way_{k}shot_logistic"] for k in (1, 5)]
    return [run.found[own, "linear", "top1"], run.found[others, "linear", "top1"],
            run.found[others, "knn", "k5_euclidean"], *few]


def adaptation(run):
    """Accuracy among a group's images before and after one step of its own loss, and the gain.

    [GeSSL Table 15]"""
    before, after = run.last["adapted_before"], run.last["adapted_after"]
    return [before, after, after - before]


def conflict(run):
    """Mean cosine between the gradients of the last batch's groups. [TC2 Fig. 1b/c]"""
    return [run.last["conflict_cos_raw"]]


def end(key, factor=1):
    """A function: what a run logged under `key` at the end of training, or nothing."""
    def value(run):
        return factor * run.log[-1].get(key, math.nan)
    return value


def last(key):
    """A function: what a run's last evaluation logged under `key`, or nothing."""
    def value(run):
        return run.last.get(key, math.nan)
    return value


# The further columns of a table: head, function of a run, digits.
USUAL = [("std_z", end("std_z"), 2), ("rank h", last("rank_h"), 0)]
SPARSE = [("std_z", end("std_z"), 2), ("live %", end("live_columns", 100), 1),
          ("zero %", end("zero_columns", 100), 1), ("L2,1", end("l21_normalized"), 3),
          ("norm of W", end("frobenius"), 2), ("rank r", last("rank_r"), 1),
          ("rank z", last("rank_z"), 1)]
MASKED = [("error", last("loss_reconstruction"), 3), ("rank h", last("rank_h"), 0)]
FURTHER = {"Barlow Twins and SparseHead": SPARSE, "MAE and TC2": MASKED}


# ---- cells and lines -----------------------------------------------------------------------------
def line(cells):
    return "| " + " | ".join(cells) + " |"


def table(head, rows):
    """The lines of a table in Markdown."""
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def number(value, digits):
    return "" if math.isnan(value) else f"{value:.{digits}f}"


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


def paired(a, b, measure, where):
    """{seed: the differences a - b of the numbers `measure(run)`}."""
    first, second = seeds(a, where), seeds(b, where)
    found = {}
    for seed in sorted(set(first) & set(second)):
        pairs = zip(measure(first[seed]), measure(second[seed]))
        found[seed] = [x - y for x, y in pairs]
    return found


def differences(a, b, measure, where):
    """Paired differences a - b of the numbers `measure(run)`: one column per number."""
    return columns(paired(a, b, measure, where).values())


# ---- tables --------------------------------------------------------------------------------------
def at_length(length):
    return f"cifar10_lengths/length{length}"


def row_table(title):
    """Each row of a table at every length there is, with means over the seeds."""
    further = FURTHER.get(title, USUAL)
    rows = []
    for name in ROWS[title]:
        for length in LENGTHS:
            runs = list(seeds(name, at_length(length)).values())
            if not runs:
                continue
            cells = [f"`{name}`", str(length), str(len(runs)), f"{images(runs[0]):.0f}",
                     number(passes(runs[0]), 0)]
            cells += [spread(column) for column in columns(map(accuracies, runs))]
            cells += [number(statistics.mean(map(f, runs)), digits) for _, f, digits in further]
            rows.append(cells)
    head = ["row", "length", "seeds", "images (k)", "passes (k)", *ACCURACY_HEAD]
    return table(head + [name for name, *_ in further], rows)


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


def all_differences(pairs=PAIRS):
    """[(a, b, length, columns of paired differences)] of the pairs with two common seeds."""
    found = []
    for a, b in pairs:
        for length in LENGTHS:
            rows = differences(a, b, accuracies, at_length(length))
            if rows and len(rows[0]) > 1:
                found.append((a, b, length, rows))
    return found


def pooled_variance(columns):
    """Of columns of numbers about means of their own: each counts by its degrees of freedom."""
    squares = sum((len(column) - 1) * statistics.variance(column) for column in columns)
    return squares / sum(len(column) - 1 for column in columns)


def difference_table(pairs=PAIRS):
    """Paired differences; the p-values, of `linear`, are corrected for the lines of this table."""
    found = all_differences(pairs)
    p_values = holm([student_p(rows[0]) for *_, rows in found])
    lines = []
    for (a, b, length, rows), p in zip(found, p_values):
        cells = [f"`{a}` - `{b}`", str(length), str(len(rows[0]))]
        cells += [interval(column) for column in rows]
        lines.append([*cells, p_cell(p)])
    return table(["difference", "length", "seeds", *ACCURACY_HEAD, "p, Holm"], lines)


def transfer_table():
    """Rows trained on five classes, on these and on five others, and their differences."""
    names = ROWS["Unseen classes"]
    rows = []
    for length in LENGTHS:
        where = at_length(length)
        for name in names:
            runs = list(seeds(name, where).values())
            if runs:
                cells = [spread(column) for column in columns(map(transfer, runs))]
                rows.append([f"`{name}`", str(length), str(len(runs)), *cells])
        for a, b in PAIRS:
            found = differences(a, b, transfer, where) if a in names else []
            if found:
                cells = [str(length), str(len(found[0])), *map(interval, found)]
                rows.append([f"`{a}` - `{b}`", *cells])
    head = ["row", "length", "seeds", "linear, seen", "linear, unseen", "5-NN, unseen"]
    return table([*head, "1-shot, unseen", "5-shot, unseen"], rows)


def visible_gain(base, length, n):
    """The smallest true difference in `linear` that n paired seeds find four times in five.

    The spread is pooled over this length's differences from the same base method."""
    method = base.split("_")[0]
    columns = [rows[0] for _, b, other, rows in all_differences()
               if b.startswith(method) and other == length]
    return FOUND[n] * (pooled_variance(columns) / n) ** 0.5


def p_cell(p):
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def all_claims():
    """[(claim, length, columns at equal images, at equal passes)], from three seeds on."""
    found = []
    for claim in CLAIMS:
        method, equal_images, equal_passes = claim[:3]
        for length in LENGTHS:
            where = at_length(length)
            at_images = differences(method, equal_images, accuracies, where)
            at_passes = differences(method, equal_passes, accuracies, where)
            if at_images and at_passes and min(len(at_images[0]), len(at_passes[0])) > 2:
                found.append((claim, length, at_images, at_passes))
    return found


def claim_table():
    """The papers' gains beside ours at equal images and at equal passes.

    The p-values, of `linear`, are corrected for this table's comparisons, each counted once."""
    found = all_claims()
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
        visible = visible_gain(equal_images, length, n)
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


def change_table():
    """How the paired differences change from one length to another, at the seeds of both.

    The p-values, of `linear`, are corrected for the lines of this table."""
    lines = []
    p_values = []
    for a, b in PAIRS:
        for short, long in ((1, 4), (4, 16)):
            before = paired(a, b, accuracies, at_length(short))
            after = paired(a, b, accuracies, at_length(long))
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
    return table(["difference", "length", "seeds", *ACCURACY_HEAD, "p, Holm"], lines)


# ---- further tables ------------------------------------------------------------------------------
def measured_table(head, names, pairs, measure, digits):
    """`measure(run)` at the end of training, a column each: rows, then paired differences."""
    rows = []
    for name in names:
        for length in LENGTHS:
            runs = list(seeds(name, at_length(length)).values())
            if runs:
                cells = [spread(column, digits) for column in columns(map(measure, runs))]
                rows.append([f"`{name}`", str(length), str(len(runs)), *cells])
    for a, b in pairs:
        for length in LENGTHS:
            found = differences(a, b, measure, at_length(length))
            if found:
                cells = [interval(column, digits) for column in found]
                rows.append([f"`{a}` - `{b}`", str(length), str(len(found[0])), *cells])
    return table(["row", "length", "seeds", *head], rows)


def conflict_table():
    pairs = [("tc2", "simclr_4views"), ("tc2", "simclr_t")]
    return measured_table(["cosine"], CONFLICT, pairs, conflict, 2)


def adaptation_table():
    names = [name for pair in ADAPTATION for name in pair]
    names = list(dict.fromkeys(names))              # each once
    return measured_table(["before", "after", "gain"], names, ADAPTATION, adaptation, 1)


def fine_tuning_table():
    """The whole network trained on a share of the labels, beside the probe of TC2."""
    keys = [("finetune", metric) for metric in ("1%_top1", "10%_top1", "10%_train_top1")]
    keys.append(("linear", "top1"))

    def accuracies_of(run):
        return [run.found[run.settings["data"], *key] for key in keys]

    rows = []
    for name in FINE_TUNED:
        runs = list(seeds(name, "first_edition").values())
        cells = [spread(column) for column in columns(map(accuracies_of, runs))]
        rows.append([f"`{name}`", str(len(runs)), *cells])
    for base, method in zip(FINE_TUNED[::2], FINE_TUNED[1::2]):
        found = differences(method, base, accuracies_of, "first_edition")
        cells = [interval(column) for column in found]
        rows.append([f"`{method}` - `{base}`", str(len(found[0])), *cells])
    return table(["row", "seeds", "1 %", "10 %", "10 %, training", "linear_adam, 100 %"], rows)


def all_tables():
    """[(title, lines)], in the order of the page."""
    tables = [("The claims", claim_table()), ("Change with length", change_table()),
              ("Differences", difference_table()),
              ("Differences of settings", difference_table(SETTING_PAIRS))]
    tables += [(title, row_table(title)) for title in ROWS]
    return tables + [("Transfer to unseen classes", transfer_table()),
                     ("Task conflict", conflict_table()), ("Adaptation", adaptation_table()),
                     ("Fine-tuning", fine_tuning_table())]


# ---- the figure ----------------------------------------------------------------------------------
def curve_points(rows):
    """[(passes, lowest, mean, highest)] in `linear` of these rows at all lengths, by passes."""
    points = []
    for name in rows:
        for length in LENGTHS:
            runs = list(seeds(name, at_length(length)).values())
            if runs:
                values = [accuracies(run)[0] for run in runs]
                mean = statistics.mean(values)
                points.append((passes(runs[0]), min(values), mean, max(values)))
    return sorted(points)


def lengths_figure(path):
    """Accuracy against compute, at every length: mean, and the range over the seeds."""
    from matplotlib.figure import Figure
    figure = Figure((13, 8), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, (title, curves) in zip(axes, CURVES.items()):
        for label, (colour, rows) in curves.items():
            points = curve_points(rows)
            if points:
                cost, low, mean, high = columns(points)
                axis.plot(cost, mean, "o-", color=colour, label=label)
                axis.vlines(cost, low, high, color=colour)
        axis.grid(alpha=0.3)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel="thousand forward-backward passes", ylabel="linear top-1 (%)")
        if axis.lines:
            axis.legend(fontsize="small", loc="upper left")
    figure.suptitle("each point a training with its own schedule: mean and range over the seeds, "
                    "no range: one seed")
    figure.savefig(path, dpi=110)


def main():
    for title, lines in all_tables():
        print(f"\n### {title}\n")
        print("\n".join(lines))
    lengths_figure(f"{HERE}/lengths.png")


if __name__ == "__main__":
    main()
