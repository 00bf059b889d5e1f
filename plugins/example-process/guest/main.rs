//! A simulated hypervisor: a program of its own, which the machinery starts for each machine. Remove it with its section
//! `[[bin]]` in `Cargo.toml`.
//!
//! ```text
//! example-process-guest [--restore SNAPSHOT]
//!   console    ─▶ "loaded": the guest is loaded and paused
//!   "resume"   ─▶ "running"
//!   "screen F" ─▶ "written F": the screen, as PPM
//!   "save F"   ─▶ "written F": a snapshot
//!   "poweroff" ─▶ the guest powers itself off
//! ```
//!
//! A guest's memory is the file `memory` in its folder. It begins with one number, which grows while the guest runs. A
//! snapshot is a text file with the number.

use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// The time to load a guest.
const LOAD_TIME: Duration = Duration::from_millis(50);
/// The interval at which the number grows.
const TICK: Duration = Duration::from_millis(10);
/// The size of the memory, in bytes.
const MEMORY: u64 = 64 * 1024;
/// The side of the screen, in pixels.
const SCREEN: usize = 16;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ended = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => say(&format!("example-process-guest {}", env!("CARGO_PKG_VERSION"))),
        [] => run(0),
        ["--restore", snapshot] => load(snapshot).and_then(run),
        _ => Err("unknown arguments".to_owned()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("example-process-guest: {why}");
            ExitCode::FAILURE
        }
    }
}

fn load(snapshot: &str) -> Result<u32, String> {
    let text = fs::read_to_string(snapshot).map_err(|error| format!("cannot load {snapshot}: {error}"))?;
    thread::sleep(LOAD_TIME);
    text.trim().parse().map_err(|error| format!("cannot load {snapshot}: it is no snapshot: {error}"))
}

fn run(mut number: u32) -> Result<(), String> {
    let memory = File::create("memory").map_err(|error| format!("cannot create the memory: {error}"))?;
    let failed = |error: io::Error| format!("cannot write to the memory: {error}");
    memory.set_len(MEMORY).map_err(failed)?;
    let count = |number: u32| memory.write_all_at(&number.to_le_bytes(), 0).map_err(failed);
    count(number)?;
    let commands = commands();
    let (mut running, mut tick) = (false, Instant::now());
    say("loaded")?;
    loop {
        match commands.recv_timeout(tick.saturating_duration_since(Instant::now())) {
            Ok(command) => match command.split_once(' ').unwrap_or((&command, "")) {
                ("resume", "") => {
                    running = true;
                    say("running")?;
                }
                ("screen", file) => write(file, &screen(number))?,
                ("save", file) => write(file, number.to_string().as_bytes())?,
                ("poweroff", "") => return Ok(()),
                _ => eprintln!("example-process-guest: unknown command '{command}'"),
            },
            Err(RecvTimeoutError::Timeout) => {
                tick = Instant::now() + TICK;
                if running {
                    number = number.wrapping_add(1);
                    count(number)?;
                }
            }
            // The host has died. A real hypervisor runs on as well.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
        }
    }
}

/// Reads the commands in a thread of its own.
fn commands() -> Receiver<String> {
    let (sender, commands) = mpsc::channel();
    thread::spawn(move || {
        io::stdin().lock().lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    commands
}

/// Returns the screen: a grey that depends on the number.
fn screen(number: u32) -> Vec<u8> {
    let [grey, ..] = number.to_le_bytes();
    [format!("P6\n{SCREEN} {SCREEN}\n255\n").into_bytes(), vec![grey; SCREEN * SCREEN * 3]].concat()
}

fn write(file: &str, content: &[u8]) -> Result<(), String> {
    match fs::write(file, content) {
        Ok(()) => say(&format!("written {file}")),
        Err(error) => {
            eprintln!("example-process-guest: cannot write {file}: {error}");
            Ok(())
        }
    }
}

fn say(text: &str) -> Result<(), String> {
    let mut console = io::stdout().lock();
    writeln!(console, "{text}").and_then(|()| console.flush()).map_err(|error| format!("no console: {error}"))
}
