// The prompts of earlier runs, newest first, in the user's data on ComfyUI's server. Where that takes
// nothing they are kept until the page is left.

import { api } from "../../../scripts/api.js";

const FILE = "krea2kit/prompt_history.json";
// Of each kind: so many different ones, none longer than this.
const MOST = 100;
const LONGEST = 20_000;

export const KINDS = ["prompt", "negative"];

let kept = { prompt: [], negative: [] };

// Texts of both kinds; what is none is left out.
function checked(found) {
  const texts = (kind) => {
    const list = Array.isArray(found?.[kind]) ? found[kind] : [];
    return [...new Set(list.filter((each) => typeof each === "string" && each.trim()))].slice(0, MOST);
  };
  return Object.fromEntries(KINDS.map((kind) => [kind, texts(kind)]));
}

export async function load() {
  try {
    const answer = await api.getUserData(FILE);
    if (answer.status === 200) kept = checked(await answer.json());
    else if (answer.status === 404) kept = checked({});
  } catch {
    // No server, or no file of ours: what this page has kept so far.
  }
  return kept;
}

async function save() {
  try {
    await api.storeUserData(FILE, kept, { overwrite: true, stringify: true, throwOnError: false, full_info: false });
  } catch {
    // Kept in this page alone.
  }
}

// Changes are made one after the other, each on what another tab may have written.
let last = Promise.resolve();

function change(make) {
  last = last.then(async () => {
    await load();
    kept = checked(make(kept));
    await save();
    return kept;
  });
  return last;
}

// texts: pairs of kind and text, as they were run.
export function add(texts) {
  const fresh = texts.filter(([, text]) => text.trim() && text.length <= LONGEST);
  if (!fresh.length) return last;
  return change((found) => {
    const next = { ...found };
    for (const [kind, text] of fresh) next[kind] = [text, ...next[kind].filter((each) => each !== text)];
    return next;
  });
}

export function remove(kind, text) {
  return change((found) => ({ ...found, [kind]: found[kind].filter((each) => each !== text) }));
}

export function clear(kind) {
  return change((found) => ({ ...found, [kind]: [] }));
}
