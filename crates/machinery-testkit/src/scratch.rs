//! A Cuckoo working directory (CWD) for one test, removed with the test.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use machinery::Setup;
use machinery::config::ConfigFile;
use tempfile::TempDir;

use crate::error::{Context, Error};
use crate::{Result, artifacts};

const CUCKOO_YAML: &str = "conf/cuckoo.yaml";
const HOST_YAML: &str = "conf/machinery-host.yaml";

/// A CWD. Declare it before the hosts that serve it, so that it is removed after they have ended.
#[derive(Debug)]
pub struct ScratchCwd {
    _dir: TempDir,
    root: PathBuf,
}

impl ScratchCwd {
    /// Makes a CWD that lists these machineries, each with the text of its configuration.
    pub fn new(machineries: &[(&str, &str)]) -> Result<Self> {
        Self::below(Path::new("cwd"), machineries)
    }

    /// Makes a CWD of the double machinery, with [`double`] machines.
    pub fn double(machines: &[(&str, &str)]) -> Result<Self> {
        Self::new(&[("double", &double(machines))])
    }

    /// Makes a CWD like [`new`](Self::new) in the folder `path` of the scratch folder, for long paths.
    pub fn below(path: &Path, machineries: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("machinery-cwd.").tempdir();
        let dir = dir.context(|| "making a scratch CWD".to_owned())?;
        // The machines' own users reach their files, as those of an operator.
        let open = fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711));
        open.context(|| "opening a scratch CWD".to_owned())?;
        let cwd = ScratchCwd { root: dir.path().join(path), _dir: dir };
        cwd.write(".cuckoocwd", "")?;
        let names: Vec<&str> = machineries.iter().map(|(name, _)| *name).collect();
        cwd.list_machineries(&names)?;
        for (name, text) in machineries {
            cwd.write_yaml(name, text)?;
        }
        Ok(cwd)
    }

    /// Writes `conf/cuckoo.yaml` with these machineries.
    pub fn list_machineries(&self, machineries: &[&str]) -> Result<()> {
        let mut text = String::from("machineries:\n");
        for name in machineries {
            text += &format!("- {name}\n");
        }
        text += "resultserver:\n  listen_ip: 127.0.0.1\n  listen_port: 2042\n";
        text += "tcpdump:\n  enabled: false\n  path: /usr/bin/tcpdump\n";
        self.write(CUCKOO_YAML, &text)
    }

    /// Returns the text of a machinery's configuration.
    pub fn yaml(&self, machinery: &str) -> Result<String> {
        let path = self.root.join(yaml_of(machinery));
        fs::read_to_string(&path).context(|| format!("reading {}", path.display()))
    }

    /// Replaces the text of a machinery's configuration.
    pub fn write_yaml(&self, machinery: &str, text: &str) -> Result<()> {
        self.write(yaml_of(machinery), text)
    }

    /// Replaces the first `old` in a machinery's configuration by `new`. Fails if there is none.
    pub fn change_yaml(&self, machinery: &str, old: &str, new: &str) -> Result<()> {
        self.change(&yaml_of(machinery), old, new)
    }

    /// Removes a machine from a machinery's configuration, in which each key has a line of its own.
    pub fn remove_machine(&self, machinery: &str, machine: &str) -> Result<()> {
        let (text, begin) = (self.yaml(machinery)?, format!("  {machine}:"));
        let mut inside = false;
        let stays = |line: &&str| {
            inside = *line == begin || inside && line.starts_with("    ");
            !inside
        };
        let left: Vec<&str> = text.lines().filter(stays).collect();
        self.write_yaml(machinery, &(left.join("\n") + "\n"))
    }

    /// Replaces the first `old` in `conf/cuckoo.yaml` by `new`. Fails if there is none.
    pub fn change_cuckoo_yaml(&self, old: &str, new: &str) -> Result<()> {
        self.change(CUCKOO_YAML, old, new)
    }

    /// Replaces the first `old` in `machinery-host.yaml`, which must be there, by `new`.
    pub fn change_host_yaml(&self, old: &str, new: &str) -> Result<()> {
        self.change(HOST_YAML, old, new)
    }

    /// Replaces the first `old` in a file of the CWD by `new`. Fails if there is none.
    pub fn change(&self, path: &str, old: &str, new: &str) -> Result<()> {
        let file = self.root.join(path);
        let text = fs::read_to_string(&file).context(|| format!("reading {}", file.display()))?;
        if !text.contains(old) {
            return Err(Error::new(format!("there is no {old:?} in {path}:\n{text}")));
        }
        self.write(path, text.replacen(old, new, 1))
    }

    /// Enables captures by that program.
    pub fn capture_with(&self, tcpdump: &Path) -> Result<()> {
        let path = format!("path: {}", tcpdump.display());
        self.change_cuckoo_yaml("enabled: false", "enabled: true")?;
        self.change_cuckoo_yaml("path: /usr/bin/tcpdump", &path)
    }

    /// Writes an executable shell script.
    pub fn script(&self, name: &str, script: &str) -> Result<PathBuf> {
        self.write(name, format!("#!/bin/sh\n{script}\n"))?;
        let path = self.root.join(name);
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, mode).context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Writes `conf/machinery-host.yaml`.
    pub fn host_yaml(&self, text: &str) -> Result<()> {
        self.write(HOST_YAML, text)
    }

    /// Copies a file into the CWD's plugin folder, as the plugin of that machinery.
    pub fn install_plugin_file(&self, file: &Path, name: &str) -> Result<PathBuf> {
        let what = || format!("copying {} as the plugin '{name}'", file.display());
        let content = fs::read(file).context(what)?;
        let path = format!("machineries/libmachinery_{name}.so");
        self.write(&path, content)?;
        Ok(self.root.join(path))
    }

    /// Copies the built plugin of that machinery into the CWD's plugin folder.
    pub fn install_plugin(&self, name: &str) -> Result<PathBuf> {
        self.install_plugin_file(&artifacts::plugin(name)?, name)
    }

    /// Writes a file, and makes the folders above it. `path` is relative to the CWD.
    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<()> {
        let path = self.root.join(path);
        let what = || format!("writing {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&self.root)).context(what)?;
        fs::write(&path, content).context(what)
    }

    /// Returns its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the setup that a host would pass to that machinery's plugin.
    pub fn setup(&self, machinery: &str) -> Result<Setup> {
        let folder = |name: &str| {
            let folder = self.root.join(name);
            fs::create_dir_all(&folder).context(|| format!("making {}", folder.display()))?;
            Ok(folder)
        };
        let read = |path: PathBuf| ConfigFile::read(&path).context(|| format!("reading {}", path.display()));
        let host_config = Some(self.root.join(HOST_YAML)).filter(|path| path.exists());
        Ok(Setup {
            config: read(self.root.join(yaml_of(machinery)))?,
            host_config: host_config.map(read).transpose()?,
            sockets_dir: folder("sockets")?,
            state_dir: folder("state")?,
            cache_dir: folder("cache")?,
            adopts: false,
            result_server: None,
        })
    }

    /// Returns the path of the host's socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("operational/sockets/machinerymanager.sock")
    }
}

fn yaml_of(machinery: &str) -> String {
    format!("conf/machineries/{machinery}.yaml")
}

/// Returns the text of `double.yaml` for these machines: names, and further YAML keys such as `faults: {stop:
/// fail}`.
pub fn double(machines: &[(&str, &str)]) -> String {
    let mut text = String::from("interface: lo\nmachines:\n");
    for (index, (name, more)) in machines.iter().enumerate() {
        let ip = format!("10.{}.{}.{}", index / 62_500, index / 250 % 250, index % 250 + 1);
        let keys = format!("label: {name}-label, ip: {ip}, platform: linux, os_version: 12");
        let more = if more.is_empty() { String::new() } else { format!(", {more}") };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name}: {{{keys}{more}}}");
    }
    text
}
