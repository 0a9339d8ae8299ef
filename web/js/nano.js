// In a template, picking krea2-nano in Load Krea 2 also puts in the values that suit it: a size of
// 128 px, a prompt it understands. Picking another model puts the template's own values back.
//
// The template carries them: extra.krea2_nano, by node and widget, as [its own value, nano's].

import { app } from "../../../scripts/app.js";

const LOADER = "K2Loader";
const BUILT_IN = "krea2-nano";

// A value that the user has changed is neither of the two, and stays.
function swap(graph, isNano) {
  for (const [id, values] of Object.entries(graph?.extra?.krea2_nano ?? {})) {
    const node = graph.getNodeById(Number(id));
    for (const [name, [own, nano]] of Object.entries(values)) {
      const widget = node?.widgets?.find((each) => each.name === name);
      if (!widget || widget.value !== (isNano ? own : nano)) continue;
      const old = widget.value;
      const value = isNano ? nano : own;
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
      // Numbers are rounded to the step of the widget there: 0.016 megapixels are 128 px.
      widget.value = value;
      node.onWidgetChanged?.(name, widget.value, old, widget);
    }
  }
}

app.registerExtension({
  name: "krea2kit.nano",

  nodeCreated(node) {
    if (node?.comfyClass !== LOADER) return;
    const widget = node.widgets?.find((each) => each.name === "model");
    if (!widget) return;
    const before = widget.callback;
    widget.callback = function (value) {
      const result = before?.apply(this, arguments);
      swap(node.graph, String(value).startsWith(BUILT_IN));
      return result;
    };
  },
});
