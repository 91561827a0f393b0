"""Benchmarks, never timed tests: python tests/bench.py [augment] [decode] [step] [hypergrad] [masks] [probe]

Every figure is a ratio of two things measured alternately in this run, so that a busy machine disturbs both alike: median over rounds,
with the spread. augment and decode use one thread: images per second and core.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time

import torch
from PIL import Image
from torchvision import transforms as T

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import barlow_sparsehead
import byol_gessl
import common
import eval_linear
import mae_tc2
import simclr_tc2


def alternate(first, second, rounds):
    """Seconds of two functions, called in turn: (median, median, median ratio first / second, its range)."""
    def seconds(f):
        begun = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return *(statistics.median(column) for column in zip(*pairs)), statistics.median(ratios), (min(ratios), max(ratios))


def pil_pipeline(recipe, size):
    """What the short peers do: one Pillow image after the other."""
    jitter = T.RandomApply([T.ColorJitter(*recipe["jitter"])], recipe["jitter_p"])
    blur = [T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], recipe["blur_p"])] if recipe["blur_p"] else []
    return T.Compose([T.RandomResizedCrop(size, recipe["crop"]), T.RandomHorizontalFlip(recipe["flip"]), jitter, T.RandomGrayscale(recipe["gray_p"]),
                      *blur, T.ToTensor(), T.Normalize(recipe["mean"], recipe["std"])])


def augment(rounds):
    torch.set_num_threads(1)
    images = common.load_data("shapes").train[:512]
    pictures, pipeline = [T.functional.to_pil_image(x) for x in images], pil_pipeline(simclr_tc2.WEAK, 32)
    pil, ours, ratio, spread = alternate(lambda: torch.stack([pipeline(p) for p in pictures]),
                                         lambda: common.augment(images, simclr_tc2.WEAK, common.rng(1), 32), rounds)
    print(f"augment 32 px      Pillow {512 / pil:8.0f} views/s   ours {512 / ours:8.0f} views/s   {ratio:5.1f}x ({spread[0]:.1f} to {spread[1]:.1f}), one core")


def decode(rounds):
    torch.set_num_threads(1)
    names, folder = [], tempfile.TemporaryDirectory()
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 32, generator=common.rng(1)), (375, 500), mode="bicubic")[0].clamp(0, 1)
    for i in range(8):
        names.append(os.path.join(folder.name, f"{i}.jpg"))
        T.functional.to_pil_image((noise + 0.04 * torch.randn(3, 375, 500, generator=common.rng(i))).clamp(0, 1)).save(names[-1], quality=90)
    pipeline, files = pil_pipeline(simclr_tc2.STRONG, 224), common.Files("bench", names, 224, None, 0, 2, simclr_tc2.STRONG)
    def per_sample():
        for name in names:
            image = Image.open(name).convert("RGB")
            pipeline(image), pipeline(image)
    pil, ours, ratio, spread = alternate(per_sample, lambda: [files[0, i] for i in range(8)], rounds)
    only = alternate(lambda: [common.decode(n) for n in names], lambda: None, rounds)[0]
    print(f"decode, 2 crops    Pillow {8 / pil:8.1f} images/s  ours {8 / ours:8.1f} images/s  {ratio:5.1f}x ({spread[0]:.1f} to {spread[1]:.1f}), one core; "
          f"decoding alone {8 / only:.1f}; a file has {os.path.getsize(names[0]) / 1e3:.0f} KB")
    folder.cleanup()


def prepared(script, extra):
    """(args, nets, opts, views) of one step of a script at its `shapes` defaults, on random images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args, data = script.parse_args(extra), common.load_data("shapes")
    common.resolve(args, script.RECIPES, data, "x")
    per_step = script.check_args(args, data, 1)
    torch.manual_seed(0)
    nets = script.build_nets(args)[0].to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    return args, nets, script.build_opts(nets, args), [torch.randn(per_step, 3, args.image_size, args.image_size, device=device) for _ in range(args.views)]


def step(rounds, argv):
    """Time of train_step over the time of its own forward and backward passes, on ready-made tensors."""
    torch.set_num_threads(2)
    for script, own_passes, flags in ((simclr_tc2, tc2_passes, ("--baseline", "--baseline --views 4", "", "--inner-lr 0", "--second-order")),
                                      (byol_gessl, gessl_passes, ("--baseline", "", "--hypergrad first-order", "--hypergrad exact", "--lookahead")),
                                      (barlow_sparsehead, barlow_passes, ("--baseline", "", "--penalty prox")),
                                      (mae_tc2, mae_passes, ("--baseline", "", "--batch-size 64 --baseline", "--batch-size 64 --masks 4 --tasks 4"))):
        for extra in flags:
            args, nets, opts, views = prepared(script, [*argv, *extra.split()])
            run = lambda: script.train_step(nets, opts, views, args, 0)
            whole, own, ratio, spread = alternate(run, own_passes(args, nets, views), rounds)
            print(f"step {script.SCRIPT + ' ' + (extra or 'default'):<40} {1e3 * whole:8.1f} ms   own passes {1e3 * own:8.1f} ms   {ratio:5.2f}x ({spread[0]:.2f} to {spread[1]:.2f})   "
                  f"{peak_memory(run) / 2**20:7.1f} MiB above the networks")


def tc2_passes(args, nets, views):
    encoder, device = torch.nn.Sequential(nets["backbone"], nets["projector"]), views[0].device
    m_support, tasks = args.views // 2, [torch.cat(parts) for parts in zip(*(v.chunk(args.tasks) for v in views))]
    params, S = list(encoder.parameters()), torch.randn(args.dim + 1, args.dim, device=device)
    ssl = lambda z: simclr_tc2.info_nce(z, args.temperature)
    error = lambda z: simclr_tc2.query_sse(z[m_support:], simclr_tc2.prototypes(z[:m_support]), args.temperature)
    embed = lambda x, v: simclr_tc2.embed(encoder, x, args).unflatten(0, (v, -1))
    def passes():
        if args.baseline:
            return torch.autograd.grad(ssl(embed(torch.cat(views), args.views)), params)
        with torch.no_grad():
            Z = embed(torch.cat(tasks), args.views)
        for rows, loss in ((Z[:m_support], ssl), (Z, error)):                           # stage 1: f_v and f_w, on support, then on query
            V_now = nets["factor_net"](S)
            W = nets["weight_net"](rows, V_now)
            (sum(map(loss, (W @ V_now.T).chunk(args.tasks, 1))) + simclr_tc2.factor_loss(Z, V_now) + args.lambda_s * simclr_tc2.weight_loss(rows, W, V_now)).backward()
        V = nets["factor_net"](S).detach()
        for task in tasks:                                                              # stage 2
            grads = [torch.zeros(())]
            for rows, v, loss in ((task[:len(task) // 2], m_support, ssl), (task, args.views, error))[not args.inner_lr:]:
                value = loss(simclr_tc2.calibrate(embed(rows, v), V, nets["weight_net"]))
                grads = torch.autograd.grad(value + sum(g.sum() for g in grads) * args.second_order, params, create_graph=args.second_order and loss is ssl)
    return passes


def gessl_passes(args, nets, views):
    """Per task: K + lambda inner gradients, one of the KL, one per finite difference, and two passes without gradient (target, z')."""
    online = torch.nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"])
    params, embed = list(online.parameters()), lambda x: byol_gessl.embed(online, x, args)
    def passes():
        for x in map(torch.cat, zip(*(v.chunk(1 if args.baseline else args.tasks) for v in views))):
            with torch.no_grad():
                z_target = byol_gessl.embed(nets["target"], x, args)
                0 if args.baseline else embed(x)
            ssl = lambda: byol_gessl.byol_loss(embed(x), z_target)
            K, exact = args.inner_steps, args.hypergrad == "exact" and not args.lookahead
            for _ in range(1 if args.baseline else args.target_steps + K * (args.hypergrad == "fd" and not args.lookahead) + K * (not exact)):
                torch.autograd.grad(ssl(), params)
            for _ in range(K * exact * (not args.baseline)):
                g = torch.autograd.grad(ssl(), params, create_graph=True)
                torch.autograd.grad(sum(t.sum() for t in g), params, materialize_grads=True)
            if not (args.baseline or args.lookahead):
                logits = byol_gessl.class_logits(embed(x), z_target, args.temperature)
                torch.autograd.grad(byol_gessl.self_motivated_kl(logits.detach() + 0.1, logits), params)
    return passes


def barlow_passes(args, nets, views):
    def passes():
        _, (z1, z2) = barlow_sparsehead.embed(nets, views, args)
        loss = sum(barlow_sparsehead.barlow_terms(z1, z2, args.lambda_offdiag)) + args.lambda_sparse * barlow_sparsehead.sparse_penalty(nets["projector"][-1].weight, args.penalty)
        torch.autograd.grad(loss, [p for p in nets.parameters() if p.requires_grad])
    return passes


def mae_passes(args, nets, views):
    """m masks without gradient, then per task a support and a query half: through the decoder for f_v and f_w, through all of it for the autoencoder."""
    x, device = views[0], views[0].device
    order = mae_tc2.random_masks(args.masks, len(x), (args.image_size // args.patch_size) ** 2, torch.Generator().manual_seed(0)).to(device)
    visible, model = mae_tc2.visible_patches(order.shape[2], args.mask_ratio), [p for name in ("backbone", "decoder") for p in nets[name].parameters()]
    K, half = 1 if args.baseline else args.tasks, args.masks // 2
    def passes():
        target = mae_tc2.targets(x, args)
        def loss(predicted, k, rows):
            return mae_tc2.reconstruction_loss(predicted, target.chunk(K)[k].repeat(len(order[rows]), 1, 1), order[rows].chunk(K, 1)[k].flatten(0, 1), visible)
        if args.baseline:
            tokens = nets["decoder"].embed(nets["backbone"](x.repeat(args.masks, 1, 1, 1), order.flatten(0, 1)[:, :visible]))
            return torch.autograd.grad(loss(nets["decoder"](tokens, order.flatten(0, 1)), 0, slice(None)), model)
        with torch.no_grad():
            tokens = nets["decoder"].embed(nets["backbone"](x.repeat(args.masks, 1, 1, 1), order.flatten(0, 1)[:, :visible])).unflatten(0, (args.masks, -1))
        S = torch.randn(tokens.shape[-1] + 1, tokens.shape[-1], device=device)
        for rows in (slice(None, half), slice(half, None)):
            V = nets["factor_net"](S)
            W = nets["weight_net"](tokens[rows], V)
            found = sum(loss(nets["decoder"](z.flatten(0, 1), order[rows].chunk(K, 1)[k].flatten(0, 1)), k, rows) for k, z in enumerate((W @ V.T).chunk(K, 1)))
            torch.autograd.grad(found + mae_tc2.factor_loss(tokens, V) + args.lambda_s * mae_tc2.weight_loss(tokens[rows], W, V), [*nets["factor_net"].parameters(), *nets["weight_net"].parameters()])
        V = nets["factor_net"](S).detach()
        for k in range(K):
            for rows in (slice(None, half), slice(half, None))[not args.inner_lr:]:
                o = order[rows].chunk(K, 1)[k].flatten(0, 1)
                t = nets["decoder"].embed(nets["backbone"](x.chunk(K)[k].repeat(len(order[rows]), 1, 1, 1), o[:, :visible]))
                torch.autograd.grad(loss(nets["decoder"](mae_tc2.calibrated_tokens(t, V, nets["weight_net"]), o), k, rows), model)
    return passes


def peak_memory(function):
    """Bytes above what was held before: of the GPU's allocator, or on a CPU summed over the profiler's list of allocations."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def hypergrad(rounds, argv):
    """Time of one GeSSL task by hypergradient and K, in forward-backward passes of its mini-batch, and the memory it takes above the networks."""
    torch.set_num_threads(2)
    for K in (1, 3, 5):
        exact = None
        for mode in ("exact", "first-order", "fd", "neumann", "cg"):
            args, nets, opts, views = prepared(byol_gessl, [*argv, "--tasks", "1", "--hypergrad", mode, "--inner-steps", str(K)])
            online = torch.nn.Sequential(nets["backbone"], nets["projector"], nets["predictor"])
            x, params = torch.cat(views), list(online.parameters())
            z_target = torch.randn(len(x), args.dim, device=x.device)
            one_pass = lambda: torch.autograd.grad(byol_gessl.byol_loss(online(x), z_target), params)
            run = lambda nets=nets, opts=opts, views=views, args=args: byol_gessl.train_step(nets, opts, views, args, 0)
            exact = exact or (run, peak_memory(run))
            whole, _, passes, _ = alternate(run, one_pass, rounds)
            (_, _, time, spread), memory = alternate(run, exact[0], rounds), peak_memory(run)
            print(f"hypergrad K={K} lambda={args.target_steps} {mode:<12} {1e3 * whole:8.1f} ms = {passes:5.1f} passes   {memory / 2**20:7.1f} MiB   of exact: "
                  f"time {time:.2f} ({spread[0]:.2f} to {spread[1]:.2f}), memory {memory / exact[1]:.2f}; one pass {peak_memory(one_pass) / 2**20:.1f} MiB")


def masks(rounds):
    """A forward and backward pass of MAE's encoder on the visible quarter of the patches, against all of them."""
    torch.set_num_threads(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for arch, size, patch, n in (("vit_tiny", 32, 4, 64), ("vit_base", 224, 16, 4)):
        encoder, x = mae_tc2.Encoder(size, patch, *mae_tc2.ARCHS[arch]).to(device), torch.randn(n, 3, size, size, device=device)
        order = mae_tc2.random_masks(1, n, (size // patch) ** 2, torch.Generator().manual_seed(0))[0].to(device)
        passes = lambda visible: lambda: encoder.tokens(x, visible).square().mean().backward()
        whole, part, ratio, spread = alternate(passes(None), passes(order[:, :mae_tc2.visible_patches(order.shape[1], 0.75)]), rounds)
        print(f"masks {arch}, {order.shape[1]} patches   all {1e3 * whole:8.1f} ms   visible quarter {1e3 * part:8.1f} ms   {ratio:5.2f}x ({spread[0]:.2f} to {spread[1]:.2f})")


def probe(rounds, n=50_000, d=512):
    """The 500-epoch linear probe and the k-NN of eval_linear.py on features as large as CIFAR-10's with ResNet-18; a fiftieth of the epochs is timed."""
    torch.set_num_threads(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = torch.randn(n, d, device=device), torch.randint(0, 10, (n,), device=device)
    tuned, searched, _, _ = alternate(lambda: eval_linear.fit_probes(x, y, 10, [(1e-2, 5e-6)], 10, 0), lambda: eval_linear.knn((x, y), (x[:2000], y[:2000]), [5, 200]), max(1, rounds // 3))
    print(f"probe {n} x {d}: 500 epochs {50 * tuned:.1f} s; k-NN (5 and 200, both metrics) of 10,000 queries {5 * searched:.1f} s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", choices=["augment", "decode", "step", "hypergrad", "masks", "probe", []], metavar="augment|decode|step|hypergrad|masks|probe")
    p.add_argument("--rounds", type=int, default=9)
    args, rest = p.parse_known_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    for what in args.what or ("augment", "decode", "step", "hypergrad", "masks", "probe"):
        {"step": step, "hypergrad": hypergrad}[what](args.rounds, rest) if what in ("step", "hypergrad") else {"augment": augment, "decode": decode, "masks": masks, "probe": probe}[what](args.rounds)
