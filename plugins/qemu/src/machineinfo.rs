//! The arguments of a machine's QEMU, from its `machineinfo.json`.
//!
//! VMCloak writes that file; by hand it is `{"machine": {"start_args": ["-m", "2048", …]}}`. QEMU gets the
//! arguments unchanged, except for the paths of images, which are replaced by overlays. Arguments that conflict
//! with the plugin's control of the machine are refused.

use std::path::Path;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use serde_json::Value;

use crate::images::{Opened, PLACEHOLDER};
use crate::options::{name_of, read_options_file, walk};
use crate::tpm;

/// Options that `start_args` may not contain, and the reasons. Cuckoo3's list, and `-daemonize`.
const REFUSED: [(&str, &str); 8] = [
    ("incoming", "the snapshot is loaded by this machinery"),
    ("loadvm", "the snapshot is loaded by this machinery"),
    ("snapshot", "the disposable disk takes the writes already"),
    ("monitor", "the monitor is this machinery's"),
    ("qmp", "the monitor is this machinery's"),
    ("qmp-pretty", "the monitor is this machinery's"),
    ("no-shutdown", "a guest that powers off has to end its QEMU"),
    ("daemonize", "a QEMU in the background cannot be watched"),
];

/// The place of the machine's name in its arguments.
pub const NAME: &str = "%MACHINE%";

/// A machine's arguments, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartArgs {
    /// The arguments as they are in the file.
    unchanged: Vec<String>,
    /// The arguments with the machine's name.
    args: Vec<String>,
    opened: Opened,
    /// The name of the file with the TPM's state for a cold boot, in the folder of the arguments.
    tpm_state: Option<String>,
}

impl StartArgs {
    /// Reads and checks the file of the machine of that name.
    ///
    /// # Errors
    /// The file cannot be read, is no JSON, has no `machine.start_args`, or has arguments that are refused. Other users
    /// could change it.
    pub fn read(path: &Path, machine: &str) -> Result<StartArgs> {
        expect_trusted(path)?;
        let text =
            std::fs::read_to_string(path).map_err(|error| Error::io("read the machineinfo", path, &error))?;
        let wrong = |reason: String| Error::configuration(format!("{}: {reason}", path.display()));
        let info: Value = serde_json::from_str(&text).map_err(|error| {
            wrong(format!("not JSON: {error}")).advice("Let VMCloak write it again, or correct that line")
        })?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        StartArgs::of(&info, folder, machine).map_err(|(reason, advice)| wrong(reason).advice(advice))
    }

    /// Reads the arguments in `info`, for a QEMU that runs in `folder`.
    fn of(info: &Value, folder: &Path, machine: &str) -> Result<StartArgs, (String, String)> {
        let example = "It has to look like {\"machine\": {\"start_args\": [\"-m\", \"2048\", …]}}";
        let args = info
            .get("machine")
            .and_then(|machine| machine.get("start_args"))
            .ok_or_else(|| ("the key machine.start_args is missing".to_owned(), example.to_owned()))?;
        let args = args.as_array().filter(|args| !args.is_empty()).ok_or_else(|| {
            (format!("start_args is {}, and has to be a list of arguments", shape(args)), example.to_owned())
        })?;
        let args = args.iter().map(argument).collect::<Result<Vec<_>, _>>()?;
        check(&args, folder)?;
        let tpm_state = tpm::state_name(&info["machine"]["tpm_state"])?;
        Ok(StartArgs { tpm_state, ..StartArgs::named_in(args, folder, machine) })
    }

    /// Puts the machine's name into its place.
    fn named_in(unchanged: Vec<String>, folder: &Path, machine: &str) -> StartArgs {
        let args: Vec<String> = unchanged.iter().map(|arg| arg.replace(NAME, machine)).collect();
        StartArgs { opened: Opened::by(&args, folder), args, unchanged, tpm_state: None }
    }

    /// Returns the arguments with overlays in place of the images: first the disk's overlay, then the others
    /// in the order of [`Opened::images`].
    pub fn with_overlays(&self, overlays: &[String]) -> Vec<String> {
        let mut args = self.args.clone();
        let overlay = |index: usize| overlays.get(index).cloned().unwrap_or_default();
        self.opened.with_overlays(&mut args, |image| overlay(image + 1));
        args.into_iter().map(|arg| arg.replace(PLACEHOLDER, &overlay(0))).collect()
    }

    /// Returns the files that the arguments open, except the disk's overlay.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Returns the name of the file with the TPM's state for a cold boot.
    pub fn tpm_state(&self) -> Option<&str> {
        self.tpm_state.as_deref()
    }

    /// Returns the arguments as they are in the file, with the placeholders. They are the same for all clones.
    pub fn unchanged(&self) -> &[String] {
        &self.unchanged
    }

    /// Returns the arguments with the placeholder in the place of the machine's name, for a QEMU that runs in `folder`.
    pub fn without_name(&self, folder: &Path) -> StartArgs {
        StartArgs::named_in(self.unchanged.clone(), folder, NAME)
    }

    /// Returns the arguments with the machine's name, and with the placeholder of the disk.
    pub fn named(&self) -> &[String] {
        &self.args
    }

    /// Returns the options with their names, each with its value or the argument that follows.
    pub fn options(&self) -> impl Iterator<Item = (&str, &str)> {
        walk(&self.args).map(|(_, name, value)| (name, value))
    }

    /// Creates unchecked arguments, for tests.
    #[cfg(test)]
    pub fn from_args(args: impl IntoIterator<Item = String>) -> StartArgs {
        StartArgs::in_folder(args, Path::new("/"))
    }

    /// Creates unchecked arguments of a QEMU that runs in that folder, for tests.
    #[cfg(test)]
    pub fn in_folder(args: impl IntoIterator<Item = String>, folder: &Path) -> StartArgs {
        StartArgs::named_in(args.into_iter().collect(), folder, "m")
    }

    /// Reports whether the arguments let the guest run under KVM.
    pub fn wants_kvm(&self) -> bool {
        let accelerates = |arg: &String| arg.split([',', '=']).any(|part| part == "kvm");
        self.args.iter().any(|arg| name_of(arg) == Some("enable-kvm"))
            || self.args.windows(2).any(|pair| {
                matches!(name_of(&pair[0]), Some("accel" | "machine" | "M")) && accelerates(&pair[1])
            })
    }
}

fn shape(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Array(_) => "an empty list",
        Value::Object(_) => "a mapping",
        Value::String(_) => "a single text",
        _ => "a single value",
    }
}

fn argument(value: &Value) -> Result<String, (String, String)> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err((
            format!("start_args holds {other}, which is no argument"),
            "Write each argument as a text".to_owned(),
        )),
    }
}

fn check(args: &[String], folder: &Path) -> Result<(), (String, String)> {
    if args[0].contains("qemu-system") {
        return Err((
            format!(
                "start_args begins with '{}', and has to hold QEMU's arguments without the binary",
                args[0]
            ),
            "Remove that entry: the binary is named in qemu.yaml".to_owned(),
        ));
    }
    for (index, arg) in args.iter().enumerate() {
        if arg.contains('\0') {
            return Err((
                format!("start_args holds {arg:?}, and no argument can hold a NUL"),
                "Remove it".to_owned(),
            ));
        }
        let refused = REFUSED.iter().find(|(name, _)| name_of(arg) == Some(name));
        if let Some((_, why)) = refused {
            return Err((
                format!("start_args holds '{arg}', which is not allowed: {why}"),
                "Remove it".to_owned(),
            ));
        }
        let value = args.get(index + 1).map(String::as_str).unwrap_or("");
        match name_of(arg) {
            Some("action") if value.split(',').any(|part| part == "shutdown=pause") => {
                let reason =
                    "start_args holds '-action shutdown=pause': a guest that powers off has to end its QEMU";
                return Err((reason.to_owned(), "Remove it".to_owned()));
            }
            Some("mon") if brings_qmp(value) => return Err(qmp_elsewhere(&format!("'-mon {value}'"))),
            Some("readconfig") => check_readconfig(&folder.join(value))?,
            _ => {}
        }
    }
    if args.iter().all(|arg| !arg.contains(PLACEHOLDER)) {
        return Err((
            format!("start_args has no {PLACEHOLDER}: a run would write to the machine's own disk"),
            format!("Use it where the disk is named, as in -drive file={PLACEHOLDER},format=qcow2"),
        ));
    }
    tpm::check(args)
}

fn brings_qmp(mon: &str) -> bool {
    mon.split(',').any(|part| part == "mode=control")
}

fn qmp_elsewhere(where_: &str) -> (String, String) {
    (
        format!("start_args brings in a QMP monitor by {where_}: the monitor is this machinery's"),
        "Remove it".to_owned(),
    )
}

/// Refuses a file of `-readconfig` that configures a QMP monitor.
fn check_readconfig(path: &Path) -> Result<(), (String, String)> {
    let text = read_options_file(path).map_err(|error| {
        (
            format!("the file of -readconfig, {}, cannot be read: {error}", path.display()),
            "Correct its path or permissions".to_owned(),
        )
    })?;
    let mut in_monitor = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_start();
            in_monitor = section.split(|c: char| c.is_whitespace() || c == ']').next() == Some("mon");
        }
        let setting: String = line.chars().filter(|c| !c.is_whitespace() && *c != '"').collect();
        if in_monitor && setting == "mode=control" {
            return Err(qmp_elsewhere(&format!("-readconfig {}", path.display())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(args: Value) -> Result<StartArgs, (String, String)> {
        StartArgs::of(&json!({"machine": {"start_args": args}}), Path::new("/"), "m")
    }

    fn with(arg: &str) -> Result<StartArgs, (String, String)> {
        of(json!(["-m", 512, "-hda", PLACEHOLDER, arg]))
    }

    #[test]
    fn option_is_refused_in_each_spelling() {
        for (name, _) in REFUSED {
            for spelling in
                [format!("-{name}"), format!("--{name}"), format!("-{name}=x"), format!("--{name}=x,y")]
            {
                let (reason, _) = with(&spelling).unwrap_err();
                assert!(reason.contains(&spelling), "{spelling}: {reason}");
            }
        }
    }

    #[test]
    fn argument_is_accepted_when_it_only_resembles_a_refused_one() {
        for arg in [
            "/vms/win10-snapshot/x",
            "virtio-serial,id=a-monitor",
            "file=/x/-incoming,format=raw",
            "-incomingx",
            "-snapshot-not",
            "-no-reboot",
            "snapshot",
            "---qmp",
            "-monitors",
            "qmp",
            "-name=monitor",
        ] {
            assert!(with(arg).is_ok(), "{arg}");
        }
    }

    #[test]
    fn qmp_monitor_is_refused_when_mon_or_readconfig_brings_it_in() {
        let args = |mon: &str| of(json!(["-hda", PLACEHOLDER, "-mon", mon]));
        assert!(args("chardev=x,mode=control").unwrap_err().0.contains("QMP"));
        assert!(args("chardev=x,mode=readline").is_ok());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.cfg");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            of(json!(["-hda", PLACEHOLDER, "-readconfig", path]))
        };
        assert!(read("[mon \"m\"]\n  mode = \"control\"\n").unwrap_err().0.contains("QMP"));
        assert!(read("[mon \"m\"]\n  mode = \"readline\"\n[device]\n  mode = \"control\"\n").is_ok());
        assert!(of(json!(["-hda", PLACEHOLDER, "-readconfig", "/none"])).unwrap_err().0.contains("/none"));
    }

    #[test]
    fn start_args_are_refused_when_they_are_no_list_of_arguments() {
        for (args, expected) in [
            (json!("-m 512"), "a single text"),
            (json!([]), "an empty list"),
            (json!({"a": 1}), "a mapping"),
            (json!(null), "null"),
            (json!(["-m", ["x"]]), "which is no argument"),
            (json!(["-m", "512"]), PLACEHOLDER),
            (json!(["/usr/bin/qemu-system-x86_64", PLACEHOLDER]), "without the binary"),
        ] {
            let (reason, _) = of(args.clone()).unwrap_err();
            assert!(reason.contains(expected), "{args}: {reason}");
        }
        assert!(
            StartArgs::of(&json!({"machin": {}}), Path::new("/"), "m")
                .unwrap_err()
                .0
                .contains("machine.start_args")
        );
    }

    #[test]
    fn overlay_replaces_the_placeholder_of_the_disk() {
        let args = of(json!(["-m", 512, "-drive", format!("file={PLACEHOLDER},format=qcow2")])).unwrap();
        let args = args.with_overlays(&["/d/x.qcow2".to_owned()]);
        assert_eq!(args, ["-m", "512", "-drive", "file=/d/x.qcow2,format=qcow2"]);
    }

    #[test]
    fn name_of_the_machine_replaces_its_placeholder_for_qemu_and_not_for_the_template() {
        let args = of(json!(["-hda", PLACEHOLDER, "-serial", "file:%MACHINE%.log", "-hdb", "%MACHINE%.img"]));
        let args = args.unwrap();
        let with = args.with_overlays(&["/d/0".to_owned(), "/d/1".to_owned()]);
        assert_eq!(with, ["-hda", "/d/0", "-serial", "file:m.log", "-hdb", "/d/1"]);
        assert_eq!(args.opened().images[0].source.path, Path::new("/m.img"));
        assert_eq!(args.unchanged()[3], "file:%MACHINE%.log");
        assert_eq!(args.without_name(Path::new("/")).named(), args.unchanged());
    }

    #[test]
    fn kvm_is_recognized_in_each_spelling() {
        let wants = |args: Value| of(args).unwrap().wants_kvm();
        assert!(wants(json!(["-enable-kvm", PLACEHOLDER])));
        assert!(wants(json!(["-machine", "pc,accel=kvm", PLACEHOLDER])));
        assert!(wants(json!(["-accel", "kvm", PLACEHOLDER])));
        assert!(!wants(json!(["-machine", "pc,accel=tcg", "-name", "kvm", PLACEHOLDER])));
    }

    #[test]
    fn error_names_the_file_and_the_line_when_it_is_no_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machineinfo.json");
        std::fs::write(&path, "{\"machine\":\n oops").unwrap();
        let text = StartArgs::read(&path, "m").unwrap_err().to_string();
        assert!(text.contains("machineinfo.json") && text.contains("line 2"), "{text}");
    }
}
