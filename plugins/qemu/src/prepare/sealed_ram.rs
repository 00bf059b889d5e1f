//! A template's RAM in memory that nobody can change any more, for a QEMU that opens the file of its RAM for writing.
//!
//! QEMU opens that file for writing before 8.2, although it maps the file privately. Code that escapes from a guest into
//! its QEMU could then change the RAM that other machines are restored from. The kernel refuses that for a sealed file.
//! Sources: memfd_create(2), `F_ADD_SEALS` in fcntl(2).

use std::fs::File;

use machinery::{Error, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::memory::{memory_shortage, no_memory};
use super::sparse_copy::sparse_copy;

/// Copies a file of which `size` bytes are no zeros into memory, and seals the copy. Calls `ensure_wanted` now and then.
///
/// # Errors
/// There is not enough memory; the file cannot be read; `ensure_wanted` fails.
pub fn seal_copy(from: &File, size: u64, ensure_wanted: &dyn Fn() -> Result<()>) -> Result<File> {
    if let Some(why) = memory_shortage("loading the template of several machines", size) {
        return Err(Error::environment(why));
    }
    let made = memfd_create("template", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let copy = File::from(made.map_err(|error| no_memory(&error.into()))?);
    sparse_copy(from, &copy, ensure_wanted)
        .map_err(|error| error.action("copying the template's RAM into memory"))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&copy, seals).map_err(|error| no_memory(&error.into()))?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    use std::io::{self, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    /// Returns a sealed copy of 8 MiB that have one byte, as another process opens it.
    fn reopened() -> (File, File) {
        let from = tempfile::tempfile().unwrap();
        from.set_len(8 << 20).unwrap();
        from.write_all_at(&[7], 5 << 20).unwrap();
        let copy = seal_copy(&from, 4096, &|| Ok(())).unwrap();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        (File::options().read(true).write(true).open(path).unwrap(), copy)
    }

    #[test]
    fn copy_is_unchangeable_for_a_process_that_opens_it_for_writing() {
        let (mut file, _copy) = reopened();
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5 << 20).unwrap();
        assert_eq!(byte, [7]);
        let refused = |done: io::Result<()>| done.unwrap_err().kind() == io::ErrorKind::PermissionDenied;
        assert!(refused(file.write_all(b"x")) && refused(file.set_len(1)) && refused(file.set_len(9 << 20)));
        assert_eq!(fcntl_add_seals(&file, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
    }

    #[test]
    fn private_map_of_the_copy_takes_writes_and_a_shared_one_is_refused() {
        let (file, _copy) = reopened();
        let map = |flags| {
            // SAFETY: the kernel chooses the address, so no other memory is replaced.
            unsafe {
                mmap(std::ptr::null_mut(), 4096, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 5 << 20)
            }
        };
        assert_eq!(map(MapFlags::SHARED).unwrap_err(), Errno::PERM);
        let private = map(MapFlags::PRIVATE).unwrap();
        // SAFETY: the map is one page that can be read and written, and nothing uses it after its end.
        unsafe {
            assert_eq!(private.cast::<u8>().read(), 7);
            private.cast::<u8>().write(8);
            munmap(private, 4096).unwrap();
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5 << 20).unwrap();
        assert_eq!(byte, [7]);
    }
}
