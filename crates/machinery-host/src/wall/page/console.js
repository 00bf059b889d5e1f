// The console of a machine: noVNC shows its screen, and sends keys and clicks.

const $ = (id) => document.getElementById(id);
const name = new URLSearchParams(location.hash.slice(1)).get("machine") ?? "";

$("name").textContent = name;
document.title = `${name} · Console`;

function say(text) {
  $("status").textContent = text;
}

/** Returns the reason for which the host has no console of the machine. */
async function reason() {
  const reply = await fetch(`/machines/${encodeURIComponent(name)}`).catch(() => null);
  if (!reply) return "The host does not answer.";
  if (reply.status === 401) return "Log in on the wall first.";
  if (!reply.ok) return "There is no such machine.";
  const { machine } = await reply.json();
  return machine.console ? `The console is closed; the machine is ${machine.state}.` : "The machine has no console.";
}

async function connect() {
  $("again").hidden = true;
  let RFB;
  try {
    RFB = (await import("/novnc/core/rfb.js")).default;
  } catch {
    return say(
      "noVNC is not installed on the host: install Debian's package novnc, or set web_novnc to its folder. " +
        "If it is there, the host's log has the reason.",
    );
  }
  say("Connecting …");
  const url = `${location.protocol.replace("http", "ws")}//${location.host}/machines/${encodeURIComponent(name)}/console`;
  const rfb = new RFB($("screen"), url);
  rfb.scaleViewport = true;
  rfb.addEventListener("connect", () => {
    say("Connected. Keys and clicks go to the machine.");
    $("keys").disabled = false;
    rfb.focus();
  });
  rfb.addEventListener("disconnect", async () => {
    $("keys").disabled = true;
    $("again").hidden = false;
    say(await reason());
  });
  $("keys").onclick = () => {
    rfb.sendCtrlAltDel();
    rfb.focus();
  };
}

$("again").addEventListener("click", connect);
connect();
