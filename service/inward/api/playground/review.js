// Scored pairs to be looked through: filters, order, both texts in colour on demand, and decisions by keyboard.
import { post } from "./api.js";
import { scale, shade, tokens } from "./charts.js";
import { field, h, number, percent } from "./dom.js";
import { keyOf } from "./keys.js";

const AT_ONCE = 20;
const COLOURED = 4; // pairs in one request for the scores of all tokens
const DECISIONS = { r: "right", f: "flip", d: "drop" };
const OWN = ["prompt", "messages", "system", "chosen", "rejected"];
const SORTS = {
  "margin, smallest first": [(one) => one.margin, 1], "margin, largest first": [(one) => one.margin, -1],
  "label probability, smallest first": [(one) => one.label_probability, 1],
  "shortest chosen first": [(one) => one.longer, 1], "longest chosen first": [(one) => one.longer, -1],
  "order of the file": [(one) => one.i, 1],
};
const VERDICTS = { "agrees or not": null, contradicts: false, agrees: true, "has no verdict": undefined };
const said = (value) => (typeof value === "string" ? value : JSON.stringify(value ?? ""));

// `pairs`: of each scored row its place, texts, other columns and numbers.
export function review(name, pairs, head) {
  const all = pairs.map((one) => ({ ...one, longer: one.chosen.length - one.rejected.length, decision: "" }));
  const columns = [...new Set(all.flatMap((one) => Object.keys(one.row)))].filter((column) => !OWN.includes(column)).sort();
  const limit = (label, step = "any") => h("input", { type: "number", step, ariaLabel: label });
  const choice = (label, options) => h("select", { ariaLabel: label }, options.map((text) => h("option", {}, text)));
  const text = h("input", { type: "search", placeholder: "in prompt or answers" });
  const ranges = {
    margin: [limit("Least margin"), limit("Most margin")],
    label_probability: [limit("Least label probability"), limit("Most label probability")],
    longer: [limit("Least length difference", 1), limit("Most length difference", 1)],
  };
  const verdict = choice("Verdict of the head", Object.keys(VERDICTS));
  const column = choice("Column", ["any column", ...columns]);
  const value = h("input", { size: 10, ariaLabel: "Value of the column", placeholder: "holds" });
  const decided = choice("Decided", ["decided or not", "undecided", "decided", "right", "flip", "drop"]);
  const sort = choice("Sort", Object.keys(SORTS));
  const count = h("p", { className: "quiet", role: "status" });
  const list = h("ol", { className: "pairs", "aria-label": "Pairs" });
  const more = h("button", { type: "button", className: "plain" }, "More");
  const colour = h("button", { type: "button", className: "plain", "aria-pressed": false }, "Colour tokens");
  const save = h("button", { type: "button", className: "plain" }, "Decisions file");
  let shown = [], drawn = 0, at = 0;

  const within = (number, [low, high]) => (low.value === "" || (number !== null && number >= +low.value)) && (high.value === "" || (number !== null && number <= +high.value));
  function passes(one) {
    const needle = text.value.toLowerCase();
    const wanted = value.value.toLowerCase();
    const places = column.selectedIndex ? [column.value] : columns;
    const choiceOf = VERDICTS[verdict.value];
    return Object.entries(ranges).every(([of, pair]) => within(one[of] ?? null, pair))
      && (verdict.selectedIndex === 0 || (choiceOf === undefined ? typeof one.label_agrees !== "boolean" : one.label_agrees === choiceOf))
      && (!needle || [said(one.prompt), one.chosen, one.rejected].some((part) => part.toLowerCase().includes(needle)))
      && (!wanted || places.some((place) => place in one.row && said(one.row[place]).toLowerCase().includes(wanted)))
      && (decided.selectedIndex === 0 || (decided.value === "undecided" ? !one.decision : decided.value === "decided" ? one.decision : one.decision === decided.value));
  }

  function filter() {
    const [by, sign] = SORTS[sort.value];
    const place = (one) => (by(one) === null || by(one) === undefined ? Infinity : sign * by(one));
    shown = all.filter(passes).sort((a, b) => place(a) - place(b) || a.i - b.i);
    drawn = at = 0;
    list.replaceChildren();
    draw();
    mark(false);
  }

  function draw() {
    const next = shown.slice(drawn, drawn + AT_ONCE);
    drawn += next.length;
    list.append(...next.map(item));
    more.hidden = drawn >= shown.length;
    if (on()) paint();
  }

  function item(one) {
    const press = (decision) => h("button", {
      type: "button", className: "plain", "aria-pressed": one.decision === decision,
      onclick: (event) => { event.stopPropagation(); at = shown.indexOf(one); decide(one.decision === decision ? "" : decision); },
    }, decision);
    const rest = columns.filter((name) => name in one.row).map((name) => `${name}: ${said(one.row[name]).slice(0, 80)}`);
    const facts = [`${one.longer >= 0 ? "+" : ""}${one.longer} characters`, ...rest].join(" · ");
    return h("li", { className: "card pair", "data-decision": one.decision, onclick: () => { at = shown.indexOf(one); mark(false); } },
      h("div", { className: "head" },
        h("strong", {}, `Row ${one.i + 1}`),
        h("span", { className: one.label_agrees === false ? "bad" : "" }, "margin ", h("span", { className: "mono" }, number(one.margin))),
        h("span", {}, "label is right ", h("span", { className: "mono" }, percent(one.label_probability))),
        h("span", { className: "decide", role: "group", ariaLabel: `Decision on row ${one.i + 1}` }, Object.values(DECISIONS).map(press))),
      h("p", { className: "quiet" }, facts),
      h("p", { className: "asked" }, typeof one.prompt === "string" ? one.prompt : one.prompt.map((turn) => `${turn.role}: ${turn.content}`).join("\n")),
      h("div", { className: "split" }, ["chosen", "rejected"].map((side, i) => answer(one, side, i))));
  }

  function answer(one, side, i) {
    const coloured = on() && one.scores?.[i].tokens?.length;
    const of = coloured && shade(one.scores.flatMap((score) => score.tokens ?? []));
    return h("div", {}, h("h3", {}, side, " ", h("span", { className: "mono quiet" }, number(one[`${side}_score`]))),
      coloured ? tokens(one.scores[i].token_texts, one.scores[i].tokens, of) : h("p", { className: "plain-text" }, one[side]));
  }

  const on = () => colour.getAttribute("aria-pressed") === "true";
  const renew = (one) => { const place = shown.indexOf(one); if (place >= 0 && place < drawn) list.children[place].replaceWith(item(one)); };

  let painting = false;
  async function paint() {
    if (painting) return;
    painting = true;
    try {
      for (let some = waiting(); on() && some.length; some = waiting()) {
        const items = some.flatMap((one) => [one.chosen, one.rejected].map((response) => ({ prompt: one.prompt, response })));
        const { scores } = await post("/score", { items, head, detail: ["tokens"] });
        some.forEach((one, i) => { one.scores = scores.slice(2 * i, 2 * i + 2); renew(one); });
        mark(false);
      }
    } catch (error) {
      colour.setAttribute("aria-pressed", false);
      count.textContent = `The scores of all tokens did not come: ${error.message}`;
    } finally {
      painting = false;
    }
  }
  const waiting = () => shown.slice(0, drawn).filter((one) => !one.scores).slice(0, COLOURED);

  function mark(scroll = true) {
    for (const element of list.querySelectorAll(".at")) element.classList.remove("at");
    while (at >= drawn && drawn < shown.length) draw();
    const element = list.children[at];
    element?.classList.add("at");
    if (scroll) element?.scrollIntoView({ block: "nearest" });
    const told = all.filter((one) => one.decision).length;
    count.textContent = `${shown.length} of ${all.length} pairs, ${told} decided`;
    save.disabled = !told;
  }

  function decide(decision) {
    const one = shown[at];
    if (!one) return;
    one.decision = decision;
    renew(one);
    if (decision && at + 1 < shown.length) at += 1;
    mark();
  }

  function toggle() {
    colour.setAttribute("aria-pressed", !on());
    shown.slice(0, drawn).forEach(renew);
    mark(false);
    if (on()) paint();
  }

  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  save.addEventListener("click", () => {
    const lines = all.filter((one) => one.decision).map((one) => [cell(name.replace(/\.\w+$/, "")), one.i + 1, keyOf(one.prompt, one.chosen, one.rejected), one.decision].join(","));
    const file = new Blob([`${["source,row,key,decision", ...lines].join("\r\n")}\r\n`], { type: "text/csv" });
    const link = h("a", { href: URL.createObjectURL(file), download: "decisions.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  more.addEventListener("click", () => { draw(); mark(false); });
  colour.addEventListener("click", toggle);
  const filters = [text, verdict, column, value, decided, sort, ...Object.values(ranges).flat()];
  for (const control of filters) control.addEventListener("input", filter);

  const key = (event) => {
    if (!list.isConnected) return void document.removeEventListener("keydown", key);
    if (!list.offsetParent || event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const pressed = event.key.toLowerCase();
    if (DECISIONS[pressed]) decide(DECISIONS[pressed]);
    else if (pressed === "u") decide("");
    else if (pressed === "c") toggle();
    else if (pressed === "j" || pressed === "k") {
      at = Math.max(0, Math.min(shown.length - 1, at + (pressed === "j" ? 1 : -1)));
      mark();
    } else return;
    event.preventDefault();
  };
  document.addEventListener("keydown", key);
  const range = (label, [low, high]) => h("div", { className: "range", role: "group", ariaLabel: label }, h("span", {}, label), low, " to ", high);
  const legend = Object.entries({ "j k": "next, back", r: "right", f: "flip", d: "drop", u: "undo", c: "colour" })
    .flatMap(([keys, what]) => [...keys.split(" ").map((one) => h("kbd", {}, one)), ` ${what} `]);
  filter();
  return h("div", { className: "stack" },
    h("div", { className: "card stack" },
      h("h2", {}, "Most suspicious pairs"),
      h("p", { className: "quiet" }, "A head can be wrong, too: read before you flip. The decisions file is for ", h("code", {}, "inward annotate --apply decisions.csv IN OUT"), "; save it before you leave this page."),
      h("div", { className: "row filters" },
        field("Text", text), range("Margin", ranges.margin), range("Label probability", ranges.label_probability), range("Chosen longer by", ranges.longer),
        field("Head", verdict), h("div", { className: "range" }, field("Column", column), value), field("Decided", decided), field("Sort", sort)),
      h("div", { className: "row between" }, h("div", {}, count, h("p", { className: "quiet keys" }, legend)), h("div", { className: "row" }, colour, save)), scale()),
    list, more);
}
