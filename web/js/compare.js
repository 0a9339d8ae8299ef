// Two pictures over each other: parted by a line that follows the pointer, or shown in turns.

// What the arrow keys move the line by, as a share of the picture.
const STEP = 0.05;
const SIDES = ["a", "b"];

export const STYLE = `
.k2-compare { position: relative; align-self: center; flex: none; background: #26262a;
  overflow: hidden; cursor: ew-resize; touch-action: none; user-select: none; }
.k2-compare.flip { cursor: pointer; }
.k2-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  pointer-events: none; }
.k2-compare .line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px;
  background: white; box-shadow: 0 0 3px black; pointer-events: none; }
.k2-compare .tag { position: absolute; top: 4px; max-width: 46%; padding: 2px 6px;
  box-sizing: border-box; border-radius: 4px; background: rgb(0 0 0 / 65%); color: white;
  pointer-events: none; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.k2-compare .tag.a { left: 4px; }
.k2-compare .tag.b { right: 4px; }
.k2-compare.flip .tag { max-width: 92%; }
`;

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export function element(tag, options = {}, ...children) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
}

// stage is what is seen, buttons choose how. onAspect is called where the pictures' shape is another.
export class Comparison {
  constructor(onAspect) {
    // Of each side: the address of its picture and its name, or null.
    this.sides = { a: null, b: null };
    this.isFlip = false;
    this.isFlipped = false;
    this.share = 0.5;
    this.aspect = 1;
    this.onAspect = onAspect;
    const image = () => element("img", { draggable: false, alt: "" });
    this.above = image();
    this.below = image();
    this.above.onload = () => this.measure();
    this.line = element("div", { className: "line" });
    this.tags = { a: element("div", { className: "tag a" }), b: element("div", { className: "tag b" }) };
    this.stage = element(
      "div", { className: "stage k2-compare", tabIndex: 0 },
      this.below, this.above, this.line, this.tags.a, this.tags.b,
    );
    this.stage.addEventListener("pointermove", (event) => this.point(event));
    this.stage.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      this.stage.focus({ preventScroll: true });
      if (this.isFlip) this.flip();
      else this.point(event);
    });
    this.stage.addEventListener("keydown", (event) => this.press(event));
    const button = (textContent, title, isFlip) =>
      element("button", { textContent, title, onclick: () => this.setFlip(isFlip) });
    this.wipe = button("Wipe", "Both pictures, parted by a line that follows the pointer", false);
    this.turn = button("Flip", "One picture at a time: click it, or press Space, for the other", true);
    this.buttons = [this.wipe, this.turn];
  }

  get isPair() {
    const { a, b } = this.sides;
    return Boolean(a && b && a.url !== b.url);
  }

  // isSecond: show b where one picture is shown at a time.
  set(a, b, isSecond) {
    this.sides = { a, b };
    if (isSecond !== undefined) this.isFlipped = isSecond;
    this.show();
  }

  setFlip(isFlip) {
    this.isFlip = isFlip;
    this.isFlipped = false;
    this.show();
  }

  flip() {
    this.isFlipped = !this.isFlipped;
    this.show();
  }

  point(event) {
    if (this.isFlip) return;
    const place = this.stage.getBoundingClientRect();
    this.move((event.clientX - place.left) / place.width);
  }

  move(share) {
    this.share = clamp(share, 0, 1);
    this.show();
  }

  press(event) {
    const flip = () => this.flip();
    const keys = this.isFlip
      ? { " ": flip, Enter: flip, ArrowLeft: flip, ArrowRight: flip }
      : {
          ArrowLeft: () => this.move(this.share - STEP), ArrowRight: () => this.move(this.share + STEP),
          Home: () => this.move(0), End: () => this.move(1),
        };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  show() {
    const { a, b } = this.sides;
    const { isFlip, isPair } = this;
    const isSecond = isFlip && this.isFlipped && isPair;
    this.load(this.above, isSecond ? b : a);
    this.load(this.below, isPair ? b : a);
    this.above.style.clipPath = `inset(0 ${isFlip || !isPair ? 0 : 100 * (1 - this.share)}% 0 0)`;
    this.line.style.left = `${100 * this.share}%`;
    this.line.hidden = isFlip || !isPair;
    this.stage.classList.toggle("flip", isFlip);
    for (const side of SIDES) {
      const [tag, name] = [this.tags[side], this.sides[side]?.name];
      tag.textContent = tag.title = name === undefined ? "" : `${side.toUpperCase()}  ${name}`;
      tag.hidden = name === undefined || (isFlip && isSecond !== (side === "b"));
    }
    this.describe(isSecond);
    this.wipe.setAttribute("aria-pressed", !isFlip);
    this.turn.setAttribute("aria-pressed", isFlip);
    for (const button of this.buttons) button.disabled = !isPair;
  }

  // For those who do not see it.
  describe(isSecond) {
    const texts = SIDES.map((side) => this.tags[side].textContent);
    const attributes = this.isFlip
      ? { role: "button", "aria-label": `Show the other picture; now ${texts[Number(isSecond)]}` }
      : {
          role: "slider", "aria-label": `Comparison: ${texts.filter(Boolean).join(", ")}`,
          "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * this.share),
        };
    for (const name of ["aria-valuemin", "aria-valuemax", "aria-valuenow"]) this.stage.removeAttribute(name);
    for (const [name, text] of Object.entries(attributes)) this.stage.setAttribute(name, text);
  }

  load(image, side) {
    const url = side?.url ?? "";
    image.hidden = !url;
    if (image.dataset.url === url) return;
    image.dataset.url = url;
    if (url) image.src = url;
    else image.removeAttribute("src");
  }

  measure() {
    const { naturalWidth, naturalHeight } = this.above;
    if (!naturalWidth || naturalWidth / naturalHeight === this.aspect) return;
    this.aspect = naturalWidth / naturalHeight;
    this.onAspect();
  }
}
