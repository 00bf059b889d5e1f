//! The file for the textfile collector of node_exporter. It is written at a change, and at most every 15 s: an idle host
//! writes nothing.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::block_in_place;
use tokio::time::sleep;

use super::page::{Format, Page};

/// The time between two versions of the file.
const INTERVAL: Duration = Duration::from_secs(15);

/// Writes the file now and at each change, until it is dropped.
pub async fn keep(file: &Path, page: &Arc<Page>) {
    let mut failing = false;
    let mut changes = page.changes();
    loop {
        changes.forget();
        // Never cancelled in the middle, so that no late write follows a removal.
        let written = block_in_place(|| write(file, &page.text(Format::Prometheus)));
        if let Err(error) = &written
            && !failing
        {
            tracing::error!(file = %file.display(), %error, "the file of the metrics cannot be written");
        }
        failing = written.is_err();
        changes.next().await;
        sleep(INTERVAL).await;
    }
}

/// Replaces the file in one step. node_exporter reads only names that end with `.prom`.
fn write(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut new = tempfile::Builder::new()
        .prefix(".cuckoo-machinery-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)
        // The error itself names the unfinished file.
        .map_err(|error| io::Error::from(error.kind()))?;
    // The umask may have removed the right of others.
    new.as_file().set_permissions(Permissions::from_mode(0o644))?;
    new.write_all(text.as_bytes())?;
    new.persist(file)?;
    Ok(())
}

/// Removes the file: old values would look like those of a host that runs.
pub fn remove(file: &Path) {
    if let Err(error) = block_in_place(|| fs::remove_file(file))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(file = %file.display(), %error, "the file of the metrics cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn file_is_replaced_as_a_whole_and_readable_for_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cuckoo.prom");
        write(&file, "a much longer text\n").unwrap();
        write(&file, "text\n").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "text\n");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing else is left");
        remove(&file);
        remove(&file);
        assert!(!file.exists());
        assert!(write(&folder.path().join("none/cuckoo.prom"), "").is_err());
    }
}
