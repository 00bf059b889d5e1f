//! The programs that make and check packages.

use crate::run::Result;
use crate::system_packages::{Need, VERSION, install_missing};

const NEEDS: [Need; 4] = [
    Need {
        what: "git",
        program: "git",
        args: VERSION,
        packages: &["git"],
        why: "knows the files and the date of a release",
    },
    Need {
        what: "debhelper",
        program: "dh",
        args: &["--list"],
        packages: &["debhelper"],
        why: "makes packages",
    },
    Need {
        what: "setuptools",
        program: "/usr/bin/python3",
        args: &["-c", "import setuptools, wheel"],
        packages: &["python3-setuptools", "python3-wheel"],
        why: "makes the wheel",
    },
    Need {
        what: "libvirt's development files",
        program: "pkg-config",
        args: &["--exists", "libvirt"],
        packages: &["pkg-config", "libvirt-dev"],
        why: "the kvm machinery is built with",
    },
];

/// The checks of packages.
const TEST_NEEDS: [Need; 1] = [Need {
    what: "lintian",
    program: "lintian",
    args: VERSION,
    packages: &["lintian"],
    why: "checks packages",
}];

/// Installs the missing programs that check packages.
pub fn ensure_for_tests() -> Result<()> {
    install_missing(&TEST_NEEDS).map(drop)
}

/// Installs the missing programs.
pub fn ensure() -> Result<()> {
    install_missing(&NEEDS).map(drop)
}
