// The live fleet, asked once a second while the page is looked at; later and later while the server is away.
import { $, make, ms } from "./dom.js";
import { headers } from "./settings.js";

const EVERY = 1000, LONGEST = 15000, PATIENCE = 5000;
const LACKS = { identity: "no model", gateway: "shutting down", redis: "no Redis" };

export function watchFleet(settings, onModel) {
  let timer = null, failures = 0;

  async function look() {
    clearTimeout(timer);
    try {
      const query = new URLSearchParams({ ttft_ms: settings.ttft_ms, tpot_ms: settings.tpot_ms, window_s: settings.minutes * 60 });
      const reply = await fetch(`/fleet?${query}`, { headers: headers(settings), signal: AbortSignal.timeout(PATIENCE) });
      if (reply.status === 401) throw new Error("This server asks for an API key: enter it in the settings.");
      if (!reply.ok) throw new Error(`The server answered ${reply.status}.`);
      const fleet = await reply.json();
      failures = 0;
      $("#away").hidden = true;
      onModel(fleet.model);
      draw(fleet, settings);
    } catch (error) {
      failures += 1;
      const wait = pause();
      const words = error instanceof TypeError || error.name === "TimeoutError" ? "The server cannot be reached." : error.message;
      $("#away").textContent = `${words} Trying again every ${Math.round(wait / 1000)} s.`;
      $("#away").hidden = false;
      status("away", "bad");
    }
    if (!document.hidden) timer = setTimeout(look, pause());
  }

  const pause = () => Math.min(LONGEST, EVERY * 2 ** Math.min(failures, 4));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  window.addEventListener("online", look);
  look();
  return { look };
}

function status(words, kind) {
  $("#status").textContent = words;
  $("#status").className = `pill ${kind}`;
}

function draw(fleet, settings) {
  $("#model").textContent = fleet.model;
  status(fleet.missing.map((what) => LACKS[what] ?? `no ${what}`).join(", ") || "ready", fleet.missing.length ? "bad" : "good");
  const recent = fleet.recent;
  $("#window").textContent = `last ${Math.round(recent.window_s / 60)} min`;
  $("#goodput").textContent = recent.goodput_rps.toFixed(2);
  $("#attainment").textContent = recent.attainment === null ? "–" : `${(100 * recent.attainment).toFixed(0)} %`;
  $("#judged").textContent = `of ${recent.requests} in time`;
  const row = (name, pair, objective) => [
    make("dt", { textContent: `${name} ≤ ${ms(objective)}` }),
    make("dd", { textContent: pair === null ? "–" : `P50 ${ms(pair.p50)} · P99 ${ms(pair.p99)}` }),
  ];
  $("#latency").replaceChildren(...row("TTFT", recent.ttft_ms, settings.ttft_ms), ...row("TPOT", recent.tpot_ms, settings.tpot_ms));
  $("#queued").textContent = fleet.queue.queued;
  $("#running").textContent = fleet.queue.running;
  $("#recoveries").textContent = fleet.recoveries;
  $("#count").textContent = fleet.workers.length;
  $("#workers").replaceChildren(...(fleet.workers.length ? fleet.workers.map(line) : [make("li", { className: "quiet", textContent: "No worker has joined yet." })]));
}

function line(worker) {
  const held = worker.total_pages - worker.free_pages;
  const meter = make("meter", { min: 0, max: worker.total_pages, high: 0.9 * worker.total_pages, value: held });
  meter.setAttribute("aria-label", `${held} of ${worker.total_pages} pages in use`);
  return make("li", {},
    make("div", { className: "line" }, make("span", { className: "role", textContent: worker.role + (worker.draining ? " (draining)" : "") }), make("span", { className: "name", textContent: worker.name.slice(0, 8) })),
    meter,
    make("div", { className: "line quiet" }, make("span", { textContent: `${worker.free_pages} of ${worker.total_pages} pages free` }), make("span", { textContent: `${worker.running} running, ${worker.waiting} waiting` })));
}
