"""Guidance of a latent model by CLIP, in a real ComfyUI: a small latent diffusion model of the embedded world (tests/latent), judged by the embedded judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from blended_core.clip.model import load_clip
from blended_core.device import DeviceContext
from blended_core.evaluation.judge import Judge
from blended_core.evaluation.metrics import Pair, pairs
from blended_core.rank import clip_distance
from blended_core.toy.world import demo_scene

from .server import ROOT, Prompt, Server, needs_comfyui

DATA = ROOT / "tests" / "latent" / "data"
BATCH = 2
SCALE = 3000.0
"""What is recommended for the embedded CLIP, as strong on latents of factor 4."""
SIDE = 64
CASES = [pairs(6)[i] for i in (0, 1, 3, 5)]
"""Without guidance the model draws any object, or none; in pair 2 by chance the right one."""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def edits(cases: list[Pair], guided: bool = True, flow: bool = False, decoder: bool = True, **sampler: Any) -> Prompt:
    """A graph that edits every case with KSampler, a batch each, and pastes the results."""
    prompt: Prompt = {"bed": node("LoadLatentTestBed", flow=flow)}
    if guided:
        prompt["clip"] = node("BlendedLoadCLIP", weights="embedded", architecture="", other_tag="")
    values = {"steps": 30, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.9, **sampler}
    for i, case in enumerate(cases):
        text = node("CLIPTextEncode", clip=["bed", 1], text=case.prompt)
        model = ["bed", 0]
        prompt |= {
            f"scene {i}": node("BlendedDemoScene", background=case.background, object="none", width=SIDE, height=SIDE, seed=case.seed),
            f"text {i}": text,
            f"encode {i}": node("VAEEncode", pixels=[f"scene {i}", 0], vae=["bed", 2]),
            f"repeat {i}": node("RepeatLatentBatch", samples=[f"encode {i}", 0], amount=BATCH),
            f"mask {i}": node("SetLatentNoiseMask", samples=[f"repeat {i}", 0], mask=[f"scene {i}", 1]),
        }
        if guided:
            prompt[f"prompt {i}"] = node("BlendedEncodePrompt", clip=["clip", 0], text=case.prompt)
            prompt[f"guide {i}"] = node("BlendedCLIPGuidanceModel", model=model, prompt=[f"prompt {i}", 0], scale=SCALE)
            if decoder:
                prompt[f"guide {i}"]["inputs"]["vae"] = ["bed", 2]
            model = [f"guide {i}", 0]
        prompt |= {
            f"sample {i}": node(
                "KSampler",
                model=model,
                seed=case.seed,
                positive=[f"text {i}", 0],
                negative=[f"text {i}", 0],
                latent_image=[f"mask {i}", 0],
                **values,
            ),
            f"decode {i}": node("VAEDecode", samples=[f"sample {i}", 0], vae=["bed", 2]),
            f"paste {i}": node("BlendedFinalPaste", edited=[f"decode {i}", 0], original=[f"scene {i}", 0], mask=[f"scene {i}", 1]),
            f"decoded {i}": node("PreviewImage", images=[f"decode {i}", 0]),
            f"pasted {i}": node("PreviewImage", images=[f"paste {i}", 0]),
        }
    return prompt


def accepted(comfyui: Server, cases: list[Pair], **how: Any) -> list[bool]:
    """For every picture, whether the judge sees the object. No picture differs from the scene outside the mask, where the decoded ones do."""
    judge, found = Judge(), []
    outcome = comfyui.run(edits(cases, **how))
    assert outcome.error is None, outcome.error
    for i, case in enumerate(cases):
        scene, mask = demo_scene(case.background, case.seed)
        pasted, decoded = (comfyui.pictures(outcome, f"{name} {i}") for name in ("pasted", "decoded"))
        assert len(pasted) == BATCH
        outside = mask[..., 0] == 0
        for before, after in zip(decoded, pasted, strict=True):
            assert (after[outside] == scene[outside]).all() and (before[outside] != scene[outside]).any()
        rows = torch.stack([torch.from_numpy(p.copy()) for p in pasted]).permute(0, 3, 1, 2).float() / 127.5 - 1
        verdicts = judge(rows, torch.from_numpy((~outside)[None, None].astype("float32")))
        found += [verdict.accepts(case.name) for verdict in verdicts]
    return found


def test_the_test_bed_is_small() -> None:
    files = list(DATA.iterdir())
    assert {f.name for f in files} == {"autoencoder.safetensors", "unet.safetensors"} and sum(f.stat().st_size for f in files) <= 8_000_000


@needs_comfyui
@pytest.mark.slow
def test_guidance_brings_the_object_into_a_latent_model(comfyui: Server) -> None:
    assert not any(accepted(comfyui, CASES, guided=False))
    assert sum(accepted(comfyui, CASES)) >= 4
    assert sum(accepted(comfyui, CASES, decoder=False)) >= 4  # by the matrix of the previews, without the VAE


@needs_comfyui
@pytest.mark.slow
@pytest.mark.parametrize("how", [{"flow": True}, {"sampler_name": "dpmpp_2m"}, {"sampler_name": "euler_ancestral"}], ids=str)
def test_one_scale_fits_flows_and_samplers_with_and_without_noise(comfyui: Server, how: dict[str, Any]) -> None:
    assert sum(accepted(comfyui, CASES[1:], **how)) >= 3


TEMPLATE = ROOT / "workflows" / "CLIP guidance on your own model.json"


def prompt_of(workflow: dict[str, Any]) -> Prompt:
    """The prompt that the page would send for a saved workflow."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for item in workflow["nodes"]:
        if item["type"] != "MarkdownNote":
            inputs = {name: value for name, value in item.get("widgets_values_named", {}).items() if name != "control_after_generate"}
            inputs |= {slot["name"]: links[slot["link"]] for slot in item["inputs"] if slot.get("link") is not None}
            prompt[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return prompt


@needs_comfyui
@pytest.mark.slow
def test_the_template_for_other_models_runs_on_this_one(comfyui: Server) -> None:
    """As it was saved, but for the loader and the size of the picture. The guided edit is nearer to the prompt than the same edit without guidance."""
    prompt = prompt_of(json.loads(TEMPLATE.read_text(encoding="utf-8")))

    def one(kind: str) -> tuple[str, dict[str, Any]]:
        ((key, found),) = [(k, n) for k, n in prompt.items() if n["class_type"] == kind]
        return key, found["inputs"]

    loader, _ = one("CheckpointLoaderSimple")
    prompt[loader] = node("LoadLatentTestBed", flow=False)
    _, scene = one("BlendedDemoScene")
    scene |= {"width": SIDE, "height": SIDE}
    _, guide = one("BlendedCLIPGuidanceModel")
    guide["scale"] = SCALE
    result, _ = one("SaveImage")
    _, sampler = one("KSampler")
    outcome = comfyui.run(prompt)
    assert outcome.error is None, outcome.error
    assert len(outcome.previews) >= sampler["steps"] // 2
    sampler["model"] = [loader, 0]
    without = comfyui.run(prompt)
    before, mask = demo_scene(scene["background"], scene["seed"], SIDE, SIDE)
    (guided,), (unguided,) = (comfyui.pictures(found, result) for found in (outcome, without))
    assert (guided[mask[..., 0] == 0] == before[mask[..., 0] == 0]).all()
    clip = load_clip(DeviceContext())
    text = clip.prompt(one("BlendedEncodePrompt")[1]["text"])
    rows = torch.stack([torch.from_numpy(p.copy()) for p in (guided, unguided)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    near, far = clip_distance(rows, torch.from_numpy(mask[None, None, ..., 0] / 255).float(), clip, text).tolist()
    assert near < far - 0.05
