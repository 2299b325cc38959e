// The pages of a cluster: jobs, nodes, incidents, logs. What they do goes through the same roles as every other client's call.
import { h, fill, api, act, si, digits, bytes, duration, percent, time, empty, broken, loading, link, go, remember, parameter } from "/assets/dom.js";

export const clusterTabs = [["jobs", "Jobs"], ["nodes", "Cluster"], ["incidents", "Incidents"], ["logs", "Logs"]];

const pill = (state) => h("span", { class: `pill ${state}` }, state);
const isOpen = (job) => ["queued", "forming", "running", "recovering"].includes(job.state);
const ago = (unixMs) => `${duration(Math.max(0, (Date.now() - unixMs) / 1000))} ago`;

const USES = [["committed", "steps"], ["recomputed", "steps made again"], ["forming", "forming"], ["recovery", "recovery"], ["undecided", "since the latest step"], ["idle", "idle"]];
const uses = (goodput) => USES.filter(([use]) => goodput[use] > 0).map(([use, words]) => `${words} ${percent(goodput[use] / goodput.slot_seconds)}`).join(", ");
/** The share of slot time that became steps as a number over a bar; what it consists of comes on hover. */
const goodputBar = (goodput) => (goodput?.slot_seconds ? h("div", { title: uses(goodput) }, percent(goodput.share), h("div", { class: "meter", css: { margin: "4px 0 0", "min-width": "70px" }, role: "img", "aria-label": uses(goodput) }, h("div", { css: { width: `${100 * goodput.share}%` } }))) : "–");

/** Asks again a while after the last answer, so that a slow server or page is not asked ahead of itself. */
function often(every, ask) {
  let stopped = false, timer = null;
  const again = () => { timer = setTimeout(async () => { if (!document.hidden) await ask(); if (!stopped) again(); }, every); };
  again();
  return () => { stopped = true; clearTimeout(timer); };
}

function button(words, how, after, attributes = {}) {
  const element = h("button", { ...attributes, onclick: async () => {
    element.disabled = true;
    try { await how(); await after(null); } catch (error) { await after(error); } finally { element.disabled = false; }
  } }, words);
  return element;
}

async function jobsPage(main, here) {
  if (here.id === "new") return submitPage(main);
  if (here.id) return jobPage(main, here.id);
  const body = h("div"), problem = h("p", { class: "fault", role: "alert" });
  const show = async () => {
    try {
      const { jobs, more } = await api("/jobs");
      const waiting = jobs.filter((job) => job.state === "queued").reverse();
      const open = jobs.filter((job) => isOpen(job) && job.state !== "queued"), over = jobs.filter((job) => !isOpen(job));
      const row = (job) => h("tr", {},
        h("td", {}, link(`/run/${encodeURIComponent(job.id)}`, {}, job.name || job.id), h("div", { class: "unit mono" }, job.id)), h("td", {}, pill(job.state), job.losses ? h("div", { class: "unit" }, `${job.losses} lost rank${job.losses === 1 ? "" : "s"}`) : null),
        h("td", {}, h("div", { class: "meter", css: { "margin-bottom": "4px", "min-width": "90px" } }, h("div", { css: { width: `${job.steps ? (100 * job.step) / job.steps : 0}%` } })), `${job.step} / ${job.steps}`, job.eta_seconds != null ? h("div", { class: "unit" }, `${duration(job.eta_seconds)} left`) : null),
        h("td", { class: "n" }, digits(job.loss)), h("td", {}, goodputBar(job.goodput)), h("td", { class: "n" }, String(job.priority)), h("td", {}, ago(job.submitted_unix_ms)),
        h("td", {}, job.waiting_for ? `waits for ${job.waiting_for}` : job.outcome || job.warning || (job.ranks.length ? `${job.ranks.length} ranks on ${new Set(job.ranks.map((rank) => rank.node)).size} node${new Set(job.ranks.map((rank) => rank.node)).size === 1 ? "" : "s"}` : "")),
        h("td", {}, link(`/jobs/${encodeURIComponent(job.id)}`, {}, "details")));
      const table = (title, list, none) => h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, title), h("span", { class: "unit" }, list.length ? String(list.length) : "")),
        list.length ? h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Job", "State", "Steps"].map((words) => h("th", {}, words)), h("th", { class: "n" }, "Loss, nats/token"), h("th", {}, "Goodput"), h("th", { class: "n" }, "Priority"), ["Submitted", "Why, where", ""].map((words) => h("th", {}, words)))), h("tbody", {}, list.map(row)))) : empty(none, ""));
      fill(body, table("At work", open, "No job is at work"), table("Waiting, the next one first", waiting, "The queue is empty"), table("Over", over, "No job is over yet"), more ? h("p", { class: "note" }, "There are older jobs: contraflow jobs lists them.") : null);
      fill(problem);
    } catch (error) { fill(problem, error.message); }
  };
  fill(main, h("div", { class: "head" }, h("h1", {}, "Jobs"), h("span", { class: "grow" }), link("/jobs/new", { class: "pill done" }, "Submit a job")), problem, body);
  await show();
  return often(2000, show);
}

async function submitPage(main) {
  const answer = h("div", { "aria-live": "polite" });
  const recipe = h("textarea", { class: "code", "aria-label": "Recipe, TOML", spellcheck: "false", placeholder: "[model]\nconfig = \"tiny\"\n\n[training]\nsteps = 100\n\n[lr]\npeak = 1e-3" });
  const name = h("input", { "aria-label": "Name", placeholder: "name" }), priority = h("input", { type: "number", value: "0", "aria-label": "Priority", size: 5 }), changes = h("input", { "aria-label": "Changes", placeholder: "training.steps=200 lr.peak=0.001", size: 44 });
  const body = () => ({ recipe: recipe.value, name: name.value, priority: Number(priority.value) || 0, overrides: changes.value.split(/\s+/).filter(Boolean) });
  const faults = (error) => fill(answer, h("section", { class: "card section", role: "alert" }, h("div", { class: "title" }, h("h2", { class: "fault" }, `${error.faults?.length ?? 1} fault${(error.faults?.length ?? 1) === 1 ? "" : "s"}`)), h("ul", { class: "list" }, (error.faults ?? [error.message]).map((fault) => h("li", {}, h("span", { class: "mono" }, fault))))));
  const check = async () => {
    try {
      const plan = await act("/check", body());
      fill(answer, h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "This is what it would be")), h("div", { class: "body" }, h("dl", {},
        h("dt", {}, "ranks"), h("dd", {}, `${plan.world}: pipeline ${plan.pipeline} × expert ${plan.expert} × data ${plan.data}`), h("dt", {}, "schedule"), h("dd", {}, `${plan.schedule}, ${plan.micro_batches} micro-batches${plan.note ? `; ${plan.note}` : ""}`),
        h("dt", {}, "parameters"), h("dd", {}, si(plan.parameters)), h("dt", {}, "steps"), h("dd", {}, `${plan.steps} of ${si(plan.tokens_per_step)} tokens, ${si(plan.steps * plan.tokens_per_step)} tokens in all`), h("dt", {}, "memory, all ranks"), h("dd", {}, bytes(plan.memory_bytes))))));
    } catch (error) { faults(error); }
  };
  fill(main, h("div", { class: "head" }, h("h1", {}, "Submit a job"), h("span", { class: "sub" }, "a recipe as TOML; its paths are those of the workers' data folder")),
    h("form", { class: "form", onsubmit: async (event) => { event.preventDefault(); try { const { job } = await act("/jobs", body()); go(`/jobs/${encodeURIComponent(job)}`); } catch (error) { faults(error); } } },
      recipe, h("div", { class: "row" }, name, h("label", {}, "priority ", priority)), h("div", { class: "row" }, h("label", {}, "changes ", changes)), h("div", { class: "row" }, h("button", { type: "button", onclick: check }, "Check"), h("button", { class: "primary" }, "Submit"))), answer);
  return null;
}

async function jobPage(main, id) {
  const path = `/jobs/${encodeURIComponent(id)}`;
  const body = h("div"), problem = h("p", { class: "fault", role: "alert" });
  const after = async (error) => { fill(problem, error ? error.message : ""); await show(); };
  const show = async () => {
    let job;
    try { job = await api(path); } catch (error) { fill(problem, error.message); return; }
    const slowest = job.ranks.reduce((worst, rank) => (rank.busy_seconds > (worst?.busy_seconds ?? 0) ? rank : worst), null);
    const why = (rank) => { const parts = [["compute", rank.busy_seconds], ["waiting", rank.waited_seconds]]; return `${parts.map(([words, seconds]) => `${words} ${duration(seconds)}`).join(", ")}${rank.link_seconds ? `; its links ${duration(rank.link_seconds)}` : ""}`; };
    const share = (rank) => { const all = rank.busy_seconds + rank.waited_seconds || 1; return h("div", { class: "meter", css: { margin: "6px 0 0", "min-width": "140px" }, role: "img", "aria-label": `${percent(rank.busy_seconds / all)} at work` }, h("div", { css: { width: `${(100 * rank.busy_seconds) / all}%` } })); };
    fill(body, h("div", { class: "head" }, h("h1", {}, job.name || job.id), pill(job.state), h("span", { class: "sub mono" }, job.id), h("span", { class: "grow" }), link(`/run/${encodeURIComponent(job.id)}`, {}, "curves, pipeline, experts"),
      link(`/logs?job=${encodeURIComponent(job.id)}`, {}, "log"), link(`/incidents?job=${encodeURIComponent(job.id)}`, {}, "incidents"),
      isOpen(job) ? button("Cancel", () => act(`${path}/cancel`, { reason: "cancelled on the dashboard" }), after, { class: "danger" }) : null, ["failed", "cancelled"].includes(job.state) ? button("Retry", () => act(`${path}/retry`), after) : null),
    h("section", { class: "card section" }, h("div", { class: "body" }, h("dl", {}, h("dt", {}, "steps"), h("dd", {}, `${job.step} of ${job.steps}${job.eta_seconds != null ? `, ${duration(job.eta_seconds)} left` : ""}`), h("dt", {}, "priority"), h("dd", {}, String(job.priority)), h("dt", {}, "submitted"), h("dd", {}, `${time(job.submitted_unix_ms)}, ${ago(job.submitted_unix_ms)}`),
      job.ended_unix_ms ? [h("dt", {}, "ended"), h("dd", {}, time(job.ended_unix_ms))] : null, job.min_ranks < job.max_ranks || job.is_scaled ? [h("dt", {}, "ranks"), h("dd", {}, `${job.ranks.length} of ${job.min_ranks} to ${job.max_ranks}${job.is_scaled ? ", as it was scaled" : ""}`)] : null, job.layout ? [h("dt", {}, "layout"), h("dd", {}, job.layout)] : null, job.goodput?.slot_seconds ? [h("dt", {}, "goodput"), h("dd", {}, `${percent(job.goodput.share)} of ${duration(job.goodput.slot_seconds)} slot time: ${uses(job.goodput)}`)] : null, job.queued_seconds >= 1 ? [h("dt", {}, "in the queue"), h("dd", {}, duration(job.queued_seconds))] : null, h("dt", {}, "formation"), h("dd", {}, `${job.generation}, ${job.losses} lost rank${job.losses === 1 ? "" : "s"} so far`), job.waiting_for ? [h("dt", {}, "waits for"), h("dd", {}, job.waiting_for)] : null,
      job.outcome ? [h("dt", {}, "outcome"), h("dd", {}, job.outcome)] : null, job.warning ? [h("dt", {}, "warning"), h("dd", { class: "warn" }, job.warning)] : null))),
    h("section", { class: "card section" }, h("div", { class: "title" }, h("h2", {}, "Ranks"), h("span", { class: "unit" }, slowest ? `rank ${slowest.rank} works longest` : "")), job.ranks.length ? h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Rank", "Worker", "Node", "Step", "A step, median of the latest", ""].map((words) => h("th", {}, words)))),
      h("tbody", {}, job.ranks.map((rank) => h("tr", { id: `rank-${rank.rank}` }, h("td", {}, String(rank.rank)), h("td", {}, rank.worker), h("td", {}, rank.node), h("td", {}, String(rank.step)), h("td", {}, why(rank), share(rank)), h("td", {}, rank.slow ? h("span", { class: "tag warning" }, "holds the others up") : "")))))) : empty("No ranks", "It has places once it is at work.")));
  };
  fill(main, problem, body);
  await show();
  return often(2000, show);
}

async function nodesPage(main) {
  const body = h("div"), problem = h("p", { class: "fault", role: "alert" });
  const after = async (error) => { fill(problem, error ? error.message : ""); await show(); };
  const show = async () => {
    let cluster;
    try { cluster = await api("/nodes"); } catch (error) { fill(problem, error.message); return; }
    const { workers } = cluster, slots = workers.reduce((sum, worker) => sum + worker.slots, 0), used = workers.reduce((sum, worker) => sum + worker.used, 0);
    const nodes = Map.groupBy ? Map.groupBy(workers, (worker) => worker.node) : workers.reduce((map, worker) => map.set(worker.node, [...(map.get(worker.node) ?? []), worker]), new Map());
    const tile = (ask, big, more, mood) => h("div", { class: "card tile" }, h("div", { class: "ask" }, ask), h("div", { class: `big ${mood ?? ""}` }, big), h("div", { class: "more" }, more));
    const silent = workers.filter((worker) => worker.silent_ms > 5000).length, troubled = workers.filter((worker) => worker.unreachable || worker.draining).length;
    fill(body, h("div", { class: "tiles" }, tile("Workers", String(workers.length), `on ${nodes.size} node${nodes.size === 1 ? "" : "s"}`), tile("Slots in use", `${used} / ${slots}`, slots ? percent(used / slots) : ""), cluster.goodput?.slot_seconds ? tile("Goodput", percent(cluster.goodput.share), uses(cluster.goodput)) : null, tile("Silent for over 5 s", String(silent), "a lease ends after three beats", silent ? "warn" : "good"), tile("Draining or out of reach", String(troubled), "", troubled ? "warn" : "good"), tile("Orchestrator", `start ${cluster.incarnation}`, cluster.warning || "no warning", cluster.warning ? "warn" : "")),
      workers.length ? h("section", { class: "card section scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["Node", "Worker", "State", "Slots", "Memory", "Last heard", "Address", ""].map((words) => h("th", {}, words)))),
        h("tbody", {}, [...nodes].flatMap(([node, members]) => members.map((worker, i) => h("tr", {}, h("td", {}, i ? "" : h("strong", {}, node), i || !worker.block ? "" : h("div", { class: "unit" }, `block ${worker.block}`)), h("td", {}, worker.worker), h("td", {}, worker.draining ? pill("draining") : worker.unreachable ? h("span", { class: "pill lost" }, "out of reach") : h("span", { class: "pill running" }, "member")),
          h("td", {}, `${worker.used} / ${worker.slots}`), h("td", {}, bytes(worker.memory_bytes)), h("td", {}, duration(worker.silent_ms / 1000)), h("td", { class: "mono" }, worker.address),
          h("td", {}, i ? "" : members.some((member) => member.draining) ? button("Undrain", () => act(`/nodes/${encodeURIComponent(node)}/drain`, { undo: true }), after) : button("Drain", () => act(`/nodes/${encodeURIComponent(node)}/drain`), after)))))))) : h("section", { class: "card section" }, empty("No worker has joined", "contraflow worker --join HOST:PORT makes one.")),
      h("p", { class: "note" }, "Not recorded, and so not shown: CPU and disk of nodes, bandwidth of links, the terms of a placement's score."));
  };
  fill(main, h("div", { class: "head" }, h("h1", {}, "Cluster")), problem, body);
  await show();
  return often(2000, show);
}

/** A page about one job of those that are known, which the address names. */
async function ofOneJob(main, title, sub, draw, every) {
  const { jobs } = await api("/jobs");
  if (!jobs.length) { fill(main, h("div", { class: "head" }, h("h1", {}, title)), h("section", { class: "card section" }, empty("No jobs yet", "contraflow submit makes one."))); return null; }
  let id = parameter("job") ?? (jobs.find(isOpen) ?? jobs[0]).id;
  const body = h("div"), problem = h("p", { class: "fault", role: "alert" });
  const show = async () => { try { await draw(body, id); fill(problem); } catch (error) { fill(problem, error.message); } };
  const picker = h("select", { "aria-label": "Job", onchange: (event) => { id = event.target.value; remember({ job: id }); show(); } }, jobs.map((job) => h("option", { value: job.id, selected: job.id === id }, `${job.name || job.id} · ${job.state}`)));
  fill(main, h("div", { class: "head" }, h("h1", {}, title), h("span", { class: "sub" }, sub), h("span", { class: "grow" }), picker), problem, body);
  await show();
  return often(every, show);
}

async function incidentsPage(main) {
  return ofOneJob(main, "Incidents", "each failure as a story, from the job's log", async (body, id) => {
    const { incidents } = await api(`/jobs/${encodeURIComponent(id)}/incidents`);
    fill(body, incidents.length ? incidents.map((incident) => h("section", { class: "card section" },
      h("div", { class: "title" }, h("h2", {}, incident.sign), h("span", { class: "grow" }), incident.over_unix_ms ? h("span", { class: "pill done" }, `over after ${duration((incident.over_unix_ms - incident.began_unix_ms) / 1000)}`) : h("span", { class: "pill failed" }, "open")),
      h("ol", { class: "list" }, incident.lines.map((line, i) => h("li", {}, h("span", { class: "when" }, i ? `+ ${duration((line.unix_ms - incident.began_unix_ms) / 1000)}` : time(incident.began_unix_ms)), h("span", { class: `tag ${line.level === "WARN" ? "warning" : line.level === "ERROR" ? "failure" : ""}` }, line.level), h("span", {}, line.message)))))) : h("section", { class: "card section" }, empty("Nothing has gone wrong", "A lost rank, a stall or a failed step would be told here.")));
  }, 4000);
}

async function logsPage(main) {
  const state = { text: "", level: "", rank: "", last: -1 };
  const table = h("tbody"), count = h("span", { class: "unit" });
  let lines = [], of = "";
  const draw = () => {
    const wanted = lines.filter((line) => (!state.level || line.level === state.level) && (!state.text || line.message.toLowerCase().includes(state.text)) && (state.rank === "" || (state.rank === "orchestrator" ? line.ranks.length === 0 : line.ranks.includes(Number(state.rank)))));
    const ranks = (list) => (list.length === 0 ? "orchestrator" : list.length > 6 ? `${list.length} ranks` : `rank${list.length === 1 ? "" : "s"} ${list.join(", ")}`);
    fill(count, `${wanted.length} of ${lines.length} lines`);
    fill(table, wanted.slice(-1000).map((line) => h("tr", {}, h("td", { class: "unit mono" }, new Date(line.unix_ms).toLocaleTimeString()), h("td", {}, h("span", { class: `tag ${line.level === "WARN" ? "warning" : line.level === "ERROR" ? "failure" : ""}` }, line.level)), h("td", { class: "unit" }, ranks(line.ranks)), h("td", { class: "mono" }, line.message))));
  };
  const tools = h("div", { class: "tools" }, h("input", { type: "search", placeholder: "search", "aria-label": "Search", oninput: (event) => { state.text = event.target.value.toLowerCase(); draw(); } }), h("select", { "aria-label": "Level", onchange: (event) => { state.level = event.target.value; draw(); } }, ["", "ERROR", "WARN", "INFO", "DEBUG"].map((level) => h("option", { value: level }, level || "every level"))), h("input", { placeholder: "rank, or orchestrator", "aria-label": "Rank", oninput: (event) => { state.rank = event.target.value.trim(); draw(); } }), count);
  const frame = h("section", { class: "card section log" }, h("table", {}, table));
  return ofOneJob(main, "Logs", "lines that several ranks wrote are one", async (body, id) => {
    const answer = await api(`/jobs/${encodeURIComponent(id)}/log`);
    const newest = answer.lines.at(-1)?.number ?? -1;
    if (id === of && newest === state.last) return;
    const isAtEnd = frame.scrollTop + frame.clientHeight >= frame.scrollHeight - 30;
    lines = answer.lines; state.last = newest; of = id;
    if (!frame.isConnected) fill(body, tools, frame);
    draw();
    if (isAtEnd) frame.scrollTop = frame.scrollHeight;
  }, 1500);
}

export const clusterPages = { jobs: jobsPage, nodes: nodesPage, incidents: incidentsPage, logs: logsPage };
