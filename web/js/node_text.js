// Shows on our nodes what they report as text after a run: a LoRA's report, tokens, settings.

import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const NAME = "report";
// Pixels of a line of text in a node, and of what is around the text.
const ROW = 14;
const PADDING = 20;

const isOurs = (node) => node?.comfyClass?.startsWith("K2");

// ComfyUI's widget for text that arrives during a run, which the report takes the place of.
const PROGRESS = "$$node-text-preview";

function removeProgress(node) {
  const index = node.widgets?.findIndex((each) => each.name === PROGRESS) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

export function reportOf(node) {
  return node.widgets?.find((each) => each.name === NAME)?.value;
}

export function show(node, text) {
  removeProgress(node);
  let widget = node.widgets?.find((each) => each.name === NAME);
  if (!widget) {
    const spec = ["STRING", { multiline: true }];
    widget = ComfyWidgets.STRING(node, NAME, spec, app).widget;
    // Seen on the page only: neither in the saved workflow nor in the request.
    widget.serialize = false;
    widget.options.serialize = false;
    widget.options.read_only = true;
    if (widget.element) {
      widget.element.readOnly = true;
      widget.element.style.opacity = 0.75;
    }
  }
  widget.value = text;
  const lines = text.split("\n");
  const rows = lines.reduce((sum, line) => sum + 1 + Math.floor(line.length / 60), 0);
  // Else it shares what is left with a prompt above it, or a preview below.
  widget.options.getMinHeight = () => ROW * rows + PADDING;
  const [width, height] = node.computeSize();
  const readable = lines.some((line) => line.length > 40) ? 420 : 0;
  node.setSize([Math.max(node.size[0], width, readable), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

function update(node, output) {
  if (isOurs(node) && output?.text?.length) {
    // A list of prompts reports for each: once where all say the same.
    const texts = [output.text].flat();
    const same = texts.every((text) => text === texts[0]);
    show(node, same ? texts[0] : texts.join("\n"));
  }
}

app.registerExtension({
  name: "krea2kit.nodeText",

  nodeCreated(node) {
    if (!isOurs(node)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      update(this, output);
    };
  },

  // Outputs that come back without a run: another tab's, or a workflow opened again.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      update(app.rootGraph?.getNodeById?.(id), output);
    }
  },
});
