//! The system error that caused an error of libvirt. The `virt` crate does not pass it on.

use rustix::io::Errno;
use virt_sys as sys;

/// Returns the errno of this thread's last error of libvirt. Only errors of the code `VIR_ERR_SYSTEM_ERROR`
/// have an errno, in `int1`. Source: `virReportSystemErrorFull` in libvirt's src/util/virerror.c.
pub fn last_errno() -> Option<Errno> {
    // SAFETY: libvirt returns null or its record of this thread's last error. The record is valid until the
    // thread calls libvirt again.
    let number = unsafe { sys::virGetLastError().as_ref() }?.int1;
    (number > 0).then(|| Errno::from_raw_os_error(number))
}
