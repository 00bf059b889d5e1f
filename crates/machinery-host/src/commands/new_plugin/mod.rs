//! `new-plugin`: creates the crate of a working plugin, which meets every requirement of the interface.
//!
//! The code is that of a plugin of this repository, file by file, with another name. So this repository tests it, and it
//! always matches the interface.

mod template;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

pub use template::Template;

/// The default source of the interface.
const REPOSITORY: &str = env!("CARGO_PKG_REPOSITORY");
/// The revision that this program was built from, as `tag = "…"` or `rev = "…"`. The build script has found it.
const REVISION: &str = env!("CUCKOO_MACHINERY_REVISION");
/// The interface's crates beside an installed program.
const INSTALLED: &str = "../share/cuckoo-machinery/source";
/// The configuration of cargo for a checkout that has the crates of the registry.
const VENDORED: &str = "\
# Builds without a network, from the crates that are installed with the interface. Remove this file to use crates.io,
# such as for a crate that is not among them.
[source.crates-io]
replace-with = \"installed\"

[source.installed]
directory = VENDOR
";
/// The names of machineries and crates of this repository.
const RESERVED_NAMES: [&str; 9] =
    ["qemu", "kvm", "example", "example-process", "backend", "conformance", "host", "images", "testkit"];

/// A crate that was written.
#[derive(Debug, Clone)]
pub struct NewPlugin {
    /// The folder of the crate.
    pub folder: PathBuf,
    /// The name of the library that the build makes.
    pub library: String,
}

/// Creates the crate `machinery-<name>` in `dir`. `interface` is the source of its dependencies: a checkout
/// of this repository, or the URL of a git repository. Of a repository, the crate gets the revision of this program.
/// The default is the installed interface, or else the repository.
///
/// # Errors
/// The name is invalid or reserved, the folder exists, or `interface` is no checkout. The folder is removed again.
pub fn new_plugin(template: &Template, name: &str, dir: &Path, interface: Option<&str>) -> Result<NewPlugin> {
    check_name(name)?;
    let interface = match interface {
        Some(given) => Interface::from(given)?,
        None => Interface::installed().unwrap_or_else(|| Interface::Git(REPOSITORY.to_owned())),
    };
    let dir = std::path::absolute(dir).map_err(|error| Error::io("find the folder", dir, &error))?;
    let folder = dir.join(format!("machinery-{name}"));
    create_folder(&folder)?;
    match write(template, name, &folder, &interface) {
        Ok(()) => Ok(NewPlugin { library: template.library(name), folder }),
        Err(error) => {
            // This call has created the folder. The first error matters more than a failure to remove it.
            let _ = fs::remove_dir_all(&folder);
            Err(error)
        }
    }
}

/// Expects a name for the `machineries` list that starts with a letter: it becomes the name of a type too.
fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    let wrong = |why: &str| Error::configuration(format!("'{name}' cannot be a new machinery's name: {why}"));
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(plain) {
        return Err(wrong("it is not a word of Cuckoo's machineries list")
            .advice("Use lowercase letters, digits, '-' and '_', a letter first"));
    }
    if RESERVED_NAMES.contains(&name) {
        return Err(wrong("cuckoo-machinery has one of that name").advice("Choose another name"));
    }
    Ok(())
}

/// The source of the interface's crates.
enum Interface {
    Git(String),
    Checkout(String),
}

impl Interface {
    fn from(given: &str) -> Result<Interface> {
        if given.contains("://") {
            return Ok(Interface::Git(given.to_owned()));
        }
        Interface::checkout(Path::new(given)).ok_or_else(|| {
            Error::configuration(format!("{given} is no checkout of cuckoo-machinery")).advice(
                "Give the folder that has crates/machinery in it, or the URL of a git repository, such as \
                 https://… or ssh://git@…",
            )
        })
    }

    /// Returns the interface that is installed with this program, if it is.
    fn installed() -> Option<Interface> {
        let program = std::env::current_exe().ok()?;
        Interface::checkout(&program.parent()?.join(INSTALLED))
    }

    fn checkout(root: &Path) -> Option<Interface> {
        let root =
            root.canonicalize().ok().filter(|root| root.join("crates/machinery/Cargo.toml").is_file())?;
        // The manifest is text, so the path must be text.
        root.to_str().map(|root| Interface::Checkout(root.to_owned()))
    }

    /// Returns cargo's configuration for the crate, if the checkout has the crates of the registry.
    fn cargo_config(&self) -> Option<String> {
        let Interface::Checkout(root) = self else { return None };
        let vendor = Path::new(root).join("vendor");
        vendor.is_dir().then(|| VENDORED.replace("VENDOR", &quoted(&vendor.to_string_lossy())))
    }

    /// Returns the manifest with the source of each crate of the interface.
    fn fill(&self, manifest: &str) -> String {
        let line = |line: &str| match line.split_once(" = { INTERFACE }") {
            Some((name, _)) => format!("{name} = {{ {} }}\n", self.source(name)),
            None => format!("{line}\n"),
        };
        manifest.lines().map(line).collect()
    }

    fn source(&self, name: &str) -> String {
        match self {
            Interface::Git(url) => format!("git = {}, {REVISION}", quoted(url)),
            Interface::Checkout(root) => format!("path = {}", quoted(&format!("{root}/crates/{name}"))),
        }
    }
}

/// Returns the text as a TOML string, which looks like a JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn create_folder(folder: &Path) -> Result<()> {
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above).map_err(|error| Error::io("make the folder", above, &error))?;
    }
    fs::create_dir(folder).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => {
            Error::configuration(format!("{} is there already, and is left as it is", folder.display()))
                .advice("Choose another name, give another folder with --dir, or remove this one")
        }
        _ => Error::io("make the folder", folder, &error),
    })
}

fn write(template: &Template, name: &str, folder: &Path, interface: &Interface) -> Result<()> {
    let manifest = interface.fill(&template.renamed(template.manifest, name));
    let config = interface.cargo_config().map(|config| (".cargo/config.toml".to_owned(), config));
    let others = [("Cargo.toml".to_owned(), manifest)].into_iter().chain(config);
    for (path, text) in template.renamed_files(name).chain(others) {
        let path = folder.join(path);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all);
        let written = written.and_then(|()| fs::write(&path, text));
        written.map_err(|error| Error::io("write", &path, &error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

    fn error(name: &str, dir: &Path, interface: Option<&str>) -> String {
        let error = new_plugin(&Template::MEMORY, name, dir, interface).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::Configuration, "{error}");
        error.to_string()
    }

    fn read(folder: &Path, file: &str) -> String {
        fs::read_to_string(folder.join(file)).unwrap()
    }

    #[test]
    fn new_plugin_has_the_new_name_everywhere() {
        let dir = tempfile::tempdir().unwrap();
        let name = "my-counterexample_2";
        let new = new_plugin(&Template::MEMORY, name, &dir.path().join("new"), Some(HERE)).unwrap();
        assert_eq!(new.library, "libmachinery_my_counterexample_2.so");
        assert!(new.folder.ends_with("new/machinery-my-counterexample_2"));
        let lib = read(&new.folder, "src/lib.rs");
        assert!(lib.contains("export_machinery!(Adapter<shared::MyCounterexample2>)"), "{lib}");
        let adapter = read(&new.folder, "src/adapter.rs");
        assert!(adapter.contains(r#"NAME: &'static str = "my-counterexample_2""#), "{adapter}");
        assert!(read(&new.folder, "README.md").contains("release/libmachinery_my_counterexample_2.so"));
        assert!(read(&new.folder, "my-counterexample_2.yaml").contains("  my-counterexample_2_1:"));
        let manifest = read(&new.folder, "Cargo.toml");
        assert!(manifest.contains(r#"name = "machinery-my-counterexample_2""#), "{manifest}");
        assert!(manifest.contains("/crates/machinery-backend\" }"), "{manifest}");
    }

    #[test]
    fn new_plugin_of_processes_has_the_new_name_everywhere() {
        let dir = tempfile::tempdir().unwrap();
        let new = new_plugin(&Template::PROCESS, "my-xen", dir.path(), Some(HERE)).unwrap();
        assert_eq!(new.library, "libmachinery_my_xen.so");
        let files = ["src/lib.rs", "src/adapter.rs", "guest/main.rs", "tests/conformance.rs", "my-xen.yaml"];
        for file in files.into_iter().chain(["README.md", "Cargo.toml"]) {
            let text = read(&new.folder, file);
            let lower = text.to_lowercase();
            assert!(!lower.replace("for example", "").contains("example"), "{text}");
        }
        let lib = read(&new.folder, "src/lib.rs");
        assert!(lib.contains("export_machinery!(Adapter<shared::MyXen>)"), "{lib}");
        assert!(read(&new.folder, "Cargo.toml").contains(r#"name = "my-xen-guest""#));
        assert!(read(&new.folder, "README.md").contains("release/libmachinery_my_xen.so"));
    }

    #[test]
    fn interface_comes_from_the_revision_of_this_program() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = |name: &str, interface| {
            read(&new_plugin(&Template::MEMORY, name, dir.path(), interface).unwrap().folder, "Cargo.toml")
        };
        let (kind, revision) = REVISION.split_once(" = ").unwrap();
        assert!(
            ["tag", "rev"].contains(&kind) && revision.starts_with('"') && revision.len() > 5,
            "{REVISION}"
        );
        let own = manifest("own", None);
        assert!(own.contains(&format!("machinery = {{ git = \"{REPOSITORY}\", {REVISION} }}")), "{own}");
        let other = manifest("other", Some("https://forge/example.git"));
        let expected =
            format!(r#"machinery-conformance = {{ git = "https://forge/example.git", {REVISION} }}"#);
        assert!(other.contains(&expected), "{other}");
    }

    #[test]
    fn new_plugin_builds_without_a_network_when_the_interface_has_its_crates() {
        let dir = tempfile::tempdir().unwrap();
        let interface = dir.path().join("interface");
        fs::create_dir_all(interface.join("crates/machinery")).unwrap();
        fs::write(interface.join("crates/machinery/Cargo.toml"), "").unwrap();
        let config = |name: &str| {
            let new = new_plugin(&Template::MEMORY, name, dir.path(), interface.to_str()).unwrap();
            fs::read_to_string(new.folder.join(".cargo/config.toml")).ok()
        };
        assert_eq!(config("online"), None);
        fs::create_dir(interface.join("vendor")).unwrap();
        let vendor = interface.canonicalize().unwrap().join("vendor");
        let config = config("offline").unwrap();
        assert!(config.contains(&format!("directory = \"{}\"\n", vendor.display())), "{config}");
    }

    #[test]
    fn new_plugin_leaves_no_folder_when_an_argument_is_invalid() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "Xen", "../xen", "9p", "-x", "x y", "xën"] {
            let text = error(name, dir.path(), None);
            assert!(text.contains(&format!("'{name}' cannot")) && text.contains("lowercase"), "{text}");
        }
        for name in RESERVED_NAMES {
            assert!(error(name, dir.path(), None).contains("has one of that name"));
        }
        for interface in
            ["/none/such", "git@forge:machinery.git", concat!(env!("CARGO_MANIFEST_DIR"), "/src")]
        {
            let text = error("xen", dir.path(), Some(interface));
            assert!(text.contains(&format!("{interface} is no checkout")), "{text}");
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn existing_folder_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("machinery-xen");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("work"), "of weeks").unwrap();
        assert!(error("xen", dir.path(), None).contains("is there already"));
        assert_eq!(read(&folder, "work"), "of weeks");
        assert_eq!(folder.read_dir().unwrap().count(), 1);
    }
}
