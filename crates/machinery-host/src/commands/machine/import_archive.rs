//! `machine import`: adds the machine of an exported file.
//!
//! ```text
//! read the whole file: sums, names ─▶ extract into an unfinished folder ─▶ restored once ─▶ entry
//! ```

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::config::find_interface;
use machinery::{Error, ErrorKind, Result};
use machinery_images::Header;

use super::arguments::{LOOPBACK, bridge_netdev, user_netdev};
use super::context::Context;
use super::create::folder_of;
use super::folder::expect_space;
use super::info::{DISK, Description, Info, MEMORY};
use super::make::{other_files, prove};
use super::options::Ready;
use super::publish::{Made, expect_free, publish};
use super::unfinished::Unfinished;
use super::{archive, interrupt};

/// The machine to import.
#[derive(Debug, Clone, Default, Args)]
pub struct ImportArchive {
    /// File of `machine export`
    pub file: PathBuf,
    /// Another name for the machine
    #[arg(long)]
    pub name: Option<String>,
    /// Another address of the machine, with user networking or --no-agent: the guest keeps the one that it has inside
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<IpAddr>,
    /// Another bridge
    #[arg(long, value_name = "BRIDGE")]
    pub bridge: Option<String>,
    /// Folder in which the machine's folder is made [default: machines in the CWD]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Restore the machine without waiting for its agent
    #[arg(long)]
    pub no_agent: bool,
}

/// Imports the machine.
///
/// # Errors
/// The file is damaged or is no exported machine, a value is wrong, or the machine cannot be restored. Nothing of the
/// machine remains then.
pub fn import(context: &Context<'_>, import: &ImportArchive) -> Result<Made> {
    let (info, bytes) = archive::verify(&import.file, context.step)?;
    let info = import.adapted(info)?;
    let machine = &info.machine;
    let name = machine.name.clone();
    expect_free(context, &name, std::slice::from_ref(&machine.ip), Some(&machine.mac), None, None)?;
    find_interface(&machine.bridge).map_err(|error| error.machine(&name).advice("Give another --bridge"))?;
    let folder = folder_of(context, import.folder.as_deref(), &name)?;
    expect_space(context.config, folder.parent().unwrap_or(&folder), bytes)
        .map_err(|error| error.machine(&name))?;
    interrupt::clear_when_interrupted(Some(&name), context.globals.clone())?;
    let mut unfinished = Unfinished::begin(context.cwd, &name, &folder)?;
    let made = (|| {
        archive::extract(&import.file, &info, &folder, context.step)?;
        expect_whole_disks(&folder)?;
        info.write(&folder)?;
        let ready = Ready::restored(import.no_agent);
        let readiness = prove(context, &info, &ready, &mut unfinished, &folder).map_err(advise)?;
        publish(context, &info, &folder, readiness, || Ok(()))
    })();
    unfinished.conclude(context, &folder, made)
}

/// Adds the advice for a guest whose agent does not answer.
fn advise(error: Error) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error;
    }
    error.advice("Check that the bridge leads to the guest, or give --no-agent to import it without a look at its agent")
}

impl ImportArchive {
    /// Returns the description with the values of this host.
    fn adapted(&self, mut info: Info) -> Result<Info> {
        let machine = &mut info.machine;
        // The files of the archive that are verified and restored.
        (machine.disk, machine.memory_snapshot) = (DISK.to_owned(), MEMORY.to_owned());
        (machine.base, machine.base_files, machine.domain) = (None, Vec::new(), None);
        machine.copied_from = None;
        if let Some(name) = &self.name {
            machine.name.clone_from(name);
        }
        let name = machine.name.clone();
        self.adapt_network(machine).map_err(|error| error.machine(name))?;
        Ok(info)
    }

    /// Replaces the address and the bridge. The network has to be one that `machine create` makes: an archive does not
    /// choose another one.
    fn adapt_network(&self, machine: &mut Description) -> Result<()> {
        // An isolated machine is imported as one on a bridge, with the address that the guest has.
        if let Some(guest) = machine.guest_ip.take() {
            machine.ip = guest.to_string();
        }
        let old: IpAddr = machine.ip.parse().map_err(|_| unknown_network("its address is none"))?;
        let (ip, port) = (self.ip.unwrap_or(old), machine.agent_port);
        let netdev = only_netdev(&mut machine.start_args)?;
        if user_netdev(old, port).is_ok_and(|user| user == *netdev) {
            if self.bridge.is_some() {
                let reason = "the machine has user networking, and no network card on a bridge";
                return Err(Error::configuration(reason).advice("Leave out --bridge"));
            }
            *netdev = user_netdev(ip, port)?;
            LOOPBACK.clone_into(&mut machine.bridge);
        } else if bridge_netdev(&machine.bridge).is_ok_and(|bridge| bridge == *netdev) {
            if ip != old && !self.no_agent {
                let reason =
                    format!("the guest keeps its address {old} on a bridge, and does not answer at {ip}");
                return Err(Error::configuration(reason)
                    .advice("Leave out --ip, or give --no-agent if this host translates the address"));
            }
            machine.bridge = self.bridge.clone().unwrap_or_else(|| machine.bridge.clone());
            *netdev = bridge_netdev(&machine.bridge)?;
        } else {
            return Err(unknown_network(&format!("-netdev {netdev}")));
        }
        machine.ip = ip.to_string();
        Ok(())
    }
}

/// Returns the value of the only argument that connects the guest to a network.
fn only_netdev(args: &mut [String]) -> Result<&mut String> {
    let option = |arg: &String| arg.strip_prefix('-').map(|arg| arg.trim_start_matches('-').to_owned());
    let is_network = |arg: &String| option(arg).is_some_and(|arg| ["netdev", "nic", "net"].contains(&&*arg));
    let at: Vec<usize> = (0..args.len()).filter(|at| is_network(&args[*at])).collect();
    match at[..] {
        [at] if args[at] == "-netdev" && at + 1 < args.len() => Ok(&mut args[at + 1]),
        _ => Err(unknown_network("it needs exactly one -netdev")),
    }
}

fn unknown_network(why: &str) -> Error {
    Error::configuration(format!("the machine's network is not one of `machine create`: {why}"))
        .advice("Export a machine with the network that `machine create` has made")
}

/// Expects that an import accepts a machine.
///
/// # Errors
/// Its network is not one of `machine create`.
pub fn expect_importable(info: &Info) -> Result<()> {
    let Err(refused) = ImportArchive::default().adapted(info.clone()) else { return Ok(()) };
    Err(Error::configuration(format!("no host would import the machine: {}", refused.reason())).advice(
        "Remove other networks from its machineinfo.json, and run `machine snapshot` before the export",
    ))
}

/// Expects that the disk, and each other file in the format qcow2, depends on no other file.
fn expect_whole_disks(folder: &Path) -> Result<()> {
    let disk = folder.join(DISK);
    if Header::read(&disk)?.is_none() {
        return Err(not_whole(&disk));
    }
    other_files(folder)?.iter().map(|(path, _)| path).chain([&disk]).try_for_each(|file| expect_whole(file))
}

fn expect_whole(file: &Path) -> Result<()> {
    match Header::read(file)? {
        Some(header) if header.backing.is_some() || header.data_file.is_some() => Err(not_whole(file)),
        _ => Ok(()),
    }
}

fn not_whole(file: &Path) -> Error {
    let name = file.file_name().unwrap_or_default().display();
    Error::configuration(format!("{name} in the archive is no whole disk in the format qcow2"))
        .detail("it may depend on another file")
        .advice("Export the machine again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn import(words: &[&str]) -> ImportArchive {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            import: ImportArchive,
        }
        let given = ["import", "m.machine"].iter().chain(words);
        <Command as clap::Parser>::try_parse_from(given).unwrap().import
    }

    /// Returns the description in an archive with this bridge and these arguments.
    fn described(bridge: &str, args: &[&str]) -> Info {
        let text = serde_json::json!({"made_by": "cuckoo-machinery", "machine": {
            "name": "m", "ip": "127.0.0.9", "agent_port": 8000, "os_name": "linux", "os_version": "12",
            "architecture": "amd64", "bridge": bridge, "mac": "", "disk": "../other/disk.qcow2",
            "memory_snapshot": "/other/memory.zst", "tags": [], "start_args": args, "base": "/other/base.qcow2",
        }});
        Info::parse(&text.to_string()).unwrap()
    }

    #[test]
    fn files_of_a_description_are_those_of_its_archive() {
        let machine =
            import(&[]).adapted(described("br1", &["-netdev", "bridge,id=net0,br=br1"])).unwrap().machine;
        assert_eq!((machine.disk.as_str(), machine.memory_snapshot.as_str()), (DISK, MEMORY));
        assert_eq!(machine.base, None);
    }

    #[test]
    fn network_of_an_archive_is_adapted_or_refused() {
        let user = "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.9:8000-:8000";
        let bridge = "bridge,id=net0,br=br1";
        let adapted = |words: &[&str], args: &[&str]| {
            let machine = import(words).adapted(described("br1", args)).ok()?.machine;
            Some((machine.start_args[1].clone(), machine.bridge, machine.ip))
        };
        let network = |netdev: &str, interface: &str, ip: &str| {
            Some((netdev.to_owned(), interface.to_owned(), ip.to_owned()))
        };
        let (on_user, on_bridge) = (["-netdev", user], ["-netdev", bridge]);
        assert_eq!(adapted(&[], &on_user), network(user, "lo", "127.0.0.9"));
        let other = user.replace("127.0.0.9", "127.0.0.8");
        assert_eq!(adapted(&["--ip", "127.0.0.8"], &on_user), network(&other, "lo", "127.0.0.8"));
        assert_eq!(adapted(&[], &on_bridge), network(bridge, "br1", "127.0.0.9"));
        let moved = network("bridge,id=net0,br=br10", "br10", "127.0.0.9");
        assert_eq!(adapted(&["--bridge", "br10"], &on_bridge), moved);
        let unchecked = ["--ip", "10.0.0.2", "--no-agent"];
        assert_eq!(adapted(&unchecked, &on_bridge), network(bridge, "br1", "10.0.0.2"));
        // The guest of a bridge keeps its address, and user networking is of this host alone.
        for (words, args) in [
            (["--ip", "10.0.0.2"], on_bridge),
            (["--ip", "10.0.0.2"], on_user),
            (["--bridge", "br2"], on_user),
        ] {
            assert_eq!(adapted(&words, &args), None, "{words:?}");
        }
        for args in [
            &["-netdev", "user,id=net0"][..],
            &["-netdev", &user.replace("restrict=on", "restrict=off")],
            &["-netdev", &format!("{user},hostfwd=tcp::22-:22")],
            &["-netdev", &user.replace("127.0.0.9", "0.0.0.0")],
            &["-netdev", "bridge,id=net0,br=br10"],
            &["-netdev", bridge, "-netdev", "user,id=net1"],
            &["-netdev", bridge, "--nic", "user"],
            &["-netdev", bridge, "-net", "user"],
            &["-nic", "user"],
            &["-netdev"],
            &["-m"],
        ] {
            assert_eq!(adapted(&[], args), None, "{args:?}");
        }
    }

    #[test]
    fn isolated_machine_of_an_archive_is_on_a_bridge_with_the_address_inside() {
        let mut info = described("br0", &["-netdev", "bridge,id=net0,br=br0"]);
        info.machine.guest_ip = "192.168.30.11".parse().ok();
        let machine = import(&["--bridge", "br7"]).adapted(info).unwrap().machine;
        assert_eq!((machine.ip.as_str(), machine.bridge.as_str()), ("192.168.30.11", "br7"));
        assert_eq!(machine.guest_ip, None);
    }

    #[test]
    fn disk_is_refused_when_it_depends_on_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, other) = (folder.path().join(DISK), folder.path().join("other"));
        let mut whole = vec![0; 104];
        whole[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let is_whole = |path: &Path, content: &[u8]| {
            fs::write(path, content).unwrap();
            expect_whole_disks(folder.path()).is_ok()
        };
        assert!(is_whole(&disk, &whole));
        for bytes in [&[(15, 1), (19, 1)][..], &[(79, 4)], &[(7, 9)], &[(0, b'x')]] {
            let mut content = whole.clone();
            bytes.iter().for_each(|(at, byte)| content[*at] = *byte);
            assert!(!is_whole(&disk, &content), "{bytes:?}");
        }
        assert!(!is_whole(&disk, &whole[..40]) && is_whole(&disk, &whole));
        // So is any other disk in the archive, and no other file.
        assert!(is_whole(&other, b"") && is_whole(&other, b"text") && is_whole(&other, &whole));
        (whole[15], whole[19]) = (1, 1);
        fs::write(&other, &whole).unwrap();
        let error = expect_whole_disks(folder.path()).unwrap_err().to_string();
        assert!(error.contains("other in the archive"), "{error}");
    }
}
