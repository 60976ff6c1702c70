// A file of pairs: margins of all, where they lie, and the labels that look wrong.
import { get, post, text, upload } from "./api.js";
import { histogram } from "./charts.js";
import { headSelect } from "./choosing.js";
import { field, figures, h, percent } from "./dom.js";
import { review } from "./review.js";
import { read } from "./rows.js";

const CHUNK = 16;
const LOOK_MS = 500;
const COLUMNS = ["margin", "margin_scaled", "bin", "chosen_score", "rejected_score", "label_agrees", "label_probability", "confidence", "error"];

export function data(panel, listed) {
  const head = headSelect(listed, ["hybrid", "ensemble", "legend"]);
  const file = h("input", { type: "file", accept: ".jsonl,.ndjson,.json,application/x-ndjson" });
  const out = h("div", { className: "stack" });
  const drop = h("div", { className: "drop" }, h("p", {}, "Drop a JSONL file of pairs here, or"), field("choose one: ", file),
    h("p", { className: "quiet" }, "One object a line, with prompt, chosen and rejected: texts, chat messages, or transcripts of Human and Assistant. It goes to this server and nowhere else."));
  const take = async (chosen) => {
    if (!chosen) return;
    try {
      await work(out, chosen, head.value);
    } catch (error) {
      out.replaceChildren(h("p", { className: "problem", role: "alert" }, error.message));
    }
  };
  file.addEventListener("change", () => take(file.files[0]));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); });
  panel.append(h("div", { className: "stack" }, h("div", { className: "row" }, field("Head", head)), drop, out));
}

function parse(content) {
  return content.split("\n").filter((line) => line.trim()).map((line, i) => {
    try {
      return JSON.parse(line);
    } catch {
      throw new Error(`line ${i + 1} is not JSON`);
    }
  });
}

async function work(out, file, head) {
  const rows = parse(await file.text());
  if (!rows.length) throw new Error("the file has no rows");
  const progress = h("progress", { max: rows.length, value: 0, ariaLabel: "Pairs scored" });
  const said = h("p", { className: "quiet", role: "status" }, `0 of ${rows.length}`);
  out.replaceChildren(h("div", { className: "card" }, said, progress));
  const found = rows.map(pairOf);
  const pairs = found.filter((one) => !one.error);
  const tell = (done) => { progress.value = rows.length - pairs.length + done; said.textContent = `${progress.value} of ${rows.length}`; };
  tell(0);
  const scored = pairs.length ? await ((await get("/info")).jobs ? byJob : byRequests)(pairs, head, tell) : [];
  let next = 0;
  const margins = found.map((one) => (one.error ? one : scored[next++]));
  show(out, file.name, rows, found, margins, head);
}

function pairOf(row) {
  try {
    return read(row);
  } catch (error) {
    return { error: { message: error.message } };
  }
}

async function byJob(pairs, head, tell) {
  let job = await upload(`/jobs?kind=margin&head=${encodeURIComponent(head)}`, pairs.map((pair) => JSON.stringify(pair)).join("\n"));
  while (job.state === "running") {
    tell(job.done);
    await new Promise((wake) => setTimeout(wake, LOOK_MS));
    job = await get(`/jobs/${job.id}`);
  }
  return (await text(`/jobs/${job.id}/results`)).split("\n").filter(Boolean).map((line) => JSON.parse(line));
}

async function byRequests(pairs, head, tell) {
  const margins = [];
  for (let i = 0; i < pairs.length; i += CHUNK) {
    margins.push(...(await chunk(pairs.slice(i, i + CHUNK), head)));
    tell(margins.length);
  }
  return margins;
}

// A request in which nothing can be scored is an error; then each row has its own.
async function chunk(pairs, head) {
  try {
    return (await post("/margin", { pairs, head })).margins;
  } catch (error) {
    if (error.status !== 422 && error.status !== 413) throw error;
    if (pairs.length === 1) return [{ error: { message: error.message } }];
    return (await Promise.all(pairs.map((pair) => chunk([pair], head)))).flat();
  }
}

function show(out, name, rows, found, margins, head) {
  const good = margins.map((margin, i) => ({ ...margin, i })).filter((one) => typeof one.margin === "number");
  const wrong = good.filter((one) => one.label_agrees === false);
  const pairs = good.map((one) => ({ ...one, row: rows[one.i], ...found[one.i] }));
  const bad = margins.findIndex((one) => typeof one.margin !== "number");
  const chart = good.length ? histogram(good.map((one) => one.margin), "Margins", 0) : "";
  const blob = new Blob([rows.map((row, i) => `${JSON.stringify({ ...row, ...columns(margins[i]) })}\n`).join("")], { type: "application/x-ndjson" });
  const download = h("a", { href: URL.createObjectURL(blob), download: name.replace(/(\.\w+)?$/, ".margins.jsonl") }, "Download with columns");
  out.replaceChildren(
    h("div", { className: "card stack" },
      figures([
        ["pairs", String(rows.length)], ["could not be scored", String(rows.length - good.length)],
        ["labels that look flipped", `${wrong.length} (${percent(good.length ? wrong.length / good.length : 0)})`, wrong.length ? "bad" : ""],
      ]), chart, bad < 0 ? "" : h("p", { className: "quiet" }, `Row ${bad + 1} could not be scored: ${margins[bad].error?.message ?? "it has no finite margin"}`),
      h("p", {}, download)),
    good.length ? review(name, pairs, head) : "");
}

function columns(margin) {
  return Object.fromEntries(COLUMNS.filter((name) => margin?.[name] !== undefined && margin[name] !== null)
    .map((name) => [name, name === "error" ? margin.error.message : margin[name]]));
}
