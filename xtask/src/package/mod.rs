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
mod files;
mod interface;
mod licences;
mod lifecycle;
pub mod needs;
mod newer;
mod release;
mod tarball;
mod tree;
mod wall;
mod wheel;

use std::path::PathBuf;

use self::files::{make_folder, scratch_in};
use self::release::{PLUGINS, Release};
use crate::run::{Context, Result};
use crate::{fresh, install};

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
    /// The release of Debian to test on
    #[arg(long, value_enum, default_value = "bookworm", requires = "test")]
    debian: fresh::Release,
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
    release.expect_built(&built)?;
    let scratch = scratch_in(&out)?;
    let tree = scratch.path().join("tree");
    tree::fill(&tree, &built)?;
    let mut made = vec![wheel::make(&release, &out)?, tarball::make(&release, &tree, &out)?];
    made.extend(debian::make(&release, &tree, &out)?);
    eprintln!();
    made.iter().for_each(|path| println!("{}", path.display()));
    if options.test { lifecycle::run(&made, &out, options.debian) } else { Ok(()) }
}
