//! The folders for save images. At most one host at a time makes and removes the images in a folder: an image has the
//! name of its machine, and another host may have a machine of the same name.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_backend::files::HostLock;
use machinery_backend::sync::lock;

use super::image::Image;

/// The file in the folder that is locked.
const LOCK: &str = "machinery-images.lock";

/// The folders that this host has open, each with its lock.
#[derive(Debug, Default)]
pub struct ImageFolders(Mutex<BTreeMap<PathBuf, HostLock>>);

impl ImageFolders {
    /// Opens the folder, unless it is open already. Makes it if it does not exist.
    ///
    /// # Errors
    /// Another host uses the folder; it cannot be made; other users could change what is in it.
    pub fn open(&self, folder: &Path) -> Result<()> {
        expect_trusted(folder).map_err(|error| error.action("opening instant_dir"))?;
        fs::create_dir_all(folder)
            .map_err(|error| Error::io("make the folder for save images", folder, &error))?;
        let mut open = lock(&self.0);
        if let Entry::Vacant(closed) = open.entry(real(folder)) {
            let lock = take(closed.key())?;
            closed.insert(lock);
        }
        Ok(())
    }

    /// Removes an image, if there is one, unless another host uses its folder. The image of an earlier configuration
    /// may be in a folder that is not open.
    pub fn remove(&self, image: &Image) {
        if !image.exists() {
            return;
        }
        let open = lock(&self.0);
        let folder = real(image.folder());
        let taken = if open.contains_key(&folder) { Ok(None) } else { take(&folder).map(Some) };
        match taken {
            Ok(_lock) => image.remove(),
            Err(error) => tracing::debug!(%error, "a save image is not removed"),
        }
    }

    /// Closes each folder that none of these images is in.
    pub fn close_unused(&self, images: &[&Image]) {
        let used: Vec<PathBuf> =
            images.iter().filter(|image| !image.is_off()).map(|image| real(image.folder())).collect();
        lock(&self.0).retain(|folder, _| used.contains(folder));
    }
}

/// Returns the real path of the folder: its configured path may have links.
fn real(folder: &Path) -> PathBuf {
    fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned())
}

fn take(folder: &Path) -> Result<HostLock> {
    HostLock::take(&folder.join(LOCK), || {
        Error::environment(format!("another host keeps its save images in {}", folder.display()))
            .advice("Set another instant_dir in machinery-host.yaml")
    })
}

#[cfg(test)]
mod tests {
    use super::super::image::InstantMode;
    use super::*;
    use std::os::unix::fs::symlink;

    /// Makes an image as of an earlier host.
    fn image(folder: &Path, mode: InstantMode) -> Image {
        let image = Image::of("m", mode, folder, "o".into());
        for file in ["m.machinery-image", "m.machinery-image-of"] {
            fs::write(folder.join(file), "x").unwrap();
        }
        image
    }

    #[test]
    fn folder_belongs_to_one_host_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images");
        let (own, other) = (ImageFolders::default(), ImageFolders::default());
        own.open(&path).unwrap();
        own.open(&path).unwrap();
        let text = other.open(&path).unwrap_err().to_string();
        assert!(
            text.starts_with("another host keeps its save images in") && text.contains("images"),
            "{text}"
        );
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        own.open(&link).unwrap();
        own.close_unused(&[&image(&link, InstantMode::On)]);
        assert!(other.open(&path).is_err());
        own.close_unused(&[&image(&path, InstantMode::Off)]);
        other.open(&path).unwrap();
    }

    #[test]
    fn image_is_not_removed_when_another_host_uses_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let image = image(folder.path(), InstantMode::Off);
        let (own, other) = (ImageFolders::default(), ImageFolders::default());
        other.open(folder.path()).unwrap();
        own.remove(&image);
        assert!(image.exists());
        other.close_unused(&[]);
        own.remove(&image);
        assert!(!image.exists());
        own.open(folder.path()).unwrap();
    }
}
