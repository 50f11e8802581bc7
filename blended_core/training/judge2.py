"""Trains the judge of world 2 (:mod:`blended_core.evaluation.judge2`).

    python -m blended_core.training.judge2 --out runs/judge2 --minutes 30

It learns the words in all their designs where the mask points; that fragments, mixtures, scrambled objects and blobs are none; and
whether the ground inside the mask is what it was. The same command continues where it stopped. The accuracy on scenes that were
never trained on, with held-back photographs, is printed at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..evaluation.judge2 import ANSWERS, Judge2, Judge2Network
from ..evaluation.world2_cases import Case, random_case
from ..io.atomic import replacing
from ..toy.world2_sources import HELD_BACK, TRAINING
from .ddpm2 import stopwatch
from .judge import augment

SAVE_EVERY = 180.0


def as_batch(cases: list[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """([B, 4, 64, 64]: pictures in −1..1 and masks; [B] indices of ANSWERS; [B] 1 intact, 0 damaged, −1 not to be asked)."""
    rows = np.stack([np.concatenate([c.picture * 2 - 1, c.mask[..., None]], 2) for c in cases])
    intact = torch.tensor([-1.0 if c.intact is None else float(c.intact) for c in cases])
    return torch.from_numpy(rows).permute(0, 3, 1, 2).float(), torch.tensor([ANSWERS.index(c.answer) for c in cases]), intact


def judge_loss(logits: Tensor, answers: Tensor, intact: Tensor) -> Tensor:
    """Cross-entropy of the answer and of the ground's state where it is asked for."""
    asked = intact >= 0
    ground = F.binary_cross_entropy_with_logits(logits[asked, len(ANSWERS)], intact[asked]) if asked.any() else logits.new_zeros(())
    return F.cross_entropy(logits[:, : len(ANSWERS)], answers, label_smoothing=0.02) + ground


def accuracy(judge: Judge2, count: int, split: str, seed: int = 12345) -> dict[str, float]:
    """Shares of right answers on fresh cases: of the object, of the ground, and of tones of the ground by the judge's word alone."""
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, split) for _ in range(count)]
    x, _, _ = as_batch(cases)
    verdicts = [v for i in range(0, count, 100) for v in judge(x[i : i + 100, :3], x[i : i + 100, 3:])]
    pairs = list(zip(cases, verdicts, strict=True))
    whole = [v.answer == c.answer for c, v in pairs if c.intact is not None]
    spoiled = [v.answer == c.answer for c, v in pairs if c.intact is None]
    intact = [v.intact >= 0.5 for c, v in pairs if c.intact is True]
    damaged = [v.intact < 0.5 for c, v in pairs if c.intact is False]
    return {k: float(np.mean(v)) for k, v in (("whole", whole), ("spoiled", spoiled), ("intact", intact), ("damaged", damaged))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judge2"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    network = Judge2Network()
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=0.05)
    ema = {k: v.detach().clone() for k, v in network.state_dict().items()}
    step, elapsed, average = 0, 0.0, 0.0
    state_path, file = args.out / "state.pt", args.out / "judge2.safetensors"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, elapsed = state["ema"], state["step"], state["elapsed"]

    def save() -> None:
        whole = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step, "elapsed": elapsed}
        with replacing(state_path) as part:
            torch.save(whole, part)
        halves = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in ema.items()}
        with replacing(file) as part:
            save_file(halves, str(part), metadata={"format": "pt", "trained_steps": str(step)})

    def tell(count: int) -> None:
        for split in (TRAINING, HELD_BACK):
            found = accuracy(Judge2(file), count, split)
            print(f"  {split}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)

    rng = np.random.default_rng((args.seed, step))
    pool = [random_case(rng) for _ in range(4000)]
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    clock = stopwatch(torch.device("cpu"))
    last, saved = clock(), time.monotonic()
    while (progress := elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 200, max(0.01, (1 - progress) / 0.7))
        for _ in range(12):
            pool[int(rng.integers(len(pool)))] = random_case(rng)
        x, answers, intact = as_batch([pool[int(i)] for i in rng.integers(len(pool), size=args.batch)])
        loss = judge_loss(network(augment(x, generator)), answers, intact)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in network.state_dict().items():
                ema[k] = v.clone() if not v.is_floating_point() else ema[k].lerp_(v, 1 - decay)
        step += 1
        average = loss.item() if average == 0.0 else 0.98 * average + 0.02 * loss.item()
        now = clock()
        elapsed, last = elapsed + now - last, now
        if step % 100 == 0:
            print(f"step {step} {elapsed / 60:.1f} min  loss {average:.4f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            tell(300)
            last, saved = clock(), time.monotonic()
    save()
    print("on 1000 fresh cases:")
    tell(1000)


if __name__ == "__main__":
    main()
