//! The lists of needs: a program, the packages that have it, and its purpose.

use std::path::Path;
use std::process::Command;

use crate::debian::KEYRING;
use crate::run::succeeds;

/// A need, and its purpose.
pub struct Need {
    /// The name of the need.
    pub what: &'static str,
    /// A program that succeeds with these arguments if the need is met.
    pub program: &'static str,
    /// The arguments of the program.
    pub args: &'static [&'static str],
    /// The packages that meet the need.
    pub packages: &'static [&'static str],
    /// The purpose, as a clause.
    pub why: &'static str,
}

/// The arguments that most programs succeed with.
pub const VERSION: &[&str] = &["--version"];

/// The need of two of the lists.
const LIBVIRT_DEV: Need = Need {
    what: "libvirt's development files",
    program: "pkg-config",
    args: &["--exists", "libvirt"],
    packages: &["pkg-config", "libvirt-dev"],
    why: "the kvm machinery and libvirt's Python are built with",
};

/// The need of all lists.
const DEBOOTSTRAP: Need = Need {
    what: "debootstrap",
    program: "debootstrap",
    args: VERSION,
    packages: &["debootstrap"],
    why: "makes a minimal Debian",
};

/// The needs of the tests and of the demo.
pub const NEEDS: [Need; 19] = [
    Need {
        what: "qemu-system-x86_64",
        program: "qemu-system-x86_64",
        args: VERSION,
        packages: &["qemu-system-x86"],
        why: "runs the test machines",
    },
    Need {
        what: "qemu-img",
        program: "qemu-img",
        args: VERSION,
        packages: &["qemu-utils"],
        why: "makes their disks",
    },
    Need {
        what: "OVMF",
        program: "ls",
        args: &["/usr/share/OVMF/OVMF_CODE_4M.fd"],
        packages: &["ovmf"],
        why: "boots a machine by UEFI",
    },
    Need {
        what: "swtpm_setup",
        program: "swtpm_setup",
        // It ends with 1 after its version.
        args: &["--print-capabilities"],
        // It depends on swtpm itself, and libvirt runs it.
        packages: &["swtpm-tools"],
        why: "is the TPM of a machine",
    },
    Need {
        what: "libvirtd",
        program: "libvirtd",
        args: VERSION,
        // Debian has a separate package for QEMU's driver.
        packages: &["libvirt-daemon", "libvirt-daemon-driver-qemu"],
        why: "runs test machines for the kvm machinery",
    },
    Need {
        what: "virsh",
        program: "virsh",
        args: VERSION,
        packages: &["libvirt-clients"],
        why: "asks libvirtd what it runs",
    },
    Need {
        what: "ip",
        program: "ip",
        args: &["-Version"],
        packages: &["iproute2"],
        why: "makes a test's own network",
    },
    Need {
        what: "nft",
        program: "nft",
        args: VERSION,
        packages: &["nftables"],
        why: "filters the isolated network of a run",
    },
    Need {
        what: "tcpdump",
        program: "tcpdump",
        args: VERSION,
        packages: &["tcpdump"],
        why: "captures the traffic of machines",
    },
    Need {
        what: "tshark",
        program: "tshark",
        args: VERSION,
        packages: &["tshark"],
        why: "reads what was captured",
    },
    Need {
        what: "faketime",
        program: "faketime",
        args: VERSION,
        packages: &["faketime"],
        why: "makes the clock of a soaked host jump",
    },
    Need {
        what: "systemd",
        program: "systemctl",
        args: VERSION,
        packages: &["systemd"],
        why: "runs the host's units",
    },
    Need {
        what: "strace",
        program: "strace",
        args: &["-V"],
        packages: &["strace"],
        why: "shows the order of system calls",
    },
    Need {
        what: "mandoc",
        program: "mandoc",
        args: &["-T", "lint", "-W", "fatal", "/dev/null"],
        packages: &["mandoc"],
        why: "checks the manual pages",
    },
    Need {
        what: "Chromium",
        program: "sh",
        args: &["-c", "chromium-headless-shell --version || chromium --version || google-chrome --version"],
        packages: &["chromium-headless-shell"],
        why: "shows the host's web page",
    },
    LIBVIRT_DEV,
    Need {
        what: "python3",
        program: "python3",
        args: VERSION,
        packages: &["python3"],
        why: "runs the tests of the adapter for Cuckoo3",
    },
    DEBOOTSTRAP,
    Need {
        what: "mkfs.ext4",
        program: "mkfs.ext4",
        args: &["-V"],
        packages: &["e2fsprogs"],
        why: "makes the disk of an installed guest",
    },
];

/// The needs of a fresh root.
pub const ROOT_NEEDS: [Need; 3] = [
    DEBOOTSTRAP,
    Need {
        what: "the keys of Debian's archives",
        program: "test",
        args: &["-f", KEYRING],
        packages: &["debian-archive-keyring"],
        why: "verify what debootstrap downloads",
    },
    Need {
        what: "git",
        program: "git",
        args: VERSION,
        packages: &["git"],
        why: "clones the checkout into it",
    },
];

/// The needs of the tests and benchmarks with CAPE.
pub const CAPE_NEEDS: [Need; 6] = [
    LIBVIRT_DEV,
    Need {
        what: "Python's development files",
        program: "python3",
        args: &["-c", "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"],
        packages: &["python3-dev"],
        why: "libvirt's Python is built with",
    },
    Need {
        what: "python3 -m venv",
        program: "python3",
        args: &["-m", "ensurepip", "--version"],
        packages: &["python3-venv"],
        why: "makes CAPE's environment",
    },
    Need {
        what: "libmagic",
        program: "sh",
        args: &["-c", "ls /usr/lib/*/libmagic.so.1 /usr/lib*/libmagic.so.1 2> /dev/null | grep -q ."],
        packages: &["libmagic1"],
        why: "names the types of samples",
    },
    Need {
        what: "PostgreSQL",
        program: "sh",
        args: &["-c", "ls /usr/lib/postgresql/*/bin/initdb || command -v initdb"],
        packages: &["postgresql"],
        why: "is the database of each test",
    },
    DEBOOTSTRAP,
];

impl Need {
    /// Reports whether the need is met. A plain user's path lacks the folder of the system's daemons.
    pub fn is_met(&self) -> bool {
        let daemon = Path::new("/usr/sbin").join(self.program);
        let mut places = [Path::new(self.program), &daemon].into_iter();
        places.any(|program| succeeds(Command::new(program).args(self.args)))
    }
}
