// Lines by layer: attention mass of the chosen word on the image, with uniform attention beside it.

import { format } from "./numbers.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, FROM_LEFT, FROM_RIGHT, ABOVE, BELOW] = [420, 170, 44, 10, 10, 34];

function part(name, attributes, text = "") {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** Round a number up to a limit that axes like: 1, 2 or 5 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return power * [1, 2, 5, 10].find((step) => step * power >= value - 1e-12);
}

/**
 * Draw curves by layer.
 *
 * Each curve has `values`, a `name`, and a `kind`: "main", "second" or "uniform" (one number for all layers).
 */
export function drawLines(svg, layers, curves, chosen, label, choose) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const finite = curves.flatMap(({ values }) => values).filter(Number.isFinite);
  const top = roundUp(Math.max(...finite, 1e-6));
  const x = (layer) => FROM_LEFT + ((WIDTH - FROM_LEFT - FROM_RIGHT) * (layer + 0.5)) / layers.length;
  const y = (value) => ABOVE + (HEIGHT - ABOVE - BELOW) * (1 - value / top);
  for (const value of [0, top / 2, top]) {
    svg.append(part("line", { x1: FROM_LEFT, x2: WIDTH - FROM_RIGHT, y1: y(value), y2: y(value), class: "rule" }));
    svg.append(part("text", { x: FROM_LEFT - 6, y: y(value) + 4, class: "tick end" }, format(value)));
  }
  svg.append(part("line", { x1: x(chosen), x2: x(chosen), y1: ABOVE, y2: HEIGHT - BELOW, class: "chosen" }));
  const every = Math.ceil(layers.length / 12);
  layers.forEach((layer, i) => {
    if (i % every === 0)
      svg.append(part("text", { x: x(i), y: HEIGHT - BELOW + 15, class: "tick middle" }, String(layer)));
  });
  svg.append(part("text", { x: (FROM_LEFT + WIDTH - FROM_RIGHT) / 2, y: HEIGHT - 3, class: "tick middle" }, label));
  for (const { values, kind } of curves) {
    let path = "";
    values.forEach((value, i) => {
      if (Number.isFinite(value)) path += `${path && Number.isFinite(values[i - 1]) ? "L" : "M"}${x(i)} ${y(value)}`;
    });
    svg.append(part("path", { d: path, class: `curve ${kind}` }));
    if (kind === "uniform") continue;
    values.forEach((value, i) => {
      if (!Number.isFinite(value)) return;
      svg.append(part("circle", { cx: x(i), cy: y(value), r: i === chosen ? 4.5 : 2.5, class: `dot ${kind}` }));
    });
  }
  layers.forEach((layer, i) => {
    const width = (WIDTH - FROM_LEFT - FROM_RIGHT) / layers.length;
    const target = part("rect", { x: x(i) - width / 2, y: 0, width, height: HEIGHT - BELOW + 20, class: "target" });
    const shown = curves.map(({ name, values }) => `${name} ${format(values[i])}`).join(", ");
    target.append(part("title", {}, `layer ${layer}: ${shown}`));
    target.addEventListener("click", () => choose(i));
    svg.append(target);
  });
}
