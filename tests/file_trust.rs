//! Trust in the files that decide what runs: configuration, programs, arguments, folders of prepared state. A host
//! refuses a file that another user could change, before it uses it. Only root can give files to others; a plain user
//! may skip those tests, and tests modes instead.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, CommandOutput};
use machinery_testkit::lab::{KvmLab, Lab};
use machinery_testkit::requirement::is_root;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use tempfile::TempDir;

/// A user and a group without names.
const STRANGER: u32 = 54_321;
/// Another one, whose host is tested.
const PLAIN: u32 = 54_322;

fn give(path: &Path, user: u32) {
    chown(path, Some(user), None).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Expects that `check` and `serve` fail, each with all of `words`.
#[track_caller]
fn assert_refused(cwd: &ScratchCwd, words: &[&str]) {
    for command in ["check", "serve"] {
        let ran = host::run(cwd, &[command]).unwrap();
        assert_eq!(ran.code, Some(2), "{ran:?}");
        let output = format!("{}{}", ran.stdout, ran.stderr);
        for word in words {
            assert!(output.contains(word), "{word:?} is not in: {output}");
        }
    }
}

#[track_caller]
fn assert_accepted(cwd: &ScratchCwd) {
    let ran = host::run(cwd, &["-v", "check"]).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

/// Returns the words of a refusal of a path for its owner.
fn words_of(path: &Path) -> [String; 2] {
    let path = path.display();
    [format!("{path} belongs to the user 54321, who is neither root nor"), format!("`chown -h root {path}`")]
}

#[track_caller]
fn assert_refused_for_owner(cwd: &ScratchCwd, path: &Path) {
    let path = path.canonicalize().unwrap();
    let words = words_of(&path);
    assert_refused(cwd, &words.each_ref().map(String::as_str));
}

#[test]
fn configuration_is_refused_when_another_user_owns_it() {
    if !is_root() {
        return;
    }
    for place in [
        "conf/cuckoo.yaml",
        "conf/machinery-host.yaml",
        "conf/machineries/double.yaml",
        "conf/machineries",
        "conf",
        ".",
    ] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        cwd.host_yaml("max_parallel_restores: 2\n").unwrap();
        assert_accepted(&cwd);
        let path = cwd.root().join(place);
        give(&path, STRANGER);
        assert_refused_for_owner(&cwd, &path);
        // The advised command solves the problem.
        give(&path, 0);
        assert_accepted(&cwd);
    }
}

#[test]
fn configuration_is_refused_when_others_can_write_to_it_or_replace_its_target() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let path = cwd.root().canonicalize().unwrap().join("conf/machineries/double.yaml");
    set_mode(&path, 0o666);
    let advice = format!("`chmod o-w {}`", path.display());
    assert_refused(&cwd, &["refusing to use", "everybody can write to", &advice]);
    set_mode(&path, 0o644);
    let open = cwd.root().canonicalize().unwrap().join("open");
    fs::create_dir(&open).unwrap();
    fs::rename(&path, open.join("real.yaml")).unwrap();
    symlink(open.join("real.yaml"), &path).unwrap();
    assert_accepted(&cwd);
    set_mode(&open, 0o777);
    assert_refused(&cwd, &[&format!("everybody can write to {}", open.display())]);
}

#[test]
fn reload_keeps_the_old_configuration_when_the_new_one_is_not_trusted() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let served = host::RunningHost::start(&cwd).unwrap();
    cwd.write_yaml("double", &machinery_testkit::scratch::double(&[("m", ""), ("n", "")])).unwrap();
    set_mode(&cwd.root().join("conf/machineries/double.yaml"), 0o666);
    let ran = host::run(&cwd, &["reload"]).unwrap();
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("everybody can write to"), "{ran:?}");
    assert!(served.client().unwrap().machine("n").is_err());
    set_mode(&cwd.root().join("conf/machineries/double.yaml"), 0o644);
    assert_eq!(host::run(&cwd, &["reload"]).unwrap().code, Some(0));
    served.client().unwrap().machine("n").unwrap();
}

#[test]
fn tcpdump_is_refused_when_another_user_owns_it() {
    if !is_root() {
        return;
    }
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let tcpdump = cwd.script("own-tcpdump", "exit 1").unwrap();
    cwd.capture_with(&tcpdump).unwrap();
    assert_accepted(&cwd);
    give(&tcpdump, STRANGER);
    assert_refused_for_owner(&cwd, &tcpdump);
    assert_refused(&cwd, &["tcpdump.path: refusing to use"]);
}

fn lab() -> Lab {
    Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain), ("n", Guest::Micro, SnapshotFormat::Plain)])
        .unwrap()
}

#[test]
fn foreign_program_never_runs_when_the_host_is_root() {
    if !is_root() {
        return;
    }
    let lab = lab();
    // The fake programs write a file, which no jail allows.
    lab.set_jail("off").unwrap();
    let (folder, programs) =
        (lab.cwd().root().to_owned(), [lab.qemu().img.clone(), lab.qemu().system.clone()]);
    for (index, real) in programs.iter().enumerate() {
        let ran = folder.join("ran");
        let script = format!("touch {}; exec {} \"$@\"", ran.display(), real.display());
        let fake = lab.cwd().script(&format!("bin/fake-{index}"), &script).unwrap();
        lab.change_yaml(&format!(": {}\n", real.display()), &format!(": {}\n", fake.display())).unwrap();
        // The control: root's own program runs.
        assert_accepted(lab.cwd());
        fs::remove_file(&ran).unwrap();
        for path in [&fake, &folder.join("bin")] {
            give(path, STRANGER);
            assert_refused_for_owner(lab.cwd(), path);
            assert!(!ran.exists(), "{} has run", fake.display());
            give(path, 0);
        }
        lab.change_yaml(&fake.display().to_string(), &real.display().to_string()).unwrap();
    }
}

/// Expects that `check` fails for a path's owner, and that a host serves, with only the machine `m` disabled for it.
#[track_caller]
fn assert_unusable(lab: &Lab, path: &Path) {
    let words = words_of(&path.canonicalize().unwrap());
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let machine = client.machine("m").unwrap();
    let reason = machine["disabled_reason"].as_str().unwrap();
    for word in &words {
        assert!(check.stdout.contains(word) && reason.contains(word), "{word:?}: {reason}; {}", check.stdout);
    }
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], false);
    assert_eq!(client.act("restore_start", "n").unwrap()["success"], true);
    assert_eq!(client.act("stop", "n").unwrap()["success"], true);
}

#[test]
fn machine_is_disabled_when_another_user_owns_its_arguments_or_the_folder_of_its_overlay() {
    if !is_root() {
        return;
    }
    let lab = lab();
    let machine = lab.folder("m");
    for path in [&machine.machineinfo, &machine.dir] {
        give(path, STRANGER);
        assert_unusable(&lab, path);
        give(path, 0);
        assert_accepted(lab.cwd());
    }
}

#[test]
fn folders_of_the_machinery_are_refused_when_another_user_owns_them() {
    if !is_root() {
        return;
    }
    let lab = lab();
    let root = lab.cwd().root().canonicalize().unwrap();
    let folder = root.join("copies");
    fs::create_dir(&folder).unwrap();
    lab.change_yaml("disposable_copy_dir:", &format!("disposable_copy_dir: {}", folder.display())).unwrap();
    assert_accepted(lab.cwd());
    give(&folder, STRANGER);
    assert_refused_for_owner(lab.cwd(), &folder);
    assert_refused(lab.cwd(), &["disposable_copy_dir: refusing to use"]);
    give(&folder, 0);
    let templates = root.join("above/templates");
    fs::create_dir(root.join("above")).unwrap();
    lab.ahead(&format!("instant: auto, standby: off, instant_dir: {}", templates.display())).unwrap();
    assert_accepted(lab.cwd());
    // The folder does not exist yet, and this user could make it.
    give(&root.join("above"), STRANGER);
    assert_refused_for_owner(lab.cwd(), &root.join("above"));
}

#[test]
fn state_is_refused_when_another_user_could_replace_it_and_a_sticky_folder_prevents_that() {
    if !is_root() {
        return;
    }
    for place in ["operational/generated/machinery-host", "operational/generated", "operational"] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        fs::create_dir_all(cwd.root().join("operational/generated/machinery-host")).unwrap();
        assert_accepted(&cwd);
        give(&cwd.root().join(place), STRANGER);
        assert_refused_for_owner(&cwd, &cwd.root().join(place));
    }
    // Files that a host of another user has left.
    for file in ["machines.json", "double/state/m.run"] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        let file = cwd.root().join("operational/generated/machinery-host").join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "{}").unwrap();
        give(&file, STRANGER);
        assert_refused_for_owner(&cwd, &file);
    }
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let generated = cwd.root().join("operational/generated");
    fs::create_dir_all(&generated).unwrap();
    give(&generated, STRANGER);
    let checked = host::run(&cwd, &["-v", "check"]).unwrap();
    assert!(checked.stdout.contains("other users could replace what the host makes in"), "{checked:?}");
    assert_eq!(host::run(&cwd, &["serve"]).unwrap().code, Some(2));
    assert!(!generated.join("machinery-host").exists(), "it is made and then refused");
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    fs::create_dir_all(cwd.root().join("operational/generated/machinery-host")).unwrap();
    for shared in ["operational", "operational/generated"] {
        fs::set_permissions(cwd.root().join(shared), Permissions::from_mode(0o1777)).unwrap();
    }
    assert_accepted(&cwd);
}

#[test]
fn template_is_not_used_when_another_user_owns_its_folder() {
    if !is_root() {
        return;
    }
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    lab.ahead("instant: auto, standby: off").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
    assert_eq!(client.machine("m").unwrap()["ready"]["mode"], "instant");
    give(&lab.template("m"), STRANGER);
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    let [owner, _] = words_of(&lab.template("m"));
    let log = host.log();
    assert!(log.contains(&owner), "{log}");
}

#[test]
fn folder_of_save_images_is_refused_when_another_user_owns_it() {
    if !is_root() {
        return;
    }
    let lab = KvmLab::new(&[("m", Guest::Micro)]).unwrap();
    let folder = lab.cwd().root().canonicalize().unwrap().join("images");
    fs::create_dir(&folder).unwrap();
    let section =
        format!("machineries: {{kvm: {{instant: on, standby: off, instant_dir: {}}}}}\n", folder.display());
    lab.cwd().host_yaml(&section).unwrap();
    assert_accepted(lab.cwd());
    give(&folder, STRANGER);
    assert_refused_for_owner(lab.cwd(), &folder);
}

/// Copies the program and the plugin `double` to a folder that all users can read.
fn installed() -> TempDir {
    let bin = tempfile::Builder::new().prefix("machinery-bin.").tempdir().unwrap();
    set_mode(bin.path(), 0o755);
    fs::copy(artifacts::program().unwrap(), bin.path().join("cuckoo-machinery")).unwrap();
    bin
}

/// A CWD of the plain user, and the program.
struct PlainHost {
    bin: TempDir,
    cwd: ScratchCwd,
    plugin: PathBuf,
}

impl PlainHost {
    fn new() -> PlainHost {
        let (bin, cwd) = (installed(), ScratchCwd::double(&[("m", "")]).unwrap());
        let plugin = cwd.install_plugin("double").unwrap();
        let above = cwd.root().parent().unwrap().to_owned();
        set_mode(&above, 0o755);
        let mut all = vec![above];
        while let Some(path) = all.pop() {
            give(&path, PLAIN);
            if path.is_dir() {
                all.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        }
        PlainHost { bin, cwd, plugin }
    }

    /// Runs `check` as the plain user, by these further commands.
    fn check(&self, by: &[&str]) -> CommandOutput {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={PLAIN}"), format!("--regid={PLAIN}"), "--clear-groups".into()]);
        command.args(by).arg(self.bin.path().join("cuckoo-machinery"));
        command.arg("--cwd").arg(self.cwd.root()).arg("check").current_dir("/");
        host::run_command(command).unwrap()
    }
}

#[test]
fn plain_users_host_trusts_files_of_that_user_and_root() {
    if !is_root() {
        return;
    }
    let plain = PlainHost::new();
    let yaml = plain.cwd.root().join("conf/machineries/double.yaml");
    for (owner, code) in [(PLAIN, 0), (0, 0), (STRANGER, 2)] {
        give(&yaml, owner);
        let ran = plain.check(&[]);
        assert_eq!(ran.code, Some(code), "{owner}: {ran:?}");
    }
}

#[test]
fn strangers_plugin_is_refused_when_the_user_namespace_has_no_root() {
    if !is_root() {
        return;
    }
    let plain = PlainHost::new();
    let namespace = ["unshare", "--map-current-user"];
    // The folders above belong to root, whom the namespace does not map.
    let ran = plain.check(&namespace);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for path in [&plain.plugin, plain.plugin.parent().unwrap()] {
        give(path, STRANGER);
        let ran = plain.check(&namespace);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        let output = format!("{}{}", ran.stdout, ran.stderr);
        let owner = format!("{} belongs to the user 65534", path.canonicalize().unwrap().display());
        for word in [owner.as_str(), "does not map", "run the host outside of the namespace"] {
            assert!(output.contains(word), "{word:?} is not in: {output}");
        }
        give(path, PLAIN);
    }
    // A configuration file may be root's, and is used with a warning.
    let yaml = plain.cwd.root().join("conf/machineries/double.yaml");
    give(&yaml, 0);
    let ran = plain.check(&namespace);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("using a file of an unknown owner"), "{ran:?}");
    // Root of such a namespace refuses it.
    let ran = plain.check(&["unshare", "--map-root-user"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
}
