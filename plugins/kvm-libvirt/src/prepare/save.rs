//! Saving a domain to a file. The `virt` crate has no function that saves a paused domain as running.

use std::ffi::CString;

use machinery::{Error, Result};
use virt::domain::Domain;
use virt_sys as sys;

use crate::errors::explain;

/// Saves the domain's state to `path` and ends the domain. A restore of the file starts the domain that `xml` describes.
///
/// # Errors
/// libvirt cannot save the domain. The domain may still be on then, and a part of the file may exist.
pub fn save(domain: &Domain, path: &str, xml: &str) -> Result<()> {
    let to = CString::new(path).map_err(|_| Error::failed(format!("{path:?} is not a path")))?;
    let xml = CString::new(xml).map_err(|_| Error::failed("the domain's description has a null byte"))?;
    let flags = sys::VIR_DOMAIN_SAVE_RUNNING;
    // SAFETY: the domain is alive, both texts end with a null byte, and all outlive the call.
    let saved = unsafe { sys::virDomainSaveFlags(domain.as_ptr(), to.as_ptr(), xml.as_ptr(), flags) };
    if saved < 0 {
        return Err(explain(&format!("save the domain to {path}"), &virt::error::Error::last_error()));
    }
    Ok(())
}
