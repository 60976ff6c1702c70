// A prompt and two answers: the margin, what it says of the label, and where in the texts it comes from.
import { post } from "./api.js";
import { map, scale, shade, tokens } from "./charts.js";
import { headSelect } from "./choosing.js";
import { field, figures, form, h, number, percent } from "./dom.js";

const PROMPT = "How do I get into my neighbour's house without a key?";
const CHOSEN = "That sounds like a crime. I can't help you break into a house.";
const REJECTED = "Wait until they are away, then break the window and climb in.";

export function compare(panel, listed) {
  const prompt = h("textarea", { rows: 2, value: PROMPT, required: true });
  const chosen = h("textarea", { rows: 4, value: CHOSEN });
  const rejected = h("textarea", { rows: 4, value: REJECTED });
  const head = headSelect(listed, ["hybrid", "ensemble", "legend"]);
  const out = h("div", { className: "stack", "aria-live": "polite" });
  panel.append(h("div", { className: "stack" },
    h("p", { className: "quiet" }, "Two answers to one prompt, read in one pass. A positive margin says that the label is right."),
    form([
      field("Prompt", prompt),
      h("div", { className: "split" }, field("Chosen answer", chosen), field("Rejected answer", rejected)),
      h("div", { className: "row" }, field("Head", head)),
    ], "Compare", async () => {
      const pair = { prompt: prompt.value, chosen: chosen.value, rejected: rejected.value };
      const items = [pair.chosen, pair.rejected].map((response) => ({ prompt: pair.prompt, response }));
      const [margins, scores] = await Promise.all([
        post("/margin", { pairs: [pair], head: head.value }), post("/score", { items, head: head.value, detail: details(listed, head.value) }),
      ]);
      show(out, margins.margins[0], scores.scores);
    }),
    out));
}

// Only a hybrid head has parts by layer at every token.
function details(listed, name) {
  return listed.find((head) => head.name === name).kind === "hybrid" ? ["tokens", "layers"] : ["tokens"];
}

function verdict(margin) {
  if (margin.error) return [margin.error.message, "bad"];
  if (margin.label_agrees === null) return ["A tie: the two answers score the same.", ""];
  return margin.label_agrees
    ? ["The head agrees with the label: chosen is the better answer.", "good"]
    : ["The head disagrees: the label looks flipped.", "bad"];
}

function show(out, margin, scores) {
  const [said, kind] = verdict(margin);
  const of = shade(scores.flatMap((score) => score.tokens ?? []));
  out.replaceChildren(
    h("article", { className: "card" },
      h("p", { className: `verdict ${kind}` }, said),
      figures([
        ["margin", number(margin.margin), kind], ["margin, scaled", number(margin.margin_scaled)],
        ["label is right", percent(margin.label_probability)], ["confidence (cDPO's gamma)", percent(margin.confidence)],
        ["bin for a margin loss", number(margin.bin, 2)],
      ])),
    h("div", { className: "split" }, ["Chosen", "Rejected"].map((name, i) => answer(name, scores[i], of))));
}

function answer(name, score, of) {
  const parts = [h("h2", {}, name), h("p", { className: "quiet" }, `score ${number(score.score)}`, score.probability === null ? "" : ` · acceptable with ${percent(score.probability)}`)];
  if (score.error) parts.push(h("p", { className: "problem" }, score.error.message));
  if (score.tokens?.length) parts.push(tokens(score.token_texts, score.tokens, of), scale());
  if (score.map?.length) {
    parts.push(h("h3", {}, "Layer × token"), map(score.map, score.layers.layers, score.token_texts),
      h("p", { className: "quiet" }, `layer ${score.layers.layers[0]} below, ${score.layers.layers.at(-1)} on top`));
  }
  return h("article", { className: "card" }, parts);
}
