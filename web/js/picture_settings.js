// Krea 2 Picture Settings: a button that writes what the chosen picture says into the nodes before a
// Krea 2 Sampler of the graph. The node reads the picture (nodes/picture_settings.py), run by itself.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { show } from "./node_text.js";
import { widgetOf } from "./dom_widget.js";

const NODE = "K2PictureSettings";
const SAMPLER = "K2Sampler";
const KEY = "k2_settings";
const CONTROL = "control_after_generate";
// The loader of the transformer alone has its name in a widget of another name.
const LOADERS = { K2Loader: "model", K2ModelLoader: "file" };
// Without these the picture is another one, so a graph that has them is told.
const CHANGING = [
  ...["K2LoraLoader", "K2StyleLora", "K2NegativeGuidance", "K2GuidanceSchedule", "K2Approximate", "K2TapWeights"],
  ...["K2Vary", "K2Walk", "K2Styles", "K2StyleTransfer", "K2StyleMix", "K2Regions", "K2Reference", "K2ControlLora"],
];

const titleOf = (type) => globalThis.LiteGraph?.registered_node_types?.[type]?.title ?? type;
const isLinked = (node, name) => node.inputs?.find((each) => each.name === name)?.link != null;

// What the server refuses, in its words.
function refusal(error) {
  const problems = Object.values(error.response?.node_errors ?? {}).flatMap((each) => each.errors ?? []);
  const details = problems.map((each) => each.details || each.message).filter(Boolean);
  return details[0]?.replace(/^image - /, "") ?? error.message;
}

// The node's output, as it runs by itself before other jobs that wait.
async function run(node) {
  const image = widgetOf(node, "image")?.value;
  if (typeof image !== "string" || !image) throw new Error("Choose or upload a picture.");
  const id = String(node.id);
  // A quick job may be done before its number is known.
  const told = [];
  let hear = () => {};
  const listen = ({ type, detail }) => {
    told.push({ type, detail });
    hear();
  };
  const kinds = ["executed", "execution_error", "execution_interrupted"];
  for (const kind of kinds) api.addEventListener(kind, listen);
  try {
    const output = { [id]: { class_type: NODE, inputs: { image }, _meta: { title: titleOf(NODE) } } };
    const { prompt_id: job } = await api.queuePrompt(-1, { output, workflow: app.rootGraph?.serialize?.() ?? {} });
    for (;;) {
      const found = told.find(({ detail }) => detail?.prompt_id === job);
      if (found?.type === "executed") return found.detail.output;
      if (found) throw new Error(found.detail.exception_message ?? "The run was stopped.");
      await new Promise((resolve) => (hear = resolve));
    }
  } catch (error) {
    throw new Error(refusal(error));
  } finally {
    for (const kind of kinds) api.removeEventListener(kind, listen);
  }
}

// The nodes before a sampler and itself, in the order in which the server tells those of a picture.
function nodesBefore(sampler) {
  const found = [];
  const begun = new Set();
  const add = (node) => {
    if (!node || begun.has(node)) return;
    begun.add(node);
    (node.inputs ?? []).forEach((_, slot) => add(node.getInputNode?.(slot)));
    found.push(node);
  };
  add(sampler);
  return found;
}

// The sampler that is meant, or the reason why there is none.
function samplerOf(node) {
  const selected = Object.values(app.canvas?.selected_nodes ?? {}).filter((each) => each.type === SAMPLER);
  const all = (node.graph?.nodes ?? []).filter((each) => each.type === SAMPLER);
  const chosen = selected.length === 1 ? selected : all;
  if (chosen.length === 1) return { sampler: chosen[0] };
  const title = titleOf(SAMPLER);
  return { problem: all.length ? `There are ${all.length} nodes ${title}: select one of them too.` : `There is no node ${title} in this graph.` };
}

// Why a widget cannot have a value; empty where it has it now.
function put(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget) return "no such widget";
  if (isLinked(node, name)) return "comes from another node";
  const given = widget.options?.values;
  const options = typeof given === "function" ? given(widget, node) : given;
  if (Array.isArray(options) && !options.includes(value)) return "is not here";
  if (typeof widget.value !== typeof value) return "is of another kind";
  const { min, max } = widget.options ?? {};
  if (typeof value === "number" && (value < min || value > max)) return "is out of range";
  const old = widget.value;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  // Some widgets round what their callback is given.
  widget.value = value;
  node.onWidgetChanged?.(name, value, old, widget);
  const control = name.endsWith("seed") && widgetOf(node, CONTROL);
  if (control) control.value = "fixed";
  return "";
}

// The values of a picture's loader by the widgets of another one.
function valuesFor(made, node) {
  if (made.type === node.type || !(made.type in LOADERS)) return made.values;
  const { [LOADERS[made.type]]: name, dtype, implementation } = made.values;
  return { [LOADERS[node.type]]: name, dtype, implementation };
}

function warn(detail) {
  app.extensionManager?.toast?.add?.({ severity: "warn", summary: `${titleOf(NODE)}: not set`, detail, life: 10_000 });
}

// Write values into nodes; lines that say what was set and what was not.
function write(nodes, sampler) {
  const free = nodesBefore(sampler).filter((node) => node.type?.startsWith("K2"));
  const take = (types) => {
    const index = free.findIndex((node) => types.includes(node.type));
    return index < 0 ? undefined : free.splice(index, 1)[0];
  };
  const [set, missed] = [[], []];
  for (const made of nodes) {
    const node = take([made.type]) ?? (made.type in LOADERS ? take(Object.keys(LOADERS)) : undefined);
    const title = titleOf(made.type);
    if (!node) {
      const files = Object.entries(made.values).filter(([name]) => ["lora", "style"].includes(name));
      missed.push(`${title}: the graph has none${files.map(([, value]) => ` for ${value}`).join()}`);
      continue;
    }
    let count = 0;
    for (const [name, value] of Object.entries(valuesFor(made, node))) {
      if (value === undefined || !widgetOf(node, name)) continue;
      const problem = put(node, name, value);
      if (problem) missed.push(`${title}, ${name}: ${String(value).slice(0, 80)} ${problem}`);
      else count += 1;
    }
    if (count) set.push(title);
  }
  for (const node of free)
    if (CHANGING.includes(node.type) && node.mode === 0) missed.push(`${titleOf(node.type)} stays: the picture has none`);
  // Reports are short in the page's newer nodes, so that what was not set would be out of sight.
  if (missed.length) warn(missed.join("\n"));
  const lines = [set.length ? `Set: ${[...new Set(set)].join(", ")}` : "Nothing was set."];
  if (missed.length) lines.push("Not set:", ...missed.map((line) => `- ${line}`));
  return lines;
}

async function use(node) {
  const { sampler, problem } = samplerOf(node);
  if (problem) return show(node, problem);
  show(node, "Reading the picture, after the job that runs ...");
  let output;
  try {
    output = await run(node);
  } catch (error) {
    return show(node, error.message);
  }
  const nodes = output?.[KEY]?.[0]?.nodes;
  if (!nodes?.length) return show(node, `No graph has these settings:\n${output?.text?.[0] ?? ""}`);
  // So that undo takes all of it back at once.
  app.canvas.emitBeforeChange?.();
  const lines = write(nodes, sampler);
  app.canvas.emitAfterChange?.();
  node.graph?.setDirtyCanvas?.(true, true);
  show(node, lines.join("\n"));
}

app.registerExtension({
  name: "krea2kit.pictureSettings",

  nodeCreated(node) {
    if (node?.comfyClass !== NODE) return;
    const button = node.addWidget("button", "Use these settings", null, () => use(node), { serialize: false });
    // Seen on the page only: neither in the saved workflow nor in the request.
    button.serialize = false;
  },
});
