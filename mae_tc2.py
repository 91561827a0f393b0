"""MAE with task conflict calibration (TC2): one file, read beside the papers.

A masked autoencoder sees a quarter of an image's patches and draws the rest. TC2 treats random masks as the views of an image: it splits the
batch into K "tasks", lets the network adapt to a task's support masks, and judges it on the query masks. Two small networks rewrite
every visible token, between encoder and decoder, as a sparse combination of factors that all tasks share.

  MAE     He et al. 2022, arXiv 2111.06377: Section 3, Appendix A
  TC2     Guo et al., "Exploring Transferability of Self-Supervised Learning by Task Conflict Calibration": Eqs. 1-7, Algorithm 1, G-SSL paragraphs

  paper               here                         shape, meaning
  X_tr, N             views[0]                     (n, 3, H, W), n = N / processes: this process's share of the batch, cropped and flipped once
  x^1; m, m'          order[v]; --masks, m_support (n, L) a permutation of the L patches; the first T are visible. Support = the first m / 2 masks
  x^2                 targets(x, args)             (n, L, 3 p p)  the original, target of the reconstruction
  z_j                 Z                            (m, n, 1 + T, d)  tokens after the decoder's embedding, each with zero mean and norm sqrt(d)
  S, f_v, V           S, factor_net, V             (d + 1, d), and (d, n_f): factors shared by all tasks; d = width of the decoder
  f_w, W_j            weight_net, W                (..., n_f)     weights of one token
  f_w(z_j) V^T        z_hat                        (..., d)       the calibrated token, scaled back and given to the decoder
  L_sse               reconstruction_loss          mean squared error of masked patches, each target patch normalised (--norm-pixels)
  alpha, beta_1, beta_2                            TC2_LR (one Adam for f_v and f_w), --inner-lr (SGD), --lr (AdamW)

  python mae_tc2.py                                             drawn shapes, two minutes on two cores
  python mae_tc2.py --data /imagenet100                         one GPU; plain MAE with --baseline
  torchrun --nproc-per-node 4 mae_tc2.py --data /imagenet100        whole tasks per process: 8 need --tasks 8

Controls: `--baseline --masks 4` MAE at equal masks | `--inner-lr 0` no inner loop | `--calibrate none` plain first-order MAML | `--baseline`
with more `--epochs` MAE at equal passes.

Result (results/README.md): at CPU scale TC2 trains, does not beat MAE at equal images and is behind it at equal passes; not run at ImageNet scale.
Deviations from the paper: those of simclr_tc2.py (V orthonormal by QR, skip path in f_w, first order, means), which README.md explains; and
(1) tokens, that of the class too, are calibrated one by one, not the image's vector: the reconstruction has to pass through z_hat; (2) L_sse is MAE's mean, the sum
over masked pixels divided by their number; (3) on 8 x 8 patches the frequencies of the positions end at 1 / 30, not 1e-4; (4) the
paper's support set also holds the unmasked image: here it is the target alone, since it has no masked patch to be judged on.
"""
import argparse, contextlib, os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (Log, all_reduce_sum, average_gradients, base_parser, class_hash, effective_rank, fail, graceful_stop, load_data, lr_scale, monitor, number,
                    open_run, resolve, rng, save_run, set_lr, setup_distributed, to_device, training_views, world_size)

SCRIPT, TC2_LR = "mae_tc2", 3e-3                        # alpha_1 .. alpha_4; the paper states none
ARCHS = {"vit_micro": (96, 2, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}   # width, blocks, heads
DECODERS = {"vit_micro": (64, 1), "vit_tiny": (128, 4), "vit_small": (192, 4), "vit_base": (512, 8), "vit_large": (512, 8)}                     # width, blocks
WEAK = dict(crop=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0, 0, 0, 0), jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0,
            mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
AUGMENTATION = {"shapes": [WEAK], "small": [WEAK], "imagenet": [dict(WEAK, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]}     # MAE Section 4: crop and flip
RECIPES = {     # imagenet: MAE Appendix A, lr = 1.5e-4 per 256 images; the others are ours, small is untried at this length
    "shapes": dict(arch="vit_micro", epochs=6, batch_size=16, lr=2e-3, weight_decay=0.05, warmup_epochs=0.5, eval_every=2, views=1, patch_size=4,
                   norm_pixels=False, position_base=30, tc2_masks=2, tc2_tasks=2),
    "small": dict(arch="vit_tiny", epochs=400, batch_size=512, lr=1e-3, weight_decay=0.05, warmup_epochs=20.0, eval_every=20, views=1, patch_size=4,
                  norm_pixels=True, position_base=30, tc2_masks=4, tc2_tasks=4),
    "imagenet": dict(arch="vit_base", epochs=400, batch_size=1024, lr=6e-4, weight_decay=0.05, warmup_epochs=40.0, eval_every=20, views=1, patch_size=16,
                     norm_pixels=True, position_base=1e4, tc2_masks=4, tc2_tasks=4)}
LIMITS = {"inner_step": (0.003, "the inner step is long beside the weights, one of 0.004 cost a point: lower --inner-lr")}


def parse_args(argv=None):
    p, flag = base_parser(__doc__.split("\n")[0], RECIPES, tuple(ARCHS))
    flag("--patch-size", number(int, 1), "side of a patch in pixels")
    flag("--mask-ratio", number(float, 0.05, 0.95), "share of the patches that are masked (default: 0.75 as in MAE)", default=0.75)
    p.add_argument("--norm-pixels", action=argparse.BooleanOptionalAction, default=None,
                   help="normalise each target patch, as in MAE (default: yes; not for shapes, whose patches are often noise alone)")
    flag("--masks", number(int, 1), "m, random masks of each image per step (default: 4, shapes: 2; 1 with --baseline)")
    flag("--tasks", number(int, 1), "K, tasks per batch (default: 4 as in the paper, shapes: 2; 1 with --baseline)")
    flag("--inner-lr", number(float, 0), "beta_1 of Eq. 6; 0 = no inner loop (default: 0.01)", default=0.01)
    p.add_argument("--second-order", action="store_true", help="differentiate Eq. 7 through Eq. 6 (default: first order)")
    flag("--factors", number(int, 1), "n_f, columns of V (default: d, the paper's best)")
    flag("--lambda-s", number(float, 0), "lambda_s of Eq. 3 (default: 0.1; paper: 0.001 to 1)", default=0.1)
    flag("--calibrate", str, "losses of Eqs. 6-7 on z_hat (both), on z (none), or the mean of the two (mix); default: both",
         choices=("both", "none", "mix"), default="both")
    return p.parse_args(argv)


def check_args(args, data, world):
    """The number of images in one step; settings that do not go together end in `fail`."""
    args.masks, args.tasks = args.masks or (1 if args.baseline else args.tc2_masks), args.tasks or (1 if args.baseline else args.tc2_tasks)
    args.decoder_dim, args.decoder_depth = DECODERS[args.arch]
    args.factors = args.factors or args.decoder_dim
    if args.image_size % args.patch_size:
        fail(f"--patch-size {args.patch_size}: does not divide the image size {args.image_size}")
    patches = (args.image_size // args.patch_size) ** 2
    if not 0 < visible_patches(patches, args.mask_ratio) < patches:
        fail(f"--mask-ratio {args.mask_ratio}: leaves no patch visible, or none masked, of {patches}")
    if args.batch_size % world or args.batch_size % args.tasks:
        fail(f"--batch-size {args.batch_size}: must be a multiple of --tasks {args.tasks} and of {world} processes")
    if args.batch_size > len(data.train):
        fail(f"--batch-size {args.batch_size}: there are only {len(data.train)} training images")
    if not args.baseline and args.tasks % world:
        fail(f"--tasks {args.tasks}: must be a multiple of the {world} processes, each holds whole tasks")
    if not args.baseline and args.masks < 2:
        fail(f"--masks {args.masks}: TC2 needs at least 2, one for support and one for query")
    if args.sync_bn:
        fail("--sync-bn: a ViT has no BatchNorm")
    if args.compile and args.second_order and not args.baseline:
        fail("--second-order: cannot go with --compile, whose backward pass cannot be differentiated")
    return args.batch_size


# ---- patches and masks ----------------------------------------------------------------------------------------------
def patchify(x, p):
    """(n, 3, H, W) -> (n, L, 3 p p): patches row by row, each in the order (channel, y, x). [MAE Section 3]"""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(patches, p, size):
    """Inverse of `patchify`: (n, L, 3 p p) -> (n, 3, size, size)."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (size // p, -1)), p)


def visible_patches(patches, mask_ratio):
    return round(patches * (1 - mask_ratio))


def random_masks(m, n, patches, generator, share=slice(None)):
    """order (m, n, L): a random permutation of the L patches for each mask of each image, the first ones are the visible ones; of the images
    `share` alone. [MAE Section 3]"""
    return torch.rand(m, n, patches, generator=generator)[:, share].argsort(-1)


def sincos_positions(dim, side, base=1e4):
    """(side^2, dim) fixed positions: a quarter each of sin and cos of y and of x, at frequencies from 1 to 1 / base. On a grid of 8 x 8
    those below 1 / 30 would be nearly constant. [MAE Appendix A]"""
    omega = base ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [position.flatten()[:, None] * omega for position in (y, x)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


# ---- model ----------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block: (n, T, d) -> (n, T, d)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)         # (n, heads, T, d / heads)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def draw_weights(net):
    """Xavier-uniform matrices, zero biases. [MAE Appendix A]"""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ViT with a class token and fixed positions. With `visible` it returns the tokens of these patches alone; without, the features of
    evaluation, (n, d): the mean over the tokens of all patches."""
    def __init__(self, image_size, patch_size, dim, depth, heads, position_base=1e4):
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed, self.class_token = nn.Linear(3 * patch_size ** 2, dim), nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, image_size // patch_size, position_base))
        self.blocks, self.norm = nn.Sequential(*(Block(dim, heads) for _ in range(depth))), nn.LayerNorm(dim, 1e-6)
        draw_weights(self)

    def tokens(self, x, visible=None):
        """x (n, 3, H, W), visible (n, T) indices of patches or None for all -> (n, 1 + T, d), the class token first."""
        patches, positions = patchify(x, self.patch_size), self.positions.expand(len(x), -1, -1)
        if visible is not None:
            patches, positions = (t.gather(1, visible[..., None].expand(-1, -1, t.shape[2])) for t in (patches, positions))
        t = self.patch_embed(patches) + positions
        return self.norm(self.blocks(torch.cat([self.class_token.expand(len(x), -1, -1).to(t.dtype), t], 1)))

    def forward(self, x, visible=None):
        return self.tokens(x)[:, 1:].mean(1) if visible is None else self.tokens(x, visible)


class Decoder(nn.Module):
    """`embed`: encoder tokens -> (n, 1 + T, d), what TC2 calibrates; `forward` fills in mask tokens and predicts every patch. [MAE Section 3]"""
    def __init__(self, image_size, patch_size, encoder_dim, dim, depth, position_base=1e4):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(encoder_dim, dim), nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, image_size // patch_size, position_base))
        self.blocks, self.norm = nn.Sequential(*(Block(dim, dim // 32) for _ in range(depth))), nn.LayerNorm(dim, 1e-6)
        self.predict = nn.Linear(dim, 3 * patch_size ** 2)
        draw_weights(self)

    def forward(self, t, order):
        """t (n, 1 + T, d) tokens of the class and of the patches order[:, :T], order (n, L) -> predicted patches (n, L, 3 p p)."""
        hidden = self.mask_token.to(t.dtype).expand(len(t), order.shape[1] - t.shape[1] + 1, -1)
        place = order.argsort(1)[..., None].expand(-1, -1, t.shape[2])                                      # where each patch stands in `order`
        full = torch.cat([t[:, 1:], hidden], 1).gather(1, place) + self.positions
        return self.predict(self.norm(self.blocks(torch.cat([t[:, :1], full], 1)))[:, 1:])


def build_nets(args):
    """(ModuleDict of backbone, decoder and f_v, f_w, feature dimension); the autoencoder's weights are drawn first."""
    dim, depth, heads = ARCHS[args.arch]
    nets = nn.ModuleDict({"backbone": Encoder(args.image_size, args.patch_size, dim, depth, heads, args.position_base),
                          "decoder": Decoder(args.image_size, args.patch_size, dim, args.decoder_dim, args.decoder_depth, args.position_base)})
    if not args.baseline:
        nets.update({"factor_net": FactorNet(args.decoder_dim, args.factors), "weight_net": WeightNet(args.decoder_dim, args.factors)})
    return nets, dim


def build_opts(nets, args):
    params = [p for name in ("backbone", "decoder") for p in nets[name].parameters()]
    groups = [{"params": [p for p in params if p.ndim == 2], "weight_decay": args.weight_decay},           # not on biases, norms and tokens
              {"params": [p for p in params if p.ndim != 2], "weight_decay": 0}]
    opts = {"encoder": torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=True)}                        # [MAE Appendix A]
    if not args.baseline:
        opts["factors"] = torch.optim.Adam([p for name in ("factor_net", "weight_net") for p in nets[name].parameters()], TC2_LR, fused=True)
    return opts


def to_torchvision(state_dict, patch_size):
    """The encoder's weights under the names of torchvision.models.vit_*, which then returns our class token where `heads` is Identity.
    Positions become an ordinary parameter there."""
    names = {"norm1": "ln_1.", "norm2": "ln_2.", "qkv": "self_attention.in_proj_", "proj": "self_attention.out_proj.", "mlp.0": "mlp.0.", "mlp.2": "mlp.3."}
    found = {f"encoder.ln.{k}": state_dict[f"norm.{k}"] for k in ("weight", "bias")}
    for key in (k for k in state_dict if k.startswith("blocks.")):                              # blocks.3.mlp.0.weight
        _, i, name = key.split(".", 2)
        layer, kind = name.rsplit(".", 1)
        found[f"encoder.layers.encoder_layer_{i}.{names[layer]}{kind}"] = state_dict[key]
    found |= {"class_token": state_dict["class_token"], "encoder.pos_embedding": F.pad(state_dict["positions"], (0, 0, 1, 0))[None],
              "conv_proj.weight": state_dict["patch_embed.weight"].unflatten(1, (3, patch_size, patch_size)), "conv_proj.bias": state_dict["patch_embed.bias"]}
    return found


# ---- MAE ------------------------------------------------------------------------------------------------------------
def normalize_patches(patches):
    """Each patch (..., 3 p p) with zero mean and unit variance: the target. [MAE Section 4.1]"""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(predicted, target, order, visible):
    """Mean squared error over the pixels of the masked patches order[:, visible:]: predicted, target (n, L, 3 p p), order (n, L) -> scalar.
    [MAE Section 3; L_sse of TC2 Eqs. 5 and 7]"""
    masked = order[:, visible:, None].expand(-1, -1, target.shape[2])
    return (predicted.gather(1, masked) - target.gather(1, masked)).square().mean()


def targets(x, args):
    """(n, L, 3 p p): the patches of x, normalised one by one or as they are. [MAE Section 4.1]"""
    patches = patchify(x, args.patch_size)
    return normalize_patches(patches) if args.norm_pixels else patches


def reconstruct(encoder, decoder, x, order, visible, args, space=None):
    """Predicted patches (n, L, 3 p p), not in bfloat16, of x (n, 3, H, W) from the patches order[:, :visible]; space(t) calibrates the tokens."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        t = decoder.embed(encoder(x, order[:, :visible]))
        predicted = decoder(t if space is None else space(t), order)
    return predicted.to(torch.promote_types(predicted.dtype, torch.float32))


# -- shared: tc2 --
def batch_summary(z):
    """S (d + 1, d): the mean over the covariance (divisor M - 1) of all M rows of z (..., d), over all processes. [TC2 before Eq. 1]"""
    z = z.detach().flatten(0, -2)
    M = len(z) * world_size()
    mean = all_reduce_sum(z.sum(0)) / M
    return torch.cat([mean[None], all_reduce_sum((z - mean).T @ (z - mean)) / (M - 1)])


def mlp(*sizes):
    """Linear layers with ReLU between: three of them in the paper's f_v and f_w. [TC2 Appendix IV]"""
    return nn.Sequential(*(m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())))[:-1]


class FactorNet(nn.Module):
    """f_v: S (d + 1, d) -> V (d, n_f). Each column of S (a dimension's mean and covariances) gives a row of V, then QR makes the columns
    orthonormal. A network of the flattened S would have 134M parameters at d = 512, this one 0.3M. [TC2 question i]"""
    def __init__(self, dim, n_factors, hidden=256, orthogonal=True):
        super().__init__()
        self.mlp, self.orthogonal = mlp(dim + 1, hidden, hidden, n_factors), orthogonal and n_factors <= dim

    def forward(self, S):
        V = self.mlp(S.T)
        if self.orthogonal:
            V, R = torch.linalg.qr(V)
            V = V * torch.where(R.diagonal() < 0, -1, 1)            # QR is unique, and V continuous in S, up to these signs
        return V


class WeightNet(nn.Module):
    """f_w: z (..., d), V (d, n_f) -> W (..., n_f) = z V + MLP(z). V is given: no gradient reaches f_v through the skip path. The MLP
    starts at zero, so that calibration starts as the projection on V. [TC2 question ii]"""
    def __init__(self, dim, n_factors, hidden=128, skip=True):
        super().__init__()
        self.mlp, self.skip = mlp(dim, hidden, hidden, n_factors), skip
        if skip:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, z, V):
        return self.mlp(z) + z @ V.detach() if self.skip else self.mlp(z)


def calibrate(z, V, weight_net):
    """z_hat = f_w(z) V^T, (..., d) -> (..., d). [TC2 question iii]"""
    return weight_net(z, V) @ V.T


def factor_loss(z, V):
    """L_v = ||V^T V - I||_F^2 + ||Z - Z V V^T||_F^2, the second per row of z (..., d). [TC2 Eq. 1]"""
    orthogonality = (V.T @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).square().sum()
    return orthogonality + (z - z @ V @ V.T).square().sum(-1).mean()


def weight_loss(z, W, V):
    """L_w = ||z_j - W_j V^T||^2 + ||W_j||_1, averaged over samples; V is given, it gets no gradient. [TC2 Eq. 2]"""
    return ((z - W @ V.detach().T).square().sum(-1) + W.abs().sum(-1)).mean()


def update_factors(factor_net, weight_net, opt, Z, S, m_support, ssl_loss, query_loss, tasks, lambda_s):
    """Stage 1, f_theta fixed: a step of f_v and f_w on the support views, then one on the query views. [TC2 Eqs. 3-5]

    Z (m, N, ..., d) embeddings without graph; S (d + 1, d); ssl_loss(z_hat_support, k) and query_loss(z_hat_query, z_hat_support, k) see
    the calibrated embeddings (views, n, ..., d) of task k. Eq. 5 differentiates at f'_v, not through Eq. 4: two consecutive steps."""
    terms = {}
    for phase, rows in (("support", slice(None, m_support)), ("query", slice(m_support, None))):
        V = factor_net(S)
        W = weight_net(Z if phase == "query" else Z[rows], V)                   # the query error needs support anchors too
        z_hat, loss, grad_z_hat = W @ V.T, 0, []
        for k, z in enumerate(z_hat.detach().chunk(tasks, dim=1)):              # chain rule, first part: to z_hat, one task's graph at a time
            task_loss = ssl_loss(z.requires_grad_(), k) if phase == "support" else query_loss(z.requires_grad_()[m_support:], z[:m_support], k)
            grad_z_hat += torch.autograd.grad(task_loss / tasks, z)
            loss = loss + task_loss.detach() / tasks
        loss_v, loss_w = factor_loss(Z, V), weight_loss(Z[rows], W if phase == "support" else W[rows], V)
        opt.zero_grad()
        torch.autograd.backward((z_hat, loss_v + lambda_s * loss_w), (torch.cat(grad_z_hat, 1), None))              # second part, and [TC2 Eq. 3]: to f_v, f_w
        average_gradients([p for group in opt.param_groups for p in group["params"]])
        opt.step()
        terms |= {f"loss_factors_{phase}": loss, "loss_v": loss_v.detach(), "loss_w": loss_w.detach()}              # loss_v, loss_w: those of Eq. 5
    return terms


def update_encoder(params, support_loss, query_loss, tasks, inner_lr, second_order):
    """Stage 2, f_v and f_w fixed: f_theta^k = f_theta - beta_1 grad L^s_k, then the gradient of mean_k L^q_k(f_theta^k). [TC2 Eqs. 6-7]

    params: {name: leaf tensor}; support_loss(params, k), query_loss(params, k) -> scalar. Returns ({name: gradient}, terms); the params
    and their .grad are left alone. First order takes the gradient at f_theta^k, second order goes on through Eq. 6 to f_theta."""
    names, theta, total = list(params), list(params.values()), [torch.zeros_like(p) for p in params.values()]
    terms = {"loss_query": 0, "loss_support": 0, "inner_step": 0} if inner_lr else {"loss_query": 0}
    for k in range(tasks):
        fast = theta
        if inner_lr:
            loss = support_loss(params, k)
            grads = torch.autograd.grad(loss, theta, create_graph=second_order, materialize_grads=True)
            fast = torch._foreach_add(theta, grads, alpha=-inner_lr)                                                    # [TC2 Eq. 6]
            terms["loss_support"] = terms["loss_support"] + loss.detach() / tasks
            if k == 0:                                                          # relative length of the first task's inner step: above 0.02 it harms
                terms["inner_step"] = (inner_lr * nn.utils.get_total_norm(grads) / nn.utils.get_total_norm(theta)).detach()
            if not second_order:
                fast = [p.detach().requires_grad_() for p in fast]
        loss = query_loss(dict(zip(names, fast)), k)
        grads = torch.autograd.grad(loss, theta if second_order else fast, materialize_grads=True)
        torch._foreach_add_(total, grads, alpha=1 / tasks)                                                              # [TC2 Eq. 7]
        terms["loss_query"] = terms["loss_query"] + loss.detach() / tasks
    return dict(zip(names, total)), terms

# -- end shared --


def token_scale(t):
    """(z, mean, std): tokens t (..., d) as mean + std z, every z with zero mean and norm sqrt(d), so that calibration sees one scale."""
    mean, std = t.mean(-1, keepdim=True), (t.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return (t - mean) / std, mean, std


def calibrated_tokens(t, V, weight_net):
    """The tokens t (..., d) with z replaced by z_hat, on their old scale: with z_hat = z nothing changes. [TC2 question iii]"""
    with torch.autocast(t.device.type, enabled=False):
        z, mean, std = token_scale(t.to(torch.promote_types(t.dtype, torch.float32)))
        return mean + std * calibrate(z, V, weight_net)


# ---- one iteration --------------------------------------------------------------------------------------------------
def draw_masks(args, n, progress, device):
    """order (m, n, L) for this process's n images: drawn for the joined batch, a function of seed and step. [TC2 "masked", MAE Section 3]"""
    total, first = n * world_size(), n * (dist.get_rank() if dist.is_initialized() else 0)
    patches, share = (args.image_size // args.patch_size) ** 2, slice(first, first + n)
    return to_device(random_masks(args.masks, total, patches, rng(args.seed, "masks", progress), share), device)


def mae_step(nets, opts, x, order, visible, args):
    """MAE on m masks of each image; m = 1 is the paper's. [MAE Section 3]"""
    predicted = reconstruct(nets["backbone"], nets["decoder"], x.repeat(len(order), 1, 1, 1), order.flatten(0, 1), visible, args)
    loss = reconstruction_loss(predicted, targets(x, args).repeat(len(order), 1, 1), order.flatten(0, 1), visible)
    opts["encoder"].zero_grad()
    loss.backward()
    average_gradients(p for name in ("backbone", "decoder") for p in nets[name].parameters())
    opts["encoder"].step()
    return {"loss_ssl": loss.detach()}


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder as one module, for `functional_call`."""
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, *args):
        return reconstruct(self.encoder, self.decoder, *args)


def train_step(nets, opts, views, args, progress):
    """One iteration of Algorithm 1, optimiser steps included: views is [x], (n, 3, H, W); progress in [0, 1] tells the step. [TC2 Algorithm 1]"""
    x = views[0]
    order = draw_masks(args, len(x), progress, x.device)                                    # (m, n, L), the same in all passes of this step
    visible = visible_patches(order.shape[2], args.mask_ratio)
    if args.baseline:
        return mae_step(nets, opts, x, order, visible, args)
    K, m, m_support = args.tasks // world_size(), len(order), len(order) // 2               # line 2: this process's tasks
    images, orders, target = x.chunk(K), order.chunk(K, 1), targets(x, args).chunk(K)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
        t = nets["decoder"].embed(nets["backbone"](x.repeat(m, 1, 1, 1), order.flatten(0, 1)[:, :visible]))
    Z, mean, std = (s.unflatten(0, (m, -1)) for s in token_scale(t.float() if args.bf16 else t))                        # (m, n, 1 + T, d), (m, n, 1 + T, 1)
    S, terms, calibrated = batch_summary(Z), {}, None
    if args.calibrate != "none":                                                            # line 4: Eqs. 4-5
        means, stds = mean.chunk(K, 1), std.chunk(K, 1)
        def error(z_hat, k, rows):                      # through the decoder as it is: only f_v and f_w move in this stage
            t, o = (means[k][rows] + stds[k][rows] * z_hat).flatten(0, 1), orders[k][rows].flatten(0, 1)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
                predicted = nets["decoder"](t, o)
            return reconstruction_loss(predicted.to(t.dtype), target[k].repeat(len(z_hat), 1, 1), o, visible)
        terms |= update_factors(nets["factor_net"], nets["weight_net"], opts["factors"], Z, S, m_support, lambda z, k: error(z, k, slice(None, m_support)),
                                lambda query, support, k: error(query, k, slice(m_support, None)), K, args.lambda_s)
        V = nets["factor_net"](S).detach()
        calibrated = lambda t: calibrated_tokens(t, V, nets["weight_net"])
    spaces = {"both": [calibrated], "none": [None], "mix": [calibrated, None]}[args.calibrate]
    net = MaskedAutoencoder(nets["backbone"], nets["decoder"])
    params = dict(net.named_parameters())
    def loss_on(rows):
        def loss(at, k):
            o = orders[k][rows]
            many, wanted, o = images[k].repeat(len(o), 1, 1, 1), target[k].repeat(len(o), 1, 1), o.flatten(0, 1)
            predict = net if at is params else lambda *inputs: functional_call(net, at, inputs, tie_weights=False)
            return sum(reconstruction_loss(predict(many, o, visible, args, space), wanted, o, visible) for space in spaces) / len(spaces)
        return loss
    with sdpa_kernel(SDPBackend.MATH) if args.second_order else contextlib.nullcontext():   # the fast kernels have no second derivative
        grads, encoder_terms = update_encoder(params, loss_on(slice(None, m_support)), loss_on(slice(m_support, None)), K, args.inner_lr, args.second_order)
    for name in params:                                                                     # line 5: Eqs. 6-7
        params[name].grad = grads[name]
    average_gradients(params.values())
    opts["encoder"].step()
    return {**encoder_terms, **terms}


@torch.no_grad()
def diagnose(nets, views, args):
    """The tokens of the batch under one mask, before and after calibration. Draws reconstructions.png: original, masked, reconstruction and
    calibrated reconstruction of eight images; their errors."""
    order = draw_masks(args, len(views[0]), -1, views[0].device)[0]
    visible, spaces = visible_patches(order.shape[1], args.mask_ratio), {"reconstruction": None}
    z = token_scale(nets["decoder"].embed(nets["backbone"](views[0], order[:, :visible])))[0]
    found = {"rank_z": effective_rank(z.flatten(0, 1))}
    if not args.baseline and args.calibrate != "none":
        V = nets["factor_net"](batch_summary(z))
        z_hat = calibrate(z, V, nets["weight_net"])
        found |= {"rank_z_hat": effective_rank(z_hat.flatten(0, 1)), "cos_z_hat": F.cosine_similarity(z_hat, z, dim=-1).mean()}
        spaces["calibrated"] = lambda t: calibrated_tokens(t, V, nets["weight_net"])
    x, order = views[0][:8], order[:8]
    patches = patchify(x, args.patch_size)
    hidden = torch.zeros_like(patches[..., :1]).scatter_(1, order[:, visible:, None], 1)                    # (8, L, 1), 1 where masked
    rows = {"original": patches, "masked": patches * (1 - hidden)}
    for name, space in spaces.items():
        predicted = reconstruct(nets["backbone"], nets["decoder"], x, order, visible, args, space)
        found[f"loss_{name}"] = reconstruction_loss(predicted, targets(x, args), order, visible)
        if args.norm_pixels:                                                    # shown with the true patch's mean and scale
            predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        rows[name] = torch.where(hidden > 0, predicted, patches)
    if not dist.is_initialized() or dist.get_rank() == 0:
        draw_rows({name: unpatchify(p, args.patch_size, args.image_size) for name, p in rows.items()}, args)
    return found


def draw_rows(rows, args):
    """{name: (n, 3, S, S) normalised images} -> --out/reconstructions.png, one row each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    recipe = AUGMENTATION["imagenet" if args.image_size > 96 else "small"][0]
    mean, std = (torch.tensor(recipe[k])[:, None, None] for k in ("mean", "std"))
    figure, axes = plt.subplots(len(rows), len(next(iter(rows.values()))), figsize=(12, 1.6 * len(rows)), layout="constrained", squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images.float().cpu()):
            axis.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.savefig(os.path.join(args.out, "reconstructions.png"), dpi=100)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    # -- shared: main --
    rank, world, device = setup_distributed()
    data = load_data(args.data, args.image_size, args.workers, args.classes)
    recipe = resolve(args, RECIPES, data, SCRIPT)
    per_step = check_args(args, data, world)                                                # images
    augmented = (AUGMENTATION[recipe] * args.views)[:args.views]
    torch.manual_seed(args.seed)                                                            # the same initial weights on every process
    nets = build_nets(args)[0].to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    opts = build_opts(nets, args)
    per_epoch = len(data.train) // per_step                                                 # an incomplete last batch is left out
    total = args.epochs * per_epoch
    stop = min(total, args.max_steps or total)
    start = open_run(args, nets, opts, rank, images=len(data.train), class_list=class_hash(data.classes), processes=world, steps_per_epoch=per_epoch)
    log = Log(args.out, per_step, rank, world, start, stop, LIMITS)
    evaluate = lambda backbone: monitor(backbone, data, args, augmented[0], device) if rank == 0 else {}
    with graceful_stop() as asked_to_stop:
        if data.train_labels is None:
            log.show(f"{args.data} has no labels: the k-NN monitor is off")
        elif start == 0:                                                                    # what the run has to beat
            raw = evaluate(None) if torch.is_tensor(data.train) else {}
            log.event(step=0, **evaluate(nets["backbone"]), **{f"raw_pixels_{k}": v for k, v in raw.items()})
        batches = training_views(data, augmented, args.image_size, per_step, args.seed, rank, world, device, args.workers, start, stop)
        for step, views in enumerate(batches, start + 1):                                   # step = steps done after this one
            set_lr(opts, lr_scale(step - 1, total, args.warmup_epochs * per_epoch))
            log.add(step, train_step(nets, opts, views, args, (step - 1) / total))
            signum, epoch_end = asked_to_stop(), step % per_epoch == 0 or step == stop
            if step % args.log_every == 0 or epoch_end or signum:
                log.write(opts["encoder"].param_groups[0]["lr"])
            if step == stop or epoch_end and step // per_epoch % args.eval_every == 0:
                log.event(step=step, **evaluate(nets["backbone"]), **diagnose(nets, views, args))
            if rank == 0 and (epoch_end or signum):
                save_run(args, step, nets, opts, augmented[0])
            if signum:
                log.end(f"stopped by signal {signum} after step {step}; the same command goes on from there")
                raise SystemExit(128 + signum)
    log.end(f"done: {args.out}/backbone.pt, curves.png, log.jsonl; next: python eval_linear.py {args.out}")
    # -- end shared --


if __name__ == "__main__":
    main()
