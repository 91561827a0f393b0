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
ACCURACIES = [("linear", "top1"), ("linear_adam", "top1"), ("knn", "k5_euclidean"),
              ("knn", "k200_cosine")]
T95 = {2: 12.706, 3: 4.3027, 4: 3.1824, 5: 2.7764}      # 97.5 % quantile of Student's t, by seeds
DIGIT = 0.0501                  # half of the last digit of a number with one

# Passes per image by row: 1 per view or mask, a third without gradient, the decoder alone a half.
# TC2's variants cost what TC2 does, on MAE without calibration too; SparseHead's 2.
PASSES = {
    "simclr_2views": 2, "simclr_2views_equal_passes": 2, "simclr_2views_equal_gessl": 2,
    "simclr_4views": 4, "simclr_4views_equal_passes": 4, "simclr_4views_512": 4, "simclr_t": 4,
    "simclr_t_2": 2, "seen_simclr_4views": 4, "seen_simclr_4views_equal_passes": 4,
    "seen_simclr_t": 4, "tc2_inner0": 16 / 3,
    "byol": 8 / 3, "byol_equal_passes": 8 / 3, "byol_large_batch": 8 / 3,
    "byol_large_batch_equal_passes": 8 / 3, "byol_large_batch_4epochs": 8 / 3,
    "lookahead": 28 / 3, "gessl_first_order": 34 / 3, "gessl": 40 / 3, "gessl_kl_only": 40 / 3,
    "gessl_ssl_4": 40 / 3, "gessl_alpha_0.005": 40 / 3, "gessl_lambda_1": 28 / 3,
    "gessl_lambda_5": 52 / 3, "gessl_lambda_10": 82 / 3,
    "mae": 1, "mae_2masks": 2, "mae_equal_passes": 1, "mae_tc2_inner0": 8 / 3,
    "byol_tc2": 20 / 3, "barlow_tc2": 16 / 3, "simclr_gessl": 38 / 3,
}
SECOND_ORDER = ("gessl_exact", "gessl_neumann", "gessl_cg")


def passes_per_image(row):
    if row in PASSES:
        return PASSES[row]
    if row.startswith("mae_tc2"):
        return 11 / 3
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
    if "first_edition" in folder:
        results = results["results"]
    return {(r["data"], r["protocol"], r["metric"]): r["value"] for r in results}


def judged(row):
    return "runs/unseen" if row.startswith("seen") else "runs/subset"


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


def folders_of(row, length):
    """{seed: folder}"""
    folders = glob.glob(f"{LOGS}/cifar10_lengths/length{length}/seed*/{row}")
    return {int(re.search(r"seed(\d+)/", folder)[1]): folder for folder in folders}


def accuracies_of(row, length, seeds):
    """(seeds, 4) accuracies, of the rows seen_* on the classes that they were not trained on."""
    found = []
    for seed in seeds:
        values = evaluation_of(folders_of(row, length)[seed])
        found.append([values[judged(row), *key] for key in ACCURACIES])
    return np.array(found)


def paired(a, b, length):
    both = sorted(set(folders_of(a, length)) & set(folders_of(b, length)))
    return accuracies_of(a, length, both) - accuracies_of(b, length, both)


ROW_TABLES = ["SimCLR and TC2", "BYOL and GeSSL", "Barlow Twins and SparseHead", "MAE and TC2",
              "Other bases", "Unseen classes"]


def test_tables_of_rows_hold_the_means_and_spreads_of_the_logs():
    seen = set()
    for title in ROW_TABLES:
        for name, length, n, images, passes, *cells in page_tables()[title]:
            row = name.strip("`")
            seen.add((length, row))
            folders = folders_of(row, length)
            assert len(folders) == int(n)
            logs = [log_of(folder) for folder in folders.values()]
            steps = {log[-1]["step"] for log in logs}
            assert len(steps) == 1
            thousands = steps.pop() * logs[0][0]["settings"]["images_per_step"] / 1e3
            assert int(images) == round(thousands)
            if row in SECOND_ORDER:                     # second derivatives are no passes
                assert passes == ""
            else:
                assert int(passes) == round(thousands * passes_per_image(row))
            for cell, column in zip(cells, accuracies_of(row, length, folders).T):
                check_spread(cell, column)
            check_further(title, cells[4:], logs)
    there = glob.glob(f"{LOGS}/cifar10_lengths/length*/seed*/*")
    there = {tuple(re.search(r"length(\d+)/seed\d+/(.+)", folder).groups()) for folder in there}
    assert seen == there and len(seen) > 75


def check_further(title, cells, logs):
    """The columns behind the accuracies, by table: (key in the log, unit, half of a digit)."""
    columns = [("std_z", 1, 5.01e-3), ("rank_h", 1, 0.501)]
    if title == "MAE and TC2":
        columns = [("loss_reconstruction", 1, 5.01e-4), ("rank_h", 1, 0.501)]
    if title == "Barlow Twins and SparseHead":
        columns = [("std_z", 1, 5.01e-3),
                   ("live_columns", 100, DIGIT), ("zero_columns", 100, DIGIT),
                   ("l21_normalized", 1, 5.01e-4), ("frobenius", 1, 5.01e-3),
                   ("rank_r", 1, DIGIT), ("rank_z", 1, DIGIT)]
    for cell, (key, unit, digit) in zip(cells, columns, strict=True):
        if cell == "":                                  # a combination may not log it
            assert not any(key in line for log in logs for line in log)
        else:
            check_logged(float(cell) / unit, logs, key, digit / unit)


@pytest.mark.parametrize("title", ["Differences", "Differences of settings"])
def test_differences_hold_paired_means_and_corrected_p_values(title):
    lines = page_tables()[title]
    p_values = []
    for name, length, n, *cells, _ in lines:
        found = paired(*re.findall(r"`(\S+)`", name), length)
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
        folders = folders_of(row, length)
        return np.array([[evaluation_of(folders[seed])[key] for key in keys] for seed in seeds])

    lines = page_tables()["Transfer to unseen classes"]
    for name, length, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        both = sorted(set.intersection(*(set(folders_of(row, length)) for row in rows)))
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


def test_claims_stand_beside_the_differences_of_the_logs():
    lines = page_tables()["The claims"]
    p_values = {}                                       # of each comparison, once: (printed, own)
    for _, name, length, n, _, *cells in lines:
        method, base = re.findall(r"`(\w+)`", name)
        at_images, p_images, at_passes, p_passes, visible, _, knn_images, knn_passes = cells
        found = paired(method, base, length)
        check_interval(at_images, found[:, 0])
        check_interval(knn_images, found[:, 2])
        p_values[method, length, at_images, knn_images] = p_images, two_sided_p(found[:, 0])
        # The base at equal passes sees as many passes as the method, or up to 9 % more.
        cost = cost_of(method, length)
        matches = {}
        for row in (row for _, row in all_rows(length) if row.startswith(base[:4])):
            if cost <= 1.005 * cost_of(row, length) <= 1.1 * cost:
                column = paired(method, row, length)
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
        accuracies = accuracies_of(row, length, folders_of(row, length))
        return cost_of(row, length), accuracies[:, 0].mean()

    rows = ("simclr_2views", "simclr_2views_equal_passes", "simclr_2views_equal_gessl")
    there = [(row, length) for row in rows for length in ("1", "4", "16")
             if folders_of(row, length)]
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
        rows = [folders_of(row, length) for row in (a, b) for length in (short, long)]
        common = sorted(set.intersection(*map(set, rows)))
        assert len(common) == int(n) > 1
        found = []
        for length in (long, short):
            found.append(accuracies_of(a, length, common)
                         - accuracies_of(b, length, common))
        changes = found[0] - found[1]
        for cell, column in zip(cells, changes.T, strict=True):
            check_interval(cell, column)
        p_values.append(two_sided_p(changes[:, 0]))
    assert len(lines) > 3
    check_holm([line[-1] for line in lines], p_values)


def test_p_values_in_the_prose_stand_in_the_tables():
    printed = {row[-1] for title in ("Change with length", "Differences", "Differences of settings")
               for row in page_tables()[title]}
    count = 0
    for page in ("README", "notes", "tc2", "gessl", "sparsehead", "mae"):
        for line in source(f"results/{page}.md").splitlines():
            for p in [] if line.startswith("|") else re.findall(r"\bp (0\.\d+)", line):
                count += 1
                assert p in printed, f"{page}: p {p}"
    assert count >= 3


def smallest_visible(base, length, n):
    """See `test_visible_is_the_gain_that_a_paired_test_finds_four_times_in_five`."""
    residuals = []              # of each difference, about its own mean
    freedom = 0
    for name, at, *_ in page_tables()["Differences"]:
        a, b = re.findall(r"`(\w+)`", name)
        if at == length and b.split("_")[0] == base.split("_")[0]:
            linear = paired(a, b, length)[:, 0]
            residuals.extend(linear - linear.mean())
            freedom += len(linear) - 1
    variance = np.square(residuals).sum() / freedom
    return {3: 5.653, 4: 4.256, 5: 3.761}[n] * (variance / n) ** 0.5


def all_rows(length):
    folders = glob.glob(f"{LOGS}/cifar10_lengths/length{length}/seed*/*")
    return {(length, os.path.basename(folder)) for folder in folders}


def cost_of(row, length):
    """Thousands of passes."""
    log = log_of(next(iter(folders_of(row, length).values())))
    return log[-1]["step"] * log[0]["settings"]["images_per_step"] * passes_per_image(row) / 1e3


def check_logged(cell, logs, key, digit):
    """The mean of what the runs logged last under `key`."""
    last = [[line[key] for line in log if key in line][-1] for log in logs]
    assert abs(float(cell) - np.mean(last)) <= digit


def measured(row, length, seeds, keys):
    """(seeds, keys) numbers of each run's last evaluation."""
    folders = folders_of(row, length)
    found = []
    for seed in seeds:
        line = [line for line in log_of(folders[seed]) if "rank_h" in line][-1]
        found.append([line[key] for key in keys])
    return np.array(found)


@pytest.mark.parametrize("title, keys, digit", [
    ("Task conflict", ["conflict_cos_raw"], 5.01e-3),
    ("Adaptation", ["adapted_before", "adapted_after"], DIGIT)])
def test_tables_of_the_last_batch_hold_what_was_logged_there(title, keys, digit):
    lines = page_tables()[title]
    differences = 0
    for name, length, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        both = sorted(set.intersection(*(set(folders_of(row, length)) for row in rows)))
        assert len(both) == int(n)
        found = measured(rows[0], length, both, keys)
        check = check_spread
        if len(rows) == 2:
            found = found - measured(rows[1], length, both, keys)
            check = check_interval
            differences += 1
        if len(keys) == 2:
            found = np.column_stack([found, found[:, 1] - found[:, 0]])
        for cell, column in zip(cells, found.T, strict=True):
            check(cell, column, digit)
    assert differences >= 4 and len(lines) >= 10


def test_the_table_of_fine_tuning_holds_what_the_evaluations_say():
    keys = [("finetune", "1%_top1"), ("finetune", "10%_top1"), ("finetune", "10%_train_top1"),
            ("linear", "top1")]
    lines = page_tables()["Fine-tuning"]
    assert len(lines) == 12

    def numbers(row):
        """(seeds, keys)"""
        folders = sorted(glob.glob(f"{LOGS}/first_edition/seed*/{row}"))
        found = [[evaluation_of(folder)["runs/subset", *key] for key in keys] for folder in folders]
        return np.array(found)

    for name, n, *cells in lines:
        rows = re.findall(r"`(\w+)`", name)
        found = numbers(rows[0])
        check = check_spread
        if len(rows) == 2:
            found = found - numbers(rows[1])
            check = check_interval
            base, = glob.glob(f"{LOGS}/first_edition/seed0/{rows[1]}")
            assert log_of(base)[0]["settings"]["baseline"]
        assert len(found) == int(n) == 3
        for cell, column in zip(cells, found.T, strict=True):
            check(cell, column)


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


def test_the_figure_is_drawn_without_a_display(tables, tmp_path):
    tables.lengths_figure(tmp_path / "figure.png")
    with open(tmp_path / "figure.png", "rb") as file:
        head = file.read(24)
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    assert head[1:4] == b"PNG" and width > 600 and height > 400
    assert "pyplot" not in source("results/tables.py")


# ---- scripts -------------------------------------------------------------------------------------
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


def test_a_row_by_name_is_trained_and_evaluated_by_one_command(echo):
    lines = echo("cifar10_lengths", ".data/cifar10", "runs", "4", "2", "seen_tc2", "rownorm")
    assert [line.split()[0] for line in lines] == [
        "simclr_tc2.py", "eval_linear.py", "eval_linear.py", "barlow_sparsehead.py",
        "eval_linear.py"]
    assert settings_of(lines[0])["epochs"] == 16 and settings_of(lines[0])["seed"] == 2
    assert lines[2].startswith("eval_linear.py runs/length4/seed2/seen_tc2 --data runs/unseen")


def test_the_subsets_are_links_to_the_first_images_of_each_class(echo):
    echo("cifar10_lengths", ".data/cifar10", "runs", "1", "0", "tc2")
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


def test_every_command_of_the_timing_script_parses(echo):
    os.makedirs("runs")
    count = 0
    for line in echo("speed", ".data/cifar10", "images", "runs"):
        name, *flags = line.split()
        if name == "eval_linear.py":
            loaded(name).parse_args(flags)
        elif re.fullmatch(r"(simclr|byol|barlow|mae)_\w+\.py", name):
            settings_of(line)
        else:
            continue
        count += 1
    assert count >= 8


def test_the_figure_of_lengths_shows_mean_accuracy_over_passes(monkeypatch):
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, *_, **__: kept.append(self))
    loaded("results/tables.py").lengths_figure("x.png")
    line, = (line for line in kept[0].axes[0].lines if line.get_label() == "TC2")
    points = list(zip(line.get_xdata(), line.get_ydata()))
    for length, (cost, accuracy) in zip(("1", "4", "16"), points, strict=True):
        assert cost == pytest.approx(cost_of("tc2", length), rel=1e-3)
        accuracies = accuracies_of("tc2", length, folders_of("tc2", length))
        assert accuracy == pytest.approx(accuracies[:, 0].mean())


def test_a_backward_pass_for_each_task_is_counted_for_tc2s_rivals():
    tables = loaded("results/tables.py")
    for name in ("pcgrad", "gradvac", "graddrop"):
        cost = tables.COMBINED[f"simclr_{name}"]
        assert cost({"tasks": 1}) == pytest.approx(2)           # as SimCLR, two views
        assert cost({"tasks": 4}) == pytest.approx(2 * (1 / 3 + 4 * 2 / 3))
