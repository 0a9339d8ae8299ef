// The prompts of earlier runs, in a menu of our nodes that have one: to be searched, put into the node
// again, and deleted. Opened by the button above a selected node, its context menu, or a command.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { element } from "./compare.js";
import { KINDS, add, clear, load, remove } from "./prompt_store.js";
import { widgetOf } from "./dom_widget.js";

const SETTING = "Krea2Kit.PromptHistory";
const COMMAND = "Krea2Kit.OpenPromptHistory";
const TITLE = "Prompt History";
const NAMES = { prompt: "Prompts", negative: "Negatives" };
// Widgets whose texts are kept, by type of node; their names are the kinds.
const WITH_BOTH = ["K2TextEncode", "K2TextEncodeImages", "K2StyleMix", "K2Edit", "K2Grid", "K2Styles"];
const WITH_PROMPT = ["K2Regions", "K2PromptExpander", "K2StyleLora", "K2TiledSampling", "K2Upscale"];
// Pixels of the menu, and between it and the edges of the page.
const WIDTH = 380;
const HEIGHT = 420;
const MARGIN = 12;

const STYLE = `
.k2-history { position: fixed; z-index: 2000; display: flex; flex-direction: column; gap: 6px;
  width: ${WIDTH}px; max-height: ${HEIGHT}px; box-sizing: border-box; padding: 8px;
  font: 13px sans-serif; color: #ddd; background: #26262a; border: 1px solid #555;
  border-radius: 8px; box-shadow: 0 4px 16px rgb(0 0 0 / 60%); }
.k2-history .bar { display: flex; gap: 4px; align-items: center; flex: none; }
.k2-history .bar span { flex: 1; color: #aaa; }
.k2-history input { flex: 1; min-width: 0; height: 28px; box-sizing: border-box; padding: 0 8px;
  font: inherit; color: inherit; background: #1b1b1e; border: 1px solid #555; border-radius: 4px; }
.k2-history button { flex: none; height: 26px; padding: 0 8px; font: inherit; color: inherit;
  background: #3a3a40; border: 1px solid #555; border-radius: 4px; cursor: pointer; }
.k2-history button[aria-pressed=true] { background: #4a6fa5; }
.k2-history button:disabled { opacity: 0.35; cursor: default; }
.k2-history :focus-visible { outline: 2px solid white; outline-offset: 1px; }
.k2-history .list { overflow-y: auto; min-height: 40px; display: flex; flex-direction: column;
  gap: 4px; }
.k2-history .row { display: flex; gap: 4px; align-items: stretch; flex: none; }
.k2-history .text { flex: 1; min-width: 0; height: auto; min-height: 26px; padding: 4px 8px;
  text-align: left; }
.k2-history .text span { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; overflow-wrap: anywhere; line-height: 16px; }
.k2-history .row .delete { height: auto; min-width: 28px; }
.k2-history .none { color: #aaa; padding: 8px; }
`;

const isLinked = (node, name) => node.inputs?.find((each) => each.name === name)?.link != null;
const isOn = () => app.extensionManager?.setting?.get(SETTING) !== false;

// The kinds of prompts that a node has; none for other nodes.
function kindsOf(node) {
  const type = node?.comfyClass;
  const names = WITH_BOTH.includes(type) ? KINDS : WITH_PROMPT.includes(type) ? ["prompt"] : [];
  return names.filter((name) => typeof widgetOf(node, name)?.value === "string");
}

// All nodes that run, those in subgraphs too.
function* nodesOf(graph) {
  for (const node of graph?.nodes ?? []) {
    if (node.mode !== 0) continue;
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

// As they are typed: with wildcards, of which each run draws others.
function keepAll() {
  if (!isOn()) return;
  const texts = [];
  for (const node of nodesOf(app.rootGraph ?? app.graph))
    for (const kind of kindsOf(node)) if (!isLinked(node, kind)) texts.push([kind, widgetOf(node, kind).value]);
  add(texts);
}

class Menu {
  constructor(node, kinds) {
    this.node = node;
    this.kind = kinds[0];
    this.kept = {};
    this.search = element("input", { type: "search", placeholder: "Search", ariaLabel: "Search the prompts" });
    this.search.oninput = () => this.render();
    this.tabs = kinds.map((kind) => {
      const made = element("button", { textContent: NAMES[kind], onclick: () => this.choose(kind) });
      made.dataset.kind = kind;
      return made;
    });
    this.list = element("div", { className: "list" });
    this.hint = element("span");
    this.clear = element("button", { textContent: "Clear", title: "Delete all of these prompts" });
    this.clear.onclick = () => this.clearAll();
    const close = element("button", { textContent: "\u2715", title: "Close", onclick: () => this.close() });
    this.element = element(
      "div", { className: "k2-history", role: "dialog", ariaLabel: TITLE },
      element("div", { className: "bar" }, this.search, close),
      element("div", { className: "bar" }, ...this.tabs, this.hint, this.clear),
      this.list,
    );
    this.element.addEventListener("keydown", (event) => this.press(event));
    // The page would take keys and clicks for its own.
    for (const kind of ["pointerdown", "mousedown", "keydown", "keyup", "paste", "wheel", "contextmenu"])
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    this.outside = (event) => {
      if (!this.element.contains(event.target)) this.close();
    };
  }

  async open() {
    document.body.append(this.element);
    this.place();
    this.render();
    this.search.focus();
    // The click that opened it is not one outside.
    setTimeout(() => window.addEventListener("pointerdown", this.outside, true));
    this.kept = await load();
    this.render();
  }

  close() {
    window.removeEventListener("pointerdown", this.outside, true);
    this.element.remove();
    if (opened === this) opened = null;
  }

  // Beside the node, on the page.
  place() {
    const { scale, offset } = app.canvas.ds;
    const corner = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = this.node.pos;
    const left = corner.left + (x + this.node.size[0] + offset[0]) * scale + MARGIN;
    const top = corner.top + (y + offset[1]) * scale;
    const within = (value, most) => Math.max(MARGIN, Math.min(value, most - MARGIN));
    this.element.style.left = `${within(left, window.innerWidth - WIDTH)}px`;
    this.element.style.top = `${within(top, window.innerHeight - HEIGHT)}px`;
  }

  choose(kind) {
    this.kind = kind;
    this.render();
    this.search.focus();
  }

  get found() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = this.kept[this.kind] ?? [];
    return texts.filter((text) => words.every((word) => text.toLowerCase().includes(word)));
  }

  render() {
    const texts = this.kept[this.kind] ?? [];
    const found = this.found;
    for (const tab of this.tabs) tab.setAttribute("aria-pressed", tab.dataset.kind === this.kind);
    this.hint.textContent = found.length === texts.length ? `${texts.length}` : `${found.length} of ${texts.length}`;
    this.clear.disabled = !texts.length;
    this.setAsked(false);
    const none = texts.length ? "None has these words." : "Those of the next run are kept here.";
    const rows = found.map((text) => this.row(text));
    this.list.replaceChildren(...(rows.length ? rows : [element("div", { className: "none", textContent: none })]));
  }

  row(text) {
    const shown = element("span", { textContent: text });
    const insert = element("button", { className: "text", title: `${text}\n\nPut into the node` }, shown);
    insert.onclick = () => this.insert(text);
    const del = element("button", { className: "delete", textContent: "\u2715", title: "Delete" });
    del.onclick = async () => {
      const index = this.found.indexOf(text);
      this.kept = await remove(this.kind, text);
      this.render();
      const rows = this.list.querySelectorAll(".text");
      (rows[Math.min(index, rows.length - 1)] ?? this.search).focus();
    };
    return element("div", { className: "row" }, insert, del);
  }

  insert(text) {
    const { node, kind } = this;
    const widget = widgetOf(node, kind);
    if (!widget || isLinked(node, kind)) {
      this.hint.textContent = "The text comes from another node.";
      return;
    }
    const old = widget.value;
    app.canvas.emitBeforeChange?.();
    widget.value = text;
    widget.callback?.(text, app.canvas, node);
    node.onWidgetChanged?.(kind, text, old, widget);
    app.canvas.emitAfterChange?.();
    node.graph?.setDirtyCanvas?.(true, true);
    this.close();
  }

  setAsked(isAsked) {
    this.isAsked = isAsked;
    this.clear.textContent = isAsked ? "Delete all?" : "Clear";
  }

  // At the second click.
  async clearAll() {
    if (!this.isAsked) return this.setAsked(true);
    this.kept = await clear(this.kind);
    this.render();
    this.search.focus();
  }

  press(event) {
    if (event.key === "Escape") return this.close();
    const places = [this.search, ...this.list.querySelectorAll(".text")];
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" && document.activeElement === this.search) this.list.querySelector(".text")?.click();
    else if (by) {
      const now = places.indexOf(document.activeElement);
      places[Math.max(0, Math.min(now + by, places.length - 1))]?.focus();
    } else return;
    event.preventDefault();
  }
}

let opened = null;

function open(node) {
  opened?.close();
  const kinds = kindsOf(node);
  if (!kinds.length || !isOn()) return;
  opened = new Menu(node, kinds);
  opened.open();
}

function selected() {
  return Object.values(app.canvas?.selected_nodes ?? {}).find((node) => kindsOf(node).length);
}

app.registerExtension({
  name: "krea2kit.promptHistory",

  settings: [
    {
      id: SETTING,
      name: "Keep the prompts of runs, for a menu of the nodes",
      tooltip: "The last 100 different prompts and negatives, in your user data on the server.",
      category: ["Krea 2 Kit", "Prompts", "History"],
      type: "boolean",
      defaultValue: true,
    },
  ],

  commands: [
    { id: COMMAND, label: TITLE, icon: "pi pi-history", function: () => open(selected()) },
  ],

  getSelectionToolboxCommands(item) {
    return isOn() && kindsOf(item).length ? [COMMAND] : [];
  },

  getNodeMenuItems(node) {
    return isOn() && kindsOf(node).length ? [{ content: TITLE, callback: () => open(node) }] : [];
  },

  init() {
    document.head.append(element("style", { textContent: STYLE }));
    api.addEventListener("promptQueued", keepAll);
  },
});
