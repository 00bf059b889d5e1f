// The tiles: one for each machine, with its screen. Only tiles in view ask for their screens.

const $ = (id) => document.getElementById(id);

/** The time between two questions for a screen: the first, and the longest while the screen does not change. */
const FIRST_WAIT = 1000;
const LONGEST_WAIT = 4000;
/** The screens that are asked for at a time. A browser has six connections, and the events need one. */
const MAX_ASKED = 4;
const STATES = ["running", "starting", "stopping", "paused", "suspended", "restored", "poweroff", "error"];

/** The problem of a machine in one word, if it has one. */
export function problemOf(machine) {
  if (machine.quarantine) return "quarantine";
  if (machine.disabled) return "disabled";
  if (machine.state === "error") return "error";
  return machine.run_errors ? "run error" : "";
}

/** The words for a clone, in the order of their counts. */
const WORDS = ["ready", "reserved", "locked", ...STATES.slice(0, 6), "error", "disabled", "quarantined"];

/** The word for a clone: why it is out of the pool, or its state, or why no other task can have it. */
function wordOf({ quarantine, disabled, state, task, reserved_by }) {
  if (quarantine) return "quarantined";
  if (disabled) return "disabled";
  if (state !== "poweroff") return state;
  return task ? "locked" : reserved_by ? "reserved" : "ready";
}

/** The numbers of clones by their word, such as `18 ready, 2 running`. */
function statesOf(machines) {
  const words = machines.map(wordOf);
  const count = (word) => words.filter((one) => one === word).length;
  return WORDS.filter(count).map((word) => `${count(word)} ${word}`).join(", ");
}

/** A duration in seconds as text. */
export function duration(seconds) {
  const [d, h, m, s] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

export function ageOf(machine, settings) {
  return machine.since ? duration(Math.max(0, (Date.now() - settings.skew) / 1000 - machine.since)) : "";
}

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The screen of a machine, in an image. */
export class Screen {
  constructor(image) {
    this.image = image;
    this.clear();
  }

  clear() {
    this.etag = undefined;
    this.wait = FIRST_WAIT;
    this.due = 0;
    this.asked = false;
    this.generation = (this.generation ?? 0) + 1;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = undefined;
    this.image.removeAttribute("src");
    this.image.hidden = true;
  }

  /** Asks for the screen of a machine; resolves to the reason if there is none. */
  async ask(name) {
    const generation = this.generation;
    this.asked = true;
    let why = "";
    try {
      const headers = this.etag ? { "If-None-Match": this.etag } : {};
      const reply = await fetch(`/machines/${encodeURIComponent(name)}/screen`, { headers, cache: "no-store" });
      const blob = reply.status === 200 ? await reply.blob() : undefined;
      if (generation !== this.generation) return "";
      if (blob) {
        this.show(blob, reply.headers.get("ETag"));
        this.wait = FIRST_WAIT;
      } else {
        this.wait = Math.min(LONGEST_WAIT, this.wait * 2);
        if (reply.status >= 400) why = (await reply.json().catch(() => ({}))).reason ?? `status ${reply.status}`;
      }
    } catch {
      this.wait = LONGEST_WAIT;
    } finally {
      if (generation === this.generation) {
        this.asked = false;
        this.due = performance.now() + this.wait;
      }
    }
    return why;
  }

  show(blob, etag) {
    const old = this.url;
    this.etag = etag;
    this.url = URL.createObjectURL(blob);
    this.image.src = this.url;
    this.image.hidden = false;
    if (old) URL.revokeObjectURL(old);
  }
}

class Tile {
  constructor(name, settings) {
    this.name = name;
    this.settings = settings;
    this.image = element("img", { alt: "", hidden: true, decoding: "async" });
    this.screen = new Screen(this.image);
    this.noScreen = element("span", { className: "no-screen" });
    this.state = element("span", { className: "badge" });
    this.task = element("span", { className: "task" });
    this.age = element("span", { className: "age" });
    this.mode = element("span", { className: "mode" });
    this.error = element("span", { className: "error" });
    this.link = element(
      "a",
      { className: "tile", href: `#machine=${encodeURIComponent(name)}` },
      element("span", { className: "picture" }, this.image, this.noScreen),
      element("span", { className: "name", textContent: name }),
      element("span", { className: "line" }, this.state, this.age),
      element("span", { className: "line" }, this.task, this.mode),
      this.error,
    );
    this.item = element("li", {}, this.link);
    this.item.tile = this;
  }

  show(machine) {
    const problem = problemOf(machine);
    const wasShown = this.machine?.state === "running" && this.machine?.since === machine.since;
    this.machine = machine;
    if (machine.state !== "running" || !wasShown) this.screen.clear();
    this.state.textContent = machine.state;
    this.state.dataset.state = machine.state;
    this.task.textContent = machine.task ? `task ${machine.task}` : machine.reserved_by ? `for ${machine.reserved_by}` : "";
    this.mode.textContent = machine.mode ?? "";
    this.mode.title = machine.mode ? "way of the next restore" : "";
    this.error.textContent = problem ? `${problem}: ${machine.quarantine ?? machine.disabled ?? machine.error ?? ""}` : "";
    this.link.classList.toggle("problem", problem !== "");
    const isOn = machine.state === "running";
    this.link.classList.toggle("off", !isOn);
    this.noScreen.textContent = isOn ? (machine.screen ? "" : "no screen") : `${machine.platform} ${machine.os_version}`;
    this.showAge();
    // The age changes each second, so the label leaves it out.
    const label = [this.name, machine.state, this.task.textContent, machine.mode, this.error.textContent];
    this.link.setAttribute("aria-label", label.filter(Boolean).join(", "));
  }

  showAge() {
    this.age.textContent = ageOf(this.machine, this.settings);
  }

  get isDue() {
    const { state, screen } = this.machine;
    return state === "running" && screen && !this.screen.asked && performance.now() >= this.screen.due;
  }
}

export class Tiles {
  constructor(machines, settings) {
    this.machines = machines;
    this.settings = settings;
    this.tiles = new Map();
    this.inView = new Set();
    /** The groups of clones that show their tiles. */
    this.unfolded = new Set();
    this.asked = 0;
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.inView.add(target.tile);
        else this.inView.delete(target.tile);
      }
    });
    for (const id of ["text", "state", "machinery", "group"]) {
      $(id).addEventListener("input", () => this.arrange());
    }
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    setInterval(() => this.askForScreens(), 250);
  }

  /** Shows all machines anew. */
  showAll() {
    for (const [name, tile] of this.tiles) {
      if (this.machines.has(name)) continue;
      this.observer.unobserve(tile.item);
      this.inView.delete(tile);
      tile.screen.clear();
      this.tiles.delete(name);
    }
    for (const [name, machine] of this.machines) this.tileOf(name).show(machine);
    const choices = (id, values) => {
      const chosen = $(id).value;
      $(id).replaceChildren(new Option("all", ""), ...values.map((value) => new Option(value)));
      $(id).value = values.includes(chosen) ? chosen : "";
    };
    choices("machinery", [...new Set([...this.machines.values()].map((machine) => machine.machinery))].sort());
    choices("state", [...STATES, "with problems"]);
    this.arrange();
  }

  tileOf(name) {
    let tile = this.tiles.get(name);
    if (!tile) {
      tile = new Tile(name, this.settings);
      this.tiles.set(name, tile);
      this.observer.observe(tile.item);
    }
    return tile;
  }

  /** Shows the changes of these machines. */
  show(names) {
    for (const name of names) this.tileOf(name).show(this.machines.get(name));
    this.arrange();
  }

  showAges() {
    for (const tile of this.inView) tile.showAge();
  }

  matches(machine) {
    const state = $("state").value;
    if (state && !(state === "with problems" ? problemOf(machine) : machine.state === state)) return false;
    if ($("machinery").value && machine.machinery !== $("machinery").value) return false;
    const { name, task, reserved_by, platform, os_version, ip, tags, disabled, quarantine } = machine;
    const text = [name, task, reserved_by, platform, os_version, ip, ...tags, disabled, quarantine].join("\n").toLowerCase();
    return $("text").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  /** Puts each tile into its group, and hides those that do not match, or whose clones are folded. A search unfolds all. */
  arrange() {
    const key = $("group").value;
    const isSearch = ["text", "state", "machinery"].some((id) => $(id).value);
    const groups = new Map();
    let shown = 0;
    for (const tile of [...this.tiles.values()].sort((a, b) => byName(a.name, b.name))) {
      const name = key ? (tile.machine[key] ?? "") : "";
      if (!groups.has(name)) groups.set(name, { name, tiles: [], areClones: key === "clone_of" && name !== "" });
      groups.get(name).tiles.push(tile);
    }
    for (const group of groups.values()) {
      const matching = group.tiles.filter((tile) => this.matches(tile.machine));
      shown += matching.length;
      group.isHidden = matching.length === 0;
      group.isFolded = group.areClones && !isSearch && !this.unfolded.has(group.name);
      for (const tile of group.tiles) tile.item.hidden = group.isFolded || !matching.includes(tile);
    }
    $("none").hidden = shown > 0;
    this.placeGroups([...groups.values()].sort((a, b) => orderOf(a.name) - orderOf(b.name) || byName(a.name, b.name)));
    this.showCounts(shown);
  }

  /** Moves only the tiles that are at another place, so that the focus stays. */
  placeGroups(groups) {
    const main = $("tiles");
    const sections = new Map([...main.children].map((section) => [section.dataset.group, section]));
    groups.forEach((group, index) => {
      const section = sections.get(group.name) ?? this.sectionOf(group.name);
      sections.delete(group.name);
      if (main.children[index] !== section) main.insertBefore(section, main.children[index] ?? null);
      section.hidden = group.isHidden;
      this.showHeading(section, group);
      const list = section.lastChild;
      const items = group.tiles.map((tile) => tile.item);
      items.forEach((item, place) => {
        if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
      });
      while (list.children.length > items.length) list.lastChild.remove();
    });
    for (const section of sections.values()) section.remove();
  }

  sectionOf(name) {
    const fold = element("button", { type: "button", className: "fold" });
    fold.addEventListener("click", () => {
      if (!this.unfolded.delete(name)) this.unfolded.add(name);
      this.arrange();
    });
    const heading = element("h2", {}, fold, element("span"), element("span", { className: "clone-states" }));
    const section = element("section", {}, heading, element("ul", { className: "grid" }));
    section.dataset.group = name;
    return section;
  }

  /** Shows the name of a group. Clones have a button that unfolds them, their number, and their states. */
  showHeading(section, { name, tiles, areClones, isFolded }) {
    const [fold, title, states] = section.firstChild.children;
    const machines = tiles.map((tile) => tile.machine);
    section.firstChild.hidden = !name;
    section.classList.toggle("clones", areClones);
    section.lastChild.hidden = isFolded;
    fold.hidden = !areClones;
    fold.textContent = areClones ? `${name} ×${tiles.length}` : "";
    fold.setAttribute("aria-expanded", String(!isFolded));
    title.textContent = areClones ? "" : name;
    states.textContent = areClones ? statesOf(machines) : "";
    states.classList.toggle("problem", areClones && machines.some(problemOf));
  }

  showCounts(shown) {
    const all = [...this.machines.values()];
    const count = (is) => all.filter(is).length;
    const counts = [
      [`${all.length} ${all.length === 1 ? "machine" : "machines"}`, all.length !== shown ? ` (${shown} shown)` : ""],
      [`${count((machine) => machine.state === "running")} running`],
      [`${count((machine) => machine.task)} with a task`],
      [`${count(problemOf)} with problems`],
    ];
    $("counts").textContent = counts.map((parts) => parts.join("")).join(" · ");
  }

  askForScreens() {
    if (document.hidden || $("view").open) return;
    for (const tile of this.inView) {
      if (this.asked >= MAX_ASKED) return;
      if (tile.item.hidden || !tile.isDue) continue;
      this.asked += 1;
      tile.screen.ask(tile.name).then((why) => {
        this.asked -= 1;
        if (tile.machine.state === "running") tile.noScreen.textContent = tile.screen.url ? "" : why;
      });
    }
  }
}

const collator = new Intl.Collator(undefined, { numeric: true });
const byName = (a, b) => collator.compare(a, b);
const orderOf = (group) => STATES.indexOf(group);
