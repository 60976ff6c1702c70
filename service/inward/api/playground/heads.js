// What is loaded: versions, calibration, how well each layer does alone. Versions are switched here, with a key.
import { get, post } from "./api.js";
import { bars } from "./charts.js";
import { facts, h, number, percent } from "./dom.js";

export function heads(panel, listed) {
  const cards = h("div", { className: "split" });
  panel.append(h("div", { className: "stack" },
    h("p", { className: "quiet" }, "Heads read the same states of one model. A version is switched for everybody who calls this server."), cards));
  if (!listed.length) cards.append(h("p", {}, "No head is loaded: fit one with inward fit."));
  for (const { name } of listed) {
    const card = h("article", { className: "card" }, h("h2", {}, name));
    cards.append(card);
    fill(card, name);
  }
}

async function fill(card, name, said = "") {
  try {
    card.replaceChildren(...describe(await get(`/heads/${encodeURIComponent(name)}`), (message) => fill(card, name, message), said));
  } catch (error) {
    card.replaceChildren(h("h2", {}, name), h("p", { className: "problem" }, error.message));
  }
}

function describe(head, again, said) {
  const { calibration = {}, fit = {} } = head;
  const metrics = fit.metrics ?? {};
  const layers = head.layers.length > 6 ? `${head.layers[0]} to ${head.layers.at(-1)} (${head.layers.length})` : head.layers.join(", ");
  const parts = [
    h("h2", {}, head.name), h("p", { className: "quiet" }, `${head.kind} · fitted ${(head.created ?? "").slice(0, 10)} on ${head.backbone?.name ?? "?"}`),
    facts([
      ["layers", layers], ["position", head.position], ["rows", String(fit.rows ?? "–")],
      ...(metrics.accuracy !== undefined ? [["accuracy, held out", percent(metrics.accuracy)]] : []),
      ...(metrics.auc !== undefined ? [["AUC, held out", number(metrics.auc)]] : []),
      ...(calibration.platt ? [["probability", `sigmoid(${number(calibration.platt.slope, 2)} · score ${calibration.platt.intercept < 0 ? "−" : "+"} ${number(Math.abs(calibration.platt.intercept), 2)})`]] : []),
      ...(calibration.margin_std ? [["standard deviation of margins", number(calibration.margin_std)]] : []),
    ]),
  ];
  if (calibration.score_deciles) parts.push(h("h3", {}, "Calibration: tenths of the scores"), tenths(calibration.score_deciles));
  if (Array.isArray(metrics.layers) && metrics.layers.some((one) => one.accuracy !== undefined)) parts.push(h("h3", {}, "Accuracy of each layer alone"), perLayer(metrics.layers));
  parts.push(versions(head, again), h("p", { className: "quiet", role: "status" }, said));
  return parts;
}

function tenths(edges) {
  const gaps = edges.slice(1).map((edge, i) => ({ value: 0.1 / Math.max(1e-9, edge - edges[i]), said: `a tenth of the scores from ${number(edges[i])} to ${number(edge)}` }));
  return bars(gaps, `Density of calibration scores, from ${number(edges[0])} to ${number(edges.at(-1))}`, [number(edges[0], 2), number(edges.at(-1), 2)]);
}

function perLayer(layers) {
  const heights = layers.map((one) => ({ value: one.accuracy, said: `layer ${one.layer}: ${percent(one.accuracy)}` }));
  const top = layers.reduce((a, b) => (b.accuracy > a.accuracy ? b : a));
  return bars(heights, `Accuracy of ${layers.length} layers; the best is layer ${top.layer} with ${percent(top.accuracy)}`, [`layer ${layers[0].layer}`, `layer ${layers.at(-1).layer}`], 0.5);
}

function versions(head, again) {
  const select = h("select", { ariaLabel: `Version of ${head.name}` }, (head.versions ?? [head.version]).map((version) =>
    h("option", { value: version, selected: version === head.version }, `version ${version}${version === head.version ? " (active)" : ""}`)));
  const button = h("button", { type: "button", className: "plain", ariaLabel: `Activate this version of ${head.name}` }, "Activate");
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const now = await post(`/heads/${encodeURIComponent(head.name)}/activate`, { version: Number(select.value) });
      again(`Version ${now.version} is active.`);
    } catch (error) {
      again(error.message);
    }
  });
  return h("div", { className: "row", style: "margin-top:.8rem" }, select, button);
}
