//! `top` in a terminal: the machines of a host as they change, keys that act, and a terminal that is restored.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::Command;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::terminal::{Size, Terminal};
use rustix::process::Signal;
use serde_json::{Value, json};

const SIZE: Size = (24, 80);

fn cwd(count: usize, keys: &str) -> ScratchCwd {
    let names: Vec<String> = (1..=count).map(|number| format!("m{number}")).collect();
    let machines: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), keys)).collect();
    ScratchCwd::double(&machines).unwrap()
}

/// Returns the command `top`, with files in its own folder.
fn command(cwd: &ScratchCwd) -> Command {
    let mut command = host::command(cwd).unwrap();
    command.arg("top").current_dir(cwd.root());
    command
}

fn top(cwd: &ScratchCwd) -> Terminal {
    let mut top = Terminal::start(command(cwd), SIZE).unwrap();
    top.wait_for_words("NAME").unwrap();
    top
}

/// Waits until the row of the machine has these words, and returns it.
fn wait_for_row(top: &mut Terminal, machine: &str, words: &[&str]) -> String {
    let row = |text: &str| {
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(machine));
        row.filter(|row| words.iter().all(|word| row.split_whitespace().any(|cell| cell == *word)))
            .map(str::to_owned)
    };
    let text =
        top.wait_until(&format!("{machine}: {words:?}"), |screen| row(&screen.contents()).is_some()).unwrap();
    row(&text).unwrap()
}

fn ask(client: &mut Client, request: Value) {
    let answer = client.ask(request).unwrap();
    assert_eq!(answer["success"], true, "{answer}");
}

#[test]
fn machines_change_on_the_screen_when_they_change() {
    let cwd = cwd(100, "");
    cwd.change_yaml("double", "m2: {", "m2: {poweroff_after_ms: 2000, ").unwrap();
    cwd.change_yaml("double", "m4: {", "m4: {faults: {restore_start: fail}, ").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut top = top(&cwd);
    top.wait_for_words("100 machines;").unwrap();
    assert!(top.text().contains(&format!("process {}", host.pid())), "{}", top.text());
    assert!(top.screen().alternate_screen() && top.screen().hide_cursor());
    let mut client = host.client().unwrap();
    ask(&mut client, json!({"action": "lock", "machine": "m3", "task_id": "task-7"}));
    wait_for_row(&mut top, "m3", &["poweroff", "task-7"]);
    for machine in ["m2", "m3"] {
        ask(&mut client, json!({"action": "restore_start", "machine": machine}));
    }
    wait_for_row(&mut top, "m3", &["running", "task-7", "plain"]);
    let figures = |text: &str| {
        let line = text.lines().find(|line| line.contains("restore_start"))?;
        Some(line.split_whitespace().skip(2).take(3).map(str::to_owned).collect::<Vec<_>>())
    };
    // Restores in the last minute, all, and failed ones. The mode is the first word.
    top.wait_until("two restores", |screen| {
        figures(&screen.contents()).is_some_and(|figures| figures[..] == ["plain", "2", "2"])
    })
    .unwrap();
    // It dies while the operator looks.
    wait_for_row(&mut top, "m2", &["running"]);
    wait_for_row(&mut top, "m2", &["poweroff"]);
    assert_eq!(client.act("restore_start", "m4").unwrap()["success"], false);
    let row = wait_for_row(&mut top, "m4", &["quarantine", "1"]);
    assert!(!row.contains("running"), "{row}");
    top.wait_for_words("100 machines, 1 on, 1 locked, 1 disabled, 1 quarantined").unwrap();
}

#[test]
fn keys_act_on_the_selected_machine() {
    let cwd = cwd(30, "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for machine in ["m1", "m21"] {
        ask(&mut client, json!({"action": "restore_start", "machine": machine}));
    }
    let mut top = top(&cwd);
    top.type_keys("/m21\r").unwrap();
    top.wait_for_words("filter: m21 (1 of 30)").unwrap();
    for file in ["m21.png", "m21-2.png"] {
        top.type_keys("p").unwrap();
        top.wait_for_words(&format!("screenshot m21: written to {file}")).unwrap();
        assert!(cwd.root().join(file).is_file());
    }
    top.type_keys("s").unwrap();
    top.wait_for_words("Stop m21?").unwrap();
    top.type_keys("n").unwrap();
    top.wait_until("no window", |screen| !screen.contents().contains("Stop m21?")).unwrap();
    assert_eq!(client.machine("m21").unwrap()["state"], "running");
    top.type_keys("sy").unwrap();
    top.wait_for_words("stop m21: done in").unwrap();
    wait_for_row(&mut top, "m21", &["poweroff"]);
    top.type_keys("p").unwrap();
    top.wait_for_words("screenshot m21 failed: ").unwrap();
    assert!(!cwd.root().join("m21-3.png").exists());
    top.type_keys("dy").unwrap();
    wait_for_row(&mut top, "m21", &["disabled"]);
    top.type_keys("e").unwrap();
    wait_for_row(&mut top, "m21", &["poweroff"]);
    assert_eq!(client.machine("m21").unwrap()["disabled"], false);
    assert_eq!(client.machine("m1").unwrap()["state"], "running", "it was not selected");
}

#[test]
fn table_is_ordered_and_scrolled_and_fits_another_size() {
    let cwd = cwd(100, "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    ask(&mut client, json!({"action": "disable_machine", "machine": "m77", "reason": "by hand"}));
    let mut top = top(&cwd);
    wait_for_row(&mut top, "m1", &["poweroff"]);
    assert!(!top.text().contains("m77"));
    top.type_keys("o").unwrap();
    wait_for_row(&mut top, "m77", &["disabled"]);
    top.type_keys("ooooook\u{1b}[F").unwrap();
    wait_for_row(&mut top, "m100", &["poweroff"]);
    top.wait_until("m1 is above", |screen| !screen.contents().lines().any(|line| line.starts_with("m1 ")))
        .unwrap();
    top.resize((60, 160)).unwrap();
    wait_for_row(&mut top, "m77", &["by", "hand"]);
    top.type_keys("?").unwrap();
    top.wait_for_words("order by the next column").unwrap();
    top.resize((10, 30)).unwrap();
    top.type_keys("??").unwrap();
    top.wait_until("a small screen", |screen| screen.contents().contains("m100")).unwrap();
}

#[test]
fn top_connects_again_when_the_host_is_replaced_or_killed() {
    let cwd = cwd(3, "");
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut top = top(&cwd);
    host.signal(Signal::USR2).unwrap();
    let mut client = host.wait_for_replacement().unwrap();
    ask(&mut client, json!({"action": "restore_start", "machine": "m2"}));
    wait_for_row(&mut top, "m2", &["running"]);
    host.kill().unwrap();
    top.wait_for_words("NO HOST: ").unwrap();
    top.type_keys("jsy").unwrap();
    top.wait_for_words("no host answers").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    top.wait_for_words(&format!("process {}", host.pid())).unwrap();
    top.type_keys("q").unwrap();
    assert!(top.wait().unwrap().success());
}

#[test]
fn terminal_is_restored_after_each_end() {
    let cwd = cwd(3, "");
    let _host = RunningHost::start(&cwd).unwrap();
    for end in ["q", "\u{3}", "TERM", "HUP", "INT"] {
        let mut top = top(&cwd);
        assert!(!top.is_restored().unwrap());
        match end {
            "TERM" => top.signal(Signal::TERM),
            "HUP" => top.signal(Signal::HUP),
            "INT" => top.signal(Signal::INT),
            keys => top.type_keys(keys),
        }
        .unwrap();
        assert_eq!(top.wait().unwrap().code(), Some(0), "{end}");
        assert!(top.is_restored().unwrap(), "{end}: {}", top.text());
    }
}

#[test]
fn screen_has_no_colours_when_they_are_unwanted() {
    let cwd = cwd(3, "");
    let host = RunningHost::start(&cwd).unwrap();
    ask(&mut host.client().unwrap(), json!({"action": "restore_start", "machine": "m1"}));
    let has_colours = |top: &Terminal| {
        let cells = (0..SIZE.0).flat_map(|row| (0..SIZE.1).map(move |column| (row, column)));
        let mut cells = cells.filter_map(|(row, column)| top.screen().cell(row, column));
        cells.any(|cell| cell.fgcolor() != vt100::Color::Default || cell.bgcolor() != vt100::Color::Default)
    };
    let mut coloured = top(&cwd);
    wait_for_row(&mut coloured, "m1", &["running"]);
    assert!(has_colours(&coloured));
    let mut plain = Terminal::start(
        {
            let mut env = Command::new("env");
            let command = command(&cwd);
            env.arg("NO_COLOR=1").arg(command.get_program()).args(command.get_args());
            env
        },
        SIZE,
    )
    .unwrap();
    wait_for_row(&mut plain, "m1", &["running"]);
    assert!(!has_colours(&plain), "{}", plain.text());
}

#[test]
fn idle_host_is_asked_nothing_while_an_operator_looks() {
    let cwd = cwd(20, "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut top = top(&cwd);
    wait_for_row(&mut top, "m1", &["poweroff"]);
    host.wait_until_quiet(Duration::from_secs(3)).unwrap();
}

#[test]
fn output_that_is_no_terminal_is_refused_with_the_other_commands() {
    let cwd = cwd(2, "");
    let refused = host::run(&cwd, &["top"]).unwrap();
    assert!(refused.code == Some(1) && refused.stderr.contains("no machinery host answers"), "{refused:?}");
    let _host = RunningHost::start(&cwd).unwrap();
    let refused = host::run(&cwd, &["top"]).unwrap();
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
    for words in ["needs a terminal", "cuckoo-machinery list", "cuckoo-machinery metrics"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    let printed = host::run(&cwd, &["--json", "top"]).unwrap();
    let printed: Value = serde_json::from_str(&printed.stdout).unwrap();
    assert_eq!(printed["machines"].as_array().map(Vec::len), Some(2));
    assert!(printed["metrics"].is_array(), "{printed}");
}
