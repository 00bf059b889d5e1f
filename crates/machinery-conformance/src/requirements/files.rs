//! Files that a machinery writes for its caller: memory dumps and screenshots.

use std::fs::{File, Metadata};
use std::io::BufReader;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::{DumpFormat, State};
use object::{Object, ObjectKind, ObjectSegment, ReadCache};

use crate::call::{Call, Outcome};
use crate::recorder::Event;
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;

pub fn dump_memory(session: &Session) -> Result {
    if !session.capabilities()?.dump_memory {
        return Err(CheckFailure::Skipped("the machinery does not offer dump_memory".to_owned()));
    }
    let machine = session.machine();
    let dump = |path: PathBuf| Call::DumpMemory(path, DumpFormat::Elf);
    fails_when_off(session, machine, dump)?;
    session.restore(machine)?;
    let before = session.events().len();
    let file = session.path("dump");
    session.succeeds(&dump(file.clone()), machine)?;
    belongs_to_caller(&file)?;
    session.plugin().since_1_1(is_core_file(&file))?;
    progress_grows(machine, session.events().get(before..).unwrap_or_default())?;
    session.is_alive(machine)?;
    names_invalid_path(session, machine, dump)?;
    handles_other_formats(session, machine)
}

pub fn screenshot(session: &Session) -> Result {
    if !session.capabilities()?.screenshot {
        return Err(CheckFailure::Skipped("the machinery does not offer screenshot".to_owned()));
    }
    let machine = session.machine();
    fails_when_off(session, machine, Call::Screenshot)?;
    session.restore(machine)?;
    let file = session.path("screen.png");
    session.succeeds(&Call::Screenshot(file.clone()), machine)?;
    belongs_to_caller(&file)?;
    is_png(&file)?;
    session.is_alive(machine)?;
    names_invalid_path(session, machine, Call::Screenshot)
}

/// Demands that the call fails for a machine that is off, and writes no file.
fn fails_when_off(session: &Session, machine: &str, call: impl Fn(PathBuf) -> Call) -> Result {
    let file = session.path("file-when-off");
    session.fails(&call(file.clone()), machine)?;
    session.no_file_at(&file)?;
    session.has_state(machine, State::Poweroff)
}

/// Demands that the error names a path that cannot be written to, and that the machine still runs.
fn names_invalid_path(session: &Session, machine: &str, call: impl Fn(PathBuf) -> Call) -> Result {
    let folder = session.path("folder");
    std::fs::create_dir(&folder).map_err(|error| failed("creating a folder", &error))?;
    for path in [session.path("no-such-folder").join("file"), folder.clone()] {
        let error = session.fails(&call(path.clone()), machine)?.to_string();
        let path = path.display().to_string();
        demand!(error.contains(&path), "the error does not name the path {path}: {error}");
        session.is_alive(machine)?;
    }
    demand!(folder.is_dir(), "the folder at the path was removed");
    Ok(())
}

/// Demands that the machine still runs after a dump in an unsupported format, and that no file is left.
fn handles_other_formats(session: &Session, machine: &str) -> Result {
    for format in [DumpFormat::KdumpZlib, DumpFormat::WinDmp] {
        let file = session.path(format.as_str());
        match session.attempt(&Call::DumpMemory(file.clone(), format), machine, session.timeout())? {
            Outcome::Success(()) => belongs_to_caller(&file)?,
            Outcome::Refusal(_) => session.no_file_at(&file)?,
        }
        session.is_alive(machine)?;
    }
    Ok(())
}

fn belongs_to_caller(path: &Path) -> Result {
    let file = metadata(path)?;
    let folder = path.parent().map(metadata).transpose()?;
    demand!(file.is_file() && file.len() > 0, "{} is not a file, or it is empty", path.display());
    // The caller owns the folder. A successful read proves little, because root can read any file.
    let same_owner = folder.is_none_or(|folder| folder.uid() == file.uid());
    demand!(same_owner, "{} belongs to user {}, not to the caller", path.display(), file.uid());
    demand!(file.mode() & 0o400 != 0, "{} is not readable by its owner", path.display());
    Ok(())
}

fn metadata(path: &Path) -> Result<Metadata> {
    path.symlink_metadata().map_err(|error| failed(&path.display().to_string(), &error))
}

/// Demands that the plugin reported progress, and that it only grew.
fn progress_grows(machine: &str, events: &[Event]) -> Result {
    let fractions: Vec<f64> = events.iter().filter_map(|event| fraction_of(machine, event)).collect();
    demand!(!fractions.is_empty(), "the plugin reported no progress of the dump");
    demand!(
        fractions.iter().all(|at| (0.0..=1.0).contains(at)),
        "the progress must be between 0 and 1, but is {fractions:?}"
    );
    demand!(fractions.is_sorted(), "the progress must only grow, but is {fractions:?}");
    Ok(())
}

fn fraction_of(wanted: &str, event: &Event) -> Option<f64> {
    match event {
        Event::Progress { machine, fraction } if machine == wanted => Some(*fraction),
        _ => None,
    }
}

/// Demands an ELF core file whose segments are all in the file.
fn is_core_file(path: &Path) -> Result {
    let action = || format!("reading {} as an ELF core file", path.display());
    let file = File::open(path).map_err(|error| failed(&action(), &error))?;
    let length = file.metadata().map_err(|error| failed(&action(), &error))?.len();
    let content = ReadCache::new(file);
    let core = object::File::parse(&content).map_err(|error| failed(&action(), &error))?;
    demand!(core.kind() == ObjectKind::Core, "the dump must be an ELF core file, but is {:?}", core.kind());
    let ends = core.segments().map(|segment| segment.file_range()).map(|(at, size)| at.saturating_add(size));
    let end = ends.max().unwrap_or_default();
    demand!(end > 0, "the dump is an ELF core file without memory");
    demand!(end <= length, "the dump ends at {length}, but its segments end at {end}");
    Ok(())
}

fn is_png(path: &Path) -> Result {
    let action = || format!("reading {} as PNG", path.display());
    let file = File::open(path).map_err(|error| failed(&action(), &error))?;
    let decoder = png::Decoder::new(BufReader::new(file));
    let mut reader = decoder.read_info().map_err(|error| failed(&action(), &error))?;
    let size = reader.output_buffer_size().unwrap_or_default();
    reader.next_frame(&mut vec![0; size]).map_err(|error| failed(&action(), &error))?;
    Ok(())
}
