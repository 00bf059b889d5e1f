// The page to log in: exchanges the token for a cookie. The token comes after `#` in the address, or from the form.

const form = document.getElementById("form");
const token = document.getElementById("token");
const message = document.getElementById("message");

async function logIn(value) {
  message.textContent = "";
  try {
    const reply = await fetch("/login", { method: "POST", headers: { Authorization: `Bearer ${value}` } });
    if (reply.ok) return location.replace("/");
    message.textContent = reply.status === 401 ? "The token is wrong." : await reply.text();
  } catch {
    message.textContent = "The host does not answer.";
  }
  token.select();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  // A header has no other characters.
  logIn(token.value.replace(/[^\x21-\x7e]/g, ""));
});

/** Logs in with the token in the address; reports whether there is one. */
function logInFromAddress() {
  const value = location.hash.slice(1);
  if (!value || value.includes("=")) return false;
  // The history of the browser must not keep it.
  history.replaceState(null, "", "/");
  logIn(value);
  return true;
}

// The address may be pasted while this page is open.
addEventListener("hashchange", logInFromAddress);
if (!logInFromAddress()) {
  // A browser hides the cookie from a page that a link of another site has opened.
  fetch("/login").then((reply) => reply.ok && location.reload()).catch(() => {});
}
