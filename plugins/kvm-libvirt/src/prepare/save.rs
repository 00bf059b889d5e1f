//! libvirt's calls that save a domain to a file, and restore it paused. The `virt` crate has no function for them: it
//! cannot save a paused domain as running, and does not know formats.
//!
//! libvirt 11.2 has *sparse* files, in which each page of the guest has a place of its own. QEMU therefore reads them by
//! several threads. The calls for that exist since libvirt 8.4, so they are looked up at run time: the plugin also works
//! with an older library. Sources: libvirt's news of 8.4.0 and 11.2.0, `virDomainSaveParams` in its reference.

use std::ffi::{CStr, CString, c_int, c_uint};
use std::ptr;
use std::thread;

use libloading::os::unix::{Library, RTLD_NOW};
use machinery::{Error, Result};
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use crate::errors::explain;

/// The first libvirt with sparse files, as its version is coded.
const LIBVIRT_WITH_SPARSE: u32 = 11_002_000;
/// The first QEMU that can make them: capability `mapped-ram` of its migration.
const QEMU_WITH_SPARSE: u32 = 9_000_000;
/// The maximum number of threads that read a sparse file. The memory's bandwidth is the limit of more.
const MAX_CHANNELS: usize = 4;

/// The format of a file with a domain's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// QEMU's stream.
    Raw,
    /// Each page has its own place.
    Sparse,
}

impl Format {
    /// Returns the best format of that libvirt and its QEMU.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn best(connect: &Connect) -> Result<Format> {
        let failed = |error| explain("return its version", &error);
        let has_sparse = connect.lib_version().map_err(failed)? >= LIBVIRT_WITH_SPARSE
            && connect.hyp_version().map_err(failed)? >= QEMU_WITH_SPARSE
            && ParamCalls::find().is_some();
        Ok(if has_sparse { Format::Sparse } else { Format::Raw })
    }
}

/// Saves the domain's state to `path` and ends the domain. A restore of the file starts the domain that `xml` describes.
///
/// # Errors
/// libvirt cannot save the domain. The domain may still be on then, and a part of the file may exist.
pub fn save(domain: &Domain, path: &str, xml: &str, format: Format) -> Result<()> {
    let (to, text) = (c_text(path)?, c_text(xml)?);
    let flags = sys::VIR_DOMAIN_SAVE_RUNNING;
    let saved = match format {
        // SAFETY: the domain is alive, both texts end with a null byte, and all outlive the call.
        Format::Raw => unsafe { sys::virDomainSaveFlags(domain.as_ptr(), to.as_ptr(), text.as_ptr(), flags) },
        Format::Sparse => {
            let calls = ParamCalls::expect()?;
            let mut params = Params::default();
            params.add_text(sys::VIR_DOMAIN_SAVE_PARAM_FILE, &to)?;
            params.add_text(sys::VIR_DOMAIN_SAVE_PARAM_DXML, &text)?;
            let sparse = sys::VIR_DOMAIN_SAVE_PARAM_IMAGE_FORMAT_SPARSE;
            params.add_text(sys::VIR_DOMAIN_SAVE_PARAM_IMAGE_FORMAT, sparse)?;
            // SAFETY: the domain and the parameters are alive, and outlive the call.
            unsafe { (calls.save)(domain.as_ptr(), params.first, params.count, flags) }
        }
    };
    outcome(saved, &format!("save the domain to {path}"))
}

/// Restores a domain of that format from `path`, and leaves it paused.
///
/// # Errors
/// libvirt cannot restore the domain. It may be in any state then.
pub fn restore_paused(connect: &Connect, path: &str, format: Format) -> Result<()> {
    let flags = sys::VIR_DOMAIN_SAVE_PAUSED;
    let action = "restore the domain from its save image";
    if format == Format::Raw {
        return connect.restore_domain_flags(path, None, flags).map_err(|error| explain(action, &error));
    }
    let (from, calls) = (c_text(path)?, ParamCalls::expect()?);
    let channels = thread::available_parallelism().map_or(1, usize::from).min(MAX_CHANNELS);
    let mut params = Params::default();
    params.add_text(sys::VIR_DOMAIN_SAVE_PARAM_FILE, &from)?;
    params
        .add_number(sys::VIR_DOMAIN_SAVE_PARAM_PARALLEL_CHANNELS, c_int::try_from(channels).unwrap_or(1))?;
    // SAFETY: the connection and the parameters are alive, and outlive the call.
    let restored = unsafe { (calls.restore)(connect.as_ptr(), params.first, params.count, flags) };
    outcome(restored, action)
}

fn outcome(returned: c_int, action: &str) -> Result<()> {
    if returned < 0 { Err(explain(action, &virt::error::Error::last_error())) } else { Ok(()) }
}

fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::failed("a text for libvirt has a null byte"))
}

type SaveCall = unsafe extern "C" fn(sys::virDomainPtr, sys::virTypedParameterPtr, c_int, c_uint) -> c_int;
type RestoreCall =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virTypedParameterPtr, c_int, c_uint) -> c_int;

/// The calls with parameters, which an older library lacks.
struct ParamCalls {
    save: SaveCall,
    restore: RestoreCall,
    /// It keeps the library in memory.
    _library: Library,
}

impl ParamCalls {
    fn find() -> Option<ParamCalls> {
        // SAFETY: the library is libvirt's, which is in memory already, so no code of it runs now.
        let library = unsafe { Library::open(Some("libvirt.so.0"), RTLD_NOW) }.ok()?;
        // SAFETY: both types are those of the functions in libvirt's header, which never change.
        let (save, restore) = unsafe {
            (
                *library.get::<SaveCall>(c"virDomainSaveParams").ok()?,
                *library.get::<RestoreCall>(c"virDomainRestoreParams").ok()?,
            )
        };
        Some(ParamCalls { save, restore, _library: library })
    }

    fn expect() -> Result<ParamCalls> {
        Self::find().ok_or_else(|| Error::environment("the library libvirt.so.0 has no virDomainSaveParams"))
    }
}

/// Parameters of a call.
#[derive(Debug)]
struct Params {
    first: sys::virTypedParameterPtr,
    count: c_int,
    capacity: c_int,
}

impl Default for Params {
    fn default() -> Self {
        Params { first: ptr::null_mut(), count: 0, capacity: 0 }
    }
}

impl Params {
    fn add_text(&mut self, name: &CStr, value: &CStr) -> Result<()> {
        let (count, capacity) = (&raw mut self.count, &raw mut self.capacity);
        // SAFETY: the list is empty or libvirt's own, and libvirt copies both texts, which end with a null byte.
        let added = unsafe {
            sys::virTypedParamsAddString(&raw mut self.first, count, capacity, name.as_ptr(), value.as_ptr())
        };
        outcome(added, "make the parameters of a call")
    }

    fn add_number(&mut self, name: &CStr, value: c_int) -> Result<()> {
        let (count, capacity) = (&raw mut self.count, &raw mut self.capacity);
        // SAFETY: the list is empty or libvirt's own, and libvirt copies the name, which ends with a null byte.
        let added =
            unsafe { sys::virTypedParamsAddInt(&raw mut self.first, count, capacity, name.as_ptr(), value) };
        outcome(added, "make the parameters of a call")
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        // SAFETY: the list is libvirt's own or empty, and is not used after this.
        unsafe { sys::virTypedParamsFree(self.first, self.count) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_driver::TestDomain;

    #[test]
    fn format_is_raw_when_the_hypervisor_is_too_old() {
        let test = TestDomain::new("format");
        // The version of libvirt's test driver is 2.
        assert_eq!(Format::best(&test.connect), Ok(Format::Raw));
    }

    #[test]
    fn parameters_reach_libvirt() {
        let calls = ParamCalls::find().unwrap();
        let test = TestDomain::new("params");
        let mut params = Params::default();
        params.add_number(sys::VIR_DOMAIN_SAVE_PARAM_PARALLEL_CHANNELS, 2).unwrap();
        params.add_text(sys::VIR_DOMAIN_SAVE_PARAM_FILE, c"/missing/file").unwrap();
        assert_eq!(params.count, 2);
        // SAFETY: connection and parameters outlive the call.
        let restored = unsafe { (calls.restore)(test.connect.as_ptr(), params.first, params.count, 0) };
        assert!(restored < 0, "the test driver has no such call");
    }

    #[test]
    fn text_with_a_null_byte_is_refused() {
        assert!(c_text("a\0b").unwrap_err().to_string().contains("null byte"));
    }
}
