// The state of the page: what is chosen. It is kept in the address, so that a view can be linked.

import { MEAN } from "./numbers.js";

export const START = {
  word: 0,
  word2: 0,
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

/** Return the state that an address names. What it leaves out, or names wrongly, is as in `start`. */
export function stateFromAddress(hash, runs, start) {
  const named = new URLSearchParams(hash.replace(/^#/, ""));
  const [first, second] = [runs[0], runs[1] ?? runs[0]];
  const read = (key, count) => whole(named.get(key) ?? "", count) ?? start[key];
  const layers = Math.max(...runs.map((run) => run.model.layers.length));
  const heads = Math.max(...runs.map((run) => run.model.heads.length));
  const map = first.maps.some(({ key }) => key === named.get("map")) ? named.get("map") : start.map;
  const compare = runs.length > 1 && COMPARISONS.includes(named.get("compare")) ? named.get("compare") : start.compare;
  const head = named.get("head") === MEAN ? MEAN : read("head", heads);
  const sinks = named.has("sinks") ? named.get("sinks") !== "0" : start.sinks;
  return {
    word: read("word", first.words.length),
    word2: named.has("word2") ? read("word2", second.words.length) : read("word", second.words.length),
    layer: read("layer", layers),
    head,
    map,
    compare,
    run: read("run", runs.length),
    sinks,
  };
}

/** Return the address of a state. */
export function addressOf(state, runs) {
  const named = { word: state.word, layer: state.layer, head: state.head, map: state.map };
  if (runs.length > 1) Object.assign(named, { word2: state.word2, compare: state.compare, run: state.run });
  if (!state.sinks) named.sinks = 0;
  return `#${new URLSearchParams(named)}`;
}

/** Return whether the page may change its address. Inside a notebook the frame has none of its own. */
export function hasAddress() {
  return window.location.protocol !== "about:";
}
