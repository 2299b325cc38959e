// The frame of the page: which page an address means, the bar above it, light and dark, logging in.
import { h, fill, api, loading, broken, empty, link, go } from "/assets/dom.js";
import { runPage, comparePage, samplesPage } from "/assets/run.js";
import { pipelinePage } from "/assets/pipeline.js";
import { expertsPage } from "/assets/experts.js";
import { layersPage } from "/assets/layers.js";
import { clusterPages, clusterTabs } from "/assets/cluster.js";

const RUN_PAGES = [["", "Run", runPage], ["pipeline", "Pipeline", pipelinePage], ["experts", "Experts", expertsPage], ["layers", "Layers", layersPage], ["samples", "Samples", samplesPage]];
const top = document.getElementById("top"), main = document.getElementById("main");
let about = null, leave = null, turn = 0;

const kept = localStorage.getItem("theme");
const preferred = matchMedia("(prefers-color-scheme: dark)");
function paint(theme) { document.documentElement.dataset.theme = theme; dispatchEvent(new Event("theme")); }
paint(kept ?? (preferred.matches ? "dark" : "light"));
preferred.addEventListener("change", (event) => { if (!localStorage.getItem("theme")) paint(event.matches ? "dark" : "light"); });
const themeButton = h("button", { class: "plain", "aria-label": "Switch between light and dark", title: "Light or dark", onclick: () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", next); paint(next);
} }, "◐");

function place() {
  const [first = "", id = "", page = ""] = location.pathname.split("/").slice(1).map(decodeURIComponent);
  return { first, id, page };
}

function bar(here) {
  const tabs = [];
  const tab = (href, words, current) => tabs.push(link(href, { "aria-current": current ? "page" : null }, words));
  if (about?.kind === "cluster") for (const [name, words] of clusterTabs) tab(`/${name}`, words, here.first === name || (here.first === "" && name === "jobs"));
  if (here.first === "run") for (const [name, words] of RUN_PAGES) tab(`/run/${encodeURIComponent(here.id)}${name ? `/${name}` : ""}`, words, here.page === name);
  if (about?.kind !== "cluster" && (about?.runs.length ?? 0) > 1) {
    tab("/compare", "Compare", here.first === "compare");
    tab("/runs", "Runs", here.first === "runs" || here.first === "");
  }
  const picker = here.first === "run" && (about?.runs.length ?? 0) > 1
    ? h("select", { "aria-label": "Run", onchange: (event) => go(`/run/${encodeURIComponent(event.target.value)}${here.page ? `/${here.page}` : ""}`) },
      about.runs.map((run) => h("option", { value: run.id, selected: run.id === here.id }, run.name)))
    : null;
  fill(top, h("div", { class: "bar" },
    link("/", { class: "brand", "aria-label": "Contraflow, first page" }, h("img", { src: "/assets/icon.svg", alt: "" }), "Contraflow"),
    h("nav", { "aria-label": "Pages" }, tabs), h("span", { class: "grow" }), picker, h("span", { id: "live" }), themeButton));
}

function runsPage(main) {
  const { duration, digits } = numbers;
  fill(main, h("div", { class: "head" }, h("h1", {}, "Runs")), about.runs.length === 0 ? empty("No runs", "contraflow dashboard RUN shows the runs it is given.") :
    h("div", { class: "card scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Run", "State"].map((words) => h("th", {}, words)), ["Step", "Loss, nats/token", "Validation, nats/token", "Left"].map((words) => h("th", { class: "n" }, words)))),
      h("tbody", {}, about.runs.map((run) => h("tr", {},
        h("td", {}, link(`/run/${encodeURIComponent(run.id)}`, {}, run.name)), h("td", {}, h("span", { class: `pill ${run.phase}` }, run.phase)),
        h("td", { class: "n" }, `${run.step}${run.steps ? ` / ${run.steps}` : ""}`), h("td", { class: "n" }, digits(run.loss)), h("td", { class: "n" }, digits(run.validation_loss)),
        h("td", { class: "n" }, run.phase === "training" ? duration(run.seconds_left) : "–")))))));
}
const numbers = await import("/assets/dom.js");

function logIn(main) {
  const faults = h("p", { class: "fault", role: "alert" });
  const token = h("input", { type: "password", name: "token", autocomplete: "current-password", "aria-label": "Token", size: 40 });
  fill(top, h("div", { class: "bar" }, h("span", { class: "brand" }, h("img", { src: "/assets/icon.svg", alt: "" }), "Contraflow"), h("span", { class: "grow" }), themeButton));
  fill(main, h("form", { class: "card form section", onsubmit: async (event) => {
    event.preventDefault();
    const response = await fetch("/login", { method: "POST", headers: { "content-type": "application/json", "x-contraflow-action": "1" }, body: JSON.stringify({ token: token.value }) });
    if (response.ok) show(); else fill(faults, (await response.json().catch(() => ({}))).faults?.join("; ") ?? "Refused");
  } }, h("div", { class: "title" }, h("h1", {}, "Token")), h("div", { class: "body form" }, h("p", { class: "note" }, "This dashboard can be reached by others than this machine. Its token is what the command was given."), h("div", { class: "row" }, token, h("button", { class: "primary" }, "Log in")), faults)));
  token.focus();
}

async function show() {
  const mine = ++turn;
  leave?.(); leave = null;
  const here = place();
  fill(main, loading());
  try { about = await api(""); }
  catch (error) {
    if (mine !== turn) return;
    bar(here);
    if (error.status === 401) return logIn(main);
    return fill(main, broken(error));
  }
  if (mine !== turn) return;
  if (here.first === "" && about.kind === "runs" && about.runs.length === 1) { history.replaceState(null, "", `/run/${encodeURIComponent(about.runs[0].id)}`); return show(); }
  bar(here);
  document.title = here.id ? `${here.id} · Contraflow` : "Contraflow";
  const pages = about.kind === "cluster" ? clusterPages : {};
  try {
    if (here.first === "run") {
      const page = RUN_PAGES.find(([name]) => name === here.page);
      leave = page ? await page[2](main, here.id, about) : notThere(here);
    } else if (here.first === "compare") leave = await comparePage(main, about);
    else if (pages[here.first || "jobs"]) leave = await pages[here.first || "jobs"](main, here, about);
    else if (here.first === "" || here.first === "runs") leave = runsPage(main);
    else leave = notThere(here);
  } catch (error) { fill(main, broken(error)); }
  if (mine !== turn) { leave?.(); leave = null; }
}

function notThere() { fill(main, empty("There is no such page", "The address may be of another version, or mistyped.")); return null; }

addEventListener("popstate", show);
addEventListener("moved", () => { show().then(() => main.focus({ preventScroll: true })); scrollTo(0, 0); });
show();
