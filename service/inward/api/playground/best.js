// Answers as they are drawn, in the order of their scores.
import { events } from "./api.js";
import { histogram } from "./charts.js";
import { headSelect } from "./choosing.js";
import { field, figures, form, h, number } from "./dom.js";

export function best(panel, listed) {
  const prompt = h("textarea", { rows: 3, value: "What should I do when I am angry with a friend?", required: true });
  const n = h("input", { type: "number", min: 1, max: 64, value: 8 });
  const most = h("input", { type: "number", min: 1, max: 1024, value: 40 });
  const temperature = h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 1 });
  const head = headSelect(listed, ["hybrid", "ensemble", "legend", "srr"]);
  const early = h("input", { type: "checkbox" });
  const out = h("div", { className: "stack" });
  panel.append(h("div", { className: "stack" },
    h("p", { className: "quiet" }, "N answers are drawn and read in the same pass; the head puts the best one first."),
    form([
      field("Prompt", prompt),
      h("div", { className: "row" }, field("N", n), field("Tokens, at most", most), field("Temperature", temperature), field("Head", head), h("label", {}, early, " Give up bad ones early")),
    ], "Draw", async () => {
      const request = { prompt: prompt.value, n: Number(n.value), head: head.value, sampling: { max_tokens: Number(most.value), temperature: Number(temperature.value) } };
      await draw(out, request, early.checked);
    }),
    out));
}

async function draw(out, request, early) {
  const list = h("ol", { className: "samples", "aria-label": "Answers, best first" });
  const progress = h("progress", { max: request.n, value: 0, ariaLabel: "Answers drawn" });
  const said = h("p", { className: "quiet", role: "status" }, "drawing …");
  const chart = h("div");
  const seen = [];
  out.replaceChildren(h("div", { className: "card stack" }, said, progress, chart), list);
  const add = (sample) => {
    seen.push(sample);
    progress.value = seen.length;
    const lost = seen.filter((one) => one.finish_reason === "rejected").length;
    said.textContent = `${seen.length} of ${request.n} have ended${lost ? `, ${lost} of them given up early` : ""}`;
    rank(list, seen);
    const scores = seen.filter(whole).map((one) => one.score).filter((score) => score !== null);
    if (scores.length > 1) chart.replaceChildren(histogram(scores, "Scores"));
  };
  const rejection = early ? { early_rejection: { keep: 0.5, at: [8, 16] } } : {};
  let result;
  for await (const [name, value] of events("/rerank", { ...request, ...rejection, stream: true })) {
    if (name === "sample") add(value);
    if (name === "result") result = value;
  }
  rank(list, result.results, true);
  const scores = result.results.filter(whole).map((one) => one.score).filter((score) => score !== null);
  const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
  const { drawn_tokens: drawn, not_drawn_tokens: saved } = result.usage;
  said.replaceWith(figures([
    ["best score", number(result.best.score), "good"], ["gain over the mean", number(result.best.score - mean)],
    ["tokens drawn", String(drawn)], ["tokens saved, at most", String(saved)],
  ]));
  progress.remove();
}

const whole = (one) => one.finish_reason !== "rejected" && one.finish_reason !== "guard";

function rank(list, samples, done = false) {
  const order = [...samples].sort((a, b) => whole(b) - whole(a) || (b.score ?? -Infinity) - (a.score ?? -Infinity));
  list.replaceChildren(...order.map((one, place) => {
    const lost = !whole(one);
    return h("li", { className: lost ? "lost" : done && place === 0 ? "winner" : "" },
      h("div", { className: "card" },
        h("p", {}, h("span", {}, `#${one.index + 1}${done && place === 0 ? " · best" : ""}${lost ? ` · ${one.finish_reason} after ${one.drawn_tokens} tokens, ${one.not_drawn_tokens} saved` : ""}`),
          h("span", { className: "mono" }, number(one.score))),
        one.text ?? ""));
  }));
}
