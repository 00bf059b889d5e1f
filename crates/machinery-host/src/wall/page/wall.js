// The wall: keeps the machines of the host's events, and connects the tiles with the view of one machine.
//
// While the page is hidden, it neither listens nor asks for screens: a new snapshot follows when it is visible again.

import { Tiles } from "./tiles.js";
import { View } from "./machine.js";

const $ = (id) => document.getElementById(id);

/** The machines by name, as the host sends them. */
const machines = new Map();
/** The page may act, and its clock is ahead of the host's by so many milliseconds. */
const settings = { actions: false, skew: 0 };

const view = new View(machines, settings);
const tiles = new Tiles(machines, settings);

let source;
let lostSince;

function listen() {
  if (source || document.hidden) return;
  source = new EventSource("/events");
  source.addEventListener("snapshot", (event) => onSnapshot(JSON.parse(event.data)));
  source.addEventListener("batch", (event) => onBatch(JSON.parse(event.data)));
  source.addEventListener("open", () => showConnection(true));
  source.addEventListener("error", () => {
    // The browser tries again by itself, unless the host has refused.
    if (source?.readyState === EventSource.CLOSED) checkLogin();
    showConnection(false);
  });
}

function hide() {
  source?.close();
  source = undefined;
}

async function checkLogin() {
  hide();
  const reply = await fetch("/login").catch(() => null);
  if (reply?.status === 401) return location.reload();
  setTimeout(listen, 2000);
}

function showConnection(isThere) {
  lostSince = isThere ? undefined : (lostSince ?? new Date());
  $("connection").hidden = isThere;
  $("connection").textContent = isThere
    ? ""
    : `The host does not answer since ${lostSince.toLocaleTimeString()}. The page shows what it knew then.`;
  document.body.classList.toggle("lost", !isThere);
}

function onSnapshot(snapshot) {
  settings.actions = snapshot.actions;
  settings.skew = Date.now() - snapshot.time;
  machines.clear();
  for (const machine of snapshot.machines) machines.set(machine.name, machine);
  tiles.showAll();
  view.onChange(undefined, []);
  openFromAddress();
}

function onBatch(batch) {
  settings.skew = Date.now() - batch.time;
  for (const machine of batch.machines) machines.set(machine.name, machine);
  tiles.show(batch.machines.map((machine) => machine.name));
  view.onChange(new Set(batch.machines.map((machine) => machine.name)), batch.events);
  announce(batch.events);
}

/** Has a screen reader say what an operator has to know: accidents, and all changes of the open machine. */
function announce(events) {
  const news = events.map((event) => newsOf(event)).filter(Boolean);
  if (news.length > 3) news.splice(3, news.length, `and ${news.length - 3} more`);
  if (news.length) $("news").textContent = news.join(". ");
}

function newsOf({ event, machine, state, reason }) {
  switch (event) {
    case "state":
      return reason || view.name === machine ? `${machine} is ${state}${reason ? `: ${reason}` : ""}` : "";
    case "disabled":
    case "quarantined":
    case "run_error":
    case "capture_failed":
      return `${machine}: ${event.replace("_", " ")}: ${reason}`;
    case "enabled":
    case "healed":
      return `${machine} is back in the pool`;
    default:
      return "";
  }
}

/** The address names the machine that is open, so that a link to it works, and the browser's way back. */
function openFromAddress() {
  // Somebody has opened the address to log in again.
  if (location.hash && !location.hash.includes("=")) history.replaceState(null, "", "/");
  const name = new URLSearchParams(location.hash.slice(1)).get("machine");
  if (name && machines.has(name)) view.open(name);
  else view.close();
}

addEventListener("hashchange", openFromAddress);
document.addEventListener("visibilitychange", () => (document.hidden ? hide() : listen()));
addEventListener("pagehide", hide);
addEventListener("pageshow", listen);
setInterval(() => document.hidden || (tiles.showAges(), view.showAge()), 1000);
listen();
