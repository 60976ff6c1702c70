// A conversation whose answers pass a guard: what falls below its threshold is withheld from there on.
import { post } from "./api.js";
import { headSelect } from "./choosing.js";
import { field, form, h, number, percent } from "./dom.js";

const LEAST = 4; // tokens, before which a running mean means little
const MOST = 60;

export function chat(panel, listed) {
  const able = listed.filter(({ calibration: known = {} }) => known.guard?.length || known.acceptable || (known.platt && known.score_deciles));
  if (!able.length) return void panel.append(h("p", { className: "problem" }, "No head is calibrated for thresholds: fit one with inward fit."));
  const head = headSelect(able, ["hybrid", "ensemble", "legend"]);
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
      const answer = await guarded(asked, able.find((one) => one.name === head.value), Number(rate.value));
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
    h("p", { className: "quiet" }, "The guard reads the head's score at every token while the answer is drawn. Where the running score falls below the threshold, the answer ends, and what follows its last safe token is withheld. The threshold follows from the share of acceptable answers that may be stopped by mistake."),
    talk, element));
}

// The rule that the server applies while it draws: the head's own for this rate where it has one, else the threshold of
// whole answers for the running mean.
async function rule(head, rate) {
  if (head.calibration?.guard?.length) return { head: head.name, fpr: rate };
  const judged = await post("/v1/moderations", { input: "?", model: head.name, false_positives: rate });
  return { head: head.name, below: judged.results[0].inward[head.name].threshold, pool: "mean", after: LEAST };
}

async function guarded(messages, head, rate) {
  const stop = await rule(head, rate);
  const { best, usage } = await post("/rerank", { messages, n: 1, head: head.name, sampling: { max_tokens: MOST }, stop_when: stop });
  const limit = stop.below === undefined ? "" : `, threshold ${number(stop.below)}`;
  if (best.finish_reason !== "guard") return { text: best.text, shown: [best.text, note(`${head.name}: ${number(best.score)}${limit}`)] };
  const held = usage.drawn_tokens - (best.completion_tokens ?? 0);
  const why = `Stopped at token ${usage.drawn_tokens}: the running score of ${head.name} was ${number(best.score)}${limit} (${percent(rate)} false positives). ${held} ${held === 1 ? "token is" : "tokens are"} withheld, and at most ${usage.not_drawn_tokens} more were never drawn.`;
  return { text: best.text, shown: [best.text, h("span", { className: "withheld" }, why)] };
}

const note = (text) => h("span", { className: "quiet", style: "display:block" }, text);
