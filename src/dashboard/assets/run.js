// A run: five questions answered at a glance, its curves, what happened; and several runs over one another.
import { h, fill, api, si, digits, bytes, percent, duration, withUnit, time, loading, empty, broken, link, remember, parameter, swatch } from "/assets/dom.js";
import { Chart, lineColour } from "/assets/chart.js";

/** The plots of a run: their title, unit, figures with a name in the plot, and how they are drawn. */
const PLOTS = [
  { title: "Loss", unit: "nats/token", figures: [["loss", "Loss"], ["mtp_loss", "MTP loss"]] },
  { title: "Validation loss", unit: "nats/token", figures: [["validation_loss", "Validation loss"]], marked: true },
  { title: "Tokens per second", unit: "tokens/s", figures: [["tokens_per_second", "Tokens per second"]] },
  { title: "Gradient norm", unit: "", figures: [["grad_norm", "Gradient norm"]], log: true },
  { title: "Utilization", unit: "ratio", figures: [["mfu", "MFU"], ["bubble_share", "bubble"]] },
  { title: "MaxVio", unit: "", figures: [["max_vio", "MaxVio"]] },
  { title: "Learning rate", unit: "", figures: [["learning_rate", "Learning rate"]] },
  { title: "Step time", unit: "s", figures: [["seconds", "Step time"]] },
  { title: "Memory", unit: "B", figures: [["memory_bytes", "Memory"]] },
  { title: "Sent in a step", unit: "B", figures: [["sent_bytes", "Sent in a step"]] },
];
const POINTS = 900;

const finite = (value) => value !== null && value !== undefined;
const figureOf = (overview, key) => overview.figures.find((figure) => figure.key === key)?.last;

/** Controls that all plots share; they are part of the address. */
function tools(state, changed) {
  const axis = h("select", { onchange: (event) => { state.axis = event.target.value; state.from = state.to = null; remember({ axis: state.axis === "step" ? null : state.axis, from: null, to: null }); changed("data"); } },
    [["step", "steps"], ["tokens", "tokens"], ["time", "training time"]].map(([value, words]) => h("option", { value, selected: value === state.axis }, words)));
  const amount = h("span", {}, state.smooth ? `${Math.round(1 / (1 - state.smooth))} points` : "off");
  const smooth = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: state.smooth, oninput: (event) => { state.smooth = Number(event.target.value); fill(amount, state.smooth ? `${Math.round(1 / (1 - state.smooth))} points` : "off"); remember({ smooth: state.smooth || null }); changed("smooth"); } });
  const all = h("button", { onclick: () => { state.from = state.to = null; remember({ from: null, to: null }); changed("data"); }, hidden: !finite(state.from) }, "Whole run");
  state.showReset = () => { all.hidden = !finite(state.from); };
  return h("div", { class: "tools" }, h("label", {}, "over", axis), h("label", {}, "smoothing", smooth, amount), all, h("span", { class: "note" }, "Drag over a plot to zoom, double click for the whole run."));
}

function stateFromAddress() {
  const number = (key) => (parameter(key) === null ? null : Number(parameter(key)));
  return { axis: parameter("axis") ?? "step", smooth: number("smooth") ?? 0, from: number("from"), to: number("to") };
}

const query = (state, figures, points = POINTS) => {
  const parts = new URLSearchParams({ figures: figures.join(","), axis: state.axis, points: String(points) });
  if (finite(state.from)) { parts.set("from", state.from); parts.set("to", state.to); }
  return parts;
};

function headline(overview) {
  const layout = overview.layout;
  const words = layout ? `${layout.model} · ${layout.world} rank${layout.world === 1 ? "" : "s"}: pipeline ${layout.pipeline} × expert ${layout.expert} × data ${layout.data} · ${layout.schedule}` : "";
  return h("div", { class: "head" }, h("h1", {}, overview.name), h("span", { class: `pill ${overview.phase}` }, overview.phase), h("span", { class: "sub" }, words));
}

function tiles(overview, trend) {
  const loss = figureOf(overview, "loss"), vio = figureOf(overview, "max_vio"), memory = overview.peak_memory, planned = overview.planned_memory;
  const tile = (ask, big, more, mood) => h("div", { class: "card tile" }, h("div", { class: "ask" }, ask), h("div", { class: `big ${mood ?? ""}` }, big), h("div", { class: "more" }, more));
  const troubles = overview.warnings + overview.skipped + overview.rollbacks + (overview.phase === "failed" ? 1 : 0);
  const latest = overview.annotations.filter((note) => ["warning", "failure", "skipped", "rollback"].includes(note.kind)).at(-1);
  const validation = figureOf(overview, "validation_loss");
  const isOpen = ["training", "starting"].includes(overview.phase);
  const fall = trend === null ? "" : trend < 0 ? `▼ ${digits(-trend)} over the latest half` : `▲ ${digits(trend)} over the latest half`;
  return h("div", { class: "tiles" },
    tile("Is it learning?", finite(loss) ? [digits(loss), h("small", {}, " nats/token")] : "–", [fall, validation ? ` · validation ${digits(validation)}` : ""], trend !== null && trend > 0 ? "warn" : ""),
    tile("Is it fast?", [si(figureOf(overview, "tokens_per_second")), h("small", {}, " tokens/s")], `MFU ${percent(figureOf(overview, "mfu"))} · bubble ${percent(figureOf(overview, "bubble_share"))} · ${duration(figureOf(overview, "seconds"))} a step`),
    tile("Is it balanced?", finite(vio) ? [digits(vio), h("small", {}, " MaxVio")] : "–", "largest load of an expert above the mean; 0 is even"),
    tile("Is anything wrong?", troubles ? `${troubles} notice${troubles === 1 ? "" : "s"}` : "nothing", latest ? latest.text : memory ? `memory at most ${bytes(memory)}, of which the ranks were planned to need ${bytes(planned)}` : "", troubles ? (overview.phase === "failed" ? "bad" : "warn") : "good"),
    tile("What happens next?", isOpen ? (overview.seconds_left !== null ? [duration(overview.seconds_left), h("small", {}, " left")] : "–") : overview.phase, isOpen ? `step ${overview.step} of ${overview.steps ?? "–"} · ${si(overview.tokens)} tokens` : overview.outcome || `${overview.step} steps, ${si(overview.tokens)} tokens`));
}

/** Change of a figure from the middle of the latest half to its end, by means of a quarter each. */
function trendOf(values) {
  const known = values.filter(finite), quarter = Math.floor(known.length / 4);
  if (quarter < 2) return null;
  const mean = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
  return mean(known.slice(-quarter)) - mean(known.slice(-2 * quarter, -quarter));
}

const notesOf = (overview) => [...overview.annotations, ...overview.checkpoints.map((step) => ({ step, kind: "checkpoint", text: `checkpoint of step ${step}` }))].sort((a, b) => a.step - b.step);

function happenings(overview) {
  const notes = notesOf(overview).reverse();
  return h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "What happened"), h("span", { class: "unit" }, notes.length ? `${notes.length} entries` : "")),
    notes.length ? h("ul", { class: "list log" }, notes.slice(0, 200).map((note) => h("li", { id: `step-${note.step}` }, h("span", { class: "when" }, `step ${note.step}`), h("span", { class: `tag ${note.kind}` }, note.kind), h("span", {}, note.text)))) : empty("Nothing yet", "Checkpoints, warnings, skipped batches and roll-backs are noted here."));
}

export async function runPage(main, id) {
  const path = `/runs/${encodeURIComponent(id)}`;
  const state = stateFromAddress();
  // Of each plot a series of its own: thinned together, many figures would share few points.
  let overview = await api(path), series = null, stopped = false;
  const top = h("div"), below = h("div"), grid = h("div", { class: "charts" });
  const charts = PLOTS.map((plot) => new Chart({ ...plot, axis: state.axis, onzoom: (from, to) => { state.from = from; state.to = to; remember({ from, to }); state.showReset(); data(); } }));
  fill(grid, charts.map((chart) => chart.element));

  const placeNotes = () => {
    const first = series[0];
    const place = (step) => { if (state.axis === "step") return step; const next = first.step.findIndex((other) => other >= step); return next < 0 ? first.x.at(-1) : first.x[next]; };
    const [from, to] = [first.x[0], first.x.at(-1)];
    return notesOf(overview).map((note) => ({ ...note, x: place(note.step) })).filter((note) => note.x >= from && note.x <= to).slice(-150);
  };
  const draw = () => {
    fill(top, headline(overview), h("div", { class: "meter", role: "progressbar", "aria-label": "Steps made", "aria-valuemin": 0, "aria-valuemax": overview.steps ?? 0, "aria-valuenow": overview.step }, h("div", { css: { width: `${overview.steps ? (100 * overview.step) / overview.steps : 0}%` } })),
      tiles(overview, series ? trendOf(series[0].figures.loss) : null));
    fill(below, happenings(overview));
    if (!series) return;
    const notes = placeNotes();
    charts.forEach((chart, i) => {
      chart.axis = state.axis;
      const some = PLOTS[i].figures.filter(([key]) => series[i].figures[key].some(finite));
      chart.element.hidden = !some.length && PLOTS[i].title !== "Loss" && !["training", "starting", "loading"].includes(overview.phase);
      chart.set(some.map(([key, label]) => ({ label, x: series[i].x, y: series[i].figures[key], colour: PLOTS[i].figures.findIndex(([other]) => other === key) })), notes);
    });
  };
  const data = async () => {
    const wanted = await Promise.all(PLOTS.map((plot) => api(`${path}/series?${query(state, plot.figures.map(([key]) => key))}`)));
    if (stopped) return;
    series = wanted; draw();
  };
  fill(main, top, tools(state, (what) => (what === "smooth" ? charts.forEach((chart) => chart.setSmooth(state.smooth)) : data().catch((error) => fill(below, broken(error))))), grid, below,
    h("footer", {}, h("a", { href: `/api/v1${path}/series.csv`, download: `${id}.csv` }, "Every step as CSV"), h("a", { href: "/metrics" }, "Prometheus metrics"), h("a", { href: "/api/v1/openapi.json" }, "API")));
  charts.forEach((chart) => { chart.smooth = state.smooth; });
  draw();
  await data();

  const liveMark = () => document.getElementById("live");
  const source = new EventSource(`/api/v1${path}/live?after=${series[0].step.at(-1) ?? 0}`);
  let due = null;
  // However fast steps come, the page draws a few times a second.
  const soon = (what) => { if (due) return; due = setTimeout(async () => { due = null; if (stopped) return; try { await what(); } catch { /* the stream says so */ } }, 400); };
  let seen = series[0].step.at(-1) ?? 0;
  source.addEventListener("steps", (event) => {
    const { points } = JSON.parse(event.data);
    const keys = overview.figures.map((figure) => figure.key);
    if (finite(state.from)) return;
    for (const point of points.filter((point) => point.step > seen)) {
      seen = point.step;
      for (const one of series) {
        one.x.push(state.axis === "step" ? point.step : state.axis === "tokens" ? point.tokens : point.seconds);
        one.step.push(point.step);
        for (const [key, values] of Object.entries(one.figures)) values.push(point.values[keys.indexOf(key)]);
      }
      overview.step = point.step;
    }
    const isLong = series.some((one) => one.x.length > 3 * POINTS);
    soon(async () => { overview = await api(path); isLong ? await data() : draw(); });
  });
  source.addEventListener("reset", (event) => { seen = JSON.parse(event.data).step; soon(async () => { overview = await api(path); await data(); }); });
  source.addEventListener("state", (event) => { const news = JSON.parse(event.data); if (news.phase !== overview.phase || news.notes !== overview.annotations.length) soon(async () => { overview = await api(path); draw(); }); });
  source.addEventListener("open", () => liveMark() && fill(liveMark(), h("span", { class: "pill training", title: "New steps appear as they are made" }, "live")));
  source.addEventListener("error", () => { if (liveMark()) fill(liveMark(), h("span", { class: "pill failed", title: "The process does not answer. A run that is over is shown by: contraflow dashboard RUN" }, source.readyState === 2 ? "ended" : "reconnecting")); });
  return () => { stopped = true; clearTimeout(due); source.close(); charts.forEach((chart) => chart.destroy()); if (liveMark()) fill(liveMark()); };
}

/** Runs over one another. */
export async function comparePage(main, about) {
  const state = stateFromAddress();
  const named = parameter("runs")?.split(",").filter(Boolean);
  const chosen = new Set(named ?? about.runs.slice(0, 6).map((run) => run.id));
  const plots = PLOTS.filter((plot) => !["Memory", "Sent in a step"].includes(plot.title)).flatMap((plot) => plot.figures.map(([key, words]) => ({ ...plot, key, title: plot.figures.length > 1 ? words[0].toUpperCase() + words.slice(1) : plot.title })));
  const charts = plots.map((plot) => new Chart({ ...plot, sync: "compare", onzoom: (from, to) => { state.from = from; state.to = to; remember({ from, to }); state.showReset(); data(); } }));
  const colourOf = (id) => about.runs.findIndex((run) => run.id === id);
  const problem = h("p", { class: "fault", role: "alert" });
  const data = async () => {
    const ids = about.runs.map((run) => run.id).filter((id) => chosen.has(id));
    const keys = plots.map((plot) => plot.key), pairs = keys.filter((_, i) => i % 2 === 0).map((key) => keys.slice(keys.indexOf(key), keys.indexOf(key) + 2));
    const of = async (id) => { const found = {}; for (const series of await Promise.all(pairs.map((pair) => api(`/runs/${encodeURIComponent(id)}/series?${query(state, pair)}`)))) for (const [key, y] of Object.entries(series.figures)) found[key] = { x: series.x, y }; return found; };
    const all = await Promise.all(ids.map(of));
    charts.forEach((chart, i) => {
      chart.axis = state.axis;
      const lines = all.map((series, k) => ({ label: ids[k], ...series[plots[i].key], colour: colourOf(ids[k]) })).filter((line) => line.y.some(finite));
      chart.element.hidden = lines.length === 0 && plots[i].title !== "Loss";
      chart.set(lines, []);
    });
  };
  const safely = () => data().then(() => fill(problem), (error) => fill(problem, error.message));
  const boxes = about.runs.map((run) => h("label", {}, h("input", { type: "checkbox", checked: chosen.has(run.id), onchange: (event) => { event.target.checked ? chosen.add(run.id) : chosen.delete(run.id); remember({ runs: [...chosen].join(",") }); safely(); } }), swatch(lineColour(colourOf(run.id))), run.name, " ", h("span", { class: "unit" }, `${run.step} steps`)));
  fill(main, h("div", { class: "head" }, h("h1", {}, "Runs over one another")), h("div", { class: "tools" }, boxes), tools(state, (what) => (what === "smooth" ? charts.forEach((chart) => chart.setSmooth(state.smooth)) : safely())), problem, h("div", { class: "charts" }, charts.map((chart) => chart.element)));
  charts.forEach((chart) => { chart.smooth = state.smooth; });
  await safely();
  // What is still being read fills up.
  const again = setInterval(() => { if (!finite(state.from)) safely(); }, 5000);
  return () => { clearInterval(again); charts.forEach((chart) => chart.destroy()); };
}

/** Texts that the model has written while it trained. */
export async function samplesPage(main, id) {
  const { samples } = await api(`/runs/${encodeURIComponent(id)}/samples`);
  fill(main, h("div", { class: "head" }, h("h1", {}, "Samples"), h("span", { class: "sub" }, "what the model made of the same beginning, the latest first")),
    samples.length ? samples.map((sample) => h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, `After step ${sample.step}`)), h("div", { class: "body" }, h("pre", {}, sample.text)))) : empty("No samples", "A recipe with sample.every makes the run write a text now and then."));
  return null;
}
