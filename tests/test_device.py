"""What a GPU has to do like a CPU: CUDA_VISIBLE_DEVICES=0 pytest -q tests/test_device.py

All other tests run on the CPU. Without a GPU those of simclr_tc2.py compare the CPU with itself,
which only shows that the tests work.
"""
import importlib
import json

import pytest
import torch

import eval_linear
from conftest import SCRIPTS, rows, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTRA = [("simclr_tc2", "--second-order"), ("byol_gessl", "--hypergrad exact"),
         ("byol_gessl", "--hypergrad cg"), ("barlow_sparsehead", "--penalty bilevel"),
         ("mae_tc2", "--second-order")]
CASES = [*[(name, "") for name in SCRIPTS], *EXTRA]
if DEVICE == "cpu":
    SCRIPTS = SCRIPTS[:1]
    CASES = CASES[:1]
each_script = pytest.mark.parametrize("name", SCRIPTS)


def losses(name, out, *flags):
    """[{term: value} of each step] of a tiny run in the folder `out`."""
    main = importlib.import_module(name).main
    main(tiny(name, "--log-every", "1", "--workers", "0", "--out", str(out), *flags))
    return [row for row in rows(out) if "lr" in row]


def check_close(found, expected, tolerance):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        for name in b:
            if name.startswith("loss"):
                assert abs(a[name] - b[name]) <= tolerance * max(1, abs(b[name])), (name, a, b)


@pytest.mark.parametrize("name, flags", CASES)
def test_the_first_steps_are_those_of_a_cpu(name, flags, tmp_path):
    flags = [*flags.split(), "--no-bf16", "--max-steps", "2"]
    expected = losses(name, tmp_path / "cpu", "--device", "cpu", *flags)
    found = losses(name, tmp_path / "device", "--device", DEVICE, *flags)
    check_close(found[:1], expected[:1], 5e-3)          # convolutions in TF32
    check_close(found, expected, 5e-2)


@each_script
def test_bfloat16_begins_like_float32(name, tmp_path):
    steps = ("--max-steps", "1", "--device", DEVICE)
    full = losses(name, tmp_path / "full", "--no-bf16", *steps)
    half = losses(name, tmp_path / "half", "--bf16", *steps)
    check_close(half, full, 5e-2)
    assert half[0] != full[0]


@each_script
def test_a_run_goes_on_and_its_backbone_is_evaluated(name, tmp_path, capsys):
    flags = ("--device", DEVICE, "--no-bf16")
    whole = losses(name, tmp_path / "whole", *flags)
    losses(name, tmp_path / "parts", *flags, "--max-steps", "3")
    parts = losses(name, tmp_path / "parts", *flags)
    check_close(parts, whole, 1e-6 if DEVICE == "cpu" else 0.1)

    eval_linear.main([str(tmp_path / "parts"), "--device", DEVICE, "--workers", "0",
                      "--protocol", "linear", "knn", "spectrum"])
    with open(tmp_path / "parts" / "eval.json") as file:
        found = {row["metric"]: row["value"] for row in json.load(file)}
    assert 0 <= found["top1"] <= 100 and 0 <= found["k5_euclidean"] <= 100 and found["rank"] > 1


def test_the_step_runs_where_it_was_sent(tmp_path):
    losses("simclr_tc2", tmp_path / "run", "--device", DEVICE, "--max-steps", "1")
    assert rows(tmp_path / "run")[0]["settings"]["device"] == DEVICE
