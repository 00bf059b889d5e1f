//! Converts the replies of a plugin into results, and limits the length of their errors.

use abi_stable::std_types::RResult;

use crate::abi::{Reply, from_json};
use crate::text::{MAX_KEPT, MAX_REPORTED};
use crate::{Error, Result};

/// Converts the reply of a call on a machinery. The host keeps the error.
pub(super) fn into_result<T>(reply: Reply<T>) -> Result<T> {
    convert(reply, MAX_KEPT)
}

/// Converts the reply of a load or a check. The host reports the error once; it may contain a long list.
pub(super) fn into_reported_result<T>(reply: Reply<T>) -> Result<T> {
    convert(reply, MAX_REPORTED)
}

fn convert<T>(reply: Reply<T>, max: usize) -> Result<T> {
    match reply {
        RResult::ROk(value) => Ok(value),
        RResult::RErr(json) => {
            let error = from_json::<Error>(json.as_bytes(), "plugin's error");
            Err(error.map_or_else(|misbehaved| misbehaved, |error| error.cut(max)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn reply_is_misbehaviour_when_its_error_is_invalid() {
        let error = into_result::<()>(RResult::RErr("not json at all".into())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(error.to_string().contains("not json at all"), "{error}");
    }
}
