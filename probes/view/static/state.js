// The state of the page: what is chosen. It is kept in the address, so that a view can be linked.

import { MEAN } from "./numbers.js";

/** Where a page starts. A word of null is the last one. `a` and `b` are the runs that are shown. */
export const START = {
  a: 0,
  b: 1,
  word: null,
  word2: null,
  layer: 0,
  head: MEAN,
  map: "attention",
  compare: "single",
  run: 0,
  sinks: true,
};
const COMPARISONS = ["single", "side", "difference"];

function whole(text, count) {
  const number = text === "" ? NaN : Number(text);
  return Number.isInteger(number) && number >= 0 && number < count ? number : null;
}

/** Return the index of a word that a run has, as close as possible to the one that is wanted. */
export function wordWithin(run, word) {
  const last = run.words.length - 1;
  return word === null ? last : Math.min(word, last);
}

/** Return the state that an address names. What it leaves out, or names wrongly, is as in `start`. */
export function stateFromAddress(hash, runs, start) {
  const named = new URLSearchParams(hash.replace(/^#/, ""));
  const read = (key, count) => whole(named.get(key) ?? "", count) ?? start[key];
  const [a, b] = [read("a", runs.length), Math.min(read("b", runs.length), runs.length - 1)];
  const layers = Math.max(...runs.map((run) => run.model.layers.length));
  const heads = Math.max(...runs.map((run) => run.model.heads.length));
  const map = runs[a].maps.some(({ key }) => key === named.get("map")) ? named.get("map") : start.map;
  const compare = runs.length > 1 && COMPARISONS.includes(named.get("compare")) ? named.get("compare") : start.compare;
  const head = named.get("head") === MEAN ? MEAN : read("head", heads);
  const sinks = named.has("sinks") ? named.get("sinks") !== "0" : start.sinks;
  const word = wordWithin(runs[a], read("word", runs[a].words.length));
  const word2 = named.has("word2") ? read("word2", runs[b].words.length) : named.has("word") ? word : start.word2;
  return {
    a,
    b,
    word,
    word2: wordWithin(runs[b], word2),
    layer: read("layer", layers),
    head,
    map,
    compare,
    run: read("run", Math.min(runs.length, 2)),
    sinks,
  };
}

/** Return the address of a state. */
export function addressOf(state, runs) {
  const named = { word: state.word, layer: state.layer, head: state.head, map: state.map };
  if (runs.length > 1) Object.assign(named, { word2: state.word2, compare: state.compare, run: state.run });
  if (runs.length > 2) Object.assign(named, { a: state.a, b: state.b });
  if (!state.sinks) named.sinks = 0;
  return `#${new URLSearchParams(named)}`;
}

/** Return whether the page may change its address. Inside a notebook the frame has none of its own. */
export function hasAddress() {
  return window.location.protocol !== "about:";
}
