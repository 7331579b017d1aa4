// The prompt and the answer, as words to click.

const LONGEST_GAP = 400; // characters of text without a word to click that are shown in full

function gap(entry) {
  const span = document.createElement("span");
  span.className = entry.group === "vision" ? "image-mark" : "gap";
  if (entry.group === "vision") {
    span.textContent = entry.text || "image";
    return span;
  }
  const long = entry.text.length > LONGEST_GAP;
  span.textContent = long
    ? `${entry.text.slice(0, LONGEST_GAP / 2)} … ${entry.text.slice(-LONGEST_GAP / 2)}`
    : entry.text;
  return span;
}

/** Fill an element with the text of a run. `choose` is called with the index of a word that is clicked. */
export function buildWords(element, run, name, choose) {
  element.replaceChildren();
  element.setAttribute("aria-label", `${name}: words to choose`);
  let group = null;
  for (const entry of run.text) {
    if (entry.group === "response" && group !== "response") {
      const label = document.createElement("span");
      label.className = "answer-mark";
      label.textContent = "answer";
      element.append(label);
    }
    group = entry.group;
    if (entry.word === null) {
      element.append(gap(entry));
      continue;
    }
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.word = entry.word;
    button.className = `word ${entry.group}`;
    button.textContent = entry.text.trim() || "␣";
    button.addEventListener("click", () => choose(entry.word));
    element.append(entry.text.startsWith(" ") ? " " : "", button);
  }
}

/** Mark the chosen word, and shade each word by its attention mass on the image. */
export function markWords(element, chosen, masses) {
  const largest = Math.max(...masses.filter(Number.isFinite), 1e-9);
  for (const button of element.querySelectorAll("button[data-word]")) {
    const word = Number(button.dataset.word);
    const pressed = word === chosen;
    button.setAttribute("aria-pressed", String(pressed));
    button.tabIndex = pressed ? 0 : -1;
    const share = Number.isFinite(masses[word]) ? masses[word] / largest : 0;
    button.style.setProperty("--mass", share.toFixed(3));
  }
}
