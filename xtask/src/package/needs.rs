//! The programs that make packages.

use crate::packages::{Need, VERSION, install_missing};
use crate::run::Result;

const NEEDS: [Need; 4] = [
    Need {
        what: "debhelper",
        program: "dh",
        args: &["--list"],
        packages: &["debhelper"],
        why: "makes packages",
    },
    Need {
        what: "lintian",
        program: "lintian",
        args: VERSION,
        packages: &["lintian"],
        why: "checks packages",
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

/// Installs the missing programs.
pub fn ensure() -> Result<()> {
    install_missing(&NEEDS).map(drop)
}
