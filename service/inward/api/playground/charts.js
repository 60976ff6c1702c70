// Small pictures: a histogram, bars, tokens in colour, and a map of layers and tokens.
import { h, number, tip } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
function s(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function histogram(values, what, split = null) {
  const [low, high] = [Math.min, Math.max].map((of) => values.reduce((a, b) => of(a, b))); // more values than a call has arguments
  const bins = Math.min(24, Math.max(6, Math.ceil(Math.sqrt(values.length) * 2)));
  const width = (high - low) / bins || 1;
  const counts = Array(bins).fill(0);
  for (const value of values) counts[Math.min(bins - 1, Math.floor((value - low) / width))] += 1;
  const heights = counts.map((count, i) => ({
    value: count, low: split !== null && low + (i + 0.5) * width < split,
    said: `${number(low + i * width, 2)} to ${number(low + (i + 1) * width, 2)}: ${count}`,
  }));
  // a few values are no tall bars
  return bars(heights, `${what}: ${values.length} values from ${number(low, 2)} to ${number(high, 2)}`, [number(low, 2), number(high, 2)], 0, 4);
}

export function bars(heights, label, ends = [], floor = 0, least = floor + 1e-9) {
  const [w, height, top] = [480, 120, Math.max(...heights.map((bar) => bar.value), least)];
  const svg = s("svg", { viewBox: `0 0 ${w} ${height + 18}`, class: "bars", role: "img", "aria-label": label });
  const step = w / heights.length;
  heights.forEach((bar, i) => {
    const tall = Math.max(0, ((bar.value - floor) / (top - floor)) * height);
    const rect = s("rect", { x: i * step + 1, y: height - tall, width: Math.max(1, step - 2), height: tall, rx: 2, class: bar.low ? "low" : "" });
    rect.append(s("title", {}, bar.said));
    svg.append(rect);
  });
  svg.append(s("line", { x1: 0, x2: w, y1: height + 0.5, y2: height + 0.5 }));
  if (ends.length) {
    svg.append(s("text", { x: 0, y: height + 14 }, ends[0]), s("text", { x: w, y: height + 14, "text-anchor": "end" }, ends[1]));
  }
  return svg;
}

// How strongly a value is coloured, from -1 to 1, around the middle of all that are shown together.
export function shade(all) {
  const sorted = [...all].sort((a, b) => a - b);
  const middle = sorted[Math.floor(sorted.length / 2)] ?? 0;
  const reach = Math.max(1e-9, ...[0.02, 0.98].map((q) => Math.abs(sorted[Math.floor(q * (sorted.length - 1))] - middle)));
  return (value) => Math.max(-1, Math.min(1, (value - middle) / reach));
}

export function colour(x, most = 42) {
  return `color-mix(in oklab, var(--${x < 0 ? "low" : "high"}) ${Math.round(most * Math.abs(x))}%, transparent)`;
}

// The text of an answer, token by token; with the pointer or the arrow keys each says its number.
export function tokens(texts, values, of) {
  const spans = texts.map((text, i) => h("span", { style: `background:${colour(of(values[i]))}` }, text));
  const box = h("p", { className: "tokens", tabIndex: 0, role: "group", "aria-label": `${texts.length} tokens in colour; arrow keys tell each one's score` }, spans);
  let at = -1;
  const show = (i, place) => {
    spans[at]?.classList.remove("at");
    at = i;
    if (i < 0) return tip("");
    spans[i].classList.add("at");
    const { left: x, bottom: y } = spans[i].getBoundingClientRect();
    tip(`${JSON.stringify(texts[i])} · ${number(values[i])} · token ${i + 1} of ${texts.length}`, place ?? { x, y: y - 16 });
  };
  box.addEventListener("pointermove", (event) => show(spans.indexOf(event.target), { x: event.clientX, y: event.clientY }));
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(spans.length - 1, at + step)));
  });
  return box;
}

export function scale() {
  return h("p", { className: "scale" }, "low", h("i"), "high");
}

// Rows are layers (the last on top), columns tokens; each cell is the layer's part of the token's score.
export function map(rows, layers, texts) {
  const [columns, cell] = [rows.length, 14];
  const canvas = h("canvas", { className: "map", width: columns * cell, height: layers.length * cell, tabIndex: 0, role: "img" });
  canvas.setAttribute("aria-label", `Map of ${layers.length} layers and ${columns} tokens: each layer's part of each token's score`);
  const of = shade(rows.flat());
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const paint = canvas.getContext("2d");
    const probe = h("span");
    document.body.append(probe);
    const solid = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
    const [low, high] = [solid("low"), solid("high")];
    probe.remove();
    paint.clearRect(0, 0, canvas.width, canvas.height);
    rows.forEach((row, t) => row.forEach((value, l) => {
      const x = of(value);
      paint.globalAlpha = 0.06 + 0.9 * Math.abs(x);
      paint.fillStyle = x < 0 ? low : high;
      paint.fillRect(t * cell, (layers.length - 1 - l) * cell, cell - 1, cell - 1);
    }));
    return style;
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  requestAnimationFrame(draw);
  let [t, l] = [0, layers.length - 1];
  const say = (place) => tip(`layer ${layers[l]} · ${JSON.stringify(texts[t] ?? "")} · ${number(rows[t][l])}`, place);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    t = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    l = layers.length - 1 - Math.min(layers.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * layers.length)));
    say({ x: event.clientX, y: event.clientY });
  });
  for (const leaving of ["pointerleave", "blur"]) canvas.addEventListener(leaving, () => tip(""));
  canvas.addEventListener("keydown", (event) => {
    const [dt, dl] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [];
    if (dt === undefined) return;
    event.preventDefault();
    t = Math.max(0, Math.min(columns - 1, t + dt));
    l = Math.max(0, Math.min(layers.length - 1, l + dl));
    const box = canvas.getBoundingClientRect();
    say({ x: box.left + ((t + 0.5) / columns) * box.width, y: box.top + (1 - (l + 0.5) / layers.length) * box.height });
  });
  return canvas;
}
