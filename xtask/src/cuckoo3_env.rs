//! `cargo xtask cuckoo3-env`: a Python environment with Cuckoo3, for the tests with it.
//!
//! Cuckoo3 is on no package registry, and parts of this repository are tested with it. Its packages are installed from a
//! checkout of the operator's, which `$CUCKOO3_SOURCE` names. They need forks of some packages, from the repositories of
//! Cuckoo3's authors.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Context, Result, step, step_as};

/// The variable with the path of Cuckoo3's checkout.
const SOURCE: &str = "CUCKOO3_SOURCE";
/// Cuckoo3's packages. The web interface is one of them, because the package `core` requires it.
const PACKAGES: [&str; 6] = ["common", "processing", "machineries", "web", "node", "core"];
/// The packages whose releases on PyPI are too old for Cuckoo3, in the order of their dependencies.
const FORKS: [&str; 4] = ["peepdf", "sflock", "roach", "httpreplay"];
/// The versions of Python for which the forks and Cuckoo3 work: the former need 3.10, the latter needs `distutils`.
const VERSIONS: &str = "3.10 or 3.11";
/// Fails if a plugin of a worker cannot be loaded: the worker would not start.
const CHECK: &str = "\
import importlib, pkgutil, cuckoo.main, cuckoo.node.main, cuckoo.processing as processing
for module in pkgutil.walk_packages(processing.__path__, 'cuckoo.processing.'):
    importlib.import_module(module.name)
";

/// Options of `cargo xtask cuckoo3-env`.
#[derive(clap::Args)]
pub struct Options {
    /// The folder of the environment; it must not exist
    folder: PathBuf,
    /// The Python of the environment, version 3.10 or 3.11
    #[arg(long, default_value = "python3")]
    python: PathBuf,
}

/// Makes the environment.
pub fn run(options: &Options) -> Result<()> {
    let source = env::var_os(SOURCE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let source =
        source.ok_or_else(|| format!("set {SOURCE} to a checkout of https://github.com/cert-ee/cuckoo3"))?;
    let packages = packages(&source)?;
    if options.folder.exists() {
        return Err(
            format!("{} exists: choose another folder, or remove it", options.folder.display()).into()
        );
    }
    check_version(&options.python)?;
    step(Command::new(&options.python).args(["-m", "venv"]).arg(&options.folder))?;
    let programs =
        options.folder.canonicalize().context(|| "the environment is missing".to_owned())?.join("bin");
    let pip = || {
        let mut pip = Command::new(programs.join("pip"));
        pip.args(["install", "--disable-pip-version-check"]);
        pip
    };
    // Later versions lack `pkg_resources`, which Cuckoo3 uses.
    step(pip().args(["setuptools<81", "wheel"]))?;
    for fork in FORKS {
        step(pip().arg(format!("git+https://github.com/cert-ee/{fork}")))?;
    }
    step(pip().args(packages))?;
    step_as("loading Cuckoo3", Command::new(programs.join("python")).args(["-c", CHECK]))?;
    println!(
        "\nCuckoo3 is installed. For the tests with it:\n\n    export CUCKOO3_PYTHON={}",
        programs.join("python").display()
    );
    Ok(())
}

/// Returns the folders of Cuckoo3's packages.
fn packages(source: &Path) -> Result<Vec<PathBuf>> {
    let source = source.canonicalize().context(|| format!("{SOURCE} is {}", source.display()))?;
    let packages = PACKAGES.map(|name| source.join(name));
    match packages.iter().find(|package| !package.join("pyproject.toml").is_file()) {
        Some(missing) => {
            Err(format!("{SOURCE} is no checkout of Cuckoo3: {} is no package", missing.display()).into())
        }
        None => Ok(packages.into()),
    }
}

fn check_version(python: &Path) -> Result<()> {
    let what = || format!("cannot run {}", python.display());
    let code = "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))";
    let status = Command::new(python).args(["-c", code]).status().context(what)?;
    match status.success() {
        true => Ok(()),
        false => {
            Err(format!("{} is not Python {VERSIONS}: give another one with --python", python.display())
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_is_refused_when_a_package_is_missing() {
        let source = tempfile::tempdir().unwrap();
        for name in PACKAGES {
            assert!(packages(source.path()).is_err());
            let package = source.path().join(name);
            std::fs::create_dir(&package).unwrap();
            std::fs::write(package.join("pyproject.toml"), "").unwrap();
        }
        assert_eq!(packages(source.path()).unwrap().len(), PACKAGES.len());
    }
}
