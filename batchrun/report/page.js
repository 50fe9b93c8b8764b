// Nothing here is needed to read the page: it filters rows and opens them all.
(() => {
  const box = document.getElementById("filter");
  const rows = [...document.querySelectorAll("details.row")];
  box.hidden = false;
  const words = box.querySelector("input");
  words.addEventListener("input", () => {
    const wanted = words.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  box.querySelector("button").addEventListener("click", () => {
    const open = !rows.every((row) => row.open);
    for (const row of rows) row.open = open;
  });
  for (const head of document.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const at = [...head.parentNode.children].indexOf(head);
      const body = head.closest("table").tBodies[0];
      const value = (row) => row.children[at].dataset.value ?? row.children[at].textContent;
      const sign = head.dataset.sort === "up" ? -1 : 1;
      head.dataset.sort = sign === 1 ? "up" : "down";
      const sorted = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      });
      body.append(...sorted);
    });
  }
})();
