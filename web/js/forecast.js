// What a run will take, for the sampler to show before it: tokens, calls of the model, operations
// and memory. The formulas are those of krea2_model/memory/forecast.py and of memory_required in
// nodes/managed/model.py; tests/browser compares them. All from widgets: no call to the server.

// Text of a prompt that nobody has counted yet: the official length.
const TEXT = 512;
const PIXELS = 16;
const MEGAPIXEL = 1024 * 1024;
// Least room for a tile to move, as a share of it (krea2_model/features/tiles.py).
const ROOM = 1 / 8;
const GB = 1e9;

// Floating-point operations of one call of the transformer for one image.
export function callOperations(config, image, text) {
  const { width, inner, layers, keys, channels, time } = config;
  const tokens = image + text;
  const asking = (layers - 1) * tokens + image;
  let products = layers * tokens * 2 * width * keys;
  products += asking * (3 * width * width + 3 * width * inner);
  products += 2 * asking * tokens * width;
  products += 2 * image * channels * width;
  products += width * (time + 7 * width);
  return 2 * products;
}

// Bytes of activations and workspace of a call, as ComfyUI is asked for them.
export function callBytes(config, image, text, batch) {
  const states = 3 * config.width + 2 * config.inner;
  return batch * (image + text) * states * config.itemsize * 1.15 + 0.45 * 1024 ** 3;
}

// Width, height and images of the latent that a node makes, or null where its widgets do not say.
export function sizeOf(node, widgetOf, isLinked) {
  const value = (name) => (isLinked(node, name) ? undefined : widgetOf(node, name)?.value);
  let [width, height] = [value("width"), value("height")];
  const aspect = widgetOf(node, "aspect") && value("aspect");
  if (aspect && aspect !== "custom") {
    const [across, down] = aspect.split(":").map(Number);
    const unit = Math.sqrt((value("megapixels") * MEGAPIXEL) / (across * down));
    [width, height] = [across, down].map((side) => Math.max(1, Math.round((side * unit) / PIXELS)));
    [width, height] = [PIXELS * width, PIXELS * height];
  }
  const batch = value("batch") ?? value("batch_size") ?? 1;
  if (!(width > 0 && height > 0 && batch > 0)) return null;
  return { width, height, batch };
}

function short(operations) {
  const [size, unit] = [[1e15, "PFLOP"], [1e12, "TFLOP"], [1e9, "GFLOP"]].find(
    ([each]) => operations >= each,
  ) ?? [1e9, "GFLOP"];
  return `${Number((operations / size).toPrecision(3))} ${unit}`;
}

// To the even neighbour where both are as near, as Python does.
function rounded(number) {
  const up = Math.round(number);
  return number % 1 === 0.5 && up % 2 ? up - 1 : up;
}

// Length and number of the tiles along a side of so many tokens, as krea2_model/features/tiles.py has them.
function tilesAlong(length, tile, shared) {
  if (tile >= length) return [length, 1];
  return [tile, Math.ceil((length - tile) / (tile - shared)) + 1];
}

// Tokens of a tile and the number of tiles of an image; one of all where there are no tiles.
export function tilesOf(sides, tiles, side) {
  if (!tiles) return [sides[0] * sides[1], 1];
  const tile = (tiles.tile || side) / PIXELS;
  const shared = rounded(tiles.overlap * tile) + (tiles.move ? rounded(ROOM * tile) : 0);
  const [across, down] = sides.map((length) => tilesAlong(length, tile, shared));
  return [across[0] * down[0], across[1] * down[1]];
}

// The lines for a run. settings: steps and guidance. known: the loader's numbers. file: its choice.
// tiles: values of Krea 2 Tiled Sampling, or undefined. isBlended: between two prompts, which both
// have a call.
export function forecastLines(size, settings, known, file, tiles, isBlended) {
  const config = file?.startsWith("krea2-nano") ? known.nano : known.released;
  const sides = [size.width, size.height].map((side) => Math.ceil(side / PIXELS));
  const [image, count] = tilesOf(sides, tiles, config.side);
  const texts = (isBlended ? 2 : 1) + (settings.guidance > 0 ? 1 : 0);
  const calls = settings.steps * texts * count;
  const operations = size.batch * calls * callOperations(config, image, TEXT);
  const counted = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const lines = [
    `${counted(image, "token")}, ${counted(calls, "call")}, ${short(operations)}`,
  ];
  if (count > 1) lines.unshift(`${count} tiles, each of`);
  if (isBlended) lines.unshift("a frame between the two prompts:");
  const weights = known.files[file];
  if (weights === undefined) return lines;
  const needed = callBytes(config, image, TEXT, size.batch * (tiles?.batch || 1));
  const peak = weights + needed;
  const shown = (bytes) => (bytes / GB).toFixed(1);
  lines.push(`memory: ${shown(peak)} of ${shown(known.device)} GB`);
  if (needed > known.device) {
    lines.push("will not fit: make the image smaller");
    if (size.batch > 1) lines.push("or fewer images at once");
  } else if (peak > known.device) {
    lines.push("weights will move: slower; a smaller", "file (fp8, GGUF) would fit better");
  }
  return lines;
}
