//! Copies a file without its zeros: QEMU's RAM in memory becomes the template's RAM file on disk, and back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use machinery::{Error, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The number of bytes that are read at once.
const CHUNK: usize = 1 << 20;
/// The unit of zeros that is left out.
const PAGE: usize = 4096;
const ZERO: [u8; PAGE] = [0; PAGE];

/// Copies the file to the empty file `to`, with holes in place of zeros. Calls `ensure_wanted` now and then.
///
/// # Errors
/// A file cannot be read or written; `ensure_wanted` fails.
pub fn sparse_copy(from: &File, to: &File, ensure_wanted: &dyn Fn() -> Result<()>) -> Result<()> {
    let failed = |error: io::Error| Error::environment(format!("cannot copy the template's RAM: {error}"));
    let size = from.metadata().map_err(failed)?.len();
    to.set_len(size).map_err(failed)?;
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while let Some(next) = next_data(from, at).map_err(failed)? {
        ensure_wanted()?;
        at = next - next % PAGE as u64;
        let length = (size - at).min(CHUNK as u64) as usize;
        from.read_exact_at(&mut chunk[..length], at).map_err(failed)?;
        copy_chunk(&chunk[..length], to, at).map_err(failed)?;
        at += length as u64;
    }
    Ok(())
}

/// Returns the place of the first data in the file at or behind `at`.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(next) => Ok(Some(next)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes the pages of a chunk that are not zero, adjacent pages at once.
fn copy_chunk(chunk: &[u8], to: &File, at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| *page == ZERO[..page.len()];
    let mut begin = 0;
    while begin < chunk.len() {
        let zeros = chunk[begin..].chunks(PAGE).take_while(|page| is_zero(page)).count() * PAGE;
        begin += zeros;
        let Some(rest) = chunk.get(begin..) else { break };
        let full = rest.chunks(PAGE).take_while(|page| !is_zero(page)).map(<[u8]>::len).sum::<usize>();
        to.write_all_at(&rest[..full], at + begin as u64)?;
        begin += full;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn copy_is_the_same_and_sparse_when_the_file_has_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let memory = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join("memory"))
            .unwrap();
        memory.set_len(64 << 20).unwrap();
        let noise: Vec<u8> = (0..3 * PAGE).map(|n| (n % 251) as u8 + 1).collect();
        // At the beginning, over the border of a chunk, within written zeros, and at the end.
        for at in [0, CHUNK - PAGE, 5 * CHUNK, (64 << 20) - noise.len()] {
            memory.write_all_at(&noise, at as u64).unwrap();
        }
        memory.write_all_at(&vec![0; CHUNK], 9 * CHUNK as u64).unwrap();
        sparse_copy(&memory, &File::create_new(&path).unwrap(), &|| Ok(())).unwrap();
        let (mut original, copy) = (vec![0; 64 << 20], fs::read(&path).unwrap());
        memory.read_exact_at(&mut original, 0).unwrap();
        assert!(original == copy, "the copy differs");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 16 * PAGE as u64);
        let cancelled =
            sparse_copy(&memory, &File::create(&path).unwrap(), &|| Err(Error::failed("cancelled")));
        assert!(cancelled.unwrap_err().to_string().contains("cancelled"));
    }
}
