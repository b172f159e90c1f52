// Making and changing nodes. All text is added as text nodes: what the server sends may be
// a model's answer, and is never treated as markup.

export const byId = (id) => document.getElementById(id);

/** Make an element; children are nodes or texts, absent ones are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set a text, touching the page only if it is another one. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const shown = new WeakMap();

/** Rebuild the children if the data have changed. */
export function update(node, data, make) {
  const key = JSON.stringify(data) ?? "";
  if (shown.get(node) === key) return;
  shown.set(node, key);
  node.replaceChildren(...make(data));
}

/** A table's rows: the first cell of each is its header. */
export function rows(cells) {
  return cells.map(([head, ...rest]) =>
    el("tr", {}, el("th", { scope: "row" }, head), ...rest.map((cell) => el("td", {}, cell))),
  );
}

/** A table's head. */
export function heads(names) {
  return el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name))));
}
