//! The panic guard at the border.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::json::{Reply, reply};
use crate::{Error, ErrorKind, Result};

/// Runs the plugin's code for the host; a panic becomes an error.
///
/// Unwind safety is asserted: the host can still call the object after a panic. A plugin whose locks are poisoned
/// returns errors from then on, which the host handles.
pub(crate) fn guarded<T>(plugin: &str, call: impl FnOnce() -> Result<T>) -> Reply<T> {
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let reason = format!("the plugin '{plugin}' panicked: {}", panic_text(panic));
        Err(Error::new(ErrorKind::PluginPanicked, reason).advice(
            "This is a bug in the plugin: report it to its author with the lines around it in the log",
        ))
    });
    reply(result)
}

/// Runs code that returns no error; a panic becomes the default. The panic hook has already logged it.
pub(crate) fn guarded_quiet<T>(default: T, call: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        // Dropping the payload here could panic.
        let _ = panic_text(panic);
        default
    })
}

/// Returns the message of a panic.
pub(crate) fn panic_text(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => match panic.downcast::<&'static str>() {
            Ok(text) => (*text).to_owned(),
            Err(other) => {
                // Dropping a payload of the plugin's own type could panic again.
                std::mem::forget(other);
                "(no message)".to_owned()
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi_stable::std_types::RResult;

    #[test]
    fn panic_becomes_an_error_with_its_message() {
        let reply = guarded::<()>("lucky", || panic!("no {}", "luck"));
        let RResult::RErr(json) = reply else { panic!("an error") };
        let error: Error = serde_json::from_slice(json.as_bytes()).unwrap();
        assert_eq!(error.kind(), ErrorKind::PluginPanicked);
        assert!(error.to_string().contains("the plugin 'lucky' panicked: no luck"), "{error}");
    }

    #[test]
    fn payload_is_not_dropped_when_it_is_no_text() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert!(guarded::<()>("lucky", || std::panic::panic_any(Bomb)).is_err());
        assert_eq!(guarded_quiet(7, || std::panic::panic_any(Bomb)), 7);
    }
}
