// Shows the text of a node's `ui` output on the node. ComfyUI sends that output to the client that runs the prompt, sends it again while the
// node is cached, and keeps it in the history.
import { app } from "../../scripts/app.js";

const PREFIX = "Blended";
const NAME = "shown_text";

function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  let widget = node.widgets?.find((w) => w.name === NAME);
  if (!text && !widget) return;
  if (!widget) {
    const element = document.createElement("textarea");
    element.className = "comfy-multiline-input";
    element.readOnly = true;
    widget = node.addDOMWidget(NAME, "text", element, {
      serialize: false, // not in the prompt
      getMinHeight: () => 78, // five lines
      getValue: () => element.value,
      setValue: (value) => (element.value = value),
    });
    widget.serialize = false; // nor in the saved workflow
  }
  widget.value = text;
  node.setDirtyCanvas?.(true, true);
}

// The page names a node of the root graph '4' and a node of a subgraph '<id of the subgraph>:4'.
function find(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  return (subgraph ? root?.subgraphs?.get(subgraph) : root)?.getNodeById(id);
}

app.registerExtension({
  name: "BlendedDiffusion.ShowText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      show(this, output);
    };
  },
  // Called when the page takes outputs from the history or from another tab.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs ?? {})) {
      const node = find(locator);
      if (node?.type?.startsWith(PREFIX)) show(node, output);
    }
  },
});
