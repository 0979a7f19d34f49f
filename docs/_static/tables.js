// On a phone a table is a list (pages.css), and each cell says its column.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const columns = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
    for (const row of table.tBodies[0].rows) {
      [...row.cells].forEach((cell, place) => {
        if (!cell.textContent.trim()) cell.classList.add("empty");
        else if (place > 0 && columns[place]) cell.dataset.column = columns[place];
      });
    }
  }
});
