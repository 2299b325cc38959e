// The experts: who gets how many tokens, now and over time.
import { h, fill, api, empty, broken, canvas, heat, colour, si, digits, percent, remember, parameter } from "/assets/dom.js";
import { Chart } from "/assets/chart.js";
import { placementCard } from "/assets/placement.js";

/** A heat map. `rows`: [{ label, values }]; a value of 1 is the mean. */
function heatMap(label, rows, columns, { unit, of, onpick, rowHeight }) {
  const tall = rowHeight ?? Math.max(6, Math.min(22, Math.floor(420 / Math.max(rows.length, 1))));
  const left = 78, bottom = 22;
  const tip = h("div", { class: "tip", hidden: true });
  const { element, redraw } = canvas(rows.length * tall + bottom, label, (context, width) => {
    const wide = (width - left) / columns.length;
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    rows.forEach((row, i) => {
      row.values.forEach((value, k) => {
        context.fillStyle = value === null || value === undefined ? colour("--faint") : heat(of(value));
        context.fillRect(left + k * wide, i * tall, Math.max(wide - (wide > 5 ? 1 : 0), 0.7), tall - (tall > 5 ? 1 : 0));
        if (value === 0) { context.strokeStyle = colour("--bad"); context.lineWidth = 1; context.strokeRect(left + k * wide + 0.5, i * tall + 0.5, Math.max(wide - 2, 0.5), tall - 2); }
      });
      const every = Math.ceil(14 / tall);
      if (i % every === 0) { context.fillStyle = colour("--soft"); context.textAlign = "right"; context.fillText(row.label, left - 8, i * tall + tall / 2); }
    });
    context.textAlign = "center"; context.fillStyle = colour("--soft");
    const every = Math.max(1, Math.ceil(columns.length / Math.max(2, (width - left) / 56)));
    columns.forEach((column, k) => { if (k % every === 0) context.fillText(column, Math.min(left + (k + 0.5) * wide, width - 14), rows.length * tall + bottom / 2); });
  });
  const at = (event) => { const k = Math.floor((event.offsetX - left) / ((element.clientWidth - left) / columns.length)), i = Math.floor(event.offsetY / tall); return rows[i]?.values[k] === undefined ? null : { row: rows[i], column: columns[k], value: rows[i].values[k], k, i }; };
  element.addEventListener("mousemove", (event) => {
    const hit = at(event);
    tip.hidden = !hit;
    if (!hit) return;
    tip.textContent = `${hit.row.long ?? hit.row.label}, ${unit(hit.column)}\n${hit.row.tell(hit.value, hit.k)}`;
    tip.style.left = `${Math.min(event.offsetX + 12, element.clientWidth - 190)}px`; tip.style.top = `${event.offsetY + 14}px`;
  });
  element.addEventListener("mouseleave", () => { tip.hidden = true; });
  if (onpick) { element.style.cursor = "pointer"; element.addEventListener("click", (event) => { const hit = at(event); if (hit) onpick(hit); }); }
  return { element: h("div", { class: "canvas" }, element, tip), redraw };
}

const scale = () => h("div", { class: "legend" }, h("span", {}, "tokens of an expert against the mean of its layer:"), [0, 0.5, 1, 1.5, 2, 3].map((share) => h("span", {}, h("span", { class: "swatch", css: { background: heat(share / 3) } }), `${share} ×`)), h("span", {}, h("span", { class: "swatch", css: { background: "transparent", border: "1px solid var(--bad)" } }), "no token at all"));

export async function expertsPage(main, id) {
  const path = `/runs/${encodeURIComponent(id)}/experts`;
  const state = { layer: parameter("layer"), step: parameter("step") };
  const now = h("div", { class: "body" }), overTime = h("div", { class: "body" }), words = h("span", { class: "unit" }), timeWords = h("span", { class: "unit" }), figures = h("div", { class: "tiles" }), absent = h("p", { class: "note" });
  const vio = new Chart({ title: "MaxVio by layer", unit: "", sync: "experts", height: 210 });
  const slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Step", oninput: (event) => { const at = Number(event.target.value); state.step = at >= steps.length ? null : String(steps[at]); remember({ step: state.step }); refresh(); } });
  const picker = h("select", { "aria-label": "Layer", onchange: (event) => { state.layer = event.target.value; remember({ layer: state.layer }); refresh(); } });
  const placement = placementCard(id, (layer) => { state.layer = layer; remember({ layer }); refresh(); });
  let steps = [], stopped = false, busy = false;

  const relative = (counts) => { const mean = counts.reduce((sum, count) => sum + count, 0) / Math.max(counts.length, 1); return counts.map((count) => (mean ? count / mean : 0)); };
  const refresh = async () => {
    if (busy) return;
    busy = true;
    try {
      const parts = new URLSearchParams();
      if (state.layer !== null) parts.set("layer", state.layer);
      if (state.step !== null) parts.set("step", state.step);
      const view = await api(`${path}?${parts}`);
      if (stopped) return;
      placement.show(state.layer);
      steps = view.steps; slider.max = String(steps.length);
      if (state.step === null) slider.value = String(steps.length);
      if (!view.layers.length) {
        fill(now, empty("No loads yet", view.max_vio.some((sample) => Object.keys(sample.layers).length) ? "Of this run only MaxVio is known: the tokens of single experts were not recorded." : "The model has no mixture layers, or no step has been made yet."));
        fill(overTime); fill(figures);
      } else {
        const experts = view.layers[0].counts.length, idle = view.layers.reduce((sum, layer) => sum + layer.idle, 0), worst = view.layers.reduce((a, b) => (b.max_vio > a.max_vio ? b : a));
        const all = view.layers.reduce((sum, layer) => sum + layer.max_vio, 0) / view.layers.length;
        const tile = (ask, big, more, mood) => h("div", { class: "card tile" }, h("div", { class: "ask" }, ask), h("div", { class: `big ${mood ?? ""}` }, big), h("div", { class: "more" }, more));
        fill(figures, tile("MaxVio, mean of layers", digits(all), "(largest load − mean) / mean; 0 is even"), tile("Most uneven layer", `layer ${worst.layer}`, `MaxVio ${digits(worst.max_vio)}`), tile("Experts without a token", String(idle), `of ${experts * view.layers.length} in step ${view.step}`, idle ? "warn" : "good"), tile("Layers × experts", `${view.layers.length} × ${experts}`, `${si(view.layers[0].counts.reduce((a, b) => a + b, 0))} choices a layer and step`));
        fill(words, `tokens per expert in step ${view.step}`);
        const rows = view.layers.map((layer) => ({ label: `layer ${layer.layer}`, values: relative(layer.counts), tell: (share, k) => `${si(layer.counts[k])} tokens, ${digits(share)} × the mean` }));
        fill(now, heatMap(`Load by layer and expert in step ${view.step}`, rows, view.layers[0].counts.map((_, i) => String(i)), { unit: (column) => `expert ${column}`, of: (share) => share / 3, onpick: (hit) => { state.layer = String(view.layers[hit.i].layer); remember({ layer: state.layer }); refresh(); } }).element);
        fill(picker, view.layers.map((layer) => h("option", { value: String(layer.layer), selected: layer.layer === view.layer }, `layer ${layer.layer}`)));
        fill(timeWords, `tokens per expert of layer ${view.layer}, step by step`);
        const timeRows = view.over_time.length ? view.over_time[0].counts.map((_, expert) => ({ label: String(expert), long: `expert ${expert}`, values: view.over_time.map((sample) => relative(sample.counts)[expert]), tell: (share, k) => `${si(view.over_time[k].counts[expert])} tokens, ${digits(share)} × the mean` })) : [];
        fill(overTime, timeRows.length ? heatMap(`Load of the experts of layer ${view.layer} over steps`, timeRows, view.over_time.map((sample) => String(sample.step)), { unit: (column) => `step ${column}`, of: (share) => share / 3, onpick: (hit) => { state.step = String(view.over_time[hit.k].step); slider.value = String(Math.max(0, steps.indexOf(view.over_time[hit.k].step))); remember({ step: state.step }); refresh(); } }).element : empty("Not yet", "Loads are kept of some steps, evenly spread."));
      }
      const layers = [...new Set(view.max_vio.flatMap((sample) => Object.keys(sample.layers)))].sort((a, b) => a - b);
      const x = view.max_vio.map((sample) => sample.step);
      vio.set(layers.slice(0, 64).map((layer, i) => ({ label: `layer ${layer}`, x, y: view.max_vio.map((sample) => sample.layers[layer] ?? null), colour: i })), []);
      fill(absent, `Not recorded, and so not shown: ${view.not_recorded.join("; ")}.`);
    } catch (error) { if (!stopped) fill(now, broken(error)); }
    finally { busy = false; }
  };
  fill(main, h("div", { class: "head" }, h("h1", {}, "Experts"), h("span", { class: "sub" }, "who gets how many tokens")), figures, scale(),
    h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "Load by layer and expert"), words, h("span", { class: "grow" }), h("label", {}, "step ", slider, h("button", { class: "plain", onclick: () => { state.step = null; remember({ step: null }); refresh(); } }, "latest"))), now),
    h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "Load over time"), timeWords, h("span", { class: "grow" }), h("label", {}, "of ", picker)), overTime), placement.element, vio.element, absent);
  await Promise.all([refresh(), placement.refresh()]);
  const again = setInterval(() => { if (state.step === null && !document.hidden) refresh(); }, 3000);
  const later = setInterval(() => { if (!document.hidden) placement.refresh(); }, 15000);
  const retheme = () => refresh();
  addEventListener("theme", retheme);
  return () => { stopped = true; clearInterval(again); clearInterval(later); removeEventListener("theme", retheme); vio.destroy(); };
}

export { heatMap };
