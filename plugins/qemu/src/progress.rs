//! The progress of a load: how much of the snapshot's file a process has read.
//!
//! QEMU does not report how much of a snapshot it has loaded, but the kernel knows the position in the file.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the part of the file that the process has read, from 0.0 to 1.0; 0.0 also if the process does not
/// have the file open. Source: `pos` in proc_pid_fdinfo(5).
pub fn of(process: u32, file: &Path) -> f64 {
    position(process, file).zip(fs::metadata(file).ok()).map_or(0.0, |(position, file)| {
        if file.len() == 0 { 0.0 } else { (position as f64 / file.len() as f64).min(1.0) }
    })
}

fn position(process: u32, file: &Path) -> Option<u64> {
    let folder = PathBuf::from(format!("/proc/{process}"));
    let file = file.canonicalize().ok()?;
    let mut descriptors = folder.join("fd").read_dir().ok()?.flatten();
    let found = descriptors.find(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == file))?;
    let info = fs::read_to_string(folder.join("fdinfo").join(found.file_name())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("pos:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn progress_is_the_position_of_this_process_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, [0; 1000]).unwrap();
        let own = std::process::id();
        assert_eq!(of(own, &path), 0.0);
        let mut file = fs::File::open(&path).unwrap();
        file.read_exact(&mut [0; 250]).unwrap();
        assert_eq!(of(own, &path), 0.25);
        assert_eq!(of(own, Path::new("/none")), 0.0);
    }
}
