// Krea 2 Regions: a canvas to draw regions on, each with its prompt. It reads and writes the text of
// the input "regions", a JSON list; entries that it does not show (strength, loras) stay as they are.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { element } from "./compare.js";
import { addView, after, layOut, widgetOf } from "./dom_widget.js";

const NODE = "K2Regions";
const MAX_REGIONS = 8;
// Fractions of the canvas: the smallest side of a region, and how near an edge it snaps to it.
const SMALLEST = 0.04;
const SNAP = 0.02;
// Pixels of the canvas at most, of a row of the list, and of the node's width at first.
const TALLEST = 380;
const ROW = 34;
const WIDTH = 440;
// One a region, as krea2_model/images/region_picture.py has them.
const COLOURS = [
  "rgb(230 75 65)", "rgb(60 130 235)", "rgb(250 190 40)", "rgb(70 170 90)",
  "rgb(165 95 215)", "rgb(245 130 50)", "rgb(60 190 200)", "rgb(235 115 175)",
];
const CORNERS = ["nw", "ne", "sw", "se"];

const STYLE = `
.k2-regions { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%;
  box-sizing: border-box; padding: 4px; font: 13px sans-serif; color: #ddd; overflow: hidden; }
.k2-regions .stage { position: relative; align-self: center; flex: none; background: #26262a center /
  100% 100% no-repeat; outline: 1px solid #555; cursor: crosshair; touch-action: none;
  user-select: none; }
.k2-regions .stage.off { cursor: not-allowed; opacity: 0.5; }
.k2-regions .box { position: absolute; box-sizing: border-box; border: 2px solid; cursor: move; }
.k2-regions .box b { position: absolute; left: 4px; top: 1px; font-size: 18px; color: white;
  text-shadow: 0 0 3px black, 0 0 3px black; pointer-events: none; }
.k2-regions .box span { position: absolute; left: 4px; right: 4px; top: 24px; bottom: 2px;
  overflow: hidden; overflow-wrap: anywhere; color: white;
  text-shadow: 0 0 3px black, 0 0 3px black; pointer-events: none; }
.k2-regions .box.chosen { border-width: 3px; box-shadow: 0 0 0 1px white; }
.k2-regions .handle { position: absolute; width: 14px; height: 14px; background: white;
  border: 1px solid black; box-sizing: border-box; z-index: 1; }
.k2-regions .nw { left: -8px; top: -8px; cursor: nwse-resize; }
.k2-regions .ne { right: -8px; top: -8px; cursor: nesw-resize; }
.k2-regions .sw { left: -8px; bottom: -8px; cursor: nesw-resize; }
.k2-regions .se { right: -8px; bottom: -8px; cursor: nwse-resize; }
.k2-regions .row { display: flex; align-items: center; gap: 4px; height: 28px; flex: none; }
.k2-regions .number { flex: none; width: 24px; line-height: 24px; text-align: center;
  border-radius: 4px; color: white; font-weight: bold; text-shadow: 0 0 3px black;
  cursor: pointer; }
.k2-regions .row.chosen .number { outline: 2px solid white; }
.k2-regions input { flex: 1; min-width: 0; height: 26px; box-sizing: border-box; padding: 0 6px;
  font: inherit; color: inherit; background: #1b1b1e; border: 1px solid #555; border-radius: 4px; }
.k2-regions .kind { flex: none; color: #aaa; }
.k2-regions button { flex: none; min-width: 26px; height: 26px; padding: 0 6px; font: inherit;
  color: inherit; background: #3a3a40; border: 1px solid #555; border-radius: 4px;
  cursor: pointer; }
.k2-regions button:disabled { opacity: 0.35; cursor: default; }
.k2-regions .hint { flex: 1; color: #aaa; }
`;

const round = (value) => Math.round(value * 1000) / 1000;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const isBox = (entry) => Array.isArray(entry.box) && entry.box.length === 4;

function nodeAt(node, name) {
  const slot = node.inputs?.findIndex((each) => each.name === name) ?? -1;
  return slot >= 0 ? node.getInputNode?.(slot) : null;
}

// The list, or null for what is no list of regions.
function read(text) {
  try {
    const entries = JSON.parse(text.trim() || "[]");
    const isList = Array.isArray(entries) && entries.every((each) => each && typeof each === "object");
    return isList ? entries : null;
  } catch {
    return null;
  }
}

// One region a line.
function write(entries) {
  return entries.length ? `[${entries.map((each) => JSON.stringify(each)).join(",\n ")}]` : "[]";
}

// The picture of the last run without rectangles: masks, and the background. The key is that of
// nodes/regions.py.
function previewOf(node) {
  return app.nodeOutputs?.[node.id]?.k2_regions?.[0];
}

// Width over height of the latent on the node, as far as its node tells it; else undefined.
function aspectOf(node) {
  const source = nodeAt(node, "latent");
  const value = (name) => widgetOf(source, name)?.value;
  const ratio = /^(\d+):(\d+)/.exec(String(value("aspect") ?? ""));
  let [width, height] = ratio ? [Number(ratio[1]), Number(ratio[2])] : [value("width"), value("height")];
  if (value("swap")) [width, height] = [height, width];
  return width > 0 && height > 0 ? width / height : undefined;
}

// The address of the picture to draw on: on the node's input, of its last run or the file that a
// loader names; else the node's own preview of its last run. Empty without one.
function pictureOf(node) {
  const source = nodeAt(node, "picture");
  const output = source ? app.nodeOutputs?.[source.id]?.images?.[0] : previewOf(node);
  const named = widgetOf(source, "image")?.value;
  if (!output && typeof named !== "string") return "";
  const parts = typeof named === "string" ? named.split("/") : [];
  const file = output ?? { filename: parts.pop(), subfolder: parts.join("/"), type: "input" };
  return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

class RegionCanvas {
  constructor(node, text) {
    this.node = node;
    this.text = text;
    this.chosen = -1;
    this.aspect = 1;
    this.stage = element("div", { className: "stage", tabIndex: 0 });
    this.list = element("div");
    this.hint = element("span", { className: "hint" });
    this.json = element("button", { textContent: "JSON", title: "Show the regions as text" });
    this.json.onclick = () => this.showText(this.text.hidden);
    this.element = element(
      "div", { className: "k2-regions" },
      this.stage, this.list, element("div", { className: "row" }, this.hint, this.json),
    );
    // The page would move the node, or take keys for its own.
    for (const kind of ["pointerdown", "mousedown", "dblclick", "contextmenu", "keydown", "paste"])
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    this.stage.addEventListener("pointerdown", (event) => this.press(event));
    this.stage.addEventListener("keydown", (event) => {
      if (event.key === "Delete" || event.key === "Backspace") this.remove(this.chosen);
    });
    this.element.addEventListener("pointerenter", () => this.refresh());
  }

  get entries() {
    return read(String(this.text.value ?? "")) ?? [];
  }

  get isLocked() {
    const linked = this.node.inputs?.find((each) => each.name === "regions")?.link != null;
    return linked || read(String(this.text.value ?? "")) === null;
  }

  // The text may have come from anywhere: another workflow, undo, a hand.
  refresh() {
    const isTyping = this.list.contains(document.activeElement);
    const state = JSON.stringify([
      this.text.value, this.chosen, aspectOf(this.node), pictureOf(this.node), this.isLocked,
    ]);
    if (state === this.state || isTyping) return;
    this.state = state;
    this.render();
  }

  save(entries) {
    const old = this.text.value;
    this.text.value = write(entries);
    this.text.callback?.(this.text.value, app.canvas, this.node);
    this.node.onWidgetChanged?.(this.text.name, this.text.value, old, this.text);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  // Change entries, show them, and keep them.
  change(make) {
    if (this.isLocked) return;
    const entries = this.entries;
    make(entries);
    this.chosen = clamp(this.chosen, -1, entries.length - 1);
    this.save(entries);
    this.render();
  }

  remove(index) {
    if (index >= 0) this.change((entries) => entries.splice(index, 1));
  }

  move(index, by) {
    this.chosen = index + by;
    this.change((entries) => entries.splice(index + by, 0, ...entries.splice(index, 1)));
  }

  choose(index) {
    this.chosen = index;
    this.render();
  }

  at(event) {
    const place = this.stage.getBoundingClientRect();
    const within = (value) => {
      const inside = clamp(value, 0, 1);
      return inside < SNAP ? 0 : inside > 1 - SNAP ? 1 : inside;
    };
    return {
      x: within((event.clientX - place.left) / place.width),
      y: within((event.clientY - place.top) / place.height),
    };
  }

  // Draw, move or resize, until the pointer is up.
  press(event) {
    if (event.button !== 0 || this.isLocked) return;
    event.preventDefault();
    this.stage.focus({ preventScroll: true });
    const target = event.target;
    const corner = CORNERS.find((each) => target.classList.contains(each));
    const box = target.closest(".box");
    const start = this.at(event);
    let entries = this.entries;
    let index = box ? Number(box.dataset.index) : entries.length;
    const isNew = !box;
    if (isNew && entries.length >= MAX_REGIONS) return;
    if (isNew) entries.push({ prompt: "", box: [start.x, start.y, 0, 0] });
    this.chosen = index;
    const [left, top, width, height] = entries[index].box;
    const fixed = { x: left + (corner?.includes("w") ? width : 0), y: top + (corner?.includes("n") ? height : 0) };

    const moved = (event) => {
      const now = this.at(event);
      if (isNew || corner) {
        const from = isNew ? start : fixed;
        entries[index].box = [
          Math.min(from.x, now.x), Math.min(from.y, now.y),
          Math.abs(from.x - now.x), Math.abs(from.y - now.y),
        ].map(round);
      } else {
        const to = (value, by, size) => {
          const first = clamp(value + by, 0, 1 - size);
          return round(first < SNAP ? 0 : first + size > 1 - SNAP ? 1 - size : first);
        };
        entries[index].box = [
          to(left, now.x - start.x, width), to(top, now.y - start.y, height), width, height,
        ].map(round);
      }
      this.drawBoxes(entries);
    };
    const done = (event) => {
      window.removeEventListener("pointermove", moved, true);
      window.removeEventListener("pointerup", done, true);
      window.removeEventListener("pointercancel", done, true);
      if (event.type === "pointerup") moved(event);
      const [, , width, height] = entries[index].box;
      const isTooSmall = Math.min(width, height) < SMALLEST;
      if (isTooSmall && isNew) this.chosen = -1;
      if (!isTooSmall && JSON.stringify(entries) !== JSON.stringify(this.entries)) this.save(entries);
      this.render();
      if (isNew && !isTooSmall) this.list.querySelectorAll("input")[index]?.focus();
    };
    // On the window: the pointer may leave the canvas, which is drawn anew meanwhile.
    window.addEventListener("pointermove", moved, true);
    window.addEventListener("pointerup", done, true);
    window.addEventListener("pointercancel", done, true);
    this.drawBoxes(entries);
  }

  render() {
    const entries = this.entries;
    this.stage.classList.toggle("off", this.isLocked);
    this.drawPicture();
    this.drawBoxes(entries);
    this.list.replaceChildren(...entries.map((entry, index) => this.row(entry, index, entries.length)));
    const isLinked = this.isLocked && read(String(this.text.value ?? "")) !== null;
    this.hint.textContent = isLinked
      ? "The regions come from another node."
      : this.isLocked
        ? "The regions are no JSON list."
        : entries.length >= MAX_REGIONS
          ? `${MAX_REGIONS} regions, as many as there may be.`
          : "Drag on the canvas to add a region. Later ones lie on top.";
    this.layOut();
  }

  drawPicture() {
    const url = pictureOf(this.node);
    if (url !== this.url) {
      this.url = url;
      this.pictureAspect = undefined;
      this.stage.style.backgroundImage = url ? `url("${url}")` : "";
      const image = new Image();
      image.onload = () => {
        if (this.url !== url) return;
        this.pictureAspect = image.naturalWidth / image.naturalHeight;
        this.layOut();
      };
      if (url) image.src = url;
    }
  }

  drawBoxes(entries) {
    const boxes = entries.flatMap((entry, index) => {
      if (!isBox(entry)) return [];
      const colour = COLOURS[index % COLOURS.length];
      const made = element(
        "div", { className: index === this.chosen ? "box chosen" : "box" },
        element("b", { textContent: index + 1 }), element("span", { textContent: entry.prompt ?? "" }),
      );
      made.dataset.index = index;
      const [left, top, width, height] = entry.box.map((value) => `${100 * value}%`);
      Object.assign(made.style, { left, top, width, height, borderColor: colour });
      made.style.backgroundColor = colour.replace(")", " / 45%)");
      if (index === this.chosen)
        made.append(...CORNERS.map((name) => element("div", { className: `handle ${name}` })));
      return [made];
    });
    this.stage.replaceChildren(...boxes);
  }

  row(entry, index, count) {
    const number = element("div", { className: "number", textContent: index + 1 });
    number.style.backgroundColor = COLOURS[index % COLOURS.length];
    number.onclick = () => this.choose(index);
    const parts = [number];
    if (!isBox(entry)) {
      const kind = entry.mask != null ? `mask ${entry.mask}` : String(entry.box ?? "");
      parts.push(element("span", { className: "kind", textContent: kind }));
    }
    const prompt = element("input", { value: entry.prompt ?? "", placeholder: "What this region shows" });
    prompt.oninput = () => {
      if (this.isLocked) return;
      const entries = this.entries;
      entries[index].prompt = prompt.value;
      this.save(entries);
      this.drawBoxes(entries);
    };
    prompt.disabled = this.isLocked;
    const button = (text, title, isOff, action) => {
      const made = element("button", { textContent: text, title, disabled: isOff || this.isLocked });
      made.onclick = action;
      return made;
    };
    parts.push(
      prompt,
      button("▲", "Lower: others lie on top", index === 0, () => this.move(index, -1)),
      button("▼", "Raise: on top of others", index === count - 1, () => this.move(index, 1)),
      button("✕", "Delete the region", false, () => this.remove(index)),
    );
    const made = element("div", { className: "row" }, ...parts);
    made.classList.toggle("chosen", index === this.chosen);
    return made;
  }

  get stageSize() {
    const room = Math.max(120, (this.node.size?.[0] ?? WIDTH) - 40);
    this.aspect = aspectOf(this.node) ?? this.pictureAspect ?? 1;
    const width = Math.min(room, TALLEST * this.aspect);
    return [width, width / this.aspect];
  }

  get height() {
    return this.stageSize[1] + ROW * (this.entries.length + 1) + 16;
  }

  fit() {
    const [width, height] = this.stageSize;
    Object.assign(this.stage.style, { width: `${width}px`, height: `${height}px` });
  }

  // Size the node for the canvas too.
  layOut() {
    this.fit();
    layOut(this.node);
  }

  showText(isShown) {
    this.text.hidden = !isShown;
    if (this.text.options) this.text.options.hidden = !isShown;
    this.json.textContent = isShown ? "Hide JSON" : "JSON";
    this.layOut();
  }
}

const canvases = new WeakMap();

app.registerExtension({
  name: "krea2kit.regions",

  init() {
    document.head.append(element("style", { textContent: STYLE }));
  },

  nodeCreated(node) {
    const text = node?.comfyClass === NODE && widgetOf(node, "regions");
    if (!text) return;
    const canvas = new RegionCanvas(node, text);
    canvases.set(node, canvas);
    addView(node, "canvas", "k2_regions", canvas);
    canvas.showText(false);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
    const refresh = () => queueMicrotask(() => canvas.refresh());
    after(text, "callback", refresh);
    after(node, "onConfigure", refresh);
    // Links are written after this call.
    after(node, "onConnectionsChange", refresh);
    after(node, "onResize", () => canvas.fit());
    refresh();
  },

  afterConfigureGraph() {
    for (const node of app.graph?.nodes ?? []) canvases.get(node)?.refresh();
  },
});
