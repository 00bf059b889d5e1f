//! QEMUs that have ended and that nobody has reaped: a finding for `check`.
//!
//! A QEMU of libvirt is a child of the first process of its PID namespace, which has to reap it. libvirt waits for that
//! when it stops a domain, for over a minute. The first process of some containers reaps processes late, or never.
//! Sources: libvirt's src/util/virprocess.c; proc(5).

use std::collections::BTreeSet;
use std::fs;

/// Returns the processes of QEMU that have ended and are not reaped.
pub fn unreaped() -> BTreeSet<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|number: &u32| is_unreaped(&read_status(*number))).collect()
}

/// Warns of processes that were not reaped before and are not now.
pub fn warning(before: &BTreeSet<u32>) -> Option<String> {
    let number = unreaped().intersection(before).count();
    (number > 0).then(|| {
        format!(
            "kvm: {number} QEMUs have ended and are not reaped. libvirt waits for that at each stop, for over a minute. Run the \
             container with an init that reaps processes (such as `docker run --init`)"
        )
    })
}

fn read_status(number: u32) -> String {
    fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default()
}

/// Reports whether the content of a `stat` file is that of an ended QEMU. A name may contain parentheses.
fn is_unreaped(stat: &str) -> bool {
    let parts = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") "));
    parts.is_some_and(|(name, state)| name.starts_with("qemu") && state.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::thread;

    #[test]
    fn ended_qemu_causes_a_warning_until_it_is_reaped() {
        assert!(!is_unreaped("7 (bash) Z 1") && !is_unreaped("7 (qemu-system-x86) S 1") && !is_unreaped(""));
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu-system-x");
        fs::copy("/bin/true", &program).unwrap();
        let mut child = Command::new(&program).spawn().unwrap();
        while !unreaped().contains(&child.id()) {
            thread::yield_now();
        }
        let before = BTreeSet::from([child.id()]);
        assert!(warning(&before).unwrap().starts_with("kvm: 1 QEMUs have ended"));
        child.wait().unwrap();
        assert_eq!(warning(&before), None);
    }
}
