// Files of what is shown: a PNG of the heat maps, a CSV of the patches.

import { format, sinksOf } from "./numbers.js";

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function quoted(value) {
  const text = String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Return what is shown as CSV: a row for each patch of each run that is shown. */
export function csvOf(shown) {
  const lines = ["run,word,layer,head,map,position,image,frame,tile,row,column,left,top,right,bottom,sink,value"];
  for (const { run, word, layer, head, map, values } of shown) {
    const { position, image, frame, tile, row, column, box } = run.patches;
    const sinks = new Set(sinksOf(run, layer));
    values.forEach((value, p) => {
      const places = [position[p], image[p], frame[p], tile[p], row[p], column[p], ...(box[p] ?? ["", "", "", ""])];
      const cells = [
        run.name,
        run.words[word].text,
        run.model.layers[layer],
        head,
        map,
        ...places,
        Number(sinks.has(p)),
        Number.isNaN(value) ? "" : value,
      ];
      lines.push(cells.map(quoted).join(","));
    });
  }
  return `${lines.join("\n")}\n`;
}

export function saveCsv(shown, name) {
  offer(new Blob([csvOf(shown)], { type: "text/csv" }), `${name}.csv`);
}

/** Save the heat maps and their scale as one PNG. */
export function savePng(canvases, scale, title, stops, name) {
  const gap = 12;
  const height = Math.max(...canvases.map((canvas) => canvas.height));
  const width = Math.max(
    canvases.reduce((sum, canvas) => sum + canvas.width + gap, gap),
    480,
  );
  const sheet = document.createElement("canvas");
  Object.assign(sheet, { width, height: height + 108 });
  const context = sheet.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.fillStyle = "#1c1f23";
  context.font = "18px system-ui, sans-serif";
  context.fillText(title, gap, 28, width - 2 * gap);
  let left = gap;
  for (const canvas of canvases) {
    context.drawImage(canvas, left, 44);
    left += canvas.width + gap;
  }
  const bar = context.createLinearGradient(gap, 0, gap + 260, 0);
  stops.forEach((colour, i) => bar.addColorStop(i / (stops.length - 1), colour));
  context.fillStyle = bar;
  context.fillRect(gap, height + 60, 260, 14);
  context.fillStyle = "#1c1f23";
  context.font = "14px system-ui, sans-serif";
  context.fillText(`${format(scale.low)} to ${format(scale.high)} (${scale.label})`, gap, height + 96, width - 2 * gap);
  sheet.toBlob((blob) => offer(blob, `${name}.png`));
}
