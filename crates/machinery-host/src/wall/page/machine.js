// The view of one machine: its screen live, its values, its latest events, and the actions on it.

import { Screen, ageOf, element, problemOf } from "./tiles.js";

const $ = (id) => document.getElementById(id);

/** The number of events that are shown. */
const MAX_EVENTS = 60;
/** The actions: their names, their questions, and the states in which they make sense. */
const ACTIONS = [
  { name: "restore", label: "Restore", text: "It starts from its snapshot. A run under way ends, and its changes are lost." },
  { name: "stop", label: "Stop", text: "It is powered off at once. Its changes are lost.", when: (m) => m.state !== "poweroff" },
  { name: "enable", label: "Enable", text: "It returns to the pool.", when: (m) => m.disabled || m.quarantine },
  { name: "disable", label: "Disable", text: "It leaves the pool. A run under way goes on.", when: (m) => !m.disabled, reason: true },
];

export class View {
  constructor(machines, settings) {
    this.machines = machines;
    this.settings = settings;
    this.screen = new Screen($("view-screen"));
    this.events = [];
    $("view-close").addEventListener("click", () => $("view").close());
    $("view").addEventListener("close", () => this.onClose());
    $("confirm-no").addEventListener("click", () => $("confirm").close());
    $("confirm-form").addEventListener("submit", (event) => {
      event.preventDefault();
      $("confirm").close();
      this.confirmed();
    });
    setInterval(() => this.askForScreen(), 250);
  }

  open(name) {
    if (this.name === name) return;
    this.name = name;
    this.events = [];
    this.full = undefined;
    this.screen.clear();
    $("view-name").textContent = name;
    $("view-message").textContent = "";
    this.show();
    this.load();
    if (!$("view").open) $("view").showModal();
  }

  close() {
    if ($("view").open) $("view").close();
  }

  onClose() {
    // The event comes late: another machine may be open by now.
    if ($("view").open) return;
    const name = this.name;
    this.name = undefined;
    this.screen.clear();
    history.replaceState(null, "", "/");
    const tile = document.querySelector(`a.tile[href="#machine=${CSS.escape(encodeURIComponent(name))}"]`);
    tile?.focus();
  }

  /** Shows changes; all machines have changed if no names are given. */
  onChange(names, events) {
    if (!this.name) return;
    if (!this.machines.has(this.name)) return this.close();
    this.addEvents(events.filter((event) => event.machine === this.name));
    if (names && !names.has(this.name)) return;
    this.show();
    this.load();
  }

  addEvents(events) {
    for (const event of events) {
      if (event.event === "progress") $("view-message").textContent = `${Math.round(event.fraction * 100)} %`;
      else this.events.push(event);
    }
    this.events.splice(0, this.events.length - MAX_EVENTS);
  }

  /** Reads all values, once more if they change meanwhile. */
  async load() {
    if (this.loading) return void (this.again = true);
    this.loading = true;
    const name = this.name;
    try {
      const reply = await fetch(`/machines/${encodeURIComponent(name)}`, { cache: "no-store" });
      if (reply.ok && name === this.name) {
        this.full = await reply.json();
        this.events = this.full.events;
        this.show();
      }
    } catch {
      // The page shows that the host does not answer.
    } finally {
      this.loading = false;
      if (this.again && this.name) {
        this.again = false;
        this.load();
      }
    }
  }

  show() {
    const machine = this.machines.get(this.name);
    $("view-state").textContent = machine.state;
    $("view-state").dataset.state = machine.state;
    if (machine.state !== "running") this.screen.clear();
    $("view-screen").alt = `Screen of ${this.name}`;
    $("view-no-screen").textContent = machine.state === "running" ? (machine.screen ? "" : "Its machinery shows no screens.") : `The machine is ${machine.state}.`;
    this.showDownload();
    this.showProblems(machine);
    this.showDetails(machine);
    this.showEvents();
    this.showActions(machine);
    this.showConsole(machine);
  }

  showConsole(machine) {
    const isThere = this.settings.actions && machine.console && ["running", "paused", "suspended"].includes(machine.state);
    const href = `/console#machine=${encodeURIComponent(machine.name)}`;
    const link = () => element("a", { className: "button", textContent: "Console", href, target: "_blank", rel: "noopener" });
    if ($("view-console").firstChild?.getAttribute("href") === href && isThere) return;
    $("view-console").replaceChildren(...(isThere ? [link()] : []));
  }

  showDownload() {
    const { url } = this.screen;
    $("view-download").hidden = !url;
    if (url) {
      $("view-download").href = url;
      $("view-download").download = `${this.name}.png`;
    }
  }

  showProblems(machine) {
    const full = this.full?.machine;
    const lines = [];
    if (machine.quarantine) {
      const { tries, next_try_in } = full?.quarantine ?? {};
      const next = next_try_in === undefined || next_try_in === null ? "" : `, next try in ${next_try_in} s`;
      lines.push(["In quarantine", `${machine.quarantine}${tries === undefined ? "" : ` (${tries} tries${next})`}`]);
    }
    if (machine.disabled) lines.push(["Disabled", machine.disabled]);
    for (const error of full?.run_errors ?? []) lines.push(["Run error", typeof error === "string" ? error : (error.reason ?? JSON.stringify(error))]);
    for (const warning of full?.warnings ?? []) lines.push(["Warning", warning]);
    for (const error of (full?.errors ?? []).slice(-5).reverse()) lines.push(["Error", error]);
    const items = lines.map(([what, text]) => element("li", {}, element("strong", { textContent: what }), ` ${text}`));
    $("view-problems").replaceChildren(...(items.length ? [element("ul", { className: "problems" }, ...items)] : []));
    $("view").classList.toggle("problem", problemOf(machine) !== "");
  }

  showDetails(machine) {
    const full = this.full?.machine ?? {};
    const since = (seconds) => (seconds ? new Date(seconds * 1000 + this.settings.skew).toLocaleString() : "");
    const ready = full.ready && [full.ready.mode, full.ready.reason].filter(Boolean).join(": ");
    const rows = [
      ["Running for", ageOf(machine, this.settings), "view-age"],
      ["Task", machine.task && `${machine.task}${full.locked_since ? `, since ${since(full.locked_since)}` : ""}`],
      ["Reserved for", machine.reserved_by],
      ["Next restore", ready ?? machine.mode],
      ["System", `${machine.platform} ${machine.os_version}${full.architecture ? `, ${full.architecture}` : ""}`],
      ["Address", [machine.ip, full.mac_address, full.interface].filter(Boolean).join(", ")],
      ["Tags", machine.tags.join(", ")],
      ["Label", full.label],
      ["Snapshot", full.snapshot],
      ["Machinery", `${machine.machinery}${this.full ? `, ${this.full.machinery_version}` : ""}`],
      ["Confinement", full.jail],
      ["Change", full.change_pending && "its new configuration applies when it is free"],
    ];
    const nodes = rows.filter(([, value]) => value).flatMap(([name, value, id]) => [
      element("dt", { textContent: name }),
      element("dd", { textContent: value, id: id ?? "" }),
    ]);
    $("view-details").replaceChildren(...nodes);
  }

  showAge() {
    const age = document.getElementById("view-age");
    const machine = this.machines.get(this.name);
    if (age && machine) age.textContent = ageOf(machine, this.settings);
  }

  showEvents() {
    const text = ({ event, state, reason, task_id, mode, tries }) => {
      const details = [state, mode, task_id && `task ${task_id}`, tries && `${tries} tries`, reason].filter(Boolean);
      return [event.replace("_", " "), details.join(", ")].filter(Boolean).join(": ");
    };
    const items = [...this.events].reverse().map((event) =>
      element(
        "li",
        {},
        element("time", { textContent: new Date(event.time + this.settings.skew).toLocaleTimeString() }),
        ` ${text(event)}`,
      ),
    );
    $("view-events").replaceChildren(...(items.length ? items : [element("li", { textContent: "none yet" })]));
  }

  showActions(machine) {
    const wanted = this.settings.actions ? ACTIONS.filter(({ when }) => !when || when(machine)) : [];
    const names = wanted.map(({ name }) => name).join();
    if ($("view-actions").dataset.names === names) return;
    $("view-actions").dataset.names = names;
    const buttons = wanted.map((action) => {
      const button = element("button", { type: "button", textContent: action.label });
      button.addEventListener("click", () => this.confirm(action));
      return button;
    });
    $("view-actions").replaceChildren(...buttons);
  }

  /** Asks before an action. Escape and Cancel do nothing. */
  confirm({ name, label, text, reason }) {
    const machine = this.machines.get(this.name);
    const dialog = $("confirm");
    $("confirm-question").textContent = `${label} ${machine.name}?`;
    $("confirm-text").textContent = (machine.task ? `Task ${machine.task} has the machine. ` : "") + text;
    $("confirm-yes").textContent = label;
    $("confirm-reason-label").hidden = !reason;
    $("confirm-reason").value = "";
    this.confirmed = () => this.act(machine.name, name, label, reason ? $("confirm-reason").value : "");
    dialog.showModal();
    (reason ? $("confirm-reason") : $("confirm-no")).focus();
  }

  async act(machine, action, label, body) {
    const say = (text) => machine === this.name && ($("view-message").textContent = text);
    say(`${label}: under way`);
    try {
      const reply = await fetch(`/machines/${encodeURIComponent(machine)}/${action}`, { method: "POST", body });
      const { reason } = await reply.json().catch(() => ({}));
      say(reply.ok ? `${label}: done` : `${label} failed: ${reason ?? `status ${reply.status}`}`);
    } catch {
      say(`${label}: the host does not answer`);
    }
    if (this.name) this.load();
  }

  askForScreen() {
    const machine = this.machines.get(this.name);
    if (document.hidden || !machine?.screen || machine.state !== "running" || this.screen.asked) return;
    if (performance.now() < this.screen.due) return;
    this.screen.ask(this.name).then((why) => {
      // Somebody looks at this machine alone: its screen is always live.
      this.screen.due = Math.min(this.screen.due, performance.now() + 1000);
      if (!this.screen.url && this.machines.get(this.name)?.state === "running") $("view-no-screen").textContent = why;
      this.showDownload();
    });
  }
}
