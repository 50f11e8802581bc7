"""Run by ComfyUI's own Python: edits with KSampler and CLIP Guidance (MODEL), judged by the embedded judge.

    cd COMFYUI && .venv/bin/python PACK/tests/latent_edits.py table --pairs 32 --out runs/latent_edits.jsonl
    cd COMFYUI && .venv/bin/python PACK/tests/latent_edits.py cost

``table`` appends one line for each edit and continues where it stopped; ``--rows`` chooses from ROWS. ``cost`` compares a guided step with an
unguided one. tests/test_latent_model.py runs ``check``, which prints what it observed as JSON.

The models: the latent test bed; the same network as a flow, because x of a flow is x of a variance-preserving process times a number; and the
embedded diffusion model as a MODEL.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contract import NAME, pack
from torch import Tensor

BATCH, STEPS = 2, 30
DENOISE = {"pixel": 0.75, "latent": 0.9, "flow": 0.9}
"""Share of the noise levels. Latents of 16×16 show the scene through the noise of share 0.75, and the model then keeps it empty."""
SCALE = 3000.0
"""Guidance scale that is recommended for the embedded CLIP."""


@dataclass(frozen=True)
class Row:
    """How pictures are edited. ``model``: latent, flow or pixel. ``decoder``: full, linear, or none for no guidance."""

    model: str = "latent"
    decoder: str = "full"
    scale: float = SCALE
    sampler: str = "euler"
    steps: int = STEPS
    denoise: float = 0.0
    gradient: str = "x0"

    def __post_init__(self) -> None:
        object.__setattr__(self, "denoise", self.denoise or DENOISE[self.model])


FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
ROWS = {
    "latent, unguided": Row(decoder="none"),
    "latent, unguided, denoise 1": Row(decoder="none", denoise=1.0),
    "flow, unguided": Row("flow", "none"),
    "pixel, unguided": Row("pixel", "none"),
    **{f"latent, {decoder}, ×{f:g}": Row("latent", decoder, SCALE * f) for decoder in ("full", "linear") for f in FACTORS},
    **{f"{model}, ×{f:g}": Row(model, scale=SCALE * f) for model in ("flow", "pixel") for f in FACTORS},
    **{f"latent, {s}": Row(sampler=s) for s in ("dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "ddpm", "heun", "uni_pc", "lcm")},
    "latent, through the model": Row(gradient="model"),
}


class Bench:
    """The pack, the models and the judge in one process."""

    def __init__(self) -> None:
        module = pack()
        self.library = lambda name: importlib.import_module(f"{NAME}.blended_core.{name}")

        async def found() -> list[Any]:
            extension = await module.comfy_entrypoint()
            await extension.on_load()
            return list(await extension.get_node_list())

        import comfy.utils

        import nodes

        comfy.utils.PROGRESS_BAR_ENABLED = False
        self.core = nodes
        self.nodes = {node.define_schema().node_id: node for node in asyncio.run(found())}
        self.judge = self.library("evaluation.judge").Judge()
        self.clip = self.node("BlendedLoadCLIP", weights="embedded")[0]
        self.models: dict[str, tuple[Any, Any, Any]] = {}

    def node(self, name: str, **inputs: Any) -> tuple[Any, ...]:
        """What a node of the pack returns."""
        with torch.inference_mode():
            outputs: tuple[Any, ...] = self.nodes[name].execute(**inputs).args
        return outputs

    def load(self, kind: str) -> tuple[Any, Any, Any]:
        """(MODEL, CONDITIONING, VAE), made under inference mode as by a node."""
        if kind not in self.models:
            from latent import model as bed

            with torch.inference_mode():
                if kind == "pixel":
                    ddpm = self.node("BlendedLoadDDPM", checkpoint="embedded")[0]
                    model, positive, _, vae, *_ = self.node("BlendedDDPMAsModel", ddpm=ddpm)
                else:
                    model = bed.load_model(flow=kind == "flow")
                    positive = bed.EmptyTextEncoder().encode_from_tokens_scheduled("")
                    vae = bed.load_vae()
            self.models[kind] = model, positive, vae
        return self.models[kind]

    def guide(self, row: Row, prompt: str) -> Any:
        """The MODEL of a row, guided toward a prompt."""
        model, _, vae = self.load(row.model)
        if row.decoder == "none":
            return model
        text = self.node("BlendedEncodePrompt", clip=self.clip, text=prompt)[0]
        given = {"vae": vae} if row.decoder == "full" and row.model != "pixel" else {}
        return self.node("BlendedCLIPGuidanceModel", model=model, prompt=text, scale=row.scale, gradient=row.gradient, **given)[0]

    def latent(self, row: Row, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """An image [1, H, W, 3] as LATENT with a noise mask [1, H, W], for a batch."""
        _, _, vae = self.load(row.model)
        (latent,) = self.core.VAEEncode().encode(vae, image)
        (latent,) = self.core.RepeatLatentBatch().repeat(latent, BATCH)
        (masked,) = self.core.SetLatentNoiseMask().set_mask(latent, mask)
        return dict(masked)

    def edit(self, row: Row, prompt: str, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(edited images as they were decoded, the same after Final Paste), both [B, H, W, 3] in 0..1."""
        _, positive, vae = self.load(row.model)
        model = self.guide(row, prompt)
        with torch.inference_mode():
            latent = self.latent(row, image, mask)
            (sampled,) = self.core.KSampler().sample(
                model, seed, row.steps, 1.0, row.sampler, "normal", positive, positive, latent, row.denoise
            )
            (edited,) = self.core.VAEDecode().decode(vae, sampled)
        return edited, self.node("BlendedFinalPaste", edited=edited, original=image, mask=mask)[0]

    def scene(self, pair: Any) -> tuple[Tensor, Tensor]:
        """(image [1, 64, 64, 3], mask [1, 64, 64]) of a pair of the evaluation."""
        scene, mask = self.library("toy.world").demo_scene(pair.background, pair.seed)
        return torch.from_numpy(scene)[None].float() / 255, torch.from_numpy(mask[None, :, :, 0].copy()).float() / 255

    def pairs(self, count: int) -> list[Any]:
        """The first pairs of the evaluation."""
        return list(self.library("evaluation.metrics").pairs(count))

    def judged(self, row: Row, pair: Any) -> dict[str, Any]:
        """An edit, and what the judge says."""
        image, mask = self.scene(pair)
        start = time.process_time()
        edited, pasted = self.edit(row, pair.prompt, image, mask, pair.seed)
        seconds = time.process_time() - start
        verdicts = self.judge(pasted.permute(0, 3, 1, 2) * 2 - 1, (mask > 0.5).float()[:, None])
        outside = (mask == 0).expand(len(pasted), -1, -1)
        return {
            "accepted": [v.accepts(pair.name) for v in verdicts],
            "answers": [v.answer for v in verdicts],
            "probability": [round(v.probabilities[pair.name], 3) for v in verdicts],
            "changed outside": int((pasted != image).any(-1)[outside].sum()),
            "decoded outside": float((edited - image).abs()[outside].mean()),
            "seconds": round(seconds, 2),
            "pictures": pasted,
        }


def table(bench: Bench, names: list[str], count: int, out: Path, pictures: Path | None) -> None:
    """Judges edits row by row, and prints the table."""
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["row"], r["pair"]) for r in known if r["settings"] == asdict(ROWS[r["row"]])} if known else set()
    for name in names:
        for pair in bench.pairs(count):
            if (name, pair.number) in done:
                continue
            found = bench.judged(ROWS[name], pair)
            images = found.pop("pictures")
            if pictures is not None:
                strip = bench.library("io.images").to_uint8(torch.cat(list(images), 1).permute(2, 0, 1)[None])
                bench.library("io.images").write_png(pictures / f"{name}-{pair.number}.png", strip)
            known.append({"row": name, "pair": pair.number, "name": pair.name, "settings": asdict(ROWS[name]), **found})
            with out.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
        rows = [r for r in known if r["row"] == name and r["pair"] < count]
        single = [a for r in rows for a in r["accepted"]]
        print(
            f"{name:32} {sum(single)}/{len(single)} = {100 * statistics.mean(single):.0f} %  best of pair "
            f"{sum(any(r['accepted']) for r in rows)}/{len(rows)}  changed outside {sum(r['changed outside'] for r in rows)}  "
            f"{statistics.median(r['seconds'] for r in rows):.1f} s",
            flush=True,
        )


def cost(bench: Bench, rounds: int = 5) -> None:
    """Median and quartiles of the processor time of sampling with guidance over sampling without, round by round alternating."""
    image, mask = bench.scene(bench.pairs(1)[0])
    ways = {
        "latent, full decoder": Row(steps=10),
        "latent, linear": Row(decoder="linear", steps=10),
        "latent, full decoder, through the model": Row(gradient="model", steps=10),
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, list[float]] = {name: [] for name in ways}

    def seconds(row: Row) -> float:
        start = time.process_time()
        with torch.inference_mode():
            _, positive, _ = bench.load(row.model)
            bench.core.KSampler().sample(model[row], 0, row.steps, 1.0, row.sampler, "normal", positive, positive, latent[row], row.denoise)
        return time.process_time() - start

    for turn in range(rounds + 1):
        for name, row in ways.items():
            plain = replace(row, decoder="none", gradient="x0")
            model = {r: bench.guide(r, "an apple") for r in (row, plain)}
            with torch.inference_mode():
                latent = {r: bench.latent(r, image, mask) for r in (row, plain)}
            unguided, guided = seconds(plain), seconds(row)
            if turn:  # the first round loads networks
                ratios[name].append(guided / unguided)
                steps[name].append(1000 * guided / row.steps)
    for name in ways:
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        print(
            f"{name:42} ×{middle:.2f} ({low:.2f}…{high:.2f})  {statistics.median(steps[name]):.0f} ms a step of {BATCH} images", flush=True
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "cost"))
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("latent_edits.jsonl"))
    parser.add_argument("--pictures", type=Path)
    args = parser.parse_args()
    args.out, args.pictures = args.out.absolute(), args.pictures and args.pictures.absolute()
    torch.set_num_threads(1)
    bench = Bench()
    if args.what == "table":
        table(bench, args.rows, args.pairs, args.out, args.pictures)
    else:
        cost(bench)


if __name__ == "__main__":
    main()
