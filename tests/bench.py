"""Benchmarks, never timed tests: python tests/bench.py [NAME ...] [--rounds N]

Every figure is a ratio of two things that are measured in turn in this run, so that a busy machine
disturbs both alike: the median over rounds, with the range.

  augment    views per second at 32 px, against torchvision's per-sample Pillow pipeline; one core
  decode     JPEG of 500 x 375 and two crops of 224 px, against Pillow; one core
  peers      one epoch's part end to end: ours against a plain DataLoader with Pillow transforms
  step       train_step of each script over its own forward and backward passes, and memory
  hypergrad  one GeSSL task by --hypergrad and K: time and memory, over those of exact
  masks      MAE's encoder on the visible quarter of the patches against all of them
  probe      eval_linear.py's linear and k-NN on 50,000 x 512 features
"""
import argparse
import functools
import os
import statistics
import sys
import tempfile
import time

import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import barlow_sparsehead
import byol_gessl
import common
import eval_linear
import mae_tc2
import simclr_tc2

DEVICE = common.choose_device(None)


# ---- how it is measured --------------------------------------------------------------------------
def seconds(function):
    begun = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def in_turn(first, second, rounds):
    """(median seconds of the first, of the second, "ratio (range)" of first / second)."""
    seconds(first)
    seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    shown = f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    return (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), shown)


def peak_memory(function):
    """MiB above what was held before, of the GPU's allocator or the CPU profiler's list."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2 ** 20


# ---- data ----------------------------------------------------------------------------------------
def pillow_pipeline(recipe, size):
    """What popular examples do: one Pillow image after the other."""
    steps = [T.RandomResizedCrop(size, recipe["crop"]), T.RandomHorizontalFlip(recipe["flip"]),
             T.RandomApply([T.ColorJitter(*recipe["jitter"])], recipe["jitter_p"]),
             T.RandomGrayscale(recipe["gray_p"])]
    if recipe["blur_p"]:
        steps.append(T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], recipe["blur_p"]))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(recipe["mean"], recipe["std"])])


def augment(rounds):
    torch.set_num_threads(1)
    images = common.load_data("shapes").train[:512]
    pictures = [T.functional.to_pil_image(x) for x in images]
    pipeline = pillow_pipeline(simclr_tc2.WEAK, 32)

    def ours():
        u = torch.rand(len(images), common.AUGMENT_DRAWS)
        common.augment(images, u, [0, 1, 2, 3], simclr_tc2.WEAK, 32)

    def theirs():
        torch.stack([pipeline(picture) for picture in pictures])

    slow, fast, ratio = in_turn(theirs, ours, rounds)
    print(f"augment   Pillow {512 / slow:7.0f} views/s   ours {512 / fast:7.0f} views/s   {ratio}")


def photographs(folder, n):
    """n JPEG files of 500 x 375 pixels with the detail of a photograph."""
    names = []
    for i in range(n):
        coarse = torch.rand(1, 3, 24, 32, generator=common.rng(1))
        image = nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
        image = image + 0.04 * torch.randn(3, 375, 500, generator=common.rng(i))
        names.append(f"{folder}/{i}.jpg")
        T.functional.to_pil_image(image.clamp(0, 1)).save(names[-1], quality=90)
    return names


def decode(rounds):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names = photographs(folder, 8)
        pipeline = pillow_pipeline(simclr_tc2.STRONG, 224)
        files = common.Crops(names, 224, 2, simclr_tc2.STRONG, seed=0)

        def ours():
            for i in range(8):
                files[0, i]

        def theirs():
            for name in names:
                image = Image.open(name).convert("RGB")
                pipeline(image)
                pipeline(image)

        slow, fast, ratio = in_turn(theirs, ours, rounds)
        print(f"decode    Pillow {8 / slow:7.1f} images/s  ours {8 / fast:7.1f} images/s  {ratio}")


class TwoViews(torch.utils.data.Dataset):
    """A plain data set of Pillow images or files: two augmented views."""
    def __init__(self, items, pipeline):
        self.items = items
        self.pipeline = pipeline

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image = self.items[i]
        if isinstance(image, str):
            image = Image.open(image).convert("RGB")
        return self.pipeline(image), self.pipeline(image)


def peers(rounds):
    """SimCLR with two views: the same network, batch and images; only the way there differs."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = common.load_data("shapes").train[:512]
        names = photographs(folder, 64)
        cases = [("resnet_tiny", 32, 64, drawn), ("resnet18", 32, 64, drawn),
                 ("resnet18", 224, 16, names)]
        for arch, size, batch, images in cases:
            recipe = simclr_tc2.WEAK if size == 32 else simclr_tc2.STRONG
            argv = ["--baseline", "--arch", arch, "--batch-size", str(batch),
                    "--image-size", str(size), "--workers", "2"]
            args, nets, opts = prepared(simclr_tc2, argv)
            data = common.Data("x", images, None, [], None, size, None, "")
            items = images
            if torch.is_tensor(images):
                items = [T.functional.to_pil_image(x) for x in images]
            theirs = TwoViews(items, pillow_pipeline(recipe, size))

            def our_epoch():
                batches = common.training_batches(data, [recipe] * 2, args, 0, 1, DEVICE, 0,
                                                  len(images) // batch)
                for views, _ in batches:
                    simclr_tc2.train_step(nets, opts, views, args, 0)

            def their_epoch():
                loader = torch.utils.data.DataLoader(theirs, batch, shuffle=True, num_workers=2)
                for pair in loader:
                    views = torch.stack(pair).to(DEVICE)
                    simclr_tc2.train_step(nets, opts, views, args, 0)

            slow, fast, ratio = in_turn(their_epoch, our_epoch, max(1, rounds // 3))
            print(f"peers     {arch}, {size} px: plain {len(images) / slow:6.0f} images/s, "
                  f"{peak_memory(their_epoch):.0f} MiB   ours {len(images) / fast:6.0f} images/s, "
                  f"{peak_memory(our_epoch):.0f} MiB   {ratio}")


# ---- steps ---------------------------------------------------------------------------------------
def prepared(script, argv):
    """(args, networks, optimisers) of a script at its `shapes` defaults, or with these flags."""
    args = script.parse_args([*argv, "--device", DEVICE.type])
    data = common.load_data("shapes")
    script.fill_defaults(args, data, DEVICE)
    torch.manual_seed(0)
    nets = script.build_nets(args).to(DEVICE, memory_format=torch.channels_last)
    return args, nets, script.build_opts(nets, args)


def random_views(script, args):
    m = getattr(args, "views", None) or (1 if script is mae_tc2 else 2)
    return torch.randn(m, args.images_per_step, 3, args.image_size, args.image_size, device=DEVICE)


def tc2_passes(args, nets, views):
    """SimCLR: one pass. TC2: all views without gradient, the forward and backward passes of f_v and
    f_w (Eqs. 4-5, written out), then each task's support views, and all its views."""
    encoder = nn.Sequential(nets["backbone"], nets["projector"])
    params = list(encoder.parameters())

    def forward_backward(x):
        z = simclr_tc2.embed(encoder, x, args)
        torch.autograd.grad(simclr_tc2.info_nce(z, args.temperature), params)

    if args.baseline:
        forward_backward(views)
        return
    with torch.no_grad():
        Z = simclr_tc2.embed(encoder, views, args)
    S = simclr_tc2.batch_summary(Z)
    for part in (Z[:len(Z) // 2], Z):
        V = nets["factor_net"](S)
        W = nets["weight_net"](part, V)
        loss = simclr_tc2.factor_loss(Z, V) + simclr_tc2.weight_loss(part, W, V)
        for z_hat in (W @ V.T).chunk(args.tasks, dim=1):
            loss = loss + simclr_tc2.info_nce(z_hat, args.temperature)
        loss.backward()
    for task in views.chunk(args.tasks, dim=1):
        if args.inner_lr:
            forward_backward(task[:len(task) // 2])
        forward_backward(task)


def gessl_passes(args, nets, views):
    """BYOL: one pass and the target's. GeSSL: K + lambda, the KL's, K differences, and two without
    gradient, for each task."""
    online = byol_gessl.online_network(nets)
    params = list(online.parameters())
    count = 1
    if not args.baseline:
        count = args.inner_steps + args.target_steps
    if not args.baseline and not args.lookahead:
        count += 1 + (args.inner_steps if args.hypergrad == "fd" else 0)
    for x in views.chunk(1 if args.baseline else args.tasks, dim=1):
        with torch.no_grad():
            z_target = byol_gessl.embed(nets["target"], x, args)
            if not args.baseline:
                byol_gessl.embed(online, x, args)
        for _ in range(count):
            p = byol_gessl.embed(online, x, args)
            torch.autograd.grad(byol_gessl.byol_loss(p, z_target), params)


def barlow_passes(args, nets, views):
    params = [p for p in nets.parameters() if p.requires_grad]
    _, _, z = barlow_sparsehead.embed(nets, views, args)
    loss = barlow_sparsehead.barlow_loss(z[0], z[1], args.lambda_offdiag)
    torch.autograd.grad(loss, params)


def mae_passes(args, nets, views):
    """MAE: m masks. TC2: m masks without gradient, the decoder alone on each for f_v and f_w, then
    each task's support and query masks."""
    x = views[0]
    orders = mae_tc2.draw_masks(args, len(x), 0, x.device)
    T_visible = mae_tc2.visible_patches(orders.shape[-1], args.mask_ratio)
    autoencoder = mae_tc2.MaskedAutoencoder(nets, T_visible, args.bf16)
    params = list(autoencoder.parameters())
    target = mae_tc2.target_patches(x, args)

    def loss(tokens, masks, wanted):
        predicted = autoencoder.decode(tokens, masks)
        return mae_tc2.reconstruction_loss(predicted, wanted, masks, T_visible)

    if args.baseline:
        torch.autograd.grad(loss(autoencoder.embed(x, orders), orders, target), params)
        return
    half = args.masks // 2
    with torch.no_grad():
        tokens = autoencoder.embed(x, orders)
        Z, _, _ = mae_tc2.standardize_tokens(tokens)
    S = mae_tc2.batch_summary(Z)
    for part in (slice(half), slice(half, None)):
        V = nets["factor_net"](S)
        W = nets["weight_net"](Z[part], V)
        given = (W @ V.T).detach().requires_grad_()
        torch.autograd.grad(loss(given, orders[part], target), given)
        (mae_tc2.factor_loss(Z, V) + mae_tc2.weight_loss(Z[part], W, V)).backward()
    V = nets["factor_net"](S).detach()
    for x_k, orders_k, target_k in zip(x.chunk(args.tasks), orders.chunk(args.tasks, dim=1),
                                       target.chunk(args.tasks)):
        for masks in (orders_k[:half], orders_k[half:]):
            tokens = autoencoder.embed(x_k, masks)
            tokens = mae_tc2.calibrated_tokens(tokens, V, nets["weight_net"])
            torch.autograd.grad(loss(tokens, masks, target_k), params)


STEPS = {
    simclr_tc2: (tc2_passes, ["--baseline", "--baseline --views 4", "", "--inner-lr 0"]),
    byol_gessl: (gessl_passes, ["--baseline", "", "--hypergrad first-order", "--lookahead"]),
    barlow_sparsehead: (barlow_passes, ["--baseline", "", "--penalty prox"]),
    mae_tc2: (mae_passes, ["--baseline", "", "--batch-size 64 --baseline",
                           "--batch-size 64 --masks 4 --tasks 4"]),
}
if DEVICE.type == "cuda":                       # too long on a CPU
    for script, (_, variants) in STEPS.items():
        large = "--arch resnet50 --image-size 224 --batch-size 64"
        if script is mae_tc2:
            large = "--arch vit_base --image-size 224 --patch-size 16 --batch-size 64"
        variants += [f"{large} --baseline", large]


def step(rounds):
    for script, (own_passes, variants) in STEPS.items():
        for flags in variants:
            args, nets, opts = prepared(script, flags.split())
            views = random_views(script, args)
            whole_step = functools.partial(script.train_step, nets, opts, views, args, 0)
            passes = functools.partial(own_passes, args, nets, views)
            whole, own, ratio = in_turn(whole_step, passes, rounds)
            name = f"{script.SCRIPT} {flags or 'default'}"
            print(f"step      {name:<70} {1e3 * whole:7.1f} ms   own passes {1e3 * own:7.1f} ms   "
                  f"{ratio}   {peak_memory(whole_step):7.1f} MiB above the networks")


def hypergrad(rounds):
    for K in (1, 3, 5):
        reference = None
        for mode in ("exact", "first-order", "fd", "neumann", "cg"):
            argv = ["--tasks", "1", "--hypergrad", mode, "--inner-steps", str(K)]
            args, nets, opts = prepared(byol_gessl, argv)
            views = random_views(byol_gessl, args)
            whole = functools.partial(byol_gessl.train_step, nets, opts, views, args, 0)
            if reference is None:
                reference = whole
                seconds(whole)          # the first call's memory has cuDNN's trials in it
                reference_memory = peak_memory(whole)
            took, _, ratio = in_turn(whole, reference, rounds)
            memory = peak_memory(whole)
            print(f"hypergrad K = {K}, lambda = {args.target_steps}, {mode:<12} "
                  f"{1e3 * took:7.1f} ms   {memory:6.1f} MiB   of exact: time {ratio}, "
                  f"memory {memory / reference_memory:.2f}")


# ---- MAE's encoder, evaluation -------------------------------------------------------------------
def masks(rounds):
    cuda = DEVICE.type == "cuda"
    many = 32 if cuda else 1            # a GPU would spend its time on starting kernels
    for arch, size, patch, n in (("vit_tiny", 32, 4, 64 * many), ("vit_base", 224, 16, 4 * many)):
        encoder = mae_tc2.Encoder(size, patch, *mae_tc2.ARCHS[arch]).to(DEVICE)
        x = torch.randn(n, 3, size, size, device=DEVICE)
        patches = (size // patch) ** 2
        order = torch.rand(n, patches, generator=common.rng(0)).argsort(-1).to(DEVICE)
        visible = order[:, :mae_tc2.visible_patches(patches, 0.75)]

        def run(seen):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=cuda):     # as in training
                tokens = encoder.tokens(x, seen)
            tokens.float().square().mean().backward()

        whole, part, ratio = in_turn(functools.partial(run, order), functools.partial(run, visible),
                                     rounds)
        print(f"masks     {arch}, {patches} patches: all {1e3 * whole:7.1f} ms   "
              f"visible quarter {1e3 * part:7.1f} ms   {ratio}")


def probe(rounds):
    n, d, classes = 50_000, 512, 10
    y = torch.randint(0, classes, (n,), device=DEVICE)
    x = torch.randn(n, d, device=DEVICE)
    x += 0.3 * torch.randn(classes, d, device=DEVICE)[y]

    def linear():
        mean, std = eval_linear.moments(x)
        eval_linear.fit_logistic((x - mean) / std, y, classes)

    def neighbours():
        for metric in ("euclidean", "cosine"):
            common.nearest(x, x[:10_000], 200, metric)

    fitted, searched, _ = in_turn(linear, neighbours, max(1, rounds // 3))
    print(f"probe     50,000 x 512: linear {fitted:.1f} s, k-NN of 10,000 queries, both metrics, "
          f"{searched:.1f} s")


BENCHMARKS = {f.__name__: f for f in (augment, decode, peers, step, hypergrad, masks, probe)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, {hardware}")
    for name in chosen.names or BENCHMARKS:
        BENCHMARKS[name](chosen.rounds)
