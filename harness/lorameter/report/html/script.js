"use strict";
// What the page can do beyond showing itself: without this script it is complete, and has no control that does nothing.
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const number = (cell) => (cell.dataset.value === undefined ? null : Number(cell.dataset.value));

const sortable = (table) => {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const written = [...body.rows];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort || "none"];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next === "none") return body.replaceChildren(...written);
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const order = (left, right) => {
        const [a, b] = [left.cells[column], right.cells[column]];
        const [x, y] = [number(a), number(b)];
        if (x !== null && y !== null) return sign * (x - y);
        if (x !== null || y !== null) return x === null ? 1 : -1; // what has no number is last, either way
        return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      };
      body.replaceChildren(...[...written].sort(order));
      return undefined;
    });
  });
};

const filterable = (table) => {
  const input = make("input", { type: "search" });
  const label = make("label", { className: "controls" }, "Filter rows ", input);
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(label);
};

const toggles = () => {
  const owned = [...document.querySelectorAll("[data-variant]")];
  const fieldset = document.getElementById("variants");
  const names = fieldset ? JSON.parse(fieldset.dataset.names) : [];
  if (names.length < 2) return;
  names.forEach(([name, series]) => {
    const box = make("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      for (const element of owned) if (element.dataset.variant === name) element.classList.toggle("off", !box.checked);
    });
    fieldset.append(make("label", {}, box, make("span", { className: `swatch ${series}` }), name));
  });
  fieldset.hidden = false;
};

for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length > 1) sortable(table);
  if (table.tBodies[0].rows.length > 8) filterable(table);
}
toggles();
