// Heat maps: one canvas for each image or frame and each panel of patches that do not overlap.

import { format } from "./numbers.js";
import { UNDEFINED } from "./palette.js";

const CELL = 22; // pixels of a patch that is drawn by row and column
export const WIDEST = 560; // pixels of the canvases of all runs beside each other
export const STRIP = 190; // pixels of a canvas among several of one run
const loaded = new Map();

function loadImage(source) {
  if (!loaded.has(source)) {
    loaded.set(
      source,
      new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => resolve(null);
        image.src = source;
      }),
    );
  }
  return loaded.get(source);
}

/** Return the parts of a run that have a canvas of their own, each with the indices of its patches. */
export function canvasParts(run) {
  const parts = new Map();
  const { image, frame, panel } = run.patches;
  image.forEach((number, patch) => {
    if (panel[patch] < 0) return; // a token that covers no part of the image, such as the end of a row
    const key = `${number}/${frame[patch]}/${panel[patch]}`;
    if (!parts.has(key)) parts.set(key, { image: number, frame: frame[patch], panel: panel[patch], patches: [] });
    parts.get(key).patches.push(patch);
  });
  const inOrder = [...parts.values()].sort((a, b) => a.image - b.image || a.frame - b.frame || a.panel - b.panel);
  return inOrder.map((part) => ({ ...part, name: partName(run, part, inOrder) }));
}

function partName(run, part, parts) {
  const several = (key) => new Set(parts.map((other) => other[key])).size > 1;
  const names = [];
  if (several("image")) names.push(run.images[part.image]?.label ?? `image ${part.image + 1}`);
  if (several("frame")) names.push(`frame ${part.frame + 1}`);
  if (several("panel")) names.push(run.panels[part.panel] ?? `panel ${part.panel + 1}`);
  return names.join(", ");
}

/** Return the boxes of the patches of a part, and the rectangle that holds the image and all boxes. */
function geometry(run, part) {
  const { box, row, column } = run.patches;
  const inPixels = part.patches.every((patch) => box[patch] !== null);
  const boxes = part.patches.map((patch) => {
    if (inPixels) return box[patch];
    return [column[patch], row[patch], column[patch] + 1, row[patch] + 1].map((side) => side * CELL);
  });
  const edges = [0, 1, 2, 3].map((side) => boxes.map((one) => one[side]));
  const frame = [Math.min(...edges[0]), Math.min(...edges[1]), Math.max(...edges[2]), Math.max(...edges[3])];
  const image = run.images[part.image];
  if (!inPixels || !image) return { boxes, frame, inPixels };
  const whole = [
    Math.min(frame[0], 0),
    Math.min(frame[1], 0),
    Math.max(frame[2], image.width),
    Math.max(frame[3], image.height),
  ];
  return { boxes, frame: whole, inPixels };
}

/** A canvas with the heat map of one part. */
export class HeatCanvas {
  constructor(run, part, longest) {
    Object.assign(this, { run, part, ...geometry(run, part) });
    this.figure = document.createElement("figure");
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.figure.append(this.canvas);
    if (part.name) {
      const caption = document.createElement("figcaption");
      caption.textContent = part.name;
      this.figure.append(caption);
    }
    const [left, top, right, bottom] = this.frame;
    this.zoom = Math.min(longest / Math.max(right - left, bottom - top), 12);
    const density = window.devicePixelRatio || 1;
    this.pixels = this.zoom * density;
    this.canvas.width = Math.max(Math.round((right - left) * this.pixels), 1);
    this.canvas.height = Math.max(Math.round((bottom - top) * this.pixels), 1);
    this.canvas.style.maxWidth = `${Math.round((right - left) * this.zoom)}px`;
    this.bitmap = null;
    const source = this.inPixels
      ? run.images[part.image]?.frames[Math.min(part.frame, run.images[part.image].frames.length - 1)]
      : null;
    this.ready = source ? loadImage(source).then((bitmap) => Object.assign(this, { bitmap })) : Promise.resolve();
  }

  /** Return the patch at a pointer event, or null. */
  patchAt(event) {
    const area = this.canvas.getBoundingClientRect();
    const x = this.frame[0] + ((event.clientX - area.left) / area.width) * (this.frame[2] - this.frame[0]);
    const y = this.frame[1] + ((event.clientY - area.top) / area.height) * (this.frame[3] - this.frame[1]);
    const found = this.boxes.findIndex(([l, t, r, b]) => x >= l && x < r && y >= t && y < b);
    return found < 0 ? null : this.part.patches[found];
  }

  /** Draw values by patch; `values`, `hidden` and `sinks` are over all patches of the run. */
  draw(values, scale, hidden, sinks, overlay, words = null) {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(this.pixels, 0, 0, this.pixels, -this.frame[0] * this.pixels, -this.frame[1] * this.pixels);
    if (this.bitmap) {
      const image = this.run.images[this.part.image];
      context.filter = words || overlay === 0 ? "none" : "grayscale(1)"; // colours of the image would mix with the scale
      context.imageSmoothingEnabled = this.zoom < 4;
      context.drawImage(this.bitmap, 0, 0, image.width, image.height);
      context.filter = "none";
    }
    this.part.patches.forEach((patch, i) => {
      const [left, top, right, bottom] = this.boxes[i];
      const [width, height] = [right - left, bottom - top];
      if (words) {
        drawWord(context, words[patch], left, top, width, height);
        return;
      }
      context.globalAlpha = this.bitmap ? overlay : 1;
      context.fillStyle = hidden.has(patch) ? UNDEFINED : scale.colour(values[patch]);
      context.fillRect(left, top, width, height);
      context.globalAlpha = 1;
    });
    if (!words) this.markSinks(context, hidden, new Set(sinks));
    this.describe(values, hidden, words);
  }

  markSinks(context, hidden, sinks) {
    context.lineWidth = 1.5 / this.zoom;
    this.part.patches.forEach((patch, i) => {
      if (!sinks.has(patch)) return;
      const [left, top, right, bottom] = this.boxes[i];
      const inset = context.lineWidth;
      context.strokeStyle = "#ffffff";
      context.strokeRect(left + inset, top + inset, right - left - 2 * inset, bottom - top - 2 * inset);
      context.strokeStyle = "#111111";
      context.setLineDash([3 / this.zoom, 3 / this.zoom]);
      context.strokeRect(left + inset, top + inset, right - left - 2 * inset, bottom - top - 2 * inset);
      context.setLineDash([]);
      if (!hidden.has(patch)) return;
      context.beginPath();
      context.moveTo(left, top);
      context.lineTo(right, bottom);
      context.moveTo(right, top);
      context.lineTo(left, bottom);
      context.stroke();
    });
  }

  describe(values, hidden, words) {
    const shown = this.part.patches.filter((patch) => !hidden.has(patch));
    const name = this.part.name || "image";
    if (words || !shown.length) {
      this.canvas.setAttribute("aria-label", `${name}, ${shown.length} patches with a word each`);
      return;
    }
    const top = shown.reduce((best, patch) => (values[patch] > values[best] ? patch : best), shown[0]);
    const { row, column } = this.run.patches;
    const text = `${name}: highest at row ${row[top] + 1}, column ${column[top] + 1}: ${format(values[top])}`;
    this.canvas.setAttribute("aria-label", text);
  }
}

function drawWord(context, word, left, top, width, height) {
  const text = word.trim() || word;
  const size = Math.min(height * 0.5, (width * 1.7) / Math.max(text.length, 2));
  context.fillStyle = "rgba(255,255,255,0.62)";
  context.fillRect(left + width * 0.03, top + height * 0.03, width * 0.94, height * 0.94);
  context.fillStyle = "#111111";
  context.font = `${size}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, left + width / 2, top + height / 2, width * 0.92);
}
