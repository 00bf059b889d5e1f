//! The system's error behind one of libvirt's, which the `virt` crate leaves out.

use rustix::io::Errno;
use virt_sys as sys;

/// The errno of this thread's last error of libvirt. Only errors of the code `VIR_ERR_SYSTEM_ERROR` have one,
/// in `int1`. Source: `virReportSystemErrorFull` in libvirt's src/util/virerror.c.
pub fn last_errno() -> Option<Errno> {
    // SAFETY: libvirt gives null or its record of this thread's last error, which stays until the thread
    // calls libvirt again.
    let number = unsafe { sys::virGetLastError().as_ref() }?.int1;
    (number > 0).then(|| Errno::from_raw_os_error(number))
}
