//! The tree of a prefix: all files of the packages, as they are below `/usr` or `/usr/local`.

use std::path::Path;

use super::files::{copy, read, set_modes, write};
use super::release::PLUGINS;
use super::{interface, licences};
use crate::install;
use crate::run::{CHECKOUT, Result};
use crate::tracked;

/// The units, whose paths are those of a prefix.
const UNITS: [&str; 2] = ["cuckoo-machinery.service", "cuckoo-machinery-cleanup.service"];

/// The prefix in the files of the checkout.
const PREFIX: &str = "/usr/local/";

/// Writes the units for a prefix, such as `/usr/`.
pub fn write_units(tree: &Path, prefix: &str) -> Result<()> {
    UNITS.iter().try_for_each(|unit| {
        let text = read(&Path::new(CHECKOUT).join("integrations/systemd").join(unit))?;
        write(&tree.join("lib/systemd/system").join(unit), &text.replace(PREFIX, prefix))
    })
}

/// Fills an empty folder `tree` for the prefix `/usr/local/`.
pub fn fill(tree: &Path, built: &Path) -> Result<()> {
    install::into(tree, built, &PLUGINS, false)?;
    write_units(tree, PREFIX)?;
    let checkout = Path::new(CHECKOUT);
    copy(&checkout.join("packaging/sysusers.conf"), &tree.join("lib/sysusers.d/cuckoo-machinery.conf"))?;
    let share = tree.join("share/cuckoo-machinery");
    for (file, to) in [
        ("integrations/systemd/plain-user.conf", "systemd/plain-user.conf"),
        ("integrations/prometheus/alerts.yaml", "prometheus/alerts.yaml"),
        ("integrations/prometheus/dashboard.json", "prometheus/dashboard.json"),
        ("integrations/cape/hosted.py", "cape/hosted.py"),
    ] {
        copy(&checkout.join(file), &share.join(to))?;
    }
    let doc = tree.join("share/doc/cuckoo-machinery");
    let is_doc = |file: &String| {
        file.starts_with("docs/") || ["README.md", "SECURITY.md", "CONTRIBUTING.md"].contains(&file.as_str())
    };
    for file in tracked::files(checkout)?.iter().filter(|file| is_doc(file)) {
        copy(&checkout.join(file), &doc.join(file))?;
    }
    write(&doc.join("third-party-licences.txt"), &licences::text()?)?;
    interface::fill(&share.join("source"))?;
    set_modes(tree)
}
