"""The same training job in PyTorch, written the usual way, to compare with our step.

A timm-style ViT without our optimisations. The context encoder keeps all tokens and multiplies
hidden ones by zero. Masks come from a Python loop over the images in NumPy. Attention is
`scaled_dot_product_attention`, the optimizer the fused AdamW, the EMA a `_foreach_lerp_`. In its
favour, augmentation is one batched crop and flip (ours adds the config's colour jitter), and the
images are in memory.

With --masks_ahead the masks come from a pool that was sampled before the first step. Pool and
images are on the device already. This is its best case, without the loop in NumPy.

  python experiments/throughput/torch_baseline.py --config=cifar10_patches --mode=float32 --steps=5
"""

import argparse
import copy
import functools
import itertools
import json
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The same sizes as in configs/<name>.py.
CONFIGS = {
    "m1_max_quick_val": {
        "image": 224, "patch": 16, "width": 192, "depth": 12, "heads": 3, "levels": 2, "summary": 1,
        "pred_width": 192, "pred_depth": 2, "pred_heads": 4, "blocks": 4, "scale": (0.15, 0.25),
        "summary_pass": False, "regularized": "context", "batch": 32,
    },
    "cifar10_patches": {
        "image": 32, "patch": 4, "width": 192, "depth": 12, "heads": 3, "levels": 2, "summary": 4,
        "pred_width": 96, "pred_depth": 2, "pred_heads": 3, "blocks": 4, "scale": (0.09, 0.19),
        "summary_pass": True, "regularized": "summary", "batch": 64,
    },
}  # fmt: skip
# In place of a config's own; as gpu.py has them for ours.
MODELS = {
    "vit_tiny": {"width": 192, "heads": 3},
    "vit_small": {"width": 384, "heads": 6, "pred_width": 384, "pred_heads": 6},
    "vit_base": {"width": 768, "heads": 12, "pred_width": 384, "pred_heads": 6},
}
NUM_MASKS_AHEAD = 16  # batches of masks


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.num_summary, n = c["summary"], (c["image"] // c["patch"]) ** 2
        self.patches = nn.Conv2d(3, c["width"], c["patch"], c["patch"])
        self.positions = nn.Parameter(torch.randn(1, n, c["width"]) * 0.02)
        self.summary = nn.Parameter(torch.randn(1, c["summary"], c["width"]) * 0.02)
        self.blocks = nn.Sequential(*(Block(c["width"], c["heads"]) for _ in range(c["depth"])))
        self.norm = nn.LayerNorm(c["width"])

    def forward(self, images, visible=None):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        if visible is not None:
            x = x * visible[..., None]
        x = torch.cat([self.summary.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x))
        return x[:, self.num_summary :], x[:, : self.num_summary]


class Predictor(nn.Module):
    """All N positions are queries; the loss keeps the hidden ones."""

    def __init__(self, c):
        super().__init__()
        side = c["image"] // c["patch"]
        counts = [(-(-side // 2**level)) ** 2 for level in range(c["levels"])]
        self.inward = nn.Linear(c["width"], c["pred_width"])
        self.positions = nn.Parameter(torch.randn(1, side**2, c["pred_width"]) * 0.02)
        self.queries = nn.ParameterList(torch.randn(1, n, c["pred_width"]) * 0.02 for n in counts)
        self.blocks = nn.Sequential(
            *(Block(c["pred_width"], c["pred_heads"]) for _ in range(c["pred_depth"]))
        )
        self.norm = nn.LayerNorm(c["pred_width"])
        self.heads = nn.ModuleList(nn.Linear(c["pred_width"], c["width"]) for _ in counts)

    def forward(self, tokens, summary):
        x = self.inward(summary)
        if tokens is not None:
            x = torch.cat([x, self.inward(tokens) + self.positions], dim=1)
        queries = [q.expand(len(x), -1, -1) for q in self.queries]
        start, x = x.shape[1], torch.cat([x, *queries], dim=1)
        x, out = self.norm(self.blocks(x)), []
        for head, query in zip(self.heads, queries, strict=True):
            out.append(head(x[:, start : start + query.shape[1]]))
            start += query.shape[1]
        return out


def sample_masks(rng, batch, side, blocks, scale):
    """Hidden patches, bool [B, N], of M rectangles an image: the collator's Python loop."""
    hidden = np.zeros((batch, side, side), bool)
    for image in hidden:
        for _ in range(blocks):
            area = rng.uniform(*scale) * side**2
            aspect = np.exp(rng.uniform(np.log(0.75), np.log(1.5)))
            height = min(side, max(1, round((area * aspect) ** 0.5)))
            width = min(side, max(1, round((area / aspect) ** 0.5)))
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            image[top : top + height, left : left + width] = True
    return torch.from_numpy(hidden.reshape(batch, -1))


def augment(images, size, device):
    """A random resized crop and a flip of the whole batch at once, and normalisation."""
    x = images.to(device).permute(0, 3, 1, 2).float() / 255
    b = len(x)
    scale = torch.empty(b, device=device).uniform_(0.8, 1.0).sqrt()
    flip = torch.where(torch.rand(b, device=device) < 0.5, -1.0, 1.0)
    shift = (torch.rand(b, 2, device=device) * 2 - 1) * (1 - scale)[:, None]
    theta = torch.zeros(b, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False)
    return (F.grid_sample(x, grid, align_corners=False) - 0.47) / 0.25


def level_targets(tokens, levels):
    b, n, d = tokens.shape
    side = int(n**0.5)
    grid = tokens.transpose(1, 2).view(b, d, side, side)
    pooled = [F.avg_pool2d(grid, 2**k, ceil_mode=True) if k else grid for k in range(levels)]
    return [F.layer_norm(p.flatten(2).transpose(1, 2), (d,)) for p in pooled]


def vicreg(x):
    x = x.float() - x.float().mean(0)
    variance = F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
    covariance = x.T @ x / (len(x) - 1)
    off = covariance - torch.diag(torch.diag(covariance))
    return 25 * variance + off.square().sum() / x.shape[1]


def make_step(c, batch, *, mode, compiled):
    """Returns `step(masks_ahead)`, which makes one update and returns the loss, a tensor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it on a GPU by default
    side = c["image"] // c["patch"]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encoder, predictor = Encoder(c).to(device), Predictor(c).to(device)
    target = copy.deepcopy(encoder).requires_grad_(False)
    params = [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    stored = torch.from_numpy(rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8))

    def loss_fn(images, hidden):
        with torch.no_grad():
            targets = level_targets(target(images)[0].float(), c["levels"])
        tokens, summary = encoder(images, (~hidden).to(images.dtype))
        coarse = [hidden.float()[:, None].view(-1, 1, side, side)]
        coarse = [F.avg_pool2d(coarse[0], 2**k, ceil_mode=True) if k else coarse[0]
                  for k in range(c["levels"])]  # fmt: skip
        valid = [(m.flatten(1) > 0.999).float()[..., None] for m in coarse]
        passes = [predictor(tokens, summary)]
        if c["summary_pass"]:
            passes.append(predictor(None, summary))
        loss = 0.0
        for predictions in passes:
            for p, t, m in zip(predictions, targets, valid, strict=True):
                errors = F.smooth_l1_loss(p.float(), t, reduction="none") * m
                loss = loss + errors.sum() / (m.sum() * t.shape[-1]).clamp(min=1)
        spread = tokens.mean(1) if c["regularized"] == "context" else summary.flatten(1)
        return loss + 0.01 * vicreg(spread)

    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def masks():
        return sample_masks(rng, batch, side, c["blocks"], c["scale"]).to(device)

    @functools.cache
    def ahead():
        return itertools.cycle([masks() for _ in range(NUM_MASKS_AHEAD)]), stored.to(device)

    def step(masks_ahead=False):
        if masks_ahead:
            pool, images = ahead()
            rows = torch.randint(len(images), (batch,), device=device)
            images, hidden = augment(images[rows], c["image"], device), next(pool)
        else:
            rows = torch.from_numpy(rng.integers(0, len(stored), batch))
            images, hidden = augment(stored[rows], c["image"], device), masks()
        with torch.autocast(device, torch.bfloat16, enabled=mode == "bfloat16"):
            loss = loss_fn(images, hidden)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 0.004)
        return loss.detach()

    return step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, required=True)
    parser.add_argument("--model", choices=MODELS, help="sizes in place of the config's")
    parser.add_argument("--mode", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--masks_ahead", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    c = CONFIGS[args.config] | MODELS.get(args.model, {})
    batch = args.batch or c["batch"]
    step = make_step(c, batch, mode=args.mode, compiled=args.compile)

    started, seconds = time.perf_counter(), []
    for _ in range(args.warmup + args.steps):
        before = time.perf_counter()
        step(args.masks_ahead).item()  # waits for the device
        seconds.append(time.perf_counter() - before)
    total = time.perf_counter() - started
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    first = seconds[0] - float(np.median(seconds[args.warmup :]))
    result = {"sec": seconds[args.warmup :], "compile_sec": first, "batch_size": batch}
    print(json.dumps(result | {"peak_memory_bytes": memory, "total_sec": total}))


if __name__ == "__main__":
    main()
