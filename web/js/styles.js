// Krea 2 Styles: thumbnails to pick styles by, each with a weight. It reads and writes the text of
// the input "styles", a line each: "Ink wash: 0.7".

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { element } from "./compare.js";
import { addView, after, layOut, widgetOf } from "./dom_widget.js";

const NODE = "K2Styles";
const WIDTH = 460;
const MAX_WEIGHT = 2;
// Pixels of a thumbnail with its name, of the list at most, and of what stands around it.
const CARD = 108;
const TALLEST = 360;
const AROUND = 84;

const STYLE = `
.k2-styles { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%;
  box-sizing: border-box; padding: 4px; font: 13px sans-serif; color: #ddd; overflow: hidden; }
.k2-styles .cards { flex: 1; display: grid; gap: 6px; align-content: start; overflow-y: auto;
  grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }
.k2-styles .card { position: relative; display: flex; flex-direction: column; padding: 0; gap: 2px;
  font: inherit; font-size: 12px; color: inherit; background: #26262a; border: 2px solid transparent;
  border-radius: 5px; cursor: pointer; overflow: hidden; text-align: center; }
.k2-styles .card.chosen { border-color: #6ea8fe; background: #33405a; }
.k2-styles .card img, .k2-styles .card .blank { width: 100%; height: 72px; object-fit: cover;
  display: block; background: #3a3a40; }
.k2-styles .card .blank { line-height: 72px; font-size: 26px; color: #999; }
.k2-styles .card span { padding: 0 2px 3px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.k2-styles .row { display: flex; align-items: center; gap: 6px; flex: none; min-height: 26px; }
.k2-styles .row .name { flex: none; width: 120px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.k2-styles .row.missing .name { color: #ff8b80; }
.k2-styles input[type=range] { flex: 1; min-width: 0; }
.k2-styles .row .value { flex: none; width: 34px; text-align: right; }
.k2-styles input[type=search] { flex: 1; min-width: 0; height: 26px; box-sizing: border-box;
  padding: 0 6px; font: inherit; color: inherit; background: #1b1b1e; border: 1px solid #555;
  border-radius: 4px; }
.k2-styles button.small { flex: none; min-width: 26px; height: 26px; padding: 0 6px; font: inherit;
  color: inherit; background: #3a3a40; border: 1px solid #555; border-radius: 4px;
  cursor: pointer; }
.k2-styles .hint { color: #aaa; flex: none; }
`;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// [name, weight] of each line, or null for what the picker does not write, such as JSON.
function read(text) {
  const found = [];
  if (/^[[{]/.test(text.trim())) return null;
  for (const line of text.split("\n").map((each) => each.trim())) {
    if (!line) continue;
    const [, name, weight] = /^(.*?)(?:\s*:\s*([^:]*))?$/.exec(line);
    const value = weight === undefined ? 1 : Number(weight);
    if (!name || weight === "" || !Number.isFinite(value)) return null;
    found.push([name.trim(), value]);
  }
  return found;
}

const write = (chosen) => chosen.map(([name, weight]) => `${name}: ${weight}`).join("\n");

// Asked for once by all nodes, and again when the page refreshes its lists.
let asked;
export const library = () => (asked ??= api.fetchApi("/krea2_kit/styles").then((answer) => answer.json())
  .catch(() => ({ styles: [], problems: ["The server does not answer."] })));

function thumbnail(style) {
  if (style.thumbnail == null)
    return element("div", { className: "blank", textContent: style.name[0] });
  const query = new URLSearchParams({ name: style.name, at: style.thumbnail });
  const src = api.apiURL(`/krea2_kit/styles/thumbnail?${query}`);
  return element("img", { src, alt: "", draggable: false, loading: "lazy" });
}

class StylePicker {
  constructor(node, text) {
    this.node = node;
    this.text = text;
    this.found = { styles: [], problems: [] };
    this.cards = element("div", { className: "cards" });
    this.rows = element("div");
    this.hint = element("div", { className: "hint" });
    this.search = element("input", { type: "search", placeholder: "Find a style" });
    this.search.oninput = () => this.renderCards();
    this.asText = element("button", {
      className: "small", textContent: "Text", title: "Show the styles as text",
    });
    this.asText.onclick = () => this.showText(this.text.hidden);
    const again = element("button", {
      className: "small", textContent: "⟳", title: "Read the library again",
    });
    again.onclick = () => this.load(true);
    this.element = element(
      "div", { className: "k2-styles" },
      element("div", { className: "row" }, this.search, again, this.asText),
      this.cards, this.rows, this.hint,
    );
    // The page would move the node, zoom, or take keys for its own.
    for (const kind of ["pointerdown", "mousedown", "dblclick", "contextmenu", "keydown", "paste", "wheel"])
      this.element.addEventListener(kind, (event) => event.stopPropagation());
    this.element.addEventListener("pointerenter", () => this.refresh());
  }

  async load(anew = false) {
    if (anew) asked = undefined;
    this.found = await library();
    this.render();
  }

  get chosen() {
    return read(String(this.text.value ?? "")) ?? [];
  }

  get isLocked() {
    const linked = this.node.inputs?.find((each) => each.name === "styles")?.link != null;
    return linked || read(String(this.text.value ?? "")) === null;
  }

  // The text may have come from anywhere: another workflow, undo, a hand.
  refresh() {
    const state = JSON.stringify([this.text.value, this.isLocked]);
    if (state === this.state) return;
    this.render();
  }

  save(chosen) {
    const old = this.text.value;
    this.text.value = write(chosen);
    this.state = JSON.stringify([this.text.value, this.isLocked]);
    this.text.callback?.(this.text.value, app.canvas, this.node);
    this.node.onWidgetChanged?.(this.text.name, this.text.value, old, this.text);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  toggle(name) {
    if (this.isLocked) return;
    const chosen = this.chosen;
    const others = chosen.filter(([each]) => each !== name);
    this.save(others.length < chosen.length ? others : [...chosen, [name, 1]]);
    this.render();
  }

  weigh(name, weight) {
    if (this.isLocked) return;
    this.save(this.chosen.map(([each, old]) => [each, each === name ? weight : old]));
  }

  render() {
    this.state = JSON.stringify([this.text.value, this.isLocked]);
    this.renderCards();
    this.rows.replaceChildren(...this.chosen.map(([name, weight]) => this.row(name, weight)));
    const { problems } = this.found;
    const isOther = read(String(this.text.value ?? "")) === null;
    this.hint.textContent = isOther
      ? "The text has styles that are not lines of name: weight."
      : this.isLocked
        ? "The styles come from another node."
        : problems.length
          ? problems[0]
          : this.chosen.length ? "" : "Click a style; several are mixed by their weights.";
    this.hint.title = problems.join("\n");
    this.layOut();
  }

  renderCards() {
    const wanted = this.search.value.trim().toLowerCase();
    const names = new Set(this.chosen.map(([name]) => name));
    const cards = this.found.styles
      .filter((style) => `${style.name} ${style.summary}`.toLowerCase().includes(wanted))
      .map((style) => {
        const card = element(
          "button", { className: "card", title: `${style.name}\n${style.summary}` },
          thumbnail(style), element("span", { textContent: style.name }),
        );
        card.classList.toggle("chosen", names.has(style.name));
        card.disabled = this.isLocked;
        card.onclick = () => this.toggle(style.name);
        return card;
      });
    const top = this.cards.scrollTop;
    this.cards.replaceChildren(...cards);
    this.cards.scrollTop = top;
  }

  row(name, weight) {
    const value = element("span", { className: "value", textContent: weight });
    const slider = element("input", {
      type: "range", min: 0, max: MAX_WEIGHT, step: 0.05, disabled: this.isLocked,
      title: `Weight of ${name}`,
    });
    slider.value = clamp(weight, 0, MAX_WEIGHT);
    slider.oninput = () => {
      value.textContent = Number(slider.value);
      this.weigh(name, Number(slider.value));
    };
    const remove = element("button", {
      className: "small", textContent: "✕", title: `Leave ${name} out`, disabled: this.isLocked,
    });
    remove.onclick = () => this.toggle(name);
    const isThere = this.found.styles.some((style) => style.name === name);
    const made = element(
      "div", { className: "row" },
      element("span", { className: "name", textContent: name, title: name }), slider, value, remove,
    );
    made.classList.toggle("missing", this.found.styles.length > 0 && !isThere);
    return made;
  }

  get height() {
    const columns = Math.max(1, Math.floor(((this.node.size?.[0] ?? WIDTH) - 40) / 94));
    const lines = Math.ceil(Math.max(1, this.found.styles.length) / columns);
    return Math.min(TALLEST, lines * CARD) + 32 * this.chosen.length + AROUND;
  }

  // Size the node for the picker too.
  layOut() {
    layOut(this.node);
  }

  showText(isShown) {
    this.text.hidden = !isShown;
    if (this.text.options) this.text.options.hidden = !isShown;
    this.asText.textContent = isShown ? "Hide text" : "Text";
    this.layOut();
  }
}

const pickers = new WeakMap();

app.registerExtension({
  name: "krea2kit.styles",

  init() {
    document.head.append(element("style", { textContent: STYLE }));
  },

  nodeCreated(node) {
    const text = node?.comfyClass === NODE && widgetOf(node, "styles");
    if (!text) return;
    const picker = new StylePicker(node, text);
    pickers.set(node, picker);
    addView(node, "picker", "k2_styles", picker);
    picker.showText(false);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
    const refresh = () => queueMicrotask(() => picker.refresh());
    after(text, "callback", refresh);
    after(node, "onConfigure", refresh);
    // Links are written after this call.
    after(node, "onConnectionsChange", refresh);
    picker.load();
  },

  // The page's R key: a style may have been saved meanwhile.
  refreshComboInNodes() {
    asked = undefined;
    for (const node of app.graph?.nodes ?? []) pickers.get(node)?.load();
  },

  afterConfigureGraph() {
    for (const node of app.graph?.nodes ?? []) pickers.get(node)?.refresh();
  },
});
