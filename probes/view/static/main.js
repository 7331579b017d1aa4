// The page: reads the data, keeps the state, and draws whenever it changes.

import { decodeRun } from "./decode.js";
import { saveCsv, savePng } from "./export.js";
import { HeatCanvas, STRIP, WIDEST, canvasParts } from "./heat_map.js";
import { LayerHeadMap } from "./layer_heads.js";
import { drawLines } from "./mass_line.js";
import {
  MEAN,
  differenceProblem,
  format,
  layerIndex,
  mapOf,
  massByLayer,
  massOf,
  patchValues,
  patchWords,
  sinksOf,
  uniformByLayer,
} from "./numbers.js";
import { colourScale, gradient, scaleStops } from "./palette.js";
import { START, addressOf, hasAddress, stateFromAddress, wordWithin } from "./state.js";
import { buildWords, markWords } from "./words.js";

const get = (id) => document.getElementById(id);

class View {
  constructor(all) {
    this.all = all;
    const middle = Math.floor((all[0].model.layers.length - 1) / 2);
    const start = { ...START, layer: middle, map: all[0].maps[0].key, compare: all.length === 2 ? "side" : "single" };
    this.state = stateFromAddress(hasAddress() ? window.location.hash : "", all, start);
    this.overlay = Number(get("overlay").value) / 100;
    this.heads = new LayerHeadMap(get("layer-heads"), (cell) => this.choose(cell));
    all.forEach((run, i) => ["run-a", "run-b"].forEach((id) => get(id).add(new Option(run.name, i))));
    get("comparison").hidden = all.length < 2;
    this.listen();
    this.selectRuns();
    this.choose({});
  }

  /** Show the runs that the state names: their words, their maps, and what is missing. */
  selectRuns() {
    const { a, b } = this.state;
    this.runs = this.all.length > 1 ? [this.all[a], this.all[b]] : [this.all[0]];
    this.problem = this.runs.length > 1 ? differenceProblem(...this.runs) : "there is one run";
    const texts = this.runs.map((run) => run.words.map((word) => word.text).join("\n"));
    this.sameWords = texts[0] === texts[1];
    this.heatKey = null;
    this.runs.forEach((run, i) => {
      buildWords(get(i === 0 ? "words" : "words2"), run, run.name, (word) => this.chooseWord(i, word));
      const name = get(i === 0 ? "run-name" : "run-name2");
      name.textContent = this.runs.length > 1 ? `${"AB"[i]}: ${run.name}` : run.name;
    });
    get("map-select").replaceChildren(...this.runs[0].maps.map((map) => new Option(map.label, map.key)));
    get("map-choice").hidden = this.runs[0].maps.length < 2;
    const sinks = this.runs.map((run) => run.sinks).filter(Boolean);
    get("sinks-choice").hidden = !sinks.some(({ patches }) => patches.some((layer) => layer.length));
    get("sinks-rule").textContent = sinks.length ? sinks[0].rule : "";
    get("boxes-note").textContent = this.runs.map((run) => run.boxes_note).filter(Boolean)[0] ?? "";
    get("compare").querySelector("option[value=difference]").disabled = Boolean(this.problem);
  }

  listen() {
    const number = (event) => Number(event.target.value);
    get("map-select").addEventListener("change", (event) => this.choose({ map: event.target.value }));
    get("compare").addEventListener("change", (event) => this.choose({ compare: event.target.value }));
    get("run-a").addEventListener("change", (event) => this.choose({ a: number(event) }));
    get("run-b").addEventListener("change", (event) => this.choose({ b: number(event) }));
    get("run").addEventListener("change", (event) => this.choose({ run: number(event) }));
    get("sinks-switch").addEventListener("change", (event) => this.choose({ sinks: event.target.checked }));
    get("layer").addEventListener("input", (event) => this.choose({ layer: number(event) }));
    get("head").addEventListener("change", (event) =>
      this.choose({ head: event.target.value === MEAN ? MEAN : number(event) }),
    );
    get("overlay").addEventListener("input", (event) => {
      this.overlay = number(event) / 100;
      this.drawHeat();
    });
    get("export-csv").addEventListener("click", () => saveCsv(this.shown(), this.fileName()));
    get("export-png").addEventListener("click", () => this.exportPng());
    document.addEventListener("keydown", (event) => this.onKey(event));
    if (hasAddress()) {
      window.addEventListener("hashchange", () =>
        this.choose(stateFromAddress(window.location.hash, this.all, this.state)),
      );
    }
  }

  chooseWord(run, word) {
    if (this.sameWords) this.choose({ word, word2: word });
    else this.choose(run === 0 ? { word, run: 0 } : { word2: word, run: 1 });
  }

  /** Return the number of the run whose layers, heads and masses are shown beside the image. */
  get current() {
    return this.runs.length > 1 && this.state.compare !== "single" ? this.state.run : 0;
  }

  wordOf(run) {
    return run === 0 ? this.state.word : this.state.word2;
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
    const run = this.runs[this.current];
    const step = (value, by, count) => Math.min(Math.max(value + by, 0), count - 1);
    const { layer, head } = this.state;
    const heads = run.model.heads.length;
    const keys = {
      ArrowLeft: () => this.stepWord(-1),
      ArrowRight: () => this.stepWord(1),
      ArrowUp: () => this.choose({ layer: step(layer, -1, run.model.layers.length) }),
      ArrowDown: () => this.choose({ layer: step(layer, 1, run.model.layers.length) }),
      PageUp: () => this.choose({ head: head === MEAN ? heads - 1 : step(head, -1, heads) }),
      PageDown: () => this.choose({ head: head === MEAN ? 0 : step(head, 1, heads) }),
      m: () => this.choose({ head: MEAN }),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  stepWord(by) {
    const run = this.current;
    const word = Math.min(Math.max(this.wordOf(run) + by, 0), this.runs[run].words.length - 1);
    this.chooseWord(run, word);
    get(run === 0 ? "words" : "words2")
      .querySelector(`[data-word="${word}"]`)
      ?.focus();
  }

  choose(change) {
    const { a, b } = this.state;
    Object.assign(this.state, change);
    if (this.state.a !== a || this.state.b !== b) this.selectRuns();
    const { state } = this;
    state.word = wordWithin(this.runs[0], state.word);
    state.word2 = wordWithin(this.runs[1] ?? this.runs[0], state.word2);
    if (!this.runs[0].maps.some(({ key }) => key === state.map)) state.map = this.runs[0].maps[0].key;
    if (state.compare === "difference" && this.problem) state.compare = "side";
    if (hasAddress()) window.history.replaceState(null, "", addressOf(state, this.all));
    this.draw();
  }

  /** Return what the heat maps show: the values of one run, of two, or their difference. */
  shown() {
    const { layer, head, map: key, compare } = this.state;
    const one = (i) => {
      const run = this.runs[i];
      const [map, word, at] = [mapOf(run, key), this.wordOf(i), layerIndex(run, layer)];
      const words = map.kind === "words" ? patchWords(map, at) : null;
      const values = words ?? patchValues(run, map, word, at, head);
      // A word that cannot attend to the image, or from which an intervention hides it, has no attention to show.
      if (map.key === "attention" && !Number.isFinite(massOf(run, word, at, head, false))) values.fill(NaN);
      return { run, word, layer: at, head, map: map.label, unit: map.unit, signed: map.signed, values, words };
    };
    if (this.runs.length < 2 || compare === "single") return [one(0)];
    const both = [one(0), one(1)];
    if (compare === "side" || both[0].words) return both;
    const values = both[1].values.map((value, p) => value - both[0].values[p]);
    return [{ ...both[1], map: `${both[1].map}, B minus A`, signed: true, values }];
  }

  draw() {
    const { layer, head, map, compare, sinks } = this.state;
    const run = this.runs[this.current];
    const view = get("view");
    Object.assign(view.dataset, { word: this.wordOf(this.current), layer, head, map, run: this.current, compare });
    get("map-select").value = map;
    get("compare").value = compare;
    get("run").value = this.current;
    const single = this.runs.length < 2 || compare === "single";
    for (const id of ["run2", "run-choice"]) get(id).hidden = single;
    get("compare-note").textContent = this.problem && !single ? `No difference: ${this.problem}.` : "";
    get("run-a-choice").hidden = this.all.length < 3;
    get("run-b-choice").hidden = this.all.length < 3 || single;
    get("run-a").value = this.state.a;
    get("run-b").value = this.state.b;
    get("sinks-switch").checked = sinks;
    get("layer").max = run.model.layers.length - 1;
    get("layer").value = layer;
    get("layer-name").textContent = `${run.model.layers[layerIndex(run, layer)]} (of ${run.model.layers.length})`;
    this.fillHeads(run, head);
    this.drawHeat();
    this.drawLayers(run);
    this.runs.forEach((one, i) => {
      const masses = one.words.map((_, word) => massOf(one, word, layer, head, !sinks));
      markWords(get(i === 0 ? "words" : "words2"), this.wordOf(i), masses);
    });
    this.announce(run);
  }

  fillHeads(run, head) {
    const select = get("head");
    if (select.options.length !== run.model.heads.length + 1) {
      select.replaceChildren(new Option("mean of heads", MEAN));
      run.model.heads.forEach((number, i) => select.add(new Option(`head ${number}`, i)));
    }
    select.value = head;
  }

  drawHeat() {
    const shown = this.shown();
    const sinks = shown.map(({ run, layer }) => sinksOf(run, layer));
    const hidden = sinks.map((patches) => new Set(this.state.sinks ? [] : patches));
    const numbers = shown.flatMap(({ values, words }, i) =>
      words ? [] : [...values].filter((_, p) => !hidden[i].has(p)),
    );
    const largest = numbers.reduce(
      (most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most),
      0,
    );
    const signed = Boolean(shown[0].signed);
    this.scale = { ...colourScale(largest, signed), signed, label: `${shown[0].map}, ${shown[0].unit ?? "word"}` };
    const key = `${this.runs.indexOf(shown[0].run)}/${shown.length}`;
    if (this.heatKey !== key) {
      this.heatKey = key;
      get("heat").replaceChildren();
      this.canvases = shown.map(({ run }) => {
        const group = document.createElement("div");
        group.className = "run-heat";
        const parts = canvasParts(run);
        const canvases = parts.map(
          (part) => new HeatCanvas(run, part, parts.length === 1 ? WIDEST / shown.length : STRIP),
        );
        for (const canvas of canvases) {
          canvas.canvas.addEventListener("pointermove", (event) => this.hover(canvas, event));
          canvas.canvas.addEventListener("pointerleave", () => (get("hover").textContent = "\u00a0"));
          canvas.ready.then(() => this.drawHeat());
        }
        if (shown.length > 1) {
          const heading = document.createElement("h3");
          heading.textContent = `${"AB"[this.runs.indexOf(run)]}: ${run.name}`;
          group.append(heading);
        }
        group.append(...canvases.map((canvas) => canvas.figure));
        get("heat").append(group);
        return canvases;
      });
    }
    this.canvases.forEach((canvases, i) => {
      for (const canvas of canvases)
        canvas.draw(shown[i].values, this.scale, hidden[i], sinks[i], this.overlay, shown[i].words);
    });
    const isWords = Boolean(shown[0].words);
    get("scale").hidden = isWords;
    get("scale-bar").style.background = gradient(signed);
    get("scale-low").textContent = format(this.scale.low);
    get("scale-high").textContent = format(this.scale.high);
    get("scale-label").textContent = this.scale.label;
  }

  hover(canvas, event) {
    const patch = canvas.patchAt(event);
    if (patch === null) return;
    const entry = this.shown().find(({ run }) => run === canvas.run);
    const { row, column, box, position } = canvas.run.patches;
    const place = box[patch] ? `, pixels ${box[patch].map((side) => Math.round(side)).join(", ")}` : "";
    const sink = sinksOf(canvas.run, entry.layer).includes(patch) ? ", visual sink" : "";
    const value = entry.words ? `“${entry.words[patch]}”` : format(entry.values[patch]);
    get("hover").textContent =
      `row ${row[patch] + 1}, column ${column[patch] + 1} (position ${position[patch]}${place}${sink}): ${value}`;
  }

  drawLayers(run) {
    const { layer, head, sinks } = this.state;
    const word = this.wordOf(this.current);
    const at = layerIndex(run, layer);
    const choose = (chosen) => this.choose({ layer: chosen });
    const scale = this.heads.draw(run, word, at, head, !sinks);
    get("layer-heads-scale").textContent = `${format(0)} to ${format(scale.high)}`;
    get("layer-heads-bar").style.background = gradient(false);
    const curves = [{ name: "uniform attention", values: uniformByLayer(run, word), kind: "uniform" }];
    const other = this.runs[1 - this.current];
    const comparable =
      other && this.state.compare !== "single" && other.model.layers.length === run.model.layers.length;
    if (comparable) {
      curves.push({
        name: "BA"[this.current],
        values: massByLayer(other, this.wordOf(1 - this.current), head, !sinks),
        kind: "second",
      });
    }
    get("mass-second").hidden = !comparable;
    get("mass-second-name").textContent = "BA"[this.current];
    curves.push({ name: "this word", values: massByLayer(run, word, head, !sinks), kind: "main" });
    drawLines(get("mass-line"), run.model.layers, curves, at, "layer", choose);
    get("removal").hidden = !run.removal;
    if (run.removal) {
      const curve = [{ name: run.removal.label, values: run.removal.values, kind: "main" }];
      get("removal-label").textContent = run.removal.label;
      drawLines(
        get("removal-line"),
        run.removal.layers,
        curve,
        Math.min(at, run.removal.layers.length - 1),
        "first layer without the image",
        () => {},
      );
    }
  }

  announce(run) {
    const { layer, head, sinks } = this.state;
    const word = this.wordOf(this.current);
    const at = layerIndex(run, layer);
    const who = head === MEAN ? "mean of heads" : `head ${run.model.heads[Math.min(head, run.model.heads.length - 1)]}`;
    const mass = format(massOf(run, word, at, head, !sinks));
    const without = !sinks && run.sinks ? " without sinks" : "";
    get("summary").textContent =
      `“${run.words[word].text.trim()}” puts ${mass} of its attention on the image${without} (layer ${run.model.layers[at]}, ${who}; ` +
      `uniform attention: ${format(uniformByLayer(run, word)[at])}).`;
  }

  fileName() {
    const { layer, head, map } = this.state;
    return `${map}-word${this.wordOf(this.current)}-layer${layer}-head${head}`;
  }

  exportPng() {
    const canvases = this.canvases.flat().map(({ canvas }) => canvas);
    savePng(canvases, this.scale, get("summary").textContent, scaleStops(this.scale.signed), this.fileName());
  }
}

async function start() {
  const data = JSON.parse(get("view-data").textContent);
  const view = new View(await Promise.all(data.runs.map(decodeRun)));
  get("loading").remove();
  get("view").dataset.ready = "true";
  window.attentionView = {
    state: view.state,
    values: () => view.shown().map(({ values }) => [...values]),
    mass: (word, layer, head) => massOf(view.runs[view.current], word, layer, head, !view.state.sinks),
  };
}

start();
