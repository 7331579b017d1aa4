// The map of layers and heads: attention mass of the chosen word on the image, a cell to click for each head.

import { MEAN, massOf } from "./numbers.js";
import { colourScale } from "./palette.js";

const LEFT = 34;
const BOTTOM = 30;
const TOP = 4;

export class LayerHeadMap {
  constructor(element, choose) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    element.append(this.canvas);
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) choose(cell);
    });
  }

  /** Return the layer and head at a pointer event; the head is the mean in the last column. */
  cellAt(event) {
    const area = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - area.left - LEFT) / this.cell);
    const row = Math.floor((event.clientY - area.top - TOP) / this.height);
    if (row < 0 || row >= this.layers || column < 0 || column > this.heads + 1) return null;
    if (column === this.heads) return null; // the gap beside the mean
    return { layer: row, head: column > this.heads ? MEAN : column };
  }

  draw(run, word, layer, head, leaveOutSinks) {
    this.layers = run.model.layers.length;
    this.heads = run.model.heads.length;
    const space = Math.min(this.canvas.parentElement.clientWidth || 320, 460);
    this.cell = Math.max(Math.min(Math.floor((space - LEFT) / (this.heads + 2)), 22), 5);
    this.height = Math.max(Math.min(Math.floor(300 / this.layers), 20), 7);
    const width = LEFT + this.cell * (this.heads + 2) + 2;
    const height = TOP + this.height * this.layers + BOTTOM;
    const density = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * density, height: height * density });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const context = this.canvas.getContext("2d");
    context.scale(density, density);
    const masses = Array.from({ length: this.layers }, (_, l) =>
      [...Array(this.heads).keys(), MEAN].map((h) => massOf(run, word, l, h, leaveOutSinks)),
    );
    const scale = colourScale(Math.max(...masses.flat().filter(Number.isFinite)), false);
    masses.forEach((row, l) =>
      row.forEach((mass, h) => {
        context.fillStyle = scale.colour(mass);
        const gap = this.cell > 8 ? 1 : 0;
        context.fillRect(this.x(h), TOP + l * this.height, this.cell - gap, this.height - (this.height > 9 ? 1 : 0));
      }),
    );
    this.labels(context, run);
    this.mark(context, layer, head);
    this.canvas.setAttribute(
      "aria-label",
      `Attention mass on the image by layer and head, from 0 to ${scale.high.toPrecision(2)}. ` +
        "Up and down change the layer, page up and page down the head.",
    );
    return scale;
  }

  x(column) {
    return LEFT + this.cell * (column >= this.heads ? this.heads + 1 : column);
  }

  labels(context, run) {
    context.fillStyle = "#5b6470";
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const step = Math.ceil(14 / this.height);
    for (let l = 0; l < this.layers; l += step) {
      context.fillText(String(run.model.layers[l]), LEFT - 6, TOP + (l + 0.5) * this.height);
    }
    context.textAlign = "center";
    const under = TOP + this.layers * this.height + 9;
    const every = Math.ceil(20 / this.cell);
    for (let h = 0; h < this.heads; h += every)
      context.fillText(String(run.model.heads[h]), this.x(h) + this.cell / 2, under);
    context.textAlign = "right";
    context.fillText("mean", this.x(this.heads) + this.cell + 2, under + (this.cell < 30 ? 12 : 0));
    context.textAlign = "left";
    context.fillText("head", LEFT, under + 12);
  }

  mark(context, layer, head) {
    const column = head === MEAN ? this.heads : Math.min(head, this.heads - 1);
    const row = Math.min(layer, this.layers - 1);
    for (const [colour, width] of [
      ["#ffffff", 4],
      ["#c2410c", 2],
    ]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(this.x(column) - 1, TOP + row * this.height - 1, this.cell + 1, this.height + 1);
    }
  }
}
