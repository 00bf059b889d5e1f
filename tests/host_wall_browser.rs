//! The wall in a real browser.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::browser::{self, Browser};
use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::Lab;
use machinery_testkit::package;
use machinery_testkit::requirement::BROWSER;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const KEYS: &str = "web_listen: 127.0.0.1:0\nweb_actions: true\n";
/// The keys that a browser knows by these numbers.
const TAB: u32 = 9;
const ENTER: u32 = 13;
const ESCAPE: u32 = 27;

/// Returns a browser, unless there is none and the test may skip it.
fn browser() -> Option<Browser> {
    let program = BROWSER.or_skip(browser::program())?;
    Some(Browser::start(&program, 1280, 900).unwrap())
}

/// Opens the wall of that host, as an operator does.
fn open(browser: &mut Browser, host: &RunningHost, cwd: &ScratchCwd) {
    host.wait_for_log(&["the wall is served"]).unwrap();
    let printed = host::run(cwd, &["wall"]).unwrap();
    browser.open(printed.stdout.trim()).unwrap();
    browser.wait_until("document.querySelector('a.tile')").unwrap();
    assert_eq!(browser.evaluate("location.hash + document.cookie").unwrap(), "", "the token is nowhere");
    browser.evaluate("window.sameDocument = true").unwrap();
}

fn hundred(keys: &str) -> (RunningHost, ScratchCwd) {
    let names: Vec<String> = (0..100).map(|index| format!("win10-{index}")).collect();
    let mut machines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    machines[1].1 = "poweroff_after_ms: 1500";
    machines[2].1 = "faults: {stop: fail}";
    let cwd = ScratchCwd::double(&machines).unwrap();
    cwd.host_yaml(&format!("{KEYS}{keys}")).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    (host, cwd)
}

/// Expects that the page is the one that was opened, and that it has made no mistake.
#[track_caller]
fn assert_sound(browser: &mut Browser) {
    assert_eq!(browser.evaluate("window.sameDocument").unwrap(), true, "the page was loaded again");
    assert_eq!(browser.events("Runtime.exceptionThrown"), Vec::<&Value>::new());
    // A rule of the page that was broken is an entry of the log.
    let security = |event: &&Value| event["params"]["entry"]["source"] == "security";
    assert_eq!(browser.events("Log.entryAdded").into_iter().filter(security).count(), 0);
}

fn tile(name: &str) -> String {
    format!("document.querySelector('a.tile[href=\"#machine={name}\"]')")
}

#[test]
fn hundred_machines_are_shown_and_change_without_a_reload() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("heal: off\n");
    open(&mut browser, &host, &cwd);
    assert_eq!(browser.evaluate("document.querySelectorAll('a.tile').length").unwrap(), 100);
    let mut client = host.client().unwrap();
    client.ask(json!({"action": "lock", "machine": "win10-0", "task_id": "77"})).unwrap();
    client.act("restore_start", "win10-0").unwrap();
    let text = format!("{}.innerText", tile("win10-0"));
    browser.wait_until(&format!("/running/.test({text}) && /task 77/.test({text})")).unwrap();
    browser.wait_until(&format!("{}.querySelector('img').naturalWidth > 0", tile("win10-0"))).unwrap();
    browser.wait_until("document.getElementById('counts').textContent.includes('1 running')").unwrap();
    // The machine dies while somebody looks.
    browser.evaluate(&format!("{}.click()", tile("win10-1"))).unwrap();
    client.act("restore_start", "win10-1").unwrap();
    browser.wait_until("document.getElementById('view-state').textContent === 'running'").unwrap();
    browser.wait_until("document.getElementById('view-screen').naturalWidth > 0").unwrap();
    browser.wait_until("document.getElementById('view-state').textContent === 'poweroff'").unwrap();
    let events = "document.getElementById('view-events').textContent";
    browser.wait_until(&format!("{events}.includes('the machine powered itself off')")).unwrap();
    browser.wait_until("document.getElementById('news').textContent.includes('powered itself off')").unwrap();
    assert_eq!(browser.evaluate("document.getElementById('view-screen').hidden").unwrap(), true);
    browser.evaluate("document.getElementById('view-close').click()").unwrap();
    // An error is on its tile.
    client.act("restore_start", "win10-2").unwrap();
    client.act("stop", "win10-2").unwrap();
    browser
        .wait_until(&format!("/disabled: .*configured to fail/.test({}.innerText)", tile("win10-2")))
        .unwrap();
    assert_sound(&mut browser);
}

#[test]
fn machines_are_filtered_and_grouped() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    open(&mut browser, &host, &cwd);
    let shown = "[...document.querySelectorAll('a.tile')].filter((tile) => tile.checkVisibility()).length";
    let set = |id: &str, value: &str| {
        format!(
            "{{ const e = document.getElementById('{id}'); e.value = '{value}'; e.dispatchEvent(new Event('input')); }}"
        )
    };
    for (id, value, count) in [
        ("text", "WIN10-9", 11),
        ("text", "win10 9 nothing", 0),
        ("text", "linux", 100),
        ("state", "running", 0),
        ("state", "with problems", 0),
        ("state", "poweroff", 100),
        ("machinery", "double", 100),
        ("group", "state", 100),
    ] {
        browser.evaluate(&set(id, value)).unwrap();
        assert_eq!(browser.evaluate(shown).unwrap(), count, "{id} {value}");
    }
    host.client().unwrap().act("restore_start", "win10-5").unwrap();
    browser.evaluate(&set("state", "")).unwrap();
    let groups = "[...document.querySelectorAll('main h2')].map((group) => group.textContent).join()";
    browser.wait_until(&format!("{groups} === 'running,poweroff'")).unwrap();
    assert_sound(&mut browser);
}

#[test]
fn clones_are_one_group_that_unfolds() {
    let Some(mut browser) = browser() else { return };
    let names: Vec<String> = (1..=20).map(|number| format!("win10-{number}")).collect();
    let mut machines: Vec<_> = names.iter().map(|name| (name.as_str(), "clone_of: win10")).collect();
    machines.push(("other", ""));
    let cwd = ScratchCwd::double(&machines).unwrap();
    cwd.host_yaml(KEYS).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    open(&mut browser, &host, &cwd);
    let shown = "[...document.querySelectorAll('a.tile')].filter((tile) => tile.checkVisibility()).length";
    assert_eq!(browser.evaluate(shown).unwrap(), 1, "the machine that is no clone");
    let heading = "document.querySelector('section.clones h2').innerText.replace(/\\s+/g, ' ')";
    assert_eq!(browser.evaluate(heading).unwrap(), "win10 ×20 20 ready");
    let mut client = host.client().unwrap();
    for machine in ["win10-3", "win10-4"] {
        client.act("restore_start", machine).unwrap();
    }
    client.act("disable_machine", "win10-5").unwrap();
    browser.wait_until(&format!("{heading} === 'win10 ×20 17 ready, 2 running, 1 disabled'")).unwrap();
    browser.forget_events();
    let fold = "document.querySelector('section.clones button.fold')";
    assert_eq!(browser.evaluate(&format!("{fold}.ariaExpanded")).unwrap(), "false");
    browser.evaluate(&format!("{fold}.click()")).unwrap();
    assert_eq!(browser.evaluate(shown).unwrap(), 21);
    browser.wait_until(&format!("{}.querySelector('img').naturalWidth > 0", tile("win10-3"))).unwrap();
    browser.evaluate(&format!("{fold}.click()")).unwrap();
    assert_eq!(browser.evaluate(shown).unwrap(), 1);
    let search = "{ const e = document.getElementById('text'); e.value = 'win10-1'; e.dispatchEvent(new Event('input')); }";
    browser.evaluate(search).unwrap();
    assert_eq!(browser.evaluate(shown).unwrap(), 11, "a search unfolds");
    assert_sound(&mut browser);
}

/// Returns the machines whose screens the page has asked for.
fn asked(browser: &Browser) -> BTreeSet<String> {
    let urls = browser.events("Network.requestWillBeSent").into_iter();
    let urls = urls.filter_map(|event| event["params"]["request"]["url"].as_str());
    let names = urls.filter_map(|url| url.split_once("/machines/")?.1.strip_suffix("/screen"));
    names.map(str::to_owned).collect()
}

#[test]
fn screens_are_asked_for_only_when_somebody_sees_them() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    let mut client = host.client().unwrap();
    for index in [0, 3, 99] {
        client.act("restore_start", &format!("win10-{index}")).unwrap();
    }
    open(&mut browser, &host, &cwd);
    browser.forget_events();
    browser.wait_until(&format!("{}.querySelector('img').naturalWidth > 0", tile("win10-3"))).unwrap();
    let seen = asked(&browser);
    assert!(seen.contains("win10-3") && !seen.contains("win10-99"), "{seen:?}");
    browser.evaluate(&format!("{}.scrollIntoView()", tile("win10-99"))).unwrap();
    browser.wait_until(&format!("{}.querySelector('img').naturalWidth > 0", tile("win10-99"))).unwrap();
    // A page that is hidden asks for nothing, and hears of nothing.
    let show = |hidden: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }}); document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    browser.evaluate(&show(true)).unwrap();
    // Requests under way end meanwhile; time itself is the condition.
    browser.evaluate("new Promise((done) => setTimeout(done, 1500))").unwrap();
    browser.forget_events();
    browser.evaluate("new Promise((done) => setTimeout(done, 3000))").unwrap();
    assert_eq!(browser.events("Network.requestWillBeSent"), Vec::<&Value>::new());
    client.act("stop", "win10-99").unwrap();
    browser.evaluate(&show(false)).unwrap();
    browser.wait_until(&format!("/poweroff/.test({}.innerText)", tile("win10-99"))).unwrap();
    assert_sound(&mut browser);
}

#[test]
fn machine_is_stopped_by_keys_alone_and_only_after_a_confirmation() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    let mut client = host.client().unwrap();
    client.act("restore_start", "win10-0").unwrap();
    open(&mut browser, &host, &cwd);
    let focus = |browser: &mut Browser, condition: &str| {
        for _ in 0..60 {
            browser.press("Tab", TAB, "").unwrap();
            if browser.evaluate(&format!("document.activeElement.matches('{condition}')")).unwrap() == true {
                let outline = "getComputedStyle(document.activeElement).outlineStyle";
                assert_eq!(
                    browser.evaluate(outline).unwrap(),
                    "solid",
                    "the focus of {condition} is visible"
                );
                return;
            }
        }
        panic!("no key leads to {condition}");
    };
    focus(&mut browser, "a.tile");
    browser.press("Enter", ENTER, "\r").unwrap();
    browser.wait_until("document.getElementById('view').open").unwrap();
    assert_eq!(browser.evaluate("document.getElementById('view-name').textContent").unwrap(), "win10-0");
    browser
        .wait_until(
            "[...document.querySelectorAll('#view-actions button')].some((b) => b.textContent === 'Stop')",
        )
        .unwrap();
    let focus_stop = |browser: &mut Browser| {
        for _ in 0..20 {
            browser.press("Tab", TAB, "").unwrap();
            if browser.evaluate("document.activeElement.textContent").unwrap() == "Stop" {
                return;
            }
        }
        panic!("no key leads to Stop");
    };
    focus_stop(&mut browser);
    browser.press("Enter", ENTER, "\r").unwrap();
    browser.wait_until("document.getElementById('confirm').open").unwrap();
    browser.press("Escape", ESCAPE, "").unwrap();
    browser.wait_until("!document.getElementById('confirm').open").unwrap();
    assert_eq!(browser.evaluate("document.getElementById('view').open").unwrap(), true);
    assert_eq!(client.machine("win10-0").unwrap()["state"], "running");
    browser.press("Enter", ENTER, "\r").unwrap();
    browser.wait_until("document.getElementById('confirm').open").unwrap();
    focus(&mut browser, "#confirm-yes");
    browser.press("Enter", ENTER, "\r").unwrap();
    browser.wait_until("document.getElementById('view-message').textContent === 'Stop: done'").unwrap();
    assert_eq!(client.machine("win10-0").unwrap()["state"], "poweroff");
    browser.press("Escape", ESCAPE, "").unwrap();
    browser.wait_until("!document.getElementById('view').open").unwrap();
    let focused = browser.evaluate("document.activeElement.getAttribute('href')").unwrap();
    assert_eq!(focused, "#machine=win10-0", "the focus is where it was");
    assert_sound(&mut browser);
}

/// A browser reports the end of a dialog a moment later.
#[test]
fn actions_work_when_a_dialog_opens_before_the_end_of_the_last_one_is_reported() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    open(&mut browser, &host, &cwd);
    let show = |name: &str| {
        format!("location.hash = '#machine={name}'; dispatchEvent(new HashChangeEvent('hashchange'));")
    };
    let restore = "[...document.querySelectorAll('#view-actions button')].find((b) => b.textContent === 'Restore').click();";
    let press = |id: &str| format!("document.getElementById('{id}').click();");
    browser.evaluate(&[show("win10-0"), press("view-close"), show("win10-3")].concat()).unwrap();
    let later = "new Promise((done) => setTimeout(done, 100))";
    browser.evaluate(later).unwrap();
    assert_eq!(browser.evaluate("document.getElementById('view-name').textContent").unwrap(), "win10-3");
    let twice = [restore.to_owned(), press("confirm-no"), restore.to_owned()].concat();
    browser.evaluate(&twice).unwrap();
    browser.evaluate(later).unwrap();
    browser.evaluate(&press("confirm-yes")).unwrap();
    browser.wait_until("document.getElementById('view-message').textContent === 'Restore: done'").unwrap();
    assert_eq!(host.client().unwrap().machine("win10-3").unwrap()["state"], "running");
    assert_sound(&mut browser);
}

#[test]
fn page_fits_a_phone_and_follows_the_colours_of_the_user() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    host.client().unwrap().act("restore_start", "win10-0").unwrap();
    // A scroll bar takes its part of the width.
    let fits =
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth && innerWidth === 360";
    browser.resize(360, 740).unwrap();
    host.wait_for_log(&["the wall is served"]).unwrap();
    let url = host::run(&cwd, &["wall"]).unwrap().stdout;
    browser.open(url.split('#').next().unwrap()).unwrap();
    assert_eq!(browser.evaluate(fits).unwrap(), true, "the page to log in");
    open(&mut browser, &host, &cwd);
    assert_eq!(browser.evaluate(fits).unwrap(), true);
    browser.evaluate(&format!("{}.click()", tile("win10-0"))).unwrap();
    browser.wait_until("document.getElementById('view').open").unwrap();
    assert_eq!(browser.evaluate(fits).unwrap(), true);
    let inner = "document.getElementById('view').scrollWidth <= document.getElementById('view').clientWidth";
    assert_eq!(browser.evaluate(inner).unwrap(), true);
    let colours = "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color";
    let mut schemes = BTreeSet::new();
    for scheme in ["light", "dark"] {
        browser.prefer("prefers-color-scheme", scheme).unwrap();
        schemes.insert(browser.evaluate(colours).unwrap().to_string());
    }
    assert_eq!(schemes.len(), 2, "{schemes:?}");
    browser.prefer("prefers-reduced-motion", "reduce").unwrap();
    let moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length";
    assert_eq!(browser.evaluate(moving).unwrap(), 0);
    assert_sound(&mut browser);
}

#[test]
fn elements_have_names_for_a_screen_reader() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    host.client().unwrap().act("restore_start", "win10-0").unwrap();
    open(&mut browser, &host, &cwd);
    browser.wait_until(&format!("/running/.test({}.innerText)", tile("win10-0"))).unwrap();
    let assert_named = |browser: &mut Browser, expected: &[(&str, &str)]| {
        let elements = browser.accessible().unwrap();
        let needs_name =
            ["link", "button", "searchbox", "textbox", "combobox", "image", "dialog", "main", "search"];
        for (role, name) in &elements {
            assert!(!needs_name.contains(&role.as_str()) || !name.is_empty(), "a {role} has no name");
        }
        for (role, name) in expected {
            let found = elements.iter().any(|(r, n)| r == role && n.contains(name));
            assert!(found, "no {role} {name}: {elements:?}");
        }
    };
    let wall = [
        ("link", "win10-0, running"),
        ("link", "win10-99, poweroff"),
        ("searchbox", "Search"),
        ("combobox", "State"),
        ("main", "Machines"),
        ("log", ""),
    ];
    assert_named(&mut browser, &wall);
    browser.evaluate(&format!("{}.click()", tile("win10-0"))).unwrap();
    browser.wait_until("document.getElementById('view-screen').naturalWidth > 0").unwrap();
    browser.wait_until("document.querySelectorAll('#view-actions button').length").unwrap();
    assert_named(
        &mut browser,
        &[("dialog", "win10-0"), ("image", "Screen of win10-0"), ("button", "Close"), ("button", "Stop")],
    );
    assert_sound(&mut browser);
}

#[test]
fn page_shows_that_the_host_is_gone_and_goes_on_with_the_next_one() {
    let Some(mut browser) = browser() else { return };
    let (mut host, cwd) = hundred("");
    open(&mut browser, &host, &cwd);
    let log = host.log();
    let line = log.lines().find(|line| line.contains("the wall is served")).unwrap();
    let port: String =
        line.split("127.0.0.1:").nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
    assert!(host.terminate().unwrap().success());
    browser.wait_until("/does not answer/.test(document.getElementById('connection').textContent)").unwrap();
    cwd.host_yaml(&format!("web_listen: 127.0.0.1:{port}\n")).unwrap();
    let next = RunningHost::start(&cwd).unwrap();
    next.client().unwrap().act("restore_start", "win10-4").unwrap();
    browser.wait_until("document.getElementById('connection').hidden").unwrap();
    browser.wait_until(&format!("/running/.test({}.innerText)", tile("win10-4"))).unwrap();
    // This wall only shows.
    browser.evaluate(&format!("{}.click()", tile("win10-4"))).unwrap();
    browser.wait_until("document.getElementById('view-screen').naturalWidth > 0").unwrap();
    assert_eq!(browser.evaluate("document.querySelectorAll('#view-actions button').length").unwrap(), 0);
    assert_sound(&mut browser);
}

#[test]
fn wrong_token_is_refused_and_a_right_one_is_accepted_in_the_form() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("");
    host.wait_for_log(&["the wall is served"]).unwrap();
    let url = host::run(&cwd, &["wall"]).unwrap().stdout;
    let (address, token) = url.trim().split_once('#').unwrap();
    browser.open(&format!("{address}#wrong")).unwrap();
    browser.wait_until("/wrong/.test(document.getElementById('message').textContent)").unwrap();
    assert_eq!(browser.evaluate("location.hash").unwrap(), "");
    let log_in = "document.querySelector('button').click()";
    browser.evaluate(&format!("document.getElementById('token').value = '{token}'; {log_in}")).unwrap();
    browser.wait_until("document.querySelectorAll('a.tile').length === 100").unwrap();
    // The address is opened once more, on the page that is there and on the one to log in.
    browser.open(url.trim()).unwrap();
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))").unwrap();
    assert_eq!(browser.evaluate("location.hash").unwrap(), "");
    browser.call("Network.clearBrowserCookies", json!({})).unwrap();
    browser.open(address).unwrap();
    browser.wait_until("document.getElementById('token')").unwrap();
    browser.open(url.trim()).unwrap();
    browser.wait_until("document.querySelectorAll('a.tile').length === 100").unwrap();
}

#[test]
fn console_of_a_real_guest_is_shown_by_novnc_until_the_guest_ends() {
    let Some(mut browser) = browser() else { return };
    let novnc = package::unpacked("novnc").unwrap().join("usr/share/novnc");
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.host_yaml(&format!("{KEYS}web_novnc: {}\n", novnc.display()), ", console: true").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.act("restore_start", "m").unwrap();
    open(&mut browser, &host, lab.cwd());
    browser.evaluate(&format!("{}.click()", tile("m"))).unwrap();
    browser.wait_until("document.querySelector('#view-console a')").unwrap();
    // It opens another tab.
    browser.evaluate("document.querySelector('#view-console a').target = '_self'").unwrap();
    browser.evaluate("document.querySelector('#view-console a').click()").unwrap();
    browser.wait_until("/Connected/.test(document.getElementById('status').textContent)").unwrap();
    browser.wait_until("document.querySelector('#screen canvas').width >= 640").unwrap();
    browser.evaluate("window.sameDocument = true").unwrap();
    client.act("stop", "m").unwrap();
    browser.wait_until("/console is closed/.test(document.getElementById('status').textContent)").unwrap();
    assert_eq!(browser.evaluate("document.getElementById('again').hidden").unwrap(), false);
    assert_sound(&mut browser);
}

#[test]
fn page_of_a_console_says_when_novnc_is_missing() {
    let Some(mut browser) = browser() else { return };
    let (host, cwd) = hundred("web_novnc: /tmp/none\n");
    open(&mut browser, &host, &cwd);
    let url = browser.evaluate("location.origin").unwrap();
    browser.open(&format!("{}/console#machine=win10-0", url.as_str().unwrap())).unwrap();
    browser
        .wait_until("/install Debian's package novnc/.test(document.getElementById('status').textContent)")
        .unwrap();
}

/// Returns the processor time of the host so far.
fn processor_time(host: &RunningHost) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.pid())).unwrap();
    // The name may contain spaces. Source: proc_pid_stat(5), fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn wall_of_500_machines_needs_little_of_the_host() {
    let Some(mut browser) = browser() else { return };
    let names: Vec<String> = (0..500).map(|index| format!("win10-{index}")).collect();
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let cwd = ScratchCwd::double(&machines).unwrap();
    cwd.host_yaml(KEYS).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for name in &names {
        client.act("restore_start", name).unwrap();
    }
    let before = host.resources().unwrap();
    open(&mut browser, &host, &cwd);
    browser.wait_until("document.getElementById('counts').textContent.includes('500 running')").unwrap();
    browser.wait_until(&format!("{}.querySelector('img').naturalWidth > 0", tile("win10-20"))).unwrap();
    let in_view = "[...document.querySelectorAll('a.tile img')].filter((image) => !image.hidden).length";
    let (begun, used) = (Instant::now(), processor_time(&host));
    browser.forget_events();
    browser.evaluate("new Promise((done) => setTimeout(done, 15000))").unwrap();
    let share = (processor_time(&host) - used).as_secs_f64() / begun.elapsed().as_secs_f64();
    let shown = browser.evaluate(in_view).unwrap();
    let requests = browser.events("Network.requestWillBeSent").len();
    let during = host.resources().unwrap();
    println!(
        "500 machines, {shown} screens in view, {requests} requests in 15 s: {:.1} % of a core, {} KiB before, {} KiB with a viewer",
        share * 100.0,
        before.resident_kib,
        during.resident_kib
    );
    assert!(during.resident_kib < 100 << 10, "{during:?}");
    assert_sound(&mut browser);
    drop(browser);
    host.wait_until_quiet(Duration::from_secs(20)).unwrap();
}

/// Asks for the screen of `m`, and reports whether there is one.
fn has_screen(address: &str, token: &str) -> bool {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!("GET /machines/m/screen HTTP/1.1\r\nHost: {address}\r\nConnection: close");
    write!(stream, "{head}\r\nAuthorization: Bearer {token}\r\n\r\n").unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    reply.starts_with(b"HTTP/1.1 200")
}

#[test]
fn restores_and_stops_are_as_fast_with_a_viewer() {
    let Some(mut browser) = browser() else { return };
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.host_yaml(KEYS, "").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let mut cycles = |what: &str| {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..20 {
            for (action, times) in ["restore_start", "stop"].iter().zip(&mut times) {
                let begun = Instant::now();
                assert_eq!(client.act(action, "m").unwrap()["success"], true);
                times.push(begun.elapsed());
                // A viewer takes screens meanwhile.
                thread::sleep(Duration::from_millis(if *action == "stop" { 0 } else { 300 }));
            }
        }
        for (action, times) in ["restore_start", "stop"].iter().zip(&mut times) {
            times.sort();
            println!("{what}: {action} median {:?}, longest {:?}", times[10], times[19]);
        }
        times
    };
    let [_, alone] = cycles("nobody looks");
    let printed = host::run(lab.cwd(), &["wall"]).unwrap().stdout;
    let (address, token) = printed.trim().trim_start_matches("http://").split_once("/#").unwrap();
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let asked = scope.spawn(move || {
            let mut pictures = 0;
            // Once a second, as the page of one machine does.
            while stopped.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                pictures += u32::from(has_screen(address, token));
            }
            pictures
        });
        cycles("with a program that takes a screen each second");
        drop(stop);
        println!("{} screens taken", asked.join().unwrap());
    });
    open(&mut browser, &host, lab.cwd());
    browser.evaluate(&format!("{}.click()", tile("m"))).unwrap();
    browser.forget_events();
    let [_, watched] = cycles("with a viewer");
    browser.evaluate("1").unwrap();
    println!("{} requests of the viewer", browser.events("Network.requestWillBeSent").len());
    assert!(watched[10] < 3 * alone[10] + Duration::from_millis(50), "{alone:?} {watched:?}");
}

#[test]
fn screen_of_a_real_guest_is_live_and_says_when_its_qemu_is_killed() {
    let Some(mut browser) = browser() else { return };
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.host_yaml(KEYS, "").unwrap();
    let host = lab.host().unwrap();
    host.client().unwrap().act("restore_start", "m").unwrap();
    open(&mut browser, &host, lab.cwd());
    let image = format!("{}.querySelector('img')", tile("m"));
    browser.wait_until(&format!("{image}.naturalWidth >= 640")).unwrap();
    // The guest counts on its screen.
    browser.evaluate(&format!("window.first = {image}.src")).unwrap();
    browser.wait_until(&format!("{image}.src && {image}.src !== window.first")).unwrap();
    browser.evaluate(&format!("{}.click()", tile("m"))).unwrap();
    browser.wait_until("document.getElementById('view-screen').naturalWidth >= 640").unwrap();
    browser.evaluate("window.first = document.getElementById('view-screen').src").unwrap();
    let begun = Instant::now();
    browser.wait_until("document.getElementById('view-screen').src !== window.first").unwrap();
    println!("the screen has changed after {:?}", begun.elapsed());
    let qemu = lab.qemu_of("m").unwrap();
    rustix::process::kill_process(qemu, rustix::process::Signal::KILL).unwrap();
    browser.wait_until("document.getElementById('view-state').textContent !== 'running'").unwrap();
    browser
        .wait_until("/killed by signal 9/.test(document.getElementById('view-problems').textContent)")
        .unwrap();
    browser.evaluate("document.getElementById('view-close').click()").unwrap();
    browser.wait_until(&format!("!/running/.test({}.innerText)", tile("m"))).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(110));
    assert_sound(&mut browser);
}
