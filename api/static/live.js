// Keeps an open page up to date: waits for an event of the search (or a moment), fetches the page again, and replaces the
// parts marked data-live whose HTML has changed. Scroll position, open details and the plots' zoom stay as they are.
"use strict";

(() => {
  const MIN_PAUSE_MILLISECONDS = 700; // between two fetches, however fast the events come
  const IDLE_MILLISECONDS = 15000; // between two fetches without an event: clocks move on
  const served = new Map(); // id -> the HTML that the server last sent, which scripts may since have changed

  const parts = (root) => root.querySelectorAll("[data-live][id], [data-figure][id]");
  const content = (part) => part.dataset.figure ?? part.innerHTML;

  function replace(part, fresh) {
    if (part.dataset.figure !== undefined) {
      part.dataset.figure = fresh.dataset.figure;
      window.nasDraw?.(part);
      return;
    }
    const open = new Map([...part.querySelectorAll("details[id]")].map((details) => [details.id, details.open]));
    const rows = new Set([...part.querySelectorAll("tr[id]")].map((row) => row.id));
    const scrolled = [...part.querySelectorAll(".scroll, .events")].map((box) => [box.scrollLeft, box.scrollTop]);
    part.replaceChildren(...fresh.childNodes);
    for (const [name, value] of Object.entries(fresh.dataset)) part.dataset[name] = value;
    for (const name of ["stream", "refreshSeconds"]) if (!(name in fresh.dataset)) delete part.dataset[name];
    part.querySelectorAll("details[id]").forEach((details) => { if (open.has(details.id)) details.open = open.get(details.id); });
    part.querySelectorAll(".scroll, .events").forEach((box, index) => { if (scrolled[index]) [box.scrollLeft, box.scrollTop] = scrolled[index]; });
    if (rows.size) part.querySelectorAll("tr[id]").forEach((row) => { if (!rows.has(row.id)) row.classList.add("new-row"); });
  }

  async function refresh() {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    for (const part of parts(fresh)) {
      const shown = document.getElementById(part.id);
      const text = content(part);
      if (shown && served.get(part.id) !== text) {
        served.set(part.id, text);
        replace(shown, part);
      }
    }
  }

  function tell(text, lost) {
    const sign = document.getElementById("live");
    sign.hidden = text === null;
    sign.classList.toggle("lost", lost);
    if (text !== null) document.getElementById("live-text").textContent = text;
  }

  let wanted = false, fetching = false;
  async function ask() {
    wanted = true;
    if (fetching) return;
    fetching = true;
    while (wanted) {
      wanted = false;
      try { await refresh(); } catch { tell("connection lost, trying again", true); }
      await new Promise((resolve) => setTimeout(resolve, MIN_PAUSE_MILLISECONDS));
    }
    fetching = false;
  }

  // The event types that the API sends; EventSource has no way to listen to all of them at once.
  const TYPES = ["search.created", "search.running", "search.preparing", "search.searching", "search.confirming", "search.pausing", "search.paused",
    "search.resumed", "search.updated", "search.cancelling", "search.teacher_known", "search.prepared", "search.winner",
    "leaderboard.changed", "task.weak",
    "trial.proposed", "trial.started", "trial.rung_finished", "trial.waiting", "trial.completed", "trial.stopped", "trial.failed", "trial.retried", "trial.cancelled", "trial.confirmed",
    "attempt.started", "attempt.waiting", "attempt.succeeded", "attempt.failed", "attempt.lost", "attempt.cancelled"];
  const LAST_TYPES = ["search.succeeded", "search.failed", "search.cancelled"];

  function follow(address) {
    const source = new EventSource(address);
    source.onopen = () => { tell("live", false); };
    source.onerror = () => { tell("connection lost, trying again", true); };
    for (const type of TYPES) source.addEventListener(type, ask);
    for (const type of LAST_TYPES) source.addEventListener(type, () => { source.close(); tell(null, false); ask(); });
    const clock = setInterval(() => { if (source.readyState === EventSource.CLOSED) clearInterval(clock); else if (!document.hidden) ask(); }, IDLE_MILLISECONDS);
    // A page that comes back from the background may have slept through some.
    document.addEventListener("visibilitychange", () => { if (!document.hidden && source.readyState !== EventSource.CLOSED) ask(); });
  }

  let polling = false;
  function poll() {
    const part = document.querySelector("[data-refresh-seconds]");
    polling = part !== null;
    if (!polling) { tell(null, false); return; }
    tell("live", false);
    setTimeout(async () => { if (!document.hidden) await ask(); poll(); }, 1000 * Number(part.dataset.refreshSeconds));
  }

  document.documentElement.classList.add("scripted");
  for (const part of parts(document)) served.set(part.id, content(part));
  const stream = document.querySelector("[data-stream]");
  if (stream) follow(stream.dataset.stream);
  else poll();

  document.addEventListener("click", async (click) => {
    const button = click.target.closest("[data-post]");
    if (!button || (button.dataset.confirm && !confirm(button.dataset.confirm))) return;
    button.disabled = true;
    const response = await fetch(button.dataset.post, { method: "POST" });
    if (!response.ok) alert((await response.json()).detail);
    await ask();
    if (!stream && !polling) poll(); // what was asked for may take a while
  });
})();
