// Elements, numbers with their units, requests, and the states a page may be in. Strings of runs become text nodes and nothing else.

export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "css") for (const [property, text] of Object.entries(value)) element.style.setProperty(property, text);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const fill = (element, ...children) => { element.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false)); return element; };

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** Three or four digits and an SI prefix. */
export function si(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [factor, prefix] of PREFIXES) if (size >= factor) return `${digits(value / factor)} ${prefix}`;
  return digits(value);
}

/** Three significant digits or more, whole numbers whole; very small ones in powers of ten. */
export function digits(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3) return value.toExponential(2).replace("e-", " × 10⁻").replace(/⁻(\d+)$/, (_, power) => "⁻" + [...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join(""));
  if (Number.isInteger(value) && size < 1e4) return String(value);
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  return value.toFixed(size >= 1 ? 3 : 4);
}

export function bytes(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  for (const [factor, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) if (value >= factor) return `${(value / factor).toFixed(1)} ${unit}`;
  return `${value} B`;
}

export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 1e-3) return `${(1e6 * seconds).toFixed(1)} µs`;
  if (seconds < 1) return `${(1e3 * seconds).toFixed(1)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${(seconds / 86400).toFixed(1)} d`;
}

/** A figure's value with its unit. */
export function withUnit(value, unit) {
  if (unit === "ratio") return percent(value);
  if (unit === "B") return bytes(value);
  if (unit === "s") return duration(value);
  if (unit === "nats/token") return value === null || value === undefined ? "–" : `${value.toFixed(4)} nats/token`;
  return unit ? `${si(value)} ${unit}` : si(value);
}

export const time = (unixMs) => (unixMs ? new Date(unixMs).toLocaleString([], { dateStyle: "short", timeStyle: "medium" }) : "–");

export class Refused extends Error {
  constructor(status, faults) { super(faults.join("\n")); this.status = status; this.faults = faults; }
}

/** A request to the API. Throws `Refused` with every fault. */
export async function api(path, options = {}) {
  let response;
  try { response = await fetch(`/api/v1${path}`, options); }
  catch { throw new Refused(0, ["The process behind this page does not answer: it may have ended."]); }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body.faults ?? [`HTTP ${response.status}`]);
  return body;
}

/** A request that changes something; the header is what a page of another site cannot send. */
export const act = (path, body = {}) => api(path, { method: "POST", headers: { "content-type": "application/json", "x-contraflow-action": "1" }, body: JSON.stringify(body) });

export const loading = (words = "Loading") => h("div", { class: "state", role: "status" }, h("div", { class: "spin" }), words);
export const empty = (title, words) => h("div", { class: "state" }, h("strong", {}, title), words);
export const broken = (error) => h("div", { class: "state bad", role: "alert" }, h("strong", {}, "This could not be shown"), String(error.message ?? error));

export const swatch = (colour) => h("span", { class: "swatch", css: { background: colour } });
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function save(name, type, content) {
  const link = h("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** What is clicked moves within the page, without loading it anew. */
export function link(href, attributes, ...children) {
  return h("a", { href, ...attributes, onclick: (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    go(href);
  } }, ...children);
}
export function go(href) { history.pushState(null, "", href); dispatchEvent(new Event("moved")); }
/** Changes parameters of the address without a step of the browser's history. */
export function remember(changes) {
  const url = new URL(location.href);
  for (const [key, value] of Object.entries(changes)) value === null || value === "" ? url.searchParams.delete(key) : url.searchParams.set(key, value);
  history.replaceState(null, "", url);
}
export const parameter = (key) => new URL(location.href).searchParams.get(key);

/** A canvas that is as sharp as the screen; `draw` gets its context and its size in CSS pixels. */
export function canvas(height, label, draw) {
  const element = h("canvas", { role: "img", "aria-label": label, css: { height: `${height}px` } });
  const redraw = () => {
    const width = element.clientWidth, tall = element.clientHeight;
    if (!width || !tall) return;
    const scale = devicePixelRatio || 1;
    if (element.width !== Math.round(width * scale) || element.height !== Math.round(tall * scale)) { element.width = Math.round(width * scale); element.height = Math.round(tall * scale); }
    const context = element.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, tall);
    draw(context, width, tall);
  };
  new ResizeObserver(redraw).observe(element);
  element.addEventListener("theme", redraw);
  return { element, redraw };
}
// Told to the canvases that are there: one that has gone is held by nobody.
addEventListener("theme", () => document.querySelectorAll("canvas").forEach((element) => element.dispatchEvent(new Event("theme"))));

/** Light to dark of one hue, which colour-blind readers can order: 0 to 1. */
export function heat(share) {
  const dark = document.documentElement.dataset.theme === "dark";
  const t = Math.max(0, Math.min(1, share));
  const stops = dark ? [[30, 34, 42], [24, 78, 120], [58, 160, 190], [240, 228, 110]] : [[247, 248, 248], [158, 202, 225], [32, 113, 172], [8, 32, 72]];
  const at = t * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  return `rgb(${stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * part)).join(",")})`;
}
