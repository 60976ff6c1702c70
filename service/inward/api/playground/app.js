// Tabs, the key, and what the page knows of the service. Each tab is a module that fills its panel when it is first seen.
import { get, setKey } from "./api.js";
import { h } from "./dom.js";
import { best } from "./best.js";
import { chat } from "./chat.js";
import { compare } from "./compare.js";
import { data } from "./data.js";
import { heads } from "./heads.js";

const MAKERS = { compare, best, chat, data, heads };
const tabs = [...document.querySelectorAll("[role=tab]")];
const made = new Set();

function select(tab, { focus = false } = {}) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  const name = tab.getAttribute("aria-controls");
  history.replaceState(null, "", `#${name}`);
  fill(name);
}

async function fill(name) {
  if (made.has(name)) return;
  const panel = document.getElementById(name);
  try {
    const listed = (await get("/heads")).heads;
    if (made.has(name)) return;
    made.add(name);
    panel.replaceChildren();
    MAKERS[name](panel, listed);
  } catch (error) {
    panel.replaceChildren(h("p", { className: "problem", role: "alert" }, error.message));
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length], { focus: true });
  });
}

async function about() {
  const info = await get("/info").catch(() => null);
  if (info) document.getElementById("about").textContent = `${info.model} · ${info.layers} layers · ${info.dtype} · policy ${info.policy_version}`;
}

document.querySelector("form.key").addEventListener("submit", (event) => {
  event.preventDefault();
  document.activeElement.blur(); // which is a change, where there was one
});
document.getElementById("key").addEventListener("change", (event) => {
  setKey(event.target.value);
  about();
  fill(tabs.find((tab) => tab.tabIndex !== -1).getAttribute("aria-controls"));
});
about();
select(tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0]);
