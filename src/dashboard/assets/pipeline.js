// The pipeline: what each rank does when, where it waits, and what for. Made for somebody who has never seen a pipeline schedule.
import { h, fill, api, broken, empty, loading, swatch, canvas, colour, duration, percent, digits, remember, parameter } from "/assets/dom.js";

const MEANING = {
  F: "forward pass of a micro-batch through this rank's stage",
  B: "backward pass: gradients of the inputs and of the weights",
  I: "first half of a backward pass: gradients of the inputs, which the stage before waits for",
  W: "second half of a backward pass: gradients of the weights, which nobody waits for; it fills gaps",
  "F&B": "a forward and a backward pass of two micro-batches, interleaved: while one communicates, the other computes",
  dispatch: "tokens on their way to the ranks of their experts", combine: "what the experts made of them, on the way home",
  optimizer: "the update of the weights and its collectives", transfer: "activations and gradients between neighbouring ranks",
};
const VIEWS = [["actions", "Plan"], ["recorded", "Latest step"], ["operations", "Simulated"]];
const SHORT = { F: "forward", B: "backward", I: "input gradients", W: "weight gradients", "F&B": "both at once", dispatch: "tokens to experts", combine: "tokens home", optimizer: "update", transfer: "between ranks" };
const LANE = 26, GAP = 12, LEFT = 126, AXIS = 24, SMALL = 12;

const amount = (view, value) => (view.unit === "s" ? duration(value) : `${digits(value)} F`);

function explanation(view) {
  const two = view.schedule.startsWith("dualpipe");
  return h("div", { class: "note" },
    h("p", {}, `The model is cut into ${view.stages} stages on ${view.ranks.length} rank${view.ranks.length === 1 ? "" : "s"}, and the batch into ${view.micro_batches} micro-batches. Each row is a rank, each box one piece of work, time runs to the right. F0.3 is the forward pass of micro-batch 3 at stage 0.`),
    two ? h("p", {}, "In DualPipe micro-batches enter at both ends of the pipeline: each rank holds two stages, one for either direction. Look for F&B: there a micro-batch of one direction goes forward while one of the other goes backward, so that the messages of one are hidden behind the arithmetic of the other.") : h("p", {}, "Micro-batches enter at the first rank; gradients come back from the last one."),
    h("p", {}, "Grey stretches are bubbles: the rank has nothing to do, because what it needs next is not there yet. Click a box to follow its micro-batch and to see what it waited for; press play to watch the step."));
}

/** One timeline on a canvas. */
class Timeline {
  constructor(view, share) {
    Object.assign(this, { view, share, range: [0, view.makespan], hover: null });
    this.rows = [];
    let y = 6;
    for (const rank of view.ranks) {
      for (const [i, lane] of rank.lanes.entries()) { this.rows.push({ rank, lane, first: i === 0, y }); y += lane.name === "compute" ? LANE + 3 : SMALL + 3; }
      y += GAP;
    }
    this.tall = y + AXIS;
    this.tip = h("div", { class: "tip", hidden: true });
    const { element, redraw } = canvas(this.tall, `Timeline, ${view.source}: ${view.ranks.length} ranks, bubble ${percent(view.bubble)}. Use the list beside it to read single operations.`, (context, width) => this.draw(context, width));
    this.canvas = element; this.redraw = redraw;
    this.element = h("div", { class: "canvas" }, element, this.tip);
    element.addEventListener("mousemove", (event) => this.move(event));
    element.addEventListener("mouseleave", () => { this.hover = null; this.tip.hidden = true; });
    element.addEventListener("click", (event) => { if (this.dragged) return; const hit = this.at(event); share.select(this.view, hit); });
    element.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.altKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(Math.exp(event.deltaY / 300), this.timeAt(event.offsetX));
    }, { passive: false });
    element.addEventListener("pointerdown", (event) => { this.dragged = false; this.from = { x: event.offsetX, range: [...this.range] }; });
    element.addEventListener("pointermove", (event) => {
      if (!this.from || !(event.buttons & 1)) return;
      const moved = ((this.from.x - event.offsetX) / (this.canvas.clientWidth - LEFT)) * (this.from.range[1] - this.from.range[0]);
      if (Math.abs(event.offsetX - this.from.x) > 3) this.dragged = true;
      if (this.dragged) this.show(this.from.range[0] + moved, this.from.range[1] + moved);
    });
    addEventListener("pointerup", () => { this.from = null; });
  }
  timeAt(x) { return this.range[0] + ((x - LEFT) / (this.canvas.clientWidth - LEFT)) * (this.range[1] - this.range[0]); }
  show(from, to) {
    const length = Math.min(to - from, this.view.makespan), start = Math.max(0, Math.min(from, this.view.makespan - length));
    this.range = [start, start + length]; this.redraw();
  }
  zoom(factor, around) { const [from, to] = this.range; const length = Math.max((to - from) * factor, this.view.makespan / 20000); const part = (around - from) / (to - from); this.show(around - part * length, around - part * length + length); }
  at(event) {
    const t = this.timeAt(event.offsetX);
    const row = this.rows.find((row) => event.offsetY >= row.y && event.offsetY < row.y + (row.lane.name === "compute" ? LANE : SMALL));
    if (!row || event.offsetX < LEFT) return null;
    const op = row.lane.ops.find((op) => op.s <= t && op.e >= t);
    if (op) return { rank: row.rank.rank, lane: row.lane.name, op };
    const idle = row.lane.name === "compute" ? row.rank.idle.find(([from, to]) => from <= t && to >= t) : null;
    return idle ? { rank: row.rank.rank, idle } : null;
  }
  move(event) {
    const hit = this.at(event);
    if (!hit) { this.tip.hidden = true; this.canvas.style.cursor = ""; return; }
    this.canvas.style.cursor = "pointer";
    this.tip.textContent = hit.idle ? `bubble on rank ${hit.rank}\n${amount(this.view, hit.idle[1] - hit.idle[0])}` : `${hit.op.a ?? ""}${hit.op.n ? `${hit.op.a ? "\n" : ""}${hit.op.n}` : ""}\n${amount(this.view, hit.op.e - hit.op.s)} on rank ${hit.rank}${hit.op.w ? `\nwaited for ${hit.op.w.name} of rank ${hit.op.w.rank}` : ""}`;
    this.tip.hidden = false;
    this.tip.style.left = `${Math.min(event.offsetX + 12, this.canvas.clientWidth - 230)}px`;
    this.tip.style.top = `${event.offsetY + 16}px`;
  }
  draw(context, width) {
    const { view, share } = this;
    const [from, to] = this.range, scale = (width - LEFT) / (to - from), x = (t) => LEFT + (t - from) * scale;
    const soft = colour("--soft"), line = colour("--line"), ink = colour("--ink"), idle = colour("--idle");
    const cursor = share.playing === null ? null : share.playing * view.makespan;
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    context.save(); context.beginPath(); context.rect(LEFT, 0, width - LEFT, this.tall); context.clip();
    for (const row of this.rows) {
      const tall = row.lane.name === "compute" ? LANE : SMALL;
      if (row.lane.name === "compute") for (const [start, end] of row.rank.idle) { if (end < from || start > to) continue; context.fillStyle = idle; context.fillRect(x(start), row.y, (end - start) * scale, tall); }
      for (const op of row.lane.ops) {
        if (op.e < from || op.s > to) continue;
        const shade = view.shades[op.c], left = x(op.s), wide = Math.max((op.e - op.s) * scale - (scale * (op.e - op.s) > 4 ? 1 : 0), 0.6);
        const isOfTrip = share.trip !== null && row.rank.group === share.trip.group && op.m.includes(share.trip.microBatch);
        const isLater = cursor !== null && op.s > cursor;
        context.globalAlpha = isLater ? 0.12 : share.trip !== null && !isOfTrip ? 0.22 : 1;
        context.fillStyle = shade.colour;
        if (cursor !== null && op.s <= cursor && op.e > cursor) { context.globalAlpha = 0.4; context.fillRect(left, row.y, wide, tall); context.globalAlpha = 1; context.fillRect(left, row.y, (cursor - op.s) * scale, tall); }
        else context.fillRect(left, row.y, wide, tall);
        if (shade.name === "optimizer" && wide > 2) { context.strokeStyle = soft; context.lineWidth = 1; context.strokeRect(left + 0.5, row.y + 0.5, wide - 1, tall - 1); }
        if (share.selected?.op === op) { context.globalAlpha = 1; context.strokeStyle = ink; context.lineWidth = 2; context.strokeRect(left + 1, row.y + 1, wide - 2, tall - 2); }
        const words = op.a ?? "";
        if (words && row.lane.name === "compute" && wide > context.measureText(words).width + 4) { context.fillStyle = shade.ink; context.textAlign = "center"; context.fillText(words, left + wide / 2, row.y + tall / 2 + 0.5); }
        else if (words && row.lane.name === "compute" && wide > 15) { const only = String(op.m[0] ?? ""); if (context.measureText(only).width + 3 < wide) { context.fillStyle = shade.ink; context.textAlign = "center"; context.fillText(only, left + wide / 2, row.y + tall / 2 + 0.5); } }
        context.globalAlpha = 1;
      }
    }
    if (share.trip !== null) this.drawTrip(context, x);
    if (cursor !== null) { context.strokeStyle = colour("--bad"); context.lineWidth = 1.5; context.beginPath(); context.moveTo(x(cursor), 0); context.lineTo(x(cursor), this.tall - AXIS); context.stroke(); }
    context.restore();
    context.textAlign = "left";
    let before = null;
    for (const row of this.rows) {
      const y = row.y + (row.lane.name === "compute" ? LANE : SMALL) / 2;
      context.fillStyle = row.first ? ink : soft;
      context.font = row.first ? "600 12px system-ui, sans-serif" : "10px system-ui, sans-serif";
      const stages = row.rank.stages?.length ? ` · stage ${row.rank.stages.join(", ")}` : "";
      context.fillText(row.first ? `rank ${row.rank.rank}${stages}` : row.lane.name, row.first ? 2 : 10, y);
      if (before !== null && before !== row.rank) { context.strokeStyle = line; context.lineWidth = 1; context.beginPath(); context.moveTo(0, row.y - GAP / 2); context.lineTo(width, row.y - GAP / 2); context.stroke(); }
      before = row.rank;
    }
    context.font = "11px system-ui, sans-serif"; context.fillStyle = soft; context.textAlign = "center";
    const rough = (to - from) / Math.max(2, (width - LEFT) / 110), power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) { context.fillText(amount(view, Math.abs(tick) < step / 1e6 ? 0 : tick), Math.min(Math.max(x(tick), LEFT + 14), width - 32), this.tall - AXIS / 2); }
  }
  /** The way of a micro-batch over the ranks. */
  drawTrip(context, x) {
    const stops = tripOf(this.view, this.share.trip);
    context.strokeStyle = colour("--ink"); context.lineWidth = 1.6; context.setLineDash([4, 3]); context.beginPath();
    stops.forEach((stop, i) => {
      const row = this.rows.find((row) => row.rank.rank === stop.rank && row.lane.name === "compute");
      const y = row.y + LANE / 2;
      if (i > 0) context.lineTo(x(stop.op.s), y);
      context.moveTo(x(stop.op.e), y);
    });
    context.stroke(); context.setLineDash([]);
  }
}

/** What works on a micro-batch on the compute lanes, in order; pieces of one action as one. Ranks that share a stage have micro-batches of their own. */
function tripOf(view, { microBatch, group }) {
  const all = view.ranks.filter((rank) => rank.group === group).flatMap((rank) => (rank.lanes.find((lane) => lane.name === "compute")?.ops ?? []).filter((op) => op.m.includes(microBatch)).map((op) => ({ rank: rank.rank, op })));
  all.sort((a, b) => a.op.s - b.op.s);
  const merged = [];
  for (const stop of all) {
    const last = merged.at(-1);
    if (last && last.rank === stop.rank && last.op.a !== null && last.op.a === stop.op.a) last.op = { ...last.op, e: stop.op.e };
    else merged.push({ rank: stop.rank, op: { ...stop.op } });
  }
  return merged;
}

const kindOf = (view, op) => view.shades[op.c]?.name;

function details(view, share) {
  const chosen = share.selected;
  if (!chosen) return empty("Nothing chosen", "Click a box of the timeline, or step through with the arrow keys.");
  const { op, rank, lane } = chosen;
  const stops = share.trip === null ? [] : tripOf(view, share.trip);
  return h("div", {},
    h("div", { class: "title" }, swatch(view.shades[op.c].colour), h("h2", {}, op.a ?? op.n), h("span", { class: "unit" }, `rank ${rank}, ${lane}`)),
    h("div", { class: "body" },
      h("p", {}, `${kindOf(view, op)}: ${MEANING[kindOf(view, op)] ?? ""}`),
      op.n ? h("p", { class: "unit" }, op.n) : null,
      h("dl", {}, h("dt", {}, "starts"), h("dd", {}, amount(view, op.s)), h("dt", {}, "takes"), h("dd", {}, amount(view, op.e - op.s)),
        h("dt", {}, "waited for"), h("dd", {}, op.w ? `${op.w.name} of rank ${op.w.rank}${op.w.work ? ` (${op.w.work})` : ""}, ${amount(view, op.s - op.w.since)} long` : "nothing: it started as soon as its lane was free")),
      stops.length ? [h("h3", {}, `Micro-batch ${share.trip.microBatch} on its way`), h("ol", { class: "list trip" }, stops.map((stop) => h("li", { tabindex: 0, onclick: () => share.select(view, { rank: stop.rank, lane: "compute", op: stop.op }), onkeydown: (event) => { if (event.key === "Enter") share.select(view, { rank: stop.rank, lane: "compute", op: stop.op }); } },
        swatch(view.shades[stop.op.c].colour), h("span", {}, stop.op.a ?? stop.op.n), h("span", { class: "grow" }), h("span", { class: "unit" }, `rank ${stop.rank} at ${amount(view, stop.op.s)}`))))] : null));
}

export async function pipelinePage(main, id) {
  const path = `/runs/${encodeURIComponent(id)}`;
  const overview = await api(path);
  const stack = h("div"), panel = h("section", { class: "card section", "aria-live": "polite" }), legend = h("div", { class: "legend" }), about = h("div");
  const share = { trip: null, selected: null, playing: null, select: null };
  let timelines = [], frame = null, speed = 1;
  let which = parameter("view") ?? "actions";

  const redraw = () => timelines.forEach((timeline) => timeline.redraw());
  share.select = (view, hit) => {
    share.selected = hit?.op ? hit : null;
    share.trip = hit?.op?.m.length ? { microBatch: hit.op.m[0], group: view.ranks.find((rank) => rank.rank === hit.rank)?.group ?? 0 } : null;
    remember({ action: hit?.op?.a ?? null, rank: hit?.op ? hit.rank : null });
    fill(panel, details(view, share));
    redraw();
  };
  const order = (view) => view.ranks.flatMap((rank) => (rank.lanes.find((lane) => lane.name === "compute")?.ops ?? []).map((op) => ({ rank: rank.rank, lane: "compute", op }))).sort((a, b) => a.op.s - b.op.s || a.rank - b.rank);

  const playButton = h("button", { "aria-pressed": "false", onclick: () => toggle() }, "▶ Play the step");
  const toggle = () => {
    if (frame) { cancelAnimationFrame(frame); frame = null; playButton.textContent = "▶ Play the step"; playButton.setAttribute("aria-pressed", "false"); return; }
    playButton.textContent = "❚❚ Pause"; playButton.setAttribute("aria-pressed", "true");
    if (share.playing === null || share.playing >= 1) share.playing = 0;
    let before = performance.now();
    const tick = (now) => {
      share.playing += ((now - before) / 1000) * (speed / 14); before = now;
      slider.value = share.playing;
      if (share.playing >= 1) { share.playing = null; frame = null; playButton.textContent = "▶ Play the step"; playButton.setAttribute("aria-pressed", "false"); redraw(); return; }
      redraw(); frame = requestAnimationFrame(tick);
    };
    frame = requestAnimationFrame(tick); redraw();
  };
  const slider = h("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0, "aria-label": "Moment of the step", oninput: (event) => { share.playing = Number(event.target.value); redraw(); } });
  const speeds = h("select", { "aria-label": "Speed", onchange: (event) => { speed = Number(event.target.value); } }, [[0.25, "¼ ×"], [0.5, "½ ×"], [1, "1 ×"], [2, "2 ×"]].map(([value, words]) => h("option", { value, selected: value === 1 }, words)));
  const whole = h("button", { onclick: () => { share.playing = null; share.select(timelines[0]?.view, null); timelines.forEach((timeline) => timeline.show(0, timeline.view.makespan)); } }, "Whole step");
  const zoomIn = h("button", { "aria-label": "Zoom in", onclick: () => timelines.forEach((timeline) => timeline.zoom(0.6, (timeline.range[0] + timeline.range[1]) / 2)) }, "+");
  const zoomOut = h("button", { "aria-label": "Zoom out", onclick: () => timelines.forEach((timeline) => timeline.zoom(1.7, (timeline.range[0] + timeline.range[1]) / 2)) }, "−");
  const trace = h("a", { download: "pipeline.trace.json" }, "Trace for Perfetto");
  const tabs = h("div", { class: "row", role: "group", "aria-label": "Timeline" });

  const fetchView = (name) => api(`${path}/pipeline?view=${name}`);
  const show = async () => {
    remember({ view: which === "actions" ? null : which });
    fill(tabs, VIEWS.map(([name, words]) => h("button", { "aria-pressed": String(name === which), onclick: () => { which = name; show(); } }, words)));
    trace.href = `/api/v1${path}/trace.json?view=${which}`;
    fill(stack, loading("Laying out the step"));
    share.selected = share.trip = null; fill(panel, empty("Nothing chosen", "Click a box of the timeline, or step through with the arrow keys."));
    try {
      // What was recorded stands above what was planned.
      const views = await Promise.all(which === "recorded" ? [fetchView("recorded"), fetchView("expected")] : [fetchView(which)]);
      timelines = views.map((view) => new Timeline(view, share));
      fill(stack, timelines.map(({ view, element }) => h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, view.source[0].toUpperCase() + view.source.slice(1)), h("span", { class: "unit" }, `${view.schedule} · ${amount(view, view.makespan)} a step · bubble ${percent(view.bubble)}${view.whole ? "" : " · actions only: the step has too many operations to draw"}`)), h("div", { class: "body" }, element))));
      const used = new Set(views.flatMap((view) => view.ranks.flatMap((rank) => rank.lanes.flatMap((lane) => lane.ops.map((op) => op.c)))));
      fill(legend, views[0].shades.map((shade, i) => (used.has(i) ? h("span", { title: MEANING[shade.name] }, swatch(shade.colour), shade.name === SHORT[shade.name] ? shade.name : h("b", {}, shade.name), ` ${SHORT[shade.name] ?? ""}`) : null)), h("span", {}, swatch("var(--idle)"), "bubble"));
      fill(about, explanation(views[0]));
      const [action, rank] = [parameter("action"), parameter("rank")];
      if (action) { const hit = order(views[0]).find((entry) => entry.op.a !== null && (entry.op.a === action || entry.op.a.split("&").includes(action)) && (rank === null || entry.rank === Number(rank))); if (hit) share.select(views[0], hit); }
    } catch (error) {
      timelines = []; fill(legend);
      const isAbsent = error.status === 404;
      fill(stack, h("section", { class: "card section" }, isAbsent ? empty(which === "recorded" ? "No recording" : "No timeline", error.message) : broken(error)));
    }
  };
  const keys = (event) => {
    if (/^(INPUT|SELECT|TEXTAREA|BUTTON|A)$/.test(event.target.tagName)) return;
    const view = timelines[0]?.view;
    if (!view) return;
    if (event.key === " ") { event.preventDefault(); toggle(); }
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      const all = order(view), at = all.findIndex((entry) => entry.op === share.selected?.op);
      share.select(view, all[Math.max(0, Math.min(all.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)))]);
    }
    if (event.key === "Escape") share.select(view, null);
  };
  addEventListener("keydown", keys);
  fill(main, h("div", { class: "head" }, h("h1", {}, "Pipeline"), h("span", { class: "sub" }, overview.layout ? `${overview.layout.schedule}, ${overview.layout.pipeline} ranks deep` : "")),
    h("div", { class: "tools" }, tabs, playButton, slider, speeds, zoomIn, zoomOut, whole, h("span", { class: "grow" }), trace), legend,
    h("div", { class: "split" }, stack, h("div", {}, panel, h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "How to read this")), h("div", { class: "body" }, about, h("p", { class: "note" }, "Keys: space plays, ← and → step from box to box, Esc lets go. Drag to move, Ctrl and wheel to zoom."))))));
  await show();
  return () => { cancelAnimationFrame(frame); removeEventListener("keydown", keys); };
}
