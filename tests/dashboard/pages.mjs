// The pages in a real browser: node pages.mjs SCENARIO URL OUT. Ends with 1 and a list where something is wrong: an error in the console, a rule
// of accessibility that is broken, a page that does not show what it is for. Leaves a screenshot a page in OUT.
import { createRequire } from "node:module";
import { readFileSync, mkdirSync } from "node:fs";
import path from "node:path";

const [scenario, base, out] = process.argv.slice(2);
const require = createRequire(path.join(process.env.CONTRAFLOW_PLAYWRIGHT, "package.json"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
mkdirSync(out, { recursive: true });

const faults = [];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"] });

async function open({ width = 1280, height = 860, theme = "light" } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: theme, bypassCSP: false, reducedMotion: "reduce" });
  const page = await context.newPage();
  page.quiet = false;
  page.on("console", (message) => { if (!page.quiet && message.type() === "error") faults.push(`${page.url()}: console: ${message.text()}`); });
  page.on("pageerror", (error) => faults.push(`${page.url()}: ${error.message}`));
  page.on("request", (request) => { if (!request.url().startsWith(base) && !request.url().startsWith("blob:") && !request.url().startsWith("data:")) faults.push(`${page.url()} loads ${request.url()}`); });
  return page;
}

async function visit(page, where, wait, name, check = true) {
  await page.goto(new URL(where, base).href);
  try { await page.waitForSelector(wait, { timeout: 30000 }); } catch { faults.push(`${where}: nothing matches ${wait}; it says ${JSON.stringify((await page.textContent("main"))?.slice(0, 300))}`); }
  await page.waitForTimeout(400);
  if (name) await page.screenshot({ path: path.join(out, `${name}.png`) });
  if (check) await accessible(page, where);
}

async function accessible(page, where) {
  // By the debugger's way, which no content policy stands in.
  const session = await page.context().newCDPSession(page);
  await session.send("Runtime.evaluate", { expression: axe });
  const { result } = await session.send("Runtime.evaluate", { expression: "axe.run({ runOnly: ['wcag2a', 'wcag2aa'] }).then((found) => JSON.stringify(found.violations.map((rule) => `${rule.id}: ${rule.nodes.slice(0, 3).map((node) => node.html.slice(0, 120) + ' ' + (node.any[0]?.message ?? '')).join(' | ')}`)))", awaitPromise: true, returnByValue: true });
  for (const rule of JSON.parse(result.value ?? '["axe did not run"]')) faults.push(`${where}: ${rule}`);
}

const expect = (is, words) => { if (!is) faults.push(words); };
const overflow = async (page, where) => expect(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth + 1), `${where}: wider than the screen`);

async function run(page, id) {
  await visit(page, `/run/${id}`, ".u-over", "run");
  expect((await page.textContent("main")).includes("Is it learning?"), "run: the five questions");
  const before = await page.textContent(".meter + .tiles");
  expect(/nats\/token/.test(before) && /tokens\/s/.test(before), `run: units in ${before}`);
  await visit(page, `/run/${id}/pipeline`, "canvas", "pipeline");
  const box = await page.locator("canvas").first().boundingBox();
  await page.mouse.click(box.x + 96 + (box.width - 96) * 0.5, box.y + 14);
  await page.waitForSelector("dt");
  expect((await page.textContent("main")).includes("on its way"), "pipeline: a click follows a micro-batch");
  expect(new URL(page.url()).searchParams.has("action"), "pipeline: the action is in the address");
  await page.screenshot({ path: path.join(out, "pipeline-click.png") });
  await page.locator("main").focus();
  await page.keyboard.press("ArrowRight");
  if (await page.evaluate((id) => fetch(`/api/v1/runs/${id}`).then((response) => response.json()).then((run) => run.has_recording), id)) {
    await page.click("text=Latest step");
    await page.waitForFunction(() => document.querySelector("main").textContent.includes("ecorded in step"));
    await page.waitForTimeout(300);
    await page.screenshot({ path: path.join(out, "pipeline-recorded.png") });
  }
  await page.click("text=Simulated");
  await page.waitForFunction(() => document.querySelector("main").textContent.includes("imulated on"));
  await page.waitForTimeout(300);
  await page.screenshot({ path: path.join(out, "pipeline-simulated.png") });
  await page.click("text=Play the step");
  await page.waitForTimeout(600);
  expect((await page.textContent("main")).includes("Pause"), "pipeline: it plays");
  await visit(page, `/run/${id}/experts`, "canvas", "experts");
  await page.waitForFunction(() => /max\/mean load per rank [\d.]+ now, [\d.]+ with experts moved, [\d.]+ with one copy more a rank/.test(document.querySelector("main").textContent));
  await page.click(".pair button:has-text('layer 3')");
  await page.waitForFunction(() => document.querySelector("main").textContent.includes("layer 3: max/mean") && location.search.includes("layer=3"));
  await page.screenshot({ path: path.join(out, "experts-placement.png"), fullPage: true });
  await visit(page, `/run/${id}/layers`, "canvas", "layers");
  await visit(page, `/run/${id}/samples`, ".state, pre", null);
  // The browser itself says that it is not there.
  page.quiet = true;
  await visit(page, "/nowhere", ".state", null, false);
  page.quiet = false;
}

const scenarios = {
  /** A run that trains: the same page shows later steps without being loaded anew. */
  async live() {
    const page = await open();
    await visit(page, "/", ".u-over", null);
    const id = decodeURIComponent(new URL(page.url()).pathname.split("/")[2]);
    const step = async () => Number(await page.getAttribute(".meter", "aria-valuenow"));
    const first = await step();
    await page.waitForFunction((first) => Number(document.querySelector(".meter").getAttribute("aria-valuenow")) > first, first, { timeout: 60000 });
    await run(page, id);
    const dark = await open({ theme: "dark" });
    await visit(dark, `/run/${id}`, ".u-over", "run-dark");
    await visit(dark, `/run/${id}/pipeline`, "canvas", "pipeline-dark");
    const phone = await open({ width: 390, height: 800 });
    for (const name of ["", "/pipeline", "/experts"]) { await visit(phone, `/run/${id}${name}`, "canvas", name ? null : "phone"); await overflow(phone, `phone ${name}`); }
  },
  /** Runs that are over. */
  async finished() {
    const page = await open();
    await visit(page, "/", "table", "runs");
    await visit(page, "/compare", ".u-over", "compare");
    expect((await page.locator(".keys .line-swatch").count()) >= 4, "compare: several lines");
    await page.selectOption(".tools select", "time");
    await page.waitForTimeout(500);
    expect(page.url().includes("axis=time"), "compare: the axis is in the address");
    const names = await page.locator(".tools input[type=checkbox]").count();
    expect(names >= 2, "compare: two runs to choose");
    const first = await page.evaluate(() => fetch("/api/v1").then((response) => response.json()).then((about) => about.runs[0].id));
    await run(page, first);
    const box = page.locator(".u-over").first();
    await visit(page, `/run/${first}`, ".u-over", null);
    const at = await box.boundingBox();
    await page.mouse.move(at.x + at.width * 0.3, at.y + 50); await page.mouse.down(); await page.mouse.move(at.x + at.width * 0.7, at.y + 50, { steps: 5 }); await page.mouse.up();
    await page.waitForFunction(() => location.search.includes("from="));
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("button[aria-label='Save Loss as SVG']")]);
    expect(readFileSync(await download.path(), "utf8").startsWith("<svg"), "run: SVG of a plot");
  },
  /** A cluster: a form with faults, a job from the form, its pages. */
  async cluster() {
    const page = await open();
    await visit(page, "/", "table, .state", null);
    await visit(page, "/nodes", "table", "cluster");
    await visit(page, "/jobs/new", "textarea", null);
    page.quiet = true;
    await page.fill("textarea", "[training]\nstepz = 3\nglobal_batch_size = 0\n");
    await page.click("text=Check");
    await page.waitForSelector(".fault.mono, .section .mono");
    expect((await page.textContent("main")).includes("stepz"), "submit: faults by key");
    await page.screenshot({ path: path.join(out, "submit-faults.png") });
    page.quiet = false;
    await page.fill("textarea", readFileSync(process.env.RECIPE, "utf8"));
    await page.click("text=Check");
    await page.waitForSelector("text=This is what it would be");
    await accessible(page, "/jobs/new");
    await page.click("button.primary");
    await page.waitForFunction(() => /^\/jobs\/(?!new)/.test(location.pathname), null, { timeout: 30000 });
    const id = decodeURIComponent(new URL(page.url()).pathname.split("/")[2]);
    await page.waitForSelector(".pill.running, .pill.done", { timeout: 60000 });
    await visit(page, `/jobs/${id}`, "dl", "job");
    await visit(page, "/jobs", "table", "jobs");
    await visit(page, `/run/${id}`, ".u-over", null);
    await visit(page, `/run/${id}/pipeline`, "canvas", null);
    await visit(page, `/logs?job=${id}`, "td", "logs");
    await visit(page, `/incidents?job=${id}`, ".state, ol", null);
    console.log(`job ${id}`);
  },
  /** After a worker was killed. */
  async incident() {
    const page = await open();
    await page.goto(new URL(`/incidents?job=${process.env.JOB}`, base).href);
    await page.waitForSelector("ol.list", { timeout: 60000 });
    await visit(page, `/incidents?job=${process.env.JOB}`, "ol.list", "incidents");
  },
};

try { await scenarios[scenario](); } catch (error) { faults.push(`${scenario}: ${error.stack}`); }
await browser.close();
if (faults.length) { console.error([...new Set(faults)].join("\n")); process.exit(1); }
