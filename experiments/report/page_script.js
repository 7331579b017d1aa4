// Sort a table by a column when its heading is clicked; click again to reverse.
const number = (text) => {
  const found = text.replaceAll("\u2212", "-").replaceAll(",", "").match(/-?\d+(\.\d+)?/);
  return found ? Number(found[0]) : NaN;
};
for (const heading of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const falling = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const column = heading.cellIndex;
    const numeric = heading.classList.contains("number");
    const body = heading.closest("table").tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent }));
    rows.sort((a, b) => {
      if (!numeric) return a.text.localeCompare(b.text) * (falling ? -1 : 1);
      const [first, second] = [number(a.text), number(b.text)];
      // Cells without a number stay at the end.
      if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second);
      return (first - second) * (falling ? -1 : 1);
    });
    body.append(...rows.map((entry) => entry.row));
  });
}
// Links of the contents open the part that they lead to; printing opens all.
const open = () => document.querySelector(`details${location.hash || "#none"}`)?.setAttribute("open", "");
addEventListener("hashchange", open);
open();
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
