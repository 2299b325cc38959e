// Where the experts would stand for even load, and what that would gain.
import { h, fill, api, empty, broken, percent } from "/assets/dom.js";

const times = (imbalance) => imbalance.toFixed(2);
const plural = (count, thing) => `${count} ${thing}${count === 1 ? "" : "s"}`;

/** The part of the experts' page about one run; `pick` is told the layer that is clicked. */
export function placementCard(id, pick) {
  const body = h("div", { class: "body" }), words = h("span", { class: "unit" });
  const element = h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "Placement for even load"), words), body);
  let view = null, layer = null, chosen = "copied";

  const gain = (row) => `max/mean load per rank ${times(row.now)} now, ${times(row.moved.imbalance)} with experts moved, ${times(row.copied.imbalance)} with ${view.copies_per_rank === 1 ? "one copy" : `${view.copies_per_rank} copies`} more a rank`;
  const table = () => h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Layer"), ["now", "moved", "with copies"].map((title) => h("th", { class: "n" }, title)))),
    h("tbody", {}, view.layers.map((row) => h("tr", {}, h("td", {}, h("button", { class: "plain", "aria-pressed": String(row.layer === layer), onclick: () => pick(String(row.layer)) }, `layer ${row.layer}`)),
      [row.now, row.moved.imbalance, row.copied.imbalance].map((imbalance, i) => h("td", { class: `n ${i === 0 && imbalance > 1.2 ? "warn" : ""}` }, times(imbalance)))))));
  const ranks = (row) => {
    const held = row[chosen].ranks, counts = new Map();
    held.flat().forEach((expert) => counts.set(expert, (counts.get(expert) ?? 0) + 1));
    const most = Math.max(...counts.values());
    return [h("div", { class: "tools" }, [["moved", "experts moved"], ["copied", "with copies"]].map(([key, title]) => h("button", { "aria-pressed": String(chosen === key), onclick: () => { chosen = key; draw(); } }, title)), h("span", {}, `${plural(held[0].length, "slot")} a rank; ${most > 1 ? `${plural([...counts.values()].filter((count) => count > 1).length, "expert")} more than once, at most ${most} times` : "every expert once"}`)),
      h("div", { class: "tall", tabindex: 0, role: "region", "aria-label": `Experts of layer ${row.layer} by rank` }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Rank"), h("th", {}, "Experts"))),
        h("tbody", {}, held.map((experts, rank) => h("tr", {}, h("td", {}, String(rank)), h("td", {}, experts.flatMap((expert, i) => [i ? ", " : "", counts.get(expert) > 1 ? h("strong", {}, `${expert} (1/${counts.get(expert)})`) : String(expert)])))))))];
  };
  /** Draws anew; what is scrolled and what has the focus stays. */
  const draw = () => {
    const tops = [...body.querySelectorAll(".tall")].map((part) => part.scrollTop), at = [...body.querySelectorAll("button")].indexOf(document.activeElement);
    drawAnew();
    body.querySelectorAll(".tall").forEach((part, i) => { part.scrollTop = tops[i] ?? 0; });
    if (at >= 0) body.querySelectorAll("button")[at]?.focus({ preventScroll: true });
  };
  const drawAnew = () => {
    if (!view.layers.length) { fill(words); fill(body, empty("No proposal", `${view.why.charAt(0).toUpperCase()}${view.why.slice(1)}.`)); return; }
    const row = view.layers.find((row) => row.layer === layer) ?? view.layers[0], { count, first, last } = view.steps;
    layer = row.layer;
    fill(words, `layer ${row.layer}: ${gain(row)}`);
    fill(body, h("div", { class: "note" }, h("p", {}, `By the mean load of ${plural(count, "step")} (${first}${count > 1 ? ` to ${last}` : ""}) on ${plural(view.ranks, "expert rank")}${view.nodes > 1 ? ` in ${plural(view.nodes, "node")}` : ""}. As they are, a rank waits ${percent(1 - 1 / row.now)} of the time that the busiest one works on its experts, on average. Nothing is moved while a run trains, where gate biases even out the load: this is for whoever serves the model.`)),
      h("div", { class: "pair" }, h("div", { class: "tall", tabindex: 0, role: "region", "aria-label": "Largest load of a rank over the mean, by layer" }, table()), h("div", {}, ranks(row))));
  };
  return {
    element,
    /** Shows a layer, or the first one. */
    show(wanted) {
      const next = wanted === null ? (view?.layers[0]?.layer ?? null) : Number(wanted);
      if (next !== layer) { layer = next; if (view) draw(); }
    },
    async refresh() {
      try { view = await api(`/runs/${encodeURIComponent(id)}/placement`); draw(); }
      catch (error) { fill(words); fill(body, broken(error)); }
    },
  };
}
