"""Judges what core's samplers make of the embedded model with CLIP Guidance (MODEL), beside the sampler of this package, in ComfyUI's own Python.

    python -m benchmarks.guided_model --pairs 32

Every row edits the same pairs of scene and object as ``blended-diffusion evaluate``, and the judge decides whether the object is there. ComfyUI is found by
COMFYUI_PATH or in the home folder. ``tests/latent_edits.py cost`` measures the cost of a guided step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS, STRENGTH, SEED, CANDIDATES = 30, 0.75, 0, 2


@dataclass(frozen=True)
class Row:
    """A sampler of core, and how it is guided. ``sampler`` '': the preset best of this package."""

    sampler: str
    guided: bool = True
    gradient: str = "x0"
    scheduler: str = "normal"
    steps: int = STEPS
    kind: str = "auto"


ROWS: dict[str, Row] = {
    "own sampler, preset best": Row(""),
    "euler": Row("euler"),
    "unguided euler": Row("euler", guided=False),
    "dpmpp_2m": Row("dpmpp_2m"),
    "euler_ancestral": Row("euler_ancestral"),
    "dpmpp_2m_sde": Row("dpmpp_2m_sde"),
    "euler_cfg_pp": Row("euler_cfg_pp"),
    "euler guided as sde": Row("euler", kind="sde"),
    "euler_ancestral, gradient through the model": Row("euler_ancestral", gradient="model"),
    "euler, gradient through the model": Row("euler", gradient="model"),
}


def inside(arguments: argparse.Namespace) -> None:
    """The work, in ComfyUI's Python."""
    sys.path.insert(0, str(ROOT / "tests"))
    contract = importlib.import_module("contract")
    contract.pack()
    import torch

    torch.set_num_threads(1)

    def module(name: str) -> Any:
        return importlib.import_module(f"{contract.NAME}.{name}")

    with torch.inference_mode():
        ddpm = module("nodes.load").LoadDDPM.execute("embedded").args[0]
        clip = module("nodes.load").LoadCLIP.execute("embedded").args[0]
    cases = module("blended_core.evaluation.metrics").pairs(arguments.pairs)
    judge = module("blended_core.evaluation.judge").Judge()
    known = read(arguments.out)
    for name in arguments.rows:
        for case in cases:
            key = {"row": name, **asdict(ROWS[name]), "pair": case.number}
            if any(record["key"] == key for record in known):
                continue
            pictures, masks = edited(module, ddpm, clip, ROWS[name], case)
            accepted = [verdict.accepts(case.name) for verdict in judge(pictures, masks)]
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "accepted": accepted}) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """The verdicts of earlier runs."""
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def edited(module: Callable[[str], Any], ddpm: Any, clip: Any, row: Row, case: Any) -> tuple[Any, Any]:
    """The candidates of a pair, pasted into the scene: their region [B, 3, S, S] in −1..1, and its mask [1, 1, S, S]."""
    import torch

    edit, region = module("blended_core.edit"), module("blended_core.region")
    scene, drawn = module("blended_core.toy.world").demo_scene(case.background, case.seed)
    picture = torch.from_numpy(scene).permute(2, 0, 1)[None].float() / 255
    mask = module("blended_core.mask").EditMask.of(torch.from_numpy(drawn[..., 0]).float()[None, None] / 255)
    size = ddpm.model.image_size
    if not row.sampler:
        options = module("blended_core.options").preset("best", scale=ddpm.model.guidance_scale, seed=SEED, candidates=CANDIDATES)
        memory, context = module("nodes.memory"), module("blended_core.device").DeviceContext()
        with context.autograd():
            models = module("blended_core.sample").Models(ddpm.model, clip.model, None, context, memory.MemoryLimits())
            result = edit.edit_picture(picture, mask.values, clip.model.prompt(case.prompt), models, options)
            finished = torch.cat([result.picture(candidate) for candidate in result.candidates])
        found = result.region
    else:
        prepared = edit.prepare(picture, mask, size)
        samples = sampled(module, ddpm, clip, row, case.prompt, prepared.source, prepared.mask.values)
        finished = region.paste(samples, picture, mask, prepared.region)
        found = prepared.region
    cut = torch.cat([found.cut(one[None], size) for one in finished])
    return cut * 2 - 1, found.cut_mask(mask, size).values


def sampled(module: Callable[[str], Any], ddpm: Any, clip: Any, row: Row, prompt: str, source: Any, mask: Any) -> Any:
    """KSampler on the source [1, 3, S, S] inside the mask [1, 1, S, S], with guidance toward the prompt; [CANDIDATES, 3, S, S]."""
    import comfy.sample
    import torch

    with torch.inference_mode():
        model, positive, negative, _, _ = module("nodes.model").DDPMAsModel.execute(ddpm).args
        if row.guided:
            encoded = module("nodes.prompt").EncodePrompt.execute(clip, prompt).args[0]
            (model,) = module("nodes.guidance").CLIPGuidanceModel.execute(model, encoded, gradient=row.gradient, sampler_kind=row.kind).args
        latent = source.expand(CANDIDATES, -1, -1, -1).clone()
        noise = comfy.sample.prepare_noise(latent, SEED)
        samples = comfy.sample.sample(
            model, noise, row.steps, 1.0, row.sampler, row.scheduler, positive, negative, latent, denoise=STRENGTH,
            noise_mask=mask.expand(CANDIDATES, -1, -1, -1)[:, 0], disable_pbar=True, seed=SEED,
        )  # fmt: skip
    return samples.clone()


def table(records: list[dict[str, Any]], rows: list[str], pairs: int) -> str:
    """A Markdown table: accepted candidates, and pairs with an accepted candidate."""
    lines = ["| row | accepted | best of a pair |", "|---|---|---|"]
    for name in rows:
        found = [
            r["accepted"] for r in records if r["key"].items() >= {"row": name, **asdict(ROWS[name])}.items() and r["key"]["pair"] < pairs
        ]
        count = sum(map(len, found))
        lines.append(
            f"| {name} | {sum(map(sum, found))}/{count} ({sum(map(sum, found)) / max(count, 1):.0%}) | {sum(map(any, found))}/{len(found)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guided_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/guided_model.jsonl"), help="file of the verdicts; a run continues where it stopped"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments)
        return 0
    from tests.server import COMFYUI, environment, interpreter

    out = arguments.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        interpreter(),
        str(Path(__file__).absolute()),
        "--pairs",
        str(arguments.pairs),
        "--rows",
        *arguments.rows,
        "--out",
        str(out),
        "--inside",
    ]
    code = subprocess.run(command, cwd=COMFYUI, env=environment()).returncode
    print(table(read(out), arguments.rows, arguments.pairs))
    return code


if __name__ == "__main__":
    sys.exit(main())
