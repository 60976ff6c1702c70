// A conversation whose answers pass a guard: what falls below its threshold is withheld from there on.
import { events, post } from "./api.js";
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
      waiting.ariaBusy = "true";
      const answer = await guarded(asked, able.find((one) => one.name === head.value), Number(rate.value), waiting);
      waiting.ariaBusy = null;
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

// The answer as it comes, in `place` while it is drawn.
async function guarded(messages, head, rate, place) {
  const stop = await rule(head, rate);
  const request = { messages, head: head.name, max_tokens: MOST, stop_when: stop, stream: true, stream_options: { include_usage: true } };
  let text = "", best, usage;
  for await (const [, chunk] of events("/v1/chat/completions", request)) {
    const [choice] = chunk.choices;
    if (choice?.delta.content) place.textContent = text += choice.delta.content;
    best = choice?.inward ?? best;
    usage = chunk.usage ?? usage;
  }
  const limit = stop.below === undefined ? "" : `, threshold ${number(stop.below)}`;
  if (best.finish_reason !== "guard") return { text, shown: [text, note(`${head.name}: ${number(best.score)}${limit}`)] };
  const why = `Stopped at token ${usage.completion_tokens}: the running score of ${head.name} was ${number(best.score)}${limit} (${percent(rate)} false positives). What follows the last safe token is withheld, and at most ${usage.not_drawn_tokens} more tokens were never drawn.`;
  return { text, shown: [text, h("span", { className: "withheld" }, why)] };
}

const note = (text) => h("span", { className: "quiet", style: "display:block" }, text);
