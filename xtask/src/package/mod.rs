//! `cargo xtask package`: packages for Debian, a wheel for Cuckoo3's environment, and a tarball for other
//! distributions.
//!
//! ```text
//! release build ─▶ tree of a prefix ─┬─▶ cuckoo-machinery_….deb, cuckoo-machinery-kvm_….deb, cuckoo-machinery-dev_….deb
//!                                    └─▶ cuckoo-machinery-….tar.gz
//! integrations/cuckoo3 ────────────────▶ cuckoo_machinery-….whl
//! ```
//!
//! The tree is that of `cargo xtask install` with the units, the documentation, and the interface for authors. The
//! packages run on the release of Debian that they were made on, and on later ones. The same build and commit give the
//! same files: each date is that of the commit.

mod debian;
mod interface;
mod licences;
mod lifecycle;
pub mod needs;
mod newer;
mod tarball;
mod tree;
mod wheel;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install::{self, Plugin};
use crate::run::{CHECKOUT, Context, Result, output, step};

/// The plugins in packages.
const PLUGINS: [Plugin; 2] = [Plugin::Qemu, Plugin::Kvm];

/// Options of `cargo xtask package`.
#[derive(clap::Args)]
pub struct Options {
    /// Write the packages into this folder [default: packages/ in the build's folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Package the results of an earlier release build in this folder, instead of building
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Check the packages by lintian, and install, upgrade and remove them on a fresh Debian; needs root
    #[arg(long)]
    test: bool,
}

/// The version and the date of all packages.
struct Release {
    version: String,
    /// The time of the commit, in seconds since 1970.
    epoch: String,
}

/// Makes the packages, and tests them if asked to.
pub fn run(options: &Options) -> Result<()> {
    needs::ensure()?;
    let out = match &options.out {
        Some(out) => out.clone(),
        None => install::target()?.join("packages"),
    };
    let out = std::path::absolute(out).context(|| "the folder of the packages".to_owned())?;
    make_folder(&out)?;
    let built = match &options.from {
        Some(built) => built.clone(),
        None => install::build(&PLUGINS)?,
    };
    let release = Release::of_checkout()?;
    let scratch = scratch_in(&out)?;
    let tree = scratch.path().join("tree");
    tree::fill(&tree, &built)?;
    let mut made = vec![wheel::make(&release, &out)?, tarball::make(&release, &tree, &out)?];
    made.extend(debian::make(&release, &tree, &out)?);
    eprintln!();
    made.iter().for_each(|path| println!("{}", path.display()));
    if options.test { lifecycle::run(&made, &out) } else { Ok(()) }
}

impl Release {
    fn of_checkout() -> Result<Release> {
        let time = output(Command::new("git").args(["-C", CHECKOUT, "log", "-1", "--format=%ct"]))?;
        Ok(Release { version: env!("CARGO_PKG_VERSION").to_owned(), epoch: time.trim().to_owned() })
    }

    /// Gives a command the date of the release.
    fn date<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("SOURCE_DATE_EPOCH", &self.epoch)
    }
}

/// Makes a folder on the file system of the packages.
fn scratch_in(out: &Path) -> Result<tempfile::TempDir> {
    tempfile::tempdir_in(out).context(|| format!("cannot make a folder in {}", out.display()))
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))
}

/// Copies a file of the checkout or of the build, and makes its folder.
fn copy(from: &Path, to: &Path) -> Result<()> {
    make_folder(to.parent().unwrap_or(to))?;
    fs::copy(from, to).map(drop).context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Writes a file, and makes its folder.
fn write(path: &Path, text: &str) -> Result<()> {
    make_folder(path.parent().unwrap_or(path))?;
    fs::write(path, text).context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))
}

/// Removes the files in `folder` whose names match: those of earlier packages, whose versions may differ.
fn remove_earlier(folder: &Path, matches: impl Fn(&str) -> bool) -> Result<()> {
    let what = || format!("cannot tidy {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        if entry.file_name().to_str().is_some_and(&matches) {
            fs::remove_file(entry.path()).context(what)?;
        }
    }
    Ok(())
}

/// Makes all files below a folder readable by everybody, and programs executable, whatever the umask and the checkout.
fn set_modes(folder: &Path) -> Result<()> {
    step(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(folder))
}
