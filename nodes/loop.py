"""Denoise Loop Start and Denoise Loop End: repeat the nodes between them until no noise is left."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder, is_link

from ..blended_core.errors import BlendedError
from . import inputs
from .latent import Latent, unpack
from .runtime import library_scope

START, END = "Denoise Loop Start", "Denoise Loop End"
START_ID = "BlendedDenoiseLoopStart"


class DenoiseLoopStart(io.ComfyNode):
    """Start of each iteration of the loop."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=START_ID,
            display_name=START,
            category=inputs.STEPS_CATEGORY,
            description="The nodes between this node and Denoise Loop End run once per noise level, until the LATENT is clean.",
            search_aliases=["for loop", "while loop", "repeat steps"],
            inputs=[io.Latent.Input("latent", tooltip="The noisy LATENT, from Noise Background (start).")],
            outputs=[
                io.FlowControl.Output("flow", display_name="flow", tooltip="For Denoise Loop End. Marks the nodes of the loop."),
                io.Latent.Output("latent", display_name="latent", tooltip="The LATENT of this iteration, for CLIP Guidance Step."),
            ],
        )

    @classmethod
    def execute(cls, latent: Latent) -> io.NodeOutput:
        return io.NodeOutput("loop", latent)


class DenoiseLoopEnd(io.ComfyNode):
    """End of each iteration; starts the next one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendedDenoiseLoopEnd",
            display_name=END,
            category=inputs.STEPS_CATEGORY,
            description="Repeats the loop until no noise is left, then returns the LATENT.",
            search_aliases=["for loop", "while loop", "repeat steps"],
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.FlowControl.Input("flow", raw_link=True, tooltip="From Denoise Loop Start."),
                io.Latent.Input("latent", tooltip="The result of the iteration, from Blend Latents."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The clean LATENT, for Final Paste.")],
        )

    @classmethod
    def execute(cls, flow: list[Any], latent: Latent) -> io.NodeOutput:
        with library_scope(END):
            state = unpack(latent, END).state
            if state.clean:
                return io.NodeOutput(latent)
            prompt, own_id, start = cls.hidden.dynprompt, cls.hidden.unique_id, flow[0]
            if prompt.get_node(start)["class_type"] != START_ID:
                raise BlendedError(f"the input “flow” of {END} is not connected to a {START}; connect it to one.")
            before = prompt.get_node(start)["inputs"].get("latent")  # a link in the first iteration, the LATENT itself in the others
            if isinstance(before, dict) and unpack(before, END).state.level <= state.level:
                raise BlendedError(
                    f"the loop does not reduce the noise: an iteration started and ended at {state}. Place a CLIP Guidance Step between {START} and "
                    f"{END}."
                )
            graph = GraphBuilder()
            # Short names: node ids already carry the prefix of the iteration before, and would grow with every iteration.
            names = {node: "end" if node == own_id else str(i) for i, node in enumerate(nodes_between(prompt, start, own_id))}
            for node, name in names.items():
                graph.node(prompt.get_node(node)["class_type"], name).set_override_display_id(prompt.get_display_node_id(node))
            for node, name in names.items():
                copy = graph.lookup_node(name)
                for key, value in prompt.get_node(node)["inputs"].items():
                    if is_link(value) and value[0] in names:
                        value = graph.lookup_node(names[value[0]]).out(value[1])
                    copy.set_input(key, value)
            graph.lookup_node(names[start]).set_input("latent", latent)
            return io.NodeOutput(graph.lookup_node("end").out(0), expand=graph.finalize())


def nodes_between(prompt: Any, start: str, end: str) -> list[str]:
    """Ids of the nodes on a path from ``start`` to ``end``, both included."""
    reached: dict[str, bool] = {start: True}

    def depends(node: str) -> bool:
        if node not in reached:
            reached[node] = False  # ends the recursion in a cycle, which a valid graph does not have
            links = [value[0] for value in prompt.get_node(node)["inputs"].values() if is_link(value)]
            reached[node] = any([depends(link) for link in links])
        return reached[node]

    depends(end)
    return [node for node, inside in reached.items() if inside]
