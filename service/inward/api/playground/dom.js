// Elements, and what is said about one of them beside the pointer. Text is never parsed as HTML.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function field(label, control) {
  return h("label", {}, label, control);
}

export function figures(pairs) {
  return h("dl", { className: "figures" }, pairs.map(([name, value, kind = ""]) =>
    h("div", {}, h("dt", {}, name), h("dd", { className: kind }, value))));
}

export function facts(pairs) {
  return h("dl", { className: "facts" }, pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

export const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));
export const percent = (x) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(1)} %`);

export function tip(text, at) {
  const element = document.getElementById("tip");
  element.hidden = !text;
  if (!text) return;
  element.textContent = text;
  const [width, height] = [element.offsetWidth, element.offsetHeight];
  element.style.left = `${Math.max(8, Math.min(at.x + 12, innerWidth - width - 8))}px`;
  element.style.top = `${at.y + 20 + height > innerHeight ? at.y - height - 12 : at.y + 20}px`;
}

// A form whose work can be done once at a time; what goes wrong is said below it.
export function form(fields, button, work) {
  const problem = h("p", { className: "problem", role: "alert", hidden: true });
  const go = h("button", { type: "submit" }, button);
  const last = fields.at(-1);
  const row = last.classList.contains("row") ? last : h("div", { className: "row" });
  row.append(go);
  const element = h("form", { className: "card stack" }, fields, row, problem);
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    problem.hidden = true;
    try {
      await work();
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    } finally {
      go.disabled = false;
    }
  });
  return element;
}
