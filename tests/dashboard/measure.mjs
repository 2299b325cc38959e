// What pages take in a real browser: node measure.mjs URL SCENARIO JOBS, started by `contraflow bench dashboard`; JOBS are ids as JSON. A line of
// JSON a page on stdout; in the scenario `hour` one for each line on stdin.
import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline";

const [base, scenario, jobs] = process.argv.slice(2);
const { wide, long } = JSON.parse(jobs);
const folder = process.env.CONTRAFLOW_PLAYWRIGHT ?? path.join(import.meta.dirname, "../../target/browser");
const { chromium } = createRequire(path.join(folder, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage", "--js-flags=--expose-gc"] });

/** Address, what is there once the page shows what it is for, and how often it asks anew. */
const PAGES = [
  { page: "jobs", at: "/jobs", has: "tbody tr" },
  { page: "cluster", at: "/nodes", has: "tbody tr" },
  { page: "job of 1,024 ranks", at: `/jobs/${wide}`, has: "tbody tr" },
  { page: "run of 1,024 ranks", at: `/run/${wide}`, has: ".u-over" },
  { page: "run of a million steps", at: `/run/${long}`, has: ".u-over" },
  { page: "pipeline", at: `/run/${wide}/pipeline`, has: ".split canvas" },
  { page: "experts", at: `/run/${wide}/experts`, has: "canvas" },
  { page: "layers", at: `/run/${wide}/layers`, has: "canvas" },
  { page: "logs", at: `/logs?job=${wide}`, has: "td, .state strong" },
  { page: "incidents", at: `/incidents?job=${wide}`, has: ".list, .state strong" },
];
const LOADS = 3, SECONDS = 5;

/** In the page: when it shows what it is for and has drawn two frames since, and when each frame was. */
function observe(has) {
  const seen = (globalThis.measured = { interactive: null, frames: [] });
  let after = -1;
  const frame = (now) => {
    seen.frames.push(now);
    if (seen.interactive === null) {
      if (after < 0 && document.querySelector(has)) after = 0; else if (after >= 0) after += 1;
      if (after === 2) seen.interactive = performance.now();
    }
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
const rounded = (value) => Math.round(value * 10) / 10;

async function open({ at, has }, { faster = 1 } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 } });
  const page = await context.newPage();
  await page.addInitScript(`(${observe})(${JSON.stringify(has)})`);
  // Time that runs faster for the page: what it does now and then it does so much more often.
  if (faster !== 1) await page.addInitScript(`{ const often = setInterval, later = setTimeout; setInterval = (what, ms, ...rest) => often(what, ms / ${faster}, ...rest); setTimeout = (what, ms, ...rest) => later(what, ms / ${faster}, ...rest); }`);
  await page.goto(new URL(at, base).href, { waitUntil: "commit" });
  await page.waitForFunction(() => globalThis.measured?.interactive !== null, null, { timeout: 60000 });
  return page;
}

/** What a page holds after a collection of garbage, in MiB. */
async function heap(page) {
  const session = await page.context().newCDPSession(page);
  await session.send("HeapProfiler.enable");
  for (let i = 0; i < 3; i++) await session.send("HeapProfiler.collectGarbage");
  const { usedSize } = await session.send("Runtime.getHeapUsage");
  const { nodes, jsEventListeners } = await session.send("Memory.getDOMCounters");
  await session.detach();
  return { mib: rounded(usedSize / 2 ** 20), nodes, listeners: jsEventListeners };
}

const say = (figures) => { console.log(JSON.stringify(figures)); console.error(JSON.stringify(figures)); };

const scenarios = {
  /** Each page from an empty cache, then five seconds of it with a hand that moves over it. */
  async frames() {
    for (const one of PAGES) {
      const times = [];
      let page;
      for (let i = 0; i < LOADS; i++) {
        await page?.context().close();
        page = await open(one);
        times.push(await page.evaluate(() => measured.interactive));
      }
      const from = await page.evaluate(() => performance.now());
      for (let i = 0; i < SECONDS * 10; i++) {
        await page.mouse.move(300 + 6 * i, 300 + 40 * Math.sin(i / 4));
        await page.waitForTimeout(100);
      }
      const frames = (await page.evaluate(() => measured.frames)).filter((at) => at >= from && at < from + SECONDS * 1000);
      const counts = Array.from({ length: SECONDS }, (_, second) => frames.filter((at) => Math.floor((at - from) / 1000) === second).length);
      const gaps = frames.slice(1).map((at, i) => at - frames[i]);
      say({ page: one.page, interactive_ms_median: Math.round(median(times)), interactive_ms_longest: Math.round(Math.max(...times)), frames_per_second_median: median(counts), frames_per_second_least: Math.min(...counts), frame_ms_longest: Math.round(Math.max(...gaps)) });
      await page.context().close();
    }
  },
  /** What each page holds after so many refreshes, five times as often as they come. */
  async refreshes() {
    for (const one of PAGES) {
      const page = await open(one, { faster: 5 });
      let asked = 0;
      page.on("request", (request) => { if (new URL(request.url()).pathname.startsWith("/api/")) asked += 1; });
      const found = { page: one.page, refreshes: [], mib: [], nodes: [], listeners: [] };
      for (const wanted of [20, 60, 100]) {
        const until = Date.now() + 8000;
        while (asked < wanted && Date.now() < until) await page.waitForTimeout(50);
        const { mib, nodes, listeners } = await heap(page);
        found.refreshes.push(asked); found.mib.push(mib); found.nodes.push(nodes); found.listeners.push(listeners);
        if (asked < wanted) break;
      }
      say(found);
      await page.context().close();
    }
  },
  /** The page of a run that is kept open. */
  async hour() {
    const page = await open(PAGES.find((one) => one.page === "run of 1,024 ranks"), { faster: 5 });
    for await (const _ of readline.createInterface({ input: process.stdin })) say(await heap(page));
  },
};

try { await scenarios[scenario](); } finally { await browser.close(); }
