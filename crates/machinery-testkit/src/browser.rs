//! A real browser: Chromium without a window, over the pipe of its DevTools protocol.
//!
//! ```text
//! start ─▶ one page ─▶ commands and their replies, events in between ─▶ drop: the process and its profile are gone
//! ```
//!
//! Source: <https://chromedevtools.github.io/devtools-protocol/>. A message is JSON, and ends with a zero byte. Chromium reads
//! from descriptor 3 and writes to descriptor 4.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use crate::Result;
use crate::error::{Context, Error};
use crate::process::{self, Process};

/// The names of the program. Debian's package `chromium-headless-shell` is the smallest.
const PROGRAMS: [&str; 3] = ["chromium-headless-shell", "chromium", "google-chrome"];
/// The time of a command, of a load, and of a change that is waited for.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    to: File,
    from: File,
    received: Vec<u8>,
    last_id: u64,
    session: String,
    events: Vec<Value>,
    process: Process,
}

/// Returns the browser's program, if it is installed.
pub fn program() -> Option<PathBuf> {
    let runs =
        |name: &str| Command::new(name).arg("--version").output().is_ok_and(|run| run.status.success());
    PROGRAMS.into_iter().find(|name| runs(name)).map(PathBuf::from)
}

impl Browser {
    /// Starts a browser with an empty page of that size.
    pub fn start(program: &Path, width: u32, height: u32) -> Result<Browser> {
        let what = || "making the pipes of a browser".to_owned();
        let (commands, to) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
        let (from, replies) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
        let dir = process::make_folder()?;
        let mut command = Command::new(program);
        command.arg(format!("--user-data-dir={}", dir.path().join("profile").display()));
        // Tests run as root, for whom Chromium has no sandbox.
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
        command.args(["--remote-debugging-pipe", "--no-first-run", "about:blank"]);
        let mapping = |fd: OwnedFd, child_fd| FdMapping { parent_fd: fd, child_fd };
        command
            .fd_mappings(vec![mapping(commands, 3), mapping(replies, 4)])
            .map_err(|error| Error::new(format!("passing the pipes to a browser: {error}")))?;
        let mut process = Process::spawn_in(&mut command, dir)?;
        process.end_with_this_process()?;
        // The browser's ends are open there alone, so its end closes the pipes.
        drop(command);
        let (to, from) = (File::from(to), File::from(from));
        let (received, session, events) = (Vec::new(), String::new(), Vec::new());
        let mut browser = Browser { to, from, received, last_id: 0, session, events, process };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        browser.session = attached["sessionId"].as_str().unwrap_or_default().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.resize(width, height)?;
        Ok(browser)
    }

    /// Sends a command to the page, and returns its result.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let mut command = json!({"id": id, "method": method, "params": params});
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        let mut line = command.to_string().into_bytes();
        line.push(0);
        self.to.write_all(&line).context(|| format!("sending {method} to the browser"))?;
        let reply = self.wait_for_message(method, |message| message["id"] == json!(id))?;
        match &reply["error"] {
            Value::Null => Ok(reply["result"].clone()),
            error => Err(Error::new(format!("{method}: {error}"))),
        }
    }

    /// Opens an address, and waits until the page is loaded.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let opened = self.call("Page.navigate", json!({"url": url}))?;
        match opened["errorText"].as_str() {
            Some(error) => Err(Error::new(format!("opening {url}: {error}"))),
            // Another address of the same page is no load.
            None if opened["loaderId"].is_null() => Ok(()),
            None => {
                let is_load = |message: &Value| message["method"] == "Page.loadEventFired";
                self.wait_for_message("the load of the page", is_load).map(drop)
            }
        }
    }

    /// Evaluates an expression in the page, and returns its value. A promise is waited for.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true});
        let reply = self.call("Runtime.evaluate", params)?;
        match &reply["exceptionDetails"] {
            Value::Null => Ok(reply["result"]["value"].clone()),
            exception => Err(Error::new(format!("{expression}: {exception}"))),
        }
    }

    /// Waits until the condition holds in the page, which it checks after each change of its document.
    pub fn wait_until(&mut self, condition: &str) -> Result<()> {
        let expression = format!(
            "new Promise((done) => {{
               let timer, observer;
               const look = () => {{
                 let holds = false;
                 try {{ holds = !!({condition}); }} catch {{}}
                 if (holds) {{ observer.disconnect(); clearTimeout(timer); done(true); }}
               }};
               observer = new MutationObserver(look);
               observer.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
               timer = setTimeout(() => {{ observer.disconnect(); done(false); }}, {});
               look();
             }})",
            TIMEOUT.as_millis() * 3 / 4
        );
        let begun = Instant::now();
        loop {
            match self.evaluate(&expression) {
                Ok(Value::Bool(true)) => return Ok(()),
                // Another page was loaded meanwhile.
                Err(error) if begun.elapsed() < TIMEOUT && is_navigation(&error) => {}
                other => {
                    let text = self.evaluate("document.body.innerText").unwrap_or_default();
                    return Err(Error::new(format!("{condition} does not hold ({other:?}): {text}")));
                }
            }
        }
    }

    /// Gives the page another size.
    pub fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size).map(drop)
    }

    /// Has the page see a preference of its user, such as `prefers-color-scheme` and `dark`.
    pub fn prefer(&mut self, feature: &str, value: &str) -> Result<()> {
        let features = json!([{"name": feature, "value": value}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features})).map(drop)
    }

    /// Presses and releases a key, such as `Tab`. `text` is the text that it types, such as `\r` for Enter.
    pub fn press(&mut self, key: &str, code: u32, text: &str) -> Result<()> {
        let kind = if text.is_empty() { "rawKeyDown" } else { "keyDown" };
        let mut params = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
        if !text.is_empty() {
            params["text"] = json!(text);
        }
        self.call("Input.dispatchKeyEvent", params.clone())?;
        params["type"] = json!("keyUp");
        self.call("Input.dispatchKeyEvent", params).map(drop)
    }

    /// Returns the role and the name of each element that a screen reader reads.
    pub fn accessible(&mut self) -> Result<Vec<(String, String)>> {
        let tree = self.call("Accessibility.getFullAXTree", json!({}))?;
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        let nodes = tree["nodes"].as_array().into_iter().flatten();
        let nodes = nodes.filter(|node| node["ignored"] != json!(true));
        Ok(nodes.map(|node| (text(&node["role"]), text(&node["name"]))).collect())
    }

    /// Returns the page as a PNG image, in base64.
    pub fn picture(&mut self) -> Result<String> {
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        Ok(picture["data"].as_str().unwrap_or_default().to_owned())
    }

    /// Returns the events of this method so far, such as `Runtime.exceptionThrown`.
    pub fn events(&self, method: &str) -> Vec<&Value> {
        self.events.iter().filter(|event| event["method"] == method).collect()
    }

    /// Forgets all events so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for a message; the events before it are kept.
    fn wait_for_message(&mut self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let begun = Instant::now();
        loop {
            while let Some(end) = self.received.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.received.drain(..=end).collect();
                let message: Value = serde_json::from_slice(&message[..end])
                    .map_err(|error| Error::new(format!("a message of the browser: {error}")))?;
                if is_it(&message) {
                    return Ok(message);
                }
                if message["method"].is_string() {
                    self.events.push(message);
                }
            }
            let mut fds = [PollFd::new(&self.from, PollFlags::IN)];
            process::wait_for(&mut fds, TIMEOUT.saturating_sub(begun.elapsed()))?;
            let mut chunk = [0; 1 << 16];
            let is_ready = !fds[0].revents().is_empty();
            let read = if is_ready { self.from.read(&mut chunk).unwrap_or(0) } else { 0 };
            if read == 0 {
                let said = self.process.stderr();
                return Err(Error::new(format!("waiting for {what} of the browser. It said:\n{said}")));
            }
            self.received.extend_from_slice(&chunk[..read]);
        }
    }
}

fn is_navigation(error: &Error) -> bool {
    let error = error.to_string();
    ["context was destroyed", "navigated or closed", "Cannot find"].iter().any(|part| error.contains(part))
}
