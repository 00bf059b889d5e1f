//! The failures of a template. After a few of them, the template is not tried again until its identity changes.
//!
//! The failures of builds count for all machines of the template. Those of a load count for the machine alone, whose own
//! user, files or network may be the cause.

use std::sync::Mutex;

use machinery_backend::sync::lock;

use super::identity::Identity;

/// The maximum number of builds and loads of one identity that may fail.
const MAX_TRIES: u32 = 3;

/// The failures of a template.
#[derive(Default)]
pub struct TemplateFailures(Mutex<Option<Failures>>);

/// The failures of one identity.
struct Failures {
    identity: Identity,
    tries: u32,
    /// The reason of the last failure.
    why: String,
}

impl TemplateFailures {
    /// Adds a failure. Failures of another identity are dropped.
    pub fn add(&self, identity: &Identity, why: &str) {
        let mut failures = lock(&self.0);
        let before = failures.take().filter(|known| known.identity == *identity);
        let tries = before.map_or(0, |known| known.tries) + 1;
        *failures = Some(Failures { identity: identity.clone(), tries, why: why.to_owned() });
    }

    /// Returns the reason not to try a template of this identity again, if there is one.
    pub fn reason_to_give_up(&self, identity: &Identity) -> Option<String> {
        let failures = lock(&self.0);
        let known =
            failures.as_ref().filter(|known| known.identity == *identity && known.tries >= MAX_TRIES)?;
        Some(format!("tried {} times: {}", known.tries, known.why))
    }

    /// Drops all failures, after a restore that worked.
    pub fn clear(&self) {
        *lock(&self.0) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepare::identity::tests::identity;

    #[test]
    fn template_is_given_up_after_the_maximum_of_failures_until_one_works() {
        let folder = tempfile::tempdir().unwrap();
        let (identity, failures) = (identity(folder.path()), TemplateFailures::default());
        for _ in 0..MAX_TRIES {
            assert_eq!(failures.reason_to_give_up(&identity), None);
            failures.add(&identity, "no way");
        }
        assert_eq!(failures.reason_to_give_up(&identity).unwrap(), "tried 3 times: no way");
        failures.clear();
        assert_eq!(failures.reason_to_give_up(&identity), None);
    }
}
