// One plot: lines over an axis, zoom, hover, logarithm, smoothing, notes, and what of it can be saved.
import uPlot from "/assets/uplot/uPlot.esm.js";
import { h, fill, empty, save, withUnit, si, digits, duration, bytes, percent, colour } from "/assets/dom.js";

const COLOURS = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"];
export const lineColour = (index) => colour(COLOURS[index % COLOURS.length]);

const short = (value, unit) => {
  if (value === null || value === undefined) return "";
  if (unit === "ratio") return percent(value);
  if (unit === "B") return bytes(value);
  if (unit === "s") return duration(value);
  return Math.abs(value) >= 1000 ? si(value) : String(Number(value.toPrecision(3)));
};

/** A time on an axis: 2:20, or 1:02:20 with hours. */
const clock = (seconds) => {
  const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
  return whole >= 3600 ? `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}:${two(whole % 60)}` : `${Math.floor(whole / 60)}:${two(whole % 60)}`;
};

/** A mean in which earlier values count less and less; it begins at the first value. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, all = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = weight * sum + (1 - weight) * value;
    all = weight * all + (1 - weight);
    return sum / all;
  });
}

/**
 * `lines`: [{ label, x, y, run }], each with an axis of its own. `onzoom(from, to)` is called with the range that is wanted, or nulls for all.
 */
export class Chart {
  constructor({ title, unit, log = false, axis = "step", sync = "run", onzoom, height = 190, marked = false }) {
    Object.assign(this, { title, unit, log, axis, onzoom, height, marked, smooth: 0, notes: [], lines: [], data: null, plot: null });
    this.keys = h("div", { class: "keys", "aria-live": "off" });
    this.body = h("div", { class: "plot" });
    this.logButton = h("button", { class: "plain", "aria-pressed": String(log), title: "Logarithmic axis", onclick: () => { this.log = !this.log; this.logButton.setAttribute("aria-pressed", String(this.log)); this.build(); } }, "log");
    const button = (name, how) => h("button", { class: "plain", title: `Save as ${name}`, "aria-label": `Save ${title} as ${name}`, onclick: () => how() }, name);
    this.element = h("section", { class: "card chart", "aria-label": title },
      h("div", { class: "title" }, h("h2", {}, title), h("span", { class: "unit" }, unit === "ratio" ? "%" : unit), h("span", { class: "grow" }), this.logButton,
        button("CSV", () => this.csv()), button("SVG", () => this.svg()), button("PNG", () => this.png())),
      this.keys, this.body);
    this.sync = uPlot.sync(sync);
    new ResizeObserver(() => { if (this.plot && this.body.clientWidth) this.plot.setSize({ width: this.body.clientWidth, height: this.height }); }).observe(this.body);
    this.retheme = () => this.build();
    addEventListener("theme", this.retheme);
  }

  destroy() { removeEventListener("theme", this.retheme); this.plot?.destroy(); this.plot = null; }

  set(lines, notes = this.notes) {
    const before = this.lines.map((line) => line.label).join("\n");
    this.lines = lines; this.notes = notes;
    const shown = lines.filter((line) => line.y.some((value) => value !== null && value !== undefined));
    if (!shown.length) { this.plot?.destroy(); this.plot = null; fill(this.body, empty("No values yet", "They appear with the first step that has them.")); fill(this.keys); return; }
    this.align();
    if (this.plot && before === lines.map((line) => line.label).join("\n")) { this.plot.setData(this.data); this.legend(null); } else this.build();
  }

  /** All lines over one axis, as uPlot wants them. */
  align() {
    const first = this.lines[0]?.x;
    const isShared = this.lines.every((line) => line.x === first);
    const xs = isShared ? first : [...new Set(this.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const places = isShared ? null : new Map(xs.map((x, i) => [x, i]));
    const placed = (line, y) => {
      if (isShared) return y;
      const values = new Array(xs.length).fill(undefined);
      line.x.forEach((x, i) => { values[places.get(x)] = y[i]; });
      return values;
    };
    // Behind what is smoothed stands what it was made of, so that no spike is lost.
    const aligned = [...this.lines.map((line) => placed(line, smoothed(line.y, this.smooth))), ...(this.smooth ? this.lines.map((line) => placed(line, line.y)) : [])];
    // What is 0 or less has no place on a logarithmic axis.
    this.data = [xs, ...(this.log ? aligned.map((values) => values.map((value) => (value > 0 ? value : value === undefined ? undefined : null))) : aligned)];
  }

  build() {
    this.plot?.destroy(); this.plot = null;
    if (!this.lines.length) return;
    this.align();
    if (this.data[0] === undefined) return;
    fill(this.body);
    const soft = colour("--soft"), faint = colour("--faint");
    const axisValues = (_, values) => values.map((value) => (this.axis === "time" ? (values.at(-1) < 10 ? duration(value) : clock(value)) : si(value).replace(" ", "")));
    const font = "11px system-ui, sans-serif";
    const chart = this;
    const options = {
      width: this.body.clientWidth || 420, height: this.height, padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: this.sync.key, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1 } },
      axes: [
        { stroke: soft, font, grid: { stroke: faint, width: 1 }, ticks: { show: false }, values: axisValues, size: 26, space: 62 },
        { stroke: soft, font, grid: { stroke: faint, width: 1 }, ticks: { show: false }, size: 62, values: (_, values) => values.map((value) => (value === null ? "" : short(value, this.unit))) },
      ],
      series: [{}, ...this.lines.map((line, i) => ({
        label: line.label, stroke: lineColour(line.colour ?? i), width: 1.6, spanGaps: true, dash: line.dash,
        points: { show: this.marked || this.data[0].length < 3, size: 5 },
      })), ...(this.smooth ? this.lines.map((line, i) => ({ stroke: lineColour(line.colour ?? i), width: 1, alpha: 0.3, spanGaps: true, points: { show: false } })) : [])],
      hooks: {
        setCursor: [(u) => chart.legend(u.cursor.idx)],
        setSelect: [(u) => {
          if (u.select.width > 4) chart.onzoom?.(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        draw: [(u) => chart.drawNotes(u)],
        ready: [(u) => u.over.addEventListener("dblclick", () => chart.onzoom?.(null, null))],
      },
    };
    this.plot = new uPlot(options, this.data, this.body);
    this.legend(null);
  }

  drawNotes(u) {
    const context = u.ctx, scale = devicePixelRatio || 1;
    context.save();
    for (const note of this.notes) {
      const x = u.valToPos(note.x, "x", true);
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      context.strokeStyle = context.fillStyle = colour(note.kind === "failure" || note.kind === "rollback" ? "--bad" : note.kind === "checkpoint" || note.kind === "end" ? "--accent" : "--warn");
      context.globalAlpha = 0.55; context.lineWidth = scale;
      context.setLineDash([3 * scale, 3 * scale]);
      context.beginPath(); context.moveTo(x, u.bbox.top + 7 * scale); context.lineTo(x, u.bbox.top + u.bbox.height); context.stroke();
      context.globalAlpha = 1; context.setLineDash([]);
      context.beginPath(); context.moveTo(x - 4 * scale, u.bbox.top); context.lineTo(x + 4 * scale, u.bbox.top); context.lineTo(x, u.bbox.top + 7 * scale); context.fill();
    }
    context.restore();
  }

  legend(index) {
    const xs = this.data?.[0] ?? [];
    const last = (values) => { for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i]; return null; };
    const at = index === null || index === undefined ? null : xs[index];
    const where = at === null || at === undefined ? "latest" : this.axis === "time" ? duration(at) : this.axis === "tokens" ? `${si(at)} tokens` : `step ${at}`;
    const near = at !== null && at !== undefined ? this.notes.find((note) => Math.abs(note.x - at) <= (xs[xs.length - 1] - xs[0]) / 150) : null;
    fill(this.keys, this.lines.map((line, i) => {
      const values = this.data[i + 1] ?? [];
      const value = at === null || at === undefined ? last(values) : values[index] ?? null;
      const key = h("span", { class: "line-swatch", css: { background: lineColour(line.colour ?? i) } });
      return h("span", {}, key, line.label === this.title ? "" : `${line.label} `, h("b", {}, withUnit(value, this.unit)));
    }), h("span", {}, near ? `${where} · ${near.text}` : where));
  }

  setSmooth(weight) {
    const isAsBefore = !weight === !this.smooth;
    this.smooth = weight;
    if (!this.plot) return;
    if (isAsBefore) { this.align(); this.plot.setData(this.data); this.legend(null); } else this.build();
  }

  get file() { return this.title.toLowerCase().replaceAll(" ", "-"); }

  csv() {
    const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const head = [this.axis, ...this.lines.map((line) => quote(line.label))].join(",");
    const rows = this.data[0].map((x, i) => [x, ...this.data.slice(1, this.lines.length + 1).map((values) => values[i] ?? "")].join(","));
    save(`${this.file}.csv`, "text/csv", [head, ...rows].join("\n") + "\n");
  }

  png() {
    if (!this.plot) return;
    const from = this.plot.ctx.canvas, to = document.createElement("canvas"), head = 26 * (devicePixelRatio || 1);
    to.width = from.width; to.height = from.height + head;
    const context = to.getContext("2d");
    context.fillStyle = colour("--card"); context.fillRect(0, 0, to.width, to.height);
    context.fillStyle = colour("--ink"); context.font = `600 ${head / 2}px system-ui, sans-serif`;
    context.fillText(`${this.title}${this.unit ? `, ${this.unit === "ratio" ? "%" : this.unit}` : ""}`, head / 3, head * 0.7);
    context.drawImage(from, 0, head);
    to.toBlob((blob) => save(`${this.file}.png`, "image/png", blob));
  }

  svg() {
    if (!this.plot) return;
    const width = 720, height = 320, left = 70, top = 34, right = 12, bottom = 34;
    const [x0, x1] = [this.plot.scales.x.min, this.plot.scales.x.max];
    const f = this.log ? Math.log10 : (value) => value;
    const [y0, y1] = [f(this.plot.scales.y.min), f(this.plot.scales.y.max)];
    const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
    const py = (y) => height - bottom - ((f(y) - y0) / (y1 - y0 || 1)) * (height - top - bottom);
    const escape = (text) => text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
    const parts = [`<rect width="${width}" height="${height}" fill="${colour("--card")}"/>`];
    const text = (x, y, words, extra = "") => parts.push(`<text x="${x}" y="${y}" fill="${colour("--soft")}" font-family="sans-serif" font-size="11" ${extra}>${escape(words)}</text>`);
    text(left, 18, `${this.title}${this.unit ? `, ${this.unit === "ratio" ? "%" : this.unit}` : ""}`, 'font-weight="600"');
    for (let i = 0; i <= 4; i++) {
      const scaled = y0 + ((y1 - y0) * i) / 4, y = this.log ? 10 ** scaled : scaled;
      parts.push(`<line x1="${left}" x2="${width - right}" y1="${py(y)}" y2="${py(y)}" stroke="${colour("--line")}"/>`);
      text(left - 6, py(y) + 4, short(y, this.unit), 'text-anchor="end"');
      const x = x0 + ((x1 - x0) * i) / 4;
      text(px(x), height - bottom + 16, this.axis === "time" ? duration(x) : digits(x), 'text-anchor="middle"');
    }
    text((left + width - right) / 2, height - 5, this.axis === "time" ? "training time" : this.axis, 'text-anchor="middle"');
    this.lines.forEach((line, i) => {
      let path = "", open = false;
      this.data[0].forEach((x, k) => {
        const y = this.data[i + 1][k];
        if (y === undefined) return;
        if (y === null) { open = false; return; }
        path += `${open ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`; open = true;
      });
      parts.push(`<path d="${path}" fill="none" stroke="${lineColour(line.colour ?? i)}" stroke-width="1.6"/>`);
      if (this.lines.length > 1) text(width - right, 18 + 14 * i, line.label, `text-anchor="end" style="fill:${lineColour(line.colour ?? i)}"`);
    });
    save(`${this.file}.svg`, "image/svg+xml", `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}">${parts.join("")}</svg>\n`);
  }
}
