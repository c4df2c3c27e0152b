// The table of the library: sorted by a click on a column, filtered as one types, opened by a name.
let column = -1, descending = false, query = "";

const value = row => row.children[column]?.dataset.value ?? "";

function compare(one, other) {
    const [left, right] = [value(one), value(other)];
    if (left === "" || right === "") return (left === "") - (right === "");  // without a value: last
    const order = isNaN(left) || isNaN(right) ? left.localeCompare(right) : left - right;
    return descending ? -order : order;
}

function show() {
    const input = element.querySelector("input"), body = element.querySelector("tbody");
    if (!body) return;
    if (input.value !== query) input.value = query;
    if (column >= 0) body.append(...[...body.rows].sort(compare));
    element.querySelectorAll("thead th").forEach((header, number) => {
        header.ariaSort = number !== column ? "none" : descending ? "descending" : "ascending";
    });
    const words = query.toLowerCase().split(/\s+/);
    for (const row of body.rows) row.hidden = !words.every(word => row.dataset.text.toLowerCase().includes(word));
    const shown = [...body.rows].filter(row => !row.hidden).length;
    element.querySelector("[role=status]").textContent = query && `${shown} of ${body.rows.length}`;
}

element.addEventListener("input", event => {
    query = event.target.value;
    show();
});
element.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button?.dataset.name) trigger("select", {name: button.dataset.name});
    if (button?.dataset.column) {
        descending = Number(button.dataset.column) === column && !descending;
        column = Number(button.dataset.column);
        show();
    }
});
watch("value", show);
