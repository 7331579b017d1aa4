// What is shown for a choice of word, layer and head: values of the patches, and attention mass on the image.

export const MEAN = "mean"; // the choice of no single head

/** Return the map of a run with a key, or its first map. */
export function mapOf(run, key) {
  return run.maps.find((map) => map.key === key) ?? run.maps[0];
}

/** Return the index of a layer on the axis of a run that may have fewer layers than another. */
export function layerIndex(run, layer) {
  return Math.min(layer, run.model.layers.length - 1);
}

function indices(chosen, count) {
  if (count === 1) return [0]; // relevancy has one value for all heads and words
  return chosen === MEAN ? Array.from({ length: count }, (_, i) => i) : [Math.min(chosen, count - 1)];
}

/** Return one value for each patch: of one head, or the mean over heads. */
export function patchValues(run, map, word, layer, head) {
  const [layers, heads, words, patches] = map.shape;
  const values = new Float64Array(patches);
  const chosen = indices(head, heads);
  const [offset, steps] = map.signed ? [128, 127] : [0, 255];
  for (const h of chosen) {
    const row = (Math.min(layer, layers - 1) * heads + h) * words + indices(word, words)[0];
    const step = map.scale[row] / steps / chosen.length;
    for (let p = 0; p < patches; p += 1) values[p] += (map.values[row * patches + p] - offset) * step;
  }
  return values;
}

/** Return the patches that are visual sinks in a layer. */
export function sinksOf(run, layer) {
  return run.sinks?.patches[layerIndex(run, layer)] ?? [];
}

/** Return the attention mass of a word on the image, in one layer. */
export function massOf(run, word, layer, head, leaveOutSinks) {
  const [layers, heads, words] = [run.model.layers.length, run.model.heads.length, run.words.length];
  const chosen = indices(head, heads);
  const row = Math.min(layer, layers - 1) * heads;
  let mass = 0;
  for (const h of chosen) mass += run.mass.values[(row + h) * words + word] / chosen.length;
  if (leaveOutSinks && sinksOf(run, layer).length) {
    // The sinks are subtracted: rounding to 8 bits would lose many small values of a sum over all other patches.
    const values = patchValues(run, mapOf(run, "attention"), word, layer, head);
    for (const patch of sinksOf(run, layer)) mass -= values[patch];
  }
  return mass;
}

/** Return the mass of a word on the image by layer. */
export function massByLayer(run, word, head, leaveOutSinks) {
  return run.model.layers.map((_, layer) => massOf(run, word, layer, head, leaveOutSinks));
}

/** Return the share of the image among the keys that a word can attend to, by layer: the mass of uniform attention. */
export function uniformByLayer(run, word) {
  return run.model.layers.map((_, layer) => run.mass.uniform[layer * run.words.length + word]);
}

/** Return the word that a logit lens reads at each patch after a layer. */
export function patchWords(map, layer) {
  const [depths, patches] = map.shape;
  const row = Math.min(layer + 1, depths - 1) * patches; // depth 0 is the embeddings, ahead of the first layer
  return Array.from({ length: patches }, (_, p) => map.vocabulary[map.values[row + p]]);
}

/** Return why the difference of two runs cannot be taken, or null. */
export function differenceProblem(first, second) {
  if (first.patches.row.length !== second.patches.row.length) return "the runs have different numbers of patches";
  if (first.words.length !== second.words.length) return "the runs have different numbers of words";
  if (first.model.layers.length !== second.model.layers.length) return "the models have different numbers of layers";
  return null;
}

/** Return a number with three significant digits. */
export function format(value) {
  if (!Number.isFinite(value)) return "not defined";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
