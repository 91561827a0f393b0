"""results/: the tables hold what the logs say, and the scripts repeat the rows of the logs.

The numbers are computed here a second time, from the raw logs and with numpy: what tables.py prints
must stand on the page, what stands on the page must come out of the logs. The scripts are run with
a `python` that only prints its arguments; these, parsed by the scripts, must give the settings that
the published logs were made with.
"""
import functools
import glob
import importlib.util
import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch

import common
from conftest import ROOT

LOGS = f"{ROOT}/results/logs"
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ACCURACIES = [("linear", "top1"), ("knn", "k5_euclidean"), ("knn", "k200_cosine")]
T95 = {2: 12.706, 3: 4.3027, 4: 3.1824, 5: 2.7764}      # 97.5 % quantile of Student's t, by seeds
DIGIT = 0.0501                  # half of the last digit of a number with one

# Passes per image by row: 1 per view or mask, a third without gradient, the decoder alone a half.
PASSES = {
    "simclr_2views": 2, "simclr_4views": 4, "simclr_4views_equal_passes": 4, "simclr_t": 4,
    "seen_simclr_4views": 4, "seen_simclr_4views_equal_passes": 4, "tc2_inner0": 16 / 3,
    "byol": 8 / 3, "byol_large_batch": 8 / 3, "byol_equal_passes": 8 / 3,
    "byol_large_batch_equal_passes": 8 / 3, "lookahead": 28 / 3, "gessl_first_order": 34 / 3,
    "gessl": 40 / 3, "gessl_kl_only": 40 / 3, "gessl_alpha_0.005": 40 / 3,
    "gessl_lambda_1": 28 / 3, "gessl_lambda_5": 52 / 3, "gessl_lambda_10": 82 / 3,
    "mae": 1, "mae_2masks": 2, "mae_equal_passes": 1, "mae_tc2": 11 / 3,
    "mae_tc2_inner_lr_0.1": 11 / 3, "mae_tc2_inner_lr_1": 11 / 3, "mae_tc2_no_calibration": 8 / 3,
    "mae_tc2_inner0": 8 / 3,
}
SECOND_ORDER = ("gessl_exact", "gessl_neumann", "gessl_cg")


def passes_per_image(row):
    """Of any row; TC2's variants cost what TC2 does, SparseHead's what Barlow Twins does."""
    if row in PASSES:
        return PASSES[row]
    if row.startswith(("tc2", "seen_tc2")):
        return 22 / 3
    return 2


def loaded(name):
    """The module in the file of that name."""
    stem = os.path.basename(name).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(stem, f"{ROOT}/{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return loaded("results/tables.py")


def source(name):
    with open(f"{ROOT}/{name}") as file:
        return file.read()


def page_tables():
    """{heading: [cells of each line]} of results/README.md, heads and rules left out."""
    found = {}
    for section in re.split(r"^##+ ", source("results/README.md"), flags=re.M)[1:]:
        heading, *rest = section.splitlines()
        lines = [line for line in rest if line.startswith("|")]
        if lines:
            cells = [line.strip("|").split("|") for line in lines[2:]]
            found[heading] = [[cell.strip() for cell in row] for row in cells]
    return found


@functools.cache
def log_of(folder):
    """The lines of log.jsonl."""
    with open(f"{folder}/log.jsonl") as file:
        return [json.loads(line) for line in file]


@functools.cache
def evaluation_of(folder):
    """{(data, protocol, metric): value}"""
    with open(f"{folder}/eval.json") as file:
        results = json.load(file)
    if "cifar10_lengths" not in folder:
        results = results["results"]                # the first edition's
    return {(r.get("data"), r["protocol"], r["metric"]): r["value"] for r in results}


def accuracies(folder, data=None):
    """The three accuracies of a run, on `data` where there are several."""
    found = {}
    for (on, *key), value in evaluation_of(folder).items():
        if data is None or on == data:
            found[tuple(key)] = value
    return [found[key] for key in ACCURACIES]


def images_of(log):
    """Thousands of images that a run has seen."""
    settings, last = log[0]["settings"], [line for line in log if "lr" in line][-1]
    per_step = settings["batch_size"]
    if settings.get("script") == "byol_gessl" and not settings["baseline"]:
        per_step *= settings["tasks"]
    return last["step"] * per_step / 1e3


def seed_folders(row):
    """{seed: folder}"""
    folders = glob.glob(f"{LOGS}/cifar10_seeds/seed*/{row}")
    return {int(re.search(r"seed(\d+)/", folder)[1]): folder for folder in folders}


def judged(row):
    return "runs/unseen" if row.startswith("seen") else "runs/subset"


def over_seeds(row, data):
    """(seeds, 3) accuracies of a row, in the order of the seeds."""
    folders = seed_folders(row)
    return np.array([accuracies(folders[seed], data) for seed in sorted(folders)])


def paired(a, b, data_a, data_b):
    """(seeds, 3) differences at the seeds that both rows have."""
    both = sorted(set(seed_folders(a)) & set(seed_folders(b)))
    first = np.array([accuracies(seed_folders(a)[seed], data_a) for seed in both])
    second = np.array([accuracies(seed_folders(b)[seed], data_b) for seed in both])
    return first - second


def check_spread(cell, column, digit=DIGIT):
    """`mean ± standard deviation`, or the mean of a single seed."""
    mean, _, deviation = cell.partition("±")
    assert abs(float(mean) - np.mean(column)) <= digit
    assert bool(deviation) == (len(column) > 1)
    if deviation:
        assert abs(float(deviation) - np.std(column, ddof=1)) <= digit


def check_interval(cell, column, digit=DIGIT):
    """`mean ± half of the 95 % interval`, or the difference of a single seed."""
    mean, _, half = cell.partition("±")
    assert abs(float(mean) - np.mean(column)) <= digit
    assert bool(half) == (len(column) > 1)
    if half:
        expected = T95[len(column)] * np.std(column, ddof=1) / len(column) ** 0.5
        assert abs(float(half) - expected) <= digit


# ---- tables --------------------------------------------------------------------------------------
def test_the_page_has_exactly_the_lines_that_tables_py_prints(tables):
    printed = []
    for _, lines in tables.all_tables():
        printed += lines
    page = [line for line in source("results/README.md").splitlines() if line.startswith("|")]
    assert len(page) > 200 and page == printed


# ---- tables over lengths -------------------------------------------------------------------------
LENGTH_ACCURACIES = [("linear", "top1"), ("linear_adam", "top1"), ("knn", "k5_euclidean"),
                     ("knn", "k200_cosine")]
# Passes per image of the rows that the first edition does not have.
PASSES |= {
    "simclr_2views_equal_passes": 2, "simclr_4views_512": 4, "simclr_t_2": 2, "seen_simclr_t": 4,
    "simclr_2views_equal_gessl": 2, "gessl_ssl_4": 40 / 3, "byol_large_batch_4epochs": 8 / 3,
    "byol_tc2": 20 / 3, "barlow_tc2": 16 / 3, "simclr_gessl": 38 / 3,
}


def length_passes_per_image(row):
    """Of the second edition: MAE's TC2 trains f_v and f_w without calibration too, for the log."""
    if row.startswith("mae_tc2") and row != "mae_tc2_inner0":
        return 11 / 3
    return passes_per_image(row)


def length_folders(row, length):
    """{seed: folder}"""
    folders = glob.glob(f"{LOGS}/cifar10_lengths/length{length}/seed*/{row}")
    return {int(re.search(r"seed(\d+)/", folder)[1]): folder for folder in folders}


def length_accuracies(row, length, seeds):
    """(seeds, 4) accuracies, of the rows seen_* on the classes that they were not trained on."""
    found = []
    for seed in seeds:
        values = evaluation_of(length_folders(row, length)[seed])
        found.append([values[judged(row), *key] for key in LENGTH_ACCURACIES])
    return np.array(found)


def length_paired(a, b, length):
    both = sorted(set(length_folders(a, length)) & set(length_folders(b, length)))
    return length_accuracies(a, length, both) - length_accuracies(b, length, both)


def test_tables_over_lengths_hold_the_means_and_spreads_of_the_logs():
    seen = set()
    for title, lines in page_tables().items():
        if not title.endswith(", over lengths"):
            continue
        for name, length, n, images, passes, *cells in lines:
            row = name.strip("`")
            folders = length_folders(row, length)
            assert len(folders) == int(n)
            logs = [log_of(folder) for folder in folders.values()]
            steps = {log[-1]["step"] for log in logs}
            assert len(steps) == 1
            thousands = steps.pop() * logs[0][0]["settings"]["images_per_step"] / 1e3
            assert int(images) == round(thousands)
            if row in SECOND_ORDER:                     # second derivatives are no passes
                assert passes == ""
            else:
                assert int(passes) == round(thousands * length_passes_per_image(row))
            for cell, column in zip(cells, length_accuracies(row, length, folders).T):
                check_spread(cell, column)
            check_logged(cells[4], logs, "rank_h", 0.501)
            seen |= {(length, row)}
    there = glob.glob(f"{LOGS}/cifar10_lengths/length*/seed*/*")
    there = {tuple(re.search(r"length(\d+)/seed\d+/(.+)", folder).groups()) for folder in there}
    assert seen == there and len(seen) > 15


@pytest.mark.parametrize("title", ["Differences over lengths", "Differences of settings"])
def test_differences_over_lengths_hold_paired_means_and_corrected_p_values(title):
    lines = page_tables()[title]
    p_values = []
    for name, length, n, *cells, _ in lines:
        found = length_paired(*re.findall(r"`(\S+)`", name), length)
        assert len(found) == int(n) > 1
        for cell, column in zip(cells, found.T):
            check_interval(cell, column)
        p_values.append(two_sided_p(found[:, 0]))

    check_holm([line[-1] for line in lines], p_values)


def test_the_table_of_transfer_holds_both_halves_of_the_classes():
    keys = [("runs/seen", "linear", "top1"), ("runs/unseen", "linear", "top1"),
            ("runs/unseen", "knn", "k5_euclidean"),
            ("runs/unseen", "fewshot", "5way_1shot_logistic"),
            ("runs/unseen", "fewshot", "5way_5shot_logistic")]

    def numbers(row, length, seeds):
        folders = length_folders(row, length)
        return np.array([[evaluation_of(folders[seed])[key] for key in keys] for seed in seeds])

    lines = page_tables()["Transfer to unseen classes"]
    for name, length, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        both = sorted(set.intersection(*(set(length_folders(row, length)) for row in rows)))
        assert len(both) == int(n)
        found = numbers(rows[0], length, both)
        check = check_spread
        if len(rows) == 2:
            found = found - numbers(rows[1], length, both)
            check = check_interval
        for cell, column in zip(cells, found.T, strict=True):
            check(cell, column)
    assert len(lines) > 2


def two_sided_p(column):
    """Student's t, its density integrated numerically: another way than the finite sums."""
    n = len(column) - 1
    t = abs(np.mean(column)) / (np.std(column, ddof=1) / len(column) ** 0.5)
    # x = tan(angle) sqrt(n) makes the whole line an interval, where cos^(n - 1) is the density.
    angle = (np.arange(200_000) + 0.5) / 200_000 * np.pi / 2
    density = np.cos(angle) ** (n - 1)
    return density[angle > np.arctan(t / n ** 0.5)].sum() / density.sum()


def test_student_and_holm_give_known_values(tables):
    for n in range(2, 9):
        column = np.random.default_rng(n).normal(0.5, 1, n).tolist()
        assert abs(tables.student_p(column) - two_sided_p(column)) < 1e-4
    # t of two values a, b is (a + b) / |a - b|; at t = 1 and one degree of freedom p is a half.
    assert abs(tables.student_p([0.0, 1.0]) - 0.5) < 1e-12
    corrected = tables.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, 0.02])


def test_claims_over_lengths_stand_beside_the_differences_of_the_logs():
    lines = page_tables()["The claims, second round"]
    p_values = {}                                       # of each comparison, once: (printed, own)
    for _, name, length, n, _, *cells in lines:
        method, base = re.findall(r"`(\w+)`", name)
        at_images, p_images, at_passes, p_passes, visible, _, knn_images, knn_passes = cells
        found = length_paired(method, base, length)
        check_interval(at_images, found[:, 0])
        check_interval(knn_images, found[:, 2])
        p_values[method, length, at_images, knn_images] = p_images, two_sided_p(found[:, 0])
        # The base at equal passes sees as many passes as the method, or up to 9 % more.
        cost = length_cost(method, length)
        matches = {}
        for row in (row for _, row in all_length_rows(length) if row.startswith(base[:4])):
            if cost <= 1.005 * length_cost(row, length) <= 1.1 * cost:
                column = length_paired(method, row, length)
                matches[f"{np.mean(column[:, 0]):+.1f}"] = column
        mean = at_passes.split(" ± ")[0]
        assert mean in matches, (name, mean, matches)
        check_interval(at_passes, matches[mean][:, 0])
        check_interval(knn_passes, matches[mean][:, 2])
        own = two_sided_p(matches[mean][:, 0])
        p_values[method, length, at_passes, knn_passes] = p_passes, own
        assert abs(float(visible) - smallest_visible(base, length, int(n))) <= DIGIT
    check_holm(*zip(*p_values.values()))


def test_the_share_of_passes_with_which_simclr_equals_tc2_is_read_off_the_curve():
    def point(row, length):
        """(thousand passes, mean accuracy)"""
        accuracies = length_accuracies(row, length, length_folders(row, length))
        return length_cost(row, length), accuracies[:, 0].mean()

    rows = ("simclr_2views", "simclr_2views_equal_passes", "simclr_2views_equal_gessl")
    there = [(row, length) for row in rows for length in ("1", "4", "16")
             if length_folders(row, length)]
    passes, accuracy = zip(*sorted(point(row, length) for row, length in there))
    assert list(accuracy) == sorted(accuracy)
    sentence = re.search(r"with ([\d., and]+) of\s+TC2's passes", source("results/README.md"))[1]
    shares = re.findall(r"\d\.\d+", sentence)
    for share, length in zip(shares, ("1", "4", "16"), strict=True):
        cost, reached = point("tc2", length)
        needed = np.exp(np.interp(reached, accuracy, np.log(passes)))
        assert abs(needed / cost - float(share)) <= 0.005, (length, needed / cost)


def check_holm(printed, p_values):
    """Holm: p_i times the number of p-values that are not smaller, and monotone."""
    for cell, p in zip(printed, p_values, strict=True):
        smaller = [q for q in p_values if q <= p]
        corrected = max(min(1, q * sum(r >= q for r in p_values)) for q in smaller)
        if cell == "< 0.01":
            assert corrected < 0.01
        else:
            assert abs(float(cell) - corrected) <= 0.00501


def test_changes_with_length_are_differences_of_paired_differences():
    lines = page_tables()["Change with length"]
    p_values = []
    for name, lengths, n, *cells, _ in lines:
        a, b = re.findall(r"`(\w+)`", name)
        short, long = lengths.split(" to ")
        rows = [length_folders(row, length) for row in (a, b) for length in (short, long)]
        common = sorted(set.intersection(*map(set, rows)))
        assert len(common) == int(n) > 1
        found = []
        for length in (long, short):
            found.append(length_accuracies(a, length, common)
                         - length_accuracies(b, length, common))
        changes = found[0] - found[1]
        for cell, column in zip(cells, changes.T, strict=True):
            check_interval(cell, column)
        p_values.append(two_sided_p(changes[:, 0]))
    assert len(lines) > 3
    check_holm([line[-1] for line in lines], p_values)


def smallest_visible(base, length, n):
    """See `test_visible_is_the_gain_that_a_paired_test_finds_four_times_in_five`."""
    residuals = []              # of each difference, about its own mean
    freedom = 0
    for name, at, *_ in page_tables()["Differences over lengths"]:
        a, b = re.findall(r"`(\w+)`", name)
        if at == length and b.split("_")[0] == base.split("_")[0]:
            linear = length_paired(a, b, length)[:, 0]
            residuals.extend(linear - linear.mean())
            freedom += len(linear) - 1
    variance = np.square(residuals).sum() / freedom
    return {3: 5.653, 4: 4.256, 5: 3.761}[n] * (variance / n) ** 0.5


def all_length_rows(length):
    folders = glob.glob(f"{LOGS}/cifar10_lengths/length{length}/seed*/*")
    return {(length, os.path.basename(folder)) for folder in folders}


def length_cost(row, length):
    """Thousands of passes."""
    log = log_of(next(iter(length_folders(row, length).values())))
    return log[-1]["step"] * log[0]["settings"]["images_per_step"] * passes_per_image(row) / 1e3


# ---- tables of the first edition -----------------------------------------------------------------

SEED_TABLES = ["SimCLR and TC2", "BYOL and GeSSL", "Barlow Twins and SparseHead", "MAE and TC2",
               "Unseen classes"]


def test_tables_over_seeds_hold_the_means_and_spreads_of_the_logs():
    page, seen = page_tables(), set()
    for title in SEED_TABLES:
        for name, n, images, passes, minutes, *cells in page[title]:
            row = name.strip("`")
            seen.add(row)
            logs = [log_of(folder) for folder in seed_folders(row).values()]
            assert len(logs) == int(n) == (1 if row in ("gessl_neumann", "gessl_cg") else 3)

            thousands = images_of(logs[0])
            assert {images_of(log) for log in logs} == {thousands}
            assert int(images) == round(thousands)
            if row in SECOND_ORDER:
                assert passes == ""
            else:
                assert int(passes) == round(thousands * passes_per_image(row))
            rates = []
            for log in logs:
                rates.append(np.median([line["images_per_s"] for line in log if "lr" in line]))
            assert abs(float(minutes) - 1e3 * thousands / max(rates) / 60) <= DIGIT

            for cell, column in zip(cells, over_seeds(row, judged(row)).T):
                check_spread(cell, column)
            if title == "Barlow Twins and SparseHead":
                check_sparse(cells[3:], seed_folders(row).values())
            elif title == "MAE and TC2":
                check_logged(cells[3], logs, "loss_reconstruction", 5.01e-4)
                check_logged(cells[4], logs, "rank_h", 0.501)
            else:
                check_logged(cells[3], logs, "std_z", 5.01e-3)
                check_logged(cells[4], logs, "rank_h", 0.501)
    there = {os.path.basename(folder) for folder in glob.glob(f"{LOGS}/cifar10_seeds/seed*/*")}
    assert seen == there and len(seen) >= 45


def check_logged(cell, logs, key, digit):
    """The mean of what the runs logged last under `key`."""
    last = [[line[key] for line in log if key in line][-1] for log in logs]
    assert abs(float(cell) - np.mean(last)) <= digit


def check_sparse(cells, folders):
    """live %, zero %, L2,1, norm of W, rank r, rank z"""
    logs = [log_of(folder) for folder in folders]
    keys = ["live_columns", "zero_columns", "l21_normalized", "frobenius"]
    units, digits = (100, 100, 1, 1), (DIGIT, DIGIT, 5.01e-4, 5.01e-3)
    for cell, key, unit, digit in zip(cells, keys, units, digits):
        check_logged(float(cell) / unit, logs, key, digit / unit)
    for cell, space in zip(cells[4:], ("representation", "embedding")):
        ranks = []
        for folder in folders:
            found = evaluation_of(folder)
            ranks += [v for key, v in found.items() if key[1:] == ("spectrum", f"{space}_rank")]
        assert len(ranks) == len(logs) and abs(float(cell) - np.mean(ranks)) <= DIGIT


def test_differences_hold_the_paired_means_and_intervals_of_the_logs():
    page = page_tables()
    assert len(page["Differences"]) >= 40
    for name, n, *cells in page["Differences"]:
        a, b = re.fullmatch(r"`([\w.]+)` - `(\w+)`", name).groups()
        found = paired(a, b, judged(a), judged(b))
        assert len(found) == int(n)
        for cell, column in zip(cells, found.T):
            check_interval(cell, column)


def test_seen_classes_are_judged_on_the_classes_of_the_training():
    lines = page_tables()["Seen classes"]
    assert len(lines) == 5
    for name, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        if len(rows) == 1:
            for cell, column in zip(cells, over_seeds(rows[0], "runs/seen").T):
                check_spread(cell, column)
        else:
            for cell, column in zip(cells, paired(*rows, "runs/seen", "runs/seen").T):
                check_interval(cell, column)


def conflict_of(row):
    """(seeds, epochs) mean cosine between the tasks' gradients."""
    curves = []
    for _, folder in sorted(seed_folders(row).items()):
        log = log_of(folder)
        curves.append([line["conflict_cos_raw"] for line in log if "conflict_cos_raw" in line])
    return np.array(curves)


def test_the_table_of_conflict_holds_the_cosines_of_the_logs():
    lines = page_tables()["Task conflict"]
    assert len(lines) >= 6
    for name, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        assert int(n) == 3 and len(cells) == 4
        if len(rows) == 1:
            for cell, column in zip(cells, conflict_of(rows[0]).T):
                check_spread(cell, column, 5.01e-3)
        else:
            found = conflict_of(rows[0]) - conflict_of(rows[1])
            for cell, column in zip(cells, found.T):
                check_interval(cell, column, 5.01e-3)


def test_claims_stand_beside_the_differences_of_the_logs():
    lines = page_tables()["What the papers claim"]
    assert len(lines) == 5
    for _, name, *cells, positive in lines:
        a, b = re.findall(r"`(\w+)`", name)
        found = paired(a, b, "runs/subset", "runs/subset")
        check_interval(cells[1], found[:, 0])
        check_interval(cells[4], found[:, 1])
        assert positive == f"{(found > 0).sum()} of {found.size}"


def test_visible_is_the_gain_that_a_paired_test_finds_four_times_in_five(tables):
    rng = np.random.default_rng(0)
    for n, errors in tables.FOUND.items():
        gains = rng.standard_normal((200_000, n)) + errors / n ** 0.5
        t = gains.mean(1) / gains.std(1, ddof=1) * n ** 0.5
        assert abs((abs(t) > tables.T[n]).mean() - 0.8) < 0.01
    for n, quantile in tables.T.items():
        nothing = rng.standard_normal((200_000, n))
        t = nothing.mean(1) / nothing.std(1, ddof=1) * n ** 0.5
        assert abs((abs(t) > quantile).mean() - 0.05) < 0.005


def test_the_spread_behind_visible_is_that_of_the_tables_differences():
    lines = page_tables()["What the papers claim"]
    of_barlow = [("plain", "barlow"), ("rownorm", "barlow"), ("prox", "barlow"),
                 ("prox_strong", "barlow")]
    found = [paired(a, b, "runs/subset", "runs/subset") for a, b in of_barlow]
    variance = np.mean([differences.var(0, ddof=1) for differences in found], axis=0)
    expected = 5.653 * (variance / 3) ** 0.5
    for _, name, *cells, _ in lines:
        if "barlow" in name:
            assert abs(float(cells[2]) - expected[0]) <= DIGIT
            assert abs(float(cells[5]) - expected[1]) <= DIGIT


@pytest.mark.parametrize("title, keys", [
    ("Fine-tuning", [("finetune", "1%_top1"), ("finetune", "10%_top1"),
                     ("finetune", "10%_train_top1"), ("linear", "top1")]),
    ("Adaptation and distances", [
        ("adaptation", "loss_before"), ("adaptation", "loss_after"), ("adaptation", "before"),
        ("adaptation", "after"), ("distance-ratio", "representation"),
        ("distance-ratio", "embedding"), ("distance-ratio", "embedding_std")])])
def test_tables_of_further_protocols_hold_what_the_logs_say(title, keys):
    lines = page_tables()[title]
    assert len(lines) == 8
    for name, n, *cells in lines:
        row = name.strip("`")
        found = [evaluation_of(folder) for folder in seed_folders(row).values()]
        assert len(found) == int(n) == 3
        for cell, key in zip(cells, keys, strict=True):
            column = [values[("runs/subset", *key)] for values in found
                      if ("runs/subset", *key) in values]
            assert bool(cell) == bool(column)
            if cell:
                check_spread(cell, column, DIGIT if max(column) > 10 else 5.01e-3)


def test_tables_of_one_seed_hold_what_the_logs_say():
    page = page_tables()
    folders = {"SimCLR and TC2": "cifar10_cpu", "BYOL and GeSSL": "cifar10_cpu_gessl",
               "Barlow Twins and SparseHead": "cifar10_cpu_sparsehead",
               "MAE and TC2": "cifar10_cpu_mae"}
    for title, name in folders.items():
        lines = page[f"{title}, one seed"]
        assert {row[0].strip("`") for row in lines} == set(rows_in(name))
        for row, images, *cells in lines:
            folder = f"{LOGS}/{name}/{row.strip('`')}"
            log = log_of(folder)
            assert int(images) == round(images_of(log))
            if title != "Barlow Twins and SparseHead":
                cost = passes_per_image(row.strip("`"))
                assert int(cells.pop(0)) == round(images_of(log) * cost)
            assert [float(cell) for cell in cells[:3]] == np.round(accuracies(folder), 2).tolist()
            if title == "Barlow Twins and SparseHead":
                check_sparse(cells[3:], [folder])
            elif title == "MAE and TC2":
                check_logged(cells[3], [log], "loss_reconstruction", 5.01e-4)
                check_logged(cells[4], [log], "rank_h", 0.501)
            else:
                check_logged(cells[3], [log], "std_z", 5.01e-3)
                check_logged(cells[4], [log], "rank_h", 0.501)


def rows_in(name):
    """Rows of logs/NAME."""
    found = glob.glob(f"{LOGS}/{name}/*/log.jsonl")
    return [os.path.basename(os.path.dirname(path)) for path in found]


def test_the_table_of_protocols_holds_what_the_evaluations_say():
    lines = page_tables()["Every protocol, one seed"]
    runs = ["simclr_2views", "tc2", "byol", "gessl", "barlow", "rownorm", "mae", "mae_tc2"]
    found = [evaluation_of(f"{LOGS}/cifar10_cpu_protocols/{run}") for run in runs]
    count = 0
    for name, *cells in lines:
        data, protocol, metric = re.findall(r"`(.*?)`", name)
        for cell, values in zip(cells, found, strict=True):
            value = values.get((data, protocol, metric))
            half = values.get((data, protocol, f"{metric}_pm"))
            mean, _, interval = cell.partition("±")
            assert bool(cell) == (value is not None) and bool(interval) == (half is not None)
            if cell:
                count += 1
                assert abs(float(mean) - value) <= (5.01e-5 if abs(value) < 0.01 else 5.01e-3)
            if interval:
                assert abs(float(interval) - half) <= 5.01e-3
    assert len(lines) >= 30 and count >= 200


def test_the_figures_are_drawn_without_a_display(tables, tmp_path):
    for draw in (tables.lengths_figure, tables.compute_figure, tables.conflict_figure,
                 tables.hypergradient_figure):
        draw(tmp_path / "figure.png")
        with open(tmp_path / "figure.png", "rb") as file:
            head = file.read(24)
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        assert head[1:4] == b"PNG" and width > 600 and height > 400
    assert "pyplot" not in source("results/tables.py")


# ---- scripts -------------------------------------------------------------------------------------
# What the second edition calls otherwise, of the settings in the logs of the first.
GONE = {"tc2_mix"}              # --calibrate mix
NOT_COMPARED = {
    "calibrate",                # --without calibration
    "bf16", "workers", "device", "compile", "sync_bn",          # of the machine
}


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """A folder with a CIFAR-10 of empty files, and a `python` that prints its arguments."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("bin")
    for split, name, n in [("train", "airplane", 2002), ("train", "truck", 1002),
                           *((split, c, 1) for split in ("train", "test") for c in CIFAR10)]:
        folder = f".data/cifar10/{split}/{name}"
        os.makedirs(folder, exist_ok=True)
        for i in range(n):
            open(f"{folder}/{i:04d}.jpg", "w").close()
    with open("bin/python", "w") as file:
        file.write('#!/bin/sh\necho "$@"\n')
    os.chmod("bin/python", 0o755)

    def run(script, *arguments):
        path = f"{os.getcwd()}/bin:{os.environ['PATH']}"
        command = ["bash", f"{ROOT}/results/{script}.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True,
                              env={**os.environ, "PATH": path})
        return done.stdout.splitlines()
    return run


def settings_of(line):
    """What a command line of a training script sets, its recipe filled in."""
    name, *flags = line.split()
    if name == "results/combinations.py":
        return settings_of_combination(loaded(name), flags)
    if name == "results/readings.py":
        functions = loaded(name).replacements(flags[0])
        return settings_after(loaded("simclr_tc2.py").parse_args(flags[1:]), functions)
    module = loaded(name)
    return settings_after(module.parse_args(flags), vars(module))


def settings_of_combination(module, flags):
    pair, flags = tuple(flags[:2]), flags[2:]
    _, defaults = module.COMBINATIONS[pair]
    own, rest = module.own_flags(defaults, flags)
    functions = module.replacements(*pair, own)
    return settings_after(module.BASES[pair[0]].parse_args([*rest, "--baseline"]), functions)


def settings_after(args, functions):
    """All settings, after a script's own functions have filled and checked what was given."""
    data = common.Data(args.data, range(50_000), None, [], None, 32, None, "")
    functions["fill_defaults"](args, data, torch.device("cpu"))
    functions["check_args"](args, data, 1)
    return vars(args)


def differing(now, then):
    """{setting: (now, then)} of those that both editions have and that differ."""
    found = {}
    idle = {"factors", "penalty"} if then["baseline"] else set()        # of the method alone
    for key in set(now) & set(then) - NOT_COMPARED - idle:
        if now[key] != then[key]:
            found[key] = now[key], then[key]
    if "calibrate" in then:
        without = "calibration" in now["without"]
        if without != (then["calibrate"] == "none"):
            found["calibrate"] = without, then["calibrate"]
    return found


@pytest.mark.parametrize("script, folder", [
    ("cifar10_seeds", "cifar10_seeds/seed1"), ("cifar10_cpu", "cifar10_cpu"),
    ("cifar10_cpu_gessl", "cifar10_cpu_gessl"), ("cifar10_cpu_mae", "cifar10_cpu_mae"),
    ("cifar10_cpu_sparsehead", "cifar10_cpu_sparsehead")])
def test_the_scripts_give_the_settings_of_the_published_logs(script, folder, echo):
    seed = ["1"] if script == "cifar10_seeds" else []
    lines = echo(script, ".data/cifar10", "runs", *seed)
    training = {}
    for line in lines:
        if not line.startswith(("eval_linear.py", "results/measures.py")):
            settings = settings_of(line)
            training[os.path.basename(settings["out"])] = settings
    rows = rows_in(folder)
    slow = {"gessl_neumann", "gessl_cg"}                # of seed 0 alone
    assert len(rows) >= 5 and set(training) - slow == set(rows) - GONE
    for row in set(rows) - GONE:
        then = log_of(f"{LOGS}/{folder}/{row}")[0]["settings"]
        assert not differing(training[row], then), (row, differing(training[row], then))
        assert training[row]["script"] == then.get("script", "simclr_tc2")


def test_the_script_of_lengths_gives_the_settings_of_its_logs(echo):
    there = glob.glob(f"{LOGS}/cifar10_lengths/length*/seed*/*")
    count = 0
    for length in (1, 4, 16):
        lines = echo("cifar10_lengths", ".data/cifar10", "runs", str(length), "1")
        for line in lines:
            if line.startswith("eval_linear.py"):
                continue
            settings = settings_of(line)
            out = settings["out"]
            for folder in there:
                if f"runs/{os.path.relpath(folder, f'{LOGS}/cifar10_lengths')}".replace(
                        re.search(r"seed\d+", folder)[0], "seed1") != out:
                    continue
                then = log_of(folder)[0]["settings"]
                changed = {key for key, value in settings.items() if then[key] != value}
                assert changed <= {"seed", "out", "workers"}, (folder, changed)
                count += 1
    assert count == len(there)


def test_the_rows_for_a_gpu_are_the_recipes_at_equal_images_and_at_equal_passes(echo):
    lines = echo("cifar10_gpu", ".data/cifar10", "runs", "3")
    assert len(lines) == 2 * 20
    found = {}
    for train, evaluate in zip(lines[::2], lines[1::2]):
        name, *flags = train.split()
        settings = settings_of(train)
        row = os.path.basename(settings["out"])
        assert evaluate == f"eval_linear.py runs/gpu/seed3/{row}" and settings["seed"] == 3
        module = loaded(name)
        if name == "results/combinations.py":
            module = module.BASES[flags[0]]
        recipe = module.RECIPES["small"]
        changed = {key for key, value in recipe.items() if settings[key] != value}
        allowed = {"epochs", "masks", "tasks"}
        if row.startswith("byol"):
            allowed |= {"batch_size", "ema_decay"}
        if row == "byol_tc2":
            allowed |= {"inner_lr"}                     # of TC2, not of GeSSL
        if row.endswith("_1024"):
            allowed |= {"batch_size"}
        assert changed <= allowed, (row, changed)
        found[row] = settings
    first = ["simclr_2views", "simclr_4views", "tc2", "byol_large_batch", "gessl"]
    assert list(found)[:5] == first

    per_image = {"simclr_2views": 2, "simclr_4views": 4, "tc2": 22 / 3, "byol_large_batch": 8 / 3,
                 "gessl": 2 * (1 + 10 + 5 / 3 + 1), "mae_4masks": 4,
                 "mae_tc2": 5.9}                        # counted in test_mae_tc2.py
    for method, base in [("tc2", "simclr_4views"), ("gessl", "byol_large_batch"),
                         ("mae_tc2", "mae_4masks")]:
        assert found[method]["images_per_step"] == found[base]["images_per_step"]
        assert found[method]["epochs"] == found[base]["epochs"] == 100
        longer = found[f"{base}_equal_passes"]
        assert set(key for key in longer if longer[key] != found[base][key]) == {"epochs", "out"}
        ratio = longer["epochs"] * per_image[base] / (100 * per_image[method])
        assert 1 <= ratio <= 1.01, (method, ratio)
    chosen = echo("cifar10_gpu", ".data/cifar10", "runs", "0", "gessl", "mae")
    assert [line.split()[0] for line in chosen] == ["byol_gessl.py", "eval_linear.py",
                                                    "mae_tc2.py", "eval_linear.py"]


@pytest.mark.parametrize("kill, status, others_run", [("ABRT", 1, True), ("TERM", 143, False)])
def test_a_crash_ends_one_row_for_a_gpu_and_who_stops_one_stops_all(kill, status, others_run, echo):
    with open("bin/python", "w") as file:
        file.write('#!/bin/sh\necho "$@"\ncase "$*" in *tc2.py*) kill -$KILL $$ ;; esac\n')
    path = f"{os.getcwd()}/bin:{os.environ['PATH']}"
    script = f"{ROOT}/results/cifar10_gpu.sh"
    command = ["bash", script, ".data/cifar10", "runs", "0", "tc2", "gessl"]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PATH": path, "KILL": kill})
    assert done.returncode == status
    assert ("byol_gessl.py" in done.stdout) == others_run
    assert ("tc2 has failed" in done.stderr) == others_run


def test_the_seeds_of_a_row_differ_in_nothing_else():
    for row in rows_in("cifar10_seeds/seed0"):
        settings = {}
        for seed, folder in seed_folders(row).items():
            settings[seed] = dict(log_of(folder)[0]["settings"])
            assert settings[seed].pop("seed") == seed
            assert settings[seed].pop("out") == f"runs/seed{seed}/{row}"
            for key in ("workers", "sync_bn", "device"):        # two came with later commits
                settings[seed].pop(key, None)
        assert all(found == settings[0] for found in settings.values()), row


def test_a_row_by_name_is_trained_and_evaluated_by_one_command(echo):
    assert [line.split()[0] for line in echo("cifar10_cpu_mae", ".data/cifar10", "runs", "mae")] \
        == ["mae_tc2.py", "eval_linear.py"]
    lines = echo("cifar10_seeds", ".data/cifar10", "runs", "2", "seen_tc2", "rownorm")
    assert [line.split()[0] for line in lines] == [
        "simclr_tc2.py", "eval_linear.py", "eval_linear.py", "barlow_sparsehead.py",
        "eval_linear.py", "results/measures.py", "eval_linear.py", "results/measures.py"]
    assert lines[2] == "eval_linear.py runs/seed2/seen_tc2 --data runs/unseen"
    assert lines[5].endswith("--measure spectrum") and lines[6].endswith("--protocol finetune")


def test_the_subsets_are_links_to_the_first_images_of_each_class(echo):
    echo("cifar10_seeds", ".data/cifar10", "runs", "0", "tc2")
    made = {}
    for name in ("subset/train", "subset/test", "seen/train", "unseen/train", "unseen/test"):
        folders = sorted(os.listdir(f"runs/{name}"))
        made[name] = {c: sorted(os.listdir(f"runs/{name}/{c}")) for c in folders}
    names = [f"{i:04d}.jpg" for i in range(2000)]
    assert list(made["subset/train"]) == list(made["subset/test"]) == CIFAR10
    assert sorted([*made["seen/train"], *made["unseen/train"]]) == CIFAR10
    assert len(made["seen/train"]) == len(made["unseen/test"]) == 5
    assert made["subset/train"]["truck"] == names[:1000] == made["unseen/train"]["truck"]
    assert made["seen/train"]["airplane"] == names and made["unseen/test"]["truck"] == names[:1]
    link = "runs/seen/train/airplane/0003.jpg"
    assert os.path.realpath(link) == os.path.realpath(".data/cifar10/train/airplane/0003.jpg")


def test_every_command_of_the_other_scripts_parses(echo):
    for script, arguments in (("cifar10_cpu_protocols", [".data/cifar10", "runs"]),
                              ("speed", [".data/cifar10", "images", "runs"])):
        os.makedirs("runs", exist_ok=True)
        count = 0
        for line in echo(script, *arguments):
            name, *flags = line.split()
            if name in ("eval_linear.py", "results/measures.py"):
                loaded(name).parse_args(flags)
            elif re.fullmatch(r"(simclr|byol|barlow|mae)_\w+\.py", name):
                settings_of(line)
            else:
                continue
            count += 1
        assert count >= 8, script


def test_the_figure_of_lengths_shows_mean_accuracy_over_passes(monkeypatch):
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, *_, **__: kept.append(self))
    loaded("results/tables.py").lengths_figure("x.png")
    line, = (line for line in kept[0].axes[0].lines if line.get_label() == "TC2")
    points = list(zip(line.get_xdata(), line.get_ydata()))
    for length, (cost, accuracy) in zip(("1", "4", "16"), points, strict=True):
        assert cost == pytest.approx(length_cost("tc2", length), rel=1e-3)
        accuracies = length_accuracies("tc2", length, length_folders("tc2", length))
        assert accuracy == pytest.approx(accuracies[:, 0].mean())


def test_a_backward_pass_for_each_task_is_counted_for_tc2s_rivals():
    tables = loaded("results/tables.py")
    for name in ("pcgrad", "gradvac", "graddrop"):
        cost = tables.COMBINED[f"simclr_{name}"]
        assert cost({"tasks": 1}) == pytest.approx(2)           # as SimCLR, two views
        assert cost({"tasks": 4}) == pytest.approx(2 * (1 / 3 + 4 * 2 / 3))
