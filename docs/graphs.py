"""The templates and blueprints of the pack as data: nodes in columns, linked by name. docs/make_workflows.py builds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blended_core.toy.world import GUIDANCE_SCALE

WIDTH = 300
NOTE = ("#432", "#653")
STEPS = 40
GROUPS = {"Models": "#3b4a5c", "Picture": "#3d5446", "Edit": "#5b4634", "Result": "#4f3d57"}


@dataclass(frozen=True)
class Node:
    """A node: its type, its widget values, and the links of its inputs (input → 'node.output')."""

    type: str
    inputs: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    width: int = WIDTH
    height: int = 0
    color: tuple[str, str] | None = None


@dataclass(frozen=True)
class Column:
    """Nodes below each other, in a group if there is a title."""

    title: str
    nodes: dict[str, Node]


@dataclass(frozen=True)
class Graph:
    """A workflow. The thumbnail shows ``images_per_node`` images of each node in ``after``, and the image of the node ``before``."""

    name: str
    columns: tuple[Column, ...]
    before: str = ""
    after: tuple[str, ...] = ()
    images_per_node: int = 1
    overlap_free: bool = True
    colors: dict[str, str] = field(default_factory=lambda: GROUPS)

    def links(self) -> list[tuple[str, str, str, str]]:
        """(from, output, to, input)."""
        return [
            (*source.split(".", 1), name, socket)  # type: ignore[misc]
            for column in self.columns
            for name, node in column.nodes.items()
            for socket, source in node.inputs.items()
        ]


@dataclass(frozen=True)
class Blueprint:
    """A graph and the part of it that becomes a subgraph. Inputs and outputs: (inner node, its slot, name on the subgraph)."""

    graph: Graph
    inside: tuple[str, ...]
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    description: str


def read_me(text: str, width: int = 380, height: int = 320) -> Node:
    """A note that explains the template."""
    return Node("MarkdownNote", values={"text": text}, title="Read me", width=width, height=height, color=NOTE)


def note_column(text: str, width: int = 380, height: int = 320) -> Column:
    """A column with only a note."""
    return Column("", {"note": read_me(text, width, height)})


def models(text: str | None, scale: float = GUIDANCE_SCALE, **options: Any) -> Column:
    """Nodes for the embedded networks, a prompt and the guidance options; without ``text`` only the diffusion model."""
    nodes = {"ddpm": Node("BlendedLoadDDPM", height=236)}  # space for the text that it shows after a run
    if text is not None:
        nodes["clip"] = Node("BlendedLoadCLIP", height=120)
        nodes["prompt"] = prompt(text)
        nodes["options"] = Node("BlendedGuidanceOptions", values={"scale": scale, **options})
    return Column("Models", nodes)


def prompt(text: str) -> Node:
    """A node for the prompt."""
    return Node("BlendedEncodePrompt", {"clip": "clip.clip"}, {"text": text}, height=140)


def scene(background: str, seed: int = 0, object_name: str = "none", width: int = 256, height: int = 256) -> Node:
    """A node for a scene of the embedded world."""
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
    """A node that shows an image."""
    return Node("PreviewImage", {"images": picture}, title=title, height=height)


def save(picture: str, prefix: str, height: int = 340) -> Node:
    """A node that saves an image."""
    return Node("SaveImage", {"images": picture}, {"filename_prefix": f"blended/{prefix}"}, height=height)


def sampler(
    image: str = "scene.image", mask: str = "scene.mask", *, prompt: str | None = "prompt", options: str = "options", **values: Any
) -> Node:
    """The sampler node."""
    inputs = {"ddpm": "ddpm.ddpm", "image": image, "mask": mask}
    if prompt is not None:
        inputs |= {"prompt": f"{prompt}.prompt", "options": f"{options}.options"}
    return Node("BlendedSampler", inputs, {"steps": STEPS, "seed": 0, "control_after_generate": "fixed", **values}, height=690)


def scores(of: str = "sampler.scores") -> Node:
    """A node that shows the table of scores."""
    return Node("PreviewAny", {"source": of}, title="Scores", height=180)


QUICK = Graph(
    "Quick edit",
    (
        note_column(
            "# Quick edit\n\nPress **Run**. The edit paints a mushroom into the white part of the mask. All other pixels stay unchanged.\n\n"
            "- The result shows four candidates, **best first**.\n"
            "- Change the text in *Encode Prompt*: `a rose`, `a tree`, `a pumpkin`… The embedded models know 16 objects and 6 backgrounds.\n"
            "- Set *control after generate* of the sampler to `randomize` for new candidates in every run.\n"
            "- *strength* 1 ignores the image under the mask. Lower values preserve more of it.\n\n"
            "The models are part of the pack. Nothing is downloaded.",
            height=360,
        ),
        models("a mushroom"),
        Column("Picture", {"scene": scene("meadow"), "before": preview("scene.image", "Before")}),
        Column("Edit", {"sampler": sampler(candidates=4)}),
        Column("Result", {"after": save("sampler.images", "quick_edit", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
)

STEP_BY_STEP = Graph(
    "Six nodes step by step",
    (
        note_column(
            "# The method, one node at a time\n\nEach iteration of the loop is one noise level:\n\n"
            "1. **CLIP Guidance Step** takes one denoising step toward the prompt.\n"
            "2. **Noise Background** (*match*) adds noise of the same level to the source image.\n"
            "3. **Blend Latents** combines the step inside the mask with the source image outside.\n\n"
            "The loop ends at the level without noise. **Final Paste** pastes the edit into the source image. Every pixel outside the "
            "mask stays bit-identical.\n\n*Noise Background* (*start*) sets steps, strength, seed and mask, and the LATENT carries them. "
            "*Blended Diffusion Sampler* gives the same result for the same seed.",
            height=440,
        ),
        models("an apple"),
        Column(
            "Picture",
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
                    height=480,
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
            "# Many results, ranked\n\nNot every candidate is good, so the paper makes many and keeps the best. This template makes twelve candidates in "
            "batches of four and **ranks them by CLIP**. It saves the first four and shows the last four.\n\n"
            "*Rank by CLIP* ranks images of **any** node. Here it ranks the same candidates by another prompt and without a mask, "
            "that is, by the whole scene.\n\nThe ranking of CLIP is coarse. Compare the images yourself.",
            height=340,
        ),
        models("a cat"),
        Column("Picture", {"scene": scene("meadow"), "before": preview("scene.image", "Before")}),
        Column("Edit", {"sampler": sampler(candidates=12)}),
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
            "Second prompt",
            {
                "other": Node(
                    "BlendedEncodePrompt", {"clip": "clip.clip"}, {"text": "a cat on a meadow"}, title="Encode Prompt (scene)", height=140
                ),
                "rank": Node("BlendedRankByCLIP", {"images": "sampler.images", "prompt": "other.prompt"}, {"keep": 4}),
                "again": preview("rank.images", "Best four by the other prompt", 360),
                "scores": scores(),
            },
        ),
    ),
    after=("after",),
    images_per_node=4,
    colors={**GROUPS, "Second prompt": GROUPS["Models"]},
)

BACKGROUND = Graph(
    "Replace the background",
    (
        note_column(
            "# Replace the background\n\nThe mask covers the object, and *Invert Mask* inverts it. The edit repaints everything **except** "
            "the object. The object stays bit-identical.\n\n"
            "- *strength* 1 ignores the old background. About 0.7 preserves its layout.\n"
            "- Other backgrounds of the embedded models: `a meadow`, `a desert`, `night`, `snow`, `a sunset`.\n- *scale* is lower than for objects. CLIP was trained on few images without a middle, and a high scale gives wrong colors.",
            height=300,
        ),
        models("a lake", scale=1500.0),
        Column(
            "Picture",
            {
                "scene": scene("desert", object_name="cactus", seed=2),
                "before": preview("scene.image", "Before", 260),
                "invert": Node("InvertMask", {"mask": "scene.mask"}),
                "mask": Node("MaskPreview", {"mask": "invert.MASK"}, title="White: repainted", height=240),
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
            "# Remove an object\n\n**Without a prompt** there is no guidance. The diffusion model fills the mask according to its surroundings "
            "and its training data. Most scenes in the training data of the embedded model have an object in the middle, so it paints another "
            "object. A checkpoint trained on places does better.\n\n**A prompt for the background** helps with any model: here `an empty meadow`.\n\n"
            "- The mask must cover the whole object and a small margin (*Grow Mask*).\n"
            "- *strength* 1 ignores the object completely.\n"
            "- Make several candidates. Without a prompt there is no ranking.",
            height=360,
        ),
        models("an empty meadow"),
        Column("Picture", {"scene": scene("meadow", object_name="mushroom", seed=4), "before": preview("scene.image", "Before", 280)}),
        Column(
            "With a prompt", {"sampler": sampler(strength=1.0, context=1.8, candidates=4), "after": save("sampler.images", "removal", 360)}
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
    colors={**GROUPS, "With a prompt": GROUPS["Edit"], "Without a prompt": GROUPS["Result"]},
)

SCRIBBLE = Graph(
    "Scribble to object",
    (
        note_column(
            "# Scribble to object\n\nPaint a rough shape, mask it, and start at a medium noise level. *strength* 0.6 preserves the "
            "colors and the position of the scribble, and the prompt determines the object.\n\n"
            "Here core nodes paint the scribble, a red and a brown rectangle. For your own image use any paint program, or the colors of the "
            "mask editor.\n\nA lower *strength* stays closer to the scribble.",
            height=300,
        ),
        models("a mushroom"),
        Column(
            "Scribble",
            {
                "scene": scene("meadow", seed=6),
                "brown": Node("EmptyImage", values={"width": 40, "height": 80, "color": 0xE8D9C0}, title="Stem"),
                "stem": Node(
                    "ImageCompositeMasked",
                    {"destination": "scene.image", "source": "brown.IMAGE"},
                    {"x": 108, "y": 128},
                    title="Paint the stem",
                ),
                "red": Node("EmptyImage", values={"width": 128, "height": 72, "color": 0xD03030}, title="Cap"),
            },
        ),
        Column(
            "Picture",
            {
                "cap": Node(
                    "ImageCompositeMasked", {"destination": "stem.IMAGE", "source": "red.IMAGE"}, {"x": 64, "y": 62}, title="Paint the cap"
                ),
                "before": preview("cap.IMAGE", "Scribble", 300),
                "mask": Node("MaskPreview", {"mask": "scene.mask"}, title="Mask", height=260),
            },
        ),
        Column("Edit", {"sampler": sampler("cap.IMAGE", strength=0.6, candidates=4)}),
        Column("Result", {"after": save("sampler.images", "scribble", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "Scribble": GROUPS["Picture"]},
)

ALGORITHMS = Graph(
    "Algorithm 1 beside Algorithm 2",
    (
        note_column(
            "# The two algorithms of the paper\n\n**Algorithm 1** (*local*) preserves the background by a loss with the weight λ (*background_scale*). "
            "The model repaints the whole region, and the background changes.\n\n**Algorithm 2** (*blended*) blends in the source image at every "
            "noise level. The background does not change, and the edit fits into it.\n\nThe previews show x̂0 of the region before the final "
            "paste. Compare the area outside the mask. λ 100 changes more, λ 10000 edits less.",
            height=340,
        ),
        models("an apple"),
        Column(
            "Picture",
            {
                "scene": scene("sunset", seed=1),
                "with_lambda": Node(
                    "BlendedGuidanceOptions", values={"scale": GUIDANCE_SCALE, "background_scale": 1000}, title="Guidance Options (λ 1000)"
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
    colors={**GROUPS, "Algorithm 1: local": GROUPS["Result"], "Algorithm 2: blended": GROUPS["Edit"]},
)

CORE = Graph(
    "With core nodes",
    (
        models("a sunflower"),
        Column(
            "Picture",
            {
                "scene": scene("meadow", seed=8, width=192, height=128),
                "scale": Node(
                    "ImageScale", {"image": "scene.image"}, {"upscale_method": "lanczos", "width": 384, "height": 256, "crop": "disabled"}
                ),
                "before": preview("scale.IMAGE", "Before", 260),
                "note": read_me(
                    "# Together with core nodes\n\nCore nodes scale a wide image and create, feather, place and grow a mask.\n\n"
                    "With *mask_edges* `soft`, gray values of the mask count: light gray changes from early steps on, dark gray only in late ones. "
                    "The sampler edits a square region around the mask at the size of the model and pastes it into the wide image.\n\nAt the end, the core node "
                    "*Image Composite Masked* pastes the edit into another image with a soft edge.",
                    width=WIDTH,
                    height=310,
                ),
            },
        ),
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
                "mask": Node("MaskPreview", {"mask": "grow.MASK"}, title="Mask", height=250),
            },
        ),
        Column("Edit", {"sampler": sampler("scale.IMAGE", "grow.MASK", mask_edges="soft", candidates=4, strength=0.85)}),
        Column(
            "Result",
            {
                "best": Node("ImageFromBatch", {"image": "sampler.images"}, {"batch_index": 0, "length": 1}, title="The best"),
                "after": save("best.IMAGE", "core", 280),
            },
        ),
        Column(
            "On another picture",
            {
                "night": scene("night", seed=2, width=384, height=256),
                "composite": Node("ImageCompositeMasked", {"destination": "night.image", "source": "best.IMAGE", "mask": "grow.MASK"}),
                "on_night": preview("composite.IMAGE", "On another picture", 260),
            },
        ),
    ),
    before="before",
    after=("after",),
    colors={**GROUPS, "Mask by core": GROUPS["Picture"], "On another picture": GROUPS["Result"]},
)

OWN = Graph(
    "Your checkpoint and photo",
    (
        note_column(
            "# Your own checkpoint and photo\n\nThe template runs with the embedded models. Replace them step by step:\n\n"
            "1. **Checkpoint**: put an ADM file (`256x256_diffusion_uncond.pt`, a fine-tune, LSUN…) into `models/ddpm`, press **R**, and choose it "
            "in *Load DDPM*. Its settings are read from the file; *overrides* changes them.\n"
            "2. **CLIP**: choose `ViT-B-16:openai` in *Load CLIP*. open_clip downloads it once. Put your own files into `models/open_clip`.\n"
            "3. **Photo**: drop or paste it onto the empty canvas to get a *Load Image* node. Connect its IMAGE and MASK instead of those of "
            "*Demo Scene*.\n"
            "4. **Mask**: right-click *Load Image*, *Open in MaskEditor*, paint the area that may change.\n"
            f"5. **Guidance**: *scale* 1000 suits photos ({GUIDANCE_SCALE:.0f} is for the embedded models). *steps* 100.\n\n"
            "| goal | setting |\n|---|---|\n| more change | higher strength |\n| closer to the prompt | higher scale, more views or candidates |\n"
            "| less memory | batch 1, view_chunk 2 |\n| faster | preset fast, steps 0, options not connected |",
            width=460,
            height=620,
        ),
        models("a balloon"),
        Column("Picture", {"scene": scene("desert", seed=5, width=384, height=256), "before": preview("scene.image", "Before", 300)}),
        Column("Edit", {"sampler": sampler(candidates=4)}),
        Column("Result", {"after": save("sampler.images", "own", 400), "scores": scores()}),
    ),
    before="before",
    after=("after",),
)

TEMPLATES = (QUICK, STEP_BY_STEP, RANKED, BACKGROUND, REMOVAL, SCRIBBLE, ALGORITHMS, CORE, OWN)


# Node type → (template, name of the node) for the screenshots of the help pages.
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
}


def source_graph(*columns: Column, name: str) -> Graph:
    """The graph of a blueprint."""
    return Graph(name, columns)


SETTINGS = (
    ("ddpm", "checkpoint", "checkpoint"),
    ("clip", "weights", "clip"),
    ("options", "scale", "guidance_scale"),
    ("sampler", "steps", "steps"),
    ("sampler", "strength", "strength"),
    ("sampler", "seed", "seed"),
    ("sampler", "candidates", "candidates"),
)

BLUEPRINTS = (
    Blueprint(
        source_graph(
            models("an apple"),
            Column("Picture", {"scene": scene("lake")}),
            Column("Edit", {"sampler": sampler()}),
            name="Edit by Prompt (Blended Diffusion)",
        ),
        inside=("ddpm", "clip", "prompt", "options", "sampler"),
        inputs=(("sampler", "image", "image"), ("sampler", "mask", "mask"), ("prompt", "text", "prompt"), *SETTINGS),
        outputs=(("sampler", "images", "images"), ("sampler", "scores", "scores")),
        description="Paints the prompt into the white part of the mask. All other pixels stay unchanged. Candidates are sorted, best first.",
    ),
    Blueprint(
        source_graph(
            models("a lake", scale=1500.0),
            Column("Picture", {"scene": scene("desert", object_name="cactus"), "invert": Node("InvertMask", {"mask": "scene.mask"})}),
            Column("Edit", {"sampler": sampler(mask="invert.MASK", strength=1.0)}),
            name="Replace Background (Blended Diffusion)",
        ),
        inside=("ddpm", "clip", "prompt", "options", "invert", "sampler"),
        inputs=(("sampler", "image", "image"), ("invert", "mask", "object_mask"), ("prompt", "text", "prompt"), *SETTINGS),
        outputs=(("sampler", "images", "images"), ("sampler", "scores", "scores")),
        description="Repaints everything outside the object mask according to the prompt. The object stays bit-identical.",
    ),
    Blueprint(
        source_graph(
            models(""),
            Column(
                "Picture",
                {"scene": scene("meadow", object_name="mushroom"), "grow": Node("GrowMask", {"mask": "scene.mask"}, {"expand": 6})},
            ),
            Column("Edit", {"sampler": sampler(mask="grow.MASK", strength=1.0)}),
            name="Remove Object (Blended Diffusion)",
        ),
        inside=("ddpm", "clip", "prompt", "options", "grow", "sampler"),
        inputs=(
            ("sampler", "image", "image"),
            ("grow", "mask", "mask"),
            ("prompt", "text", "what_is_behind"),
            ("grow", "expand", "grow_mask"),
            ("ddpm", "checkpoint", "checkpoint"),
            ("clip", "weights", "clip"),
            ("sampler", "steps", "steps"),
            ("sampler", "seed", "seed"),
            ("sampler", "candidates", "candidates"),
        ),
        outputs=(("sampler", "images", "images"),),
        description="Fills the masked part according to its surroundings. An optional prompt describes the background. All other pixels stay unchanged.",
    ),
)
