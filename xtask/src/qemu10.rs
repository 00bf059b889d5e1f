//! A newer QEMU beside the system's, to see that both work.
//!
//! It is QEMU 10.0 from Debian's bookworm-backports, unpacked into the user's cache folder together
//! with the libraries that this system lacks. Nothing is installed, and apt's own lists and caches
//! stay as they are. Debian compiles its paths into QEMU, so `bin` holds small scripts that point it
//! to its own files.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Context, Result, cache, output, succeeds};

const RELEASE: &str = "bookworm-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where packages come from: what QEMU depends on may be in any of them.
const SOURCES: [(&str, &str); 4] = [
    ("debian", "bookworm"),
    ("debian", "bookworm-updates"),
    ("debian-security", "bookworm-security"),
    ("debian", RELEASE),
];

/// Unpacked always, even where the system has its own: they go with this QEMU.
const OWN: [&str; 6] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils", "seabios", "ipxe-qemu"];

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The folder whose `bin` has `qemu-system-x86_64` and `qemu-img`, filled now if need be.
pub fn folder() -> Result<PathBuf> {
    let folder = cache("qemu-10.0")?;
    let parent = folder.parent().unwrap_or(&folder);
    let what = || format!("cannot make {}", folder.display());
    fs::create_dir_all(parent).context(what)?;
    let lock = File::create(folder.with_added_extension("lock")).context(what)?;
    lock.lock().context(what)?;
    if !works(&folder) {
        eprintln!("QEMU 10.0 is fetched from {RELEASE} into {}.", folder.display());
        let new = tempfile::tempdir_in(parent).context(what)?;
        unpack(new.path())?;
        write_scripts(new.path(), &folder)?;
        replace(new, &folder)?;
        output(Command::new(folder.join("bin/qemu-system-x86_64")).arg("--version"))?;
    }
    Ok(folder)
}

/// An update of the system can take away a library that was there when it was unpacked.
fn works(folder: &Path) -> bool {
    let programs = ["qemu-system-x86_64", "qemu-img"].map(|name| folder.join("bin").join(name));
    programs.iter().all(|program| succeeds(Command::new(program).arg("--version")))
}

fn unpack(into: &Path) -> Result<()> {
    let apt = Apt::new()?;
    output(&mut apt.get(&["update"]))?;
    let mut packages: Vec<String> = OWN.map(str::to_owned).to_vec();
    packages.extend(apt.lacking()?);
    packages.sort_unstable();
    packages.dedup();
    for package in apt.download(&packages)? {
        output(Command::new("dpkg-deb").arg("-x").args([package.as_path(), into]))?;
    }
    Ok(())
}

fn replace(new: tempfile::TempDir, folder: &Path) -> Result<()> {
    let what = || format!("cannot replace {}", folder.display());
    if folder.exists() {
        fs::remove_dir_all(folder).context(what)?;
    }
    fs::set_permissions(new.path(), Permissions::from_mode(0o755)).context(what)?;
    fs::rename(new.path(), folder).context(what)?;
    // Nothing is left under the old name, so there is nothing to remove.
    let _ = new.keep();
    Ok(())
}

/// apt-get with sources, lists and caches of its own.
struct Apt {
    work: tempfile::TempDir,
}

impl Apt {
    fn new() -> Result<Self> {
        if !Path::new(KEYRING).is_file() {
            return Err(format!(
                "there is no {KEYRING} to verify Debian's packages with: install debian-archive-keyring"
            )
            .into());
        }
        let what = || "cannot prepare a folder for apt-get".to_owned();
        let work = tempfile::tempdir().context(what)?;
        for folder in ["lists/partial", "archives/partial", "debs"] {
            fs::create_dir_all(work.path().join(folder)).context(what)?;
        }
        let sources = SOURCES.map(|(archive, release)| {
            format!("deb [signed-by={KEYRING}] http://deb.debian.org/{archive} {release} main\n")
        });
        fs::write(work.path().join("sources.list"), sources.concat()).context(what)?;
        Ok(Self { work })
    }

    fn get(&self, args: &[&str]) -> Command {
        let at = |name: &str| self.work.path().join(name).display().to_string();
        let mut command = Command::new("apt-get");
        command.env("LC_ALL", "C").current_dir(self.work.path().join("debs")).arg("-qq");
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache={}", at("")),
            format!("Dir::Cache::archives={}", at("archives")),
            // The folder is this user's alone; apt's own user could not write to it.
            "APT::Sandbox::User=".to_owned(),
            "APT::Get::AllowUnauthenticated=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(args);
        command
    }

    /// The packages that an installation would bring to this system.
    fn lacking(&self) -> Result<Vec<String>> {
        let args = ["install", "-s", "--no-install-recommends", "-t", RELEASE, OWN[0], "qemu-utils"];
        Ok(installed(&output(&mut self.get(&args))?))
    }

    /// The package files of `packages`.
    fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let mut args = vec!["download", "-t", RELEASE];
        args.extend(packages.iter().map(String::as_str));
        output(&mut self.get(&args))?;
        let debs = self.work.path().join("debs");
        let entries = fs::read_dir(&debs).context(|| format!("cannot list {}", debs.display()))?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    }
}

/// The names in apt-get's simulation, whose lines are like `Inst name [old] (new …)`.
fn installed(simulation: &str) -> Vec<String> {
    let names = simulation.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    names.map(str::to_owned).collect()
}

/// Writes the scripts into `new` that start the programs once they are in `folder`.
fn write_scripts(new: &Path, folder: &Path) -> Result<()> {
    let what = || format!("cannot write the scripts of {}", folder.display());
    let quoted = |path: &str| quoted(&folder.join(path));
    let data = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];
    let data = data.map(|path| format!(" -L {}", quoted(path))).concat();
    fs::create_dir_all(new.join("bin")).context(what)?;
    for (program, args) in [("qemu-system-x86_64", data.as_str()), ("qemu-img", "")] {
        let script = format!(
            "#!/bin/sh\nlibraries={}\nexport LD_LIBRARY_PATH=\"$libraries${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n\
             export QEMU_MODULE_DIR=\"$libraries/qemu\"\nexec {}{args} \"$@\"\n",
            quoted(LIBRARIES),
            quoted(&format!("usr/bin/{program}")),
        );
        let path = new.join("bin").join(program);
        fs::write(&path, script).context(what)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755)).context(what)?;
    }
    Ok(())
}

/// The path as a word of a shell script.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_would_install_is_read() {
        let simulation = "NOTE: This is only a simulation!\nInst liburing2 (2.3-3 Debian:12 [amd64])\n\
                          Inst qemu-utils [1:7.2] (1:10.0 backports [amd64]) []\nConf liburing2 (2.3-3)\n";
        assert_eq!(installed(simulation), ["liburing2", "qemu-utils"]);
    }

    #[test]
    fn any_path_is_one_word() {
        assert_eq!(quoted(Path::new("/home/o'neil/$x")), r"'/home/o'\''neil/$x'");
    }
}
