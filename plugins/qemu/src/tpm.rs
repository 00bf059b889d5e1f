//! The TPM of a run: a process `swtpm` of its own, which only this run's QEMU reaches.
//!
//! ```text
//! -chardev socket,id=c,path=%TPM_SOCKET_PATH% ─▶ -chardev socket,id=c,fd=5
//! QEMU 5 ◀─ a pair of sockets ─▶ 3 swtpm 4 ─▶ the TPM's state, a file in memory
//! ```
//!
//! Nothing of a run's TPM has a name that another process could open. The state ends with swtpm, and swtpm ends with
//! QEMU: QEMU's end closes its connection, and both are one process group and one cgroup.
//!
//! A snapshot has the whole state of the TPM, permanent and volatile. QEMU writes it into its migration stream, and gives
//! it to the empty swtpm of a restored run. Only a cold boot starts from a file. Sources: QEMU's
//! docs/specs/tpm.rst and backends/tpm/tpm_emulator.c, swtpm(8).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_backend::Output;
use machinery_backend::jail::{Confinement, Limits, Policy};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;

use crate::options::{Options, walk};

/// The place of the socket in a machine's arguments.
pub const PLACEHOLDER: &str = "%TPM_SOCKET_PATH%";

/// The places of swtpm, by distribution.
const PROGRAMS: [&str; 2] = ["/usr/bin/swtpm", "/usr/local/bin/swtpm"];

/// The numbers of the descriptors in swtpm: its connection with QEMU, and its state.
const CONNECTION: i32 = 3;
const STATE: i32 = 4;

/// The maximum size of a TPM's state, in bytes. swtpm writes some kilobytes.
const MAX_STATE: u64 = 1 << 20;

/// The TPM of a run that begins.
pub struct Tpm {
    /// The jail of its swtpm.
    pub confinement: Confinement,
    /// The file with the state in which a cold boot finds it; a new TPM without one.
    pub state: Option<PathBuf>,
    /// The state during the run, once that has begun.
    pub memory: Option<File>,
}

/// Returns the index of the argument whose character device is connected with the run's own TPM, and its options.
pub fn socket(args: &[String]) -> Option<(usize, Options)> {
    walk(args).find_map(|(index, name, value)| {
        let options = Options::parse(value, "backend");
        (name == "chardev" && is_socket(&options)).then_some((index, options))
    })
}

/// Reports whether the character device is connected with the run's own TPM.
pub fn is_socket(options: &Options) -> bool {
    options.get("backend") == Some("socket") && options.get("path") == Some(PLACEHOLDER)
}

/// Reports whether the `-tpmdev` with this value is the run's own TPM.
pub fn is_own(tpmdev: &str, args: &[String]) -> bool {
    let options = Options::parse(tpmdev, "type");
    let own = socket(args);
    let own = own.as_ref().and_then(|(_, socket)| socket.get("id"));
    options.get("type") == Some("emulator") && own.is_some() && options.get("chardev") == own
}

/// Checks where the arguments have the placeholder. The error is the reason and the advice.
///
/// # Errors
/// It is at another place, or at more than one.
pub fn check(args: &[String]) -> Result<(), (String, String)> {
    let places = args.iter().filter(|arg| arg.contains(PLACEHOLDER)).count();
    if places == 0 || places == 1 && socket(args).is_some() {
        return Ok(());
    }
    let advice =
        format!("Write -chardev socket,id=tpm,path={PLACEHOLDER} once, and name it in -tpmdev emulator");
    Err((format!("start_args has {PLACEHOLDER} at another place than the socket of one TPM"), advice))
}

/// Reads the name of the file with the TPM's state. The error is the reason and the advice.
///
/// # Errors
/// It is no name of a file in the machine's folder.
pub fn state_name(value: &Value) -> Result<Option<String>, (String, String)> {
    match value {
        Value::Null => Ok(None),
        Value::String(name) if Path::new(name).file_name() == Some(name.as_ref()) => Ok(Some(name.clone())),
        other => {
            let advice = "Write the name of a file in the folder of the machineinfo".to_owned();
            Err((format!("tpm_state is {other}, and has to be a name"), advice))
        }
    }
}

/// Returns the program, if it is installed.
///
/// # Errors
/// It is not.
pub fn program() -> Result<&'static Path> {
    PROGRAMS.into_iter().map(Path::new).find(|program| program.exists()).ok_or_else(|| {
        Error::environment(format!("the program of the TPM is not installed ({})", PROGRAMS[0]))
            .advice("Install swtpm, 0.7 or newer (Debian's package swtpm)")
    })
}

/// Returns what swtpm may do, apart from what it gets as descriptors.
pub fn policy(program: &Path, limits: Limits) -> Policy {
    Policy { read: vec![program.to_owned()], own_network: true, limits, ..Policy::default() }
}

/// Returns the command of the run's swtpm, and puts the other end of its connection into QEMU's arguments under that
/// number.
///
/// # Errors
/// swtpm is not installed, or its state cannot be read.
pub fn command(
    tpm: &mut Tpm,
    args: &mut [String],
    number: i32,
    is_cold: bool,
) -> Result<Option<(Command, OwnedFd)>> {
    let Some((index, mut options)) = socket(args) else { return Ok(None) };
    let failed = |error: io::Error| Error::environment(format!("cannot connect a TPM: {error}"));
    let (qemu, swtpm) = UnixStream::pair().map_err(failed)?;
    let state = memory(tpm.state.as_deref().filter(|state| is_cold && state.exists()))?;
    tpm.memory = Some(state.try_clone().map_err(failed)?);
    let mut command =
        tpm.confinement.command(program()?, vec![(swtpm.into(), CONNECTION), (state.into(), STATE)])?;
    command.args(["socket", "--tpm2", "--terminate"]);
    command.args(["--ctrl", &format!("type=unixio,clientfd={CONNECTION}")]);
    command.args(["--tpmstate", &format!("backend-uri=file:///proc/self/fd/{STATE}")]);
    options.remove("path");
    options.set("fd", &number.to_string());
    if let Some(argument) = args.get_mut(index) {
        *argument = options.to_string();
    }
    Ok(Some((command, qemu.into())))
}

/// Writes the state of a run's TPM to that file, in place of an older one. It has the TPM's keys, so only the host's user
/// can read it. The guest is paused.
///
/// # Errors
/// The state cannot be read, or the file cannot be written.
pub fn save(memory: &File, path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io("write the state of the TPM to", path, &error);
    let size = memory.metadata().map_err(failed)?.len();
    if size > MAX_STATE {
        let reason = format!("the state of the TPM has {size} bytes, and at most {MAX_STATE} are possible");
        return Err(Error::failed(reason).advice("Make the machine without a TPM, or with another swtpm"));
    }
    let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
    memory.read_exact_at(&mut content, 0).map_err(failed)?;
    let output = Output::at(path)?;
    let mut file = output.file();
    file.write_all(&content).and_then(|()| file.sync_all()).map_err(failed)?;
    output.finish()
}

/// Creates the file in memory with the TPM's state: a copy of that file, or empty for a new TPM.
fn memory(state: Option<&Path>) -> Result<File> {
    let file = memfd_create("tpm", MemfdFlags::CLOEXEC).map_err(io::Error::from);
    let mut file = File::from(
        file.map_err(|error| Error::environment(format!("cannot make a file in memory: {error}")))?,
    );
    if let Some(path) = state {
        let failed = |error: io::Error| Error::io("read the state of the TPM,", path, &error);
        expect_trusted(path)?;
        let mut content = Vec::new();
        let opened = File::open(path).map_err(failed)?;
        opened.take(MAX_STATE + 1).read_to_end(&mut content).map_err(failed)?;
        if content.len() as u64 > MAX_STATE {
            return Err(Error::configuration(format!("{} is no state of a TPM", path.display()))
                .advice("Name a file of swtpm's backend file://, such as that of swtpm_setup"));
        }
        file.write_all(&content).map_err(failed)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery_backend::jail::{Jail, JailMode};

    fn args(list: &[&str]) -> Vec<String> {
        list.iter().map(|&arg| arg.to_owned()).collect()
    }

    const SOCKET: [&str; 2] = ["-chardev", "socket,id=c,path=%TPM_SOCKET_PATH%"];

    #[test]
    fn tpm_is_own_when_its_socket_is_the_placeholder() {
        let with = |tpmdev: &str| is_own(tpmdev, &args(&SOCKET));
        assert!(with("emulator,id=t,chardev=c") && with("id=t,type=emulator,chardev=c"));
        assert!(!with("emulator,id=t,chardev=d") && !with("passthrough,id=t") && !with("emulator,id=t"));
        assert!(!is_own("emulator,id=t,chardev=c", &args(&["-chardev", "socket,id=c,path=/x"])));
    }

    #[test]
    fn placeholder_is_refused_at_another_place_and_at_two() {
        assert!(check(&args(&SOCKET)).is_ok() && check(&args(&["-m", "32"])).is_ok());
        for wrong in [
            vec!["-name", PLACEHOLDER],
            vec!["-chardev", "file,id=c,path=%TPM_SOCKET_PATH%"],
            [SOCKET, SOCKET].concat(),
        ] {
            assert!(check(&args(&wrong)).unwrap_err().0.contains(PLACEHOLDER), "{wrong:?}");
        }
    }

    #[test]
    fn state_is_a_file_in_the_folder_of_the_machine() {
        assert_eq!(state_name(&Value::Null).unwrap(), None);
        assert_eq!(state_name(&"tpm.state".into()).unwrap().as_deref(), Some("tpm.state"));
        for wrong in [Value::from("../tpm.state"), "/tpm.state".into(), "".into(), "..".into(), 1.into()] {
            assert!(state_name(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn socket_becomes_a_descriptor_in_qemus_arguments() {
        if program().is_err() {
            return;
        }
        let policy = policy(Path::new("/usr/bin/swtpm"), Limits::default());
        let confinement = Jail::of_a_tool(JailMode::Off).confine(policy).unwrap();
        let mut args = args(&["-chardev", "socket,path=%TPM_SOCKET_PATH%,id=c", "-m", "32"]);
        let mut tpm = Tpm { confinement, state: None, memory: None };
        let (command, _) = command(&mut tpm, &mut args, 5, false).unwrap().unwrap();
        assert_eq!(args, ["-chardev", "backend=socket,id=c,fd=5", "-m", "32"]);
        assert!(command.get_args().any(|arg| arg == "backend-uri=file:///proc/self/fd/4"));
        let mut without = vec!["-m".to_owned(), "32".to_owned()];
        assert!(super::command(&mut tpm, &mut without, 5, false).unwrap().is_none());
    }

    #[test]
    fn state_of_a_cold_boot_is_a_copy_and_has_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tpm.state");
        std::fs::write(&path, "swtpm").unwrap();
        assert_eq!(memory(Some(&path)).unwrap().metadata().unwrap().len(), 5);
        assert_eq!(memory(None).unwrap().metadata().unwrap().len(), 0);
        File::create(&path).unwrap().set_len(MAX_STATE + 1).unwrap();
        assert!(memory(Some(&path)).unwrap_err().to_string().contains("no state of a TPM"));
        let saved = folder.path().join("saved");
        std::fs::write(&path, "later").unwrap();
        save(&memory(Some(&path)).unwrap(), &saved).unwrap();
        assert_eq!(std::fs::read(&saved).unwrap(), b"later");
        let large = memory(None).unwrap();
        large.set_len(MAX_STATE + 1).unwrap();
        assert!(save(&large, &saved).unwrap_err().to_string().contains("at most"));
        assert_eq!(std::fs::read(&saved).unwrap(), b"later");
    }
}
