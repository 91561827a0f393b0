"""Benchmarks, never timed tests: python tests/bench.py [augment] [decode] [step]

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
import common
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


def step(rounds, argv):
    """Time of train_step over the time of its own forward and backward passes, on ready-made tensors."""
    torch.set_num_threads(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for extra in (["--baseline"], ["--baseline", "--views", "4"], [], ["--inner-lr", "0"], ["--second-order"]):
        args, data = simclr_tc2.parse_args([*argv, *extra]), common.load_data("shapes")
        common.resolve(args, simclr_tc2.RECIPES, data, "x")
        simclr_tc2.check_args(args, data, 1)
        nets = simclr_tc2.build_nets(args)[0].to(device)
        opts, encoder = simclr_tc2.build_opts(nets, args), torch.nn.Sequential(nets["backbone"], nets["projector"])
        views = [torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device) for _ in range(args.views)]
        m_support, tasks = args.views // 2, [torch.cat(parts) for parts in zip(*(v.chunk(args.tasks) for v in views))]
        params, V, S = list(encoder.parameters()), torch.eye(args.dim, device=device), torch.randn(args.dim + 1, args.dim, device=device)
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
                (sum(map(loss, (W @ V_now.T).chunk(args.tasks, 1))) + simclr_tc2.tc2_loss(Z, rows, W, V_now, args.lambda_s)).backward()
            for task in tasks:                                                              # stage 2
                grads = [torch.zeros(())]
                for rows, v, loss in ((task[:len(task) // 2], m_support, ssl), (task, args.views, error))[not args.inner_lr:]:
                    value = loss(simclr_tc2.calibrate(embed(rows, v), V, nets["weight_net"]))
                    grads = torch.autograd.grad(value + sum(g.sum() for g in grads) * args.second_order, params, create_graph=args.second_order and loss is ssl)
        whole, own, ratio, spread = alternate(lambda: simclr_tc2.train_step(nets, opts, views, args), passes, rounds)
        print(f"step {' '.join(extra) or 'TC2 default':<24} {1e3 * whole:8.1f} ms   own passes {1e3 * own:8.1f} ms   {ratio:5.2f}x ({spread[0]:.2f} to {spread[1]:.2f})")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", choices=["augment", "decode", "step", []], metavar="augment|decode|step")
    p.add_argument("--rounds", type=int, default=9)
    args, rest = p.parse_known_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")
    for what in args.what or ("augment", "decode", "step"):
        step(args.rounds, rest) if what == "step" else {"augment": augment, "decode": decode}[what](args.rounds)
