"use strict";
// Sorting and filtering; without it the page is whole.

for (const table of document.querySelectorAll("table.scores")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Numbers fall first, the order of the rows rises first.
      const first = column === 0 ? "ascending" : "descending";
      const other = column === 0 ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const value = (row) => {
        const found = row.cells[column].dataset.order;
        return found === undefined ? null : Number(found);
      };
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return order === "ascending" ? x - y : y - x;
      });
      body.append(...rows);
    });
  });
}

const form = document.querySelector(".filters");
if (form) {
  const groups = [...document.querySelectorAll(".group")];
  const texts = groups.map((group) => group.querySelector("h3").textContent.toLowerCase() + " "
    + [...group.querySelectorAll(".prompt")].map((p) => p.textContent.toLowerCase()).join(" "));
  const chosen = (name) => form.elements[name]?.value ?? "";
  const filter = () => {
    const text = chosen("text").trim().toLowerCase();
    let shown = 0;
    groups.forEach((group, number) => {
      const fits = (!chosen("split") || group.dataset.split === chosen("split"))
        && (!chosen("kind") || group.dataset.kind === chosen("kind"))
        && texts[number].includes(text);
      group.hidden = !fits;
      shown += fits;
      for (const tile of group.querySelectorAll("[data-method]")) {
        tile.hidden = chosen("method") !== "" && tile.dataset.method !== chosen("method");
      }
    });
    form.querySelector("output").textContent =
      shown === groups.length ? `${shown} groups` : `${shown} of ${groups.length} groups`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
}
