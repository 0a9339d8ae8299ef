// Krea 2 Grid: the pictures on the node as they are made, and two of them compared. What there is the
// server says (nodes/grid_files.py).

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Comparison, STYLE as COMPARISON, element } from "./compare.js";
import { addView, after, layOut, widgetOf } from "./dom_widget.js";
import { library } from "./styles.js";

const NODE = "K2Grid";
const EVENT = "krea2kit.grid";
const KEY = "k2_grid";
const LETTERS = ["x", "y", "z"];
// Pixels: the node's width at first, of the stage and of the table at most, of a cell of the table
// with its gap, of a line of text, and of the bar.
const WIDTH = 460;
const TALLEST = 400;
const TABLE = 330;
const CELL = 80;
const LINE = 20;
const BAR = 34;

const STYLE = `
.k2-grid { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%;
  box-sizing: border-box; padding: 4px; font: 13px sans-serif; color: #ddd; overflow: hidden; }
.k2-grid [hidden] { display: none !important; }
.k2-grid .bar { display: flex; align-items: center; gap: 4px; height: 26px; flex: none; }
.k2-grid button, .k2-grid select, .k2-grid a { flex: none; height: 26px; box-sizing: border-box;
  padding: 0 8px; font: inherit; line-height: 24px; color: inherit; background: #3a3a40;
  border: 1px solid #555; border-radius: 4px; cursor: pointer; text-decoration: none; }
.k2-grid select { min-width: 0; flex: 0 1 auto; }
.k2-grid button[aria-pressed=true] { background: #4a6fa5; }
.k2-grid button:disabled { opacity: 0.35; cursor: default; }
.k2-grid :focus-visible { outline: 2px solid white; outline-offset: 1px; }
.k2-grid .hint { flex: 1; min-width: 0; color: #aaa; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.k2-grid .tables { overflow: auto; flex: 1 1 auto; min-height: 0; }
.k2-grid .title { height: ${LINE}px; line-height: ${LINE}px; color: #aaa; }
.k2-grid .table { display: grid; gap: 4px; justify-content: start; align-items: center; }
.k2-grid .label { overflow: hidden; color: #aaa; text-overflow: ellipsis; }
.k2-grid .label.column { height: ${LINE - 4}px; line-height: ${LINE - 4}px; white-space: nowrap;
  text-align: center; }
.k2-grid .label.row { max-height: ${CELL - 4}px; overflow-wrap: anywhere; }
.k2-grid .cell { position: relative; width: ${CELL - 4}px; height: ${CELL - 4}px; padding: 0;
  overflow: hidden; background: #26262a; }
.k2-grid .cell img { width: 100%; height: 100%; object-fit: contain; display: block; }
.k2-grid .cell.chosen { border: 2px solid white; }
.k2-grid .cell.current { border-color: #4a90e2; }
.k2-grid .cell b { position: absolute; left: 2px; top: 2px; padding: 0 4px; line-height: 16px;
  border-radius: 3px; background: rgb(0 0 0 / 65%); color: white; }
`;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const keyOf = (place) => place.join(",");
const addressOf = (file) => api.apiURL(`/view?${new URLSearchParams(file)}`);

// A node by its id in a run, which names the nodes of subgraphs around it: 3:5.
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  const parts = String(id).split(":");
  for (const part of parts.slice(0, -1)) graph = graph?.getNodeById?.(Number(part))?.subgraph;
  return graph?.getNodeById?.(Number(parts.at(-1)));
}

class GridView {
  constructor(node) {
    this.node = node;
    this.state = null;
    // Places of the two pictures, by their keys; next is which of them a click replaces.
    this.chosen = { a: null, b: null };
    this.next = "a";
    this.compare = new Comparison(() => this.layOut());
    this.element = this.build();
    // The page would move the node, or take keys for its own.
    for (const kind of ["pointerdown", "mousedown", "dblclick", "contextmenu", "keydown", "paste"])
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    this.element.addEventListener("pointerenter", () => this.offerValues());
    this.render();
  }

  build() {
    this.swap = element("button", { textContent: "Swap", title: "Exchange A and B" });
    this.swap.onclick = () => {
      const { a, b } = this.chosen;
      this.chosen = { a: b, b: a };
      this.show();
    };
    this.sheet = element("a", { textContent: "Sheet", target: "_blank", title: "Open the sheet of all pictures" });
    this.hint = element("span", { className: "hint" });
    this.offer = element("select", { title: "Names to add to the values of an axis" });
    this.offer.onchange = () => this.addValue();
    this.bar = element(
      "div", { className: "bar" },
      ...this.compare.buttons, this.swap, this.sheet, this.hint, this.offer,
    );
    this.tables = element("div", { className: "tables" });
    this.tables.addEventListener("keydown", (event) => this.walk(event));
    this.tables.addEventListener("wheel", (event) => {
      const { scrollHeight, clientHeight, scrollWidth, clientWidth } = this.tables;
      if (scrollHeight > clientHeight || scrollWidth > clientWidth) event.stopPropagation();
    });
    return element("div", { className: "k2-grid" }, this.compare.stage, this.bar, this.tables);
  }

  get labels() {
    return LETTERS.map((letter) => this.state?.labels?.[letter] ?? [""]);
  }

  get files() {
    return new Map((this.state?.cells ?? []).map((cell) => [keyOf(cell.place), cell.file]));
  }

  // The labels of a place, those of each axis; beside another place, those that differ.
  nameOf(key, other) {
    const others = other === key ? undefined : other?.split(",");
    const labels = key.split(",").map((index, axis) => (others?.[axis] === index ? "" : this.labels[axis][index]));
    return labels.filter(Boolean).join(", ");
  }

  update(state) {
    if (JSON.stringify(state) === JSON.stringify(this.state)) return;
    const isOther = JSON.stringify(state.labels) !== JSON.stringify(this.state?.labels);
    this.state = state;
    this.dropPreview();
    const files = this.files;
    if (isOther) this.chosen = { a: null, b: null };
    // The first two, until others are chosen; the places stay for the next run.
    for (const key of files.keys()) {
      const isTaken = Object.values(this.chosen).includes(key);
      const side = this.chosen.a === null ? "a" : this.chosen.b === null ? "b" : null;
      if (side && !isTaken) this.chosen[side] = key;
    }
    this.render();
  }

  // A picture of a step, at the cell that is painted.
  preview(blob) {
    const cell = this.state?.current && this.cellAt(keyOf(this.state.current));
    if (!cell) return;
    this.dropPreview();
    this.previewed = URL.createObjectURL(blob);
    cell.querySelector("img")?.remove();
    cell.prepend(element("img", { src: this.previewed, alt: "" }));
  }

  dropPreview() {
    if (this.previewed) URL.revokeObjectURL(this.previewed);
    this.previewed = undefined;
  }

  cellAt(key) {
    return this.tables.querySelector(`[data-key="${key}"]`);
  }

  choose(key, side) {
    if (!this.files.has(key)) return;
    side ??= this.next;
    this.chosen[side] = key;
    this.next = side === "a" ? "b" : "a";
    this.show(side === "b");
  }

  // Arrow keys go from cell to cell; a and b put a cell on a side.
  walk(event) {
    const key = document.activeElement?.dataset?.key;
    if (!key) return;
    const side = event.key.toLowerCase();
    if (side === "a" || side === "b") return this.choose(key, side);
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const place = key.split(",").map(Number);
    const [, rows, blocks] = this.labels.map((labels) => labels.length);
    if (by[0] === 1) {
      // Down from the last row into the next block.
      const row = clamp(place[1] + rows * place[2] + by[1], 0, rows * blocks - 1);
      [place[1], place[2]] = [row % rows, Math.floor(row / rows)];
    } else place[0] = clamp(place[0] + by[1], 0, this.labels[0].length - 1);
    this.cellAt(keyOf(place))?.focus();
  }

  render() {
    const [columns, rows, blocks] = this.labels;
    const files = this.files;
    const hasRows = rows.some(Boolean);
    const cell = (place) => {
      const key = keyOf(place);
      const file = files.get(key);
      const made = element("button", { className: "cell", title: this.nameOf(key) });
      made.dataset.key = key;
      made.setAttribute("aria-label", this.nameOf(key));
      made.classList.toggle("current", this.state?.current != null && keyOf(this.state.current) === key);
      if (file) made.append(element("img", { src: addressOf(file), loading: "lazy", draggable: false, alt: "" }));
      made.onclick = (event) => this.choose(key, event.shiftKey ? "b" : undefined);
      return made;
    };
    const label = (text, kind) => element("div", { className: `label ${kind}`, textContent: text, title: text });
    const table = (block) => {
      const parts = [...(hasRows ? [element("div")] : []), ...columns.map((text) => label(text, "column"))];
      rows.forEach((text, row) => {
        if (hasRows) parts.push(label(text, "row"));
        columns.forEach((_, column) => parts.push(cell([column, row, block])));
      });
      const made = element("div", { className: "table" }, ...parts);
      made.style.gridTemplateColumns = `${hasRows ? "minmax(0, 110px) " : ""}repeat(${columns.length}, ${CELL - 4}px)`;
      return made;
    };
    // What has the focus is drawn anew.
    const focused = document.activeElement?.dataset?.key;
    const hasFocus = this.tables.contains(document.activeElement);
    const shown = this.state
      ? blocks.flatMap((text, block) => [...(text ? [element("div", { className: "title", textContent: text })] : []), table(block)])
      : [];
    this.tables.replaceChildren(...shown);
    if (hasFocus) this.cellAt(focused)?.focus({ preventScroll: true });
    this.show();
    this.layOut();
  }

  // The compared pictures and the marks of their cells. isSecond: see Comparison.
  show(isSecond) {
    const files = this.files;
    const side = (key, other) =>
      files.has(key) ? { url: addressOf(files.get(key)), name: this.nameOf(key, files.has(other) ? other : undefined) } : null;
    const { a, b } = this.chosen;
    this.compare.set(side(a, b), side(b, a), isSecond);
    for (const part of [this.compare.stage, this.tables, this.swap, ...this.compare.buttons]) part.hidden = !this.state;
    this.swap.disabled = !this.compare.isPair;
    for (const cell of this.tables.querySelectorAll(".cell")) {
      const sides = ["a", "b"].filter((each) => this.chosen[each] === cell.dataset.key);
      cell.classList.toggle("chosen", sides.length > 0);
      cell.querySelector("b")?.remove();
      if (sides.length) cell.append(element("b", { textContent: sides.join(" ").toUpperCase() }));
    }
    this.sheet.hidden = !this.state?.sheet;
    if (this.state?.sheet) this.sheet.href = addressOf(this.state.sheet);
    this.hint.textContent = this.hint.title = this.hintText();
  }

  hintText() {
    if (!this.state) return "The pictures of a run are compared here.";
    const made = this.state.cells.length;
    if (this.state.note) return this.state.note;
    return made < this.state.count ? `${made} of ${this.state.count} pictures` : "Click two pictures.";
  }

  // Names for axes whose values are files, samplers or styles, which nobody knows by heart.
  async offerValues() {
    const loader = globalThis.LiteGraph?.registered_node_types?.K2ModelLoader?.nodeData?.input?.required?.file;
    const options = (name) => widgetOf(this.node, name)?.options?.values ?? [];
    const isStyle = LETTERS.some((letter) => widgetOf(this.node, `${letter}_axis`)?.value === "style");
    const styles = isStyle ? (await library()).styles.map((style) => style.name) : [];
    const names = {
      style: ["none", ...styles],
      lora: options("lora"),
      sampler: options("sampler"),
      checkpoint: Array.isArray(loader?.[0]) ? loader[0] : (loader?.[1]?.options ?? []),
    };
    const found = LETTERS.flatMap((letter) => {
      const kind = widgetOf(this.node, `${letter}_axis`)?.value;
      return (names[kind] ?? []).map((name) => ({ letter, kind, name }));
    });
    const state = JSON.stringify(found);
    if (state === this.offered) return;
    this.offered = state;
    this.offer.hidden = !found.length;
    this.offer.replaceChildren(
      element("option", { value: "", textContent: "Add a value" }),
      ...found.map(({ letter, kind, name }, index) =>
        element("option", { value: String(index), textContent: `${letter} ${kind}: ${name}` })),
    );
    this.found = found;
  }

  addValue() {
    const chosen = this.found?.[Number(this.offer.value)];
    if (this.offer.value === "" || !chosen) return;
    this.offer.value = "";
    const widget = widgetOf(this.node, `${chosen.letter}_values`);
    const lines = String(widget.value ?? "").split("\n").filter((line) => line.trim());
    const old = widget.value;
    widget.value = [...lines, chosen.name].join("\n");
    widget.callback?.(widget.value, app.canvas, this.node);
    this.node.onWidgetChanged?.(widget.name, widget.value, old, widget);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  get stageSize() {
    const room = Math.max(160, (this.node.size?.[0] ?? WIDTH) - 40);
    const width = Math.min(room, TALLEST * this.compare.aspect);
    return [width, width / this.compare.aspect];
  }

  get height() {
    if (!this.state) return BAR + 20;
    const [, rows, blocks] = this.labels;
    const titles = blocks.filter(Boolean).length;
    const table = blocks.length * (LINE + rows.length * CELL) + titles * LINE + 10;
    return this.stageSize[1] + BAR + Math.min(TABLE, table) + 20;
  }

  fit() {
    const [width, height] = this.stageSize;
    Object.assign(this.compare.stage.style, { width: `${width}px`, height: `${height}px` });
  }

  // Size the node for the pictures too.
  layOut() {
    this.fit();
    layOut(this.node);
  }
}

const views = new WeakMap();

// Values of an axis that is off take no room.
function hideUnused(node) {
  let changed = false;
  for (const letter of LETTERS) {
    const [axis, values] = [widgetOf(node, `${letter}_axis`), widgetOf(node, `${letter}_values`)];
    if (!axis || !values) continue;
    const isLinked = [axis, values].some((each) => node.inputs?.find((input) => input.name === each.name)?.link != null);
    const hidden = axis.value === "none" && !isLinked;
    if (Boolean(values.hidden) === hidden) continue;
    values.hidden = hidden;
    if (values.options) values.options.hidden = hidden;
    changed = true;
  }
  if (changed) views.get(node)?.layOut();
}

function update(node, output) {
  const state = output?.[KEY]?.[0];
  if (state) views.get(node)?.update(state);
}

// Before the page's own listener, which would add the picture below the node's widgets.
api.addEventListener("b_preview_with_metadata", (event) => {
  const view = views.get(nodeOf(event.detail.displayNodeId ?? event.detail.nodeId));
  if (!view) return;
  event.stopImmediatePropagation();
  view.preview(event.detail.blob);
});

app.registerExtension({
  name: "krea2kit.grid",

  init() {
    document.head.append(element("style", { textContent: COMPARISON + STYLE }));
    api.addEventListener(EVENT, ({ detail }) => views.get(nodeOf(detail.node))?.update(detail.state));
  },

  nodeCreated(node) {
    if (node?.comfyClass !== NODE) return;
    const view = new GridView(node);
    views.set(node, view);
    addView(node, "pictures", "k2_grid", view);
    // The pictures are shown above; the page would add the sheet and the steps below.
    node.hideOutputImages = true;
    node.onDrawBackground = () => {};
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
    const refresh = () =>
      queueMicrotask(() => {
        hideUnused(node);
        view.offerValues();
        view.fit();
      });
    for (const letter of LETTERS) after(widgetOf(node, `${letter}_axis`) ?? {}, "callback", refresh);
    after(node, "onConfigure", refresh);
    after(node, "onConnectionsChange", refresh);
    after(node, "onResize", () => view.fit());
    after(node, "onExecuted", (output) => update(node, output));
    after(node, "onRemoved", () => view.dropPreview());
    refresh();
  },

  // Outputs that come back without a run: another tab's, or a workflow opened again.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) update(app.rootGraph?.getNodeById?.(id), output);
  },
});
