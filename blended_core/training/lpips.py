"""Trains the backbone of the embedded LPIPS metric: SqueezeNet 1.1, the smallest architecture that the package lpips supports.

    python -m blended_core.training.lpips --out runs/lpips --minutes 8

The same command resumes a stopped training; ``--init`` starts from weights without the state of the optimizer, with a new classifier.

The backbone learns to classify objects and backgrounds of scenes, like the ImageNet backbones of Zhang et al. (2018). All weights of the
linear layers have the same value. It is chosen so that the mean distance of unrelated scenes is 0.7, as for unrelated photographs with
the published weights.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..io.atomic import replacing
from ..toy.world import BACKGROUNDS, OBJECTS
from .clip import Examples, degrade

TYPICAL_DISTANCE = 0.7


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lpips"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = lpips.LPIPS(net="squeeze", pnet_rand=True, pnet_tune=True, verbose=False)
    for module in metric.net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if args.init:
        metric.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    device = torch.device(args.device)
    head = nn.Linear(512, len(OBJECTS) + len(BACKGROUNDS)).to(device)
    metric = metric.to(device)
    parameters = [*metric.net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 4e-4, weight_decay=0.01)
    examples = Examples(np.random.default_rng(1), 4000)
    generator = torch.Generator().manual_seed(1)
    objects, places = list(OBJECTS), list(BACKGROUNDS)

    def targets(labels: list[tuple[frozenset[str], str]]) -> Tensor:
        rows = torch.zeros(len(labels), len(objects) + len(places))
        for row, (present, place) in zip(rows, labels, strict=True):
            row[len(objects) + places.index(place)] = 1
            for name in present:
                row[objects.index(name)] = 1
        return rows

    def save() -> None:
        state = {
            "metric": metric.state_dict(),
            "head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "elapsed": elapsed,
        }
        with replacing(state_path) as part:
            torch.save(state, part)
        metric.eval()
        with torch.no_grad():
            for lin in metric.lins:
                lin.model[-1].weight.fill_(1.0)
            x, _, _ = Examples(np.random.default_rng(2), 64).draw(64, 0)
            x = x.to(device)
            scale = TYPICAL_DISTANCE / metric(x[:32], x[32:]).mean().item()
            for lin in metric.lins:
                lin.model[-1].weight.fill_(scale)
        tensors = {k: v.half().contiguous() for k, v in metric.state_dict().items()}
        save_file(
            tensors,
            str(args.out / "lpips.safetensors"),
            metadata={"format": "pt", "lpips": json.dumps({"net": "squeeze"}), "trained_steps": str(step)},
        )

    step, elapsed, average = 0, 0.0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        metric.load_state_dict(state["metric"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    last = time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * min(1.0, (step + 1) / 100, max(0.02, (1 - progress) / 0.5))
        x, mask, labels = examples.draw(args.batch, renew=4)
        x = (degrade(x, mask, generator) if step % 2 else x * mask).to(device)
        features = metric.net.forward(metric.scaling_layer(x))[-1]
        loss = F.binary_cross_entropy_with_logits(head(features.mean((2, 3))), targets(labels).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        average = loss.item() if average == 0.0 else 0.98 * average + 0.02 * loss.item()
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        if step % 100 == 0:
            print(f"step {step} {elapsed / 60:.1f} min  loss {average:.4f}", flush=True)
            save()
    save()


if __name__ == "__main__":
    main()
