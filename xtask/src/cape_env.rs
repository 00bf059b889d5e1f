//! `cargo xtask cape-env DIR`: makes the Python environment of the tests with CAPE.
//!
//! CAPE's own list of packages needs compilers and takes long. Its main process needs a few of them only.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{CHECKOUT, Context, Result, step};
use crate::system_packages;

/// The list of packages, within the checkout.
const REQUIREMENTS: &str = "integrations/cape/tests/requirements.txt";

/// Options of `cargo xtask cape-env`.
#[derive(clap::Args)]
pub struct Options {
    /// Folder of the new environment
    dir: PathBuf,
    /// The Python to make it with: 3.10 or later
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    python: PathBuf,
}

/// Makes the environment, or completes it.
pub fn run(options: &Options) -> Result<()> {
    system_packages::ensure_for_cape()?;
    let folder = std::path::absolute(&options.dir).context(|| "the folder of the environment".to_owned())?;
    let python = folder.join("bin/python");
    step(Command::new(&options.python).args(["-m", "venv"]).arg(&folder))?;
    let requirements = Path::new(CHECKOUT).join(REQUIREMENTS);
    step(Command::new(&python).args(["-m", "pip", "install", "--requirement"]).arg(requirements))?;
    eprintln!("\nThe tests with CAPE run with these variables:");
    println!("export CAPE_PYTHON={}", python.display());
    println!("export CAPE_SOURCE=/path/to/CAPEv2");
    Ok(())
}
