//! Trust in plugins: the host checks owner, mode and hash of a plugin before it runs its code. Only root can
//! give files to others; plain users may skip those tests.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::mem::MaybeUninit;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::requirement::is_root;
use machinery_testkit::scratch::ScratchCwd;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A user and a group without names.
const STRANGER: u32 = 54_321;
const INSECURE: &str = "--allow-insecure-plugins";

/// Creates a CWD with the plugin `double` in its own plugin folder.
fn cwd_with_plugin() -> (ScratchCwd, PathBuf) {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let plugin = cwd.install_plugin("double").unwrap();
    (cwd, plugin)
}

/// Returns `cuckoo-machinery` for the CWD, which searches the CWD's plugin folder before the build folder.
fn command(cwd: &ScratchCwd, arguments: &[&str]) -> Command {
    let mut command = Command::new(artifacts::program().unwrap());
    command.env_remove("CUCKOO_MACHINERY_PLUGINS").arg("--cwd").arg(cwd.root()).args(arguments);
    command
}

fn run(cwd: &ScratchCwd, arguments: &[&str]) -> CommandOutput {
    host::run_command(command(cwd, arguments)).unwrap()
}

fn start(cwd: &ScratchCwd, arguments: &[&str]) -> RunningHost {
    RunningHost::start_with(cwd, |built| *built = command(cwd, &[arguments, &["serve"]].concat())).unwrap()
}

/// Returns the output of `plugins` for the listed plugin.
fn listed_plugin(cwd: &ScratchCwd, arguments: &[&str]) -> Value {
    let ran = run(cwd, &[arguments, &["plugins", "--json"]].concat());
    let plugins: Value = serde_json::from_str(&ran.stdout).unwrap();
    plugins["listed"][0].clone()
}

/// Asserts that `serve`, `check` and `plugins` fail, each with all of `words`.
#[track_caller]
fn assert_refused(cwd: &ScratchCwd, words: &[&str]) -> String {
    let serve = run(cwd, &["serve"]);
    let reported = [&serve, &run(cwd, &["-v", "check"]), &run(cwd, &["plugins"])];
    for ran in reported {
        assert_eq!(ran.code, Some(2), "{ran:?}");
        for word in words {
            let output = format!("{}{}", ran.stdout, ran.stderr);
            assert!(output.contains(word), "{word:?} is not in: {output}");
        }
    }
    let errors = serve.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", serve.stderr);
    assert!(!cwd.socket().exists());
    serve.stderr
}

#[track_caller]
fn assert_serves(cwd: &ScratchCwd) {
    assert!(start(cwd, &[]).terminate().unwrap().success());
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn plugin_is_refused_when_its_path_is_world_writable() {
    for place in ["machineries/libmachinery_double.so", "machineries"] {
        let (cwd, _) = cwd_with_plugin();
        let path = cwd.root().join(place).canonicalize().unwrap();
        set_mode(&path, 0o777);
        let what = format!("everybody can write to {}, mode 0777", path.display());
        let advice = format!("`chmod o-w {}`", path.display());
        assert_refused(&cwd, &["libmachinery_double.so", &what, &advice, INSECURE]);
        // The advised command solves the problem.
        set_mode(&path, 0o755);
        assert_serves(&cwd);
    }
}

#[test]
fn plugin_is_refused_when_another_group_can_write_to_its_folder() {
    if !is_root() {
        return;
    }
    let (cwd, plugin) = cwd_with_plugin();
    let folder = plugin.parent().unwrap();
    chown(folder, None, Some(STRANGER)).unwrap();
    set_mode(folder, 0o775);
    let advice = format!("`chmod g-w {}`", folder.display());
    assert_refused(&cwd, &["the group 54321 can write to", &advice]);
    // Root's group is trusted like root.
    chown(folder, None, Some(0)).unwrap();
    assert_serves(&cwd);
}

#[test]
fn plugin_is_refused_when_another_user_owns_its_path() {
    if !is_root() {
        return;
    }
    for place in ["machineries/libmachinery_double.so", "machineries"] {
        let (cwd, _) = cwd_with_plugin();
        let path = cwd.root().join(place).canonicalize().unwrap();
        chown(&path, Some(STRANGER), None).unwrap();
        let what = format!("{} belongs to the user 54321, who is neither root nor", path.display());
        assert_refused(&cwd, &[&what, "`chown -h root"]);
    }
}

#[test]
fn plain_users_host_trusts_plugins_of_that_user_and_root() {
    if !is_root() {
        return;
    }
    let (cwd, plugin) = cwd_with_plugin();
    set_mode(cwd.root().parent().unwrap(), 0o755);
    let bin = installed();
    let opened = |folder_of: u32, file_of: u32| {
        for path in [cwd.root(), cwd.root().parent().unwrap(), plugin.parent().unwrap()] {
            chown(path, Some(folder_of), None).unwrap();
        }
        chown(&plugin, Some(file_of), None).unwrap();
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={STRANGER}"), format!("--regid={STRANGER}"), "--clear-groups".into()]);
        command.arg(bin.path().join("cuckoo-machinery")).arg("--cwd").arg(cwd.root()).arg("plugins");
        command.current_dir("/");
        let ran = host::run_command(command).unwrap();
        (ran.code, ran.stderr)
    };
    for (folder_of, file_of) in [(STRANGER, STRANGER), (STRANGER, 0), (0, STRANGER), (0, 0)] {
        assert_eq!(opened(folder_of, file_of).0, Some(0));
    }
    for (folder_of, file_of) in [(STRANGER, 1), (1, STRANGER), (1, 0)] {
        let (code, output) = opened(folder_of, file_of);
        assert_eq!(code, Some(2), "{output}");
        assert!(output.contains("belongs to the user 1,"), "{output}");
    }
}

/// Copies the program to a folder that all users can read.
fn installed() -> TempDir {
    let bin = tempfile::Builder::new().prefix("machinery-bin.").tempdir().unwrap();
    set_mode(bin.path(), 0o755);
    fs::copy(artifacts::program().unwrap(), bin.path().join("cuckoo-machinery")).unwrap();
    bin
}

#[test]
fn sticky_folder_is_trusted_only_when_it_does_not_hold_the_plugin() {
    let (cwd, plugin) = cwd_with_plugin();
    set_mode(cwd.root(), 0o1777);
    assert_serves(&cwd);
    set_mode(plugin.parent().unwrap(), 0o1777);
    let text = assert_refused(&cwd, &["everybody can write to", "use a folder of its own"]);
    assert!(!text.contains("chmod"), "{text}");
}

#[test]
fn serve_reports_all_untrusted_plugins_together() {
    let (cwd, plugin) = cwd_with_plugin();
    let next = cwd.install_plugin("minimal").unwrap();
    cwd.list_machineries(&["double", "minimal", "quantum"]).unwrap();
    let folder = plugin.parent().unwrap().to_owned();
    for path in [&plugin, &next, &folder] {
        set_mode(path, 0o777);
    }
    let serve = run(&cwd, &["serve"]);
    assert_eq!(serve.code, Some(2), "{serve:?}");
    assert!(serve.stderr.contains("3 problems"), "{}", serve.stderr);
    for word in ["'quantum'", plugin.to_str().unwrap(), next.to_str().unwrap()] {
        assert!(serve.stderr.contains(word), "{word:?} is not in: {}", serve.stderr);
    }
    let of_the_folder = format!("everybody can write to {},", folder.display());
    assert_eq!(serve.stderr.matches(&of_the_folder).count(), 2, "{}", serve.stderr);
}

/// Replaces the CWD's plugin by a link to `shelf/libmachinery_double-1.2.so`, and returns that file.
fn shelve(cwd: &ScratchCwd, plugin: &Path) -> PathBuf {
    let shelf = cwd.root().join("shelf");
    fs::create_dir(&shelf).unwrap();
    let file = shelf.join("libmachinery_double-1.2.so");
    fs::rename(plugin, &file).unwrap();
    symlink("../shelf/libmachinery_double-1.2.so", plugin).unwrap();
    file
}

#[test]
fn plugins_shows_the_target_when_a_plugin_is_a_link() {
    let (cwd, plugin) = cwd_with_plugin();
    let file = shelve(&cwd, &plugin);
    assert_eq!(listed_plugin(&cwd, &[])["path"], file.to_str().unwrap());
    let host = start(&cwd, &[]);
    let maps = fs::read_to_string(format!("/proc/{}/maps", host.pid())).unwrap();
    assert!(maps.contains(file.to_str().unwrap()), "{maps}");
}

#[test]
fn plugin_is_refused_when_either_end_of_its_link_is_writable() {
    for place in ["machineries", "shelf", "shelf/libmachinery_double-1.2.so"] {
        let (cwd, plugin) = cwd_with_plugin();
        shelve(&cwd, &plugin);
        let path = cwd.root().join(place);
        set_mode(&path, 0o777);
        assert_refused(&cwd, &[&format!("everybody can write to {},", path.display())]);
    }
}

#[test]
fn plugin_is_refused_when_its_link_has_a_new_untrusted_target() {
    let (cwd, plugin) = cwd_with_plugin();
    shelve(&cwd, &plugin);
    assert_serves(&cwd);
    let open = cwd.root().join("open");
    fs::create_dir(&open).unwrap();
    fs::copy(artifacts::plugin("double").unwrap(), open.join("other.so")).unwrap();
    set_mode(&open, 0o777);
    fs::remove_file(&plugin).unwrap();
    symlink(open.join("other.so"), &plugin).unwrap();
    assert_refused(&cwd, &[&format!("everybody can write to {},", open.display())]);
}

#[test]
fn plugin_is_refused_when_a_link_to_its_folder_is_replaceable() {
    let (cwd, plugin) = cwd_with_plugin();
    let (real, way) = (plugin.parent().unwrap(), cwd.root().join("way"));
    fs::create_dir(&way).unwrap();
    symlink(real, way.join("plugins")).unwrap();
    let given = way.join("plugins");
    let dir = ["--plugin-dir", given.to_str().unwrap()];
    assert_eq!(listed_plugin(&cwd, &dir)["path"], plugin.to_str().unwrap());
    set_mode(&way, 0o777);
    let refused = listed_plugin(&cwd, &dir)["error"].as_str().unwrap().to_owned();
    assert!(refused.contains(&format!("everybody can write to {},", way.display())), "{refused}");
    // In a sticky folder only the owner can replace the link.
    set_mode(&way, 0o1777);
    assert_eq!(listed_plugin(&cwd, &dir)["path"], plugin.to_str().unwrap());
    if is_root() {
        std::os::unix::fs::lchown(&given, Some(STRANGER), None).unwrap();
        let listed = listed_plugin(&cwd, &dir);
        // A kernel that protects links does not follow this one, so there is no such folder. Source: proc_sys_fs(5).
        let protects = fs::read_to_string("/proc/sys/fs/protected_symlinks").unwrap_or_default();
        let refused = listed["error"].as_str().unwrap_or_default();
        let expected = format!("{} belongs to the user 54321", given.display());
        assert_eq!(refused.contains(&expected), protects.trim() == "0", "{listed}");
    }
}

#[test]
fn untrusted_plugin_is_loaded_with_a_warning_when_insecure_plugins_are_allowed() {
    let (cwd, plugin) = cwd_with_plugin();
    set_mode(&plugin, 0o777);
    let host = start(&cwd, &[INSECURE]);
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap(), json!({"success": true}));
    let log = host.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    for word in ["machinery=\"double\"", plugin.to_str().unwrap(), "everybody can write to"] {
        assert!(warnings[0].contains(word), "{word:?} is not in: {}", warnings[0]);
    }
    for command in ["check", "plugins"] {
        let ran = run(&cwd, &[INSECURE, command]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stderr.contains("everybody can write to"), "{ran:?}");
    }
    // A trusted plugin causes no warning.
    set_mode(&plugin, 0o755);
    let ran = run(&cwd, &[INSECURE, "plugins"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
}

#[test]
fn pipe_is_refused_without_blocking_when_a_plugin_is_expected() {
    let (cwd, plugin) = cwd_with_plugin();
    fs::remove_file(&plugin).unwrap();
    mknodat(CWD, &plugin, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert_refused(&cwd, &[plugin.to_str().unwrap(), "no regular file"]);
    assert_eq!(run(&cwd, &[INSECURE, "serve"]).code, Some(2));
}

#[test]
fn host_opens_no_plugin_that_is_unlisted_or_untrusted() {
    let (cwd, listed) = cwd_with_plugin();
    let unlisted = cwd.install_plugin("minimal").unwrap();
    let opened = |command: &str, code: i32| {
        let watch = inotify::init(CreateFlags::NONBLOCK).unwrap();
        let of_listed = inotify::add_watch(&watch, &listed, WatchFlags::OPEN).unwrap();
        let of_unlisted = inotify::add_watch(&watch, &unlisted, WatchFlags::OPEN).unwrap();
        let ran = run(&cwd, &[command]);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = events.next() {
            seen.push(event.wd());
        }
        (seen.contains(&of_listed), seen.contains(&of_unlisted))
    };
    for command in ["plugins", "check"] {
        assert_eq!(opened(command, 0), (true, false), "{command}");
    }
    set_mode(&listed, 0o777);
    for command in ["plugins", "check", "serve"] {
        assert_eq!(opened(command, 2), (false, false), "{command}");
    }
}

#[test]
fn plugins_shows_hashes_of_listed_plugins_only() {
    let (cwd, plugin) = cwd_with_plugin();
    let hash = sha256sum(&plugin);
    let unlisted = cwd.install_plugin("minimal").unwrap();
    let text = run(&cwd, &["plugins"]).stdout;
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
    for word in [env!("CARGO_PKG_VERSION"), &hash, plugin.to_str().unwrap()] {
        assert!(line("double ").contains(word), "{word:?} is not in: {text}");
    }
    assert!(line("minimal").contains(unlisted.to_str().unwrap()), "{text}");
    assert!(!text.contains(&sha256sum(&unlisted)), "{text}");

    let double = listed_plugin(&cwd, &[]);
    assert_eq!(double["sha256"], hash);
    for key in ["name", "version", "interface", "license", "path"] {
        assert!(double[key].is_string(), "{double}");
    }
    assert!(run(&cwd, &["-v", "check"]).stdout.contains(&hash));
    let log = start(&cwd, &[]).log();
    let loaded = log.lines().find(|line| line.contains("machinery loaded")).unwrap();
    assert!(loaded.contains(&format!("sha256={hash}")), "{loaded}");

    set_mode(&plugin, 0o777);
    let refused = listed_plugin(&cwd, &[]);
    assert!(refused["error"].as_str().unwrap().contains("everybody can write to"), "{refused}");
    assert_eq!(refused["sha256"], Value::Null);
    assert!(!run(&cwd, &["plugins"]).stderr.contains(&hash));
}

fn sha256sum(file: &Path) -> String {
    let mut command = Command::new("sha256sum");
    command.arg(file);
    let reported = host::run_command(command).unwrap();
    reported.stdout.split_whitespace().next().unwrap().to_owned()
}

/// The hash of an empty file.
const ANOTHER: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn plugin_is_refused_when_its_hash_is_not_listed() {
    let (cwd, plugin) = cwd_with_plugin();
    let hash = format!("sha256:{}", sha256sum(&plugin));
    let yaml = cwd.root().join("conf/machinery-host.yaml").display().to_string();
    let line = format!("write `double: \"{hash}\"` under `plugin_hashes`");
    for (list, place, listed) in [
        (format!("{{double: '{ANOTHER}'}}"), ":1: plugin_hashes.double: ", ANOTHER),
        (format!("{{other: '{hash}'}}"), ":1: plugin_hashes.double: ", "no hash"),
        ("{double: []}".to_owned(), ":1: plugin_hashes.double: ", "no hash"),
        (String::new(), "plugin_hashes.double: ", "no hash"),
    ] {
        cwd.host_yaml(&format!("plugin_hashes: {list}\n")).unwrap();
        let listed = format!("listed for it is {listed}");
        let its = format!("its hash is {hash}");
        assert_refused(&cwd, &[&yaml, place, plugin.to_str().unwrap(), &its, &listed, &line]);
        // The option for insecure plugins does not disable hashes.
        assert_eq!(run(&cwd, &[INSECURE, "serve"]).code, Some(2));
    }
    // The advised line, and two hashes during an upgrade.
    for list in [format!("{{double: \"{hash}\"}}"), format!("{{double: ['{ANOTHER}', '{hash}']}}")] {
        cwd.host_yaml(&format!("plugin_hashes: {list}\n")).unwrap();
        assert_serves(&cwd);
    }
}

#[test]
fn plugin_is_refused_when_its_content_has_changed() {
    let (cwd, plugin) = cwd_with_plugin();
    let hash = format!("sha256:{}", sha256sum(&plugin));
    cwd.host_yaml(&format!("plugin_hashes: {{double: '{hash}'}}\n")).unwrap();
    let mut changed = fs::read(&plugin).unwrap();
    changed.push(0);
    fs::write(&plugin, changed).unwrap();
    assert_refused(&cwd, &[&sha256sum(&plugin), &hash]);
}

#[test]
fn configuration_is_refused_when_a_hash_is_malformed() {
    let (cwd, _) = cwd_with_plugin();
    let yaml = cwd.root().join("conf/machinery-host.yaml").display().to_string();
    for wrong in ["sha256:12", "e3b0c442", "[md5:d41d8cd98f00b204e9800998ecf8427e]"] {
        cwd.host_yaml(&format!("# Ours\nplugin_hashes:\n  double: {wrong}\n")).unwrap();
        let place = format!("{yaml}:3: plugin_hashes.double: ");
        for command in ["serve", "check", "plugins"] {
            let ran = run(&cwd, &[command]);
            assert_eq!(ran.code, Some(2), "{ran:?}");
            let output = format!("{}{}", ran.stdout, ran.stderr);
            for word in [&place, "is not the hash of a plugin", "64 hexadecimal digits"] {
                assert!(output.contains(word), "{word:?} is not in: {output}");
            }
        }
    }
}
