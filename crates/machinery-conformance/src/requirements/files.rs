//! What a machinery writes for its caller: memory dumps and screenshots.

use std::fs::{File, Metadata};
use std::io::BufReader;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::{DumpFormat, State};

use crate::call::Call;
use crate::recorder::Heard;
use crate::report::{CheckFailure, Result, demand};
use crate::session::{Session, failed};

pub fn dump_memory(session: &Session) -> Result {
    if !session.capabilities()?.dump_memory {
        return Err(CheckFailure::Skipped("the machinery does not offer dump_memory".to_owned()));
    }
    let machine = session.machine();
    let dump = |path: PathBuf| Call::DumpMemory(path, DumpFormat::Elf);
    is_refused_when_off(session, machine, dump)?;
    session.restore(machine)?;
    let before = session.heard().len();
    let file = session.path("dump");
    session.does(&dump(file.clone()), machine)?;
    is_the_callers(&file)?;
    grows(machine, session.heard().get(before..).unwrap_or_default())?;
    session.lives(machine)?;
    needs_a_path(session, machine, dump)?;
    other_formats(session, machine)
}

pub fn screenshot(session: &Session) -> Result {
    if !session.capabilities()?.screenshot {
        return Err(CheckFailure::Skipped("the machinery does not offer screenshot".to_owned()));
    }
    let machine = session.machine();
    is_refused_when_off(session, machine, Call::Screenshot)?;
    session.restore(machine)?;
    let file = session.path("screen.png");
    session.does(&Call::Screenshot(file.clone()), machine)?;
    is_the_callers(&file)?;
    is_png(&file)?;
    session.lives(machine)?;
    needs_a_path(session, machine, Call::Screenshot)
}

/// Nothing is written of a machine that is off.
fn is_refused_when_off(session: &Session, machine: &str, call: impl Fn(PathBuf) -> Call) -> Result {
    let file = session.path("of-nothing");
    session.fails(&call(file.clone()), machine)?;
    session.nothing_is_at(&file)?;
    session.is(machine, State::Poweroff)
}

/// A path that cannot be written to is named in the error, and costs the machine nothing.
fn needs_a_path(session: &Session, machine: &str, call: impl Fn(PathBuf) -> Call) -> Result {
    let folder = session.path("a-folder");
    std::fs::create_dir(&folder).map_err(|error| failed("making a folder", &error))?;
    for path in [session.path("no-folder").join("file"), folder.clone()] {
        let error = session.fails(&call(path.clone()), machine)?.to_string();
        let path = path.display().to_string();
        demand!(error.contains(&path), "the error does not name the path {path}: {error}");
        session.lives(machine)?;
    }
    demand!(folder.is_dir(), "the folder at the path was removed");
    Ok(())
}

/// A format that is not to be had is no reason to lose the machine, or to leave half a file.
fn other_formats(session: &Session, machine: &str) -> Result {
    for format in [DumpFormat::KdumpZlib, DumpFormat::WinDmp] {
        let file = session.path(format.as_str());
        match session.attempt(&Call::DumpMemory(file.clone(), format), machine, session.timeout())? {
            Ok(()) => is_the_callers(&file)?,
            Err(_) => session.nothing_is_at(&file)?,
        }
        session.lives(machine)?;
    }
    Ok(())
}

fn is_the_callers(path: &Path) -> Result {
    let file = metadata(path)?;
    let folder = path.parent().map(metadata).transpose()?;
    demand!(file.is_file() && file.len() > 0, "there is nothing in {}", path.display());
    // Our own folder tells who we are. Root could read any file, so that it can be read proves little.
    let ours = folder.is_none_or(|folder| folder.uid() == file.uid());
    demand!(ours, "{} belongs to user {}, not to the caller", path.display(), file.uid());
    demand!(file.mode() & 0o400 != 0, "{} is not readable for its owner", path.display());
    Ok(())
}

fn metadata(path: &Path) -> Result<Metadata> {
    path.symlink_metadata().map_err(|error| failed(&path.display().to_string(), &error))
}

/// Progress is told, and goes one way.
fn grows(machine: &str, heard: &[Heard]) -> Result {
    let fractions: Vec<f64> = heard.iter().filter_map(|heard| fraction_of(machine, heard)).collect();
    demand!(!fractions.is_empty(), "no progress of the dump was told");
    demand!(
        fractions.iter().all(|at| (0.0..=1.0).contains(at)),
        "not all of {fractions:?} are within 0 and 1"
    );
    demand!(fractions.is_sorted(), "the progress goes back: {fractions:?}");
    Ok(())
}

fn fraction_of(wanted: &str, heard: &Heard) -> Option<f64> {
    match heard {
        Heard::Progress { machine, fraction } if machine == wanted => Some(*fraction),
        _ => None,
    }
}

fn is_png(path: &Path) -> Result {
    let what = || format!("reading {} as PNG", path.display());
    let file = File::open(path).map_err(|error| failed(&what(), &error))?;
    let decoder = png::Decoder::new(BufReader::new(file));
    let mut reader = decoder.read_info().map_err(|error| failed(&what(), &error))?;
    let size = reader.output_buffer_size().unwrap_or_default();
    reader.next_frame(&mut vec![0; size]).map_err(|error| failed(&what(), &error))?;
    Ok(())
}
