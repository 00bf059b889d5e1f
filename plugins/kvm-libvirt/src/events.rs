//! libvirt's event loop, and the callbacks of events.
//!
//! libvirt has one event loop for a process, and leaves it to the process to run it. One thread runs it from
//! the first connection on, until the process ends. The thread sleeps until libvirt's socket has data, and
//! answers keepalive. The `virt` crate has no domain events, so this module registers them with `virt-sys`.
//! Except for one call each in `save` and `errno`, all `unsafe` code of the plugin is here.
//!
//! A callback runs in the event thread, or, when a connection ends, in the thread that noticed it. An
//! [`EventHandler`] must return quickly and must not call libvirt.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use machinery::{Error, Result};
use virt::connect::Connect;
use virt_sys as sys;

use crate::errors::explain;

/// The pause after a failure of the event loop. Without it, a broken loop would keep a processor busy.
const LOOP_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// An event of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A step in a domain's life. Source: `virDomainEventType` and its details in libvirt's
    /// libvirt-domain.h.
    Lifecycle {
        /// `VIR_DOMAIN_EVENT_…`
        event: u32,
        /// `VIR_DOMAIN_EVENT_…_…` of that event
        detail: u32,
    },
    /// The guest was reset, and boots again.
    Reset,
    /// A disk failed, and the guest was paused for it.
    DiskFailed {
        /// The disk's file, or its name in the domain.
        disk: String,
        /// Such as `enospc`; may be empty.
        reason: String,
    },
}

/// A subscriber to the events of one connection.
pub trait EventHandler: Send + Sync + 'static {
    /// Handles an event of the domain of that name.
    fn on_event(&self, label: &str, event: Event);
    /// Handles the end of the connection, if it was not closed by this process.
    fn on_close(&self, why: &str);
}

/// The argument of all callbacks of a connection.
type Opaque = Arc<dyn EventHandler>;

/// A connection with event callbacks, until this value is dropped.
pub struct MonitoredConnection {
    connect: Connect,
    callbacks: Vec<c_int>,
}

impl MonitoredConnection {
    /// Registers `handler` for the events of all domains, and for the end of the connection.
    ///
    /// # Errors
    /// libvirt does not support events.
    pub fn new(connect: Connect, handler: Arc<dyn EventHandler>) -> Result<MonitoredConnection> {
        let mut monitored = MonitoredConnection { connect, callbacks: Vec::new() };
        // SAFETY: a lifecycle callback has this type; libvirt casts it back by the event's number.
        let lifecycle = unsafe { std::mem::transmute::<Lifecycle, Generic>(on_lifecycle) };
        monitored.register(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, &handler)?;
        monitored.register(sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reset, &handler)?;
        // SAFETY: as above, for a callback of I/O errors.
        let io_error = unsafe { std::mem::transmute::<IoError, Generic>(on_io_error) };
        monitored.register(sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error, &handler)?;
        monitored.register_close(&handler)?;
        Ok(monitored)
    }

    /// Returns the connection.
    pub fn connect(&self) -> &Connect {
        &self.connect
    }

    fn register(&mut self, id: sys::virDomainEventID, callback: Generic, handler: &Opaque) -> Result<()> {
        let opaque = into_opaque(handler);
        // SAFETY: the connection is alive, and `opaque` stays so until libvirt calls `free_opaque`.
        let number = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                std::ptr::null_mut(),
                number(id),
                Some(callback),
                opaque,
                Some(free_opaque),
            )
        };
        if number < 0 {
            let error = virt::error::Error::last_error();
            // SAFETY: libvirt has refused the pointer and does not keep it.
            unsafe { free_opaque(opaque) };
            return Err(explain("report events of domains", &error));
        }
        self.callbacks.push(number);
        Ok(())
    }

    fn register_close(&self, handler: &Opaque) -> Result<()> {
        let opaque = into_opaque(handler);
        // SAFETY: as in `register`.
        let result = unsafe {
            sys::virConnectRegisterCloseCallback(
                self.connect.as_ptr(),
                Some(on_close),
                opaque,
                Some(free_opaque),
            )
        };
        if result < 0 {
            let error = virt::error::Error::last_error();
            // SAFETY: libvirt has refused the pointer and does not keep it.
            unsafe { free_opaque(opaque) };
            return Err(explain("report the end of its connection", &error));
        }
        Ok(())
    }
}

impl Drop for MonitoredConnection {
    fn drop(&mut self) {
        // On a dead connection the request to libvirtd fails, which does not matter: libvirt's client still
        // removes the callbacks, and with them the connection's last references.
        for callback in &self.callbacks {
            // SAFETY: the connection is alive, and it has returned this number.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), *callback) };
        }
        // SAFETY: the connection is alive, and this callback was registered with it.
        unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
    }
}

/// Starts the event loop, if it does not run yet. It must run before a connection is opened.
///
/// # Errors
/// The event loop cannot be started.
pub fn start_loop() -> Result<()> {
    static STARTED: OnceLock<Result<()>> = OnceLock::new();
    STARTED.get_or_init(start_loop_once).clone()
}

fn start_loop_once() -> Result<()> {
    // The callers report errors. By default libvirt also writes them to stderr.
    virt::error::clear_error_callback();
    virt::event::event_register_default_impl().map_err(|error| explain("make its event loop", &error))?;
    std::thread::Builder::new()
        .name("libvirt-events".to_owned())
        .spawn(run_loop)
        .map(drop)
        .map_err(|error| Error::environment(format!("cannot start a thread for libvirt's events: {error}")))
}

fn run_loop() {
    loop {
        if let Err(error) = virt::event::event_run_default_impl() {
            tracing::error!(%error, "libvirt's event loop failed and is tried again");
            std::thread::sleep(LOOP_RETRY_PAUSE);
        }
    }
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type Lifecycle =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type IoError = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);

/// SAFETY: only libvirt may call this, with a living domain and the registered `opaque` from [`into_opaque`].
unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let event = Event::Lifecycle { event: event.cast_unsigned(), detail: detail.cast_unsigned() };
    // SAFETY: the pointers are passed on as libvirt gave them.
    unsafe { dispatch(domain, event, opaque) };
    0
}

/// SAFETY: as [`on_lifecycle`].
unsafe extern "C" fn on_reset(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: the pointers are passed on as libvirt gave them.
    unsafe { dispatch(domain, Event::Reset, opaque) };
}

/// SAFETY: as [`on_lifecycle`]; the texts are null or end with a null byte.
unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    path: *const c_char,
    alias: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    if action.cast_unsigned() != sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE {
        return;
    }
    // SAFETY: libvirt's texts live as long as this call.
    let [path, alias, reason] = [path, alias, reason].map(|text| unsafe { owned(text) });
    let disk = if path.is_empty() { alias } else { path };
    // SAFETY: the pointers are passed on as libvirt gave them.
    unsafe { dispatch(domain, Event::DiskFailed { disk, reason }, opaque) };
}

/// SAFETY: only libvirt may call this, with `opaque` from [`into_opaque`].
unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    let why = match reason.cast_unsigned() {
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirtd has ended",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirtd does not answer any more",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => return,
        _ => "the connection broke",
    };
    // SAFETY: the handler is alive until `free_opaque`, which libvirt calls after the last callback.
    let handler = unsafe { &*opaque.cast::<Opaque>() };
    guarded(|| handler.on_close(why));
}

/// Calls the handler. SAFETY: `domain` is alive, `opaque` is from [`into_opaque`].
unsafe fn dispatch(domain: sys::virDomainPtr, event: Event, opaque: *mut c_void) {
    // SAFETY: the name belongs to the domain, which is alive for this call.
    let label = unsafe { owned(sys::virDomainGetName(domain)) };
    // SAFETY: the handler is alive until `free_opaque`, which libvirt calls after the last callback.
    let handler = unsafe { &*opaque.cast::<Opaque>() };
    guarded(|| handler.on_event(&label, event));
}

/// Calls the handler, and catches its panics, which must not unwind into libvirt.
fn guarded(call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!("the handler of an event of libvirt has panicked: this is a bug of the plugin");
    }
}

/// Copies a text. SAFETY: `text` is null or ends with a null byte.
unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, so it ends with a null byte.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn into_opaque(handler: &Opaque) -> *mut c_void {
    Box::into_raw(Box::new(Arc::clone(handler))).cast()
}

/// Drops the argument. SAFETY: `opaque` is from [`into_opaque`] and is not used any more.
unsafe extern "C" fn free_opaque(opaque: *mut c_void) {
    // SAFETY: `into_opaque` made it from a box of that type.
    drop(unsafe { Box::from_raw(opaque.cast::<Opaque>()) });
}

fn number(id: sys::virDomainEventID) -> c_int {
    id.cast_signed()
}
