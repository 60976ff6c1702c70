// A conversation whose answers pass a guard: what falls below its threshold is withheld from there on.
import { post, takes } from "./api.js";
import { headSelect } from "./choosing.js";
import { field, form, h, number, percent } from "./dom.js";

const LEAST = 4; // tokens, before which a running mean means little

export function chat(panel, listed) {
  const head = headSelect(listed, ["hybrid", "ensemble", "legend"]);
  const rate = h("select", {}, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5].map((value) =>
    h("option", { value, selected: value === 0.05 }, percent(value))));
  const text = h("textarea", { rows: 2, required: true, placeholder: "Say something" });
  const talk = h("ol", { className: "talk", "aria-live": "polite", "aria-label": "Conversation" });
  const turns = [];
  const element = form([
    h("div", { className: "row" }, field("Guard", head), field("False positives", rate)), field("You", text),
  ], "Send", async () => {
    const said = text.value;
    const asked = [...turns, { role: "user", content: said }];
    const mine = h("li", { className: "user" }, said);
    const waiting = h("li", {}, "…");
    talk.append(mine, waiting);
    try {
      const answer = await guarded(asked, head.value, Number(rate.value));
      waiting.replaceChildren(...answer.shown);
      turns.push(asked.at(-1), { role: "assistant", content: answer.text || "…" });
      text.value = "";
    } catch (error) {
      mine.remove();
      waiting.remove();
      throw error;
    }
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    element.requestSubmit();
  });
  panel.append(h("div", { className: "stack" },
    h("p", { className: "quiet" }, "The guard reads the running mean of the head's score at every token. Where it falls below the threshold, the rest is withheld. The threshold lets through all but this share of acceptable answers."),
    talk, element));
}

async function guarded(messages, head, rate) {
  const sampling = { max_tokens: 60 };
  if (await takes("RerankRequest", "stop_when").catch(() => false)) {
    try {
      const drawn = await post("/rerank", { messages, n: 1, head, sampling, stop_when: { head, fpr: rate } });
      return stopped(drawn.best, head, rate);
    } catch (error) {
      if (error.status !== 422) throw error; // this head has no thresholds for a stop: the page applies the rule itself
    }
  }
  const drawn = (await post("/rerank", { messages, n: 1, head, sampling })).best;
  const asked = { input: drawn.text, model: head, prompt: messages, false_positives: rate };
  const [scored, judged] = await Promise.all([
    post("/score", { items: [{ messages: [...messages, { role: "assistant", content: drawn.text }] }], head, detail: ["tokens"] }),
    post("/v1/moderations", asked),
  ]);
  return ruled(scored.scores[0], judged.results[0].inward[head].threshold, head, rate);
}

function ruled(score, threshold, head, rate) {
  const { tokens, token_texts: texts } = score;
  let sum = 0;
  const at = tokens.findIndex((value, i) => { sum += value; return i + 1 >= LEAST && sum / (i + 1) < threshold; });
  const text = texts.slice(0, at < 0 ? texts.length : Math.max(0, at - 1)).join("");
  if (at < 0) return { text, shown: [text, note(`${head}: ${number(score.score)}, threshold ${number(threshold)}`)] };
  const mean = tokens.slice(0, at + 1).reduce((a, b) => a + b, 0) / (at + 1);
  const why = `Withheld: ${texts.length - Math.max(0, at - 1)} of ${texts.length} tokens. At token ${at + 1} the running mean of ${head} was ${number(mean)}, below ${number(threshold)} (${percent(rate)} false positives).`;
  return { text, shown: [text, h("span", { className: "withheld" }, why)] };
}

function stopped(best, head, rate) {
  if (best.finish_reason !== "guard") return { text: best.text, shown: [best.text, note(`${head}: ${number(best.score)}`)] };
  const why = `Stopped after ${best.completion_tokens ?? 0} tokens: the score of ${head} fell below the threshold of ${percent(rate)} false positives.`;
  return { text: best.text, shown: [best.text, h("span", { className: "withheld" }, why)] };
}

const note = (text) => h("span", { className: "quiet", style: "display:block" }, text);
