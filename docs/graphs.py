"""The templates and blueprints of the pack, as data: nodes in titled columns, wired by name. docs/make_workflows.py builds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHECKPOINTS_SCALE = -1.0
"""The value of Guidance Options for the scale that the checkpoint recommends."""


WIDTH = 300
NOTE = ("#432", "#653")
STEPS = 20
SDXL = "sd_xl_base_1.0.safetensors"
"""The checkpoint that templates of ComfyUI itself name; the user chooses his own."""
SAMPLER = "dpmpp-2m"
"""Of the step loop; the sampler node has that of its preset."""
GROUPS = {
    "Models": "#3b4a5c",
    "Image": "#3d5446",
    "Edit": "#5b4634",
    "Result": "#4f3d57",
}


@dataclass(frozen=True)
class Node:
    """A node: its type, widget values, and what is wired into which input ('other.output')."""

    type: str
    wires: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    width: int = WIDTH
    height: int = 0
    color: tuple[str, str] | None = None


@dataclass(frozen=True)
class Column:
    """Nodes one below the other in a group with a title; no title, no group."""

    title: str
    nodes: dict[str, Node]


@dataclass(frozen=True)
class Graph:
    """A workflow. Columns in a tuple stand one below the other.

    ``before`` and ``after`` name the nodes whose pictures make the thumbnail, ``images_per_node`` how many of each. ``app`` lists what the App
    mode of the page shows: (node, widget) for inputs and a node for an output. ``stand_in``: the graph that runs instead, for the thumbnail, where this
    one needs a model that is not part of the pack.
    """

    name: str
    columns: tuple[Column | tuple[Column, ...], ...]
    before: str = ""
    after: tuple[str, ...] = ()
    images_per_node: int = 1
    overlap_free: bool = True
    colors: dict[str, str] = field(default_factory=lambda: GROUPS)
    app: tuple[str | tuple[str, str], ...] = ()
    stand_in: Graph | None = None

    def stacks(self) -> list[tuple[Column, ...]]:
        """The columns from left to right, each from top to bottom."""
        return [stack if isinstance(stack, tuple) else (stack,) for stack in self.columns]

    def nodes(self) -> dict[str, Node]:
        """All nodes by name."""
        return {name: node for stack in self.stacks() for column in stack for name, node in column.nodes.items()}

    def links(self) -> list[tuple[str, str, str, str]]:
        """(from, output, to, input)."""
        return [
            (*wire.split(".", 1), name, socket)  # type: ignore[misc]
            for name, node in self.nodes().items()
            for socket, wire in node.wires.items()
        ]


@dataclass(frozen=True)
class Blueprint:
    """A graph of which a part becomes one node. Slots: (inner node, its slot, the name that the person sees); inputs with one name are one
    input."""

    graph: Graph
    inside: tuple[str, ...]
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    description: str


def note_column(text: str, width: int = 380, height: int = 320, below: tuple[Column, ...] = ()) -> tuple[Column, ...]:
    """A column that begins with a note."""
    return (
        Column("", {"note": Node("MarkdownNote", values={"text": text}, title="Read me", width=width, height=height, color=NOTE)}),
        *below,
    )


def models(text: str | None, scale: float = CHECKPOINTS_SCALE, **options: Any) -> Column:
    """The embedded networks and a prompt."""
    nodes = {"ddpm": Node("BlendedLoadDDPM", height=236)}  # room for what it shows after a run
    if text is not None:
        nodes["clip"] = Node("BlendedLoadCLIP", height=120)
        nodes["prompt"] = prompt(text)
        nodes["options"] = Node("BlendedGuidanceOptions", values={"scale": scale, **options})
    return Column("Models", nodes)


def prompt(text: str) -> Node:
    """What CLIP should see."""
    return Node("BlendedEncodePrompt", {"clip": "clip.clip"}, {"text": text}, height=140)


def scene(background: str, seed: int = 0, object_name: str = "none", width: int = 256, height: int = 256) -> Node:
    """A picture of the embedded world."""
    values = {
        "background": background,
        "object": object_name,
        "width": width,
        "height": height,
        "seed": seed,
        "control_after_generate": "fixed",
    }
    return Node("BlendedDemoScene", values=values)


def preview(picture: str, title: str, height: int = 320) -> Node:
    """A picture to look at."""
    return Node("PreviewImage", {"images": picture}, title=title, height=height)


def save(picture: str, prefix: str, height: int = 340) -> Node:
    """A picture to keep."""
    return Node("SaveImage", {"images": picture}, {"filename_prefix": f"blended/{prefix}"}, height=height)


def sampler(
    image: str = "scene.image", mask: str = "scene.mask", *, prompt: str | None = "prompt", options: str = "options", **values: Any
) -> Node:
    """The whole edit in one node."""
    wires = {"ddpm": "ddpm.ddpm", "image": image, "mask": mask}
    if prompt is not None:
        wires |= {"prompt": f"{prompt}.prompt", "options": f"{options}.options"}
    return Node("BlendedSampler", wires, {"steps": STEPS, "seed": 0, "control_after_generate": "fixed", **values}, height=690)


def scores(of: str = "sampler.scores") -> Node:
    """The table of scores as text."""
    return Node("PreviewAny", {"source": of}, title="Scores", height=180)


QUICK = Graph(
    "Quick edit",
    (
        note_column(
            "# Quick edit\n\nPress **Run**. The white part of the mask is edited: a mushroom appears there. Every other pixel stays unchanged.\n\n"
            "- The result shows four candidates, **best first**.\n"
            "- Change the text in *Encode Prompt*: `a rose`, `a tree`, `a pumpkin`… The embedded models know 16 objects and 6 backgrounds.\n"
            "- To get new candidates at every run, set *control after generate* of the sampler to `randomize`.\n"
            "- *strength* 1 keeps nothing of what the mask covers. Lower values keep more of it.\n\n"
            "The models are part of the pack. Nothing is downloaded.",
            height=360,
        ),
        models("a mushroom"),
        Column("Image", {"scene": scene("meadow"), "before": preview("scene.image", "Before")}),
        Column("Edit", {"sampler": sampler(candidates=4)}),
        Column("Result", {"after": save("sampler.images", "quick_edit", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
    app=(("scene", "background"), ("prompt", "text"), ("sampler", "strength"), ("sampler", "seed"), ("sampler", "candidates"), "after"),
)

STEP_BY_STEP = Graph(
    "Six nodes step by step",
    (
        note_column(
            "# The method, one node at a time\n\nEach iteration of the loop is one noise level:\n\n"
            "1. **CLIP Guidance Step** takes one denoising step toward the prompt.\n"
            "2. **Noise Background** (*match*) noises the source image to the level of that step.\n"
            "3. **Blend Latents** takes the step inside the mask and the noised source image outside.\n\n"
            "The loop ends when no noise is left. **Final Paste** pastes the edit into the source image, which stays bit-identical outside the mask.\n\n"
            "Steps, strength, seed and mask are set once, in *Noise Background* (*start*). The LATENT carries them. With the same settings, "
            "*Blended Diffusion Sampler* returns the same image.",
            height=440,
        ),
        models("an apple"),
        Column(
            "Image",
            {
                "scene": scene("lake"),
                "before": preview("scene.image", "Before", 280),
                "start": Node(
                    "BlendedNoiseBackground",
                    {"image": "scene.image", "mode.ddpm": "ddpm.ddpm", "mode.mask": "scene.mask"},
                    {"mode": "start", "mode.steps": STEPS},
                ),
            },
        ),
        Column(
            "Loop: one iteration per noise level",
            {
                "begin": Node("BlendedDenoiseLoopStart", {"latent": "start.latent"}),
                "step": Node(
                    "BlendedCLIPGuidanceStep",
                    {"ddpm": "ddpm.ddpm", "latent": "begin.latent", "prompt": "prompt.prompt", "options": "options.options"},
                    {"sampler": SAMPLER, "tone_match": "late"},
                    height=504,
                ),
                "match": Node(
                    "BlendedNoiseBackground", {"image": "scene.image", "mode.latent": "step.latent"}, {"mode": "match"}, height=90
                ),
                "blend": Node("BlendedBlendLatents", {"foreground": "step.latent", "background": "match.latent"}),
                "end": Node("BlendedDenoiseLoopEnd", {"flow": "begin.flow", "latent": "blend.latent"}),
            },
        ),
        Column(
            "Result",
            {
                "paste": Node("BlendedFinalPaste", {"edited": "end.latent", "original": "scene.image"}),
                "after": save("paste.image", "step_by_step", 400),
            },
        ),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "Loop: one iteration per noise level": GROUPS["Edit"]},
)

RANKED = Graph(
    "Many results ranked",
    (
        note_column(
            "# Many results, ranked\n\nNot every candidate is good, so the paper makes many and keeps the best. This workflow makes twelve candidates, "
            "four at once, **ranked by CLIP**. The first four are saved. The last four are shown for comparison.\n\n"
            "*Rank by CLIP* sorts images of **any** node. Here it ranks the same candidates by a prompt that describes the whole scene, without a mask.\n\n"
            "The ranking of CLIP is coarse. Compare the candidates yourself.",
            height=340,
            below=(Column("Image", {"scene": scene("meadow"), "before": preview("scene.image", "Before")}),),
        ),
        models("a cat"),
        (Column("Edit", {"sampler": sampler(candidates=12)}), Column("Scores", {"scores": scores()})),
        Column(
            "Result",
            {
                "best": Node("ImageFromBatch", {"image": "sampler.images"}, {"batch_index": 0, "length": 4}, title="The best four"),
                "after": save("best.IMAGE", "ranked", 360),
                "worst": Node("ImageFromBatch", {"image": "sampler.images"}, {"batch_index": 8, "length": 4}, title="The last four"),
                "last": preview("worst.IMAGE", "Last four", 300),
            },
        ),
        Column(
            "Ranked by another prompt",
            {
                "other": Node(
                    "BlendedEncodePrompt", {"clip": "clip.clip"}, {"text": "a cat on a meadow"}, title="Encode Prompt (scene)", height=140
                ),
                "rank": Node("BlendedRankByCLIP", {"images": "sampler.images", "prompt": "other.prompt"}, {"keep": 4}),
                "again": preview("rank.images", "Best four by the other prompt", 360),
            },
        ),
    ),
    after=("after",),
    images_per_node=4,
    colors={**GROUPS, "Scores": GROUPS["Result"], "Ranked by another prompt": GROUPS["Models"]},
)

BACKGROUND = Graph(
    "Replace the background",
    (
        note_column(
            "# Replace the background\n\nThe mask covers the object. The core node *Invert Mask* inverts it: everything **except** the object is edited, "
            "and the object stays bit-identical.\n\n"
            "- *strength* 1 keeps nothing of the old background. About 0.7 keeps its layout.\n"
            "- Other backgrounds that the embedded models know: `a meadow`, `a desert`, `night`, `snow`, `a sunset`.\n"
            "- *scale* is lower than for objects. CLIP was trained on few images with a hole in the middle, so it gives good scores to wrong colors.",
            height=300,
        ),
        models("a lake", scale=1500.0),
        Column(
            "Image",
            {
                "scene": scene("desert", object_name="cactus", seed=2),
                "before": preview("scene.image", "Before", 260),
                "invert": Node("InvertMask", {"mask": "scene.mask"}),
                "mask": Node("MaskPreview", {"mask": "invert.MASK"}, title="White: edited", height=240),
            },
        ),
        Column("Edit", {"sampler": sampler(mask="invert.MASK", strength=1.0, candidates=4)}),
        Column("Result", {"after": save("sampler.images", "background", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
)

REMOVAL = Graph(
    "Remove an object",
    (
        note_column(
            "# Remove an object\n\n**Without a prompt** there is no guidance. The diffusion model fills in the masked part from its surroundings. "
            "The embedded model was trained on few scenes without an object in the middle, so it generates another object. "
            "A checkpoint that was trained on places gives better results.\n\n"
            "**A prompt that describes the background** helps with any model: here `an empty meadow`.\n\n"
            "- The mask should cover the whole object and a margin around it (*Grow Mask*).\n"
            "- *strength* 1 keeps nothing of the object.\n"
            "- Make several candidates. Without a prompt they are not ranked, and come in the order of their numbers.",
            height=360,
        ),
        models("an empty meadow"),
        Column(
            "Image",
            {
                "scene": scene("meadow", object_name="mushroom", seed=4),
                "before": preview("scene.image", "Before", 280),
            },
        ),
        Column(
            "With a background prompt",
            {"sampler": sampler(strength=1.0, context=1.8, candidates=4, seed=2), "after": save("sampler.images", "removal", 360)},
        ),
        Column(
            "Without a prompt",
            {
                "alone": sampler(prompt=None, strength=1.0, context=1.8, candidates=4),
                "other": preview("alone.images", "Without a prompt", 360),
            },
        ),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "With a background prompt": GROUPS["Edit"], "Without a prompt": GROUPS["Result"]},
)

SCRIBBLE = Graph(
    "Scribble to object",
    (
        note_column(
            "# Scribble to object\n\nPaint a rough shape and mask it. *strength* 0.6 starts the edit at a medium noise level: the colors and the position of the "
            "scribble are kept, and the prompt turns it into an object.\n\n"
            "Here core nodes paint the scribble, a red patch and a brown one. For your own image, use any paint program or the brush of the mask editor.\n\n"
            "A lower *strength* stays closer to the scribble.",
            height=300,
            below=(
                Column(
                    "Image",
                    {"scene": scene("meadow", seed=6), "mask": Node("MaskPreview", {"mask": "scene.mask"}, title="Mask", height=260)},
                ),
            ),
        ),
        Column(
            "Scribble",
            {
                "brown": Node("EmptyImage", values={"width": 40, "height": 80, "color": 0xE8D9C0}, title="Stem"),
                "stem": Node(
                    "ImageCompositeMasked",
                    {"destination": "scene.image", "source": "brown.IMAGE"},
                    {"x": 108, "y": 128},
                    title="Paint the stem",
                ),
                "red": Node("EmptyImage", values={"width": 128, "height": 72, "color": 0xD03030}, title="Cap"),
                "cap": Node(
                    "ImageCompositeMasked", {"destination": "stem.IMAGE", "source": "red.IMAGE"}, {"x": 64, "y": 62}, title="Paint the cap"
                ),
            },
        ),
        models("a mushroom"),
        (
            Column("Edit", {"sampler": sampler("cap.IMAGE", strength=0.6, candidates=4)}),
            Column("Before", {"before": preview("cap.IMAGE", "Scribble", 300)}),
        ),
        Column("Result", {"after": save("sampler.images", "scribble", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "Scribble": GROUPS["Image"], "Before": GROUPS["Image"]},
)

ALGORITHMS = Graph(
    "Algorithm 1 beside Algorithm 2",
    (
        note_column(
            "# Two algorithms of one paper\n\n**Algorithm 1** (*local*) preserves the background by a loss with the weight λ (*background_scale*). The model changes the "
            "whole region, and the background drifts.\n\n"
            "**Algorithm 2** (*blended*) blends in the noised source image at every noise level. The background does not drift, and the edit "
            "adapts to it.\n\n"
            "The previews show the region (output x̂0) before it is pasted. Compare the part outside the mask. With λ 100 the background drifts more; "
            "with λ 10000 the edit changes less.",
            height=340,
        ),
        models("an apple"),
        Column(
            "Image",
            {
                "scene": scene("sunset", seed=1),
                "with_lambda": Node(
                    "BlendedGuidanceOptions",
                    values={"scale": CHECKPOINTS_SCALE, "background_scale": 1000},
                    title="Guidance Options (λ 1000)",
                ),
            },
        ),
        Column(
            "Algorithm 1: local",
            {
                "first": sampler(options="with_lambda", algorithm="local", candidates=2),
                "larger": Node("ImageScaleBy", {"image": "first.x̂0"}, {"upscale_method": "nearest-exact", "scale_by": 4}),
                "one": preview("larger.IMAGE", "Algorithm 1: x̂0", 240),
            },
        ),
        Column(
            "Algorithm 2: blended",
            {
                "second": sampler(candidates=2),
                "larger_too": Node("ImageScaleBy", {"image": "second.x̂0"}, {"upscale_method": "nearest-exact", "scale_by": 4}),
                "two": preview("larger_too.IMAGE", "Algorithm 2: x̂0", 240),
            },
        ),
    ),
    after=("one", "two"),
    images_per_node=2,
    colors={
        **GROUPS,
        "Algorithm 1: local": GROUPS["Result"],
        "Algorithm 2: blended": GROUPS["Edit"],
    },
)

CORE = Graph(
    "With core nodes",
    (
        note_column(
            "# With nodes of the ComfyUI core\n\nCore nodes scale up a wide image, and make, feather, place and grow the mask.\n\n"
            "*mask_edges* is `soft`, so gray values set how freely a pixel may change: dark gray only at the last noise levels, light gray at "
            "most levels. The sampler edits a square region around the mask at the size of the model and pastes it into the wide image.\n\n"
            "At the end, *Image Composite Masked* puts the edit into a different image, with a soft edge. *Final Paste* would keep that "
            "image bit-identical outside the mask.",
            height=300,
            below=(
                Column(
                    "Image",
                    {
                        "scene": scene("meadow", seed=8, width=192, height=128),
                        "scale": Node(
                            "ImageScale",
                            {"image": "scene.image"},
                            {"upscale_method": "lanczos", "width": 384, "height": 256, "crop": "disabled"},
                        ),
                        "before": preview("scale.IMAGE", "Before", 220),
                    },
                ),
            ),
        ),
        models("a sunflower"),
        Column(
            "Mask by core",
            {
                "black": Node("SolidMask", values={"value": 0, "width": 384, "height": 256}, title="Solid Mask (black)"),
                "white": Node("SolidMask", values={"value": 1, "width": 160, "height": 168}, title="Solid Mask (white)"),
                "feather": Node("FeatherMask", {"mask": "white.MASK"}, {"left": 20, "top": 20, "right": 20, "bottom": 20}),
                "paint": Node(
                    "MaskComposite", {"destination": "black.MASK", "source": "feather.MASK"}, {"x": 112, "y": 44, "operation": "add"}
                ),
                "grow": Node("GrowMask", {"mask": "paint.MASK"}, {"expand": 6}),
                "mask": Node("MaskPreview", {"mask": "grow.MASK"}, title="Mask", height=210),
            },
        ),
        (
            Column(
                "Edit",
                {"sampler": sampler("scale.IMAGE", "grow.MASK", mask_edges="soft", candidates=4, strength=0.85, sampler="ddpm", steps=40)},
            ),
            Column("Another image", {"night": scene("night", seed=2, width=384, height=256)}),
        ),
        (
            Column(
                "Result",
                {
                    "best": Node("ImageFromBatch", {"image": "sampler.images"}, {"batch_index": 0, "length": 1}, title="The best"),
                    "after": save("best.IMAGE", "core", 280),
                },
            ),
            Column(
                "On another image",
                {
                    "composite": Node(
                        "ImageCompositeMasked",
                        {"destination": "night.image", "source": "best.IMAGE", "mask": "grow.MASK"},
                    ),
                    "on_night": preview("composite.IMAGE", "On another image", 260),
                },
            ),
        ),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "Mask by core": GROUPS["Image"], "Another image": GROUPS["Result"], "On another image": GROUPS["Result"]},
)

OWN = Graph(
    "Your checkpoint and photo",
    (
        note_column(
            "# Your own checkpoint and photo\n\nThis workflow runs with the embedded models. To use your own files, change five settings:\n\n"
            "1. **Checkpoint**: put an ADM checkpoint (`256x256_diffusion_uncond.pt`, a fine-tune, LSUN…) into `models/ddpm`, press **R**, and choose it "
            "in *Load DDPM*. Its settings are detected from the file. Use *overrides* to correct them.\n"
            "2. **CLIP**: choose `ViT-B-16:openai` in *Load CLIP*. Its weights are downloaded once. Put your own files into `models/open_clip`.\n"
            "3. **Photo**: drop or paste it on the empty canvas. A *Load Image* node appears. Connect its IMAGE and MASK in place of those of "
            "*Demo Scene*, to the sampler and to *Before*.\n"
            "4. **Mask**: right-click *Load Image*, choose *Open in MaskEditor*, and paint where the image may change.\n"
            "5. **Steps**: set *steps* to 0, which is the number of the preset. The *scale* -1 is the one that the checkpoint recommends, or 1000.\n\n"
            "| goal | change |\n|---|---|\n| a larger change | raise strength |\n| a closer match to the prompt | raise scale and views; make more candidates |\n"
            "| less memory | batch 1, view_chunk 2 |\n| less time | preset fast, steps 0, options unconnected |",
            width=460,
            height=620,
        ),
        models("a balloon"),
        Column("Image", {"scene": scene("desert", seed=5, width=384, height=256), "before": preview("scene.image", "Before", 300)}),
        Column("Edit", {"sampler": sampler(candidates=4)}),
        Column("Result", {"after": save("sampler.images", "own", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
)


def core_model() -> dict[str, Node]:
    """The embedded network as a MODEL."""
    return {"ddpm": Node("BlendedLoadDDPM", height=236), "model": Node("BlendedDDPMAsModel", {"ddpm": "ddpm.ddpm"})}


def ksampler(latent: str, model: str = "model.model", **values: Any) -> Node:
    """Core's sampler with a network that knows no text."""
    settings = {
        "seed": 0, "control_after_generate": "fixed", "steps": STEPS, "cfg": 1, "sampler_name": "ddpm", "scheduler": "normal", "denoise": 1, **values,
    }  # fmt: skip
    wires = {"model": model, "positive": "model.positive", "negative": "model.negative", "latent_image": latent}
    return Node("KSampler", wires, settings, height=480)


def decoded(latent: str, title: str, height: int = 320) -> dict[str, Node]:
    """The pixels of a LATENT, four times as large on the node: the embedded model works at 64 pixels."""
    name = latent.split(".")[0]
    return {
        f"{name}_pixels": Node("VAEDecode", {"samples": latent, "vae": "model.vae"}),
        f"{name}_larger": Node(
            "ImageScaleBy", {"image": f"{name}_pixels.IMAGE"}, {"upscale_method": "nearest-exact", "scale_by": 4}, title="Enlarge to see it"
        ),
        f"{name}_shown": Node("SaveImage", {"images": f"{name}_larger.IMAGE"}, {"filename_prefix": "blended/ksampler"}, title=title, height=height),
    }  # fmt: skip


def enlarged(picture: str, name: str, title: str, height: int = 300) -> dict[str, Node]:
    """A small picture, four times as large."""
    return {
        f"{name}_larger": Node(
            "ImageScaleBy", {"image": picture}, {"upscale_method": "nearest-exact", "scale_by": 4}, title="Enlarge to see it"
        ),
        name: preview(f"{name}_larger.IMAGE", title, height),
    }


KSAMPLER = Graph(
    "KSampler with your ADM",
    (
        note_column(
            "# KSampler with your ADM\n\n*DDPM as MODEL* makes a MODEL of a pixel-space diffusion model. Every sampler and scheduler of ComfyUI works with it.\n\n"
            "- **Fill the mask**: *Set Latent Noise Mask* limits the change. Black pixels keep their values exactly.\n"
            "- **From noise**: an empty latent image and *denoise* 1.\n\n"
            "To use your own files:\n\n"
            "1. Choose a checkpoint of `models/ddpm` in *Load DDPM*.\n"
            "2. Replace *Demo Scene* with *Load Image* and a square image, which *Upscale Image* scales to the size of the model. For other images use "
            "*Cut Region*: *Upscale Image* would crop the image, but not the mask.\n"
            "3. For a model with classes, set *class_choice* to the number of a class, and *cfg* to 2 or more. Leave *cfg* at 1 for others.\n\n"
            "These models take no text prompt. To follow a prompt, add *CLIP Guidance (MODEL)* before *KSampler*.",
            height=440,
            below=(Column("Models", core_model()),),
        ),
        Column(
            "Image",
            {
                "scene": scene("lake", object_name="balloon", width=64, height=64),
                "scale": Node(
                    "ImageScale", {"image": "scene.image", "width": "model.size", "height": "model.size"}, {"upscale_method": "lanczos", "crop": "center"}
                ),
                **enlarged("scale.IMAGE", "before", "Before"),
            },
        ),
        (
            Column(
                "Fill the mask",
                {
                    "encode": Node("VAEEncode", {"pixels": "scale.IMAGE", "vae": "model.vae"}),
                    "limit": Node("SetLatentNoiseMask", {"samples": "encode.LATENT", "mask": "scene.mask"}),
                    "repeat": Node("RepeatLatentBatch", {"samples": "limit.LATENT"}, {"amount": 4}),
                    "fill": ksampler("repeat.LATENT"),
                },
            ),
        ),
        Column(
            "From noise",
            {
                "empty": Node("EmptyLatentImage", {"width": "model.size", "height": "model.size"}, {"batch_size": 4}),
                "make": ksampler("empty.LATENT", seed=1),
            },
        ),
        (
            Column("Filled", decoded("fill.LATENT", "Filled", 230)),
            Column("Made", decoded("make.LATENT", "Made from noise", 230)),
        ),
    ),
    before="before",
    after=("fill_shown",),
    images_per_node=4,
    colors={
        **GROUPS, "Fill the mask": GROUPS["Edit"], "From noise": GROUPS["Edit"], "Filled": GROUPS["Result"], "Made": GROUPS["Result"],
    },
)  # fmt: skip

DIFFERENTIAL = Graph(
    "Differential Diffusion with an ADM",
    (
        note_column(
            "# Differential Diffusion with an ADM\n\nThe gray value of the mask says **how much** each pixel may change: black keeps it, white replaces it, "
            "and a gray value sets the noise level from which a pixel is sampled.\n\n"
            "*Differential Diffusion* is a node of ComfyUI. It works with the MODEL of *DDPM as MODEL*, as other patches do.\n\n"
            "- Here *Feather Mask* makes the edges soft, so that the new object has no seam. Paint your own mask in any image editor.\n"
            "- *denoise* is the change of a white pixel.\n"
            "- For your own files, choose a checkpoint in *Load DDPM*. Replace *Demo Scene* with *Load Image* and a square image, and *Upscale Image*, its "
            "*width* and *height* from *size* of *DDPM as MODEL*.",
            height=380,
            below=(Column("Models", {**core_model(), "differential": Node("DifferentialDiffusion", {"model": "model.model"})}),),
        ),
        Column(
            "Image", {"scene": scene("desert", object_name="cactus", width=64, height=64), **enlarged("scene.image", "before", "Before")}
        ),
        Column(
            "Soft mask",
            {
                "white": Node("SolidMask", values={"value": 1, "width": 64, "height": 64}),
                "feather": Node("FeatherMask", {"mask": "white.MASK"}, {"left": 24, "top": 24, "right": 24, "bottom": 24}),
                "mask": Node("MaskPreview", {"mask": "feather.MASK"}, title="Black stays, white changes", height=260),
            },
        ),
        Column(
            "Edit",
            {
                "encode": Node("VAEEncode", {"pixels": "scene.image", "vae": "model.vae"}),
                "limit": Node("SetLatentNoiseMask", {"samples": "encode.LATENT", "mask": "feather.MASK"}),
                "repeat": Node("RepeatLatentBatch", {"samples": "limit.LATENT"}, {"amount": 4}),
                "change": ksampler("repeat.LATENT", "differential.MODEL", seed=1),
            },
        ),
        Column("Result", decoded("change.LATENT", "After", 420)),
    ),
    before="before",
    after=("change_shown",),
    images_per_node=4,
    colors={**GROUPS, "Soft mask": GROUPS["Image"]},
)


def guided_columns(
    loader: dict[str, Node], model: str, vae: str, conditioning: tuple[str, str], side: int, **settings: Any
) -> tuple[Column, ...]:
    """KSampler with CLIP Guidance (MODEL), inside a mask."""
    guide = Node("BlendedCLIPGuidanceModel", {"model": model, "prompt": "prompt.prompt", "vae": vae}, {"scale": CHECKPOINTS_SCALE})
    positive, negative = conditioning
    values = {"seed": 0, "control_after_generate": "fixed", "steps": 30, "scheduler": "normal", "denoise": 0.75, **settings}
    wires = {"model": "guide.model", "positive": positive, "negative": negative, "latent_image": "repeat.LATENT"}
    return (
        Column("Models", loader),
        Column("Guidance", {"clip": Node("BlendedLoadCLIP", height=120), "prompt": prompt("a pumpkin"), "guide": guide}),
        Column("Image", {"scene": scene("snow", seed=3, width=side, height=side), "before": preview("scene.image", "Before", 300)}),
        Column(
            "Edit",
            {
                "encode": Node("VAEEncode", {"pixels": "scene.image", "vae": vae}),
                "limit": Node("SetLatentNoiseMask", {"samples": "encode.LATENT", "mask": "scene.mask"}),
                "repeat": Node("RepeatLatentBatch", {"samples": "limit.LATENT"}, {"amount": 4 if side < 256 else 1}),
                "sample": Node("KSampler", wires, values, height=480),
            },
        ),
        Column(
            "Result",
            {
                "decode": Node("VAEDecode", {"samples": "sample.LATENT", "vae": vae}),
                "paste": Node("BlendedFinalPaste", {"edited": "decode.IMAGE", "original": "scene.image", "mask": "scene.mask"}),
                "after": save("paste.image", "guided", 400),
            },
        ),
    )


GUIDED_COLUMNS = guided_columns(
    {
        "checkpoint": Node("CheckpointLoaderSimple", values={"ckpt_name": SDXL}),
        "positive": Node("CLIPTextEncode", {"clip": "checkpoint.CLIP"}, {"text": "a photo of a pumpkin in the snow"}, "What the model gets", height=140),
        "negative": Node("CLIPTextEncode", {"clip": "checkpoint.CLIP"}, {"text": "blurry"}, "What it avoids", height=140),
    },
    "checkpoint.MODEL", "checkpoint.VAE", ("positive.CONDITIONING", "negative.CONDITIONING"), 1024, cfg=6, sampler_name="dpmpp_2m",
    )  # fmt: skip

GUIDED = Graph(
    "CLIP guidance on your own model",
    (
        note_column(
            "# CLIP guidance on your own model\n\n*CLIP Guidance (MODEL)* guides any MODEL toward a prompt, inside the mask, with every sampler. Choose before the "
            "first run:\n\n"
            "1. *Load Checkpoint*: your model. The sizes here are those of SDXL; for SD 1.5 use 512. For Flux or Qwen-Image, replace it with *Load Diffusion Model*, "
            "*Load VAE* and the CLIP loader of that model; for Flux, set *cfg* to 1.\n"
            "2. *Load CLIP (open_clip)*: **ViT-B-16:openai**, which is downloaded on first use. The embedded CLIP knows only the objects of *Demo Scene*.\n"
            "3. *Demo Scene*: replace it with *Load Image*, and paint the mask (right-click, *Open in MaskEditor*). Use an image of about 1024×1024 pixels. For larger ones, "
            "see the template *Cut, edit with any model, paste exactly*.\n\n"
            "- **Two prompts**: CLIP guides toward that of *Encode Prompt*; the model itself gets that of *CLIP Text Encode*. They may differ.\n"
            "- **scale** is the first setting to adjust. -1 means 1000 here, or the scale in options. Change it by factors of 2.\n"
            "- **vae**: CLIP sees the image at full size. Unconnected, it sees a rough preview image, and a step takes less time and memory.\n"
            "- **From noise**: connect *Empty Latent Image* to *KSampler*, set *denoise* to 1, and leave out *Final Paste*.\n"
            "- *Final Paste* keeps every pixel outside the mask, which the VAE alone does not.",
            height=500,
            below=GUIDED_COLUMNS[:1],
        ),
        *GUIDED_COLUMNS[1:],
    ),
    stand_in=Graph(
        "CLIP guidance on the embedded model",
        guided_columns(core_model(), "model.model", "model.vae", ("model.positive", "model.negative"), 64, cfg=1, sampler_name="euler"),
        before="before",
        after=("after",),
        images_per_node=4,
        colors={**GROUPS, "Guidance": GROUPS["Models"]},
    ),
    colors={**GROUPS, "Guidance": GROUPS["Models"]},
)  # fmt: skip

CUT = Graph(
    "Cut, edit with any model, paste exactly",
    (
        note_column(
            "# Cut, edit with any model, paste exactly\n\n*Cut Region* cuts the part around the mask at the size of a model. Any nodes edit the cut. "
            "*Paste Region* puts it back: **outside the mask every pixel keeps its value, to the last bit**.\n\n"
            "Here core's *KSampler* edits the cut with the embedded model. *CLIP Guidance (MODEL)* leads it to a prompt, and *Blended Noise (MODEL)* gives the surroundings new noise at every level, as Blended "
            "Diffusion does.\n\n"
            "**With SDXL, Flux or another latent model:**\n\n"
            "1. Disconnect *ddpm* of *Cut Region* and set *size* (1024) and *shape*.\n"
            "2. MODEL of *Load Checkpoint* → *Blended Noise (MODEL)*. Two *CLIP Text Encode* → *positive* and *negative* of *KSampler*. Set its *cfg* (SDXL: "
            "6, Flux: 1).\n"
            "3. In place of *latent* of *Cut Region*: *image* → *VAE Encode* → *Set Latent Noise Mask* → *Repeat Latent Batch*, and *mask* → *Grow Mask* "
            "(8) → *Set Latent Noise Mask*.\n"
            "4. VAE of the checkpoint → *VAE Encode*, *VAE Decode* and *CLIP Guidance (MODEL)*. Choose `ViT-B-16:openai` in *Load CLIP (open_clip)*. Delete *Load DDPM* "
            "and *DDPM as MODEL*.\n\n"
            "The blueprint *Cut, Sample, Paste (Blended Diffusion)* has all of this in one node.\n\n"
            "Many masks of one image give one cut each, and all of them go back into the image.",
            width=400,
            height=470,
            below=(Column("Models", {**core_model(), "blended": Node("BlendedNoiseModel", {"model": "model.model"})}),),
        ),
        Column(
            "Guidance",
            {
                "clip": Node("BlendedLoadCLIP", height=120),
                "prompt": prompt("a mushroom"),
                "guide": Node("BlendedCLIPGuidanceModel", {"model": "blended.model", "prompt": "prompt.prompt"}),
            },
        ),
        (
            Column(
                "Image",
                {
                    "scene": scene("meadow", width=384, height=256, seed=4),
                    "before": preview("scene.image", "Before", 260),
                },
            ),
            Column("Cut", {"cut": Node("BlendedCutRegion", {"image": "scene.image", "mask": "scene.mask", "ddpm": "ddpm.ddpm"})}),
        ),
        Column(
            "Edit",
            {
                "repeat": Node("RepeatLatentBatch", {"samples": "cut.latent"}, {"amount": 4}),
                "fill": ksampler("repeat.LATENT", "guide.model", sampler_name="euler", steps=30, denoise=0.75),
                "decode": Node("VAEDecode", {"samples": "fill.LATENT", "vae": "model.vae"}),
            },
        ),
        Column(
            "Result",
            {
                "paste": Node(
                    "BlendedPasteRegion",
                    {"edited": "decode.IMAGE", "original": "scene.image", "region": "cut.region"},
                    {"tone_match": True},
                ),
                "after": save("paste.image", "cut", 400),
            },
        ),
    ),
    before="before",
    after=("after",),
    images_per_node=4,
    colors={**GROUPS, "Cut": GROUPS["Image"], "Guidance": GROUPS["Models"]},
)

ANYONE = Graph(
    "Rank anyone's batch",
    (
        note_column(
            "# Rank anyone's batch\n\n*Rank by CLIP* sorts the images of any node by their CLIP distance to a prompt, best first, and keeps as many as "
            "*keep* says. With a MASK, only that part of each image counts.\n\n"
            "Here core's *KSampler* makes twelve images from noise, with a model that takes no text prompt. The prompt is used only to rank them.\n\n"
            "For your own batch, connect its IMAGE in place of *VAE Decode*: the results of SDXL or Flux, of *Batch Images*, or of *Load Image* nodes. In "
            "*Load CLIP*, choose `ViT-B-16:openai`; the embedded CLIP knows only the embedded world.\n\n"
            "The ranking of CLIP is coarse. Compare the images yourself.",
            height=400,
        ),
        Column("Models", {**core_model(), "clip": Node("BlendedLoadCLIP", height=120), "prompt": prompt("a cat")}),
        Column(
            "A batch of any nodes",
            {
                "empty": Node("EmptyLatentImage", {"width": "model.size", "height": "model.size"}, {"batch_size": 12}),
                "make": ksampler("empty.LATENT"),
                "decode": Node("VAEDecode", {"samples": "make.LATENT", "vae": "model.vae"}),
            },
        ),
        Column("All twelve", enlarged("decode.IMAGE", "before", "In the order in which they were made", 420)),
        Column(
            "Result",
            {
                "rank": Node("BlendedRankByCLIP", {"images": "decode.IMAGE", "prompt": "prompt.prompt"}, {"keep": 4}),
                "larger": Node(
                    "ImageScaleBy", {"image": "rank.images"}, {"upscale_method": "nearest-exact", "scale_by": 4}, title="Enlarge to see it"
                ),
                "after": save("larger.IMAGE", "anyone", 400),
                "scores": scores("rank.scores"),
            },
        ),
    ),
    after=("after",),
    images_per_node=4,
    colors={**GROUPS, "A batch of any nodes": GROUPS["Edit"], "All twelve": GROUPS["Image"]},
)

TEMPLATES = (QUICK, STEP_BY_STEP, RANKED, BACKGROUND, REMOVAL, SCRIBBLE, ALGORITHMS, CORE, OWN, KSAMPLER, DIFFERENTIAL, GUIDED, CUT, ANYONE)


# Where the picture of each node's help page is taken: the template and the node's name in it.
NODE_SCREENSHOTS = {
    "BlendedLoadDDPM": (QUICK, "ddpm"),
    "BlendedLoadCLIP": (QUICK, "clip"),
    "BlendedEncodePrompt": (QUICK, "prompt"),
    "BlendedGuidanceOptions": (QUICK, "options"),
    "BlendedDemoScene": (QUICK, "scene"),
    "BlendedSampler": (QUICK, "sampler"),
    "BlendedNoiseBackground": (STEP_BY_STEP, "start"),
    "BlendedDenoiseLoopStart": (STEP_BY_STEP, "begin"),
    "BlendedCLIPGuidanceStep": (STEP_BY_STEP, "step"),
    "BlendedBlendLatents": (STEP_BY_STEP, "blend"),
    "BlendedDenoiseLoopEnd": (STEP_BY_STEP, "end"),
    "BlendedFinalPaste": (STEP_BY_STEP, "paste"),
    "BlendedRankByCLIP": (RANKED, "rank"),
    "BlendedDDPMAsModel": (KSAMPLER, "model"),
    "BlendedCLIPGuidanceModel": (GUIDED, "guide"),
    "BlendedNoiseModel": (CUT, "blended"),
    "BlendedCutRegion": (CUT, "cut"),
    "BlendedPasteRegion": (CUT, "paste"),
}


SETTINGS = (
    ("prompt", "text", "prompt"),
    ("ddpm", "checkpoint", "checkpoint"),
    ("clip", "weights", "clip"),
    ("options", "scale", "guidance_scale"),
    ("sampler", "steps", "steps"),
    ("sampler", "strength", "strength"),
    ("sampler", "seed", "seed"),
    ("sampler", "candidates", "candidates"),
)
RESULTS = (("sampler", "images", "images"), ("sampler", "scores", "scores"))
NEW_SEEDS = "randomize"
"""The page applies the inner node's *control after generate* to the seed of the outer one."""


def blueprint(
    name: str,
    description: str,
    *columns: Column,
    mask: tuple[str, str] = ("sampler", "mask"),
    more: tuple[tuple[str, str, str], ...] = (),
) -> Blueprint:
    """A blueprint with the inputs that all have, in one order: image, mask, the settings, and then its own. ``mask``: (inner node, label)."""
    graph = Graph(name, columns)
    return Blueprint(
        graph,
        inside=tuple(n for n in graph.nodes() if n != "scene"),
        inputs=(("sampler", "image", "image"), (mask[0], "mask", mask[1]), *SETTINGS, *more),
        outputs=RESULTS,
        description=description,
    )


BLUEPRINTS = (
    blueprint(
        "Edit by Prompt (Blended Diffusion)",
        "Edits the white part of the mask from a prompt. Every other pixel stays unchanged. Returns the candidates best first.",
        models("an apple"),
        Column("Image", {"scene": scene("lake")}),
        Column("Edit", {"sampler": sampler(control_after_generate=NEW_SEEDS)}),
    ),
    blueprint(
        "Replace Background (Blended Diffusion)",
        "Replaces everything outside the mask from a prompt. The masked object stays bit-identical.",
        models("a lake", scale=1500.0),
        Column("Image", {"scene": scene("desert", object_name="cactus"), "invert": Node("InvertMask", {"mask": "scene.mask"})}),
        Column("Edit", {"sampler": sampler(mask="invert.MASK", strength=1.0, control_after_generate=NEW_SEEDS)}),
        mask=("invert", "object_mask"),
    ),
    blueprint(
        "Remove Object (Blended Diffusion)",
        "Fills in the masked part from its surroundings. A prompt that describes what is behind the object is optional and helps. Every other pixel "
        "stays unchanged.",
        models(""),
        Column(
            "Image",
            {"scene": scene("meadow", object_name="mushroom"), "grow": Node("GrowMask", {"mask": "scene.mask"}, {"expand": 6})},
        ),
        Column("Edit", {"sampler": sampler(mask="grow.MASK", strength=1.0, control_after_generate=NEW_SEEDS)}),
        mask=("grow", "mask"),
        more=(("grow", "expand", "grow_mask"),),
    ),
    Blueprint(
        Graph(
            "Cut, Sample, Paste (Blended Diffusion)",
            (
                Column("Models", core_model()),
                Column("Image", {"scene": scene("meadow", width=384, height=256)}),
                Column(
                    "Cut",
                    {
                        "cut": Node("BlendedCutRegion", {"image": "scene.image", "mask": "scene.mask"}),
                        "encode": Node("VAEEncode", {"pixels": "cut.image", "vae": "model.vae"}),
                        "grow": Node("GrowMask", {"mask": "cut.mask"}, {"expand": 8}),
                        "limit": Node("SetLatentNoiseMask", {"samples": "encode.LATENT", "mask": "grow.MASK"}),
                    },
                ),
                Column(
                    "Sample",
                    {
                        "blended": Node("BlendedNoiseModel", {"model": "model.model"}),
                        "sample": ksampler("limit.LATENT", "blended.model", control_after_generate=NEW_SEEDS),
                        "decode": Node("VAEDecode", {"samples": "sample.LATENT", "vae": "model.vae"}),
                    },
                ),
                Column(
                    "Paste",
                    {
                        "paste": Node(
                            "BlendedPasteRegion",
                            {"edited": "decode.IMAGE", "original": "scene.image", "region": "cut.region"},
                            {"tone_match": True},
                        )
                    },
                ),
            ),
        ),
        inside=("cut", "encode", "grow", "limit", "blended", "sample", "decode", "paste"),
        inputs=(
            ("cut", "image", "image"),
            ("paste", "original", "image"),
            ("cut", "mask", "mask"),
            ("blended", "model", "model"),
            ("sample", "positive", "positive"),
            ("sample", "negative", "negative"),
            ("encode", "vae", "vae"),
            ("decode", "vae", "vae"),
            ("cut", "size", "size"),
            ("cut", "shape", "shape"),
            ("cut", "context", "context"),
            ("grow", "expand", "grow_mask"),
            ("sample", "seed", "seed"),
            ("sample", "steps", "steps"),
            ("sample", "cfg", "cfg"),
            ("sample", "sampler_name", "sampler"),
            ("sample", "scheduler", "scheduler"),
            ("sample", "denoise", "denoise"),
            ("paste", "feather", "feather"),
        ),
        outputs=(("paste", "image", "images"),),
        description="Edits the white part of the mask with any MODEL, at the size that it works best at. Every other pixel of the image stays unchanged.",
    ),
)
