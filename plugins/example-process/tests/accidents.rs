//! The reasons of failures, and the leftovers of a host that was killed, as operators see them.

use std::error::Error;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, ErrorKind, State};
use machinery_backend::RunFolder;
use machinery_conformance::{BackendSpec, Fixture, NullHost, artifacts};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// Creates the machine `one` with that text as its snapshot, below the folder.
fn fixture(folder: &std::path::Path, snapshot: &str) -> Result<Fixture, Box<dyn Error + Send + Sync>> {
    let config = include_str!("conformance.yaml")
        .replace("PROGRAM", env!("CARGO_BIN_EXE_example-process-guest"))
        .replace("FOLDER", &folder.display().to_string());
    fs::write(folder.join("one"), snapshot)?;
    Ok(Fixture::new(artifacts::plugin("example-process")?, &config, BackendSpec::new(&["one"]))?)
}

fn load(fixture: &Fixture) -> Result<Instance, Box<dyn Error + Send + Sync>> {
    Ok(Plugin::open(fixture.plugin())?.load(fixture.setup(), Arc::new(NullHost))?)
}

#[test]
fn restore_fails_with_the_words_of_a_guest_that_dies_while_loading() -> Outcome {
    let folder = tempfile::tempdir()?;
    let plugin = load(&fixture(folder.path(), "no number")?)?;
    let error = plugin.restore_start("one", soon()).err().ok_or("the restore succeeds")?;
    assert_eq!(error.kind(), ErrorKind::Failed);
    assert!(error.to_string().contains("it is no snapshot: invalid digit"), "{error}");
    assert_eq!(plugin.state("one", soon())?, State::Poweroff);
    Ok(())
}

#[test]
fn run_of_a_killed_host_is_ended_by_the_next_load() -> Outcome {
    let folder = tempfile::tempdir()?;
    let fixture = fixture(folder.path(), "1000")?;
    let run = RunFolder::create(&fixture.setup().state_dir, "one")?;
    let mut command = machinery::command(env!("CARGO_BIN_EXE_example-process-guest"));
    run.enter(&mut command);
    // The guest ends when its commands end.
    let mut guest = command.stdin(std::process::Stdio::piped()).spawn()?;
    let _commands = guest.stdin.take();
    let reaper = std::thread::spawn(move || guest.wait());
    let plugin = load(&fixture)?;
    let status = reaper.join().map_err(|_| "the reaper has panicked")??;
    assert!(!status.success() && !run.path().exists(), "{status}");
    assert_eq!(plugin.state("one", soon())?, State::Poweroff);
    Ok(())
}
