"""results/readings.py: readings of TC2 that the script does not take, each as one changed step.

A step is compared, in float64 and with plain gradient descent, with a slow one on copies of the
network, whose losses are written from the paper for two support and two query views.
"""
import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import common
import simclr_tc2
from conftest import ROOT, checkpoint, losses, rows, same

spec = importlib.util.spec_from_file_location("readings", f"{ROOT}/results/readings.py")
readings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readings)

close = torch.testing.assert_close
LR = 0.1
each_reading = pytest.mark.parametrize("reading", list(readings.READINGS))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test has a folder of its own; pictures take longer than the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "plot_curves", print)
    monkeypatch.setattr(common, "draw_grid", print)


def read_as(reading, *flags, steps=2, out="r"):
    readings.main([reading, "--data", "fake", "--arch", "resnet_tiny", "--batch-size", "32",
                   "--image-size", "8", "--epochs", "1", "--warmup-epochs", "0",
                   "--log-every", "1", "--max-steps", str(steps), "--device", "cpu",
                   "--workers", "0", "--out", out, *flags])


# ---- through main --------------------------------------------------------------------------------
@each_reading
def test_two_steps_leave_a_run_and_finite_terms(reading):
    own = simclr_tc2.train_step
    read_as(reading)
    assert simclr_tc2.train_step is own                 # the script is itself again
    found = losses("r")
    for row in found:
        assert all(math.isfinite(value) for value in row.values())
    terms = [row for row in found if "lr" in row]
    assert [row["step"] for row in terms] == [1, 2]
    assert {"loss_query", "loss_support", "loss_v", "loss_w", "inner_step"} <= set(terms[0])
    assert rows("r")[0]["settings"]["script"] == f"tc2_{reading}"
    assert rows("r")[0]["argv"][:3] == [reading, "--data", "fake"]          # the whole command
    backbone = torch.load("r/backbone.pt", weights_only=True)
    common.make_backbone("resnet_tiny", 8)[0].load_state_dict(backbone["state_dict"])


@each_reading
def test_a_resumed_run_equals_an_uninterrupted_one(reading):
    read_as(reading, steps=3, out="whole")
    read_as(reading, steps=1, out="parts")
    read_as(reading, steps=3, out="parts")
    assert same(checkpoint("whole"), checkpoint("parts"))


@pytest.mark.parametrize("argv, word", [
    ([], "nothing"), (["query"], "query"), (["support", "--nothing", "1"], "--nothing"),
    (["support", "--baseline"], "--baseline"), (["features", "--literal"], "--literal"),
    (["features", "--second-order"], "--second-order"),
    (["features", "--without", "calibration"], "--without"),
    (["support", "--inner-lr", "0"], "--inner-lr 0"),
    (["features", "--factors", "16"], "--factors 16"),
    (["support", "--batch-size", "30"], "--batch-size 30")])
def test_bad_input_ends_in_one_sentence(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        readings.main([*argv, "--data", "fake"] if argv else argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error


def test_several_processes_are_refused(capsys):
    with pytest.raises(SystemExit):
        readings.replacements("support")["check_args"](None, None, 2)
    assert "2 processes" in capsys.readouterr().err


@each_reading
def test_out_is_named_after_the_reading(reading):
    args = make(reading, 0.1)[-1]
    assert (args.out, args.script) == (f"runs/tc2_{reading}", f"tc2_{reading}")


# ---- steps in float64 ----------------------------------------------------------------------------
def make(reading, inner_lr):
    """(nets, plain gradient descent, views (4, 8, 3, 8, 8), args): two tasks of four images."""
    functions = readings.replacements(reading)
    args = simclr_tc2.parse_args(["--data", "fake", "--arch", "resnet_tiny", "--image-size", "8",
                                  "--batch-size", "8", "--tasks", "2",
                                  "--inner-lr", str(inner_lr)])
    functions["fill_defaults"](args, common.load_data("fake", 8), torch.device("cpu"))
    torch.manual_seed(0)
    nets = functions.get("build_nets", simclr_tc2.build_nets)(args).double()
    opts = simclr_tc2.build_opts(nets, args)
    encoder = [*nets["backbone"].parameters(), *nets["projector"].parameters()]
    opts["encoder"] = torch.optim.SGD(encoder, LR)
    views = torch.randn(4, 8, 3, 8, 8, generator=common.rng("views"), dtype=torch.float64)
    return nets, opts, views, args


def unit(rows):
    return F.normalize(rows, dim=1)


def long_rows(rows):
    """At norm sqrt(d)."""
    return unit(rows) * rows.shape[1] ** 0.5


def slow_info_nce(a, b, temperature):
    """Each of the 2 n rows is classified among the others; its partner is the truth."""
    z = unit(torch.cat([a, b]))
    total = 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        logits = torch.stack([z[i] @ z[j] / temperature for j in others])
        partner = (i + len(a)) % len(z)
        total = total - logits.log_softmax(0)[others.index(partner)]
    return total / len(z)


def slow_brier(support, query, temperature):
    """Support and query: two views (n, d) each. Squared error of the n-way classification."""
    anchors = unit((unit(support[0]) + unit(support[1])) / 2)
    total = 0
    for view in query:
        p = (unit(view) @ anchors.T / temperature).softmax(1)
        total = total + (p - torch.eye(len(p), dtype=p.dtype)).square().sum(1).mean()
    return total / 2


def slow_outputs(reading, nets, x, calibrated):
    """Views x (m, n, 3, H, W) -> z_hat of each view, a list of (n, d)."""
    h = nets["backbone"](x.flatten(0, 1))
    if reading == "features":
        z_hat = nets["projector"](calibrated(long_rows(h)))
    else:
        z_hat = calibrated(long_rows(nets["projector"](h)))
    return z_hat.chunk(len(x))


@each_reading
@pytest.mark.parametrize("inner_lr", [0.01, 0.3])
def test_a_step_equals_a_slow_one_on_copies_of_the_network(reading, inner_lr):
    nets, opts, views, args = make(reading, inner_lr)
    before = copy.deepcopy(nets)
    terms = readings.READINGS[reading]["train_step"](nets, opts, views, args, 0)
    assert not same(nets["factor_net"].state_dict(), before["factor_net"].state_dict())
    assert not same(nets["weight_net"].state_dict(), before["weight_net"].state_dict())

    # Lines 2-3: the summary of what is calibrated, in one pass.
    first = copy.deepcopy(before)
    batch = torch.cat([views[:, :4].flatten(0, 1), views[:, 4:].flatten(0, 1)])
    Z = first["backbone"](batch)
    if reading == "support":
        Z = first["projector"](Z)
    Z = long_rows(Z).detach()
    V = nets["factor_net"](torch.cat([Z.mean(0)[None], Z.T.cov()])).detach()
    assert V.shape == (Z.shape[1], Z.shape[1] // 2)

    def calibrated(z):
        return nets["weight_net"](z, V) @ V.T

    total = [torch.zeros_like(p) for p in before.parameters()]

    def collect(net):
        for sum_, p in zip(total, net.parameters()):
            if p.grad is not None:
                sum_ += p.grad / 2

    support_losses = []
    query_losses = []
    for x in (views[:, :4], views[:, 4:]):
        adapted = copy.deepcopy(before)
        a, b = slow_outputs(reading, adapted, x[:2], calibrated)
        loss = slow_info_nce(a, b, args.temperature)
        loss.backward()
        support_losses.append(loss.detach())
        if reading == "support":
            collect(adapted)                            # Eq. 6 moves theta too
        with torch.no_grad():
            for p in adapted.parameters():
                if p.grad is not None:
                    p -= inner_lr * p.grad
                p.grad = None
        z_hat = slow_outputs(reading, adapted, x, calibrated)
        loss = slow_brier(z_hat[:2], z_hat[2:], args.temperature)
        loss.backward()
        query_losses.append(loss.detach())
        collect(adapted)
    close(terms["loss_support"], torch.stack(support_losses).mean())
    close(terms["loss_query"], torch.stack(query_losses).mean())

    with torch.no_grad():
        for p, g in zip(before.parameters(), total):
            p -= LR * g
    for name, value in nets.state_dict().items():
        if "running" in name or "num_batches" in name:  # of the one pass over all views
            close(value, first.state_dict()[name])
        elif name.startswith(("backbone", "projector")):
            close(value, before.state_dict()[name])


def test_factors_of_features_and_the_network_are_judged_by_the_same_losses():
    """With BatchNorm at fixed statistics and no step in between, Eqs. 4-5 and 6-7 agree."""
    nets, opts, views, args = make("features", 0.0)
    nets.eval()
    factors = [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()]
    opts["factors"] = torch.optim.SGD(factors, 0.0)
    terms = readings.features_step(nets, opts, views, args, 0)
    close(terms["loss_factors_support"], terms["loss_support"])
    close(terms["loss_factors_query"], terms["loss_query"])
    assert (terms["loss_support"] - terms["loss_query"]).abs() > 1e-3


def test_diagnosis_of_features():
    """At the start f_w projects: what it keeps of h, and the rank of what it keeps."""
    nets, _, views, args = make("features", 0.0)
    found = readings.diagnose_features(nets, views, args)
    H = long_rows(nets["backbone"](views.flatten(0, 1))).detach()
    V = nets["factor_net"](torch.cat([H.mean(0)[None], H.T.cov()])).detach()
    kept = (H @ V).square().sum() / H.square().sum()
    close(found["explained_by_w"], kept)
    p = torch.linalg.svdvals(H - H.mean(0))
    close(found["rank_h_batch"].double(), effective_rank(p))
    p = torch.linalg.svdvals(H @ V @ V.T - (H @ V @ V.T).mean(0))
    close(found["rank_h_hat"].double(), effective_rank(p))


def effective_rank(singular_values):
    """The exponential of the entropy of their shares. [Roy and Vetterli 2007]"""
    p = singular_values / singular_values.sum()
    p = p[p > 0]
    return (-(p * p.log()).sum()).exp()
