// Krea 2 Sampler and its relatives: numbers that a preset leaves unused are hidden, and the
// settings that it stands for are written on the node before a run.

import { app } from "../../../scripts/app.js";
import { forecastLines, sizeOf } from "./forecast.js";
import { reportOf, show } from "./node_text.js";

// A widget is shown where another one has this value.
const SHOWN_WITH = {
  steps: ["preset", "custom"],
  guidance: ["preset", "custom"],
  mu: ["shift", "fixed"],
};
// Key of an input's options: the settings of each choice, as text (nodes/inputs.py).
const SETTINGS = "krea2_settings";
// Likewise of a loader: what a forecast needs (nodes/forecasts.py).
const FORECAST = "krea2_forecast";
// Nodes without guidance show the first line only.
const SAMPLER = "K2Sampler";
const TILED = "K2TiledSampling";
const WALK = "K2Walk";
// Below this strength a few-step LoRA leaves the checkpoint's settings (krea2_model/lora).
const FULL_STRENGTH = 0.8;
const FARTHEST = 50;
// A node that is neither bypassed nor muted.
const ALWAYS = 0;
// Widgets whose values are settings of a run, or decide what it takes.
const REFRESHING = [
  ...["preset", "shift", "model", "file", "lora", "strength", "steps", "guidance"],
  ...["aspect", "megapixels", "width", "height", "batch"],
  ...["tile", "overlap", "move"],
];

// The settings last shown on a node: a report of a run stays until they change.
const planned = new WeakMap();

const isOurs = (node) => node?.comfyClass?.startsWith("K2");
const widgetOf = (node, name) => node.widgets?.find((each) => each.name === name);
const inputOf = (node, name) => node.inputs?.find((each) => each.name === name);
const isLinked = (node, name) => inputOf(node, name)?.link != null;

function optionOf(node, name, key) {
  const inputs = node.constructor?.nodeData?.input;
  return inputs?.required?.[name]?.[1]?.[key] ?? inputs?.optional?.[name]?.[1]?.[key];
}

const settingsOf = (node, name) => optionOf(node, name, SETTINGS);

function hideUnused(node) {
  let changed = false;
  for (const [name, [by, value]] of Object.entries(SHOWN_WITH)) {
    const widget = widgetOf(node, name);
    const control = widgetOf(node, by);
    if (!widget || !control) continue;
    const hidden = control.value !== value && !isLinked(node, name) && !isLinked(node, by);
    if (Boolean(widget.hidden) === hidden) continue;
    widget.hidden = hidden;
    if (widget.options) widget.options.hidden = hidden;
    changed = true;
  }
  if (!changed) return;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

// The settings of the file at the beginning of the wire, as far as its loader tells them.
function settingsOfModel(node, presets) {
  for (let step = 0; node && step < FARTHEST; step++) {
    const ofLora = settingsOf(node, "lora")?.[widgetOf(node, "lora")?.value];
    if (ofLora && !(widgetOf(node, "strength")?.value < FULL_STRENGTH)) return ofLora;
    for (const name of ["model", "file", "unet_name", "ckpt_name"]) {
      const widget = widgetOf(node, name);
      if (typeof widget?.value !== "string" || isLinked(node, name)) continue;
      const known = settingsOf(node, name)?.[widget.value];
      if (known) return known;
      // A file that is not here yet, as in a template: named by Raw or Turbo.
      const words = widget.value.toLowerCase().split(/[^a-z]+/);
      return presets[["turbo", "raw"].find((word) => words.includes(word))];
    }
    const slot = node.inputs?.findIndex((each) => each.name === "model" || each.type === "MODEL");
    node = slot >= 0 ? node.getInputNode?.(slot) : null;
  }
  return undefined;
}

function upstream(node, name, type) {
  const slot = node.inputs?.findIndex((each) => each.name === name || each.type === type) ?? -1;
  return slot >= 0 ? node.getInputNode?.(slot) : null;
}

// The values of Krea 2 Tiled Sampling; of linked ones the defaults.
function tilesAsked(node) {
  const value = (name, other) => (isLinked(node, name) ? other : (widgetOf(node, name)?.value ?? other));
  return { tile: value("tile", 0), overlap: value("overlap", 0.25), move: value("move", true), batch: value("batch", 1) };
}

// True where the positive prompt comes from a Krea 2 Walk between two prompts.
function isBlended(node) {
  let source = upstream(node, "positive", "CONDITIONING");
  for (let step = 0; source && step < FARTHEST; step++) {
    if (source.comfyClass === WALK && source.mode === ALWAYS) return isLinked(source, "end");
    source = upstream(source, "conditioning", "CONDITIONING");
  }
  return false;
}

// What the sampler will take, where size, steps and model are known.
function forecast(node, settings) {
  const source = upstream(node, "latent", "LATENT");
  const size = source && sizeOf(source, widgetOf, isLinked);
  if (!size) return [];
  let loader = upstream(node, "model", "MODEL");
  let tiles;
  for (let step = 0; loader && step < FARTHEST; step++) {
    for (const name of ["model", "file"]) {
      const known = optionOf(loader, name, FORECAST);
      const file = widgetOf(loader, name)?.value;
      if (known) return forecastLines(size, settings, known, file, tiles, isBlended(node));
    }
    if (loader.comfyClass === TILED && loader.mode === ALWAYS) tiles ??= tilesAsked(loader);
    loader = upstream(loader, "model", "MODEL");
  }
  return [];
}

// Steps and guidance as settings say them (nodes/reports.py), or as the widgets do.
function numbersOf(node, text) {
  const own = (name) => (isLinked(node, name) ? undefined : widgetOf(node, name)?.value);
  return {
    steps: text ? Number(text.match(/(\d+) steps/)?.[1]) : own("steps"),
    guidance: text ? Number(text.match(/guidance ([\d.]+)/)?.[1]) : own("guidance"),
  };
}

function plan(node) {
  const settings = planSettings(node);
  if (node.comfyClass !== SAMPLER) return settings;
  const isCustom = widgetOf(node, "preset")?.value === "custom" && !isLinked(node, "preset");
  if (!settings && !isCustom) return "";
  const numbers = numbersOf(node, settings);
  const lines = numbers.steps > 0 && numbers.guidance >= 0 ? forecast(node, numbers) : [];
  return [...(settings ? [settings] : []), ...lines].join("\n");
}

function planSettings(node) {
  const preset = widgetOf(node, "preset");
  const presets = settingsOf(node, "preset");
  if (!preset || !presets || isLinked(node, "preset")) return "";
  if (preset.value === "custom") return "";
  const named = presets[preset.value];
  const settings = named ?? settingsOfModel(node, presets);
  if (!settings) return "";
  const text = named ? settings : `${preset.value}: ${settings}`;
  return node.comfyClass === SAMPLER ? text : text.split("\n")[0];
}

function refresh(node) {
  hideUnused(node);
  const text = plan(node);
  if (text === planned.get(node)) return;
  const isFirst = !planned.has(node);
  planned.set(node, text);
  if (isFirst && reportOf(node)) return;
  if (text || reportOf(node)) show(node, text);
}

function refreshAll() {
  for (const node of app.graph?.nodes ?? []) if (isOurs(node)) refresh(node);
}

app.registerExtension({
  name: "krea2kit.settings",

  nodeCreated(node) {
    if (!isOurs(node)) return;
    for (const name of REFRESHING) {
      const widget = widgetOf(node, name);
      if (!widget) continue;
      const before = widget.callback;
      widget.callback = function () {
        const result = before?.apply(this, arguments);
        refreshAll();
        return result;
      };
    }
    const connected = node.onConnectionsChange;
    node.onConnectionsChange = function () {
      const result = connected?.apply(this, arguments);
      // Links are written after this call.
      queueMicrotask(refreshAll);
      return result;
    };
    queueMicrotask(() => node.graph && refresh(node));
  },

  afterConfigureGraph: refreshAll,
});
