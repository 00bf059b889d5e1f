//! Overlays: the qcow2 files that one run writes to. Each image that a run opens for writing has one overlay. The
//! first overlay, of the machine's disk, is the disposable disk.
//!
//! `qemu-img` needs as long to create an overlay as QEMU needs to start, and all empty overlays of one image
//! are the same. `qemu-img` therefore creates only one, and every run gets a copy of its few blocks that are
//! not zero.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use machinery::trust::expect_trusted;
use machinery::{Deadline, Error, Result};
use machinery_images::{Chain, FileId, Header, probe_format};
use rustix::fs::{Access, access};

use crate::files::remove;
use crate::qemu_img::{ImageFiles, QemuImg};
use crate::sync::lock;

/// An image that overlays are based on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageFile {
    /// The path of the file.
    pub path: PathBuf,
    /// The format of the file; the file is probed if there is none.
    pub format: Option<String>,
}

/// Returns the path of the overlay of a machine's n-th image. `first` is the path of the disk's overlay
/// (image 0): `m_disposable_2.qcow2` lies beside `m_disposable.qcow2`.
pub fn overlay_path(first: &Path, n: usize) -> PathBuf {
    if n == 0 {
        return first.to_owned();
    }
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let mut name = format!("{}_{}", part(first.file_stem()), n + 1);
    if first.extension().is_some() {
        name = format!("{name}.{}", part(first.extension()));
    }
    first.with_file_name(name)
}

/// Checks that only trusted users, and this one, can create overlays in the folder.
///
/// # Errors
/// It is no folder; this user may not write there, or others may.
pub fn expect_overlay_folder(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Err(Error::environment(format!("{} is not a folder", folder.display()))
            .advice("Create it, or correct the path"));
    }
    expect_trusted(folder)?;
    if access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_ok() {
        return Ok(());
    }
    let reason = format!("the folder {} is not writable for this user", folder.display());
    Err(Error::environment(reason)
        .advice("Disposable disks are made there: change its permissions, or set disposable_copy_dir"))
}

/// The overlays of one run, in the order of the machine's images. Dropping the value deletes them, unless the
/// operator keeps them.
#[derive(Debug)]
pub struct Overlays(Vec<Overlay>);

/// An existing overlay. Dropping the value deletes the file, unless it is kept.
#[derive(Debug)]
struct Overlay {
    path: PathBuf,
    keep: bool,
}

impl Overlays {
    /// Adopts the overlays of a run that an earlier host has started.
    pub fn adopt(paths: &[PathBuf]) -> Overlays {
        Overlays(paths.iter().map(|path| Overlay { path: path.clone(), keep: false }).collect())
    }

    /// Sets whether the files are kept when the value is dropped.
    pub fn set_keep(&mut self, keep: bool) {
        self.0.iter_mut().for_each(|overlay| overlay.keep = keep);
    }

    /// Returns the paths of the overlays, as QEMU's arguments contain them.
    pub fn paths(&self) -> Vec<String> {
        self.0.iter().map(|overlay| overlay.path.display().to_string()).collect()
    }
}

impl Drop for Overlays {
    /// Deletes the last overlay first: [`remove_overlays`] then finds all overlays that a host which died has
    /// left.
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "cannot remove an overlay");
        }
    }
}

/// Removes all overlays of a machine, of which the first one is at `first`.
///
/// # Errors
/// An overlay exists and cannot be removed.
pub fn remove_overlays(first: &Path) -> Result<()> {
    let existing = (0..).map(|n| overlay_path(first, n)).take_while(|path| path.exists());
    let existing: Vec<PathBuf> = existing.collect();
    existing.iter().rev().try_for_each(|path| remove(path))
}

/// The template of one image, once it is made.
type Slot = Arc<Mutex<Option<Arc<OverlayTemplate>>>>;

/// The empty overlays of a machine's images, each created once.
#[derive(Debug, Default)]
pub struct OverlayTemplates {
    known: Mutex<HashMap<ImageFile, Slot>>,
    /// True if `qemu-img` does not open qcow2 images.
    unread: bool,
}

impl OverlayTemplates {
    /// Returns templates for whose creation `qemu-img` does not open qcow2 images: a run may have written to one, or it
    /// belongs to a user that the program is not.
    pub fn of_unread_images() -> OverlayTemplates {
        OverlayTemplates { unread: true, ..OverlayTemplates::default() }
    }

    /// Creates an overlay of each image, the first one at `first`. Overlays of an earlier run are replaced.
    ///
    /// # Errors
    /// An image is no file; `qemu-img` cannot create an overlay of it; an overlay cannot be written.
    pub fn overlays(
        &self,
        qemu_img: &QemuImg,
        images: &[ImageFile],
        first: &Path,
        deadline: Deadline,
    ) -> Result<Overlays> {
        // Dropping this on failure deletes the overlays made so far.
        let mut overlays = Overlays(Vec::new());
        for (n, image) in images.iter().enumerate() {
            let path = overlay_path(first, n);
            let template = self.template(qemu_img, image, &path, deadline)?;
            overlays.0.push(template.copy_to(&path)?);
        }
        Ok(overlays)
    }

    fn template(
        &self,
        qemu_img: &QemuImg,
        image: &ImageFile,
        path: &Path,
        deadline: Deadline,
    ) -> Result<Arc<OverlayTemplate>> {
        let of = file_id(&image.path)?;
        // `qemu-img` may hang on a file system, and only the machines of that image wait for it.
        let slot = Arc::clone(lock(&self.known).entry(image.clone()).or_default());
        let mut known = lock(&slot);
        if let Some(template) = known.as_ref().filter(|template| template.of == of) {
            return Ok(Arc::clone(template));
        }
        let template = Arc::new(OverlayTemplate::make(qemu_img, image, self.unread, of, path, deadline)?);
        *known = Some(Arc::clone(&template));
        Ok(template)
    }
}

/// Returns the identity of an image, which must be a file.
fn file_id(path: &Path) -> Result<FileId> {
    let failed = |error: io::Error| Error::io("look at the machine's image", path, &error);
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::configuration(format!("the image {} is not a file", path.display())).advice(
            "Use an image file in the machine's start_args: of anything else no overlay can be made",
        ));
    }
    FileId::of(path).map_err(failed)
}

/// Creates an overlay with `qemu-img`, which does not open a qcow2 image that is `unread`.
fn create(
    qemu_img: &QemuImg,
    image: &ImageFile,
    unread: bool,
    path: &Path,
    deadline: Deadline,
) -> Result<Overlay> {
    remove(path)?;
    let probe =
        || probe_format(&image.path).map_err(|error| Error::io("open the image", &image.path, &error));
    let format = image.format.as_deref().map_or_else(probe, Ok)?;
    // Dropping this on failure deletes the incomplete file.
    let new = Overlay { path: path.to_owned(), keep: false };
    let header = if unread { Header::read(&image.path)? } else { None };
    let mut options = "lazy_refcounts=on,cluster_size=2M".to_owned();
    if let Some(header) = &header {
        options = format!("{options},size={}", header.size);
    }
    let unsafely = header.as_ref().map(|_| "-u");
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &options, "-F", format].into_iter().chain(unsafely);
    let what = format!("make an overlay of {} at {}", image.path.display(), path.display());
    let args = arguments.chain(["-b"]).map(OsStr::new).chain([image.path.as_os_str(), path.as_os_str()]);
    // The program may write to this file, and make no other.
    File::create_new(path).map_err(|error| Error::io("make the overlay", path, &error))?;
    let read = if header.is_some() { Vec::new() } else { Chain::of(&image.path, Some(format))?.files };
    let files = ImageFiles { read, written: vec![path.to_owned()] };
    qemu_img.run(&what, args, files, deadline).map_err(|error| {
        deadline.check("qemu-img to make the overlay").err().unwrap_or_else(|| error.advice("Check the space and permissions of the overlay's folder, and that the image is whole and in that format"))
    })?;
    Ok(new)
}

/// The unit of zeros that is left out, in bytes: the smallest likely cluster of a file system.
const BLOCK: usize = 4096;

/// An empty overlay, kept in memory, that overlays are copied from.
#[derive(Debug)]
struct OverlayTemplate {
    /// The image that the overlay is based on.
    of: FileId,
    length: u64,
    /// The offsets and contents of the blocks that are not zero.
    blocks: Vec<(u64, Vec<u8>)>,
}

impl OverlayTemplate {
    /// Creates an empty overlay at `path` with `qemu-img`, and reads it; `of` is the image.
    fn make(
        qemu_img: &QemuImg,
        image: &ImageFile,
        unread: bool,
        of: FileId,
        path: &Path,
        deadline: Deadline,
    ) -> Result<OverlayTemplate> {
        let made = create(qemu_img, image, unread, path, deadline)?;
        let content = fs::read(&made.path).map_err(|error| Error::io("read", path, &error))?;
        let used = |(number, block): (usize, &[u8])| {
            let at = (number * BLOCK) as u64;
            block.iter().any(|byte| *byte != 0).then(|| (at, block.to_vec()))
        };
        let blocks = content.chunks(BLOCK).enumerate().filter_map(used).collect();
        Ok(OverlayTemplate { of, length: content.len() as u64, blocks })
    }

    /// Creates an overlay at `path`; an overlay of an earlier run is replaced.
    fn copy_to(&self, path: &Path) -> Result<Overlay> {
        remove(path)?;
        let failed = |error: io::Error| Error::io("make the overlay", path, &error);
        // Dropping this on failure deletes the incomplete file.
        let new = Overlay { path: path.to_owned(), keep: false };
        // It has what the guest writes.
        let file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        file.set_len(self.length).map_err(failed)?;
        self.blocks.iter().try_for_each(|(at, block)| file.write_all_at(block, *at)).map_err(failed)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::JailMode;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::thread;
    use std::time::Duration;

    /// Creates a `qemu-img` that writes a file with few blocks that are not zero.
    fn image_maker(folder: &Path) -> PathBuf {
        let path = folder.join("qemu-img");
        let script = "#!/bin/sh\nfor last; do :; done\nprintf QFI > \"$last\"\n\
                      printf end | dd of=\"$last\" bs=1 seek=3000000 conv=notrunc 2>/dev/null\n";
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn source(path: &Path) -> ImageFile {
        ImageFile { path: path.to_owned(), format: None }
    }

    #[test]
    fn overlays_are_the_same_and_sparse_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, first) = (folder.path().join("disk"), folder.path().join("overlay.x"));
        fs::write(&disk, "a disk").unwrap();
        let soon = Deadline::after(Duration::from_secs(10));
        let (program, overlay_templates) = (image_maker(folder.path()), OverlayTemplates::default());
        let qemu_img = QemuImg::new(&program).with_jail(JailMode::Off);
        let images = [source(&disk), ImageFile { format: Some("raw".into()), ..source(&disk) }];
        let make = || overlay_templates.overlays(&qemu_img, &images, &first, soon).unwrap();
        for _ in 0..2 {
            let overlays = make();
            for path in overlays.paths() {
                let content = fs::read(&path).unwrap();
                assert_eq!(
                    (content.len(), &content[..3], &content[3_000_000..]),
                    (3_000_003, &b"QFI"[..], &b"end"[..])
                );
                assert!(content[3..3_000_000].iter().all(|byte| *byte == 0));
                assert!(fs::metadata(&path).unwrap().blocks() * 512 < 100_000);
                fs::write(&path, "written to").unwrap();
            }
            assert!(first.exists() && folder.path().join("overlay_2.x").exists());
            drop(overlays);
            assert!(!first.exists() && !folder.path().join("overlay_2.x").exists());
        }
        // `qemu-img` runs only once, as long as the image is the same.
        fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        drop(make());
        fs::write(&disk, "another").unwrap();
        assert!(overlay_templates.overlays(&qemu_img, &images, &first, soon).is_err());
    }

    #[test]
    fn overlay_is_made_while_that_of_another_image_hangs() {
        let folder = tempfile::tempdir().unwrap();
        let [slow, quick, hang] = ["slow", "quick", "hang"].map(|name| folder.path().join(name));
        fs::write(&slow, "a disk").unwrap();
        fs::write(&quick, "a disk").unwrap();
        mknodat(CWD, &hang, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let program = image_maker(folder.path());
        let wait = format!("#!/bin/sh\ncase \"$*\" in *slow.x) cat {};; esac", hang.display());
        fs::write(&program, fs::read_to_string(&program).unwrap().replace("#!/bin/sh", &wait)).unwrap();
        let (qemu_img, templates) =
            (QemuImg::new(&program).with_jail(JailMode::Off), OverlayTemplates::default());
        let make = |disk: &Path| {
            let soon = Deadline::after(Duration::from_secs(60));
            templates.overlays(&qemu_img, &[source(disk)], &disk.with_extension("x"), soon)
        };
        thread::scope(|scope| {
            let hanging = scope.spawn(|| make(&slow).is_ok());
            // The program opens it to read.
            let begun = File::options().write(true).open(&hang).unwrap();
            assert!(make(&quick).is_ok() && !hanging.is_finished());
            drop(begun);
            assert!(hanging.join().unwrap());
        });
    }

    #[test]
    fn overlays_are_all_removed_when_a_host_has_left_them() {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("m_disposable.qcow2");
        for n in 0..3 {
            fs::write(overlay_path(&first, n), "left").unwrap();
        }
        assert!(folder.path().join("m_disposable_3.qcow2").exists());
        fs::write(folder.path().join("m_disposable_5.qcow2"), "the operator's").unwrap();
        remove_overlays(&first).unwrap();
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        assert_eq!(overlay_path(Path::new("/t/disk"), 1), Path::new("/t/disk_2"));
    }

    #[test]
    fn overlay_fails_and_leaves_nothing_when_it_cannot_be_written() {
        let template =
            OverlayTemplate { of: FileId::of(Path::new("/")).unwrap(), length: 1, blocks: Vec::new() };
        let text = template.copy_to(Path::new("/none/overlay")).unwrap_err().to_string();
        assert!(text.contains("/none/overlay"), "{text}");
    }

    #[test]
    fn overlay_is_refused_when_the_image_is_no_file() {
        for (path, what) in [("/none/image", "/none/image"), ("/dev", "is not a file")] {
            let text = file_id(Path::new(path)).unwrap_err().to_string();
            assert!(text.contains(what), "{text}");
        }
    }
}
