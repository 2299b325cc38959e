// The layers: norms of the gradient, part by part, over time.
import { h, fill, api, empty, heat, digits } from "/assets/dom.js";
import { heatMap } from "/assets/experts.js";
import { Chart } from "/assets/chart.js";

export async function layersPage(main, id) {
  const body = h("div", { class: "body" }), words = h("span", { class: "unit" }), absent = h("p", { class: "note" });
  const chart = new Chart({ title: "Gradient norm by part, latest", unit: "", sync: "layers", log: true });
  let stopped = false;
  const refresh = async () => {
    const view = await api(`/runs/${encodeURIComponent(id)}/layers`);
    if (stopped) return;
    fill(absent, `Not recorded, and so not shown: ${view.not_recorded.join("; ")}.`);
    if (!view.samples.length) { fill(body, empty("No norms yet", "They come with the first step.")); return; }
    const all = view.samples.flatMap((sample) => sample.norms).filter((norm) => norm > 0).map(Math.log10);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const share = (norm) => (norm > 0 ? (Math.log10(norm) - low) / (high - low || 1) : 0);
    const rows = view.names.map((name, part) => ({ label: name.replace("layer ", "L"), long: name, values: view.samples.map((sample) => sample.norms[part] ?? null), tell: (norm) => `norm ${digits(norm)}` }));
    fill(words, `from ${digits(10 ** low)} to ${digits(10 ** high)}, by powers of ten`);
    fill(body, h("div", { class: "legend" }, [0, 0.25, 0.5, 0.75, 1].map((part) => h("span", {}, h("span", { class: "swatch", css: { background: heat(part) } }), digits(10 ** (low + part * (high - low)))))),
      heatMap("Gradient norm by part of the model and step", rows, view.samples.map((sample) => String(sample.step)), { unit: (column) => `step ${column}`, of: share }).element);
    const parts = [0, ...[0.25, 0.5, 0.75].map((at) => Math.round(at * (view.names.length - 1))), view.names.length - 1].filter((part, i, list) => list.indexOf(part) === i);
    chart.set(parts.map((part, i) => ({ label: view.names[part], x: view.samples.map((sample) => sample.step), y: view.samples.map((sample) => sample.norms[part] ?? null), colour: i })), []);
  };
  chart.element.querySelector("h2").textContent = "Gradient norm of some parts";
  fill(main, h("div", { class: "head" }, h("h1", {}, "Layers"), h("span", { class: "sub" }, "L2 norms of the gradient before clipping, part by part")),
    h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "Gradient norm by part and step"), words), body), chart.element, absent);
  await refresh();
  const again = setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, 4000);
  const retheme = () => refresh().catch(() => {});
  addEventListener("theme", retheme);
  return () => { stopped = true; clearInterval(again); removeEventListener("theme", retheme); chart.destroy(); };
}
