"""The papers' own measures of a run, one function each, beside its equation.

  python results/measures.py runs/simclr_tc2                      all measures
  python results/measures.py runs/byol_gessl --measure adaptation --overlay runs/byol_gessl-baseline
  python results/measures.py runs/barlow_sparsehead --measure spectrum distance-ratio

  sigma           -log pi_y of the views of unseen images; log N = nothing learned [GeSSL Def. 3.2]
  adaptation      accuracy on a training task before and after one step on it, from the run's log;
                  its ratio r to --overlay, a baseline with as many views and images per task;
                  adaptation.png [GeSSL Def. 3.1, Table 15]
  conflict        cosine between the gradients of two halves of a batch, negative ones; conflict.png
                  over training, where the log has it [TC2 Fig. 1b/c]
  spectrum        eigenvalues and effective rank of representation and embedding; spectra.png
                  [SparseHead Figs. 1, 3]
  distance-ratio  (farthest - nearest) / nearest distance, of both [SparseHead Eq. 9]

RUN is a folder with backbone.pt. The embedding needs last.pt, from which the run's own
script, one of the four, builds its projector. Results stand beside those of eval_linear.py in
RUN/eval.json.

Where this differs from the papers. sigma: Eq. 1 has KL(pi | one-hot), which is infinite for every
pi but the one-hot one; here is KL(one-hot | pi) = -log pi_y (in the worked example of Appendix B.1
-ln 0.81 = 0.2107; the paper prints 0.0924). It is of the instance task alone; Figs. 5 and
6 have five image and five video tasks. Temperature: the one with the lowest sigma on other images.
distance-ratio: Eq. 9 has raw distances; here the rows are normalised first, as InfoNCE sees them,
so that runs of different norms compare. Large values can mean collapse: look at `_std` too.
"""
import argparse
import importlib
import math
import os
import shlex
import sys
import types

import torch
import torch.nn.functional as F
from torch.func import functional_call

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import (SMALL, Data, batch_stats_only, effective_rank, embedding_std, fail,
                    load_torch, number, read_log, run, training_batches)
from eval_linear import Job, check_args, draw_spectra, eigenvalues, evaluate, interval, job_parser
from simclr_tc2 import AUGMENTATION, gradient_conflict, info_nce

SCRIPTS = ("simclr_tc2", "byol_gessl", "barlow_sparsehead", "mae_tc2")
TEMPERATURES = [10 ** (i / 8) for i in range(-16, 1)]           # 0.01 to 1
MAX_TASKS = 32
CONFLICT_TEMPERATURE = 0.2


# ---- tasks and spaces ----------------------------------------------------------------------------
class MeasureJob(Job):
    """What the measures need: a run, its images and features, and its projector."""
    def __init__(self, args):
        super().__init__(args)
        self.projector = load_projector(self)


def load_projector(job):
    """The frozen projector h -> z of the run's last.pt; None where there is none."""
    path = f"{job.args.run}/last.pt"
    name = job.settings.get("script")
    if not os.path.isfile(path):
        return None
    if name not in SCRIPTS:
        print(f"  {path} is of {name}: the representation alone is measured")
        return None
    saved = load_torch(path, f"RUN {job.args.run}", ("nets",))
    nets = importlib.import_module(name).build_nets(argparse.Namespace(**job.settings))
    nets.load_state_dict(saved["nets"])
    if "projector" not in nets:
        return None
    return nets["projector"].to(job.device).eval().requires_grad_(False)


def spaces(job, h):
    """{"representation": h, "embedding": z} of h (n, d), the second where there is a projector."""
    found = {"representation": h}
    if job.projector:
        found["embedding"] = torch.cat([job.projector(rows) for rows in h.split(4096)])
    return found


def task_views(job, split, count):
    """Yield `count` tasks of two views of N images, (2, N, 3, S, S).

    SimCLR's views for every run, whatever it was trained on, so that runs compare."""
    part = getattr(job, split)
    size = job.state["image_size"]
    augmentation = AUGMENTATION["small" if size <= SMALL else "imagenet"]
    augmentation = {**augmentation, "mean": job.state["mean"], "std": job.state["std"]}
    data = Data(job.data, part.images, part.labels, [], None, size, None, "")
    settings = types.SimpleNamespace(images_per_step=job.args.task_size, image_size=size,
                                     seed=job.args.seed, workers=job.args.workers)
    batches = training_batches(data, [augmentation] * 2, settings, 0, 1, job.device, 0, count)
    for views, _ in batches:
        yield views


def count_tasks(job, split, at_least):
    """How many tasks of different images there are, at most MAX_TASKS."""
    images = len(getattr(job, split).labels)
    N = job.args.task_size
    if images < at_least * N:
        fail(f"--task-size {N}: {at_least} such tasks need more than the {images} {split} images")
    return min(MAX_TASKS, images // N)


# ---- GeSSL ---------------------------------------------------------------------------------------
def pair_logits(h, temperature):
    """Every view classified among the n images of the other view, h (2, n, d) -> (2 n, n).

    Row i belongs to image i mod n. h is centred: features after a ReLU share an offset."""
    h = F.normalize(h - h.mean((0, 1)), dim=2)
    return (h @ h.flip(0).mT / temperature).flatten(0, 1)


def own_image(h):
    return torch.arange(h.shape[1], device=h.device).repeat(2)


def sigma(tasks, temperature):
    """Mean over tasks and views of KL(one-hot | pi) = -log pi_y: tasks (T, 2, n, d) -> scalar.

    The direction is swapped, see above. [GeSSL Definition 3.2]"""
    losses = [F.cross_entropy(pair_logits(h, temperature), own_image(h)) for h in tasks]
    return torch.stack(losses).mean()


def instance_accuracy(tasks):
    """Percent of views whose own image is the nearest: tasks (T, 2, n, d)."""
    right = [pair_logits(h, 1).argmax(1) == own_image(h) for h in tasks]
    return 100 * torch.cat(right).float().mean()


def best_temperature(tasks):
    """The one of TEMPERATURES with the lowest sigma."""
    def sigma_at(temperature):
        return sigma(tasks, temperature).item()

    return min(TEMPERATURES, key=sigma_at)


@torch.no_grad()
def measure_sigma(job):
    """Sigma, accuracy and temperature in each space; the temperature is that of other tasks."""
    count = count_tasks(job, "test", at_least=2) // 2
    found = {}
    tasks = {}
    for views in task_views(job, "test", 2 * count):
        h = job.backbone(views.flatten(0, 1)).float()
        for space, z in spaces(job, h).items():
            tasks.setdefault(space, []).append(z.unflatten(0, (2, -1)))
    for space, h in tasks.items():
        temperature = best_temperature(h[count:])
        found[space] = sigma(h[:count], temperature).item()
        found[f"{space}_accuracy"] = instance_accuracy(h[:count]).item()
        found[f"{space}_temperature"] = temperature
    found["log_n"] = math.log(job.args.task_size)
    return found


def adaptation_curve(folder):
    """{epoch: (accuracy in percent before, after one step)} from a run's log.

    The script takes the step at each evaluation: Eq. 2, on the model's own loss, with its own head
    and rate. [GeSSL Definition 3.1, Table 15]"""
    rows = read_log(folder)
    settings = rows[0].get("settings", {}) if rows else {}
    curve = {}
    for row in rows:
        if "adapted_after" in row:
            per_epoch = settings["images"] // settings["images_per_step"]
            epoch = row["step"] / per_epoch
            curve[epoch] = (row["adapted_before"], row["adapted_after"])
    if not curve:
        fail(f"{folder}: its log has no adapted_after, which simclr_tc2.py and byol_gessl.py write")
    return curve


def adaptation_task(folder):
    """What the accuracies depend on beside the weights: base, views, images of a task, step."""
    rows = read_log(folder)
    s = rows[0].get("settings", {}) if rows else {}
    if s.get("script") == "byol_gessl":
        return "BYOL", 2, s["batch_size"], s["inner_lr"]
    if s.get("script") == "simclr_tc2":
        K = s["tasks"] if s["tasks"] > 1 else 4             # as in `diagnose` there
        return "SimCLR", s["views"], s["images_per_step"] // K, s["inner_lr"]
    fail(f"{folder}: is no run of simclr_tc2.py or byol_gessl.py, which log adaptation")


def performance_ratio(baseline, curve):
    """{epoch: r}, r = accuracy after the step of the baseline / of the run, at the same epochs.

    Below 1: the run adapts better. [GeSSL Table 15]"""
    ratio = {}
    for epoch in baseline.keys() & curve.keys():
        if curve[epoch][1] > 0:
            ratio[epoch] = baseline[epoch][1] / curve[epoch][1]
    return dict(sorted(ratio.items()))


def measure_adaptation(job):
    """The last accuracies before and after the step, the last r to each --overlay."""
    curves = {name: adaptation_curve(name) for name in [job.args.run, *job.args.overlay]}
    curve = curves[job.args.run]
    found = {}
    found["before"], found["after"] = curve[max(curve)]
    ratios = {}
    for other in job.args.overlay:
        own, theirs = adaptation_task(job.args.run), adaptation_task(other)
        if own != theirs:
            fail(f"--overlay {other}: r compares equal tasks; base, views, images of a task and "
                 f"step are {theirs} there and {own} in {job.args.run}")
        ratio = performance_ratio(curves[other], curve)
        if not ratio:
            fail(f"--overlay {other}: has no evaluation at an epoch of {job.args.run}")
        ratios[other] = ratio
        found[f"r_{other}"] = ratio[max(ratio)]
    if job.writable:
        draw_adaptation(f"{job.args.run}/adaptation.png", curves, ratios)
    return found


def draw_adaptation(path, curves, ratios, caption=""):
    """Left: accuracies over epochs, before (dashed) and after. Right: r."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, curve) in enumerate(curves.items()):
        before, after = zip(*curve.values())
        left.plot(list(curve), after, f"C{i}.-", label=f"{name}, after a step")
        left.plot(list(curve), before, f"C{i}.--", label=f"{name}, before")
    for name, ratio in ratios.items():
        right.plot(list(ratio), list(ratio.values()), ".-", label=f"{name} / {next(iter(curves))}")
        right.legend(fontsize="small")
    right.axhline(1, color="gray", linewidth=0.8)
    left.set(title="accuracy on a training task", xlabel="epoch", ylabel="percent")
    right.set(title="performance ratio r", xlabel="epoch")
    left.legend(fontsize="small")
    figure.supxlabel(caption, fontsize="small")
    figure.savefig(path, dpi=110)


# ---- TC2 -----------------------------------------------------------------------------------------
def halves_conflict(job, names, params, views):
    """(cosine, 1 if negative) between the gradients of InfoNCE on two halves of views (2, N, ..).

    On the embedding, or the representation of a run without a projector. [TC2 Fig. 1b/c]"""
    theta = dict(zip(names, params))
    gradients = []
    for half in views.chunk(2, dim=1):                          # two tasks of N / 2 images
        with batch_stats_only(job.backbone):
            z = functional_call(job.backbone, theta, (half.flatten(0, 1),)).float()
        if job.projector:
            with batch_stats_only(job.projector):
                z = job.projector(z)
        loss = info_nce(z.unflatten(0, (2, -1)), CONFLICT_TEMPERATURE)
        grads = torch.autograd.grad(loss, params, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(gradient_conflict(torch.stack(gradients)))


def measure_conflict(job):
    """Mean cosine, with an interval of 1.96 standard errors (95 % from some 30 tasks on), and share
    of negative ones over training tasks."""
    count = count_tasks(job, "train", at_least=2)
    names = [name for name, _ in job.backbone.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in job.backbone.parameters()]
    # BatchNorm as in training: the statistics are those of the task.
    nets = [net for net in (job.backbone, job.projector) if net]
    for net in nets:
        net.train()
    found = [halves_conflict(job, names, params, views)
             for views in task_views(job, "train", count)]
    for net in nets:
        net.eval()
    cosine, negative = torch.stack(found).T
    mean, half = interval(cosine)
    if job.writable:
        draw_conflict(f"{job.args.run}/conflict.png", [job.args.run, *job.args.overlay])
    return {"cosine": mean, "cosine_pm": half, "negative_share": negative.mean().item()}


def draw_conflict(path, runs):
    """Cosine between the tasks' gradients over training, from the logs that have it."""
    curves = {}
    for name in runs:
        for row in read_log(name):
            for key in ("conflict_cos_raw", "conflict_cos_calibrated"):
                if key in row:
                    label = f"{name}, {key.removeprefix('conflict_cos_')} z"
                    curves.setdefault(label, []).append((row["step"], row[key]))
    if not curves:
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.add_subplot()
    for label, points in curves.items():
        axis.plot(*zip(*points), ".-", label=label)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set(title="task conflict", xlabel="step", ylabel="mean cosine of the tasks' gradients")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ---- SparseHead ----------------------------------------------------------------------------------
@torch.no_grad()
def measure_spectrum(job):
    """Effective rank of r and z of the test images, and a picture. [SparseHead Figs. 1, 3]"""
    found = {}
    panels = {}
    for space, x in spaces(job, job.features("test")[0]).items():
        values = eigenvalues(x).cpu()
        panels[space] = {job.args.run: values}
        found[f"{space}_rank"] = effective_rank(x).item()
        found[f"{space}_above_1e-6"] = (values > 1e-6 * values[0]).sum().item()
    for other in job.args.overlay:
        of_other = job.of(other)
        for space, x in spaces(of_other, of_other.features("test")[0]).items():
            panels.setdefault(space, {})[other] = eigenvalues(x).cpu()
    if job.writable:
        draw_spectra(f"{job.args.run}/spectra.png", panels)
    return found


def distance_ratio(z):
    """M (n,) = (max - min) / min of each row's distances to the others, z (n, d).

    Rows are normalised first; Eq. 9 has raw distances. [SparseHead Eq. 9]"""
    z = F.normalize(z, dim=1)
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = distance.max(1).values
    nearest = distance.fill_diagonal_(torch.inf).min(1).values.clamp(min=1e-12)
    return (farthest - nearest) / nearest


@torch.no_grad()
def measure_distance_ratio(job):
    """Median and lowest tenth of M over up to 5,000 test images, spread of the directions."""
    h, _, _ = job.features("test")
    found = {}
    step = math.ceil(len(h) / 5000)                 # files come class by class
    for space, z in spaces(job, h[::step]).items():
        ratio = distance_ratio(z)
        found[space] = ratio.median().item()
        found[f"{space}_tenth"] = ratio.quantile(0.1).item()
        found[f"{space}_std"] = embedding_std(z).item()         # 0 = collapsed, 1 = isotropic
    return found


# ---- flags ---------------------------------------------------------------------------------------
MEASURES = {"sigma": measure_sigma, "adaptation": measure_adaptation, "conflict": measure_conflict,
            "spectrum": measure_spectrum, "distance-ratio": measure_distance_ratio}
SETTINGS = {"sigma": ("task_size", "seed"), "conflict": ("task_size", "seed")}


def parse_args(argv=None):
    p = job_parser(__doc__)
    p.add_argument("--measure", nargs="+", choices=tuple(MEASURES), metavar="MEASURE",
                   help="one or more of those above (default: all that the run has)")
    p.add_argument("--task-size", type=number(int, 4), default=64,
                   help="sigma, conflict: N, images of a task (default: 64)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_args(args)
    job = MeasureJob(args)
    names = args.measure
    if names is None:
        runs = [args.run, *args.overlay]
        logged = all(any("adapted_after" in row for row in read_log(name)) for name in runs)
        names = [name for name in MEASURES if logged or name != "adaptation"]
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["results/measures.py", *argv])
    evaluate(job, {name: MEASURES[name] for name in names}, SETTINGS, command)


if __name__ == "__main__":
    run(main, advice="measure a smaller --task-size, or on --device cpu")
